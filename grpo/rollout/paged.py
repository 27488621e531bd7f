"""Keys and values in pages, and attention over them, registered with transformers under the name `paged`.

A page holds PAGE positions of one sequence in every layer; a sequence's row of the block table lists its pages in order. The
pages of a prompt are listed by all of its completions, so a prompt is read once per group, and a completion takes memory only
for what it has written. Page 0 belongs to nobody: rows of a step that have no sequence write there.

One forward pass does one of two things, told apart by the `Places` that travel through the model as a keyword argument:

    prefill   (1, N) tokens of whole prompts end to end; attention among themselves; keys and values are kept
    go on     the same of tokens that follow others, whose keys and values are in the pages already; attention to these, too
    decode    (1, B) tokens, the last one of each of B sequences; attention over the pages
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from grpo.policy.attention import check_arguments, varlen_attention
from grpo.rollout import plain_kernels
from grpo.system.mapped_memory import MappedMemory

PAGE = 64
"""Positions in a page. On average half a page per completion stays empty; smaller pages cost more lookups."""

COPIED_PAGES = 32
"""Pages copied at once: a quarter of a GiB for the widest models that fit a GPU."""


def num_pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE)


class PagedCache:
    """Keys and values of `num_pages` pages; each `(layers, pages, kv_heads, PAGE, head_dim)`.

    Args:
        can_release: let `release` give their memory back; on a GPU.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        can_release: bool = False,
    ) -> None:
        shape = (2, num_layers, num_pages, num_kv_heads, PAGE, head_dim)
        self.memory: MappedMemory | None = None
        if can_release:
            self.memory = MappedMemory(math.prod(shape) * dtype.itemsize, device)
            both = self.memory.tensor().view(dtype).view(shape)
            self.keys, self.values = both[0], both[1]
        else:
            self.keys, self.values = (_zeros(shape[1:], dtype, device) for _ in range(2))

    @staticmethod
    def bytes_per_page(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * PAGE * head_dim * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def release(self) -> None:
        """Give the memory back, if it can be. Until `take` nobody may read or write a page."""
        if self.memory is not None:
            self.memory.release()

    def take(self) -> None:
        """Have memory for all pages, at the addresses that they have had; where it had been released, they are zeros.

        Raises:
            torch.OutOfMemoryError: others have it.
        """
        if self.memory is not None:
            self.memory.take()

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy pages in every layer; both (N,) page numbers. Some at a time: what is read exists twice while it is written."""
        for source, target in zip(sources.split(COPIED_PAGES), targets.split(COPIED_PAGES), strict=True):
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]

    def clear(self) -> None:
        """Forget what the pages hold: where weights broke it is no number, and would spoil whoever writes there next."""
        self.keys.zero_()
        self.values.zero_()

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values, (N, kv_heads, head_dim), at `places` (N,): page * PAGE + position in the page."""
        page, position = places // PAGE, places % PAGE
        self.keys[layer][page, :, position] = keys
        self.values[layer][page, :, position] = values

    def read(self, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, (N, kv_heads, head_dim), that are kept at `places` (N,)."""
        page, position = places // PAGE, places % PAGE
        return self.keys[layer][page, :, position], self.values[layer][page, :, position]


@dataclass
class Kept:
    """The keys of sequences of which the last tokens are being read."""

    places: Tensor  # (K,) int64, page * PAGE + position in the page
    cu_seqlens: Tensor  # (sequences + 1,) int32
    longest: int


@dataclass
class Places:
    """Where the tokens of one forward pass keep their keys and values, and what they attend to."""

    cache: PagedCache
    write: Tensor  # (N,) int64, page * PAGE + position in the page
    cu_seqlens: Tensor | None = None  # prefill: (sequences + 1,) int32
    longest: int = 0  # prefill: tokens of the longest sequence
    kept: Kept | None = None  # prefill that goes on: all that the tokens see, themselves included
    block_table: Tensor | None = None  # decode: (B, pages) int32
    lens: Tensor | None = None  # decode: (B,) int32, tokens of each sequence with the one that is being read


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, which on a CPU writes all of it: there the kernel gives a page of memory when it is first used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    places: Places,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query `(1, heads, N, D)`, key and value `(1, kv_heads, N, D)`; see `Places`."""
    check_arguments(module, others)
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    places.cache.write(layer, places.write, k, v)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q, k, v, places, layer, scale=scale, window=sliding_window).unsqueeze(0), None


AttentionInterface.register("paged", paged_attention)


def attend(q: Tensor, k: Tensor, v: Tensor, places: Places, layer: int, *, scale: float, window: int | None) -> Tensor:
    """Attention of tokens whose keys and values have been written; q (N, heads, D), k and v (N, kv_heads, D)."""
    if places.cu_seqlens is not None:
        bounds, longest, kept = places.cu_seqlens, places.longest, places.kept
        if kept is not None:
            k, v = places.cache.read(layer, kept.places)
            return varlen_attention(q, k, v, bounds, kept.cu_seqlens, longest, kept.longest, scale=scale, window=window)
        return varlen_attention(q, k, v, bounds, bounds, longest, longest, scale=scale, window=window)
    assert places.block_table is not None, "a decoding step has a block table"
    assert places.lens is not None, "a decoding step has lengths"
    keys, values = places.cache.keys[layer], places.cache.values[layer]
    attention = kernels_for(q).decode_attention
    return attention(q, keys, values, places.block_table, places.lens, scale=scale, window=window)


def kernels_for(tensor: Tensor) -> Any:
    """The module of kernels for a tensor's device."""
    if tensor.is_cuda:
        from grpo.rollout import kernels  # which needs Triton

        return kernels
    return plain_kernels
