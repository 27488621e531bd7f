"""What kernels.py does on CUDA, in plain torch for a CPU: the same functions, with the same arguments and results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lens: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Attention of the newest token of each sequence over its pages.

    What lies in a page beyond a sequence's end is read, and weighs nothing if it is finite; see PagedCache.clear.

    Args:
        q: (B, heads, D).
        keys, values: (pages, kv_heads, PAGE, D).
        block_table: (B, pages of the longest) int32.
        lens: (B,) int32, tokens of each sequence with the newest.

    Returns:
        (B, heads, D).
    """
    longest, (rows, heads, head_dim) = int(lens.max()), q.shape
    num_kv_heads, page = keys.shape[1:3]
    used = block_table[:, : -(-longest // page)].long()
    # by index_select, which is three times as fast as indexing, and head by head, so that a head's pages come to lie end to end
    by_head = (used.unsqueeze(1) * num_kv_heads + torch.arange(num_kv_heads).unsqueeze(1)).flatten()
    k, v = (x.view(-1, page, head_dim).index_select(0, by_head) for x in (keys, values))
    k, v = (x.view(rows, num_kv_heads, -1, head_dim)[:, :, :longest] for x in (k, v))
    age = lens.unsqueeze(1) - 1 - torch.arange(longest)
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    # the query heads of a key head are the rows of one small product
    scores = (q.view(rows, num_kv_heads, -1, head_dim) @ k.transpose(2, 3)).float().mul_(scale)
    weights = scores.masked_fill_(hidden[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ v).view(rows, heads, head_dim)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual + x, and its RMS norm times `weight`; all (B, H)."""
    summed = x if residual is None else residual + x
    return summed, rms_norm(summed, weight.shape, weight, eps)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    *,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Norm the heads (Qwen3), rotate them by their positions, and keep keys and values in the pages; see kernels.py."""
    q, k = (x if weight is None else rms_norm(x, weight.shape, weight, eps) for x, weight in ((q, q_norm), (k, k_norm)))
    q, k = _rotated(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
    page, position = places // keys.shape[2], places % keys.shape[2]
    keys[page, :, position] = k
    values[page, :, position] = v
    return q, k


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos.unsqueeze(1), torch.cat([-second, first], -1), sin.unsqueeze(1))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (B, I)."""
    return silu(gate).mul_(up)
