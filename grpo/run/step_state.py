"""A training step between its rollout and its last update: what a checkpoint holds besides the weights if a run stops there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from grpo.algorithm.batch import spare
from grpo.observe.metrics import Meter
from grpo.run.post_mortem import Evidence
from grpo.scoring.scorer import join_scores
from grpo.types import MicroBatch, Scores


@dataclass
class StepUnderWay:
    """This process's part of a training step."""

    rollout: Evidence | None = None  # None until it is sampled
    first_update: int = 0  # optimizer steps before it
    minibatches: list[list[MicroBatch]] = field(default_factory=list)  # still to be trained on
    meter: Meter = field(default_factory=Meter)
    seconds: dict[str, float] = field(default_factory=dict)


def dealt_anew(parts: list[StepUnderWay], *, rank: int, num_processes: int) -> StepUnderWay:
    """The part of one of `num_processes` in a step whose parts were those of as many processes as there are `parts`.

    Every sequence is trained on once, and every completion logged once.
    """
    mine = parts[rank::num_processes]
    meter = Meter()
    for part in mine:
        meter.take_in(part.meter)
    return StepUnderWay(
        rollout=_joined([part.rollout for part in mine if part.rollout is not None], like=parts[0].rollout),
        first_update=parts[0].first_update,
        minibatches=[
            _share([micro for passes in minibatch for micro in passes if not micro.is_spare], rank, num_processes)
            for minibatch in zip(*(part.minibatches for part in parts), strict=True)
        ],
        meter=meter,
        seconds=parts[0].seconds,
    )


def _share(passes: list[MicroBatch], rank: int, num_processes: int) -> list[MicroBatch]:
    mine, most = passes[rank::num_processes], -(-len(passes) // num_processes)
    return [*mine, *(spare() for _ in range(most - len(mine)))]


def _joined(rollouts: list[Evidence], *, like: Evidence | None) -> Evidence:
    """One after the other; of none, one of no groups."""
    assert like is not None, "only a step whose rollout is there is saved"
    empty = Evidence([], Scores(like.scores.rewards[:0], {}, 0, 0), like.advantages[:0], like.minibatch[:0])
    every = rollouts or [empty]
    return Evidence(
        groups=[group for each in every for group in each.groups],
        scores=join_scores([each.scores for each in every]),
        advantages=torch.cat([each.advantages for each in every]),
        minibatch=torch.cat([each.minibatch for each in every]),
    )
