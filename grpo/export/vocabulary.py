"""A tokenizer as llama.cpp reads it.

llama.cpp has the splitting of text before BPE built in, under names, and refuses a name it does not know. Its converter finds the
name by a hash of a text's token ids, which knows published vocabularies alone. Here it follows from what the tokenizer does: the
regular expressions in its tokenizer.json. A vocabulary of one's own with Qwen's expressions is split as Qwen's is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.export.sentencepiece import Pieces, differs, scores_of

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the step ByteLevel does by itself."""

LLAMA3 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{OTHERS}|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{OTHERS}|{SPACES}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
)
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)

BY_EXPRESSIONS: dict[tuple[str, ...], dict[bool, str]] = {
    (GPT2,): {False: "gpt-2"},
    (r"\p{N}", GPT2): {False: "smollm"},
    (LLAMA3,): {True: "llama-bpe", False: "smaug-bpe"},
    (QWEN2,): {False: "qwen2"},
    (QWEN35,): {False: "qwen35"},
    (TEKKEN,): {True: "tekken", False: "tekken"},
    (GPT4O,): {False: "gpt-4o"},
    DEEPSEEK3: {False: "deepseek-v3"},
}
"""Expressions in their order -> whether a word that is a token is taken without merging (`ignore_merges`) -> llama.cpp's name."""


class TokenType(IntEnum):
    """What llama.cpp makes of a token: `CONTROL` is shown as nothing, `USER_DEFINED` is found whole in text and shown."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer; `tokens`, `types` and `scores` have an entry for each row of the embedding."""

    model: str  # llama.cpp's: gpt2 for BPE over bytes, llama for SentencePiece
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)  # of gpt2
    scores: list[float] = field(default_factory=list)  # of llama
    special: dict[str, int] = field(default_factory=dict)  # eos, bos, padding, ... -> token id
    flags: dict[str, bool] = field(default_factory=dict)  # add_bos_token, add_space_prefix, ...
    ends: tuple[int, ...] = ()  # every token that ends a completion
    chat_template: str | None = None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, *, num_rows: int, ends: Iterable[int], name: str) -> Vocabulary:
    """The tokenizer for a model with so many rows in its embedding.

    Args:
        ends: ids of all tokens that end a completion.
        name: of the model, for errors.

    Raises:
        ValueError: llama.cpp would read text otherwise than this tokenizer.
    """
    try:
        stored = json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError:
        raise _refused(name, f"is a {type(tokenizer).__name__} without a tokenizer.json") from None
    model = stored["model"]
    if model["type"] != "BPE":
        raise _refused(name, f"is of the type {model['type']}, and only BPE is written")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refused(name, f"has {option} {model[option]!r}, which llama.cpp has not")
    tokens, types = _tokens(tokenizer, num_rows, name)
    common: dict[str, Any] = {
        "special": _special(tokenizer),
        "ends": tuple(ends),
        "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    }
    if model.get("byte_fallback"):
        return _sentencepiece(stored, tokenizer, tokens, types, common, name)
    pre = pre_tokenizer_of(stored, name=name)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, flags=_adds(tokenizer), **common)


def _refused(name: str, problem: str) -> ValueError:
    return ValueError(
        f"--to is gguf; the tokenizer of {name} {problem}. llama.cpp would read prompts otherwise than the model learned "
        "them. Export a plain folder with --to folder."
    )


# --- tokens ---------------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: PreTrainedTokenizerBase, num_rows: int, name: str) -> tuple[list[str], list[TokenType]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= num_rows:
        raise _refused(
            name, f"has a token {max(by_id)} ({by_id[max(by_id)]!r}), and the model {num_rows} rows for tokens"
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(num_rows):
        token = by_id.get(number)
        if token is None or token == f"[PAD{number}]":  # a tokenizer that was read from GGUF has these as tokens
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number not in added:
            kind = TokenType.BYTE if BYTE.fullmatch(token) else TokenType.NORMAL
        elif number == tokenizer.unk_token_id and number not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            kind = TokenType.UNKNOWN
        elif added[number].special or LOOKS_SPECIAL.fullmatch(token):
            kind = TokenType.CONTROL
        else:
            token, kind = token.replace("▁", " "), TokenType.USER_DEFINED
        tokens.append(token)
        types.append(kind)
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise _refused(name, f"would have the token {token!r} {times} times, and llama.cpp wants each once")
    return tokens, types


BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d+>|<pad>|<mask>|<2mass>|\[@BOS@\]")
"""What llama.cpp takes for control tokens though a tokenizer does not mark them as special."""


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: number for name, number in ids.items() if number is not None}


def _adds(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Which tokens it puts around a text, found by trying."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": False,  # also of a tokenizer that appends one: a prompt goes on
    }


# --- splitting ------------------------------------------------------------------------------------------------------------


def pre_tokenizer_of(stored: dict[str, Any], *, name: str) -> str:
    """llama.cpp's name of what a tokenizer.json does to text before BPE.

    Raises:
        ValueError: llama.cpp has nothing that does the same.
    """
    for step in _steps(stored["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # llama.cpp takes text as it comes; composed characters are what people type
            raise _refused(name, f"normalises text by {step['type']}, which llama.cpp does not")
    expressions: list[str] = []
    for step in _steps(stored["pre_tokenizer"], "pretokenizers"):
        expressions += _expressions(step, name)
    ignores = bool(stored["model"].get("ignore_merges"))
    found = BY_EXPRESSIONS.get(tuple(expressions), {})
    if ignores not in found:
        rule = f"{' then '.join(expressions) or 'nothing'}, ignore_merges {ignores}"
        raise _refused(name, f"splits text by another rule than any that llama.cpp has ({rule})")
    return found[ignores]


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _expressions(step: dict[str, Any], name: str) -> list[str]:
    """What one step splits text by; ByteLevel also turns bytes into characters, as llama.cpp does for every BPE."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2] if step["use_regex"] else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    pattern = step.get("pattern", {})
    if (
        step["type"] == "Split"
        and not step["invert"]
        and step["behavior"] in ("Isolated", "Removed")
        and "Regex" in pattern
    ):
        return [pattern["Regex"]]
    raise _refused(
        name, f"splits text by another rule than any that llama.cpp has ({json.dumps(step, ensure_ascii=False)})"
    )


# --- SentencePiece --------------------------------------------------------------------------------------------------------


def _sentencepiece(
    stored: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[str],
    types: list[TokenType],
    common: dict[str, Any],
    name: str,
) -> Vocabulary:
    """BPE over characters with ▁ for spaces, whose unknown characters become bytes: llama.cpp merges by scores."""
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in stored["model"]["merges"]]
    scores = scores_of(tokens, merges)
    space = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0].startswith("▁")
    pieces = Pieces({token: number for number, token in enumerate(tokens)}, scores, add_space_prefix=space)
    wrong = differs(pieces, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    if wrong is not None:
        raise _refused(name, f"does not merge as SentencePiece does: {wrong}")
    flags = {"add_space_prefix": space, **_adds(tokenizer)}
    return Vocabulary("llama", "default", tokens, types, scores=scores, flags=flags, **common)
