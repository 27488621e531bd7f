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


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """residual + x, and its RMS norm times `weight`; all (B, H).

    Args:
        scales: (B,) what the rows of x are to be multiplied by first.
    """
    x = _scaled(x, scales)
    summed = x if residual is None else residual + x
    return summed, rms_norm(summed, weight.shape, weight, eps)


def add_rms_norm_fp8(
    x: Tensor, scales: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` with its norm rounded to 8 bits: the sum (B, H), and what `round_rows` gives."""
    summed, normed = add_rms_norm(x, residual, weight, eps, scales=scales)
    return summed, *round_rows(normed)


def _scaled(x: Tensor, scales: Tensor | None) -> Tensor:
    return x if scales is None else (x.float() * scales.unsqueeze(1)).to(x.dtype)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (B, K) divided by a scale, in 8 bits, and the scales: (B, K) float8_e4m3fn and (B,) float32."""
    scales = x.abs().amax(1).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scales.unsqueeze(1)).to(torch.float8_e4m3fn), scales


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
    scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm the heads (Qwen3), rotate them by their positions, and keep keys and values in the pages; see kernels.py."""
    if scales is not None:
        q, k, v = _with_scales(q, k, v, scales, bias)
    q, k = (x if weight is None else rms_norm(x, weight.shape, weight, eps) for x, weight in ((q, q_norm), (k, k_norm)))
    q, k = _rotated(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
    page, position = places // keys.shape[2], places % keys.shape[2]
    keys[page, :, position] = k
    values[page, :, position] = v
    return q, k


def _with_scales(q: Tensor, k: Tensor, v: Tensor, scales: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Each times its row's scale, and the bias added; values in place, since attention reads them, too."""
    sizes = [x[0].numel() for x in (q, k, v)]
    biases = [None] * 3 if bias is None else bias.split(sizes)
    done = []
    for x, own in zip((q, k, v), biases, strict=True):
        wide = x.float() * scales[:, None, None]
        done.append((wide if own is None else wide + own.view(x.shape[1:]).float()).to(x.dtype))
    done[2] = v.copy_(done[2])
    return done


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos.unsqueeze(1), torch.cat([-second, first], -1), sin.unsqueeze(1))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (B, I)."""
    return silu(gate).mul_(up)


def silu_mul_fp8(gate: Tensor, up: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul` of gate and up times their rows' scales (B,), and what `round_rows` gives of it."""
    return round_rows(silu_mul(_scaled(gate, scales), _scaled(up, scales)))
