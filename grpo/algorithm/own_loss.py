"""A user's own loss in the place of `grpo_loss`: what it is given, what it returns, and what is made of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.loss import KL_ESTIMATORS, TokenLoss
from grpo.algorithm.objective import Objective


@dataclass(frozen=True)
class LossInputs:
    """The completion tokens of one forward pass, T of them, of B whole completions that lie end to end.

    A step has several passes, on several processes. Which completions share a pass is chance, so a loss must not compare them:
    what a completion is worth beside its group is its advantage.
    """

    logprobs: Tensor
    """(T,) log pi of the policy, at the sampling temperature; with gradient."""
    entropy: Tensor
    """(T,) entropy of the policy's next-token distribution, in nats; with gradient."""
    advantages: Tensor
    """(T,) the advantage of each token's completion."""
    completion_lens: Tensor
    """(B,) tokens of each completion, whose sum is T; `x.split(completion_lens.tolist())` gives them one by one."""
    old_logprobs: Tensor
    """(T,) of the policy before the first update of this rollout; equal to `logprobs` where this is the first."""
    sampling_logprobs: Tensor
    """(T,) as the engine sampled them."""
    ref_logprobs: Tensor | None
    """(T,) of the reference model; None where `algorithm.kl_coef` is 0 or `algorithm.kl_in` is reward: none is asked."""
    kl_coef: float
    """`algorithm.kl_coef` in this step. A KL term is the function's own to add."""


Loss = Callable[[LossInputs], Tensor]
"""The tokens of a pass -> (T,) the loss of each, with gradient. It is multiplied by the weights of `algorithm.aggregation` and
summed over all passes and processes, so that the gradient does not depend on how a step is split."""


def use_loss(function: Loss) -> Callable[..., TokenLoss]:
    """`function` with the arguments and the result of `grpo_loss`; of the metrics, those of bounds are 0 and those of importance
    weights 1."""

    def loss(
        logprobs: Tensor,
        advantages: Tensor,
        weights: Tensor,
        objective: Objective,
        *,
        completion_lens: Tensor,
        entropy: Tensor,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        sampling_logprobs: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> TokenLoss:
        real, fixed = weights > 0, logprobs.detach()
        # tokens without weight (cut-off completions, a pass that only keeps step with others) must stay finite: 0 * inf is NaN
        old, sampled, reference = (
            None if given is None else torch.where(real, given, fixed)
            for given in (fixed if old_logprobs is None else old_logprobs, sampling_logprobs, ref_logprobs)
        )
        assert old is not None
        inputs = LossInputs(  # of which those that others read are copies: a function may work in place
            logprobs=logprobs.clone(),
            entropy=entropy.clone(),
            advantages=advantages.clone(),
            completion_lens=completion_lens.clone(),
            old_logprobs=old.clone(),
            sampling_logprobs=(old if sampled is None else sampled).clone(),
            ref_logprobs=None if reference is None else reference.clone(),
            kl_coef=objective.kl_coef,
        )
        per_token = _checked(function(inputs), logprobs)
        no, ones = torch.zeros_like(real), torch.ones_like(fixed)
        return TokenLoss(
            loss=(weights * torch.where(real, per_token, 0.0)).sum(),
            ratio=(fixed - old).exp(),
            clipped_low=no,
            clipped_high=no,
            kl=0 * ones if reference is None else KL_ESTIMATORS[objective.kl_estimator](fixed, reference),
            importance=ones,
            bounded=no,
        )

    return loss


def _checked(given: Any, logprobs: Tensor) -> Tensor:
    """Raises ValueError if a user's function returned no loss for each token, or one without gradient."""
    rule = f"it returns the loss of each token, a tensor of the shape ({len(logprobs)},) for these"
    if not isinstance(given, Tensor):
        raise ValueError(f"loss returned {type(given).__name__}; {rule}. Correct the function.")
    if given.shape != logprobs.shape:
        raise ValueError(
            f"loss returned a tensor of the shape {tuple(given.shape)}; {rule}. Leave out the sum or mean: the weights of "
            "algorithm.aggregation make it."
        )
    if not given.requires_grad and logprobs.requires_grad:
        raise ValueError(
            "loss returned a tensor without gradient, so nothing would be learned. Compute it from logprobs, without detach()."
        )
    return given
