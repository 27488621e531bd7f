"""The family's loss as one expression, the estimators in it and the token weights. Pure: tensors in, tensors out.

GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE differ in values of `Objective`, in the weight of a token
(`token_weights`) and in the advantage, never in a branch here; docs/algorithms.md has the settings of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpo.algorithm.objective import Objective


@dataclass(frozen=True)
class TokenLoss:
    """Sum to differentiate, and what went into it token by token (without gradient) for the metrics; each (T,)."""

    loss: Tensor  # ()
    ratio: Tensor  # of the token, or of its completion
    clipped_low: Tensor  # bool
    clipped_high: Tensor  # bool
    kl: Tensor  # 0 without a reference
    importance: Tensor  # pi_old / pi_rollout as it is; 1 where the objective has no use for it
    bounded: Tensor  # bool: the importance weight was truncated or masked

    @property
    def clipped(self) -> Tensor:
        """Whether the ratio is at either bound."""
        return self.clipped_low | self.clipped_high


def grpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: Objective,
    *,
    completion_lens: Tensor,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    selected: Tensor | None = None,
) -> TokenLoss:
    """The objective of the family, negated; sums run over completion tokens t, each of a completion i.

        loss   = sum_t w_t * ( -m_t c_t S_t + kl_coef * kl_t - entropy_coef * H_t )
        S_t    = min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)                        clip: surrogate
               = sg(clip(rho_t, 1 - clip_low, 1 + clip_high)) A_t log pi(t)                          clip: weight
               = 4 / tau sigmoid(tau (rho_t - 1)) A_t,  tau by the sign of A_t                       clip: soft
               = rho_t A_t, or 0 where pi(t) - pi_rollout(t) is beyond -clip_low, clip_high          clip: divergence
        rho_t  = pi(t) / pi_old(t)                                                                   ratio: token
               = sg(s_i) pi(t) / sg(pi(t)),  s_i = (pi(i) / pi_old(i)) ^ (1 / len_i)                 ratio: sequence
        c_t    = bound(pi_old / pi_rollout), of the token or of its whole completion; 1 with importance none

    sg() has a value and no gradient. The sources:

    - `surrogate`, `token`: PPO's (arXiv 1707.06347, eq. 7) in GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3; DeepSeek-R1,
      arXiv 2501.12948, eq. 1) and, with two bounds, DAPO (arXiv 2503.14476, eq. 8). Without bounds S_t = rho_t A_t, whose
      gradient on-policy is REINFORCE's.
    - `sequence`: GSPO (arXiv 2507.18071, eq. 5 and 7) written as its GSPO-token (eq. 13 and 14). All tokens of a completion have
      one advantage here, and then both have the same value and gradient, as the paper notes.
    - `weight`: CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5); the paper sets no bound below.
    - `clip_dual`: of a negative advantage S_t >= clip_dual A_t, so that a large ratio has no gradient (Dual-clip PPO, arXiv
      1912.09729, eq. 5).
    - `soft`: SAPO (arXiv 2511.20347): no bound, but a gate that closes as the ratio leaves 1; on-policy its gradient is 1.
    - `divergence`: DPPO (arXiv 2602.04879) with the total variation of "this token or another", |pi(t) - pi_rollout(t)|. A token
      is left out where it is moved further from where it was drawn. Its rho is pi / pi_rollout, not pi / pi_old.
    - `kl_weighted`: kl_t times rho_t of the token, which makes k3 and its gradient unbiased where the policy has moved on
      (DeepSeek-V3.2, arXiv 2512.02556).
    - `importance`: what an engine samples from is not quite what is trained. truncate: clip(c, importance_low,
      importance_high), TIS ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025, whose
      min(c, C) has no bound below). mask: c within the bounds, else 0, IcePop (Ring-1T, arXiv 2510.18855).

    Args:
        logprobs: (T,) of the policy, with gradient.
        advantages: (T,) each token's completion's advantage.
        weights: (T,) from `token_weights`.
        completion_lens: (B,) whose sum is T.
        entropy: (T,) of the policy's next-token distribution, with gradient; needed when entropy_coef > 0.
        old_logprobs: (T,) of the policy before the first update; None when that is this very policy: the ratio is then 1 and
            only its gradient matters.
        ref_logprobs: (T,) of the reference policy; needed when the loss has a KL term.
        sampling_logprobs: (T,) as sampled; needed with an importance weight.
        selected: (T,) bool, m_t; None: all. What is not selected keeps its KL and entropy terms, and its place in the weights of
            the others (arXiv 2506.01939, section 5, divides by all tokens).

    With clip `surrogate` a token counts as clipped when the bound is what the minimum chose, so that its surrogate has no
    gradient; with `weight` when its ratio is beyond a bound, which leaves it one.
    """
    real = weights > 0  # a token without weight must not reach exp(): infinity times a weight of 0 is NaN
    fixed = logprobs.detach()
    old = fixed if old_logprobs is None else old_logprobs
    if objective.clip == "divergence":
        assert sampling_logprobs is not None, "it is the divergence from the rollout's log-probabilities"
        old = sampling_logprobs
    importance, factor = _importance(old, sampling_logprobs, completion_lens, objective)
    counts = real & (factor > 0) if selected is None else real & (factor > 0) & selected
    drift = RATIO_LEVELS[objective.ratio](fixed - old, completion_lens)
    ratio = (logprobs - fixed + torch.where(counts, drift, 0.0)).exp()
    surrogate, low, high = SURROGATES[objective.clip](ratio, advantages, logprobs, old, objective)
    per_token = -torch.where(counts, factor, 0.0) * surrogate
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = KL_ESTIMATORS[objective.kl_estimator](logprobs, torch.where(real, ref_logprobs, fixed))
        if objective.kl_weighted:
            kl = kl * (logprobs - torch.where(real, old, fixed)).exp()
        per_token = per_token + objective.kl_coef * kl
    if objective.entropy_coef:
        assert entropy is not None, "an entropy bonus needs the entropy"
        per_token = per_token - objective.entropy_coef * entropy
    return TokenLoss(
        loss=(weights * per_token).sum(),
        ratio=drift.exp(),
        clipped_low=low,
        clipped_high=high,
        kl=kl.detach(),
        importance=importance,
        bounded=factor != importance,
    )


def _over_completion(reduce: str, values: Tensor, completion_lens: Tensor) -> Tensor:
    """Each token's completion's sum or mean, in float64 and without neighbours: how completions are packed does not matter."""
    whole = torch.segment_reduce(
        values.double(), reduce, lengths=completion_lens, unsafe=True
    )  # unsafe: no wait for checks
    return whole.to(values.dtype).repeat_interleave(completion_lens, output_size=len(values))


def _of_token(values: Tensor, completion_lens: Tensor) -> Tensor:
    return values


Level = Callable[[Tensor, Tensor], Tensor]
RATIO_LEVELS: dict[str, Level] = {"token": _of_token, "sequence": partial(_over_completion, "mean")}
IMPORTANCE_LEVELS: dict[str, Level] = {
    "token": _of_token,
    "sequence": partial(_over_completion, "sum"),
    "geometric": partial(_over_completion, "mean"),
}
"""Of logarithms (T,): GSPO's ratio is the geometric mean of a completion's, an importance weight of a completion the product, or
that mean."""


def _importance(
    old: Tensor, sampling_logprobs: Tensor | None, completion_lens: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """pi_old / pi_rollout as it is, and as the factor of the surrogate that it makes; (T,) without gradient."""
    if objective.importance == "none":
        return torch.ones_like(old), torch.ones_like(old)
    assert sampling_logprobs is not None, "an importance weight needs the log-probabilities of the rollout"
    weight = IMPORTANCE_LEVELS[objective.importance_level](old - sampling_logprobs, completion_lens).exp()
    low = 0.0 if objective.importance_low is None else objective.importance_low
    high = math.inf if objective.importance_high is None else objective.importance_high
    within = weight.clamp(low, high)
    return weight, within if objective.importance == "truncate" else torch.where(weight == within, weight, 0.0)


Surrogate = tuple[Tensor, Tensor, Tensor]
"""(T,) S, and where a bound below and one above is at work."""


def _clip_surrogate(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, old: Tensor, objective: Objective
) -> Surrogate:
    low, high = _bounds(objective)
    free, bounded = ratio * advantages, ratio.clamp(low, high) * advantages
    surrogate, clipped, fixed = torch.minimum(free, bounded), (bounded < free).detach(), ratio.detach()
    below, above = clipped & (fixed < low), clipped & (fixed > high)
    if objective.clip_dual is not None:
        floor = objective.clip_dual * advantages
        beyond = (advantages < 0) & (surrogate.detach() < floor)
        surrogate, above = torch.where(beyond, floor, surrogate), above | beyond
    return surrogate, below, above


def _clip_weight(ratio: Tensor, advantages: Tensor, logprobs: Tensor, old: Tensor, objective: Objective) -> Surrogate:
    low, high = _bounds(objective)
    fixed = ratio.detach()
    return fixed.clamp(low, high) * advantages * logprobs, fixed < low, fixed > high


def _gate(ratio: Tensor, advantages: Tensor, logprobs: Tensor, old: Tensor, objective: Objective) -> Surrogate:
    tau = torch.where(advantages > 0, objective.soft_positive, objective.soft_negative)
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    return 4 / tau * (tau * (ratio - 1)).sigmoid() * advantages, nowhere, nowhere


def _mask_divergent(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, old: Tensor, objective: Objective
) -> Surrogate:
    low, high = _bounds(objective)
    moved = 1 + logprobs.detach().exp() - old.exp()  # 1 where nothing has, as of a ratio
    below, above = (advantages < 0) & (moved < low), (advantages > 0) & (moved > high)
    return torch.where(below | above, 0.0, ratio * advantages), below, above


def _bounds(objective: Objective) -> tuple[float, float]:
    """Of what is 1 where the policy is the one that sampled."""
    low = -math.inf if objective.clip_low is None else 1 - objective.clip_low
    return low, math.inf if objective.clip_high is None else 1 + objective.clip_high


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Objective], Surrogate]] = {
    "surrogate": _clip_surrogate,
    "weight": _clip_weight,
    "soft": _gate,
    "divergence": _mask_divergent,
}
"""What keeps an update near the policy that sampled: (ratio, advantages, logprobs, old logprobs, objective) -> the surrogate and
where its bounds are at work."""


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
restrain; in the reward it has the gradient of the KL (arXiv 2512.21852). k2's gradient in the loss is that of the KL itself, as
long as the update is on-policy. k3 is the paper's: unbiased, never negative, with the gradient of the forward KL."""


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The lowest of the `share` highest entropies: tokens from it on are trained on (arXiv 2506.01939, section 5).

    The paper's tau: the share holds for all tokens of the minibatch together, over all its passes and processes, so that the
    selection does not depend on the split.

    Args:
        entropies: (T,) of the policy that sampled, T > 0.
        share: in (0, 1]; at least one token stays.
    """
    return float(entropies.topk(math.ceil(share * len(entropies)), sorted=True).values[-1])


def token_sums(advantages: Tensor, logprobs: Tensor) -> tuple[int, float, float]:
    """How many tokens there are, and the sums of their advantages and log-probabilities (T,): what `covariances` centres by."""
    return len(advantages), float(advantages.double().sum()), float(logprobs.double().sum())


def covariances(advantages: Tensor, logprobs: Tensor, sums: list[tuple[int, float, float]]) -> Tensor:
    """(T,) each token's part of the covariance of log-probability and advantage (arXiv 2505.22617, eq. 10).

        cov_t = (log pi(t) - mean of log pi) * (A_t - mean of A)

    The means are over all tokens of the minibatch, over all its passes and processes, so it does not depend on the split.

    Args:
        advantages: (T,) of the tokens of a pass, as their log-probabilities before the update.
        sums: `token_sums` of each pass of each process.
    """
    number, advantage, logprob = (sum(each) for each in zip(*sums, strict=True))
    return (logprobs - logprob / number) * (advantages - advantage / number)


def lots(sampling_logprobs: Tensor, targets: Tensor, completion_lens: Tensor) -> Tensor:
    """(T,) whole numbers below 2 ** 32 that are as good as drawn at random, and the same wherever a completion is computed.

    They are a hash of the completion's tokens up to this one, with the digits of the log-probabilities that they were drawn with,
    and of the whole completion. So a token that is repeated, or that other completions begin with, too, has one of its own.

    Args:
        sampling_logprobs: (T,)
        targets: (T,)
        completion_lens: (B,) whose sum is T.
    """
    bits = sampling_logprobs.float().contiguous().view(torch.int32).long()
    each = (bits * 2_654_435_761 + targets * 40_503) % 2**32
    sums, ends = torch.nn.functional.pad(each.cumsum(0), (1, 0)), completion_lens.cumsum(0)
    before, whole = sums[ends - completion_lens], sums[ends] - sums[ends - completion_lens]
    up_to = sums[1:] - before.repeat_interleave(completion_lens)
    mixed = (
        up_to + whole.repeat_interleave(completion_lens) * 2_246_822_519
    ) % 2**32  # an overflow is a multiple of it
    return ((mixed ^ (mixed >> 15)) * 2_246_822_519) % 2**32


def lot_limit(drawn: Tensor, number: int) -> int:
    """Those of `lots` up to it are the `number` smallest; -1: none."""
    return int(drawn.sort().values[min(number, len(drawn)) - 1]) if len(drawn) and number else -1


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
