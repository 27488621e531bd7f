"""Triton kernels of a decoding step. Each has a plain counterpart that it is tested against, named in its docstring.

A step of a small model is bound by the number of kernels and by memory, not by arithmetic, so each kernel here does what would
otherwise be several passes over the same few numbers.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- attention over pages ---------------------------------------------------------------------------------------------------


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lens: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """`plain_kernels.decode_attention`; with few sequences, several programs share one and a second kernel joins their parts."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page = keys.shape[1:3]
    group = num_heads // num_kv_heads
    splits = num_splits(num_rows * num_kv_heads, block_table.shape[1], q.device)
    out = torch.empty_like(q)
    parts = q.new_empty((num_rows, num_heads, splits, head_dim), dtype=torch.float32) if splits > 1 else out
    stats = q.new_empty((num_rows, num_heads, splits, 2), dtype=torch.float32) if splits > 1 else out
    block_d = triton.next_power_of_2(head_dim)
    _decode_attention[(num_rows, num_kv_heads, splits)](
        q,
        keys,
        values,
        block_table,
        lens,
        out,
        parts,
        stats,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        window or 2**30,
        num_kv_heads,
        GROUP=group,
        GROUP_ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        PAGE=page,
        SPLITS=splits,
        PRECISION="ieee",  # of float32; 16-bit products are exact anyway
        num_warps=4 if block_d <= 128 else 8,
        num_stages=3 if block_d <= 128 else 2,
    )
    if splits > 1:
        _join_splits[(num_rows, num_heads)](
            parts, stats, out, HEAD_DIM=head_dim, BLOCK_D=block_d, SPLITS=splits, num_warps=1
        )
    return out


@cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


PROGRAMS_PER_PROCESSOR = 4
"""Attention programs that a multiprocessor should have, so that its memory requests overlap."""


def num_splits(num_programs: int, num_pages: int, device: torch.device) -> int:
    """Into how many parts to cut each sequence: a power of two, so few kernels are compiled."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // max(num_programs, 1)
    return min(triton.next_power_of_2(wanted + 1) // 2, triton.next_power_of_2(num_pages), 16) if wanted > 1 else 1


@triton.jit
def _decode_attention(
    q_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    parts_ptr,
    stats_ptr,
    scale,
    q_row_stride,
    q_head_stride,
    table_stride,
    window,
    num_kv_heads,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the query heads of one key-value head of one sequence, over one part of its pages."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens_ptr + row)
    oldest = tl.maximum(length - window, 0)
    first_page = oldest // PAGE
    end_page = tl.cdiv(length, PAGE)
    pages_each = tl.cdiv(end_page - first_page, SPLITS)
    start = first_page + split * pages_each
    stop = tl.minimum(start + pages_each, end_page)

    heads = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, BLOCK_D)
    within = tl.arange(0, PAGE)
    head_ok = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = row * q_row_stride + (kv_head * GROUP + heads)[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=head_ok, other=0.0)

    top = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, BLOCK_D], tl.float32)
    tile = within[:, None] * HEAD_DIM + dims[None, :]
    dim_ok = (dims < HEAD_DIM)[None, :]
    for number in tl.range(start, stop):
        page = tl.load(table_ptr + row * table_stride + number).to(tl.int64)
        base = (page * num_kv_heads + kv_head) * (PAGE * HEAD_DIM)
        place = number * PAGE + within
        seen = (place < length) & (place >= oldest)
        keys = tl.load(key_ptr + base + tile, mask=dim_ok, other=0.0)
        values = tl.load(value_ptr + base + tile, mask=seen[:, None] & dim_ok, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        faded = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * faded + tl.sum(weights, 1)
        acc = acc * faded[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        top = new_top

    head = kv_head * GROUP + heads
    if SPLITS == 1:
        out_offsets = (row * num_kv_heads * GROUP + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_offsets, acc / total[:, None], mask=head_ok)
    else:
        part = (row * num_kv_heads * GROUP + head) * SPLITS + split
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=head_ok)
        tl.store(stats_ptr + part * 2, top, mask=heads < GROUP)
        tl.store(stats_ptr + part * 2 + 1, total, mask=heads < GROUP)


@triton.jit
def _join_splits(parts_ptr, stats_ptr, out_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Weighted mean of the parts of one head of one sequence; an empty part has a maximum of -inf."""
    head = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    parts = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    ok = dims < HEAD_DIM
    top = tl.load(stats_ptr + (head * SPLITS + parts) * 2)
    total = tl.load(stats_ptr + (head * SPLITS + parts) * 2 + 1)
    weight = tl.exp2(top - tl.max(top, 0))
    acc = tl.load(parts_ptr + (head * SPLITS + parts)[:, None] * HEAD_DIM + dims[None, :], mask=ok[None, :], other=0.0)
    joined = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + head * HEAD_DIM + dims, joined, mask=ok)


