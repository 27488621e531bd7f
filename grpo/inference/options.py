"""What the options of `grpo sample`, `chat`, `export`, `reject` and `serve` say of a model: checked before torch is imported."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from grpo.config import Config, RewardConfig, SupervisedConfig, read_text, shipped
from grpo.config.load import read_settings
from grpo.policy.model_source import complete_checkpoints, numbers_of
from grpo.scoring.reward import check_spec
from grpo.system.terminal import say


def check_options(options: Namespace, *, is_made: bool = True) -> None:
    """See that they can be meant: the run, its step, numbers, and what YAML they lead to.

    Args:
        is_made: whether the model is there; the steps of a run that is yet to be made are not looked for.

    Raises:
        ValueError: there is no such run or step, a number is out of range, or the configuration cannot be read.
    """
    if is_made:
        _check_step(options, run_directory(options.model))
    for name in RULES:
        if (value := getattr(options, name)) is not None:
            check_number(name, value)
    for name in getattr(options, "tools", None) or []:
        if not name.startswith("{"):
            check_spec(name, "--tools", "grpo.tools")
    named_settings(options, is_made=is_made)


def _check_step(options: Namespace, directory: Path | None) -> None:
    if directory is None:
        for option, given in (("--step", options.step), ("--base", options.base or None)):
            if given is not None:
                raise ValueError(
                    f"{option} is {given}; {options.model!r} belongs to no run (there is no config.yaml), so it has neither "
                    f"steps nor a starting model. Leave {option} out, or name a run's directory."
                )
    if options.base and options.step is not None:
        raise ValueError(f"--step is {options.step} with --base; that is step 0 of the run. Leave one of the two out.")
    if options.step is not None:
        checkpoint_of(directory, options.step, "--steps" if getattr(options, "steps", None) else "--step")


LATEST, BASE = "latest", "base"
"""What stands for a step among --steps."""


def served_models(options: Namespace) -> Iterator[tuple[str, str | None, Namespace]]:
    """Of what `grpo serve` hosts, the name, the step if it is a run's, and the options of a command that asks one model.

    Raises:
        ValueError: a step is none, or is named twice, or there is no run that has steps.
    """
    steps = options.steps or [LATEST]
    if len(set(steps)) < len(steps):
        raise ValueError(f"--steps is {' '.join(steps)}; each step is served once. Remove the others.")
    run = run_directory(options.model)
    if options.steps and run is None:
        raise ValueError(
            f"--steps is {' '.join(steps)}; {options.model!r} belongs to no run (there is no config.yaml). Leave it out, or name "
            "a run's directory."
        )
    usual = run.resolve().name if run is not None else Path(options.model).resolve().name
    name = options.name or (usual if Path(options.model).exists() else options.model)
    for step in steps:
        if not (step in (LATEST, BASE) or step.isdecimal()):
            raise ValueError(f"--steps has {step!r}; a step is a number, {LATEST} or {BASE}. Correct it.")
        number = int(step) if step.isdecimal() else None
        asked = Namespace(**{**vars(options), "step": number, "base": step == BASE})
        yield (name if len(steps) == 1 else f"{name}:{step}"), (step if run is not None else None), asked


def run_directory(model: str) -> Path | None:
    """The run that a directory is, or that a checkpoint or its `hf` lies in; None if there is none."""
    path = Path(model).absolute()
    for directory, inside in ((path, ""), *((parent, "checkpoints") for parent in path.parents[1:3])):
        if (directory / "config.yaml").is_file() and path.is_relative_to(directory / inside):
            return directory
    return None


def short_name(model: str, run: Path | None) -> str:
    """What a person would call it: the run's directory, or the last part of a path or hub id."""
    path = run or Path(model)
    return path.absolute().name if path.exists() else path.name


