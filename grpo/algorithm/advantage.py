"""Rewards -> advantages: what each completion did better than its siblings. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from grpo.algorithm.objective import AdvantageRule

FLAT = 1e-6  # a spread below this, relative to the rewards' size, is float noise and no signal


def advantages_by(rule: AdvantageRule, rewards: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """(P, G) advantages by the settings of an algorithm, but for the division by the batch's deviation.

    Args:
        rewards: (P, G); NaN where a reward is unknown.
        parts: weight and values (P, G) of each reward function that `rewards` are a sum of.
    """
    if rule.separate_rewards:
        return separate_advantages(rewards, parts)
    return group_advantages(
        rewards,
        normalize_by_std=rule.normalize_by_std is True,
        normalize_by_mean=rule.normalize_by_mean,
        baseline=rule.baseline,
        pass_at=rule.pass_at,
    )


def advantages_of_batch(rule: AdvantageRule, rewards: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The same of a whole batch, with that division."""
    advantages = advantages_by(rule, rewards, parts)
    if rule.normalize_by_std != "batch":
        return advantages
    return divided_by_batch_std(advantages, [square_sum(advantages)])


def group_advantages(
    rewards: Tensor,
    *,
    normalize_by_std: bool,
    normalize_by_mean: bool = False,
    baseline: str = "mean",
    pass_at: int = 1,
) -> Tensor:
    """Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

        A_i = (r_i - mean(r)) / std(r)            over the group; without the division for Dr. GRPO (arXiv 2503.20783)
        A_i = (r_i - mean(r)) / mean(r)           normalize_by_mean: MaxRL (arXiv 2602.02710); 0 where no reward is above 0
        A_i = r_i - mean of the others' r         baseline leave_one_out: RLOO (arXiv 2402.14740)

    The standard deviation is that of the group itself (divided by G, not G - 1), so a group's advantages have mean 0 and
    variance 1 exactly, and no epsilon is needed: a group whose rewards are all equal up to float noise has no signal and
    gets advantages of exactly 0. The mean of the others leaves a reward out of its own baseline, which makes it unbiased; it is
    the centred reward times G / (G - 1).

    With `pass_at` k above 1 what counts is the best of k completions. Over all sets I of k completions of the group,

        A_i = (mean over I with i of max(r_I) - mean over all I of max(r_I)) / std over all I of max(r_I)
        A_i = k * mean over I with i of (max(r_I) - max(r_I without i))           baseline leave_one_out

    The first are the advantages of "Pass@k training" (arXiv 2508.10751; its analytical ones where rewards are 0 and 1), the
    second is PKPO's estimator with the lowest variance (arXiv 2505.15201, eq. 33) times G, as the loss divides by the number of
    completions. With k = 1 both are the equations above. A group with fewer than k known rewards takes the best of them all.

    Args:
        rewards: (P, G); NaN where a reward is unknown. Unknown rewards take no part in their group's mean and deviation.

    Returns:
        (P, G) advantages; NaN where the reward is.

    Raises:
        ValueError: a reward is below 0, and they are to be divided by their mean.
    """
    known = ~rewards.isnan()
    if pass_at > 1:
        centred, spread = _best_of(rewards, pass_at, leave_one_out=baseline == "leave_one_out")
    else:
        centred = (rewards - rewards.nanmean(1, keepdim=True)) * BASELINES[baseline](known.sum(1, keepdim=True))
        spread = _std(rewards)
    if normalize_by_mean:
        _check_not_negative(rewards)
        spread = rewards.nanmean(1, keepdim=True)
    advantages = centred / (spread if normalize_by_std or normalize_by_mean else 1)
    return advantages.masked_fill(known & ~has_signal(rewards)[:, None], 0.0)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.ones_like,
    "leave_one_out": lambda count: count / (count - 1),  # of 1 there is no other: without signal, so masked
}
"""Factor of the centred reward, by the number of known rewards in the group."""


def _best_of(rewards: Tensor, k: int, *, leave_one_out: bool) -> tuple[Tensor, Tensor]:
    """(P, G) what each reward does for the best of k of its group, and (P, 1) the deviation of that best, never 0."""
    centred, spread = torch.full_like(rewards, math.nan), torch.ones_like(rewards[:, :1])
    for p, row in enumerate(rewards):
        places = (~row.isnan()).nonzero().flatten()
        if not len(places):
            continue
        ascending, order = row[places].double().sort()
        size = min(k, len(places))
        with_each, over_all, gains = (weights.to(row.device) for weights in best_weights(len(places), size))
        mean = over_all @ ascending
        std = (over_all @ (ascending - mean).square()).sqrt()
        noise = FLAT * ascending.abs().max().clamp(min=1)
        is_flat = std <= noise  # as where fewer than k are wrong
        if leave_one_out and size > 1:
            own = gains @ ascending
            own = own.masked_fill(own.abs() <= noise, 0.0)
        else:
            own = (with_each @ ascending - mean).masked_fill(is_flat, 0.0)
        centred[p, places[order]] = own.to(rewards.dtype)
        spread[p] = std.masked_fill(is_flat, 1.0).to(rewards.dtype)
    return centred, spread


