"""A model to a folder that others can run: checks first, then the weights, then the rename that makes it appear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grpo.export.destination import appearing, check_destination, check_room
from grpo.export.families import FAMILIES, context_of, family_of
from grpo.export.gguf_file import QUANTIZATIONS, check_quantization, plan, unknown_ends, write_gguf
from grpo.export.model import load_whole, short_name
from grpo.export.vocabulary import Vocabulary, vocabulary_of
from grpo.inference.resolve_model import Chosen
from grpo.observe.bar import Bar
from grpo.policy.model_source import check_not_quantised, model_config
from grpo.policy.tokenizer import end_token_ids, load_tokenizer
from grpo.system.terminal import say

SMALL_FILES = 2**20
"""Bytes of a card, a figure and a Modelfile, at most."""


@dataclass(frozen=True)
class Asked:
    """What is exported, and to where."""

    chosen: Chosen
    run: Path | None  # that the model comes from
    out: Path
    quantization: str = "q8_0"

    @property
    def name(self) -> str:
        return short_name(self.chosen.model.name, self.run)


def export_gguf(asked: Asked) -> Path:
    """Write a GGUF file with what belongs to it into a new folder.

    Returns:
        The file.

    Raises:
        ValueError: there is something at `out`, no room, or the model or its tokenizer has what llama.cpp does not do. Nothing is
            written then.
    """
    model, file = asked.chosen.model, f"{asked.name}-{asked.quantization.upper()}.gguf"
    check_quantization(asked.quantization, file=f"{asked.name}-BF16.gguf")
    check_installed()
    check_destination(asked.out)
    config = model_config(model)
    check_not_quantised(model, config)
    family = family_of(config, name=model.name)
    tokenizer = load_tokenizer(model)
    vocabulary = vocabulary_of(
        tokenizer, num_rows=config.vocab_size, ends=end_token_ids(model, tokenizer), name=model.name
    )
    whole = load_whole(model, tokenizer)
    tensors = plan(family, whole.config, whole.weights(), asked.quantization)
    check_room(asked.out, sum(tensor.num_bytes for tensor in tensors) + vocabulary_bytes(vocabulary) + SMALL_FILES)
    for note in notes_on(asked, whole.config, vocabulary):
        say(note)
    size = sum(tensor.num_bytes for tensor in tensors)
    with (
        appearing(asked.out) as folder,
        Bar(f"{asked.name}, {asked.quantization}", total=size, most_tokens=0, unit="bytes") as bar,
    ):
        writing = write_gguf(
            folder / file,
            family,
            whole.config,
            vocabulary,
            tensors,
            quantization=asked.quantization,
            about={"name": asked.name},
            sampling={"temp": asked.chosen.sampling.temperature, "top_p": asked.chosen.sampling.top_p},
        )
        for tensor in writing:
            bar.add(tensor.num_bytes)
    return asked.out / file


def check_installed() -> None:
    """Raises ValueError without the package that knows the format."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            "--to is gguf; the package gguf is not installed. Install it: pip install 'grpo-zero[export]'."
        ) from None


def vocabulary_bytes(vocabulary: Vocabulary) -> int:
    """About what it takes in the file: texts with their lengths, types and scores."""
    texts = [*vocabulary.tokens, *vocabulary.merges, vocabulary.chat_template or ""]
    return sum(len(text.encode()) + 8 for text in texts) + 8 * len(vocabulary.tokens)


def notes_on(asked: Asked, config, vocabulary: Vocabulary) -> list[str]:  # type: ignore[no-untyped-def]
    """What a user should know of the file, though it is right."""
    notes = []
    if context_of(config) < config.max_position_embeddings:
        notes.append(
            f"note: llama.cpp has no sliding window for {FAMILIES[config.model_type].architecture}; the file allows "
            f"{context_of(config)} positions, up to which both are the same"
        )
    left = [vocabulary.tokens[number] for number in unknown_ends(vocabulary)[2:]]
    if left:
        notes.append(f"note: llama.cpp has no more places for end tokens; name {' '.join(left)} as stop words")
    return notes


__all__ = ["QUANTIZATIONS", "Asked", "export_gguf"]
