"""Questions in, a rollout that is ready for its updates out: sample, score, centre, plan the passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.advantage import group_advantages, has_signal
from grpo.algorithm.batch import pack
from grpo.algorithm.dynamic_sampling import DynamicSampler
from grpo.config import AlgorithmConfig, Config
from grpo.data.prompts import PromptOrder
from grpo.observe.metrics import Meter, measure_texts
from grpo.scoring.answers import completion_rows
from grpo.text.aha import Words
from grpo.training.collector import Clock, Collector, SamplingPlan
from grpo.training.learner import Learner
from grpo.training.state import Rollout, RunState, StepState
from grpo.types import Group, MicroBatch, Scores


class RolloutMaker:
    """Makes the rollout of a training step, on every process its part.

    Args:
        prompts: the order in which questions are dealt.
        signal_from: name of the reward by which dynamic sampling chooses groups.
        words: that are counted in the completions.
    """

    def __init__(
        self, collector: Collector, learner: Learner, prompts: PromptOrder, *, signal_from: str, words: Words
    ) -> None:
        self.collector = collector
        self.learner = learner
        self.prompts = prompts
        self.signal_from = signal_from
        self.words = words

    def make(
        self,
        step: StepState,
        state: RunState,
        config: Config,
        *,
        seed: Callable[[str], int],
        clock: Clock,
        retry: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """Fill `step`, and let `state` follow.

        Args:
            config: of the step at hand.
            seed: for a purpose, of this process.
            retry: returns what the passes that it is given return, or deals with a shortage of memory.

        Raises:
            Interrupted: on all processes.
        """
        processes, meter = self.learner.processes, step.meter
        sampler = DynamicSampler(
            num_prompts=config.rollout.num_prompts,
            limit=config.max_questions_per_step,
            world_size=processes.world_size,
            seen=state.groups_seen,
            with_signal=state.groups_with_signal,
        )
        plan = SamplingPlan(
            config.sampling,
            config.rollout.group_size,
            seed=lambda number: seed(f"rollout {number}" if number else "rollout"),
        )
        self.prompts.position = state.position
        with clock("step"):
            groups, scores = self.collector.fill(
                sampler, self.prompts.draw, plan, signal=self._signal, meter=meter, clock=clock
            )
            minibatch = sampler.minibatch_of(rank=processes.rank, num_minibatches=config.algorithm.num_minibatches)
            with clock("logprobs"):
                advantages, step.minibatches = retry(
                    lambda: prepare_updates(groups, scores.rewards, minibatch, config.algorithm, self.learner, meter)
                )
        measure_texts(meter, completion_rows(groups, scores), self.words)
        step.first_update, state.position = state.optimizer_steps, self.prompts.position
        state.groups_seen, state.groups_with_signal = sampler.remembered()
        step.rollout = Rollout(groups, scores, advantages, minibatch)

    def _signal(self, scores: Scores) -> Tensor:
        """(P,) which groups are worth a place in the batch, by the one reward that decides it."""
        return has_signal(scores.values[self.signal_from].masked_fill(scores.rewards.isnan(), math.nan))


def prepare_updates(
    groups: list[Group], rewards: Tensor, minibatch: Tensor, algorithm: AlgorithmConfig, learner: Learner, meter: Meter
) -> tuple[Tensor, list[list[MicroBatch]]]:
    """The advantages, and this process's passes over each minibatch of each epoch. Every process calls it.

    Args:
        groups: what this process has sampled.
        rewards: (P, G) of them; NaN: unknown.
        minibatch: (P,) that each belongs to; -1: to none.
        algorithm: of the step at hand.

    Returns:
        (P, G) advantages, and the passes.
    """
    if algorithm.kl_in == "reward":
        rewards = _with_kl_penalties(groups, rewards, minibatch, algorithm.kl_coef, learner, meter)
    advantages = group_advantages(
        rewards, normalize_by_std=algorithm.normalize_by_std, baseline=algorithm.baseline
    ).float()
    parts = [(minibatch == number).nonzero().flatten().tolist() for number in range(algorithm.num_minibatches)]
    without = algorithm.filter_truncated
    batches = [pack([groups[p] for p in part], advantages[part], without_truncated=without) for part in parts]
    return advantages, learner.prepare(batches, meter)


def _with_kl_penalties(
    groups: list[Group], rewards: Tensor, minibatch: Tensor, kl_coef: float, learner: Learner, meter: Meter
) -> Tensor:
    trained = (minibatch >= 0).nonzero().flatten()
    every = pack([groups[place] for place in trained.tolist()], torch.zeros(len(trained), rewards.shape[1]))
    penalties = kl_coef * learner.divergences(every, meter).view(len(trained), rewards.shape[1])
    meter.mean("policy/kl_penalty", penalties)
    return rewards.index_add(0, trained, penalties.to(rewards.dtype), alpha=-1)
