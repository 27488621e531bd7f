"""Groups -> one packed batch -> minibatches -> micro-batches under a token budget. Pure.

A minibatch is what one optimizer step sees, over all processes; a micro-batch is what one forward pass of one process
holds. Splitting never changes the gradient, because every token's weight is fixed before the split.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grpo.types import Batch, Completion, Group, Prompt


def pack(groups: list[Group], advantages: Tensor) -> Batch:
    """All completions with a known advantage, prompt and completion end to end.

    Args:
        advantages: (P, G); a completion whose advantage is NaN ("can't tell") is left out.
    """
    kept = [
        (group.prompt, completion, advantage)
        for group, row in zip(groups, advantages.tolist(), strict=True)
        for completion, advantage in zip(group.completions, row, strict=True)
        if advantage == advantage
    ]
    return _build(kept)


def _build(sequences: list[tuple[Prompt, Completion, float]]) -> Batch:
    lens = [len(prompt.token_ids) + len(completion.token_ids) for prompt, completion, _ in sequences]
    return Batch(
        tokens=torch.tensor([t for p, c, _ in sequences for t in (*p.token_ids, *c.token_ids)], dtype=torch.long),
        cu_seqlens=torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        prompt_lens=torch.tensor([len(prompt.token_ids) for prompt, _, _ in sequences], dtype=torch.long),
        advantages=torch.tensor([advantage for _, _, advantage in sequences], dtype=torch.float32),
        sampling_logprobs=torch.tensor([x for _, c, _ in sequences for x in c.logprobs], dtype=torch.float32),
    )


def minibatch_bounds(*, num_prompts: int, num_minibatches: int, rank: int, world_size: int) -> list[slice]:
    """Which of this process's groups belong to each minibatch.

    The questions of a step are dealt out like cards: process r has questions r, r + world_size, ... A minibatch is a run
    of consecutive questions, so it holds the same questions however many processes there are.
    """
    size = num_prompts // num_minibatches
    edges = [len(range(rank, m * size, world_size)) for m in range(num_minibatches + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def take(batch: Batch, sequences: list[int]) -> Batch:
    """The given sequences of a batch, in the given order."""
    chosen = torch.tensor(sequences, dtype=torch.long)
    tokens = _ranges(batch.cu_seqlens.long(), chosen)
    completion_tokens = _ranges(_offsets(batch.completion_lens), chosen)
    fields: dict[str, Tensor | None] = {name: getattr(batch, name) for name in Batch.PER_TOKEN}
    per_token: dict[str, Any] = {k: v if v is None else v[completion_tokens] for k, v in fields.items()}
    return Batch(
        tokens=batch.tokens[tokens],
        cu_seqlens=_offsets(batch.sequence_lens[chosen]).int(),
        prompt_lens=batch.prompt_lens[chosen],
        advantages=batch.advantages[chosen],
        **per_token,
    )


def _offsets(lens: Tensor) -> Tensor:
    return torch.cat([lens.new_zeros(1), lens.cumsum(0)])


def _ranges(offsets: Tensor, chosen: Tensor) -> Tensor:
    """The places `offsets[i] ... offsets[i + 1] - 1` for each chosen i, one after the other."""
    if not len(chosen):
        return chosen
    starts, ends = offsets[chosen].tolist(), offsets[chosen + 1].tolist()
    return torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])


def plan_micro_batches(batch: Batch, token_budget: int) -> list[list[int]]:
    """Which sequences share a forward pass: first-fit decreasing, so few passes, each nearly full.

    A sequence longer than the budget gets a pass of its own.
    """
    lens = batch.sequence_lens.tolist()
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lens)), key=lambda i: -lens[i]):
        fitting = next((b for b, free in enumerate(room) if free >= lens[i]), None)
        if fitting is None:
            bins.append([])
            room.append(token_budget)
            fitting = len(bins) - 1
        bins[fitting].append(i)
        room[fitting] -= lens[i]
    return bins


def spare(batch: Batch) -> Batch:
    """One sequence of two tokens and no weight, with the same fields as `batch`.

    Under ZeRO every process must run the same number of passes; those with less work run this instead.
    """
    zero = torch.zeros(1)
    per_token: dict[str, Any] = {k: None if getattr(batch, k) is None else zero for k in Batch.PER_TOKEN}
    return Batch(
        tokens=torch.zeros(2, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        prompt_lens=torch.ones(1, dtype=torch.long),
        advantages=zero,
        **per_token,
    )


def with_per_token(batch: Batch, plan: list[list[int]], parts: list[Tensor]) -> Tensor:
    """Put per-token results of the micro-batches of `plan` back into the order of `batch`; (T,)."""
    result = torch.zeros(int(batch.completion_lens.sum()))
    offsets = _offsets(batch.completion_lens)
    for sequences, values in zip(plan, parts, strict=True):
        result[_ranges(offsets, torch.tensor(sequences, dtype=torch.long))] = values.cpu()
    return result
