"""Models and data sets that cannot be had, or whose files are not whole, told before torch is imported: in a second or two."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo.config import Config, SupervisedConfig
from grpo.data.files import FORMATS
from grpo.policy.model_source import check_files, complete_checkpoints, model_directory
from grpo.system import hub_access

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_config(
    config: Config | SupervisedConfig, is_to_come: Callable[[object], bool], *, asks_hub: bool = True
) -> None:
    """Raises ValueError for a model or data set that is neither on this machine nor to be had from the hub, and for a model here
    whose files are not whole.

    Args:
        is_to_come: whether a model is made before it is needed, and is not looked for.
        asks_hub: whether what may be of the hub is looked for there.
    """
    for setting, name, revision in models_of(config):
        if not is_to_come(name):
            check_model(name, setting, revision, asks_hub=asks_hub)
    for setting, name in _data_sets(config) if asks_hub else ():
        if _may_be_of_hub(name) and not hub_access.has_data_set(name) and (reason := hub_access.unreachable()):
            raise ValueError(hub_access.no_data_set(f"{setting} is {name!r}", name, setting, reason))


def models_of(config: Config | SupervisedConfig) -> Iterator[tuple[str, str, str]]:
    """Setting, name and revision of each model that a run loads."""
    yield "model.name", config.model.name, config.model.revision
    if isinstance(config, Config) and config.teacher.name is not None:
        yield "teacher.name", config.teacher.name, config.teacher.revision
    for number, reward in enumerate(config.rewards if isinstance(config, Config) else []):
        model = reward.args.get("model")
        if reward.function == "reward_model" and isinstance(model, str):
            yield f"rewards.{number}.args.model", model, str(reward.args.get("revision", "main"))


def check_model(
    name: str, setting: str = "--model", revision: str = "main", *, whole: bool = True, asks_hub: bool = True
) -> None:
    """Raises ValueError if it is neither on this machine nor to be had from the hub.

    Args:
        whole: refuse one here whose files are not whole, too; otherwise its weights are not read.
        asks_hub: whether one that may be of the hub is looked for there.
    """
    path, is_first = Path(name), os.environ.get("RANK", "0") == "0"
    is_begun = (path / "config.yaml").is_file() and not complete_checkpoints(
        path / "checkpoints"
    )  # --base needs no more
    if whole and is_first and not is_begun and (directory := Path(model_directory(name, setting=setting))).is_dir():
        check_files(directory, f"{setting} is {name!r}")
    if not asks_hub:
        return
    if _may_be_of_hub(name) and not hub_access.has_model(name, revision) and (reason := hub_access.unreachable()):
        raise ValueError(hub_access.no_model(f"{setting} is {name!r}", name, setting, reason))


def _may_be_of_hub(name: str) -> bool:
    """Other names are files and folders, whose mistakes are told elsewhere; and one of several processes is enough to ask."""
    folder = name.partition("/")[0] if "/" in name else ""
    is_file = Path(name).suffix in (*FORMATS, ".gguf")
    is_other = is_file or Path(name).exists() or name.startswith(".") or bool(folder and Path(folder).is_dir())
    return bool(HUB_ID.fullmatch(name)) and not is_other and os.environ.get("RANK", "0") == "0"


def _data_sets(config: Config | SupervisedConfig) -> Iterator[tuple[str, str]]:
    data = config.data
    for setting, sources in (("data.name", data.name), ("data.eval_name", data.eval_name)):
        for source in sources if isinstance(sources, list) else [sources]:
            name = source if isinstance(source, str) or source is None else source.name
            if name is not None:
                yield setting, name
