"""What llama.cpp wants of each family: names of tensors, numbers of the architecture, and the arrangement of weights.

Read from llama.cpp's own converter and loader (conversion/*.py, src/models/*.cpp, as llama-cpp-python 0.3.36 has them). What a
family's graph in llama.cpp does not do is refused by name: a file that loads and answers wrongly is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from grpo.policy.families import attribute

Number = int | float | str
"""A value of the file's metadata; whole numbers are written as uint32, others as float32."""


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` are written."""

    architecture: str  # of llama.cpp
    activations: tuple[str, ...] = ("silu", "swish")
    biases: tuple[str, ...] = ()  # layers that may have one
    permuted: bool = False  # rotary pairs are neighbours in llama.cpp, halves in transformers
    norm_shift: float = 0.0  # of norms that multiply by 1 + weight


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = Family(
    "llama",
    biases=(*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    permuted=True,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2", biases=QKV),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", activations=("gelu_pytorch_tanh",), norm_shift=1.0),
}

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
"""Within a layer, in transformers and in llama.cpp. Gemma has four norms, and the same name means another one there."""

NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def family_of(config: PretrainedConfig, *, name: str) -> Family:
    """Raises ValueError if llama.cpp, or this writer, does not know the model's architecture or something in it.

    Args: name: of the model, for the error.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"--to is gguf; {name} is of the type {config.model_type}, and GGUF is written for {', '.join(FAMILIES)}. Export a "
            "plain folder with --to folder, and use llama.cpp's convert_hf_to_gguf.py on it, which knows more."
        )
    family = FAMILIES[config.model_type]
    problem = _unlike_llama_cpp(family, config)
    if problem is not None:
        raise ValueError(
            f"--to is gguf; {name} has {problem}, so its answers would differ. Export a plain folder with --to folder."
        )
    return family


def _unlike_llama_cpp(family: Family, config: PretrainedConfig) -> str | None:
    """What this model does that llama.cpp's graph of its architecture does not."""
    activation = attribute(config, "hidden_activation") or attribute(config, "hidden_act")
    if activation not in family.activations:
        return f"the activation {activation}, where llama.cpp has {family.activations[0]}"
    kind = rope_of(config)["rope_type"]
    if kind not in ROPES:
        return f"a rotary embedding of the type {kind}, and only {', '.join(ROPES)} are written"
    if kind == "llama3" and family.architecture != "llama":  # other graphs have no place for its factors
        return f"a rotary embedding of the type llama3, which llama.cpp's {family.architecture} does not read"
    if kind == "yarn" and (problem := _odd_yarn(rope_of(config))) is not None:
        return problem
    if rope_of(config).get("partial_rotary_factor", 1.0) != 1.0:
        return "a rotary embedding of a part of each head, where llama.cpp turns all of it"
    return _unlike_gemma(config) if family.architecture == "gemma3" else None


def _odd_yarn(rope: dict[str, Any]) -> str | None:
    """llama.cpp always multiplies by 0.1 ln(factor) + 1, and rounds the limits of the ramp to whole dimensions."""
    usual = 0.1 * math.log(rope["factor"]) + 1
    own = rope.get("attention_factor")
    if own is not None and not math.isclose(own, usual, rel_tol=1e-4):
        return f"a YaRN with attention_factor {own}, where llama.cpp has {usual:.4f}"
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        return "a YaRN with an mscale of its own, which llama.cpp has not for this architecture"
    if not rope.get("truncate", True):
        return "a YaRN with truncate false, where llama.cpp rounds"
    return None


def _unlike_gemma(config: PretrainedConfig) -> str | None:
    expected = [
        "full_attention" if (n + 1) % GEMMA_PATTERN == 0 else "sliding_attention"
        for n in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        return f"another order of layers than every {GEMMA_PATTERN}th with full attention, which llama.cpp takes for granted"
    is_27b = config.num_hidden_layers == GEMMA_27B_LAYERS
    scale = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}, where llama.cpp has {scale}"
    if attribute(config, "attn_logit_softcapping"):
        return "capped attention logits, which llama.cpp leaves out for this architecture"
    local = (config.rope_parameters or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        return f"a rotary embedding of the type {local['rope_type']} in its local layers, where llama.cpp has the plain one"
    return None


GEMMA_PATTERN = 6
GEMMA_27B_LAYERS = 62
"""By this number of layers llama.cpp knows the model whose attention is scaled by another number than its heads' size."""

ROPES = ("default", "linear", "yarn", "llama3")


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embedding of the layers with full attention."""
    found = dict(attribute(config, "rope_parameters") or {})
    found = dict(found.get("full_attention", found))
    return {"rope_type": "default", **found}


def head_dim_of(config: PretrainedConfig) -> int:
    return attribute(config, "head_dim") or config.hidden_size // config.num_attention_heads


def context_of(config: PretrainedConfig) -> int:
    """Positions for which llama.cpp computes what transformers does.

    llama.cpp has no sliding window for Llama, Mistral and Qwen; up to the window's length none is needed.
    """
    known = config.max_position_embeddings
    window = attribute(config, "sliding_window")
    if config.model_type == "gemma3_text" or not window or attribute(config, "use_sliding_window") is False:
        return known
    return min(known, window)


def numbers_of(family: Family, config: PretrainedConfig) -> Iterator[tuple[str, Number]]:
    """Keys below the architecture's name, and their values."""
    head_dim = head_dim_of(config)
    yield "block_count", config.num_hidden_layers
    yield "context_length", context_of(config)
    yield "embedding_length", config.hidden_size
    yield "feed_forward_length", config.intermediate_size
    yield "attention.head_count", config.num_attention_heads
    yield "attention.head_count_kv", config.num_key_value_heads
    yield "attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    if attribute(config, "head_dim"):
        yield "attention.key_length", head_dim
        yield "attention.value_length", head_dim
    if family.permuted:
        yield "rope.dimension_count", head_dim
        yield "vocab_size", config.vocab_size
    yield from _rope_numbers(config)
    if family.architecture == "gemma3":
        yield "attention.sliding_window", config.sliding_window
        if cap := attribute(config, "final_logit_softcapping"):
            yield "final_logit_softcapping", float(cap)


def _rope_numbers(config: PretrainedConfig) -> Iterator[tuple[str, Number]]:
    rope = rope_of(config)
    yield "rope.freq_base", float(rope["rope_theta"])
    local = (attribute(config, "rope_parameters") or {}).get("sliding_attention")
    if local:
        yield "rope.freq_base_swa", float(local["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        yield "rope.scaling.type", rope["rope_type"]
        yield "rope.scaling.factor", float(rope["factor"])
    if rope["rope_type"] == "yarn":
        yield "rope.scaling.original_context_length", original_positions(config)
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                yield f"rope.scaling.yarn_{key}", float(rope[key])


def original_positions(config: PretrainedConfig) -> int:
    """Positions of the model before its rotary embedding was stretched."""
    return int(rope_of(config).get("original_max_position_embeddings") or config.max_position_embeddings)


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Of Llama 3: what each frequency is divided by, (head_dim / 2,); None for other rotary embeddings.

    A wavelength of up to `original / high` positions stays, one above `original / low` is stretched by `factor`, and those
    between are interpolated in the frequency (transformers' `_compute_llama3_parameters`; llama.cpp reads it as `rope_freqs`).
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim, factor = head_dim_of(config), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = (
        original_positions(config) * rope["rope_theta"] ** -exponents / (2 * math.pi)
    )  # within the original positions
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


@dataclass(frozen=True)
class Arranged:
    """A weight of a model: its shape, and a function that gives it in float32 as llama.cpp wants it."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def tensors_of(family: Family, config: PretrainedConfig, weights: dict[str, Tensor]) -> dict[str, Arranged]:
    """By their names in llama.cpp.

    Args: weights: a state dict of transformers, without the output layer if it is the embedding.

    Raises:
        ValueError: a weight that llama.cpp's architecture has not.
    """
    made = {
        _name(name, family): Arranged(tuple(weight.shape), _arranged(name, weight, family, config))
        for name, weight in weights.items()
    }
    factors = rope_factors(config)
    if factors is not None:
        made["rope_freqs.weight"] = Arranged(tuple(factors.shape), lambda: factors)
    return made


def _name(name: str, family: Family) -> str:
    module, _, kind = name.rpartition(".")
    if kind == "weight" and module in WHOLE:
        return f"{WHOLE[module]}.weight"
    norms = GEMMA_NORMS if family.architecture == "gemma3" else NORMS
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    inner = found[2] if found else ""
    if found and inner in NAMES | norms and (kind == "weight" or (kind == "bias" and inner in family.biases)):
        return f"blk.{found[1]}.{(NAMES | norms)[inner]}.{kind}"
    raise ValueError(
        f"--to is gguf; the model has a weight {name}, for which llama.cpp's architecture {family.architecture} has no place. "
        "Export a plain folder with --to folder."
    )


def _arranged(name: str, weight: Tensor, family: Family, config: PretrainedConfig) -> Callable[[], Tensor]:
    if family.norm_shift and name.endswith("norm.weight"):
        return lambda: weight.float() + family.norm_shift
    if family.permuted and ".q_proj." in name:
        return lambda: permuted(weight.float(), config.num_attention_heads)
    if family.permuted and ".k_proj." in name:
        return lambda: permuted(weight.float(), config.num_key_value_heads)
    return lambda: weight.float()


def permuted(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from two halves, (0, 1, 2, 3) -> pairs, (0, 2, 1, 3).

    transformers turns row i together with row i + half, llama.cpp neighbours.

    Args: weight: (num_heads * head_dim, ...).
    """
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
