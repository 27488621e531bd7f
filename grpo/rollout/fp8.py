"""Decoder layers whose products read 8 bits: `rollout.weights: fp8`, for sampling alone.

Weights are copied to float8_e4m3fn at each call of `sample`, inputs are rounded to it on the way. A product of a large model
then reads half as many bytes and multiplies twice as fast; what is between the products stays in the model's precision. The
update, the reference and evaluation know nothing of it: algorithm.importance weighs what was drawn so by what the policy says
of it.

A weight is divided by one scale and an input by one of each row, so that the largest number becomes the largest of float8_e4m3fn.
These are floats, so a scale for each output channel would gain nothing: Qwen2.5-Coder-0.5B on ordinary text is 0.140 nats off
with one, 0.141 with one of each channel. (Integers would need them.) Products leave the rows' scales out, and the kernel that
reads a product multiplies by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel

from grpo.rollout import plain_kernels
from grpo.rollout.layers import FUSED_FAMILIES, FusedLayers, Layer, can_fuse
from grpo.rollout.paged import Places, attend

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
DIVISOR = 16
"""Of the sizes of a weight, by the rule of the GPU's products."""
TOLERANCE = 0.6
"""Mean gap in nats to the log-probabilities of all bits that 8 can explain: twice FORWARD_TOLERANCE of bfloat16. Ordinary text
was 0.14 off with a model of 0.5B."""
CAPABILITY = 8, 9
"""The first GPUs that multiply float8: Ada and Hopper."""

UNBIASED = "o_proj", "gate_proj", "up_proj", "down_proj"
"""Projections behind which no kernel adds a bias."""


class Rounded(NamedTuple):
    values: Tensor  # (B, K) float8_e4m3fn
    scales: Tensor  # (B,) float32, what the values of a row are to be multiplied by


class Unscaled(NamedTuple):
    """A product whose rows are yet to be multiplied by `scales`."""

    values: Tensor  # (B, N), in the model's precision
    scales: Tensor  # (B,) float32


class Fp8Layers(FusedLayers):
    """FusedLayers with a copy of their weights in 8 bits, made by `round_weights`."""

    layers: list[_Fp8Layer]  # type: ignore[assignment]

    def _make_layer(self, layer: Any) -> Layer:
        return _Fp8Layer(layer, self.kernels)

    def round_weights(self) -> None:
        """Bring the copy up to date."""
        for layer in self.layers:
            for product in layer.products:
                product.round_weight()

    def __call__(self, lm: PreTrainedModel, tokens: Tensor, positions: Tensor, places: Places) -> Tensor:
        norm_and_round = self.kernels.add_rms_norm_fp8
        x, residual = Unscaled(self.base.embed_tokens(tokens), None), None  # type: ignore[arg-type]
        cos, sin = (part.squeeze(0) for part in self.base.rotary_emb(x.values, positions.unsqueeze(0)))
        for number, layer in enumerate(self.layers):
            norm, mlp_norm = layer.norm, layer.mlp_norm
            residual, *rounded = norm_and_round(*x, residual, norm.weight, norm.variance_epsilon)
            x = layer.attend_rounded(Rounded(*rounded), cos, sin, number, places)
            residual, *rounded = norm_and_round(*x, residual, mlp_norm.weight, mlp_norm.variance_epsilon)
            x = layer.feed_forward_rounded(Rounded(*rounded))
        norm = self.base.norm
        return self.kernels.add_rms_norm(x.values, residual, norm.weight, norm.variance_epsilon, scales=x.scales)[1]


class _Fp8Layer(Layer):
    def __init__(self, layer: Any, kernels: Any) -> None:
        super().__init__(layer, kernels)
        self.products = [Product(parts) for parts in same_input(layer)]
        self.qkv8, self.o8, self.gate_up8, self.down8 = self.products

    def attend_rounded(self, x: Rounded, cos: Tensor, sin: Tensor, number: int, places: Places) -> Unscaled:
        q, k, v = (
            part.unflatten(1, (-1, self.head_dim)) for part in self.qkv8(x.values).split(self.qkv8.sizes, dim=-1)
        )
        keys, values = places.cache.keys[number], places.cache.values[number]
        q, k = self.kernels.rotate_and_store(
            q, k, v, cos, sin, keys, values, places.write, **self.head_norms, scales=x.scales, bias=self.qkv8.bias
        )
        attended = attend(q, k, v, places, number, scale=self.scaling, window=self.window).flatten(1)
        rounded = Rounded(*self.kernels.round_rows(attended))
        return Unscaled(self.o8(rounded.values), rounded.scales)

    def feed_forward_rounded(self, x: Rounded) -> Unscaled:
        gate, up = self.gate_up8(x.values).split(self.gate_up8.sizes, dim=-1)
        rounded = Rounded(*self.kernels.silu_mul_fp8(gate, up, x.scales))
        return Unscaled(self.down8(rounded.values), rounded.scales)


