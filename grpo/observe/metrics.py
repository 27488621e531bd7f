"""What a step measures: values of micro-batches, groups and passes, reduced over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo.algorithm.advantage import has_signal
from grpo.algorithm.loss import Objective, TokenLoss
from grpo.observe.metric_names import LOSS
from grpo.scoring.answers import RIGHT, RIGHT_OF_ALL_KINDS, count_outcomes, is_right, judged
from grpo.system.distributed import Processes
from grpo.text import answer_forms, language
from grpo.text.aha import Words, tally
from grpo.types import VOTE, Completion, Group, MicroBatch, Scores


@dataclass
class Meter:
    """Collects one step's values on one process, then reduces them over all of them.

    A mean is kept as a sum and a count until the very end, so a mean over completions is a mean over all completions, never
    a mean of the means of micro-batches or processes. Values stay on their device till then: nothing waits for a number.
    """

    sums: dict[str, float | Tensor] = field(default_factory=dict)
    counts: dict[str, float | Tensor] = field(default_factory=dict)
    maxima: dict[str, float | Tensor] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    work: dict[str, list[float]] = field(default_factory=dict)

    def copy(self) -> Meter:
        """As it is now, whatever is added to this one later."""
        return Meter(*({**collected} for collected in vars(self).values()))

    def merge(self, other: Meter) -> None:
        """Add what another process has collected, but for the work in step, which was that process's own."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]
        for name, value in other.maxima.items():
            self.max(name, torch.as_tensor(value))
        for name, value in other.totals.items():
            self.total(name, value)

    def mean(self, name: str, values: Tensor) -> None:
        """Add values, of any shape, to the mean."""
        self.sums[name] = self.sums.get(name, 0.0) + values.double().sum()
        self.counts[name] = self.counts.get(name, 0.0) + values.numel()

    def mean_of_known(self, name: str, values: Tensor) -> None:
        """The same for rewards, of which NaN entries are unknown and do not count."""
        self.mean(name, values[~values.isnan()])

    def ratio(self, name: str, total: float | Tensor, size: float | Tensor) -> None:
        """Add to a mean of which only the sum is known, and of how much."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + size

    def max(self, name: str, values: Tensor) -> None:
        if values.numel():
            largest = values.max()
            before = self.maxima.get(name)
            self.maxima[name] = largest if before is None else torch.maximum(torch.as_tensor(before), largest)

    def total(self, name: str, value: float) -> None:
        """Add to a sum over everything and everyone."""
        self.totals[name] = self.totals.get(name, 0.0) + value

    def lost(self, name: str, work: list[float]) -> None:
        """Add work that all processes do in step, each its own amount: the share of the time that they wait for the busiest."""
        self.work[name] = self.work.get(name, []) + work

    def reduce(self, processes: Processes) -> dict[str, float]:
        """The step's metrics over all processes. A mean over nothing is left out."""
        self.sums, self.counts, self.maxima = map(_numbers, (self.sums, self.counts, self.maxima))
        meters = processes.gather(self)
        reduced: dict[str, float] = {}
        for name in _names(meter.counts for meter in meters):
            count = sum(meter.counts.get(name, 0.0) for meter in meters)
            if count:
                reduced[name] = sum(meter.sums.get(name, 0.0) for meter in meters) / count
        for name in _names(meter.maxima for meter in meters):
            largest = [meter.maxima[name] for meter in meters if name in meter.maxima]
            reduced[name] = float(torch.tensor(largest).max())  # Python's max would hide a NaN
        for name in _names(meter.totals for meter in meters):
            reduced[name] = sum(meter.totals.get(name, 0.0) for meter in meters)
        for name in _names(meter.work for meter in meters):
            works = [meter.work[name] for meter in meters if name in meter.work]
            columns = list(zip(*works, strict=True))
            fullest = len(works) * sum(max(column) for column in columns)
            reduced[name] = 1 - sum(map(sum, columns)) / fullest if fullest else 0.0
        return reduced


def _numbers(values: dict[str, float | Tensor]) -> dict[str, float | Tensor]:
    return {name: float(value) for name, value in values.items()}


