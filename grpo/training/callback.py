"""What a user's own code can do while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.training.state import Rollout


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
        """After a checkpoint was written, or begun with `checkpoint.background`."""

    def on_end(self, checkpoint: Path) -> None:
        """After the last step, once the last checkpoint is complete; not where a run is stopped."""
