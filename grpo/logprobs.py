"""Hidden states -> log-probabilities and entropy of the completion tokens, chunked over tokens.

A float32 `(T, V)` tensor of logits would be the peak of a step's memory (16k tokens of a 152k vocabulary are 10 GB, and
the backward pass wants it twice more), so logits exist for `chunk_tokens` tokens at a time and are computed again in the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of the distribution it was drawn from.

        logprob_t = log softmax(head(hidden_t) / temperature)[target_t]
        entropy_t = - sum_v p_v log p_v,  p = softmax(head(hidden_t) / temperature)      (no gradient)

    Args:
        hidden: (T, H), the state that predicts each target, i.e. of the token before it.
        targets: (T,) token ids.
        head: (N, H) -> (N, V) logits.

    Returns:
        logprobs (T,) and entropy (T,) in nats, both float32.
    """
    parts = []
    for h, y in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, h, y, head, temperature, use_reentrant=False))
        else:
            parts.append(_chunk(h, y, head, temperature))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normalizer
    with torch.no_grad():
        probabilities = (logits - normalizer.unsqueeze(-1)).exp()
        entropy = normalizer - (probabilities * logits).sum(-1)
    return logprobs, entropy
