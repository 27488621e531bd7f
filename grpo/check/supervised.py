"""Does supervised training fit, and how long will it take? The longest update of the run, on this machine and this model.

What is run is the trainer's own step on the rows of the update that has the most tokens, and, for the peak of memory, once more
on rows that fill a pass of every process as far as rows can. Held-out questions, their rewards and the engine are made ready as
in the run, which refuses what is wrong with them, and nothing is evaluated. No file is left behind; the updated weights are
thrown away.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from grpo.check import memory
from grpo.check.advice import supervised_advice
from grpo.config import SupervisedConfig
from grpo.observe.sinks import check_sinks
from grpo.run.loop import Loop
from grpo.sft.order import RowOrder
from grpo.sft.trainer import SupervisedTrainer
from grpo.text.plural import counted
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

    def advise(phase: str, trainer: Loop | None, world_size: int) -> list[str]:
        collector = trainer.collector if isinstance(trainer, SupervisedTrainer) else None
        return supervised_advice(phase, config, world_size=world_size, **memory.held(trainer, collector))

    return memory.tried(lambda: rehearse(config), partial(report, config), advise)


def rehearse(config: SupervisedConfig) -> SupervisedTrainer:
    """A trainer that learns the run's longest update again and again, and writes no files."""
    check_sinks(config)
    settings = config.model_dump(exclude_unset=True)
    settings["logging"] = {"wandb": "disabled", "completions_every": 0, "tensorboard": False}
    with TemporaryDirectory(prefix="grpo-check-") as directory:
        own = {name: value for name, value in settings["run"].items() if name in ("steps", "seed", "deterministic")}
        settings["run"] = own | {"dir": str(Path(directory) / "run"), "resume": "never"}
        trainer = SupervisedTrainer(SupervisedConfig(**settings))
        trainer.log.close()  # before its directory goes
        if trainer.collector is not None:
            trainer.collector.scorer.close()
    longest = Longest(trainer.order)
    trainer.order = longest
    trainer.processes.say(
        f"\nThe longest of {longest.num_updates:,} updates, {NUM_STEPS} times: {counted(len(longest.rows), 'rows')} with "
        f"{longest.most:,} tokens. The longest row has {longest.longest_row:,}."
    )
    return trainer


def report(config: SupervisedConfig, trainer: SupervisedTrainer) -> str:
    """Learn the update, and what it took, and what the run takes of the disk."""
    metrics, order = [trainer.train_step() for _ in range(NUM_STEPS)][-1], trainer.order
    assert isinstance(order, Longest)
    order.rows = fullest(order, trainer.config.pass_tokens, num_processes=trainer.processes.num_parts)
    filled = trainer.train_step()
    metrics |= {name: max(metrics[name], filled[name]) for name in metrics if name.startswith("memory/")}
    left = memory.measured(trainer)
    seconds = memory.duration(order.tokens / metrics["throughput/update"])
    return "\n".join([
        *memory.phases(metrics, ("update", "step")),
        "",
        *memory.fits(left),
        f"{order.num_updates:,} updates on {order.tokens:,} tokens take about {seconds}, at this update's "
        f"{metrics['throughput/update']:,.0f} tokens/s. Not in it: evaluations, checkpoints and loading.",
        memory.disk(trainer, config, num_steps=order.num_updates),
        *memory.spare(left, "sft"),
    ])  # fmt: skip


def fullest(order: RowOrder, budget: int, *, num_processes: int) -> list[Group]:
    """Rows that fill a pass on every process, the longest that still fit first, and no more than an update takes."""
    most = max(order.max_rows // num_processes, 1)
    if order.max_tokens is not None:  # of an update; a row of its own may have more
        budget = min(budget, max(order.max_tokens // num_processes, max(order.sizes)))
    passes: list[list[Group]] = [[] for _ in range(num_processes)]
    room = [budget] * num_processes
    for group in sorted(order.groups, key=lambda group: -order.sizes[group.prompt.row]):
        size = order.sizes[group.prompt.row]
        place = next((n for n in range(num_processes) if size <= room[n] and len(passes[n]) < most), None)
        if place is not None:
            passes[place].append(group)
            room[place] -= size
    return [group for taken in passes for group in taken]


class Longest(RowOrder):
    """Deals the update that has the most tokens of all in an order."""

    def __init__(self, order: RowOrder) -> None:
        self.groups, self.sizes, self.num_updates = order.groups, order.sizes, order.num_updates
        self.max_rows, self.max_tokens = order.max_rows, order.max_tokens
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
