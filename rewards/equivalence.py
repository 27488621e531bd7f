r"""Is this candidate the gold answer?

Plain numbers (integers, decimals, fractions, thousands commas, currency, percent) and words are compared exactly, without
sympy; everything else goes to math-verify. What no honest answer needs and sympy can drown in (towers of powers, huge
exponents, deep nesting, anything long) is turned away before.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from rewards.extraction import is_prose, last_box

MAX_CHARS = 256  # the longest gold answer of MATH, OlympiadBench and Minerva has 210
MAX_DEPTH = 12  # nested brackets
MAX_EXPONENT_DIGITS = 4

# Their time limit is signal.alarm, which fails outside the main thread and cannot stop C code. Ours kills the worker.
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn once per process that the limit is off

_REMOVE = re.compile(
    r",\\!\s*|\{,\}|\\[!,;:]|\\phantom(?:\s*-|\{[^{}]*\})|\\?[$€£¥]|\\[\[\]()]|\\(?:displaystyle|left(?=[(\[|\\.])|right(?=[)\]|\\.]))"
)
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it))\s*\{([^{}]*)\}"
_BARE_FRAC = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9a-zA-Z]|\\pi(?![a-zA-Z]))\s*([0-9a-zA-Z]|\\pi(?![a-zA-Z]))")
_TRAILING_TEXT = re.compile(rf"(?:(?:[\s~/]|\\ )*{_TEXT}(?:\^\{{?\d\}}?)?)+$")
_LEADING_TEXT = re.compile(rf"^{_TEXT}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)$")
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<number>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?\d{{1,2}})|\s*/\s*(?P<over>{_UNSIGNED}))?"
    rf"|\\frac\s*\{{\s*(?P<top>{_UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_UNSIGNED})\s*\}})"
    r"\s*(?P<percent>\\?%)?"
)
_WORDS = re.compile(r"[a-zA-Z ,.()'\-]+")
_POWER = r"(?:\^|\*\*)[\s{(]*-?\s*"
_EQUALS = re.compile(r"(?<![\\<>!:])=|\\approx")
_JUXTAPOSED = re.compile(r"\d\s+\d")  # "1 2 3" would be read as their product
_EXPLOSIVE = re.compile(
    rf"{_POWER}\d{{{MAX_EXPONENT_DIGITS + 1}}}"  # 2^{99999}
    rf"|{_POWER}\d+[\s)}}]*(?:{_POWER}|!)"  # 9^{9^9}, 9^{9!}
    rf"|{_POWER}[({{\s]*\d+\s*(?:\*|\\cdot|\\times)"  # 9^{9*9*9*9}
    r"|\d{5}[\s)}]*!|![\s)}]*!"  # 99999!, 9!!
    r"|\\[dt]?binom\s*\{\s*\d{5}"
    r"|\\(?:sum|prod|int|lim)(?![a-zA-Z])"
)


@dataclass(frozen=True)
class Number:
    """A plain number: 3/4, 1,000.5, 20%."""

    value: Fraction  # as written: 20 for "20%"
    is_percent: bool


@dataclass(frozen=True)
class Gold:
    """A gold answer, ready to be compared with."""

    text: str  # normalised LaTeX
    number: Number | None
    words: tuple[str, ...] | None


def normalise(text: str) -> str:
    r"""LaTeX without what does not change its value: delimiters, spacing, currency, thousands marks, units, a full stop.

    `normalise(r"\$12{,}000 \text{ dollars}.")` is `12000`.
    """
    text = _REMOVE.sub("", text.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).strip()
    text = _BARE_FRAC.sub(lambda match: f"\\frac{{{match[1].strip('{}')}}}{{{match[2]}}}", text)
    text = text.removesuffix(".").removeprefix("\\approx").strip()
    for unit in (_TRAILING_TEXT, _LEADING_TEXT, _DEGREES):
        shorter = unit.sub("", text).strip()
        text = shorter if any(character.isdigit() for character in shorter) else text
    return text


def plain_number(text: str) -> Number | None:
    """The number that the whole of a normalised text spells, exactly; None if it is anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    top = match["number"] or match["top"]
    bottom = match["over"] or match["bottom"] or "1"
    numerator, denominator = Fraction(top.replace(",", "")), Fraction(bottom.replace(",", ""))
    if denominator == 0:
        return None
    value = numerator / denominator * Fraction(10) ** int(match["exponent"] or 0)
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)


