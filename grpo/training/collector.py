"""Questions in, scored groups out. Training, evaluation, preflight and checks all sample through a Collector.

Groups are scored while others are still being sampled. Where memory runs out, half as many sequences are sampled at once. A
request to stop breaks the work off, since it can be done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import TypeVar, cast

import torch
from torch import Tensor

from grpo.algorithm.dynamic_sampling import DynamicSampler
from grpo.observe.metrics import Meter, measure_batch, measure_rollout
from grpo.scoring.scorer import Scorer, join_scores
from grpo.system.out_of_memory import retry_with_fewer_sequences
from grpo.system.stopping import StopAgreement
from grpo.types import Ahead, CarryingGenerator, Generator, Group, Prompt, Sampling, Scores

T = TypeVar("T")

Clock = Callable[[str], AbstractContextManager[None]]
"""Times a phase, such as `rollout`."""


def untimed(phase: str) -> AbstractContextManager[None]:
    """A Clock that does nothing."""
    return nullcontext()


@dataclass(frozen=True)
class SamplingPlan:
    """How the questions of a step are sampled."""

    sampling: Sampling
    num_completions: int
    seed: Callable[[int], int]  # of the draw of that number


class Collector:
    """Samples completions of questions and scores them, on every process its own.

    Args:
        stop: what the processes agree on of a request to stop.
        retries: whether to go on with fewer sequences at once where memory runs out.
    """

    def __init__(
        self, generator: Generator, scorer: Scorer, stop: StopAgreement, *, rank: int, retries: bool = True
    ) -> None:
        self.generator = generator
        self.scorer = scorer
        self.stop = stop
        self.rank = rank
        self.retries = retries

    def follow(
        self, rewards: Mapping[int, float], *, max_completion_tokens: int, trainer_state: SimpleNamespace
    ) -> None:
        """Take the settings of the step at hand.

        Args:
            rewards: the weight of each reward of that number that follows a schedule.
            trainer_state: handed to the reward functions that ask for it.
        """
        self.scorer.max_completion_tokens = max_completion_tokens
        self.scorer.trainer_state = trainer_state
        for number, weight in rewards.items():
            self.scorer.rewards[number] = replace(self.scorer.rewards[number], weight=weight)

    def collect(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        clock: Clock = untimed,
        ahead: Ahead | None = None,
    ) -> tuple[list[Group], Scores] | None:
        """`num_completions` completions of each prompt and their scores; None if a request to stop broke it off.

        Args:
            ahead: what was begun of them, and what may be begun beside them; see carry_over.py.
        """
        return self.run(
            lambda: self.sample(prompts, sampling, num_completions=num_completions, seed=seed, clock=clock, ahead=ahead)
        )

    def run(self, work: Callable[[], T]) -> T | None:
        """What `work`, which samples, returns: retried where memory runs out; None if a request to stop broke it off."""
        return self.stop.request.abortable(lambda: self._retried(work))

    def _retried(self, work: Callable[[], T]) -> T:
        return retry_with_fewer_sequences(work, self.generator, rank=self.rank) if self.retries else work()

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        clock: Clock = untimed,
        ahead: Ahead | None = None,
    ) -> tuple[list[Group], Scores]:
        """The same once, whatever happens."""
        sample = self.generator.sample
        if ahead is not None:
            sample = partial(cast(CarryingGenerator, self.generator).sample_ahead, ahead=ahead)
        with self.scorer.begin(len(prompts)) as scoring:
            with clock("rollout"):
                groups = sample(prompts, sampling, num_completions=num_completions, seed=seed, on_group=scoring.add)
            with clock("scoring"):
                return groups, scoring.result()

    def fill(
        self,
        sampler: DynamicSampler,
        draw: Callable[[int], tuple[list[Prompt], Ahead | None]],
        plan: SamplingPlan,
        *,
        signal: Callable[[Scores], Tensor],
        meter: Meter,
        clock: Clock,
    ) -> tuple[list[Group], Scores]:
        """Draw questions, sample and score, until the batch is full or no more may be drawn. Every process calls it.

        Then the generator releases its memory: the reference and the update come next.

        Args:
            draw: this process's share of the next so many questions, with what may be sampled beside them.
            signal: (P,) which groups are worth a place in the batch.
            meter: takes the metrics of the engine and of what was sampled, but for its texts.

        Raises:
            Interrupted: on all processes, as they agree.
        """
        groups: list[Group] = []
        scores: list[Scores] = []
        while size := sampler.next_size():
            prompts, ahead = draw(size)
            collected = self.collect(
                prompts,
                plan.sampling,
                num_completions=plan.num_completions,
                seed=plan.seed(len(scores)),
                clock=clock,
                ahead=ahead,
            )
            sampler.add(self.stop.sync([] if collected is None else signal(collected[1]).tolist()))
            assert collected is not None, "only a request to stop breaks off the sampling"
            groups += collected[0]
            scores.append(collected[1])
            for name, value in self.generator.metrics().items():
                meter.mean(name, torch.tensor(value))
        self.generator.release_memory()
        every = join_scores(scores)
        measure_rollout(meter, groups, every)
        if sampler.limit > sampler.num_prompts:
            in_batch = sampler.minibatch_of(rank=self.rank, num_minibatches=1) >= 0
            measure_batch(meter, groups, every, signal=signal(every), in_batch=in_batch)
            meter.mean("rollout/draws", torch.tensor(float(len(sampler.sizes))))
        return groups, every
