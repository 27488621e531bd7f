"""Logits -> one token per row and its log-probability, with random numbers that belong to the sequence and not to the batch.

The random number of a token is a hash of its sequence's seed and its position, so what a sequence draws does not depend on which
others are decoded beside it, in which row, or when. The token is found by inverting the cumulative distribution: a change of the
logits by rounding moves the draw only where it falls on a border.

On CUDA `kernels.draw` does this in one pass over the logits; `plain_draw` is the CPU's way and what the kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo.types import Prompt, Sampling

KNOBS = ("temperature", "top_k", "top_p", "min_p")
"""What `knobs` holds, in this order, as float32."""


def knobs_of(sampling: Sampling) -> Tensor:
    """(4,) float32: a captured step reads them from memory, so one graph serves every setting."""
    return torch.tensor([float(getattr(sampling, name)) for name in KNOBS])


def draw(logits: Tensor, seeds: Tensor, positions: Tensor, knobs: Tensor, *, truncated: bool) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: (B, V).
        seeds: (B,) int64, of the row's sequence.
        positions: (B,) int32, of the token to be drawn in its sequence.
        knobs: (4,) float32, see KNOBS, for all rows, or (B, 4), of each; temperature 0 takes the likeliest token.
        truncated: whether top_k, top_p or min_p leave anything out, of any row; else they are not looked at.

    Returns:
        tokens (B,) int32 and their log-probabilities (B,) float32 under softmax(logits / temperature) over the whole vocabulary;
        any token, with a log-probability that is not finite, where the logits are not numbers.
    """
    if logits.is_cuda:
        from grpo.rollout.kernels import draw as kernel

        return kernel(logits, seeds, positions, knobs, truncated=truncated)
    return plain_draw(logits, seeds, positions, knobs, truncated=truncated)


def plain_draw(
    logits: Tensor, seeds: Tensor, positions: Tensor, knobs: Tensor, *, truncated: bool
) -> tuple[Tensor, Tensor]:
    """`draw` in plain torch."""
    temperature = knobs[..., 0]
    logits = logits.float() / temperature.where(temperature > 0, 1.0).unsqueeze(-1)
    kept = logits.where(_allowed(logits, knobs), float("-inf")) if truncated else logits
    cumulative = (kept - kept.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    target = uniform(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)
    tokens = drawn.where(temperature > 0, logits.argmax(-1))
    return tokens.int(), logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def _allowed(logits: Tensor, knobs: Tensor) -> Tensor:
    """(B, V) which tokens top-k, top-p and min-p leave."""
    size = logits.shape[1]
    _, top_k, top_p, min_p = knobs.expand(len(logits), -1).unsqueeze(2).unbind(1)  # (B, 1) each
    ordered = logits.sort(-1, descending=True).values
    kept = top_k.where(top_k > 0, size).long().clamp_max(size)
    floor = ordered.gather(1, kept - 1)
    weights = (ordered - ordered[:, :1]).exp().where(ordered >= floor, 0.0).double()
    before = weights.cumsum(-1) - weights
    last = (before < top_p.double() * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True) - 1
    last = last.clamp_min(0)  # none where the logits are not numbers
    floor = floor.maximum(ordered.gather(1, last)).maximum(ordered[:, :1] + min_p.log())
    # a row that draws from everything does so beside others that do not, too
    truncates = (top_k > 0) | (top_p < 1) | (min_p > 0)
    return logits >= floor.where(truncates, float("-inf"))


GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def mix(state: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood 2014): int64 -> int64, multiplication modulo 2^64."""
    for shift, factor in zip((30, 27), MIX, strict=True):
        state = (state ^ _shifted(state, shift)) * factor
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, shift: int) -> Tensor:
    """Right shift as of an unsigned number."""
    return (state >> shift) & (2 ** (64 - shift) - 1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """(B,) float64 in [0, 1): the random number of each position of each sequence."""
    return _shifted(mix(seeds + (positions.long() + 1) * GOLDEN), 11).double() * 2.0**-53


def sequence_seeds(seed: int, num_sequences: int) -> Tensor:
    """(num_sequences,) int64: a seed for each sequence of a rollout."""
    return numbered_seeds([seed] * num_sequences, range(num_sequences))


def numbered_seeds(seeds: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """(len(seeds),) int64: of each sequence, by a seed and its number among the sequences that have it."""
    starts = mix(torch.tensor(seeds, dtype=torch.int64) * GOLDEN)
    return mix(starts + (torch.tensor(numbers, dtype=torch.int64) + 1) * GOLDEN)


def completion_seeds(prompts: list[Prompt], *, seed: int, num_completions: int) -> Tensor:
    """(len(prompts) * num_completions,) int64: of each completion; by the prompt's own seed where it has one, else by `seed`."""
    seeds = sequence_seeds(seed, len(prompts) * num_completions).view(len(prompts), num_completions)
    for own, prompt in zip(seeds, prompts, strict=True):
        if prompt.seed is not None:
            own.copy_(sequence_seeds(prompt.seed, num_completions))
    return seeds.flatten()
