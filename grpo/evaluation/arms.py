"""What a comparison runs: its arms, each with every seed; whatever is wrong with them is told before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.config import Config, as_override, read_yaml
from grpo.run.resumable import MAY_CHANGE, changed_setting, completed
from grpo.scoring.answers import ENVIRONMENT, verdicts_of
from grpo.scoring.reward import likely_name

OWN = ("run.dir", "run.seed", "run.resume")
"""Settings that a comparison sets itself."""
MAY_DIFFER = MAY_CHANGE - {"run.steps", "rollout.max_completion_tokens", "evaluation", "scoring", "watchdog"} | {
    "scoring.num_workers"
}
"""Settings that may differ between a run that is there and the one asked for; any other changes what is learned or measured."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared."""

    name: str
    config: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRun:
    """An arm with a seed."""

    arm: Arm
    seed: int
    directory: Path
    settings: list[str]  # to be set to get it
    config: Config  # that then follows

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")


def arms_of(configs: Sequence[Path], variants: Sequence[str], overrides: Sequence[str]) -> list[Arm]:
    """Each configuration as it is, and then with each variant: `NAME:section.setting=value,section.setting=value`.

    Raises:
        ValueError: a variant does not read like that, or two arms have the same name.
    """
    arms = []
    for path in configs:
        arms.append(Arm(path.stem, path, tuple(overrides)))
        for text in variants:
            name, settings = _variant(text)
            arms.append(Arm(name if len(configs) == 1 else f"{path.stem}-{name}", path, (*overrides, *settings)))
    names = [arm.name for arm in arms]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"CONFIG and --variant give the name {sorted(twice)[0]!r} twice; a name is a directory and a line of the table. "
            "Rename a file or a variant."
        )
    return arms


def _variant(text: str) -> tuple[str, list[str]]:
    name, colon, settings = text.partition(":")
    found = re.split(r",(?=\w+(?:\.\w+)+=)", settings)  # a comma within a value, as in [a, b], is part of it
    if not colon or not re.fullmatch(r"\w[\w.-]*", name) or not all("=" in each for each in found):
        raise ValueError(
            f"--variant is {text!r}; it reads NAME:section.setting=value, such as drgrpo:algorithm.normalize_by_std=false, with "
            "commas between settings. Correct it."
        )
    return name, found


def plan(arms: Sequence[Arm], seeds: Sequence[int], out: Path) -> list[PlannedRun]:
    """All runs, seed by seed, so that what there is after a while can be compared.

    Raises:
        ValueError: whatever is wrong with a configuration; nothing is held out; a directory holds another run.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds is {list(seeds)}; each seed is one run, so none may be there twice. Remove one.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {str(out)!r}; it is a file, and the runs go into a directory. Name a directory.")
    runs = [_planned(arm, seed, out / arm.name / f"seed-{seed}") for seed in seeds for arm in arms]
    for run in runs:
        _check_comparable(run)
        _check_judged_alike(runs[0], run)
    return runs


def _planned(arm: Arm, seed: int, directory: Path) -> PlannedRun:
    _check_overrides(arm)
    own = [f"run.dir={as_override(str(directory))}", f"run.seed={seed}", "run.resume=auto"]
    settings = [*arm.overrides, *own]
    return PlannedRun(arm, seed, directory, settings, Config.load(arm.config, settings))


def _check_overrides(arm: Arm) -> None:
    for override in arm.overrides:
        if override.split("=")[0].strip() in OWN:
            raise ValueError(
                f"{override} is set for {arm.name}; a comparison sets {', '.join(OWN)} itself. Remove it; --out and --seeds are "
                "what to use."
            )


def _check_comparable(run: PlannedRun) -> None:
    if run.config.evaluation.num_questions == 0:
        raise ValueError(
            f"evaluation.num_questions is 0 in {run.arm.name}; arms are compared by their held-out answers. Set "
            "evaluation.num_questions."
        )
    saved = run.directory / "config.yaml"
    if saved.exists():
        before = completed(read_yaml(saved.read_text()), run.config)
        name = changed_setting(before, run.config.model_dump(mode="json"), may_change=MAY_DIFFER)
        if name is not None:
            raise ValueError(
                f"--out has {run.directory}; the run there differs from the one asked for in {name}. Choose another --out, or "
                "remove that directory."
            )


def _check_judged_alike(first: PlannedRun, other: PlannedRun) -> None:
    """What is right is what one reward says; of two arms by two rewards the table would compare nothing."""
    ours, theirs = (" or ".join(verdicts_in(run.config)) for run in (first, other))
    if ours != theirs:
        raise ValueError(
            f"what is right is said by {theirs} in {other.arm.name} and by {ours} in {first.arm.name}; accuracies by two rewards "
            f"do not compare. Let {other.arm.name} measure {ours} too, with weight 0, and name it in scoring.verdict."
        )


def verdicts_in(config: Config) -> list[str]:
    """Names of the rewards that say what is right in a run of this configuration."""
    names = [likely_name(each.function, each.name) for each in config.rewards]
    if config.environment.function is not None:
        names.append(ENVIRONMENT)
    return verdicts_of(config.scoring.verdict, names)
