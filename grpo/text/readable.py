"""How readable a completion is: loops, words in another language, words of two alphabets, long paragraphs, code, broken text.

DeepSeek-R1 (arXiv 2501.12948v1, section 2.3.3) chooses rows for supervised training like this: it keeps right answers, and drops
"chain-of-thought with mixed languages, long paragraphs, and code blocks". Of the cold start (2.3.1) it drops what is not friendly
to a reader; v2 adds repetition. No threshold is published. These are the measures; grpo/rejection/rules.py has the thresholds.

What a word is, and which script a question is in, is as in `aha.other_script`: code, formulas and tags have no words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from grpo.text.aha import HAN, LATIN, other_script, runs_of_other_scripts
from grpo.text.thinking import parts

_TOKENS = re.compile(rf"[{HAN}]|[^\W_{HAN}]+|[^\w\s]")
"""Words, Chinese characters and signs: what a loop is made of."""


def loop_share(text: str, *, size: int = 8, times: int = 3) -> float:
    """Share of the text, in words and signs, that lies in a run of `size` of them which stands at least `times` times: in [0, 1].

    A solution that is worked out once more to check it repeats each run once, and has no loop at three times. For size=2, times=3
    "a b a b a b c": the runs "a b" (three times), "b a" (twice) and "b c" cover 6 of 7 with "a b" alone: 6/7.
    """
    tokens = _TOKENS.findall(text)
    places: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(tokens) - size + 1):
        places.setdefault(tuple(tokens[start : start + size]), []).append(start)
    covered = {
        place for starts in places.values() if len(starts) >= times for s in starts for place in range(s, s + size)
    }
    return len(covered) / len(tokens) if tokens else 0.0


def language_share(text: str, question: str) -> float | None:
    """Share of the text's words that are in the script of the question; None if it has no words."""
    other = other_script(text, question)
    return None if other is None else 1 - other


CLAUSE = 3
"""Latin words in a row that are a clause of another language, in a text of another script: fewer are names and terms."""


def foreign_words(text: str, question: str) -> list[str]:
    """The text's words in another script than the question's; a run of Chinese characters is one.

    Not counted are words that the question has too (one about the word 你好 may be answered with it), and in a text that is not
    Latin up to two Latin words in a row: 用Python写 is how Chinese is written.
    """
    asked = question.lower()
    found = []
    for run in runs_of_other_scripts(text, question):
        is_han = re.match(f"[{HAN}]", run[0]) is not None
        is_latin = re.match(f"[{LATIN}]", run[0]) is not None
        words = ["".join(run)] if is_han else run
        if not is_latin or len(run) >= CLAUSE:
            found += [word for word in words if word.lower() not in asked]
    return found


_ALPHABETS = (
    ("Latin", re.compile(f"[{LATIN}]")),
    ("Cyrillic", re.compile("[\u0400-\u052f]")),
    ("Hebrew", re.compile("[\u0590-\u05ff]")),
    ("Arabic", re.compile("[\u0600-\u06ff\u0750-\u077f]")),
    ("Devanagari", re.compile("[\u0900-\u097f]")),
    ("Thai", re.compile("[\u0e00-\u0e7f]")),
    ("Korean", re.compile("[\u1100-\u11ff\uac00-\ud7af]")),
)
_LETTERS = re.compile(rf"[^\W\d_{HAN}]{{2,}}")


def mixed_words(text: str) -> list[str]:
    """Words with letters of two alphabets, such as "сheck" with a Cyrillic с.

    Greek beside Latin is how units and variables are written (Δt, μm), and Chinese has no space around a Latin word (用Python写):
    neither counts. In Korean a particle follows a foreign word without space (Python을), so Korean after other letters does not.
    """
    return [word for word in _LETTERS.findall(text) if not word.isascii() and len(_alphabets(word) - {"Korean"}) > 1]


def _alphabets(word: str) -> set[str]:
    return {name for name, letters in _ALPHABETS if letters.search(word)}


def thought(text: str) -> str | None:
    """The thoughts of a completion; None if it has no tags that say which part is thought."""
    cut = parts(text)
    tags = [part for kind, part in cut if kind == "tag"]
    if "<think>" not in tags and "</think>" not in tags:
        return None
    return "".join(part for kind, part in cut if kind == "think")


def num_words(text: str) -> int:
    """Words, numbers and Chinese characters."""
    return sum(token[0].isalnum() for token in _TOKENS.findall(text))


_CODE_BLOCK = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)


def code_blocks(text: str) -> int:
    """Fenced blocks; one that does not end counts as well."""
    return sum(1 for _ in _CODE_BLOCK.finditer(text))


_DISPLAYED = re.compile(
    r"\$\$[^$]*\$\$|\\\[(?:(?!\\[\[\]]).)*\\\]|\\begin\{(\w+\*?)\}(?:(?!\\begin).)*?\\end\{\1\}", re.DOTALL
)  # no scan for an end goes past the next beginning: what never ends costs no more


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph. A line ends it, and so does a displayed formula or a code block."""
    without = _DISPLAYED.sub("\n", _CODE_BLOCK.sub("\n", text))
    return max(map(num_words, without.split("\n")), default=0)


_BROKEN = re.compile(
    "[\ufffd\ufffe\uffff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff\u202a-\u202e\u2066-\u2069]"
)


def broken_characters(text: str, special_tokens: Sequence[str] = ()) -> list[str]:
    """What no reader should see: halves of characters (U+FFFD), control characters and those that turn the direction of writing,
    characters of private use, and the tokenizer's own tokens such as `<|im_start|>`."""
    return _BROKEN.findall(text) + [token for token in special_tokens if token and token in text]
