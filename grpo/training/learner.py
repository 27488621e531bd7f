"""Weighted sequences in, an update out: dealing, packing, passes, loss, step, reference.

It knows nothing of rewards: an advantage is the weight of a sequence's log-probabilities, wherever it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from grpo.algorithm.batch import Outline, empty_micro_batch, join, micro_batch, plan_passes, split, take
from grpo.algorithm.loss import (
    Objective,
    covariances,
    entropy_threshold,
    grpo_loss,
    lot_limit,
    lots,
    token_sums,
    token_weights,
)
from grpo.algorithm.own_loss import Loss, use_loss
from grpo.config import AlgorithmConfig, OptimizerConfig
from grpo.config.schedule import learning_rate
from grpo.observe.metrics import Measure, Meter, Predicted, measure_micro_batch, measure_passes
from grpo.policy.language_model import pair_cost
from grpo.policy.policy import Policy
from grpo.training.state import RunState
from grpo.types import Batch, MicroBatch


@dataclass(frozen=True)
class Totals:
    """What all processes have to know of each other's passes before they step."""

    loss: float
    gaps: float  # sum over completion tokens of |log-probability now - when sampled|, of the whole step so far
    num_tokens: float  # that `gaps` is a sum of
    flags: tuple[float, ...]  # how many processes each flag is set on


