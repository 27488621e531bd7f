"""An environment's end of a step, in a worker process. Uses the standard library and what the environment imports.

As an object of a tool, that of an environment comes and goes as bytes. What it raises is a bug of its own: a text that the model
wrote badly is answered, or ends the episode, inside of it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.turns import runner
from grpo.turns.runner import MAX_STATE_BYTES, begin, check_told, observation, texts_of

Action = Literal["reset", "step", "reward"]
"""reset: what there is to say before the first turn. step: to a turn. reward: of an episode that a limit has ended."""


@dataclass(frozen=True)
class Step:
    """What an environment made of a turn: what it says to it, None if the episode is over; and the reward it gave, None if it
    cannot tell."""

    said: tuple[str, ...] | None
    reward: float | None
    state: bytes | None = None  # the object, where the episode goes on


@dataclass(frozen=True)
class EpisodeRunner:
    """Makes the steps of the objects of one class.

    Args:
        make: the class, or another function that makes an object.
        given: its arguments.
    """

    make: Callable[..., Any]
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Callable[..., Any]:
        """What a functools.partial is of."""
        return getattr(self.make, "func", self.make)

    @property
    def name(self) -> str:
        return str(getattr(self.source, "__name__", type(self.source).__name__))

    def __call__(
        self, action: Action, text: str, state: bytes | None, columns: Mapping[str, Any], seed: int
    ) -> str | Step:
        """Make a step.

        Args:
            text: of the model's turn.
            state: the object as a step before left it; None: it is made anew for the question, with its `reset`.
            columns: of the question.
            seed: of the random numbers of Python, and of numpy where it has been imported.

        Returns:
            Of `reset` the text, which may be empty; else a Step.
        """
        import cloudpickle

        if state is None:
            held, said = begin(self.make, self.given, columns)
            if action == "reset":
                return observation(said)
            check_told(held, said, columns)
        else:
            held = cloudpickle.loads(state)
        runner.seed(seed)
        if action == "reward":
            return Step(None, _final(held))
        said, reward = _told(held.step(text))
        if said is None:
            final = _final(held)
            return Step(None, None if final is None else reward + final)
        kept = cloudpickle.dumps(held)
        if len(kept) > MAX_STATE_BYTES:
            raise ValueError(
                f"{self.name} has {len(kept) >> 20} MiB after a step; {MAX_STATE_BYTES >> 20} can be kept."
            )
        return Step(texts_of(said), reward, kept)


def _told(returned: Any) -> tuple[Any, float]:
    """What `step` says, and the reward of the turn, which may stand beside it in a pair."""
    if hasattr(returned, "__await__"):
        import asyncio

        async def wait() -> Any:
            return await returned

        returned = asyncio.run(wait())
    if not isinstance(returned, tuple):
        return returned, 0.0
    if len(returned) != 2:
        raise ValueError(f"step returned {len(returned)} values; it returns what it says, or that and a reward.")
    said, reward = returned
    return said, _number(reward, "step")


def _final(held: Any) -> float | None:
    """What `reward`, which is asked once at the end, adds to the rewards of the turns; None: nobody can tell what they are."""
    reward = getattr(held, "reward", 0.0)
    given = reward() if callable(reward) else reward
    return None if given is None else _number(given, "reward")


def _number(value: Any, method: str) -> float:
    value = value.item() if hasattr(value, "item") else value  # numpy and torch
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{method} returned {value!r} as the reward; it is a finite number.")
    return float(value)


def environment(environment_reward: float | None) -> float | None:
    """The reward function in whose name the environment's own is counted."""
    return environment_reward


environment.tells_of_all = True  # type: ignore[attr-defined] # None is an episode that failed
