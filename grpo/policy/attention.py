"""Attention over packed sequences: `(1, S)` places hold many sequences end to end and none sees another.

It is registered with transformers under the name `packed`, and where the sequences lie travels through the model's forward as
the keyword argument `packing`. In 16 bit on CUDA it is torch's own variable-length flash attention, elsewhere one call of
scaled_dot_product_attention per sequence.

Completions of one prompt share it: the prompt's tokens go through the model once, and each completion attends to the prompt's
keys followed by its own. Nothing is approximated; keys and values of a prompt do not depend on what comes after it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from grpo.types import MicroBatch, Packing

_NEEDS_GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 has grouped queries without it


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; query `(1, heads, S, D)`, key and value `(1, kv_heads, S, D)`, of a share of the
    places where several processes share the pass."""
    check_arguments(module, others)
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    if packing.share is not None:
        q, k, v = packing.share.by_heads(q, k, v)
    out = varlen_attention(
        q,
        spread(k, packing),
        spread(v, packing),
        packing.cu_queries,
        packing.cu_keys,
        packing.longest_query,
        packing.longest_key,
        scale=scaling,
        window=sliding_window,
    )
    if packing.share is not None:
        out = packing.share.by_places(out)
    return out.unsqueeze(0), None


def unknown_arguments(module: nn.Module, others: dict[str, Any]) -> str:
    """What an attention module asks for that changes its result and that ours do not compute; "" if there is nothing."""
    if not others.get("is_causal", getattr(module, "is_causal", True)):
        return "no causal mask"
    for name, value in others.items():
        if name == "softcap" and value:
            return "capped logits (softcap)"
        if isinstance(value, Tensor) and value.is_floating_point():
            return f"a term of its own ({name})"  # such as the sinks of gpt-oss, or a bias by distance
    return ""


def check_arguments(module: nn.Module, others: dict[str, Any]) -> None:
    """Raises ValueError if an attention module asks for what ours do not compute."""
    unknown = unknown_arguments(module, others)
    if unknown:
        raise ValueError(f"its attention has {unknown}, which the attention over packed sequences leaves out")


AttentionInterface.register("packed", packed_attention)


def packed_inputs(micro: MicroBatch) -> dict[str, Any]:
    """Arguments of a model's forward, with attention `packed`, over a micro-batch."""
    return {
        "input_ids": micro.tokens.unsqueeze(0),
        "position_ids": micro.position_ids.unsqueeze(0),
        "attention_mask": None,
        "use_cache": False,
        "packing": micro.packing,
    }


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of each run of queries over its own run of keys, of which the last belongs to the last query.

    Args:
        q: (S, heads, D); k, v: (K, kv_heads, D).
        cu_queries, cu_keys: (runs + 1,) int32, where each run starts in q and in k, and their lengths.
        window: how many of the latest keys a query sees; None: all before it.
    """
    if not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)):
        return _plain_varlen_attention(q, k, v, cu_queries, cu_keys, scale=scale, window=window)
    grouped: dict[str, Any] = {"enable_gqa": True} if _NEEDS_GQA_FLAG and q.shape[1] != k.shape[1] else {}
    sizes = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        q, k, v, cu_queries, cu_keys, longest_query, longest_key, scale=scale, window_size=sizes, **grouped
    )
    assert isinstance(out, Tensor), "varlen_attn returned auxiliary values that nobody asked for"
    return out


def _plain_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, *, scale: float | None, window: int | None
) -> Tensor:
    num_queries, num_keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    parts = []
    for each in zip(q.split(num_queries), k.split(num_keys), v.split(num_keys), strict=True):
        qs, ks, vs = (x.transpose(0, 1).unsqueeze(0) for x in each)  # (1, heads, run, D)
        plain = len(each[0]) == len(each[1]) and window is None
        mask = None if plain else _causal_mask(len(each[0]), len(each[1]), window, q.device)
        out = scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) whether a query sees a key; both end at the same place."""
    places = torch.arange(num_keys, device=device)
    age = places[num_keys - num_queries :].unsqueeze(1) - places
    return (age >= 0) if window is None else (age >= 0) & (age < window)


def spread(x: Tensor, packing: Packing) -> Tensor:
    """Keys or values as the runs of queries see them, a shared prompt's once for each; (S, ...) -> (K, ...)."""
    return _Spread.apply(x, packing)


class _Spread(torch.autograd.Function):
    """x[key_index], with a gradient that adds a shared place's parts in a fixed order and in float32.

    Indexing's own backward pass adds them with atomic operations in the tensor's precision: in bfloat16 it would lose bits, and
    two runs would differ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x[packing.key_index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        result = gradient[packing.own_key]
        uses = packing.shared_keys  # -1 where a prompt has fewer completions
        known = (uses >= 0).unflatten(1, (-1, *[1] * (gradient.ndim - 1)))
        shared = torch.where(known, gradient[uses.clamp(min=0)], 0).sum(1, dtype=torch.float32)
        result[: len(uses)] = (result[: len(uses)] + shared).to(result.dtype)
        return result, None
