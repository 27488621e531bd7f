"""The decoding step of the native engine with settings of each row, and log-probabilities of the likeliest tokens on request."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo.policy.language_model import output_head
from grpo.rollout.decoder import Chunk, Decoder
from grpo.rollout.paged import Places
from grpo.rollout.sampling import KNOBS, draw
from grpo.rollout.slots import Sequence
from grpo.types import Sampling

MOST_TOP_LOGPROBS = 20
"""Alternatives to each token that a request may ask for, as many as OpenAI allows."""


SCORED_AT_ONCE = 512
"""Tokens of a prompt whose logits exist at a time."""


@dataclass(eq=False)
class Served(Sequence):
    """A completion that is being written for a request."""

    sampling: Sampling = field(default_factory=lambda: Sampling(1))
    wants_logprobs: bool = False
    ignores_ends: bool = False  # goes on to its limit, which a benchmark wants
    owner: Any = None  # whose it is; the scheduler only hands it back
    has_ended: bool = False


@dataclass
class ServedChunk(Chunk):
    """Steps with the model's own log-probabilities, at temperature 1, if a row wants them."""

    own_logprobs: Tensor | None = None  # (steps, slots) of the drawn tokens
    top_tokens: Tensor | None = None  # (steps, slots, MOST_TOP_LOGPROBS) the likeliest first
    top_logprobs: Tensor | None = None  # the same shape


class ServingDecoder(Decoder):
    """A Decoder whose rows are `Served`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        num_slots = self.state.shape[1]
        self.knobs = self._zeros(num_slots, len(KNOBS), dtype=torch.float32)
        self.ignores_ends = self._zeros(num_slots, dtype=torch.bool)
        num_top = min(MOST_TOP_LOGPROBS, self.lm.config.get_text_config().vocab_size)
        self.own_logprobs = self._zeros(self.chunk, num_slots, dtype=torch.float32)
        self.top_tokens = self._zeros(self.chunk, num_slots, num_top)
        self.top_logprobs = self._zeros(self.chunk, num_slots, num_top, dtype=torch.float32)
        self.wants_logprobs = False

    def forget(self) -> None:
        """After a failure: no row goes on from the last launch, and no page holds what is no number."""
        self._columns = {}
        self.cache.clear()

    def score(self, prompt: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of a prompt's tokens from the second on, at temperature 1, and of the likeliest tokens there.

        One forward pass over all of it, which keeps nothing: its keys and values go to page 0, which nobody reads.

        Returns:
            logprobs (N - 1,), the likeliest tokens (N - 1, K) and theirs, of N tokens.
        """
        size = len(prompt)
        tokens = self._upload(np.array(prompt))
        places = Places(
            self.cache,
            write=torch.zeros_like(tokens),
            cu_seqlens=self._upload(np.array([0, size])).int(),
            longest=size,
        )
        hidden = self._layers(self.lm, tokens, self._upload(np.arange(size)), places)[:-1]
        head, parts = output_head(self.lm), []
        for states, targets in zip(hidden.split(SCORED_AT_ONCE), tokens[1:].split(SCORED_AT_ONCE), strict=True):
            own = head(states).float()
            own = own - own.logsumexp(-1, keepdim=True)
            top, ids = own.topk(self.top_tokens.shape[2], -1)
            parts.append((own.gather(1, targets.unsqueeze(1)).squeeze(1), ids, top))
        logprobs, ids, top = (torch.cat(each) for each in zip(*parts, strict=True))
        return logprobs, ids, top

    def _stage(self, rows: Listed[Sequence]) -> None:
        super()._stage(list(rows))
        knobs, ignores_ends = np.zeros(self.knobs.shape, np.float32), np.zeros(len(self.ignores_ends), bool)
        knobs[:, KNOBS.index("top_p")] = 1.0
        for column, row in enumerate(rows):
            assert isinstance(row, Served), "a server's rows have settings of their own"
            knobs[column] = [getattr(row.sampling, name) for name in KNOBS]
            ignores_ends[column] = row.ignores_ends
        self.knobs.copy_(self._pinned(knobs), non_blocking=True)
        self.ignores_ends.copy_(self._pinned(ignores_ends), non_blocking=True)

    def decode(self, rows: list[Any]) -> ServedChunk:
        self.truncated = any(row.sampling.truncated for row in rows)
        self.wants_logprobs = any(row.wants_logprobs for row in rows)
        chunk = super().decode(rows)
        assert isinstance(chunk, ServedChunk), "_collect makes it"
        return chunk

    def warm_up(self, num_rows: int) -> None:
        for self.truncated in (False, True):
            super().warm_up(num_rows)

    def _draw(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        size = len(logits)
        drawn, logprobs = draw(logits, self.seeds[:size], positions, self.knobs[:size], truncated=self.truncated)
        if self.wants_logprobs:
            own = logits.float()
            own = own - own.logsumexp(-1, keepdim=True)
            top, tokens = own.topk(self.top_tokens.shape[2], -1)
            taken = own.gather(1, drawn.long().unsqueeze(1)).squeeze(1)
            kept = ((self.own_logprobs, taken), (self.top_tokens, tokens.int()), (self.top_logprobs, top))
            for target, value in kept:
                target[:, :size].index_copy_(0, self.step_number, value.unsqueeze(0))
        return drawn, logprobs

    def _is_end(self, drawn: Tensor) -> Tensor:
        return super()._is_end(drawn) & ~self.ignores_ends[: len(drawn)]

    def _variant(self) -> tuple[bool, ...]:
        return (self.truncated, self.wants_logprobs)

    def _collect(self, rows: list[Sequence], size: int) -> Chunk:
        kept = (self.own_logprobs, self.top_tokens, self.top_logprobs)
        extra = [self._download(each) for each in kept] if self.wants_logprobs else [None] * 3
        chunk = super()._collect(rows, size)  # whose event comes behind all of it
        return ServedChunk(*vars(chunk).values(), *extra)
