"""Groups -> the batch of an optimizer step -> micro-batches of equal size for every process. Pure.

A minibatch is what one optimizer step sees, over all processes; a micro-batch is what one forward pass of one process
holds. Splitting never changes the gradient, because every token's weight follows from the whole minibatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from grpo.types import Batch, Completion, Group, MicroBatch, Packing


def pack(groups: list[Group], advantages: Tensor, *, without_truncated: bool = False) -> Batch:
    """All completions with a known advantage, prompt and completion end to end.

    Args:
        advantages: (P, G); a completion whose advantage is NaN ("can't tell") is left out.
        without_truncated: leave out those that were cut off, too: DAPO's overlong filtering (arXiv 2503.14476, section 3.4).
            They have been in their group's baseline, and are in no count of the loss.
    """
    kept: list[tuple[int, list[int], Completion, float]] = [
        (number, group.prompt.token_ids, completion, advantage)
        for number, (group, row) in enumerate(zip(groups, advantages.tolist(), strict=True))
        for completion, advantage in zip(group.completions, row, strict=True)
        if advantage == advantage and not (without_truncated and completion.finish_reason == "length")
    ]
    lens = [len(prompt) + len(completion.token_ids) for _, prompt, completion, _ in kept]
    return Batch(
        tokens=torch.tensor([t for _, p, c, _ in kept for t in (*p, *c.token_ids)], dtype=torch.long),
        cu_seqlens=_offsets(torch.tensor(lens, dtype=torch.long)),
        prompt_lens=torch.tensor([len(prompt) for _, prompt, _, _ in kept], dtype=torch.long),
        prompt_index=torch.tensor([number for number, _, _, _ in kept], dtype=torch.long),
        advantages=torch.tensor([advantage for _, _, _, advantage in kept], dtype=torch.float32),
        sampling_logprobs=torch.tensor([x for _, _, c, _ in kept for x in _own(c, c.logprobs)], dtype=torch.float32),
        trained=_mask([(len(c.token_ids), c.trained) for _, _, c, _ in kept]),
        fresh=_mask([(len(c.own_ids), _fresh(c)) for _, _, c, _ in kept]),
    )


X = TypeVar("X")


def _own(completion: Completion, values: list[X]) -> list[X]:
    """Of values of each token, those of the trained ones; of what others wrote there are none that mean anything."""
    if completion.trained is None:
        return values
    return [x for x, is_own in zip(values, completion.trained, strict=True) if is_own]


def _fresh(completion: Completion) -> list[bool] | None:
    return None if completion.ages is None else [age == 0 for age in _own(completion, completion.ages)]


def _mask(parts: list[tuple[int, list[bool] | None]]) -> Tensor | None:
    """What holds of so many tokens of each completion, None: of all; None if it holds everywhere."""
    if all(mask is None for _, mask in parts):
        return None
    masks = [[True] * number if mask is None else mask for number, mask in parts]
    return torch.tensor([each for mask in masks for each in mask], dtype=torch.bool)


def share_prompts(batch: Batch) -> Batch:
    """The same sequences, those with equal prompts numbered as completions of one prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    starts, lens = batch.cu_seqlens[:-1].tolist(), batch.prompt_lens.tolist()
    prompts = [tuple(batch.tokens[s : s + n].tolist()) for s, n in zip(starts, lens, strict=True)]
    index = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return replace(batch, prompt_index=torch.tensor(index, dtype=torch.long))


def join(batches: list[Batch]) -> Batch:
    """One batch of several with different prompts, in their order."""
    bounds = _offsets(torch.tensor([len(batch.tokens) for batch in batches]))[:-1].tolist()
    first_prompts = _offsets(torch.tensor([_num_prompts(batch) for batch in batches]))[:-1].tolist()
    starts = [batch.cu_seqlens[:-1] + start for batch, start in zip(batches, bounds, strict=True)]
    return Batch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        cu_seqlens=torch.cat([*starts, torch.tensor([sum(len(batch.tokens) for batch in batches)])]),
        prompt_lens=torch.cat([batch.prompt_lens for batch in batches]),
        prompt_index=torch.cat([b.prompt_index + first for b, first in zip(batches, first_prompts, strict=True)]),
        advantages=torch.cat([batch.advantages for batch in batches]),
        sampling_logprobs=torch.cat([batch.sampling_logprobs for batch in batches]),
        trained=_joined_masks(batches, [batch.trained for batch in batches]),
        fresh=_joined_masks(batches, [batch.fresh for batch in batches]),
    )


