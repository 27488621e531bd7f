"""The clipped surrogate, the KL estimators and the token weights. Pure: tensors in, tensors out.

GRPO, DAPO and Dr. GRPO are one expression. They differ in the weight of a token (`token_weights`), in the bounds of the
ratio and in the advantage, never in a branch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLoss:
    """Sum to differentiate, and what went into it token by token (without gradient) for the metrics; each (T,)."""

    loss: Tensor  # ()
    ratio: Tensor
    clipped: Tensor  # bool
    kl: Tensor  # 0 without a reference


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
) -> TokenLoss:
    """GRPO's objective, negated (DeepSeekMath, arXiv 2402.03300, eq. 3; DeepSeek-R1, arXiv 2501.12948, eq. 1).

        loss = sum_t w_t * ( -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef * kl_t )
        rho_t = pi(t) / pi_old(t)

    Args:
        logprobs: (T,) of the policy, with gradient.
        advantages: (T,) each token's completion's advantage.
        weights: (T,) from `token_weights`.
        old_logprobs: (T,) of the policy that sampled; None when that is this very policy: the ratio is then 1 and only its
            gradient matters.
        ref_logprobs: (T,) of the reference policy; needed when kl_coef > 0.

    A token counts as clipped when the bound is what the minimum chose, so that its surrogate has no gradient.
    """
    real = weights > 0  # a token without weight must not reach exp(): infinity times a weight of 0 is NaN
    fixed = logprobs.detach()
    old = fixed if old_logprobs is None else torch.where(real, old_logprobs, fixed)
    ratio = (logprobs - old).exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_token = -torch.minimum(free, bounded)
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = KL_ESTIMATORS[kl_estimator](logprobs, torch.where(real, ref_logprobs, fixed))
        per_token = per_token + kl_coef * kl
    return TokenLoss((weights * per_token).sum(), ratio.detach(), (bounded < free).detach(), kl.detach())


def _k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


def _k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (logprobs - ref_logprobs).square() / 2


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    delta = ref_logprobs - logprobs
    return delta.exp() - delta - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""Estimators of KL(policy || reference) from a token sampled by the policy (Schulman, "Approximating KL divergence",
2020). k1 is unbiased as a number, but as a loss its expected gradient on-policy is zero: it measures and does not
restrain. k2's gradient is that of the KL itself. k3 is the paper's: unbiased, never negative, with the gradient of the
forward KL."""


def token_weights(
    aggregation: str,
    completion_lens: Tensor,
    *,
    num_completions: int,
    num_tokens: int,
    max_completion_tokens: int,
) -> Tensor:
    """(T,) weight of every completion token, in order of sequence, given `completion_lens (B,)`.

    | aggregation | weight of a token of completion i             | source                                  |
    |-------------|-----------------------------------------------|-----------------------------------------|
    | `sequence`  | 1 / (num_completions * len_i)                 | GRPO, DeepSeekMath eq. 3                |
    | `token`     | 1 / num_tokens                                | DAPO, arXiv 2503.14476, eq. 8           |
    | `constant`  | 1 / (num_completions * max_completion_tokens) | Dr. GRPO, arXiv 2503.20783, listing 1   |

    The counts are those of the whole optimizer step, over all micro-batches and processes, so the gradient cannot depend
    on how the step was split.
    """
    divisors = {
        "sequence": num_completions * completion_lens,
        "token": torch.full_like(completion_lens, num_tokens),
        "constant": torch.full_like(completion_lens, num_completions * max_completion_tokens),
    }
    return (1.0 / divisors[aggregation]).repeat_interleave(completion_lens)