# --- the layers' small parts ------------------------------------------------------------------------------------------------


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """residual + x, and its RMS norm times `weight`; all (B, H). Counterpart: transformers' RMSNorm modules.

    Args:
        scales: (B,) what the rows of x are to be multiplied by first.
    """
    normed = torch.empty_like(x)
    return _norm(x, scales, residual, weight, eps, normed, None), normed


def add_rms_norm_fp8(
    x: Tensor, scales: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_kernels.add_rms_norm_fp8`."""
    values, own = _rounded_like(x, x.shape[1])
    return _norm(x, scales, residual, weight, eps, values, own), values, own


def _norm(
    x: Tensor,
    scales: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    own: Tensor | None,
) -> Tensor:
    summed = torch.empty_like(x)
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    _add_rms_norm[(len(x),)](
        x,
        x if residual is None else residual,
        x if scales is None else scales,
        weight,
        summed,
        out,
        out if own is None else own,
        eps,
        SIZE=size,
        BLOCK=block,
        ADD=residual is not None,
        SCALED=scales is not None,
        ROUND=own is not None,
        num_warps=min(max(block // 256, 1), 16),
    )
    return summed


@triton.jit
def _add_rms_norm(
    x_ptr,
    residual_ptr,
    scales_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    out_scales_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    ROUND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    ok = columns < SIZE
    x = tl.load(x_ptr + row * SIZE + columns, mask=ok, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * tl.load(scales_ptr + row)).to(x.dtype)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row * SIZE + columns, mask=ok, other=0.0)).to(x.dtype)
    tl.store(sum_ptr + row * SIZE + columns, x, mask=ok)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)).to(x.dtype)
    normed *= tl.load(weight_ptr + columns, mask=ok, other=0.0)
    if ROUND:
        _store_rounded(normed.to(tl.float32), out_ptr, out_scales_ptr, row, columns, ok, SIZE)
    else:
        tl.store(out_ptr + row * SIZE + columns, normed, mask=ok)


# --- rows in 8 bits ---------------------------------------------------------------------------------------------------------


@triton.jit
def _store_rounded(x, out_ptr, scales_ptr, row, columns, ok, SIZE: tl.constexpr):
    """A row of float32 as float8 whose largest number is the largest there is, and its scale."""
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
    tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + row * SIZE + columns, (x / scale).to(tl.float8e4nv), mask=ok)


def _rounded_like(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Room for the rows of x in 8 bits, and for their scales."""
    return (
        torch.empty((len(x), size), dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(len(x), dtype=torch.float32, device=x.device),
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_kernels.round_rows`."""
    values, scales = _rounded_like(x, x.shape[1])
    block = triton.next_power_of_2(x.shape[1])
    _round_rows[(len(x),)](
        x, values, scales, x.stride(0), SIZE=x.shape[1], BLOCK=block, num_warps=min(max(block // 256, 1), 16)
    )
    return values, scales


@triton.jit
def _round_rows(x_ptr, out_ptr, scales_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    ok = columns < SIZE
    x = tl.load(x_ptr + row * stride + columns, mask=ok, other=0.0).to(tl.float32)
    _store_rounded(x, out_ptr, scales_ptr, row, columns, ok, SIZE)


def silu_mul_fp8(gate: Tensor, up: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_kernels.silu_mul_fp8`; the arguments may be columns of one wider tensor."""
    size = gate.shape[1]
    values, own = _rounded_like(gate, size)
    block = triton.next_power_of_2(size)
    _silu_mul_fp8[(len(gate),)](
        gate,
        up,
        scales,
        values,
        own,
        gate.stride(0),
        up.stride(0),
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 32),
    )
    return values, own