class Learner:
    """Makes updates of a policy. Every process has one, and all call the same methods at the same time.

    Args:
        optimizer_steps: of the whole run, for the schedule of the learning rate.
        token_budget: tokens of a pass, over the processes that run it together.
        max_completion_tokens: for the aggregation `constant`.
        measure: takes up what a pass gave.
        loss: a user's, instead of `grpo_loss`; a completion whose advantage is 0 may have a gradient under it.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: AlgorithmConfig,
        optimizer: OptimizerConfig,
        *,
        optimizer_steps: int,
        token_budget: int,
        max_completion_tokens: int,
        measure: Measure = measure_micro_batch,
        loss: Loss | None = None,
    ) -> None:
        self.loss = grpo_loss if loss is None else use_loss(loss)
        self.every_token_counts = algorithm.every_token_counts or loss is not None
        self.policy = policy
        self.measure = measure
        self.processes = policy.processes
        self.algorithm = algorithm
        self.objective = algorithm.objective
        self.optimizer = optimizer
        self.optimizer_steps = optimizer_steps
        self.token_budget = token_budget
        self.pair_cost = pair_cost(policy.lm)
        self.max_completion_tokens = max_completion_tokens

    def follow(self, objective: Objective, *, temperature: float, max_completion_tokens: int) -> None:
        """Take those of the step at hand, which may follow schedules."""
        self.policy.use_temperature(temperature)
        self.objective = objective
        self.max_completion_tokens = max_completion_tokens

    def prepare(self, minibatches: list[Batch], meter: Meter) -> list[list[MicroBatch]]:
        """This process's passes over each minibatch of each epoch, with what stays fixed in the updates.

        Args:
            minibatches: the sequences of each that this process has.
        """
        dealt = [self.deal(mine) for mine in minibatches]
        for passes in dealt:
            self._fix(passes)
        for passes in self.algorithm.num_epochs * dealt if self.processes.speaks else []:
            measure_passes(meter, passes, pair_cost=self.pair_cost)
        return self.algorithm.num_epochs * dealt

    def deal(self, mine: Batch) -> list[MicroBatch]:
        """This process's passes over a minibatch of which it has a part.

        All sequences are dealt anew, so that no process waits for one whose completions happen to be longer. The weights follow
        from the whole minibatch; it is empty if not one completion has a known reward, on any process. Where an advantage of 0
        makes no gradient, such completions count, but need no pass. If there are no others all of them get one, so that the
        sampling gap is still measured, which may be why nothing is rewarded.
        """
        if self.processes.world_size == 1:
            return self.deal_whole(mine)
        processes, outlines = self.processes, self.processes.gather(Outline.of(mine))
        whole = Outline.joined(outlines)
        plan = self._plan(whole)
        starts = [0, *accumulate(each.num_sequences for each in outlines)]
        first, end = starts[processes.rank : processes.rank + 2]  # of all sequences, mine
        read = [sorted(i for each in passes for i in each) for passes in plan]  # by each part, whoever has them
        sent = [take(mine, [i - first for i in numbers if first <= i < end]) for numbers in read]
        received = processes.exchange([each for each in sent for _ in range(processes.sequence_parallel)])
        here, place = join(received), {i: n for n, i in enumerate(read[processes.part])}
        return [self._pass(here, [place[i] for i in each], whole) for each in plan[processes.part]]

    def deal_whole(self, whole: Batch) -> list[MicroBatch]:
        """The same of a minibatch that every process has all of."""
        outline = Outline.of(whole)
        return [self._pass(whole, part, outline) for part in self._plan(outline)[self.processes.part]]

    def _plan(self, whole: Outline) -> list[list[list[int]]]:
        """For each part of the processes, the sequences of each of its passes."""
        needed = list(range(whole.num_sequences))
        if not self.every_token_counts:
            needed = whole.advantages.nonzero().flatten().tolist() or needed
        plan = plan_passes(
            whole.take(needed),
            token_budget=self.token_budget,
            num_processes=self.processes.num_parts,
            pair_cost=self.pair_cost,
        )
        return [[[needed[i] for i in part] for part in passes] for passes in plan]

    def _pass(self, batch: Batch, sequences: list[int], whole: Outline) -> MicroBatch:
        """Of these sequences of a batch; `whole` are those of the minibatch."""
        if not sequences:
            return empty_micro_batch()
        part = take(batch, sequences)
        weights = token_weights(
            self.algorithm.aggregation,
            part.trained_lens,
            num_completions=whole.num_sequences,
            num_tokens=int(whole.trained_lens.sum()),
            max_completion_tokens=self.max_completion_tokens,
        )
        return micro_batch(part, weights)

    def _fix(self, minibatch: list[MicroBatch]) -> None:
        """Add what stays fixed during the updates, where the algorithm needs it: log-probabilities, and which tokens count."""
        algorithm, entropies = self.algorithm, []
        for micro in minibatch:
            there = micro.to(self.processes.device)
            if algorithm.updates_per_rollout > 1 or algorithm.selects:
                micro.old_logprobs, entropy, _ = self.policy.before_update(there)
                entropies.append(entropy[: 0 if micro.is_spare else None].cpu())
            if algorithm.kl_in_loss:
                micro.ref_logprobs = self.policy.ref_logprobs(there)
        if minibatch and algorithm.top_entropy < 1:
            threshold = entropy_threshold(
                torch.cat(self.processes.gather_parts(torch.cat(entropies))), algorithm.top_entropy
            )
            for micro, entropy in zip(minibatch, entropies, strict=True):
                micro.selected = None if micro.is_spare else entropy >= threshold
        if minibatch and algorithm.clip_cov > 0:
            self._clip_covariances([micro for micro in minibatch if not micro.is_spare])

    def _clip_covariances(self, passes: list[MicroBatch]) -> None:
        """Leave out the surrogate of tokens of high covariance (Clip-Cov): so many of a minibatch, in any of its passes.

        Where top_entropy has left tokens out already, these are chosen of the others.
        """
        algorithm, processes = self.algorithm, self.processes
        before = [(micro.advantages, _before_update(micro)) for micro in passes]
        sums = [each for part in processes.gather_parts([token_sums(*each) for each in before]) for each in part]
        within, drawn = [], []
        for micro, each in zip(passes, before, strict=True):
            covariance = covariances(*each, sums)
            own = (covariance > algorithm.clip_cov_low) & (covariance < algorithm.clip_cov_high)
            within.append(own if micro.selected is None else own & micro.selected)
            drawn.append(lots(micro.sampling_logprobs, micro.targets, micro.completion_lens))
        mine = torch.cat([torch.zeros(0, dtype=torch.long), *(x[own] for x, own in zip(drawn, within, strict=True))])
        number = max(int(algorithm.clip_cov * sum(count for count, _, _ in sums)), 1)
        limit = lot_limit(torch.cat(processes.gather_parts(mine)), number)
        for micro, own, lot in zip(passes, within, drawn, strict=True):
            counts = ~(own & (lot <= limit))
            micro.selected = counts if micro.selected is None else micro.selected & counts

    def divergences(self, batch: Batch, meter: Meter) -> Tensor:
        """(B,) sums over each completion's tokens of log pi - log pi_ref, before the update; a process may have no sequences."""
        of_each = self.processes.gather_within(batch) if self.processes.sequence_group is not None else [batch]
        mine = self.processes.rank % len(of_each)
        everyones = [self._divergences(each, meter if n == mine else Meter()) for n, each in enumerate(of_each)]
        return everyones[mine]

    def _divergences(self, batch: Batch, meter: Meter) -> Tensor:
        plan = plan_passes(batch, token_budget=self.token_budget, num_processes=1)[0]
        sums = torch.zeros(batch.num_sequences)
        for sequences in [*plan, *[[]] * (max(self.processes.gather(len(plan))) - len(plan))]:
            micro = self._pass(batch, sequences, Outline.of(batch)).to(self.processes.device)
            kl = (self.policy.old_logprobs(micro) - self.policy.ref_logprobs(micro)).cpu()
            if sequences:
                sums[sequences] = torch.stack([part.sum() for part in kl.split(micro.completion_lens.tolist())])
                meter.mean("policy/kl", kl)
        return sums

    def split(self, minibatches: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Passes that are no larger than `token_budget`, of larger ones; equally many on all processes."""
        smaller = [[part for micro in passes for part in split(micro, self.token_budget)] for passes in minibatches]
        most = [max(self.processes.gather(len(passes))) for passes in smaller]
        return [
            [*passes, *(empty_micro_batch() for _ in range(number - len(passes)))]
            for passes, number in zip(smaller, most, strict=True)
        ]

    def accumulate(
        self,
        minibatch: list[MicroBatch],
        meter: Meter,
        passes: list[tuple[MicroBatch, Tensor]],
        flags: tuple[bool, ...],
    ) -> Totals:
        """The gradient of this process's passes; the other processes run as many at the same time.

        Args:
            passes: takes each pass with the policy's log-probabilities, (T,).
            flags: added up over the processes on the way, whose sums nobody has to wait for.
        """
        total = torch.zeros((), device=self.processes.device)
        measured = meter if self.processes.speaks else Meter()  # what all processes of a part have counts once
        for number, micro in enumerate(micro.to(self.processes.device) for micro in minibatch):
            logprobs, entropy, likeliest = self.policy.logprobs(micro)
            result = self.loss(
                logprobs,
                micro.advantages,
                micro.weights,
                self.objective,
                completion_lens=micro.completion_lens,
                entropy=entropy,
                old_logprobs=micro.old_logprobs,
                ref_logprobs=micro.ref_logprobs,
                sampling_logprobs=micro.sampling_logprobs,
                selected=micro.selected,
            )
            total += result.loss.detach() if self.processes.speaks else 0.0
            predicted = Predicted(logprobs.detach(), entropy.detach(), likeliest)
            self.measure(measured, micro, self.objective, predicted, result)
            passes.append((micro, logprobs.detach()))
            if number < len(minibatch) - 1:
                self.policy.backward(result.loss, last=False)
            else:
                sums = self.processes.add_up(local_sums(total, measured, *flags))
                self.policy.backward(unless_finite(result.loss, sums[0]), last=True)
        loss, gaps, num_tokens, *counts = sums.tolist()
        return Totals(loss, gaps, num_tokens, tuple(counts))

    def rate(self, optimizer_step: int) -> float:
        """The learning rate of an optimizer step, counted from 0."""
        return learning_rate(self.optimizer, step=optimizer_step, num_steps=self.optimizer_steps)

    def update(self, totals: Totals, state: RunState, meter: Meter, *, rate_factor: float = 1.0) -> None:
        """Change the weights by the gradient that `accumulate` has left; left out on all processes if it is not finite.

        Args:
            totals: what `accumulate` returned.
            state: its optimizer steps and learning rate follow.
            rate_factor: times the scheduled learning rate.
        """
        rate = self.rate(state.optimizer_steps) * rate_factor
        norm = self.policy.optimizer_step(rate)
        skipped = not math.isfinite(norm)
        meter.total("optimizer/skipped", float(skipped and self.processes.is_main))
        if skipped:
            self.processes.say(
                f"warning: the loss ({totals.loss}) or its gradient is not finite; an update of step {state.step + 1} is left out"
            )
            return
        state.optimizer_steps += 1
        state.learning_rate = rate
        meter.mean("optimizer/grad_norm", torch.tensor(norm))
        meter.mean("optimizer/loss", torch.tensor(totals.loss))

    def refresh_reference_if_due(self, *, before: int, after: int) -> None:
        """Make the policy the reference where a rollout's optimizer steps passed a multiple of reference_refresh_steps.

        One without a known reward has fewer steps, so they may not end on it.
        """
        every = self.algorithm.reference_refresh_steps
        if every and after // every > before // every:
            self.policy.refresh_reference()
            self.processes.say(f"the reference is the policy after optimizer step {after} from here on")


def _before_update(micro: MicroBatch) -> Tensor:
    assert micro.old_logprobs is not None, "covariances are those of the policy before the update"
    return micro.old_logprobs.cpu()


def local_sums(loss: Tensor, meter: Meter, *more: float) -> Tensor:
    """This process's part of the loss, the sum and the number of the step's gaps so far, and more to add up; (3 + more,)."""
    gaps = meter.sums.get("policy/sampling_gap", 0.0), meter.counts.get("policy/sampling_gap", 0.0)

    def there(value: float | Tensor) -> Tensor:
        """A number is filled in there: to be copied, it would wait for all that the device has to do. So is a sum that is still
        where a checkpoint was read to."""
        if isinstance(value, Tensor) and value.device == loss.device:
            return value.double()
        return loss.new_full((), float(value), dtype=torch.float64)

    return torch.stack([loss.double(), *map(there, (*gaps, *more))])


def unless_finite(loss: Tensor, total: Tensor) -> Tensor:
    """`loss`, or NaN if `total`, the same on every process, is not finite.

    Every ZeRO stage drops a gradient that is not finite, on all processes together; so one poisoned loss makes all of them leave
    the update out, without anyone waiting for a number. A finite loss is left as it is, to the bit.
    """
    return loss * torch.where(total.isfinite(), 1.0, math.nan).to(loss.dtype)
