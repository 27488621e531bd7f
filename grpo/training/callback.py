"""What a user's own code can do while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.training.state import Rollout


def check_callbacks(callbacks: Any) -> None:
    """
    Raises:
        ValueError: they are no list of callbacks.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Sequence):
        raise ValueError(f"callbacks is {callbacks!r}; it is a list of callbacks. Put it into one: callbacks=[...].")
    for number, each in enumerate(callbacks):
        if isinstance(each, type):
            raise ValueError(
                f"callbacks[{number}] is the class {each.__name__}. Hand over an object: {each.__name__}()."
            )
        lacks = [name for name in vars(Callback) if name.startswith("on_") and not callable(getattr(each, name, None))]
        if lacks:
            raise ValueError(
                f"callbacks[{number}] is {each!r}, which has no {lacks[0]}. Make it an object of a class that extends "
                "grpo.Callback, which has the methods that you leave out."
            )


class Callback:
    """Called between the parts of a run, on every process. Override what you need; what it raises ends the run.

    To stop a run from here, raise `KeyboardInterrupt` or send the process a SIGTERM: before the next update it is saved, and
    exits with 75. `trainer.save()` may be called from here.
    """

    def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
        """After a training step and its alarms.

        Args:
            step: counted from 1.
            metrics: of the step over all processes; docs/metrics.md has their formulas.
            rollout: what this process sampled: groups, scores, advantages.
        """

    def on_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """After an evaluation. `rows`: every held-out answer with its rewards, of all processes, as in evaluations.jsonl."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """After a checkpoint was written, or begun in the background (`checkpoint.background`)."""

    def on_end(self, checkpoint: Path) -> None:
        """After the last step, once the last checkpoint is complete; not where a run is stopped."""
