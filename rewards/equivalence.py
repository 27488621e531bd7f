r"""Is this candidate the gold answer?

Plain numbers (integers, decimals, fractions, thousands commas, currency, percent) and words are compared exactly,
without sympy; everything else goes to math-verify. What no honest answer needs and sympy can drown in (anything long,
deep nesting, numbers of 60,000 digits) is turned away first. That guard saves time but is no time limit: set one around.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Add, Float, Mul, Pow, Rational, factorial

from rewards.extraction import is_prose, last_box

MAX_CHARS = 256  # the longest gold answer of MATH, OlympiadBench and Minerva has 210
MAX_DEPTH = 6  # of nested brackets; those golds have 5, and math-verify takes seconds from 9
MAX_BITS = 200_000  # of the numbers in an expression: 9999^9999 and 10000! are allowed

# math-verify's own time limit is signal.alarm, which fails outside the main thread and cannot stop C code; it is off
# everywhere here, and math-verify would warn of that once in every process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_HUGE = 2.0**60
_MINUS = "\N{MINUS SIGN}"
_MEANINGLESS = re.compile(
    r",\\!\s*|\{,\}|\\[!,;:]|\\?[$€£¥]|\\[\[\]()]|\\phantom(?:\s*-|\{[^{}]*\})"
    r"|\\(?:displaystyle|left(?=[(\[|\\.])|right(?=[)\]|\\.]))"
)
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it))\s*\{([^{}]*)\}"
_TRAILING_TEXT = re.compile(rf"(?:(?:[\s~/]|\\ )*{_TEXT}(?:\^\{{?\d\}}?)?)+$")
_LEADING_TEXT = re.compile(rf"^{_TEXT}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)$")
_BARE_FRAC = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9a-zA-Z]|\\pi(?![a-zA-Z]))\s*([0-9a-zA-Z]|\\pi(?![a-zA-Z]))")
_EQUALS = re.compile(r"(?<![\\<>!:])=")
_LIST = re.compile(r",(?!\d{3})|;|\b(?:or|and)\b")
_JUXTAPOSED = re.compile(r"\d\s+\d")  # "1 2 3" would be read as their product
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<number>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?\d{{1,2}})|\s*/\s*(?P<over>{_UNSIGNED}))?"
    rf"|\\frac\s*\{{\s*(?P<top>{_UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_UNSIGNED})\s*\}})"
    r"\s*(?P<percent>\\?%)?"
)
_WORDS = re.compile(r"[a-zA-Z ,.()'\-]+")
_WORKED_OUT_WHEN_READ = re.compile(
    r"\\(?:gcd|lcm|Gamma|sum|prod|int|lim)(?![a-zA-Z])"
    r"|\\(?:[dt]?binom\s*\{[^{}]*|sqrt\s*\[[^\]]*)(?:\d{5}|[\^!*]|\\cdot|\\times)"
)


@dataclass(frozen=True)
class Number:
    """A plain number: 3/4, 1,000.5, 20%."""

    value: Fraction  # as written: 20 for "20%"
    is_percent: bool


@dataclass(frozen=True)
class Gold:
    """A gold answer, ready to be compared with. It is a number, or words, or (both None) mathematics."""

    text: str  # normalised
    number: Number | None
    words: tuple[str, ...] | None


@lru_cache(maxsize=1024)  # one gold answer meets all the completions of its group
def read_gold(answer: str) -> Gold | str:
    """A gold answer made ready, or the reason why it cannot be graded."""
    boxed = last_box(answer)
    text = answer if boxed is None else boxed
    if len(text) > 2 * MAX_CHARS:
        return f"it has {len(text)} characters"
    text = normalise(text)
    gold = Gold(text, plain_number(text), plain_words(text))
    if not text:
        return "it is empty"
    if not is_readable(text):
        return "it is too long, too deeply nested, or not worked out"
    if gold.words is None and is_prose(text):
        return "it is prose, not one expression"
    if gold.number is None and gold.words is None and not _same_mathematics(text, text, units=False):
        return "math-verify cannot read it"
    return gold


def is_equivalent(candidate: str, gold: Gold) -> bool:
    """Whether a candidate answer is the gold answer. Numbers and words exactly; a decimal for a root to 6 places."""
    if len(candidate) > 2 * MAX_CHARS:  # before any regex sees it
        return False
    text = normalise(candidate)
    if "=" not in gold.text and not _LIST.search(text):
        text = normalise(_EQUALS.split(text)[-1])  # "9 * 2 = 18" says 18
    if gold.words is not None:
        return plain_words(text, even_one_letter=True) == gold.words
    if text == gold.text:
        return True
    number = plain_number(text)
    if gold.number is not None and number is not None:
        return same_number(gold.number, number)
    if not text or not is_readable(text) or _JUXTAPOSED.search(text):
        return False
    return _same_mathematics(gold.text, text, units=gold.number is not None)


def normalise(text: str) -> str:
    r"""LaTeX without what does not change its value: delimiters, spacing, currency, thousands marks, units, full stop.

    `normalise(r"\$12{,}000 \text{ dollars}.")` is `12000`.
    """
    text = text.replace(_MINUS, "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = " ".join(_MEANINGLESS.sub("", text).split()).strip("*` ").removesuffix(".").strip("*` ")
    exact, _, rounded = text.partition("\\approx")  # "2/3 is about 0.67" is 2/3, "x is about 0.67" is 0.67
    text = (exact if any(character.isdigit() for character in exact) else rounded or exact).strip()
    text = _BARE_FRAC.sub(lambda match: f"\\frac{{{match[1].strip('{}')}}}{{{match[2]}}}", text)
    for unit in (_TRAILING_TEXT, _LEADING_TEXT, _DEGREES):
        shorter = unit.sub("", text).strip()
        text = shorter if any(character.isdigit() for character in shorter) else text
    return text


def plain_number(text: str) -> Number | None:
    """The number that the whole of a normalised text spells, exactly; None if it is anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    numerator = Fraction((match["number"] or match["top"]).replace(",", ""))
    denominator = Fraction((match["over"] or match["bottom"] or "1").replace(",", ""))
    if denominator == 0:
        return None
    value = numerator / denominator * Fraction(10) ** int(match["exponent"] or 0)
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)


