"""Attention over packed sequences: `(1, L)` tokens hold many sequences end to end and none sees another.

On CUDA this is torch's own variable-length flash attention, registered with transformers under the name `packed`; the
sequence boundaries travel as keyword arguments through the model's forward. Elsewhere transformers' sdpa derives a
block-diagonal mask from `position_ids` that restart at 0. That only happens with `attention_mask=None` and
`use_cache=False`; with anything else sequences would mix in silence, so `packed_inputs` is the one place that builds the
arguments of a packed forward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

_NEEDS_GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has grouped queries without it


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; query `(1, heads, L, D)`, key and value `(1, kv_heads, L, D)`."""
    if softcap is not None:
        raise ValueError("this model caps its attention logits (softcap), which packed attention does not support.")
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    return varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling, window=sliding_window).unsqueeze(
        0
    ), None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, *, scale: float | None, window: int | None
) -> Tensor:
    """torch's flash attention, causal within each sequence; q `(L, heads, D)`, k and v `(L, kv_heads, D)`; 16 bit on CUDA."""
    grouped: dict[str, Any] = {"enable_gqa": True} if _NEEDS_GQA_FLAG and q.shape[1] != k.shape[1] else {}
    sizes = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=sizes, **grouped)
    assert isinstance(out, Tensor), "varlen_attn returned auxiliary values that nobody asked for"
    return out


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)  # boundaries come as cu_seq_lens, not as a mask


def implementation_for(model: PreTrainedModel) -> str:
    """Name of the attention to train `model` with; flash attention exists for 16-bit weights on CUDA only."""
    weight = next(model.parameters())
    return "packed" if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) else "sdpa"


def packed_inputs(tokens: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
    """Arguments for a model's forward over `tokens (L,)` whose sequences start at `cu_seqlens[:-1]`."""
    longest = int(cu_seqlens.diff().max())
    return {
        "input_ids": tokens.unsqueeze(0),
        "position_ids": position_ids.unsqueeze(0),
        "attention_mask": None,
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