def same_number(a: Number, b: Number) -> bool:
    """Equal as written, or equal once the percent sign that only one of them has is worked in: 20% is 20 and is 0.2."""
    if a.value == b.value:
        return True
    return a.is_percent != b.is_percent and (a.value / 100 if a.is_percent else a.value) == (
        b.value / 100 if b.is_percent else b.value
    )


def plain_words(text: str) -> tuple[str, ...] | None:
    r"""The words of an answer that is nothing but words, such as `\text{(C)}` or "two lines"; None for mathematics."""
    unwrapped = re.sub(_TEXT, r"\1", text)
    if not _WORDS.fullmatch(unwrapped) or not (unwrapped != text or is_prose(text)):
        return None
    return tuple(re.findall(r"[a-z]+", unwrapped.lower()))


def is_safe(text: str) -> bool:
    """Whether a text is short, shallow and small enough to be given to sympy."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return len(text) <= MAX_CHARS and deepest <= MAX_DEPTH and text.isprintable() and not _EXPLOSIVE.search(text)


@lru_cache(maxsize=1024)  # one gold answer meets all the completions of its group
def _parse(text: str, units: bool) -> tuple[Any, ...]:
    """The sympy expressions that math-verify reads in a normalised text; empty if it can make nothing of it.

    Only the one pattern for the whole text is tried: a looser one would find a second candidate inside it.
    """
    whole = LatexExtractionConfig(boxed_match_priority=0)
    if not units:  # math-verify would take the t of "5t" for tonnes
        whole = replace(whole, normalization_config=replace(whole.normalization_config, units=False))
    parsed = parse(f"\\boxed{{{text}}}", [whole], extraction_mode="first_match", parsing_timeout=None)
    return tuple(expression for expression in parsed if not isinstance(expression, str))


@lru_cache(maxsize=1024)
def read_gold(answer: str) -> Gold | str:
    """A gold answer made ready, or the reason why it cannot be graded."""
    boxed = last_box(answer)
    text = normalise(answer if boxed is None else boxed)
    number, words = plain_number(text), plain_words(text)
    if not text:
        return "it is empty"
    if number is not None or words is not None:
        return Gold(text, number, words) if len(text) <= MAX_CHARS else f"it is longer than {MAX_CHARS} characters"
    if not is_safe(text):
        return "it is too long, too deeply nested, or has powers too large to work out"
    if is_prose(text):
        return "it is prose, not one expression"
    gold = Gold(text, None, None)
    return gold if is_equivalent(text, gold) else "math-verify cannot parse it"


def is_equivalent(candidate: str, gold: Gold) -> bool:
    """Whether a candidate answer is the gold answer. Numbers and words exactly; a decimal for a root to 6 places."""
    if len(candidate) > 2 * MAX_CHARS:  # before any regex sees it
        return False
    text = normalise(candidate)
    if "=" not in gold.text:
        text = normalise(_EQUALS.split(text)[-1])  # "9 * 2 = 18" says 18
    if gold.words is not None:
        return plain_words(text if text.isalpha() is False else f"\\text{{{text}}}") == gold.words
    number = plain_number(text)
    if gold.number is not None and number is not None:
        return same_number(gold.number, number)
    if not text or not is_safe(text) or _JUXTAPOSED.search(text):
        return False
    units = gold.number is not None
    return verify(list(_parse(gold.text, units)), list(_parse(text, units)), timeout_seconds=None)