def checkpoint_of(run: Path | None, step: int, option: str = "--step") -> Path:
    """Raises ValueError if the run has none of this step, which `option` named."""
    assert run is not None, "a step of no run was refused"
    steps = {numbers_of(checkpoint): checkpoint for checkpoint in complete_checkpoints(run / "checkpoints")}
    if (step, None) not in steps:
        known = ", ".join(str(number) for number, updates in steps if updates is None) or "none"
        raise ValueError(
            f"{option} is {step}; the run in {run} has checkpoints of these steps: {known}. Choose one of them."
        )
    return steps[step, None]


def named_settings(options: Namespace, *, is_made: bool = True) -> Config | None:
    """What --config says, or else the model's run; None if there is neither."""
    directory = run_directory(options.model) if is_made else None
    if (path := options.config or (directory and directory / "config.yaml")) is None:
        return None
    settings = settings_of(Path(path), getattr(options, "set", ()))
    return settings if options.config or options.base else with_own_chat_template(settings)


def with_own_chat_template(settings: Config) -> Config:
    """A run's settings as its checkpoints are asked: their tokenizer has the chat template, whose file is not read again."""
    return settings.model_copy(update={"data": settings.data.model_copy(update={"chat_template": None})})


def settings_of(path: Path, overrides: Sequence[str] = ()) -> Config:
    """What a YAML says, and overrides as `Config.load` takes; of supervised training, how its held-out questions are asked."""
    return (
        SupervisedConfig.load(path, overrides).parts if is_supervised(path) else Config.load_questions(path, overrides)
    )


def is_supervised(path: Path) -> bool:
    """Whether a YAML, or a configuration that comes with the library, says how rows are learned."""
    file = shipped.find(path)
    return "training" in read_settings(read_text(file, f"{path} is a configuration"), str(file))


OWN_REWARDS = ("grpo.rewards:", "grpo.rewards.")
"""How the names of functions begin that come with this package; `rewards.py` or a package `rewards` is somebody's own."""


def foreign_rewards(rewards: Sequence[RewardConfig]) -> list[str]:
    """The functions that do not come with this package."""
    return [each.function for each in rewards if ":" in each.function and not each.function.startswith(OWN_REWARDS)]


def check_trusted_rewards(rewards: Sequence[RewardConfig], options: Namespace, *, asks: bool = True) -> None:
    """Raises ValueError as `check_trusted` does, of the rewards that a run's configuration lists."""
    if not options.trust_rewards:
        foreign = foreign_rewards(rewards)
        check_trusted(foreign, "reward functions that are run", "say so with --trust-rewards", options, asks=asks)


def check_trusted(foreign: Sequence[str], what: str, how: str, options: Namespace, *, asks: bool = True) -> None:
    """A configuration that a person names with --config is trusted. Otherwise a terminal asks.

    Args:
        asks: False if a person at a terminal is to be asked later.

    Raises:
        ValueError: a run's configuration names code of others, and nobody has said that it may run.
    """
    if not foreign or options.config:
        return
    said = f"the configuration of {options.model!r} names {what} here: {', '.join(foreign)}"
    if can_ask():
        if not asks:
            return
        say(f"{said}. Run them? [y/N]", file=sys.stderr)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ValueError(f"{said}. If you trust them, {how}, or name a YAML of your own with --config.")


def can_ask() -> bool:
    """Whether a person sits at a terminal and can say what may run."""
    return sys.stdin.isatty() and sys.stderr.isatty()


RULES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "temperature": (
        lambda value: 0 <= value < math.inf,
        "it is at least 0",
        "Set 0 for the likeliest token, 1 as is usual",
    ),
    "top_p": (lambda value: 0 < value <= 1, "it is above 0 and at most 1", "Set 1 to draw from all tokens"),
    "max_tokens": (lambda value: value >= 1, "an answer has at least 1 token", "Raise it"),
}
"""Of numbers that a person may set: whether one is allowed, the rule, the remedy."""


def check_number(name: str, value: float, prefix: str = "--") -> None:
    """Raises ValueError if it is not allowed."""
    holds, rule, remedy = RULES[name]
    if not holds(value):
        raise ValueError(f"{prefix}{name.replace('_', '-')} is {value}; {rule}. {remedy}.")