def same_input(layer: Any) -> list[list[nn.Linear]]:
    """The linear layers of a decoder layer, those that read the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def inverse_scale(parts: Sequence[nn.Linear]) -> Tensor:
    """What their weights are multiplied by so that the largest becomes LARGEST; (), in the model's precision."""
    largest = torch.stack([part.weight.detach().abs().amax() for part in parts]).amax()
    return LARGEST / largest.clamp(min=1e-12)  # they may all be 0


class Product:
    """Linear layers of the same input as one product in 8 bits. It leaves out their biases, `bias` (N,)."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.parts = parts
        self.sizes = [part.out_features for part in parts]
        like = parts[0].weight
        self.dtype = like.dtype
        self.weight = torch.zeros(sum(self.sizes), parts[0].in_features, dtype=FP8, device=like.device)
        self.scale, self.one = (torch.ones((), dtype=torch.float32, device=like.device) for _ in range(2))
        self.biases: list[Tensor] = [
            part.bias for part in parts if part.bias is not None
        ]  # all parts have one, or none has
        self.bias = torch.zeros(sum(self.sizes), dtype=like.dtype, device=like.device) if self.biases else None

    @torch.no_grad()
    def round_weight(self) -> None:
        """In place, since captured steps read it where it lies."""
        inverse = inverse_scale(self.parts)
        self.scale.copy_(1 / inverse.float())
        for part, rounded in zip(self.parts, self.weight.split(self.sizes), strict=True):
            rounded.copy_(part.weight * inverse)
        if self.bias is not None:
            torch.cat(self.biases, out=self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Of x (B, K) in 8 bits with the weight, (B, N)."""
        if not x.is_cuda:
            return linear(x.float(), self.weight.float()).mul_(self.scale).to(self.dtype)
        return torch._scaled_mm(
            x, self.weight.t(), scale_a=self.one, scale_b=self.scale, out_dtype=self.dtype, use_fast_accum=True
        )


def num_bytes(lm: PreTrainedModel) -> int:
    """What the copies take."""
    return sum(each.weight.numel() for each in _linears(lm))


def unsupported_here(config: PretrainedConfig, device: torch.device) -> str | None:
    """Why the weights of such a model cannot be in 8 bits on this device, or None; as far as its configuration tells."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} does not multiply numbers of 8 bits; Ada and Hopper GPUs do"
    if not can_fuse(config):
        known = ", ".join(FUSED_FAMILIES)
        return (
            f"there are no layers in 8 bits for this model ({config.model_type}), only for {known} of the usual build"
        )
    return None


def unsupported(lm: PreTrainedModel) -> str | None:
    """The same of a model that is loaded."""
    reason = unsupported_here(lm.config, next(lm.parameters()).device)
    if reason is not None:
        return reason
    biased = [name for name, each in lm.named_modules() if name.endswith(UNBIASED) and each.bias is not None]
    if biased:
        return f"products in 8 bits have no bias but those of queries, keys and values; {biased[0]} has one"
    odd = {size for each in _linears(lm) for size in each.weight.shape if size % DIVISOR}
    if odd:
        return f"products in 8 bits need weights whose sizes divide by {DIVISOR}; {min(odd)} does not"
    return None


def _linears(lm: PreTrainedModel) -> list[nn.Linear]:
    layers: Any = lm.base_model.layers
    return [each for layer in layers for each in layer.modules() if isinstance(each, nn.Linear)]


@contextmanager
def rounded_products(lm: PreTrainedModel) -> Iterator[None]:
    """Within it, the model's own forward pass multiplies in 8 bits: the plain counterpart of Fp8Layers.

    A weight is rounded for each product anew, so that no copy of the model lies beside the engine's.
    """
    layers: Any = lm.base_model.layers
    groups = [group for layer in layers for group in same_input(layer)]
    for group in groups:
        inverse = inverse_scale(group)
        for part in group:
            part.forward = partial(_rounded_linear, part, inverse)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for group in groups:
            for part in group:
                del part.forward  # the method of its class again


def _rounded_linear(part: nn.Linear, inverse: Tensor, x: Tensor) -> Tensor:
    values, scales = plain_kernels.round_rows(x.flatten(0, -2))
    weight = (part.weight * inverse).to(FP8)
    product = linear(values.float(), weight.float()) / inverse.float() * scales.unsqueeze(1)
    return (product if part.bias is None else product + part.bias).to(x.dtype).view(*x.shape[:-1], -1)
