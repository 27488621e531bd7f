"""Questions in, a rollout that is ready for its updates out: sample, score, centre, plan the passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.advantage import FLAT, advantages_by, divided_by_batch_std, has_signal, square_sum, teaches
from grpo.algorithm.batch import pack
from grpo.algorithm.dynamic_sampling import DynamicSampler
from grpo.algorithm.objective import AdvantageRule
from grpo.config import AlgorithmConfig, Config
from grpo.data.order import PromptOrder
from grpo.observe.metrics import Meter, measure_carry_over, measure_texts
from grpo.scoring.answers import completion_rows, is_solved, judged
from grpo.text.aha import Words
from grpo.training.carry_over import CarryOver
from grpo.training.collector import Clock, Collector, SamplingPlan
from grpo.training.learner import Learner
from grpo.training.state import Rollout, RunState, StepState
from grpo.types import Group, MicroBatch, Prompt, Scores


class RolloutMaker:
    """Makes the rollout of a training step, on every process its part.

    Args:
        prompts: the order in which questions are dealt.
        verdicts: names of the rewards by which questions count as solved.
        signal_from: names of those by which dynamic sampling chooses groups; of several the first that can tell of a question.
        words: that are counted in the completions.
        forms: whether those of right answers tell something.
        advantage: (P, G) rewards to (P, G) advantages, instead of `advantages_by`.
    """

    def __init__(
        self,
        collector: Collector,
        learner: Learner,
        prompts: PromptOrder,
        *,
        verdicts: Sequence[str],
        signal_from: Sequence[str],
        words: Words,
        forms: bool = True,
        advantage: Advantage | None = None,
    ) -> None:
        self.advantage = advantage
        self.collector = collector
        self.learner = learner
        self.prompts = prompts
        self.verdicts = verdicts
        self.signal_from = signal_from
        self.words = words
        self.forms = forms

    def make(
        self,
        step: StepState,
        state: RunState,
        config: Config,
        *,
        seed: Callable[[str], int],
        question_seed: Callable[[int], int],
        clock: Clock,
        retry: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """Fill `step`, and let `state` follow.

        Args:
            config: of the step at hand.
            seed: for a purpose, of this process.
            question_seed: of the question at a place in dealt order; only runs that carry over ask for it.
            retry: returns what the passes that it is given return, or deals with a shortage of memory.

        Raises:
            Interrupted: on all processes.
        """
        processes, meter = self.learner.processes, step.meter
        carried = self._carry_over(step, state, config, question_seed)
        limit = config.max_questions_per_step
        sampler = DynamicSampler(
            num_prompts=config.rollout.num_prompts,
            # a draft stays with its process if each draw deals everyone as many questions
            limit=limit if carried is None else limit - limit % processes.world_size,
            world_size=processes.world_size,
            seen=state.groups_seen,
            with_signal=state.groups_with_signal,
        )
        plan = SamplingPlan(
            config.sampling,
            config.rollout.group_size,
            seed=lambda number: seed(f"rollout {number}" if number else "rollout"),
        )
        self.prompts.begin_step(state.position, ahead=state.ahead, solved=state.solved, hopeless=state.hopeless)
        with clock("step"):
            groups, scores = self.collector.fill(
                sampler,
                self._draw if carried is None else carried.draw,
                plan,
                signal=partial(self._signal, config.algorithm.advantage_rule),
                meter=meter,
                clock=clock,
            )
            minibatch = sampler.minibatch_of(rank=processes.rank, num_minibatches=config.algorithm.num_minibatches)
            with clock("logprobs"):
                advantages, step.minibatches = retry(
                    lambda: prepare_updates(
                        groups,
                        scores.rewards,
                        self.collector.scorer.parts(scores),
                        minibatch,
                        config.algorithm,
                        self.learner,
                        meter,
                        self.advantage,
                    )
                )
        measure_texts(meter, completion_rows(groups, scores), self.words, forms=self.forms)
        if self.prompts.passes_over:
            passed_over = self.prompts.position - state.position - len(sampler.signal)
            meter.mean("group/passed_over", torch.tensor(float(passed_over)))
            self._remember(groups, scores, state, solved_from=config.rollout.solved_from)
        step.first_update, state.position = state.optimizer_steps, self.prompts.position
        state.ahead = [*self.prompts.ahead]
        state.groups_seen, state.groups_with_signal = sampler.remembered()
        if carried is not None:
            measure_carry_over(meter, groups, minibatch >= 0, *carried.num_tokens)
            step.drafts = carried.drafts
        step.rollout = Rollout(groups, scores, advantages, minibatch)

    def _draw(self, num_prompts: int) -> tuple[list[Prompt], None]:
        return self.prompts.draw(num_prompts), None

    def _carry_over(
        self, step: StepState, state: RunState, config: Config, seed: Callable[[int], int]
    ) -> CarryOver | None:
        """The questions of a run that carries over; None: of one that does not."""
        rollout = config.rollout
        if not rollout.carry_over:
            return None
        steps_after = config.run.steps - state.step - 1
        return CarryOver(
            self.prompts,
            step.drafts,
            step=state.step + 1,
            num_ahead=min(rollout.max_staleness, steps_after) * rollout.num_prompts,
            seed=seed,
        )

    def _remember(self, groups: list[Group], scores: Scores, state: RunState, *, solved_from: float) -> None:
        """Which questions are solved or hopeless, as their last answers say. Every process calls it.

        A question stays what it was where it depends on answers without a verdict.

        Raises:
            ValueError: on all processes, a verdict is no share of what is right.
        """
        verdicts = judged(scores, self.verdicts)
        outside = verdicts[(verdicts < 0) | (verdicts > 1 + FLAT)].tolist()  # NaN is neither
        rows = [group.prompt.row for group in groups]
        solved = is_solved(verdicts, at_least=solved_from)
        hopeless = [None if any_right is None else not any_right for any_right in is_solved(verdicts, at_least=FLAT)]
        parts = self.learner.processes.gather(([*zip(rows, solved, hopeless, strict=True)], outside[:1]))
        if found := [value for _, values in parts for value in values]:
            shares = {"solved_share": self.prompts.solved_share, "hopeless_share": self.prompts.hopeless_share}
            names = " and ".join(f"rollout.{name}" for name, share in shares.items() if share < 1)
            raise ValueError(
                f"{names} below 1; the reward {' or '.join(self.verdicts)} has given a completion {found[0]:g}, and 1 means "
                f"right, 0 wrong. Name a reward of values from 0 to 1 in rollout.signal_from, or set {names} to 1."
            )
        asked = [each for part, _ in parts for each in part]
        state.solved = _after(state.solved, [(row, is_so) for row, is_so, _ in asked])
        state.hopeless = _after(state.hopeless, [(row, is_so) for row, _, is_so in asked])

    def _signal(self, rule: AdvantageRule, scores: Scores) -> Tensor:
        """(P,) which groups are worth a place in the batch, by the one reward that decides it of a question."""
        values = judged(scores, self.signal_from).masked_fill(scores.rewards.isnan(), math.nan)
        return has_signal(values) if self.advantage is not None else teaches(rule, values)


Advantage = Callable[[Tensor], Tensor]
"""Rewards (P, G), NaN where one is unknown, of the questions of one process -> advantages (P, G)."""


def own_advantages(advantage: Advantage, rewards: Tensor) -> Tensor:
    """What a user's function makes of the rewards; NaN where a reward is unknown, whose completion is not trained on.

    Raises:
        ValueError: it returned something else than a finite number for each known reward.
    """
    given = advantage(rewards.clone())
    if not isinstance(given, Tensor) or given.shape != rewards.shape:
        found = f"a tensor of the shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"advantage returned {found}; for rewards of the shape {tuple(rewards.shape)}, questions by completions, it returns "
            "a tensor of the same shape. Correct the function."
        )
    given = given.to(rewards.dtype).masked_fill(rewards.isnan(), math.nan)
    if not given[~rewards.isnan()].isfinite().all():
        row = int((~given.isfinite() & ~rewards.isnan()).any(1).nonzero()[0])
        raise ValueError(
            f"advantage returned {given[row].tolist()} for the rewards {rewards[row].tolist()}; each known reward has a finite "
            "advantage. Mind groups whose rewards are all equal, and unknown ones, which are NaN."
        )
    return given


def prepare_updates(
    groups: list[Group],
    rewards: Tensor,
    parts: list[tuple[float, Tensor]],
    minibatch: Tensor,
    algorithm: AlgorithmConfig,
    learner: Learner,
    meter: Meter,
    advantage: Advantage | None = None,
) -> tuple[Tensor, list[list[MicroBatch]]]:
    """The advantages, and this process's passes over each minibatch of each epoch. Every process calls it.

    Args:
        groups: what this process has sampled.
        rewards: (P, G) of them; NaN: unknown.
        parts: weight and values (P, G) of each reward function that they are a sum of.
        minibatch: (P,) that each belongs to; -1: to none.
        algorithm: of the step at hand.

    Returns:
        (P, G) advantages, and the passes.
    """
    if algorithm.kl_in == "reward":
        rewards = _with_kl_penalties(groups, rewards, minibatch, algorithm.kl_coef, learner, meter)
    if advantage is not None:
        advantages = own_advantages(advantage, rewards).float()
    else:
        advantages = advantages_by(algorithm.advantage_rule, rewards, parts).float()
        if algorithm.normalize_by_std == "batch":
            mine = square_sum(advantages[minibatch >= 0])
            advantages = divided_by_batch_std(advantages, learner.processes.gather(mine))
    places = [(minibatch == number).nonzero().flatten().tolist() for number in range(algorithm.num_minibatches)]
    without = algorithm.filter_truncated
    batches = [pack([groups[p] for p in part], advantages[part], without_truncated=without) for part in places]
    return advantages, learner.prepare(batches, meter)


def _with_kl_penalties(
    groups: list[Group], rewards: Tensor, minibatch: Tensor, kl_coef: float, learner: Learner, meter: Meter
) -> Tensor:
    trained = (minibatch >= 0).nonzero().flatten()
    every = pack([groups[place] for place in trained.tolist()], torch.zeros(len(trained), rewards.shape[1]))
    penalties = kl_coef * learner.divergences(every, meter).view(len(trained), rewards.shape[1])
    meter.mean("policy/kl_penalty", penalties)
    return rewards.index_add(0, trained, penalties.to(rewards.dtype), alpha=-1)


def _after(before: list[int], asked: list[tuple[int, bool | None]]) -> list[int]:
    """Rows of which something holds, after answers that say it of some. One asked twice must have it both times."""
    holds, holds_not = ({row for row, answer in asked if answer is each} for each in (True, False))
    return sorted(({*before} | holds) - holds_not)