def _joined_masks(batches: list[Batch], masks: list[Tensor | None]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    everything = [torch.ones_like(batch.sampling_logprobs, dtype=torch.bool) for batch in batches]
    return torch.cat([each if mask is None else mask for each, mask in zip(everything, masks, strict=True)])


def _num_prompts(batch: Batch | Outline) -> int:
    return int(batch.prompt_index.max()) + 1 if batch.num_sequences else 0


# --- which sequences share a pass -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outline:
    """What decides in which pass sequences are, and what they weigh there: all but their tokens; each (B,)."""

    prompt_lens: Tensor
    completion_lens: Tensor
    trained_lens: Tensor
    prompt_index: Tensor
    advantages: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Outline:
        return cls(batch.prompt_lens, batch.completion_lens, batch.trained_lens, batch.prompt_index, batch.advantages)

    @classmethod
    def joined(cls, outlines: list[Outline]) -> Outline:
        """Of the batch that `join` makes of theirs."""
        firsts = _offsets(torch.tensor([_num_prompts(each) for each in outlines]))[:-1].tolist()
        apart = [replace(each, prompt_index=each.prompt_index + n) for each, n in zip(outlines, firsts, strict=True)]
        return cls(*(torch.cat(parts) for parts in zip(*(vars(each).values() for each in apart), strict=True)))

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_lens)

    def take(self, sequences: list[int]) -> Outline:
        return Outline(*(values[sequences] for values in vars(self).values()))


