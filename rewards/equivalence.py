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
from sympy import (
    Add,
    Expr,
    FiniteSet,
    Float,
    Function,
    Mul,
    Pow,
    Rational,
    Tuple,
    cosh,
    exp,
    factorial,
    gamma,
    log,
    sinh,
)
from sympy.functions.elementary.hyperbolic import HyperbolicFunction
from sympy.functions.elementary.trigonometric import TrigonometricFunction

from .extraction import has_disguise, is_prose, last_box

MAX_CHARS = 256  # the longest gold answer of MATH, OlympiadBench and Minerva has 210
MAX_DEPTH = 6  # of nested brackets; those golds have 5, and math-verify takes seconds from 9
MAX_BARS = 6  # absolute values; a parser that may pair bars as it likes takes a second for twelve
MAX_BITS = 200_000  # of the numbers in an expression: 9999^9999 and 10000! are allowed

# math-verify's own time limit is signal.alarm, which fails outside the main thread and cannot stop C code; it is off
# everywhere here, and math-verify would warn of that once in every process.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_HUGE = 2.0**60
_FAST_GROWING = (factorial, exp, sinh, cosh, gamma)
_SYMBOLS = frozenset("×÷·−π√∞°±≤≥≠∪∩αβγδθλμφω€£¥")  # beyond ASCII, what an answer may hold
_MINUS = "\N{MINUS SIGN}"
_MEANINGLESS = re.compile(
    r",\\!\s*|\{,\}|\\[!,;:]|\\?[$€£¥]|\\[\[\]()]|\\phantom(?:\s*-|\{[^{}]*\})"
    r"|\\(?:displaystyle|left(?=[(\[|\\.])|right(?=[)\]|\\.]))"
)
_COMMAND = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it))\s*"
_TEXT = rf"{_COMMAND}\{{([^{{}}]*)\}}"
_TEXT_WITH_DIGITS = re.compile(rf"{_COMMAND}\{{[^{{}}]*[0-9]")
_UNIT = rf"{_COMMAND}\{{[^{{}}0-9]*\}}"  # without digits: in "18 \text{ or 19}" the text is a second answer
_TRAILING_TEXT = re.compile(rf"(?:(?:[\s~/]|\\ )*{_UNIT}(?:\^\{{?[0-9]\}}?)?)+$")
_LEADING_TEXT = re.compile(rf"^{_UNIT}")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)$")
_BARE_FRAC = re.compile(r"\\frac\s*(\{[^{}]*\}|[0-9a-zA-Z]|\\pi(?![a-zA-Z]))\s*([0-9a-zA-Z]|\\pi(?![a-zA-Z]))")
_EQUALS = re.compile(r"(?<![\\<>!:])=")
_LIST = re.compile(r",(?!\d{3})|;|\b(?:or|and)\b")
_JUXTAPOSED = re.compile(r"\d\s+\d")  # "1 2 3" would be read as their product
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<number>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?[0-9]{{1,2}})|\s*/\s*(?P<over>{_UNSIGNED})"
    r"|\s*(?:\\times|\\cdot|[*×·])\s*10\s*\^\s*(?:\{\s*(?P<braced>[-+]?[0-9]{1,2})\s*\}|(?P<power>[-+]?[0-9]{1,2})))?"
    rf"|\\frac\s*\{{\s*(?P<top>{_UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_UNSIGNED})\s*\}})"
    r"\s*(?P<percent>\\?%)?"
)
_WORDS = re.compile(r"[a-zA-Z ,.()'\-]+")
_NOT_WORKED_OUT = re.compile(  # an operation between two numbers, but for powers of ten: 1.45 \times 10^{-5}
    r"[0-9)\]}]\s*(?:[-+/÷]|\\div(?![a-zA-Z])|(?:[*×·]|\\times|\\cdot)(?![a-zA-Z]|\s*10\s*\^))[-+\s(\[{]*(?:\\frac|\.?[0-9])"
)
_WORKED_OUT_WHEN_READ = re.compile(
    r"\\(?:gcd|lcm|Gamma|sum|prod|int|lim)(?![a-zA-Z])"
    r"|\\[dt]?binom(?!\s*\{\s*\d{1,4}\s*\}\s*\{\s*\d{1,4}\s*\}|\s*\{\s*[a-df-z]\s*\}\s*\{\s*[a-df-z]\s*\})"  # e is a number
    r"|(?:\d{4}|\^[^!]*\^)[^!]*[)\]}|]\s*!"  # the factorial of a tower
    r"|\^[\s{(-]*\d{6}|\\l(?:og|n)(?![a-zA-Z]).*\d{6}|\d{6}.*\\l(?:og|n)(?![a-zA-Z])"
    r"|\\sqrt\s*\[[^\]]*(?:\d{5}|[\^!*]|\\cdot|\\times)"
)


