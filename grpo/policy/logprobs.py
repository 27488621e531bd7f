"""Hidden states -> log-probabilities and entropy of the completion tokens and whether each is the likeliest, chunked over tokens.

A `(T, V)` tensor of logits would be the peak of a step's memory (16k tokens of a 152k vocabulary are 5 GB in bfloat16 and 10 in
float32, and the backward pass wants as much again), so logits exist for `chunk_tokens` tokens at a time, in the model's own
precision, and are computed again in the backward pass, which overwrites them with their gradient. On CUDA the rest is two
kernels that read a row of logits once, in float32 registers (logprob_kernels.py).

torch's linear_cross_entropy (2.13) and Liger's fused losses have neither the entropy nor, but for the former, a value per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, entropy of the distribution it was drawn from, and whether it is the likeliest there.

        logprob_t = log softmax(head(hidden_t) / temperature)[target_t]
        entropy_t = - sum_v p_v log p_v,  p = softmax(head(hidden_t) / temperature)

    Args:
        hidden: (T, H), the state that predicts each target, i.e. of the token before it.
        targets: (T,) token ids.
        head: (N, H) -> (N, V) logits, a new tensor that nothing else needs.

    Returns:
        logprobs (T,) and entropy (T,) in nats, both float32; likeliest (T,) bool, without gradient.
    """
    parts = []
    for h, y in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, h, y, head, temperature, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk(h, y, head, temperature))
    logprobs, entropies, likeliest = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies), torch.cat(likeliest)


def _chunk(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _LogSoftmaxAt.apply(head(hidden), targets, temperature)


class _LogSoftmaxAt(torch.autograd.Function):
    """log softmax(logits / temperature)[target] and the entropy, row by row; the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        if logits.is_cuda:
            from grpo.policy.logprob_kernels import row_statistics
        else:
            row_statistics = plain_row_statistics
        logprobs, entropy, normalizer, likeliest = row_statistics(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, normalizer, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # a loss without the entropy gives None for it
        ctx.mark_non_differentiable(likeliest)
        return logprobs, entropy, likeliest

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None, _: None
    ) -> tuple[Tensor, None, None]:
        logits, targets, normalizer, entropy = ctx.saved_tensors
        if logits.is_cuda:
            from grpo.policy.logprob_kernels import replace_by_gradient
        else:
            replace_by_gradient = plain_replace_by_gradient
        gradient = torch.zeros_like(normalizer) if gradient is None else gradient
        of_entropy = None if entropy_gradient is None else (entropy, entropy_gradient)
        replace_by_gradient(logits, targets, normalizer, gradient, ctx.temperature, of_entropy=of_entropy)
        return logits, None, None


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, whose products of 16-bit numbers are added up and kept in float32.

    Args:
        x: (N, H), in the weight's precision.
        weight: (V, H); bias: (V,) or None.

    Returns:
        (N, V) float32. Its gradient is rounded to the weight's precision before it is multiplied, as that of 16-bit logits.
    """
    return _Float32Linear.apply(x, weight, bias)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype != torch.float32:
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = x.float() @ weight.float().t()
        return logits if bias is None else logits.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        narrow = gradient.to(weight.dtype)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            narrow @ weight if of_x else None,
            narrow.t() @ x if of_weight else None,
            gradient.sum(0).to(weight.dtype) if of_bias else None,
        )


def plain_row_statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each target, entropy, logarithm of the softmax's denominator, and whether no token is likelier than the
    target; each (N,) for logits (N, V)."""
    scaled = logits.float() / temperature
    normalizer = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    logprobs, likeliest = chosen - normalizer, chosen == scaled.amax(-1)
    all_logprobs = scaled.sub_(normalizer.unsqueeze(-1))
    probabilities = all_logprobs.exp()
    terms = torch.where(probabilities > 0, probabilities * all_logprobs, 0)  # an impossible token's logit may be -inf
    return logprobs, -terms.sum(-1), normalizer, likeliest


def plain_replace_by_gradient(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    gradient: Tensor,
    temperature: float,
    *,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """logits <- (g_t (1[target] - p) - h_t p (log p + entropy)) / temperature, with p = softmax(logits / temperature), in place.

    Args:
        gradient: (N,) g, of the loss by each log-probability.
        of_entropy: the entropies (N,) and h, the gradient (N,) of the loss by them; None: h is 0.
    """
    all_logprobs = logits.float() / temperature - normalizer.unsqueeze(-1)
    probabilities = all_logprobs.exp()
    result = probabilities.neg()
    result[torch.arange(len(targets), device=targets.device), targets] += 1
    result.mul_((gradient / temperature).unsqueeze(-1))
    if of_entropy is not None:
        entropy, by_entropy = of_entropy
        slope = torch.where(probabilities > 0, probabilities * (all_logprobs + entropy.unsqueeze(-1)), 0)
        result -= (by_entropy / temperature).unsqueeze(-1) * slope
    logits.data.copy_(result)
