"""Triton kernels of logprobs.py. Each has a plain counterpart there that it is tested against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits of a row that a program holds at once."""


def row_statistics(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logprobs.plain_row_statistics`, reading the logits once."""
    num_rows, size = logits.shape
    logprobs, entropy, normalizer = torch.empty((3, num_rows), dtype=torch.float32, device=logits.device)
    likeliest = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    _row_statistics[(num_rows,)](
        logits,
        targets,
        logprobs,
        entropy,
        normalizer,
        likeliest,
        size,
        logits.stride(0),
        1 / temperature,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logprobs, entropy, normalizer, likeliest


@triton.jit
def _row_statistics(
    logits_ptr,
    target_ptr,
    logprob_ptr,
    entropy_ptr,
    normalizer_ptr,
    likeliest_ptr,
    size,
    stride,
    scale,
    BLOCK: tl.constexpr,
):
    """Running maximum, and sums of exp(x - maximum) and of that times x - maximum, corrected whenever the maximum rises."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < size, other=float("-inf")).to(tl.float32) * scale
        new_top = tl.maximum(top, tl.max(x, 0))
        rise = tl.where(total > 0, top - new_top, 0.0)  # in the first block there is nothing to correct
        x -= new_top
        e = tl.exp(x)
        weighted = tl.exp(rise) * (weighted + rise * total) + tl.sum(tl.where(e > 0, e * x, 0.0), 0)
        total = tl.exp(rise) * total + tl.sum(e, 0)
        top = new_top
    normalizer = top + tl.log(total)
    target = tl.load(target_ptr + row)
    chosen = tl.load(logits_ptr + target).to(tl.float32) * scale
    tl.store(logprob_ptr + row, chosen - normalizer)
    tl.store(entropy_ptr + row, tl.log(total) - weighted / total)
    tl.store(normalizer_ptr + row, normalizer)
    tl.store(likeliest_ptr + row, chosen >= top)


def replace_by_gradient(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    gradient: Tensor,
    temperature: float,
    *,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`logprobs.plain_replace_by_gradient`."""
    num_rows, size = logits.shape
    entropy, by_entropy = (normalizer, gradient) if of_entropy is None else of_entropy  # without one they are not read
    _replace_by_gradient[(num_rows, triton.cdiv(size, BLOCK))](
        logits,
        targets,
        normalizer,
        gradient.contiguous(),  # that of a sum is one number, with a stride of 0
        entropy,
        by_entropy.contiguous(),
        size,
        logits.stride(0),
        1 / temperature,
        WITH_ENTROPY=of_entropy is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )


@triton.jit
def _replace_by_gradient(
    logits_ptr,
    target_ptr,
    normalizer_ptr,
    gradient_ptr,
    entropy_ptr,
    by_entropy_ptr,
    size,
    stride,
    scale,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits_ptr + row * stride + columns
    x = tl.load(here, mask=columns < size, other=0.0)
    logprob = x.to(tl.float32) * scale - tl.load(normalizer_ptr + row)
    probability = tl.exp(logprob)
    chosen = tl.where(columns == tl.load(target_ptr + row), 1.0, 0.0)
    result = tl.load(gradient_ptr + row) * scale * (chosen - probability)
    if WITH_ENTROPY:
        slope = tl.where(probability > 0, probability * (logprob + tl.load(entropy_ptr + row)), 0.0)
        result -= tl.load(by_entropy_ptr + row) * scale * slope
    tl.store(here, result.to(x.dtype), mask=columns < size)
