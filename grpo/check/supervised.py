"""Does supervised training fit, and how long will it take? The longest update of the run, on this machine and this model.

What is run is the trainer's own step on the rows of the update that has the most tokens. No file is left behind, the updated
weights are thrown away, and nothing is evaluated.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from grpo.check import memory
from grpo.check.advice import supervised_advice
from grpo.config import SupervisedConfig
from grpo.sft.order import RowOrder
from grpo.sft.trainer import SupervisedTrainer
from grpo.types import Group

NUM_STEPS = 2
"""The last one is shown: the first compiles."""


def check(config: SupervisedConfig) -> int:
    """Learn the longest update and print what it took, and what the run will take.

    Returns:
        0 if it fits, else 1; as memory.check.

    Raises:
        ValueError: as SupervisedTrainer.
    """

    def advise(phase: str, trainer: object, world_size: int) -> list[str]:
        return supervised_advice(config, world_size=world_size)

    return memory.tried(lambda: rehearse(config), report, advise)


def rehearse(config: SupervisedConfig) -> SupervisedTrainer:
    """A trainer that learns the run's longest update again and again, and writes no files."""
    settings = config.model_dump(exclude_unset=True)
    settings["logging"] = {"wandb": "disabled", "completions_every": 0, "tensorboard": False}
    settings["evaluation"] = {"num_rows": config.evaluation.num_rows}  # rows that are not learned
    settings["checkpoint"] = {}
    with TemporaryDirectory(prefix="grpo-check-") as directory:
        own = {name: value for name, value in settings["run"].items() if name in ("steps", "seed", "deterministic")}
        settings["run"] = own | {"dir": str(Path(directory) / "run"), "resume": "never"}
        trainer = SupervisedTrainer(SupervisedConfig(**settings))
        trainer.close()
    longest = Longest(trainer.order)
    trainer.order = longest
    trainer.processes.say(
        f"\nThe longest of {longest.num_updates:,} updates, {NUM_STEPS} times: {len(longest.rows):,} rows with "
        f"{longest.most:,} tokens. The longest row has {longest.longest_row:,}."
    )
    return trainer


def report(trainer: SupervisedTrainer) -> str:
    """Learn the update, and what it took."""
    metrics = [trainer.train_step() for _ in range(NUM_STEPS)][-1]
    left, order = memory.measured(trainer), trainer.order
    assert isinstance(order, Longest)
    seconds = memory.duration(order.tokens / metrics["throughput/update"])
    return "\n".join([
        *memory.phases(metrics, ("update", "step")),
        "",
        *memory.fits(left),
        f"{order.num_updates:,} updates on {order.tokens:,} tokens take about {seconds}, at this update's "
        f"{metrics['throughput/update']:,.0f} tokens/s. Not in it: evaluations, checkpoints and loading.",
        *memory.spare(left, "sft"),
    ])  # fmt: skip


class Longest(RowOrder):
    """Deals the update that has the most tokens of all in an order."""

    def __init__(self, order: RowOrder) -> None:
        self.groups, self.sizes, self.num_updates = order.groups, order.sizes, order.num_updates
        self._order, self.rows = order._order, []
        self.tokens = self.most = 0
        for _ in range(order.num_updates):
            rows = order.draw()
            tokens = sum(order.sizes[row.prompt.row] for row in rows)
            self.tokens += tokens
            if tokens > self.most:
                self.most, self.rows = tokens, rows
        self.longest_row = max(order.sizes)

    def draw(self) -> list[Group]:
        """See RowOrder."""
        return self.rows