@lru_cache(maxsize=64)
def best_weights(num: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `num` ascending rewards, what each counts in the mean of the best of k, and in what each adds to it.

    The j-th of them (from 0) is the best of comb(j, k - 1) sets. With the i-th in each set, it is the best itself where the
    others are before it, and a later j-th is that of comb(j - 1, k - 2) sets. The i-th adds its distance to the best of the
    others, the j-th before it in comb(j, k - 2) sets, and nothing where a later one is there.

    Returns:
        (num, num): for each i over the sets with it; (num,): over all sets; rows of sum 1. (num, num): for each i, k times the
        mean over the sets with it of what it adds; rows of sum 0, and 0 throughout where k is 1.
    """
    sets = math.comb(num, k)
    over_all = torch.tensor([math.comb(j, k - 1) / sets for j in range(num)], dtype=torch.float64)
    sets = math.comb(num - 1, k - 1)
    with_each = torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        with_each[i, i] = math.comb(i, k - 1) / sets
        for j in range(i + 1, num):
            with_each[i, j] = math.comb(j - 1, k - 2) / sets if k > 1 else 0.0
    before = torch.tensor([k * math.comb(j, k - 2) / sets if k > 1 else 0.0 for j in range(num)], dtype=torch.float64)
    others = before.expand(num, num).tril(-1)
    return with_each, over_all, others.sum(1).diag() - others


def _check_not_negative(rewards: Tensor) -> None:
    lowest = rewards.nan_to_num(0.0).min()
    if lowest < 0:
        raise ValueError(
            f"algorithm.normalize_by_mean is true; a completion has the reward {float(lowest):g}, and a mean of rewards below 0 "
            "would turn their signs. Use rewards that are 0 or more, or set algorithm.normalize_by_mean to false."
        )


def separate_advantages(rewards: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The weighted sum of the advantages by each reward alone (GDPO, arXiv 2601.05242).

    A reward of little spread counts as much as one of a large spread with the same weight, and one that is equal throughout a
    group takes nothing from the others. One that has no part in a group adds nothing there.
    """
    total = torch.zeros_like(rewards)
    for weight, values in parts:
        total += weight * group_advantages(values.where(~rewards.isnan(), math.nan), normalize_by_std=True).nan_to_num()
    return total.masked_fill(rewards.isnan(), math.nan)


def square_sum(advantages: Tensor) -> tuple[float, int]:
    """The sum of the squares of advantages, and how many are known."""
    known = advantages[~advantages.isnan()].double()
    return float(known.square().sum()), known.numel()


def divided_by_batch_std(advantages: Tensor, parts: Sequence[tuple[float, int]]) -> Tensor:
    """Advantages divided by their deviation over the whole batch (REINFORCE++ with a group's baseline, arXiv 2501.03262).

    Those of each group have mean 0, so those of the batch do. Without signal anywhere they stay 0.

    Args:
        parts: `square_sum` of the batch's advantages, of each process.
    """
    total, number = sum(square for square, _ in parts), sum(count for _, count in parts)
    return advantages / (math.sqrt(total / number) if total else 1.0)


def has_signal(rewards: Tensor) -> Tensor:
    """(P,) bool: the rewards of which groups (P, G) are not all equal, up to float noise; what is NaN is not looked at."""
    largest = rewards.nan_to_num().abs().amax(1, keepdim=True)
    return (_std(rewards) > FLAT * largest.clamp(min=1)).squeeze(1)


def teaches(rule: AdvantageRule, rewards: Tensor) -> Tensor:
    """(P,) bool: which groups (P, G) have advantages other than 0. Of the best of k, one with too few wrong answers has none."""
    advantages = group_advantages(rewards, normalize_by_std=False, baseline=rule.baseline, pass_at=rule.pass_at)
    return (advantages.nan_to_num() != 0).any(1)


def _std(rewards: Tensor) -> Tensor:
    """(P, 1) of the known rewards; NaN where there is none."""
    centred = rewards - rewards.nanmean(1, keepdim=True)
    return (centred.nan_to_num().square().sum(1, keepdim=True) / (~rewards.isnan()).sum(1, keepdim=True)).sqrt()