def measure_rollout(meter: Meter, groups: list[Group], scores: Scores) -> None:
    """What the sampling and the scoring of one step gave."""
    meter.mean_of_known("reward/mean", scores.rewards)
    meter.mean_of_known(SQUARED_REWARD, scores.rewards.double().square())
    for name, values in scores.values.items():
        if name != VOTE:
            meter.mean_of_known(f"reward/{name}", values)
    if len(scores.verdicts) > 1:
        verdicts = judged(scores, scores.verdicts)
        meter.mean_of_known(RIGHT_OF_ALL_KINDS, (verdicts >= RIGHT).double().masked_fill(verdicts.isnan(), math.nan))
    for p, group in enumerate(groups):
        if group.prompt.kind is not None:
            kind = f"kind/{group.prompt.kind}"
            meter.mean_of_known(f"{kind}/reward", scores.rewards[p])
            meter.mean(f"{kind}/length", torch.tensor([float(len(c.own_ids)) for c in group.completions]))
            for name, values in scores.values.items():
                if name != VOTE:
                    meter.mean_of_known(f"{kind}/{name}", values[p])
    meter.mean("reward/unknown", scores.rewards.isnan().double())
    for name, logged in scores.metrics.items():
        meter.mean(f"logged/{name}", torch.tensor(logged, dtype=torch.float64))
    meter.mean("group/with_signal", has_signal(scores.rewards).double())
    completions = [completion for group in groups for completion in group.completions]
    lens = torch.tensor([float(len(completion.own_ids)) for completion in completions])
    meter.mean("completion/length_mean", lens)
    meter.max("completion/length_max", lens)
    meter.mean("completion/truncated", torch.tensor([float(c.finish_reason == "length") for c in completions]))
    meter.mean("completion/repetition", repeats([c.own_ids for c in completions]))
    measure_tools(meter, completions)
    measure_environment(meter, completions)
    meter.total("scoring/timeouts", scores.num_timeouts)
    meter.total("scoring/crashes", scores.num_crashes)
    meter.total("throughput/scoring", float(len(completions)))
    meter.total(REWARD_SECONDS, scores.seconds)
    meter.total("throughput/rollout", float(lens.sum()))


def measure_tools(meter: Meter, completions: list[Completion]) -> None:
    """What tools were asked, and how that went; nothing in a run without tools."""
    with_turns = [
        each for each in completions if each.turns is not None and (each.episode is None or each.episode.has_tools)
    ]
    if not with_turns:
        return
    calls = [[call for turn in completion.turns or [] for call in turn.calls] for completion in with_turns]
    every = [call for own in calls for call in own]
    meter.mean("tools/calls", torch.tensor([float(len(own)) for own in calls]))
    meter.mean("tools/used", torch.tensor([float(bool(own)) for own in calls]))
    meter.mean("tools/failed", torch.tensor([float(call.status != "ok") for call in every]))
    meter.mean("tools/seconds", torch.tensor([call.seconds for call in every]))
    meter.mean("tools/result_tokens", torch.tensor([_tokens_of(each, "tool") for each in with_turns]))
    meter.mean("tools/out_of_calls", torch.tensor([float(each.finish_reason == "calls") for each in with_turns]))


def measure_environment(meter: Meter, completions: list[Completion]) -> None:
    """How the episodes went; nothing in a run without an environment."""
    played = [(each, each.episode) for each in completions if each.episode is not None]
    if not played:
        return
    meter.mean("environment/turns", torch.tensor([float(episode.num_turns) for _, episode in played]))
    meter.mean("environment/ended", torch.tensor([float(episode.ended) for _, episode in played]))
    meter.mean("environment/out_of_turns", torch.tensor([float(each.finish_reason == "turns") for each, _ in played]))
    meter.mean("environment/failed", torch.tensor([float(episode.reward is None) for _, episode in played]))
    meter.mean("environment/reply_tokens", torch.tensor([_tokens_of(each, "user") for each, _ in played]))
    meter.mean("environment/seconds", torch.tensor([episode.seconds for _, episode in played]))


def _tokens_of(completion: Completion, role: str) -> float:
    """Tokens that others put into a completion."""
    return float(sum(turn.num_tokens for turn in completion.turns or [] if turn.role == role))


