"""Write a GGUF file: numbers of the architecture, vocabulary, and the weights one by one: memory holds one of them twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from grpo.export.families import Arranged, Family, numbers_of, tensors_of
from grpo.export.quantizations import QUANTIZATIONS
from grpo.export.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

OUTPUT_AT_LEAST = "Q8_0"
"""The output layer decides each token; below 8 bits llama.cpp's own program keeps it at Q6_K, which only it can write."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    num_bytes: int
    make: Callable[[], Tensor]

    def data(self) -> np.ndarray[Any, Any]:
        from gguf import quants

        return quants.quantize(np.ascontiguousarray(self.make().numpy()), self.kind)


def plan(family: Family, config: PretrainedConfig, weights: dict[str, Tensor], quantization: str) -> list[Planned]:
    """What will be written, in its order, with its size.

    Norms, biases and other vectors stay float32. A matrix whose rows are no multiple of a block of 32 becomes float16.

    Raises:
        ValueError: see `tensors_of`.
    """
    arranged = tensors_of(family, config, weights)
    return [_planned(name, each, quantization, tied="output.weight" not in arranged) for name, each in arranged.items()]


def _planned(name: str, weight: Arranged, quantization: str, *, tied: bool) -> Planned:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    shape = weight.shape
    kind = GGMLQuantizationType[QUANTIZATIONS[quantization][1]]
    is_output = name == "output.weight" or (tied and name == "token_embd.weight")
    if len(shape) == 1:
        kind = GGMLQuantizationType.F32
    elif is_output and quantization.startswith(("q4", "q5")):
        kind = GGMLQuantizationType[OUTPUT_AT_LEAST]
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        kind, block, size = GGMLQuantizationType.F16, 1, 2
    return Planned(name, shape, kind, int(np.prod(shape)) // block * size, weight.make)


def write_gguf(
    path: Path,
    family: Family,
    config: PretrainedConfig,
    vocabulary: Vocabulary,
    tensors: list[Planned],
    *,
    quantization: str,
    about: dict[str, str],
    sampling: dict[str, float],
) -> Iterator[Planned]:
    """Write it, and yield each tensor once it is on disk.

    Args:
        about: name, license and the like, below `general`.
        sampling: temp and top_p, with which llama.cpp samples unless it is told otherwise.
    """
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, family.architecture)
    writer.add_type("model")
    for key, text in about.items():
        writer.add_string(f"general.{key}", text)
    writer.add_string("general.size_label", size_label(sum(int(np.prod(tensor.shape)) for tensor in tensors)))
    for key, value in sampling.items():
        writer.add_float32(f"general.sampling.{key}", value)
    for key, number in numbers_of(family, config):
        _add(writer, f"{family.architecture}.{key}", number)
    writer.add_file_type(LlamaFileType[QUANTIZATIONS[quantization][0]])
    writer.add_quantization_version(2)
    _add_vocabulary(writer, vocabulary)
    for tensor in tensors:
        is_float = tensor.kind.name in ("F32", "F16")
        dtype = np.dtype(np.float32 if tensor.kind.name == "F32" else np.float16 if is_float else np.uint8)
        shape = tensor.shape if is_float else (*tensor.shape[:-1], tensor.num_bytes // int(np.prod(tensor.shape[:-1])))
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.num_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data())
        yield tensor
    writer.flush()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: int | float | str) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, number in zip(("eot", "eom"), unknown_ends(vocabulary), strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if len(vocabulary.ends) > 1:  # read by Ollama's own engine
        writer.add_array("tokenizer.ggml.eos_token_ids", list(vocabulary.ends))
    for name, value in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def unknown_ends(vocabulary: Vocabulary) -> list[int]:
    """End tokens that llama.cpp knows neither as the first nor by their text; it has two more places."""
    known = {vocabulary.special.get("eos")}
    return [number for number in vocabulary.ends if number not in known and vocabulary.tokens[number] not in END_TEXTS]


END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    )
)
"""By which llama.cpp takes a token for an end, whatever a file says."""


def size_label(num_weights: int) -> str:
    """As in 494M and 7B."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if num_weights >= unit:
            return (
                f"{num_weights / unit:.2g}{letter}" if num_weights < 10 * unit else f"{num_weights / unit:.0f}{letter}"
            )
    return str(num_weights)