@dataclass(frozen=True)
class Number:
    """A plain number: 3/4, 1,000.5, 20%."""

    value: Fraction  # as written: 20 for "20%"
    is_percent: bool
    is_quotient: bool = False


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
    if has_disguise(text):
        return "it has digits other than 0 to 9, or invisible characters"
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
    """Whether a candidate answer is the gold answer. Numbers and words exactly; a decimal for a root to 6 places.

    Where a number is asked for, arithmetic that is not worked out is no answer: a model that is paid for "4 + 3 * 4" leaves the
    arithmetic to the grader, and stops thinking. A fraction is a number, unless it is a whole one.
    """
    if len(candidate) > 2 * MAX_CHARS or has_disguise(candidate):  # before any regex sees it
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
        is_worked_out = not number.is_quotient or gold.number.value.denominator > 1
        return is_worked_out and same_number(gold.number, number)
    if gold.number is not None and _NOT_WORKED_OUT.search(text):
        return False
    if number is not None:
        text = text.rstrip("\\% ")  # math-verify takes "50%" for 50 and for 0.5
    if _JUXTAPOSED.search(text) or _TEXT_WITH_DIGITS.search(text):
        return False
    if not text or not is_readable(text) or not is_plain_script(text):
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
    value = numerator / denominator * Fraction(10) ** int(match["exponent"] or match["braced"] or match["power"] or 0)
    is_quotient = match["over"] is not None or match["bottom"] is not None
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None, is_quotient)


def same_number(gold: Number, candidate: Number) -> bool:
    """Equal as written, or a gold percentage divided by 100.

    A percent sign is a unit like any other, as data sets leave it out: 20% is 20, and not 0.2, or it would be paid under both.
    Where the gold answer is 20%, so are 20 and 0.2.
    """
    return candidate.value == gold.value or (
        gold.is_percent and not candidate.is_percent and candidate.value == gold.value / 100
    )


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
    is_small = len(text) <= MAX_CHARS and deepest <= MAX_DEPTH and text.count("|") <= MAX_BARS
    return is_small and text.isprintable() and not _WORKED_OUT_WHEN_READ.search(text)


def is_plain_script(text: str) -> bool:
    """Whether a text is ASCII and usual symbols: a letter that only looks like x is another symbol to a parser."""
    return all(character.isascii() or character in _SYMBOLS for character in text)


@lru_cache(maxsize=1024)  # the wrong answers of a group repeat each other
def _same_mathematics(gold: str, candidate: str, *, units: bool) -> bool:
    """Whether math-verify can read both normalised texts and finds them equal; False if it cannot read one."""
    return any(
        verify(a, b, timeout_seconds=None) and _same_size(a, b)
        for a in _parse(gold, units)
        for b in _parse(candidate, units)
    )


def _same_size(gold: Any, candidate: Any) -> bool:
    """Whether the numbers of two expressions agree to five digits.

    math-verify compares decimals to six places after the point, where everything below 5e-7 is zero.
    """
    try:
        pairs = list(zip(_numbers(gold), _numbers(candidate), strict=False))
    except Exception:  # sympy's own errors, about a sine of infinity and the like: no value, so not the same one
        return False
    # inf == inf; but where only one is infinite, math-verify may find anything equal to it
    return all(a == b or abs(a - b) <= 1e-5 * max(abs(a), abs(b)) < math.inf for a, b in pairs)


def _numbers(expression: Any) -> list[complex]:
    """The values of an expression without symbols, or of the members of a set or tuple of such, in order of size."""
    if isinstance(expression, (Tuple, FiniteSet)):
        return sorted((n for part in expression.args for n in _numbers(part)), key=lambda n: (n.real, n.imag))
    return [complex(expression)] if isinstance(expression, Expr) and expression.is_number else []


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

    What sympy may multiply out (a sum of symbols or a sine raised to a power) or factor (a large number under a root or in a
    logarithm) counts as a large number.
    """
    if isinstance(expression, Rational):
        return float(int(expression.p).bit_length() + int(expression.q).bit_length())
    if isinstance(expression, Pow):
        base, exponent = expression.args
        terms = 1_000.0 if isinstance(base, Add) and base.free_symbols else 5_000.0 if base.has(Function) else 1.0
        factoring = 1 if exponent.is_Integer else 3  # sympy looks for factors to take out of a root
        times = _magnitude(exponent)
        return max(num_bits(base), 1.0) ** factoring * times * (terms if times > 1 else 1.0)
    if isinstance(expression, log):
        return num_bits(expression.args[0]) ** 3
    if isinstance(expression, _FAST_GROWING):
        return max(
            num_bits(expression.args[0]), 20 * _magnitude(expression.args[0])
        )  # log2(n!) < n log2(n) = 20 n at 10^6
    if isinstance(
        expression, (TrigonometricFunction, HyperbolicFunction)
    ):  # sin(1000 x) has an expansion of 1000 terms
        multiple, angle = expression.args[0].as_coeff_Mul()
        return num_bits(expression.args[0]) + (_magnitude(multiple) ** 2 if angle != 1 else 0.0)
    return 1.0 + sum(num_bits(part) for part in getattr(expression, "args", ()))


def _magnitude(expression: Any) -> float:
    """An upper bound of a number's absolute value, from 1 to 2^60; a symbol counts as 4, as pi does."""
    if isinstance(expression, Rational):
        return min(max(abs(int(expression.p)) // int(expression.q), 1), _HUGE)
    if isinstance(expression, Float):
        return min(max(abs(float(expression)), 1.0), _HUGE)
    sizes = [_magnitude(part) for part in getattr(expression, "args", ())]
    if isinstance(expression, Pow):
        return 2.0 ** min(math.log2(sizes[0]) * sizes[1], 60.0)
    if isinstance(expression, _FAST_GROWING):
        return 2.0 ** min(20 * sizes[0], 60.0)
    return min(math.prod(sizes) if isinstance(expression, Mul) else sum(sizes) + 4.0, _HUGE)
