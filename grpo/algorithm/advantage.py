"""Rewards -> advantages: what each completion did better than its siblings. Pure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLAT = 1e-6  # a spread below this, relative to the rewards' size, is float noise and no signal


def group_advantages(rewards: Tensor, *, normalize_by_std: bool, baseline: str = "mean") -> Tensor:
    """Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

        A_i = (r_i - mean(r)) / std(r)            over the group; without the division for Dr. GRPO (arXiv 2503.20783)
        A_i = r_i - mean of the others' r         baseline leave_one_out: RLOO (arXiv 2402.14740)

    The standard deviation is that of the group itself (divided by G, not G - 1), so a group's advantages have mean 0 and
    variance 1 exactly, and no epsilon is needed: a group whose rewards are all equal up to float noise has no signal and
    gets advantages of exactly 0. The mean of the others leaves a reward out of its own baseline, which makes it unbiased; it is
    the centred reward times G / (G - 1).

    Args:
        rewards: (P, G); NaN where a reward is unknown. Unknown rewards take no part in their group's mean and deviation.

    Returns:
        (P, G) advantages; NaN where the reward is.
    """
    known = ~rewards.isnan()
    centred = rewards - rewards.nanmean(1, keepdim=True)
    advantages = centred * BASELINES[baseline](known.sum(1, keepdim=True)) / (_std(rewards) if normalize_by_std else 1)
    return advantages.masked_fill(known & ~has_signal(rewards)[:, None], 0.0)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.ones_like,
    "leave_one_out": lambda count: count / (count - 1),  # of 1 there is no other: without signal, so masked
}
"""Factor of the centred reward, by the number of known rewards in the group."""


def has_signal(rewards: Tensor) -> Tensor:
    """(P,) bool: the rewards of which groups (P, G) are not all equal, up to float noise; what is NaN is not looked at."""
    largest = rewards.nan_to_num().abs().amax(1, keepdim=True)
    return (_std(rewards) > FLAT * largest.clamp(min=1)).squeeze(1)


def _std(rewards: Tensor) -> Tensor:
    """(P, 1) of the known rewards; NaN where there is none."""
    centred = rewards - rewards.nanmean(1, keepdim=True)
    return (centred.nan_to_num().square().sum(1, keepdim=True) / (~rewards.isnan()).sum(1, keepdim=True)).sqrt()