def plan_passes(
    batch: Batch | Outline, *, token_budget: int, num_processes: int, pair_cost: float = 0.0
) -> list[list[list[int]]]:
    """For each process, the sequences of each of its passes: as few passes as fit the budget, all of about the same size.

    Every process has the same number of passes, because under ZeRO they run them in step; passes that run at the same time are
    the most alike in what they take: a pass of one long sequence takes longer than one of many short ones with as many tokens. A
    pass without sequences is empty. The tokens of a prompt count once in a pass, so completions of the same prompt stay together
    except where a pass is full. A sequence longer than the budget gets a pass of its own.

    Args:
        token_budget: tokens of a pass, which say how much memory it takes.
        pair_cost: what a token and one that it sees take in attention, in the time that a token takes otherwise; see
            `language_model.pair_cost`.
    """
    completion_lens = batch.completion_lens.tolist()
    prompt_lens, prompts = batch.prompt_lens.tolist(), batch.prompt_index.tolist()
    numbered = sorted(range(batch.num_sequences), key=lambda i: (prompts[i], -completion_lens[i]))
    groups = [list(group) for _, group in groupby(numbered, key=lambda i: prompts[i])]
    sizes = [prompt_lens[group[0]] + sum(completion_lens[i] for i in group) for group in groups]
    largest_first = [groups[i] for i in sorted(range(len(groups)), key=lambda i: -sizes[i])]
    too_long_for_two = sum(length > token_budget / 2 for length in completion_lens)
    enough = max(-(-sum(sizes) // (token_budget * num_processes)), -(-too_long_for_two // num_processes))
    enough = min(enough, -(-batch.num_sequences // num_processes))  # where sequences are longer than the budget

    def deal(num_passes: int) -> list[_Pass] | None:
        """That many passes for each process with all sequences, or None if they do not fit."""
        dealer = _Dealer(num_passes * num_processes, share=sum(sizes) / max(num_passes * num_processes, 1))
        fits = all(dealer.deal(group, prompt_lens, completion_lens, token_budget) for group in largest_first)
        return dealer.passes if fits else None

    too_few = enough - 1
    while (passes := deal(enough)) is None:
        too_few, enough = enough, enough + max(enough // 20, 1)
    while enough - too_few > 1:
        between = (too_few + enough) // 2
        fewer = deal(between)
        passes, enough, too_few = (passes, enough, between) if fewer is None else (fewer, between, too_few)
    passes.sort(key=lambda each: -pass_cost(batch, each.sequences, pair_cost=pair_cost))
    return [[each.sequences for each in passes[rank::num_processes]] for rank in range(num_processes)]


def pass_cost(batch: Batch | Outline, sequences: list[int], *, pair_cost: float) -> float:
    """What a pass of these sequences takes, in the time that a token takes but for attention; a prompt's tokens and pairs once.

    A pair is a token and one that it sees, itself among them.
    """
    lens, before = batch.completion_lens[sequences].double(), batch.prompt_lens[sequences].double()
    shared = dict(zip(batch.prompt_index[sequences].tolist(), before.tolist(), strict=True)).values()
    pairs = sum(n * (n + 1) / 2 for n in shared) + float((lens * before + lens * (lens + 1) / 2).sum())
    return sum(shared) + float(lens.sum()) + pair_cost * pairs


@dataclass
class _Pass:
    num_tokens: int = 0
    sequences: list[int] = field(default_factory=list)


class _Dealer:
    """Passes that are being filled.

    Args:
        share: tokens of each if all were equally full.
    """

    def __init__(self, num_passes: int, *, share: float) -> None:
        self.share = share
        self.passes = [_Pass() for _ in range(num_passes)]
        self._by_size = [
            (0, number) for number in range(num_passes)
        ]  # a heap; entries of another size than their pass are old

    def deal(self, group: list[int], prompt_lens: list[int], completion_lens: list[int], token_budget: int) -> bool:
        """Deal completions of a prompt to the emptiest pass until it has its share, then to the next; whether all found room."""
        here: int | None = None
        for i in group:
            size = math.inf if here is None else self.passes[here].num_tokens + completion_lens[i]
            if size > self.share:
                emptiest = self._emptiest()
                moved = self.passes[emptiest].num_tokens + prompt_lens[i] + completion_lens[i]
                if moved < size:
                    here, size = emptiest, moved
            assert here is not None, "a pass was chosen"
            if size > token_budget and self.passes[here].num_tokens:
                return False
            self.passes[here].num_tokens = int(size)
            self.passes[here].sequences.append(i)
            heappush(self._by_size, (int(size), here))
        return True

    def _emptiest(self) -> int:
        while self._by_size[0][0] != self.passes[self._by_size[0][1]].num_tokens:
            heappop(self._by_size)
        return self._by_size[0][1]


# --- what a pass reads ------------------------------------------------------------------------------------------------------


def take(batch: Batch, sequences: list[int]) -> Batch:
    """The given sequences of a batch, in the given order."""
    chosen = torch.tensor(sequences, dtype=torch.long)
    lens, completion_lens, trained_lens = batch.sequence_lens[chosen], batch.completion_lens, batch.trained_lens
    completion_tokens = _spans(_offsets(completion_lens)[chosen], completion_lens[chosen])
    trained_tokens = _spans(_offsets(trained_lens)[chosen], trained_lens[chosen])
    return Batch(
        tokens=batch.tokens[_spans(batch.cu_seqlens[chosen], lens)],
        cu_seqlens=_offsets(lens),
        prompt_lens=batch.prompt_lens[chosen],
        prompt_index=batch.prompt_index[chosen],
        advantages=batch.advantages[chosen],
        sampling_logprobs=batch.sampling_logprobs[trained_tokens],
        trained=None if batch.trained is None else batch.trained[completion_tokens],
        fresh=None if batch.fresh is None else batch.fresh[trained_tokens],
    )


def micro_batch(batch: Batch, weights: Tensor) -> MicroBatch:
    """A batch laid out for one forward pass: all distinct prompts, then all completions. `weights` (T,) are those in the loss.

    Of a completion `x r y` in which r is a tool's, the pass reads all three; its targets are x and y.
    """
    numbers, owner = batch.prompt_index.unique(return_inverse=True)  # owner (B,): which of the distinct prompts
    first = owner.new_full((len(numbers),), batch.num_sequences).scatter_reduce(
        0, owner, torch.arange(batch.num_sequences), "amin"
    )
    prompt_lens, completion_lens = batch.prompt_lens, batch.completion_lens
    starts = batch.cu_seqlens[:-1]
    prompt_starts = _offsets(prompt_lens[first])  # in the pass, as are the following
    completion_starts = _offsets(completion_lens) + prompt_starts[-1]
    targets = batch.tokens[_spans(starts + prompt_lens, completion_lens)]
    source_index = _spans(completion_starts[:-1] - 1, completion_lens)
    begins = _offsets(completion_lens)[:-1][completion_lens > 0]
    source_index[begins] = (prompt_starts[owner + 1] - 1)[
        completion_lens > 0
    ]  # a prompt's last token predicts the first
    own = slice(None) if batch.trained is None else batch.trained
    return MicroBatch(
        tokens=torch.cat([batch.tokens[_spans(starts[first], prompt_lens[first])], targets]),
        position_ids=torch.cat(
            [_spans(torch.zeros_like(first), prompt_lens[first]), _spans(prompt_lens, completion_lens)]
        ),
        packing=_packing(owner, prompt_lens, completion_lens, prompt_starts, completion_starts),
        source_index=source_index[own],
        targets=targets[own],
        advantages=batch.advantages.repeat_interleave(batch.trained_lens),
        weights=weights,
        sampling_logprobs=batch.sampling_logprobs,
        num_sequence_tokens=len(batch.tokens),
        completion_lens=batch.trained_lens,
        trained=batch.trained,
        fresh=batch.fresh,
    )


def _packing(
    owner: Tensor, prompt_lens: Tensor, completion_lens: Tensor, prompt_starts: Tensor, completion_starts: Tensor
) -> Packing:
    """Prompts see themselves; each completion sees its prompt and itself."""
    num_prompts, num_prompt_tokens = len(prompt_starts) - 1, int(prompt_starts[-1])
    num_keys = torch.cat([prompt_starts.diff(), prompt_lens + completion_lens])
    cu_keys = _offsets(num_keys)
    seen_from = cu_keys[num_prompts:-1]  # (B,) where each completion's keys start: first its prompt's, then its own
    seen_starts = torch.stack([prompt_starts[owner], completion_starts[:-1]], 1).flatten()
    seen_lens = torch.stack([prompt_lens, completion_lens], 1).flatten()
    order = owner.argsort(stable=True)
    number = torch.empty_like(owner)  # of a completion among those of its prompt
    number[order] = torch.arange(len(owner)) - _offsets(owner.bincount())[owner[order]]
    shared_keys = torch.full((num_prompt_tokens, int(number.max()) + 1), -1)
    shared_keys[_spans(prompt_starts[owner], prompt_lens), number.repeat_interleave(prompt_lens)] = _spans(
        seen_from, prompt_lens
    )
    cu_queries = torch.cat([prompt_starts, completion_starts[1:]])
    return Packing(
        cu_queries=cu_queries.int(),
        cu_keys=cu_keys.int(),
        longest_query=int(cu_queries.diff().max()),
        longest_key=int(num_keys.max()),
        key_index=torch.cat([torch.arange(num_prompt_tokens), _spans(seen_starts, seen_lens)]),
        own_key=torch.cat([torch.arange(num_prompt_tokens), _spans(seen_from + prompt_lens, completion_lens)]),
        shared_keys=shared_keys,
    )


def empty_micro_batch() -> MicroBatch:
    """One sequence of two tokens and no weight: a process without work runs it to keep in step with the others."""
    one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1)
    batch = Batch(torch.zeros(2, dtype=torch.long), torch.tensor([0, 2]), one, one, zero, zero)
    micro = micro_batch(batch, weights=zero)
    micro.is_spare = True
    return micro


def unpack(micro: MicroBatch) -> Batch:
    """The sequences that a pass was laid out from."""
    packing, trained_lens = micro.packing, micro.completion_lens
    num_prompts = len(packing.cu_keys) - 1 - len(trained_lens)  # runs of their own, before those of the completions
    starts, lens = packing.cu_keys[num_prompts:-1].long(), packing.cu_keys.diff()[num_prompts:].long()
    completion_lens = packing.cu_queries.diff()[num_prompts:].long()
    return Batch(
        tokens=micro.tokens[packing.key_index[_spans(starts, lens)]],
        cu_seqlens=_offsets(lens),
        prompt_lens=lens - completion_lens,
        prompt_index=packing.key_index[starts],  # where in the pass the prompt begins
        advantages=micro.advantages[_offsets(trained_lens)[:-1]],
        sampling_logprobs=micro.sampling_logprobs,
        trained=micro.trained,
        fresh=micro.fresh,
    )


def split(micro: MicroBatch, token_budget: int) -> list[MicroBatch]:
    """The sequences of a pass in smaller ones, with all that is known of their tokens; one within the budget stays as it is."""
    if len(micro.tokens) <= token_budget:
        return [micro]
    batch = unpack(micro)
    starts, parts = _offsets(batch.trained_lens), []
    for sequences in plan_passes(batch, token_budget=token_budget, num_processes=1)[0]:
        chosen = torch.tensor(sequences)
        tokens = _spans(starts[chosen], batch.trained_lens[chosen])
        part = micro_batch(take(batch, sequences), micro.weights[tokens])
        part.advantages = micro.advantages[tokens]
        part.old_logprobs, part.ref_logprobs, part.selected = (
            None if known is None else known.cpu()[tokens]
            for known in (micro.old_logprobs, micro.ref_logprobs, micro.selected)
        )
        parts.append(part)
    return parts


def _offsets(lens: Tensor) -> Tensor:
    return torch.cat([lens.new_zeros(1), lens.cumsum(0)])


def _spans(starts: Tensor, lens: Tensor) -> Tensor:
    """The places `starts[i] ... starts[i] + lens[i] - 1` for each i, one after the other."""
    offsets = _offsets(lens)
    return (starts - offsets[:-1]).repeat_interleave(lens) + torch.arange(int(offsets[-1]))