def same_number(a: Number, b: Number) -> bool:
    """Equal as written, or, if one of the two is a percentage, equal once it is divided by 100: 20% is 20 and is 0.2."""
    if a.is_percent and not b.is_percent:
        return b.value in (a.value, a.value / 100)
    if b.is_percent and not a.is_percent:
        return a.value in (b.value, b.value / 100)
    return a.value == b.value


def plain_words(text: str, *, even_one_letter: bool = False) -> tuple[str, ...] | None:
    r"""The words of an answer that is nothing but words, such as `\text{(C)}` or "two lines"; None for mathematics.

    A lone "x" is mathematics, unless the gold answer that it is compared with is words.
    """
    unwrapped = re.sub(_TEXT, r"\1", text)
    if not _WORDS.fullmatch(unwrapped) or not (even_one_letter or unwrapped != text or is_prose(text)):
        return None
    return tuple(re.findall(r"[a-z]+", unwrapped.lower()))


def is_readable(text: str) -> bool:
    """Whether a text is short, shallow and plain enough for math-verify to read in a moment."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    is_small = len(text) <= MAX_CHARS and deepest <= MAX_DEPTH
    return is_small and text.isprintable() and not _WORKED_OUT_WHEN_READ.search(text)


@lru_cache(maxsize=1024)  # the wrong answers of a group repeat each other
def _same_mathematics(gold: str, candidate: str, *, units: bool) -> bool:
    """Whether math-verify can read both normalised texts and finds them equal; False if it cannot read one."""
    return verify(list(_parse(gold, units)), list(_parse(candidate, units)), timeout_seconds=None)


@lru_cache(maxsize=1024)
def _parse(text: str, units: bool) -> tuple[Any, ...]:
    """The sympy expressions that math-verify reads in a normalised text; empty if it can make nothing of it.

    Only the one pattern for the whole text is tried: a looser one would find a second candidate inside it.
    """
    whole = LatexExtractionConfig(boxed_match_priority=0)
    if not units:  # math-verify would take the t of "5t" for tonnes
        whole = replace(whole, normalization_config=replace(whole.normalization_config, units=False))
    parsed = parse(f"\\boxed{{{text}}}", [whole], extraction_mode="first_match", parsing_timeout=None)
    return tuple(found for found in parsed if not isinstance(found, str) and num_bits(found) <= MAX_BITS)


def num_bits(expression: Any) -> float:
    """About how many bits the numbers in an expression have once it is worked out: `10^{10^{10}}` has 5e10.

    A sum of symbols raised to a power counts as a large number, since sympy may multiply it out.
    """
    if isinstance(expression, Rational):
        return float(int(expression.p).bit_length() + int(expression.q).bit_length())
    if isinstance(expression, Pow):
        base, times = expression.args[0], _magnitude(expression.args[1])
        terms = 1_000.0 if isinstance(base, Add) and base.free_symbols and times > 1 else 1.0
        return max(num_bits(base), 1.0) * times * terms
    if isinstance(expression, factorial):
        return 20 * _magnitude(expression.args[0])  # log2(n!) < n log2(n), and 20 = log2(1,000,000)
    return 1.0 + sum(num_bits(part) for part in getattr(expression, "args", ()))


def _magnitude(expression: Any) -> float:
    """An upper bound of a number's absolute value, from 1 to 2^60; a symbol counts as 2."""
    if isinstance(expression, Rational):
        return min(max(abs(int(expression.p)) // int(expression.q), 1), _HUGE)
    if isinstance(expression, Float):
        return min(max(abs(float(expression)), 1.0), _HUGE)
    sizes = [_magnitude(part) for part in getattr(expression, "args", ())]
    if isinstance(expression, Pow):
        return 2.0 ** min(math.log2(sizes[0]) * sizes[1], 60.0)
    if isinstance(expression, factorial):
        return 2.0 ** min(20 * sizes[0], 60.0)
    return min(math.prod(sizes) if isinstance(expression, Mul) else sum(sizes) + 2.0, _HUGE)