@triton.jit
def _silu_mul_fp8(
    gate_ptr,
    up_ptr,
    scales_ptr,
    out_ptr,
    out_scales_ptr,
    gate_stride,
    up_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    ok = columns < SIZE
    scale = tl.load(scales_ptr + row)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=ok, other=0.0).to(tl.float32) * scale
    up = tl.load(up_ptr + row * up_stride + columns, mask=ok, other=0.0).to(tl.float32) * scale
    _store_rounded(gate * tl.sigmoid(gate) * up, out_ptr, out_scales_ptr, row, columns, ok, SIZE)


# --- keys and values --------------------------------------------------------------------------------------------------------


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
    """Norm the heads (Qwen3), rotate them by their positions, and keep keys and values in the pages.

    Args:
        q: (N, heads, D); k, v: (N, kv_heads, D); cos, sin: (N, D).
        q_norm, k_norm: (D,) weights of an RMS norm over each head, or None.
        keys, values: (pages, kv_heads, PAGE, D), written at `places` (N,): page * PAGE + position in the page.
        scales: (N,) float32, what the rows of q, k and v are to be multiplied by before all this; then v is changed in place.
        bias: of q, k and v end to end, added behind `scales`; not without these.

    Returns:
        Rotated queries (N, heads, D) and keys (N, kv_heads, D). Counterpart: transformers' apply_rotary_pos_emb and
        PagedCache.write.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape)
    _rotate_and_store[(num_rows,)](
        q,
        k,
        v,
        cos,
        sin,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        q_out,
        k_out,
        keys,
        values,
        places,
        q if scales is None else scales,
        q if bias is None else bias,
        eps,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        cos.stride(0),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_KV=triton.next_power_of_2(num_kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        PAGE=keys.shape[2],
        NORM=q_norm is not None,
        SCALED=scales is not None,
        BIASED=bias is not None,
        num_warps=2 if num_heads * head_dim <= 2048 else 4,
    )
    return q_out, k_out


@triton.jit
def _rotate_and_store(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_out_ptr,
    k_out_ptr,
    key_ptr,
    value_ptr,
    place_ptr,
    scales_ptr,
    bias_ptr,
    eps,
    q_stride,
    k_stride,
    v_stride,
    cos_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One program: all heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales_ptr + row) if SCALED else 1.0
    half = tl.arange(0, BLOCK_HALF)
    heads = tl.arange(0, BLOCK_HEADS)
    tile = heads[:, None] * HEAD_DIM + half[None, :]
    ok = (heads < HEADS)[:, None] & (half < HEAD_DIM // 2)[None, :]
    low, high = _halves(q_ptr + row * q_stride + tile, bias_ptr + tile, scale, ok, HEAD_DIM, SCALED, BIASED)
    low, high = _rotated(low, high, q_norm_ptr, cos_ptr, sin_ptr, row * cos_stride, eps, half, HEAD_DIM, NORM)
    out = q_out_ptr + row * HEADS * HEAD_DIM + tile
    tl.store(out, low, mask=ok)
    tl.store(out + HEAD_DIM // 2, high, mask=ok)

    kv_heads = tl.arange(0, BLOCK_KV)
    tile = kv_heads[:, None] * HEAD_DIM + half[None, :]
    ok = (kv_heads < KV_HEADS)[:, None] & (half < HEAD_DIM // 2)[None, :]
    place = tl.load(place_ptr + row)
    kept = ((place // PAGE * KV_HEADS + kv_heads) * PAGE + place % PAGE)[:, None] * HEAD_DIM + half[None, :]
    bias_ptr += HEADS * HEAD_DIM
    low, high = _halves(k_ptr + row * k_stride + tile, bias_ptr + tile, scale, ok, HEAD_DIM, SCALED, BIASED)
    low, high = _rotated(low, high, k_norm_ptr, cos_ptr, sin_ptr, row * cos_stride, eps, half, HEAD_DIM, NORM)
    out = k_out_ptr + row * KV_HEADS * HEAD_DIM + tile
    tl.store(out, low, mask=ok)
    tl.store(out + HEAD_DIM // 2, high, mask=ok)
    tl.store(key_ptr + kept, low, mask=ok)
    tl.store(key_ptr + kept + HEAD_DIM // 2, high, mask=ok)
    value = v_ptr + row * v_stride + tile
    bias_ptr += KV_HEADS * HEAD_DIM
    low, high = _halves(value, bias_ptr + tile, scale, ok, HEAD_DIM, SCALED, BIASED)
    tl.store(value_ptr + kept, low, mask=ok)
    tl.store(value_ptr + kept + HEAD_DIM // 2, high, mask=ok)
    if SCALED:
        tl.store(value, low, mask=ok)
        tl.store(value + HEAD_DIM // 2, high, mask=ok)


@triton.jit
def _halves(x_ptr, bias_ptr, scale, ok, HEAD_DIM: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """Both halves of some heads, times their row's scale and with their bias."""
    low = tl.load(x_ptr, mask=ok, other=0.0)
    high = tl.load(x_ptr + HEAD_DIM // 2, mask=ok, other=0.0)
    if SCALED:
        dtype = low.dtype
        a, b = low.to(tl.float32) * scale, high.to(tl.float32) * scale
        if BIASED:
            a += tl.load(bias_ptr, mask=ok, other=0.0)
            b += tl.load(bias_ptr + HEAD_DIM // 2, mask=ok, other=0.0)
        low, high = a.to(dtype), b.to(dtype)
    return low, high


@triton.jit
def _rotated(low, high, norm_ptr, cos_ptr, sin_ptr, angle, eps, half, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """Both halves of some heads, normed and rotated."""
    dtype = low.dtype
    inside = half < HEAD_DIM // 2
    a, b = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        a = (a * scale).to(dtype) * tl.load(norm_ptr + half, mask=inside, other=0.0)[None, :]
        b = (b * scale).to(dtype) * tl.load(norm_ptr + HEAD_DIM // 2 + half, mask=inside, other=0.0)[None, :]
    cos_low = tl.load(cos_ptr + angle + half, mask=inside, other=0.0)[None, :]
    cos_high = tl.load(cos_ptr + angle + HEAD_DIM // 2 + half, mask=inside, other=0.0)[None, :]
    sin_low = tl.load(sin_ptr + angle + half, mask=inside, other=0.0)[None, :]
    sin_high = tl.load(sin_ptr + angle + HEAD_DIM // 2 + half, mask=inside, other=0.0)[None, :]
    a, b = a.to(tl.float32), b.to(tl.float32)
    return (a * cos_low - b * sin_low).to(dtype), (b * cos_high + a * sin_high).to(dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (B, I); the arguments may be columns of one wider tensor. Counterpart: a gated MLP's own activation."""
    out = torch.empty((len(gate), gate.shape[1]), dtype=gate.dtype, device=gate.device)
    block = 1024
    grid = (len(gate), triton.cdiv(gate.shape[1], block))
    _silu_mul[grid](gate, up, out, gate.stride(0), up.stride(0), SIZE=gate.shape[1], BLOCK=block, num_warps=4)
    return out


@triton.jit
def _silu_mul(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < SIZE
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=ok, other=0.0)
    up = tl.load(up_ptr + row * up_stride + columns, mask=ok, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, mask=ok)


# --- drawing a token --------------------------------------------------------------------------------------------------------

BLOCK = 4096
"""Logits that one program reads."""


def draw(logits: Tensor, seeds: Tensor, positions: Tensor, knobs: Tensor, *, truncated: bool) -> tuple[Tensor, Tensor]:
    """`drawing.plain_draw` in one pass over the logits, and one over the chosen block of them.

    First the maximum and the sum of exponentials of each block of a row; then a block is drawn by its share, and a token within
    it. Truncation adds nine passes over bfloat16 logits, whatever its limits: two searches for the lowest logit kept, each of
    four passes that narrow it to a 16th, and the mass that the first one leaves.
    """
    num_rows, size = logits.shape
    num_blocks = triton.cdiv(size, BLOCK)
    floor = _floor(logits, knobs) if truncated else logits
    stats = logits.new_empty((3, num_rows, num_blocks), dtype=torch.float32)
    _block_stats[(num_rows, num_blocks)](
        logits,
        floor,
        knobs,
        stats,
        logits.stride(0),
        num_rows * num_blocks,
        SIZE=size,
        BLOCK=BLOCK,
        KNOBS=row_of_knobs(knobs),
        TRUNCATED=truncated,
    )
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _pick[(num_rows,)](
        logits,
        floor,
        knobs,
        stats,
        seeds,
        positions,
        tokens,
        logprobs,
        logits.stride(0),
        num_rows * num_blocks,
        num_blocks,
        SIZE=size,
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(num_blocks),
        KNOBS=row_of_knobs(knobs),
        TRUNCATED=truncated,
        num_warps=8,
    )
    return tokens, logprobs


def row_of_knobs(knobs: Tensor) -> int:
    """How far apart the knobs of two rows are: all rows have the same ones, or each its own."""
    return 0 if knobs.dim() == 1 else knobs.stride(0)


@triton.jit
def _scaled(x, temperature):
    """Logits over the temperature; as they are for greedy decoding."""
    return x.to(tl.float32) / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def _block_stats(
    logits_ptr,
    floor_ptr,
    knobs_ptr,
    stats_ptr,
    stride,
    plane,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOBS: tl.constexpr,
    TRUNCATED: tl.constexpr,
):
    """Of one block of one row: its maximum, the sum of exp(x - maximum), and that sum over what may be drawn."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits_ptr + row * stride + columns, mask=columns < SIZE, other=float("-inf"))
    x = _scaled(raw, tl.load(knobs_ptr + row * KNOBS))
    top = tl.max(x, 0)
    weights = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(stats_ptr + place, top)
    tl.store(stats_ptr + plane + place, total)
    if TRUNCATED:
        total = tl.sum(tl.where(raw.to(tl.float32) >= tl.load(floor_ptr + row), weights, 0.0), 0)
    tl.store(stats_ptr + 2 * plane + place, total)


@triton.jit
def _first_above(cumulative, target, weights, places):
    """First place whose cumulative weight is above the target; the last one with any weight if rounding left none."""
    found = tl.sum((cumulative <= target).to(tl.int32), 0)
    last = tl.max(tl.where(weights > 0, places, 0), 0)
    return tl.minimum(found, last)


@triton.jit
def _at(values, places, place):
    return tl.sum(tl.where(places == place, values, 0.0), 0)


@triton.jit
def _pick(
    logits_ptr,
    floor_ptr,
    knobs_ptr,
    stats_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,
    logprob_ptr,
    stride,
    plane,
    num_blocks,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    KNOBS: tl.constexpr,
    TRUNCATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(knobs_ptr + row * KNOBS)
    blocks = tl.arange(0, BLOCKS)
    ok = blocks < num_blocks
    tops = tl.load(stats_ptr + row * num_blocks + blocks, mask=ok, other=float("-inf"))
    totals = tl.load(stats_ptr + plane + row * num_blocks + blocks, mask=ok, other=0.0)
    kept = tl.load(stats_ptr + 2 * plane + row * num_blocks + blocks, mask=ok, other=0.0)
    top = tl.max(tops, 0)
    shares = tl.exp(tops - top)
    normalizer = top + tl.log(tl.sum(totals * shares, 0))

    u = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    weights = (kept * shares).to(tl.float64)
    cumulative = tl.cumsum(weights, 0)
    target = u * _at(cumulative, blocks, BLOCKS - 1)
    drawn = _first_above(cumulative, target, weights, blocks)
    likeliest = tl.min(tl.where(tops == top, blocks, BLOCKS), 0)
    block = tl.where(temperature > 0, drawn, likeliest)
    target = tl.maximum(target - _at(cumulative - weights, blocks, block), 0.0)

    places = tl.arange(0, BLOCK)
    columns = block * BLOCK + places
    raw = tl.load(logits_ptr + row * stride + columns, mask=columns < SIZE, other=float("-inf"))
    x = _scaled(raw, temperature)
    inner = tl.exp(x - top)
    if TRUNCATED:
        inner = tl.where(raw.to(tl.float32) >= tl.load(floor_ptr + row), inner, 0.0)
    inner = inner.to(tl.float64)
    drawn = _first_above(tl.cumsum(inner, 0), target, inner, places)
    likeliest = tl.min(tl.where(x == top, places, BLOCK), 0)
    place = tl.where(temperature > 0, drawn, likeliest)
    tl.store(token_ptr + row, tl.minimum(block * BLOCK + place, SIZE - 1))  # beyond it only where logits are NaN
    tl.store(logprob_ptr + row, _at(tl.where(places == place, x, 0.0), places, place) - normalizer)


@triton.jit
def _uniform(seed, position):
    """`drawing.uniform`."""
    state = (seed + (position.to(tl.int64) + 1) * -7046029254386353131).to(tl.uint64, bitcast=True)
    state = (state ^ (state >> 30)) * tl.full([], -4658895280553007687, tl.int64).to(tl.uint64, bitcast=True)
    state = (state ^ (state >> 27)) * tl.full([], -7723592293110705685, tl.int64).to(tl.uint64, bitcast=True)
    state = state ^ (state >> 31)
    return (state >> 11).to(tl.float64) * 1.1102230246251565e-16


def _floor(logits: Tensor, knobs: Tensor) -> Tensor:
    """(B,) float32, the smallest logit that top-k, top-p and min-p leave."""
    temperature, top_k, top_p, min_p = knobs.unbind(-1)
    temperature = temperature.where(temperature > 0, 1.0)
    top = logits.amax(-1).float()
    size = float(logits.shape[1])
    wanted = top_k.where(top_k > 0, size).expand(len(logits)).double()
    floor = _search(logits, knobs, top, wanted, torch.full_like(top, float("-inf")), mass=False)
    mass = _tails(logits, knobs, top, floor.unsqueeze(1), floor, mass=True)[:, 0]
    floor = _search(logits, knobs, top, top_p.double() * mass, floor, mass=True)
    floor = floor.maximum(top + min_p.log() * temperature)
    truncates = (top_k > 0) | (top_p < 1) | (min_p > 0)
    return floor if knobs.dim() == 1 else floor.where(truncates, float("-inf"))


FANOUT = 16


def _search(logits: Tensor, knobs: Tensor, top: Tensor, wanted: Tensor, floor: Tensor, *, mass: bool) -> Tensor:
    """(B,) the largest value such that the logits from it up number `wanted`, or weigh as much, `floor` counting as the end.

    Floats are searched by their bits, in the order of the numbers they stand for: bfloat16 ones differ in the upper 16 only.
    """
    assert logits.dtype in (torch.bfloat16, torch.float32), f"no search over {logits.dtype}"
    base = torch.full((len(logits), 1), -(2**31), dtype=torch.int64, device=logits.device)
    ways = torch.arange(1, FANOUT, device=logits.device)
    for digit in range(logits.dtype.itemsize * 2):
        step = 2 ** (28 - 4 * digit)
        candidates = _float_of(base + ways * step)
        tails = _tails(logits, knobs, top, candidates, floor, mass=mass)
        base = base + (tails >= wanted.unsqueeze(1)).sum(1, keepdim=True) * step
    return _float_of(base).squeeze(1).maximum(floor)


def _float_of(order: Tensor) -> Tensor:
    """The float32 at a place in the order of all floats; places between -2^31 and 2^31 - 1. A NaN becomes infinite."""
    bits = order.where(order >= 0, order ^ 0x7FFFFFFF).int()
    value = bits.view(torch.float32)
    return value.where(~value.isnan(), torch.where(order < 0, float("-inf"), float("inf")))


def _tails(logits: Tensor, knobs: Tensor, top: Tensor, candidates: Tensor, floor: Tensor, *, mass: bool) -> Tensor:
    """(B, candidates) float64: how many logits are at or above each candidate and the floor, or how much they weigh."""
    num_rows, size = logits.shape
    num_candidates = candidates.shape[1]
    num_blocks = triton.cdiv(size, BLOCK)
    parts = torch.empty((num_blocks, num_rows, num_candidates), dtype=torch.float32, device=logits.device)
    _block_tails[(num_rows, num_blocks)](
        logits,
        knobs,
        top,
        candidates.contiguous(),
        floor,
        parts,
        logits.stride(0),
        SIZE=size,
        BLOCK=BLOCK,
        CANDIDATES=num_candidates,
        KNOBS=row_of_knobs(knobs),
        MASS=mass,
    )
    return parts.double().sum(0)


@triton.jit
def _block_tails(
    logits_ptr,
    knobs_ptr,
    top_ptr,
    candidate_ptr,
    floor_ptr,
    parts_ptr,
    stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    KNOBS: tl.constexpr,
    MASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = columns < SIZE
    raw = tl.load(logits_ptr + row * stride + columns, mask=ok, other=float("-inf")).to(tl.float32)
    temperature = tl.load(knobs_ptr + row * KNOBS)
    ok = ok & (raw >= tl.load(floor_ptr + row))
    if MASS:
        weights = tl.where(ok, tl.exp(_scaled(raw, temperature) - _scaled(tl.load(top_ptr + row), temperature)), 0.0)
    else:
        weights = tl.where(ok, 1.0, 0.0)
    place = (tl.program_id(1) * tl.num_programs(0) + row) * CANDIDATES
    for number in tl.static_range(CANDIDATES):
        candidate = tl.load(candidate_ptr + row * CANDIDATES + number)
        tl.store(parts_ptr + place + number, tl.sum(tl.where(raw >= candidate, weights, 0.0), 0))
