"""Tokens through a model's layers with paged attention: the newest tokens of many sequences, or whole prompts.

`model_layers` runs the model's own forward, for every family. `FusedLayers` runs the same weights through a third as many
kernels, or on a CPU half as many operations, for the families whose decoder layer is that of Llama. Neither copies a weight:
projections that read the same input become one product where their weights lie end to end in memory, which `policy.lay_out` sees
to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel

from grpo.rollout.paged import Places, attend, kernels_for

FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s whose layers FusedLayers knows; SmolLM and SmolLM2 are `llama`."""


def model_layers(lm: PreTrainedModel, tokens: Tensor, positions: Tensor, places: Places) -> Tensor:
    """Hidden states (N, H) of tokens (N,) at `positions` (N,), by the model's own forward with paged attention."""
    output = lm.base_model(
        input_ids=tokens.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=None,
        use_cache=False,
        places=places,
    )
    return output.last_hidden_state.squeeze(0)


def can_fuse(config: PretrainedConfig) -> bool:
    """Whether FusedLayers knows the layers of such a model."""
    return (
        config.model_type in FUSED_FAMILIES
        and config.hidden_act == "silu"  # type: ignore[attr-defined]
        and getattr(config, "partial_rotary_factor", 1.0) in (None, 1.0)
    )


class FusedLayers:
    """The decoder layers of Llama, Mistral, Qwen2 and Qwen3 on the kernels of kernels.py; called like `model_layers`."""

    def __init__(self, lm: PreTrainedModel, kernels: Any = None) -> None:
        """Args: kernels: a module like kernels.py; None: the one for the device of the weights."""
        self.base: Any = lm.base_model  # its modules are the ones of Llama
        self.kernels = kernels or kernels_for(next(lm.parameters()))
        layers: Any = self.base.layers
        self.layers = [self._make_layer(layer) for layer in layers]

    def _make_layer(self, layer: Any) -> Layer:
        return Layer(layer, self.kernels)

    def __call__(self, lm: PreTrainedModel, tokens: Tensor, positions: Tensor, places: Places) -> Tensor:
        add_rms_norm = self.kernels.add_rms_norm
        x, residual = self.base.embed_tokens(tokens), None
        cos, sin = (part.squeeze(0) for part in self.base.rotary_emb(x, positions.unsqueeze(0)))
        for number, layer in enumerate(self.layers):
            residual, x = add_rms_norm(x, residual, layer.norm.weight, layer.norm.variance_epsilon)
            x = layer.attend(x, cos, sin, number, places)
            residual, x = add_rms_norm(x, residual, layer.mlp_norm.weight, layer.mlp_norm.variance_epsilon)
            x = layer.feed_forward(x)
        norm = self.base.norm
        return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)[1]


class Layer:
    """One decoder layer's weights, read where they are."""

    def __init__(self, layer: Any, kernels: Any) -> None:
        self.kernels = kernels
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = Joined([mlp.gate_proj, mlp.up_proj])
        self.o_proj, self.down_proj = attention.o_proj, mlp.down_proj
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.head_norms: dict[str, Any] = {
            "q_norm": None if q_norm is None else q_norm.weight,
            "k_norm": None if k_norm is None else k_norm.weight,
            "eps": 0.0 if q_norm is None else q_norm.variance_epsilon,
        }
        self.scaling, self.head_dim = attention.scaling, attention.head_dim
        self.window = sliding_window(attention)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, number: int, places: Places) -> Tensor:
        q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in self.qkv(x))
        keys, values = places.cache.keys[number], places.cache.values[number]
        q, k = self.kernels.rotate_and_store(q, k, v, cos, sin, keys, values, places.write, **self.head_norms)
        return self.o_proj(attend(q, k, v, places, number, scale=self.scaling, window=self.window).flatten(1))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.kernels.silu_mul(*self.gate_up(x)))


def sliding_window(attention: Any) -> int | None:
    """The window of an attention module; Mistral keeps it in the config for all layers, Qwen decides by layer."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if attention.config.model_type == "mistral":
        return getattr(attention.config, "sliding_window", None)
    return None


class Joined:
    """Linear layers of the same input as one product, where that takes no copy of their weights."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.parts = parts
        self.sizes = [part.out_features for part in parts]
        self.weight = end_to_end([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        self.bias = end_to_end(biases) if len(biases) == len(parts) else None
        self.one = self.weight is not None and (not biases or self.bias is not None)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if not self.one:
            return [part(x) for part in self.parts]
        assert self.weight is not None, "joined layers have a joined weight"
        return linear(x, self.weight, self.bias).split(self.sizes, dim=-1)


def end_to_end(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one along the first dimension, without a copy, or None if they do not follow each other in memory."""
    first, place = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        storage = tensor.untyped_storage().data_ptr()
        if tensor.data_ptr() != place or not tensor.is_contiguous() or storage != first.untyped_storage().data_ptr():
            return None
        place += tensor.nbytes
    rows = sum(len(tensor) for tensor in tensors)
    with torch.no_grad():
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
