"""Which environment answers a run's turns, and the questions that it brings."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo.config import DataConfig, EnvironmentConfig
from grpo.data.rows import prepare_rows
from grpo.data.where import Selection
from grpo.scoring.reward import Reward, resolve_function
from grpo.turns.episode import EpisodeRunner, environment

SETTING = "environment.function"

Make = Callable[..., Any] | type
"""A class, or another function that makes an object."""

SIZE = 1000
"""Questions of an environment's own where nothing else is said."""


@dataclass(frozen=True)
class Environment:
    """An environment, as its run has set it."""

    runner: EpisodeRunner
    config: EnvironmentConfig

    @classmethod
    def of(cls, config: EnvironmentConfig, given: Make | None = None) -> Environment | None:
        """The environment that a configuration names, or the one that is given instead; None: there is none.

        Raises:
            ValueError: there is no such class, it has no `step`, or it does not take the args.
        """
        if given is None and config.function is None:
            return None
        make = resolve_function(config.function or "", SETTING, "grpo.tools.environments") if given is None else given
        said = config.function if given is None else given
        if not callable(make):
            raise ValueError(
                f"environment is {make!r}; it is a class, whose objects have a method `step`. Hand over the class."
            )
        if inspect.isclass(make) and not callable(getattr(make, "step", None)):
            raise ValueError(
                f"{SETTING} is {said!r}; the class has no method `step`, which answers a turn of the model. Give it "
                "`step(self, text: str) -> str | None`; a class whose methods the model is to call belongs into tools."
            )
        parameters = inspect.signature(make).parameters
        open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        for name in config.args:
            if name not in parameters and not open_ended:
                raise ValueError(
                    f"environment.args sets {name!r}; {said!r} has no such parameter: {', '.join(parameters) or 'none'}. Remove "
                    "it or correct the name."
                )
        return cls(EpisodeRunner(make, dict(config.args)), config)

    @property
    def reward(self) -> Reward:
        """The reward function that counts what it gave."""
        return Reward(environment, weight=self.config.weight)

    def rows(self, *, held_out: bool) -> list[dict[str, Any]] | None:
        """Questions of its own, made by its static method `rows(size, seed, ...)`, which is given those of its args that it
        names; None: it has none.

        Row i is made from seed + i by convention, so held-out rows are those that would come next.

        Raises:
            ValueError: it does not take environment.rows.
        """
        make = getattr(self.runner.make, "rows", None)
        if make is None:
            if self.config.rows:
                raise ValueError(
                    f"environment.rows is {self.config.rows}; {self.runner.name} has no `rows` that would make questions. Set "
                    "data.name, and remove environment.rows."
                )
            return None
        shared = {name: value for name, value in self.config.args.items() if name in inspect.signature(make).parameters}
        args = {"size": SIZE, "seed": 0, **shared, **self.config.rows}
        if held_out:
            args["seed"] += args["size"]
        try:
            inspect.signature(make).bind(**args)
        except TypeError as error:
            raise ValueError(
                f"environment.rows is {self.config.rows}; the `rows` of {self.runner.name} takes "
                f"{', '.join(inspect.signature(make).parameters)}: {error}. Correct environment.rows."
            ) from None
        return [{"question": "", "answer": "", **row} for row in make(**args)]


def own_rows(
    environment: Environment,
    data: DataConfig,
    *,
    evaluation: bool,
    reads_answer: bool,
    left_out: Counter[str] | None = None,
) -> list[dict[str, Any]] | None:
    """The questions that an environment brings, as rows of the data, where the data names none; None: it brings none.

    Args:
        evaluation: those of the evaluation.
        reads_answer: as load_rows has it, and left_out.

    Raises:
        ValueError: as Environment.rows; or a row is none, or environment.rows has no effect.
    """
    if data.name is not None and environment.config.rows:
        raise ValueError(
            f"environment.rows is {environment.config.rows}; the questions are those of data.name ({data.name!r}), and it has no "
            "effect. Remove one of the two."
        )
    if data.name is not None or (evaluation and data.eval_name is not None):
        return None
    made = environment.rows(held_out=evaluation)
    if made is None:
        return None
    return prepare_rows(
        made,
        data,
        answer_regex=data.answer_regex,
        setting="environment.rows",
        reads_answer=reads_answer,
        selection=Selection.of(data, held_out=evaluation, left_out=left_out),
    )


def check_unused(config: EnvironmentConfig) -> None:
    """Raises ValueError: there is no environment, and something is set of it."""
    for name, field in type(config).model_fields.items():
        if getattr(config, name) != field.get_default(call_default_factory=True):
            raise ValueError(
                f"environment.{name} is {getattr(config, name)!r}; there is no environment, and it has no effect. Set "
                "environment.function, hand an environment to Trainer, or remove it."
            )
