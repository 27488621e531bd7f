"""Whether a run may go on from a checkpoint, by the settings that it was written with. Nothing here imports torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel

from grpo.config import AnyConfig, Config, shipped
from grpo.config.load import as_override
from grpo.policy.model_source import complete_checkpoints

MAY_CHANGE = {
    "run.steps",
    "run.resume",
    "run.dir",
    "run.max_hours",
    "run.accept_changes",
    "run.push_to_hub",
    "run.push_at",
    "run.hub_private",
    "checkpoint",
    "logging",
    "evaluation",
    "scoring",
    "memory",
    "vllm",
    "preflight",
    "watchdog",
    "algorithm.max_sampling_gap",
    "distributed",
    "rollout.max_completion_tokens",  # R1-Zero doubled it on the way; nothing that a checkpoint holds depends on it
}
"""What may differ between a run and its resumption without making it another experiment."""

MAY_NOT_CHANGE = {"scoring.verdict"}
"""Of the sections that may, what is left as it is: what is right, by which batches are chosen."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json holds.

    Raises:
        ValueError: it is not as it was written.
    """
    try:
        record = json.loads((checkpoint / "state.json").read_text())
        expected = record.pop("checksum")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"state.json cannot be read: {error}") from None
    if checksum_of(record) != expected:
        raise ValueError("state.json is not what was written: its checksum differs")
    return record


def checksum_of(record: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def check_newest(config: AnyConfig) -> None:
    """Raises ValueError as `check_resumable` will, of the newest checkpoint. What a run writes down of its models and its data is
    more than it was told, such as where a run's newest checkpoint lies and the words of its tools: those are left to it."""
    there = [] if config.run.resume == "never" else complete_checkpoints(Path(config.run.dir) / "checkpoints")
    if there:
        try:
            read_state(there[-1])
        except ValueError:  # the run looks for an older one
            return
        check_resumable(there[-1], config, may_change=MAY_CHANGE | {"model", "teacher", "data"})


def other_place(config: AnyConfig, path: str | Path) -> str | None:
    """What is said where a run would begin anew and its configuration is that of a run which was moved, with its checkpoints.

    Args:
        path: of the configuration.
    """
    wanted, beside = Path(config.run.dir), shipped.find(path).parent
    if config.run.resume == "never" or complete_checkpoints(wanted / "checkpoints"):
        return None
    if not complete_checkpoints(beside / "checkpoints"):
        return None
    setting = f"run.dir={as_override(str(beside))}"
    return f"checkpoints lie beside the configuration, in {beside}: {shlex.quote(setting)} goes on from there"


def check_resumable(checkpoint: Path, config: AnyConfig, *, may_change: set[str] = MAY_CHANGE) -> None:
    """Raises ValueError if the checkpoint is of another experiment."""
    before, now = completed(read_state(checkpoint)["config"], config), config.model_dump(mode="json")
    name = changed_setting(before, now, may_change=may_change)
    if name is not None:
        raise ValueError(
            f"{name} is {_flat(now).get(name)!r}; {checkpoint} was written with {_flat(before).get(name)!r}, and a run resumes "
            "with the settings it began with. Restore the value, or choose another run.dir."
        )


def completed(before: dict[str, Any], config: AnyConfig) -> dict[str, Any]:
    """Settings that a checkpoint was written with, and the defaults of those that are newer than it."""
    whole: dict[str, Any] = _completed(before, config)
    return whole


def _completed(before: Any, now: Any) -> Any:
    """At any depth: sections, entries of lists and values of mappings, whose kind is that of what is in their place now."""
    if isinstance(now, BaseModel) and isinstance(before, dict):
        whole = type(now).model_construct().model_dump(mode="json") | before
        return {name: _completed(value, getattr(now, name, None)) for name, value in whole.items()}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [_completed(*pair) for pair in zip(before, now, strict=True)]
    if isinstance(now, dict) and isinstance(before, dict):
        return {name: _completed(value, now.get(name)) for name, value in before.items()}
    return before


def changed_setting(before: dict[str, Any], now: dict[str, Any], *, may_change: set[str]) -> str | None:
    """The first setting in which two configurations differ, but for settings and sections that may; None if there is none."""
    flat_before, flat_now = _flat(before), _flat(now)
    for name in sorted(flat_before.keys() | flat_now.keys()):
        may = name in may_change or (name.split(".")[0] in may_change and name not in MAY_NOT_CHANGE)
        if not may and flat_before.get(name) != flat_now.get(name):
            return name
    return None


def longer(checkpoint: Path, config: AnyConfig) -> str:
    """What is said where completions may be longer than before: of all that may change, this alone changes what is learned."""
    if not isinstance(config, Config):
        return ""
    before = read_state(checkpoint)["config"]["rollout"]["max_completion_tokens"]
    now = config.rollout.max_completion_tokens
    return (
        ""
        if before == now
        else f"rollout.max_completion_tokens is {now} from here on; it was {before} up to {checkpoint.name}"
    )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, settings in config.items()
        for name, value in (settings.items() if isinstance(settings, dict) else [("", settings)])
    }
