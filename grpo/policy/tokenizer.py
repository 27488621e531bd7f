"""The tokenizer that goes with the model: loading it, the tokens that end a completion, whether prompts fit the model."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from grpo.config import Config, ModelConfig
from grpo.policy.families import (
    attribute,
)
from grpo.policy.model_source import from_source, model_config, not_loaded, of_source, source_of
from grpo.system import progress

END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<end_of_turn>", "</s>")
"""Special tokens by which model families end a text or a turn; whichever a tokenizer has ends a completion."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Raises ValueError if neither a directory nor the hub has it."""
    try:
        with progress.busy("loading the tokenizer"):
            tokenizer = from_source(AutoTokenizer, config)
    except (OSError, ValueError) as error:
        raise ValueError(not_loaded(config, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # what is too long is left out, cut or refused here, in words of our own
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def check_context(config: Config) -> None:
    """Raises ValueError if a sequence may grow longer than the positions the model knows."""
    check_positions(
        config.model,
        config.max_sequence_tokens,
        said=f"rollout.max_completion_tokens is {config.rollout.max_completion_tokens}; with data.max_prompt_tokens "
        f"({config.data.max_prompt_tokens}) a sequence may have",
    )


def check_positions(config: ModelConfig, longest: int, *, said: str) -> None:
    """Raises ValueError if the model does not know so many positions.

    Args:
        said: the setting and its value, and what may have so many tokens, for the error.
    """
    model = model_config(config).get_text_config()
    limit = attribute(model, "max_position_embeddings")
    changing = sorted(rope_types(model) & set(CHANGING_ROPE))
    original = attribute(model, "original_max_position_embeddings") or (
        (model.rope_parameters or {}).get("original_max_position_embeddings", limit) if changing else limit
    )
    if changing and original is not None and longest > original:
        raise ValueError(
            f"{said} {longest} tokens, and the rotary embedding ({changing[0]}) of model.name {config.name!r} changes for all "
            f"packed sequences once one of them is longer than {original} tokens. Lower it, or use another model."
        )
    if limit is not None and longest > limit:
        raise ValueError(
            f"{said} {longest} tokens, and model.name {config.name!r} knows {limit} positions. Lower one of the two."
        )


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[int]]) -> None:
    """Raises ValueError if a prompt has tokens for which the model has no embedding; a GPU would fail without saying why."""
    rows = attribute(model_config(config).get_text_config(), "vocab_size")
    if rows is None:
        return
    if config.resize_embeddings and vocabulary_size(tokenizer) <= rows:
        raise ValueError(
            f"model.resize_embeddings is true; the {vocabulary_size(tokenizer)} tokens of the tokenizer of {config.name!r} have "
            f"room in its embedding matrix of {rows} rows, so it has no effect. Remove it."
        )
    largest = max((max(ids, default=0) for ids in prompts), default=0)
    if largest >= rows and not config.resize_embeddings:
        raise ValueError(
            f"model.name is {config.name!r}; a prompt has its tokenizer's token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), and its embedding matrix has {rows} rows. Use the tokenizer that "
            "the model was trained with, or set model.resize_embeddings to true to add untrained rows."
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id, and one."""
    return max(tokenizer.get_vocab().values()) + 1


CHANGING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies transformers picks by the longest sequence of a forward pass, for all of it."""


def rope_types(model: PretrainedConfig) -> set[str]:
    """The kinds of rotary embedding of a model's layers."""
    parameters = attribute(model, "rope_parameters") or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}


def end_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion, sorted.

    Base models disagree with themselves: the tokenizer, the model's config and its generation config may each name another
    one. A completion that ends with any of them has ended; honouring only one makes most completions run to the limit.
    """
    model = model_config(config)
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, model.get_text_config().eos_token_id, _generation_eos(config)):
        ids.update([value] if isinstance(value, int) else value or [])
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    ids.update(vocabulary[token] for token in END_TOKENS if token in vocabulary and token in special)
    if not ids:
        raise ValueError(
            f"model.name is {config.name!r}; its tokenizer, config and generation config name no end-of-sequence token, "
            "so no completion could ever end. Set eos_token_id in its generation_config.json."
        )
    return sorted(ids)


def _generation_eos(config: ModelConfig) -> int | list[int] | None:
    source = source_of(config)
    try:
        with of_source(source):
            return GenerationConfig.from_pretrained(source.base, revision=source.revision).eos_token_id
    except OSError:
        return None  # a model need not have a generation_config.json
