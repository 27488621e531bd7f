"""Where a run stands: between steps (RunState), and within one (StepState), which a checkpoint holds if a run stops there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo.algorithm.batch import empty_micro_batch
from grpo.observe.metrics import Meter
from grpo.scoring.scorer import join_scores
from grpo.system import progress
from grpo.system.distributed import Processes
from grpo.types import Drafts, Group, MicroBatch, Scores


@dataclass
class RunState:
    """Where a run stands between steps; the same on every process."""

    step: int = 0  # finished training steps
    optimizer_steps: int = 0
    position: int = 0  # prompts dealt so far
    learning_rate: float = 0.0  # of the last optimizer step
    groups_seen: float = 0.0  # in the last steps, fading; see grpo/algorithm/dynamic_sampling.py
    groups_with_signal: float = 0.0  # of these
    entropy_coef: float | None = None  # with algorithm.entropy_target; None: the first step is to come
    entropy: float | None = None  # of the last step; with it too
    solved: list[int] = field(default_factory=list)  # rows of questions; with rollout.solved_share, as are the next
    hopeless: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)  # see PromptOrder

    def metrics(self) -> dict[str, float]:
        """Of the step that is done."""
        return {"optimizer/learning_rate": self.learning_rate, "optimizer/steps": self.optimizer_steps}


@dataclass
class Rollout:
    """What this process sampled in a step, and what became of it. A post-mortem is written from it."""

    groups: list[Group]
    scores: Scores
    advantages: Tensor  # (P, G)
    minibatch: Tensor  # (P,) that each group belongs to; -1: dynamic sampling left it out of the batch
    passes: list[tuple[MicroBatch, Tensor]] = field(
        default_factory=list
    )  # of the update, with the policy's logprobs (T,)


@dataclass
class StepState:
    """This process's part of a training step."""

    rollout: Rollout | None = None  # None until it is sampled
    first_update: int = 0  # optimizer steps before it
    minibatches: list[list[MicroBatch]] = field(default_factory=list)  # still to be trained on
    meter: Meter = field(default_factory=Meter)
    seconds: dict[str, float] = field(default_factory=dict)
    drafts: Drafts = field(default_factory=dict)  # of later questions; with rollout.carry_over

    @property
    def sampled(self) -> Rollout:
        """The rollout, once there is one."""
        assert self.rollout is not None, "a step is sampled before it is trained on"
        return self.rollout

    def undo(self) -> Callable[[], None]:
        """What forgets the passes from here on: they will be measured again."""
        before = self.meter.copy()

        def forget() -> None:
            self.meter = before
            if self.rollout is not None:
                self.rollout.passes.clear()

        return forget


class StepClock:
    """Adds up the seconds of a step's phases, and records their peak memory."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.phase = ""  # the last one that began

    @contextmanager
    def phase_of(self, step: StepState, name: str) -> Iterator[None]:
        """Time a phase. The peak of the whole step is the largest of its phases."""
        self.phase = name
        self.processes.reset_peak_memory()
        started = time.perf_counter()
        with progress.phase(name):
            yield
            self.processes.synchronize()
        step.seconds[name] = step.seconds.get(name, 0.0) + time.perf_counter() - started
        peak = self.processes.peak_memory_gib()
        if peak is not None:
            for each in (name, "step"):
                step.meter.max(f"memory/{each}", torch.tensor(peak))


def redistribute(
    parts: list[StepState], *, rank: int, num_processes: int, together_before: int = 1, together: int = 1
) -> StepState:
    """The part of one of `num_processes` in a step whose parts were those of as many processes as there are `parts`.

    Every sequence is trained on once, and every completion logged once.

    Args:
        together_before, together: how many processes ran passes together, and do so now (distributed.sequence_parallel): these
            have the same passes, each its own completions.
    """
    mine = parts[rank::num_processes]
    meter = Meter()
    for part in mine:
        meter.merge(part.meter)
    return StepState(
        rollout=_joined([part.rollout for part in mine if part.rollout is not None], like=parts[0].sampled),
        first_update=parts[0].first_update,
        minibatches=[
            _share(
                [micro for passes in minibatch for micro in passes if not micro.is_spare],
                rank // together,
                num_processes // together,
            )
            for minibatch in zip(*(part.minibatches for part in parts[::together_before]), strict=True)
        ],
        meter=meter,
        seconds=parts[0].seconds,
    )


def _share(passes: list[MicroBatch], part: int, num_parts: int) -> list[MicroBatch]:
    mine, most = passes[part::num_parts], -(-len(passes) // num_parts)
    return [*mine, *(empty_micro_batch() for _ in range(most - len(mine)))]


def _joined(rollouts: list[Rollout], *, like: Rollout) -> Rollout:
    """One after the other; of none, one of no groups."""
    empty = Rollout([], Scores(like.scores.rewards[:0], {}, 0, 0), like.advantages[:0], like.minibatch[:0])
    every = rollouts or [empty]
    return Rollout(
        groups=[group for each in every for group in each.groups],
        scores=join_scores([each.scores for each in every]),
        advantages=torch.cat([each.advantages for each in every]),
        minibatch=torch.cat([each.minibatch for each in every]),
    )