def measure_carry_over(
    meter: Meter, groups: list[Group], in_batch: Tensor, num_ahead: int, num_drawn_ahead: int
) -> None:
    """How old the tokens of the batch's groups are, (P,) of those that were sampled, and what lies ready for later steps.

    Args:
        num_ahead: completion tokens of later questions that this process has, and
        num_drawn_ahead: how many of them it has drawn in this step.
    """
    ages = [torch.tensor([age for c in group.completions for age in _ages(c)]) for group in groups]
    batch = torch.cat([torch.zeros(0), *(own for own, is_in in zip(ages, in_batch.tolist(), strict=True) if is_in)])
    meter.mean("rollout/staleness", batch)
    meter.max("rollout/staleness_max", batch)
    meter.mean("rollout/carried", (batch > 0).double())
    meter.total("rollout/ahead", float(num_ahead))
    meter.total("throughput/rollout", num_drawn_ahead - float(sum((own > 0).sum() for own in ages)))


def _ages(completion: Completion) -> list[int]:
    """Of the tokens that the model wrote."""
    if completion.ages is None:
        return [0] * len(completion.own_ids)
    if completion.trained is None:
        return completion.ages
    return [age for age, is_own in zip(completion.ages, completion.trained, strict=True) if is_own]


def measure_batch(meter: Meter, groups: list[Group], scores: Scores, *, signal: Tensor, in_batch: Tensor) -> None:
    """Which of the groups that were sampled dynamic sampling took, (P,), and what became of the others.

    Args:
        signal: (P,) whether a group has signal in the reward that decides it.
    """
    tokens = torch.tensor([sum(len(c.own_ids) for c in group.completions) for group in groups])
    meter.total("group/sampled", float(len(groups)))
    meter.total("group/replaced", float((~in_batch & ~signal).sum()))
    meter.total("group/surplus", float((~in_batch & signal).sum()))
    meter.total("completion/dropped_tokens", float(tokens[~in_batch].sum()))
    meter.mean("batch/with_signal", signal[in_batch].double())
    meter.mean_of_known("batch/reward_mean", scores.rewards[in_batch])


def measure_texts(meter: Meter, rows: list[dict[str, Any]], words: Words, *, forms: bool = True) -> None:
    """What the `completion_rows` of one step say: what becomes of them, their words, of which script they are, and, if `forms`
    tell something, those of right answers."""
    verdicts = [is_right(row) for row in rows]
    tallied = count_outcomes(rows) | tally(rows, verdicts, words) | language.tally(rows)
    tallied |= answer_forms.tally(rows, verdicts) if forms else {}
    for name, (total, size) in tallied.items():
        meter.ratio(name, total, size)


RUN = 8
"""Tokens of a run that should not come again. Shorter ones do in healthy text: a formula, a name, single digits."""


def repeats(sequences: list[list[int]]) -> Tensor:
    """(runs,) whether a run of RUN tokens has been in the same sequence before; of all sequences, in no order.

    A loop of any length up to that of the sequence shows, and a sequence shorter than RUN has no run. Runs are compared by 64-bit
    hashes. 256 sequences of 512 tokens take 4 ms.
    """
    lens = np.array([len(ids) for ids in sequences])
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences])
    hashes = np.repeat(np.arange(len(sequences)), lens)
    left = np.repeat(lens.cumsum(), lens) - np.arange(len(tokens))  # in the sequence, from each place on
    num_places = max(len(tokens) - RUN + 1, 0)
    hashes = hashes[:num_places]
    for offset in range(RUN):
        hashes = hashes * HASH_FACTOR + tokens[offset : offset + num_places]
    hashes = np.sort(hashes[left[:num_places] >= RUN])
    return torch.from_numpy(np.append(hashes[1:] == hashes[:-1], np.zeros(min(len(hashes), 1), bool)))


HASH_FACTOR = np.int64(6364136223846793005)
"""Of Knuth's linear congruential generator (MMIX); products wrap around."""


def measure_passes(meter: Meter, passes: list[MicroBatch], *, pair_cost: float = 0.0) -> None:
    """How the sequences of a minibatch were dealt to this process; `pair_cost` as in `plan_passes`."""
    for micro in passes:
        meter.mean("batch/padding", torch.tensor(float(micro.is_spare)))
        meter.lost("batch/imbalance", [0.0 if micro.is_spare else len(micro.tokens) + pair_cost * micro.num_pairs])
        if not micro.is_spare:
            meter.total("throughput/update", float(micro.num_sequence_tokens))
            meter.total(TOKENS_READ, float(len(micro.tokens)))


class Predicted(NamedTuple):
    """What the policy says of the completion tokens of a pass, without gradient; each (T,)."""

    logprobs: Tensor
    entropy: Tensor
    likeliest: Tensor  # bool: no token was likelier there


Measure = Callable[[Meter, MicroBatch, Objective, Predicted, TokenLoss], None]
"""Takes up what one forward pass of an update gave."""


def measure_micro_batch(
    meter: Meter, micro: MicroBatch, objective: Objective, predicted: Predicted, result: TokenLoss
) -> None:
    """A Measure of tokens that were sampled. The tokens of a spare pass do not count."""
    if micro.is_spare:
        return
    logprobs = predicted.logprobs
    meter.mean("policy/entropy", predicted.entropy)
    if micro.ref_logprobs is not None:
        meter.mean("policy/kl", result.kl)
    meter.mean("policy/ratio_mean", result.ratio)
    meter.max("policy/ratio_max", result.ratio)
    for bound, clipped in (("", result.clipped), ("_low", result.clipped_low), ("_high", result.clipped_high)):
        meter.mean(f"policy/clip_fraction{bound}", clipped.double())
    if objective.importance != "none":
        meter.mean("policy/importance_mean", result.importance)
        meter.max("policy/importance_max", result.importance)
        meter.mean("policy/importance_bounded", result.bounded.double())
    if micro.selected is not None:
        meter.mean("policy/selected", micro.selected.double())
    before_update = logprobs if micro.old_logprobs is None else micro.old_logprobs
    gap = (before_update - micro.sampling_logprobs).abs()
    if micro.fresh is None:
        meter.mean("policy/sampling_gap", gap)
    else:
        gap = gap[micro.fresh]
        meter.mean("policy/sampling_gap", gap)
    meter.max("policy/sampling_gap_max", gap)


def measure_rows(
    meter: Meter, micro: MicroBatch, objective: Objective, predicted: Predicted, result: TokenLoss
) -> None:
    """A Measure of rows that are learned: of their trained tokens."""
    measure_tokens(meter, micro, predicted, loss=LOSS, accuracy="supervised/accuracy", entropy="policy/entropy")


def measure_tokens(meter: Meter, micro: MicroBatch, predicted: Predicted, **names: str) -> None:
    """Add to the means that are called `loss`, `accuracy` and `entropy`, over the trained tokens of a pass."""
    if micro.is_spare:
        return
    trained = micro.weights > 0
    values = {"loss": -predicted.logprobs, "accuracy": predicted.likeliest, "entropy": predicted.entropy}
    for name, metric in names.items():
        meter.ratio(metric, torch.where(trained, values[name].double(), 0.0).sum(), trained.sum())


def measure_dealt_rows(meter: Meter, passes: list[MicroBatch]) -> None:
    """How many rows this process has in its passes of a step, and how many tokens of them are trained on."""
    real = [micro for micro in passes if not micro.is_spare]
    meter.total("supervised/tokens", float(sum((micro.weights > 0).sum() for micro in real)))
    meter.total("supervised/rows", float(sum(len(micro.completion_lens) for micro in real)))


def supervised_metrics(meter: Meter, seconds: dict[str, float], processes: Processes) -> dict[str, float]:
    """All metrics of a step of supervised training; see step_metrics."""
    return _of_passes(meter.reduce(processes), seconds)


def _of_passes(metrics: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    read = metrics.pop(TOKENS_READ, 0.0)
    metrics["batch/shared"] = 1 - read / metrics["throughput/update"] if read else 0.0
    metrics["throughput/update"] = metrics.get("throughput/update", 0.0) / seconds["update"]
    return metrics | {f"time/{name}": value for name, value in seconds.items()}


def step_metrics(meter: Meter, seconds: dict[str, float], processes: Processes) -> dict[str, float]:
    """All metrics of a step, from what each process collected and from the main process's clock."""
    metrics = meter.reduce(processes)
    variance = metrics.pop(SQUARED_REWARD, 0.0) - metrics.get("reward/mean", 0.0) ** 2
    metrics["reward/std"] = max(variance, 0.0) ** 0.5
    metrics["throughput/rollout"] /= seconds["rollout"]
    busy = metrics.pop(REWARD_SECONDS, 0.0)
    metrics["throughput/scoring"] = metrics["throughput/scoring"] / busy if busy else 0.0
    return _of_passes(metrics, seconds)


SQUARED_REWARD = "reward/squared"
TOKENS_READ = "batch/tokens"
REWARD_SECONDS = "scoring/seconds"
"""Collected for another metric only."""


def _names(mappings: Iterable[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))
