r"""Is this candidate the gold answer?

Both are read into typed values (reading.py) and compared by type. Numbers are compared exactly where they are rational, else by
their digits (expressions.py); a decimal may stand for an irrational number if it agrees to six places. Plain numbers take a short
way. A time limit around it is still wanted: the sizes of numbers are bounded, their computation is not timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import mp

from .cleaning import clean
from .expressions import Node, NoValueError, TooLargeError, evaluate, is_real, num, point, same_expression
from .extraction import has_disguise, last_box
from .reading import read
from .values import (
    Based,
    Clock,
    Congruence,
    Either,
    Listing,
    Matrix,
    Named,
    Piece,
    Ratio,
    Record,
    Region,
    Relation,
    Scalar,
    Tuple,
    Unread,
    Value,
    Words,
    as_region,
)
from .vocabulary import UNITS

MAX_CHARS = 256  # the longest gold answer of MATH, OlympiadBench and Minerva has 210
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<number>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?[0-9]{{1,2}})|\s*/\s*(?P<over>{_UNSIGNED}))?"
    rf"|\\frac\s*\{{\s*(?P<top>{_UNSIGNED})\s*\}}\s*\{{\s*(?P<bottom>{_UNSIGNED})\s*\}})"
)
_TIMES_A_POWER_OF_TEN = (num(10, "10"), num(10))


_PLAIN_GOLD = re.compile(r"[0-9]{1,40}(?:\.[0-9]{1,40})?")
_TRUTH = {"T": ("true",), "F": ("false",)}


@dataclass(frozen=True)
class Number:
    """A plain number: 3/4, 1,000.5."""

    value: Fraction
    is_quotient: bool = False


@dataclass(frozen=True)
class Gold:
    """A gold answer, ready to be compared with: its value and, where it is a plain number, that."""

    text: str
    value: Value
    number: Number | None


@lru_cache(maxsize=1024)  # one gold answer meets all the completions of its group
def read_gold(answer: str) -> Gold | str:
    """A gold answer made ready, or the reason why it cannot be graded."""
    if _PLAIN_GOLD.fullmatch(answer):
        return Gold(answer, Scalar(num(Fraction(answer), answer)), plain_number(answer))
    boxed = last_box(answer)
    text = answer if boxed is None else boxed
    if len(text) > 2 * MAX_CHARS:
        return f"it has {len(text)} characters"
    if has_disguise(text):
        return "it has digits other than 0 to 9, or invisible characters"
    text = clean(text)
    if len(text) > MAX_CHARS:
        return f"it has {len(text)} characters"
    value = read(text)
    reason = value.reason if isinstance(value, Unread) else _no_value(value)
    if isinstance(value, Unread) or reason is not None:
        return reason or ""
    return Gold(text, value, plain_number(text))


def _no_value(value: Value) -> str | None:
    for node in _nodes(value):
        try:
            if node.has("const", "inf"):
                continue
            evaluate(node, point(node.symbols, 0))
        except NoValueError as error:
            return f"it has no value: {error}"
        except (TooLargeError, OverflowError):
            return "its numbers are too large"
        except (ArithmeticError, ValueError) as error:
            return f"it has no value: {error}"
    return None


def _nodes(value: Any) -> Iterator[Node]:
    """All expressions inside a value."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _nodes(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _nodes(getattr(value, name))


def is_equivalent(candidate: str, gold: Gold) -> bool:
    """Whether a candidate answer is the gold answer.

    Where a number is asked for, arithmetic that is not worked out is no answer: a model that is paid for "4 + 3 * 4" leaves the
    arithmetic to the grader, and stops thinking. A fraction is a number, unless it is a whole one.
    """
    if len(candidate) > 2 * MAX_CHARS or has_disguise(candidate):  # before any regex sees it
        return False
    if gold.number is not None and "," not in gold.text:  # with one, it may be a list
        number = plain_number(candidate.strip(" \n$*`").removesuffix("."))
        if number is not None:
            is_worked_out = not number.is_quotient or gold.number.value.denominator > 1
            return (is_worked_out and number.value == gold.number.value) or (
                number.value == gold.number.value and clean(candidate) == gold.text
            )
    value = _read_candidate(candidate)
    return value is not None and same_value(gold.value, value)


@lru_cache(maxsize=1024)  # the wrong answers of a group repeat each other
def _read_candidate(candidate: str) -> Value | None:
    text = clean(candidate)
    value = read(text) if len(text) <= MAX_CHARS else Unread("it is too long")
    return None if isinstance(value, Unread) else value


def plain_number(text: str) -> Number | None:
    """The number that the whole of a text spells, exactly; None if it is anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value = Fraction((match["number"] or match["top"]).replace(",", ""))
    over = match["over"] or match["bottom"]
    if over is not None:
        denominator = Fraction(over.replace(",", ""))
        if denominator == 0:
            return None
        value /= denominator
    if match["exponent"] is not None:
        value *= Fraction(10) ** int(match["exponent"])
    return Number(-value if match["sign"] == "-" else value, over is not None)


# ---- by type ---------------------------------------------------------------------------------------------------------


def same_value(gold: Value, candidate: Value) -> bool:
    """Whether two values are equal. The unlike types that may be are in _MIXED; all others are not."""
    if isinstance(gold, Either):
        return any(same_value(reading, candidate) for reading in gold.readings)
    if isinstance(candidate, Either):
        return any(same_value(gold, reading) for reading in candidate.readings)
    for kind, compare in _MIXED:
        if isinstance(gold, kind) or isinstance(candidate, kind):
            verdict = compare(gold, candidate)
            if verdict is not None:
                return bool(verdict)
    if type(gold) is not type(candidate):
        return False
    return bool(_BY_TYPE[type(gold)](gold, candidate))


def _same_scalar(gold: Scalar, candidate: Scalar) -> bool:
    if gold.unit and not candidate.unit and candidate.node.symbols:
        candidate = _with_letters_as_unit(candidate)
    if gold.unit and candidate.unit and gold.unit != candidate.unit:
        return False
    number = _rational(gold.node)
    if number is not None and _is_plain(gold.node) and gold.node != candidate.node:
        is_whole = number.denominator == 1 and not gold.is_percent
        if not _is_worked_out(candidate.node, is_whole=is_whole):
            return False
    if gold.is_percent == candidate.is_percent:
        return _same_number(gold.node, candidate.node)
    if gold.is_percent:
        return _same_number(gold.node, candidate.node) or _same_number(_hundredth(gold.node), candidate.node)
    # no question has both: a number above one was asked for in percent, any other is the number that the percentage is
    asked_in_percent = number is None or abs(number) > 1
    return _same_number(gold.node, candidate.node if asked_in_percent else _hundredth(candidate.node))


def _with_letters_as_unit(value: Scalar) -> Scalar:
    """5m^2 where a unit is asked for: letters behind a number that are units, and no symbols."""
    node, powers = value.node, dict[str, int]()
    while node.op in ("mul", "div"):
        sign = 1 if node.op == "mul" else -1
        node, factor = node.parts
        letter, power = (factor.parts[0], factor.parts[1].number) if factor.op == "pow" else (factor, Fraction(1))
        name = UNITS.get(letter.name) if letter.op == "sym" else None
        if name is None or power.denominator != 1 or not power:
            return value
        powers[name] = powers.get(name, 0) + sign * int(power)
    return value if node.symbols else Scalar(node, tuple(sorted(powers.items())), value.is_percent)


def _hundredth(node: Node) -> Node:
    return Node("div", (node, num(100)))


def _same_number(gold: Node, candidate: Node) -> bool:
    return same_expression(gold, candidate) or _agrees_to_six_places(gold, candidate)


def _agrees_to_six_places(gold: Node, candidate: Node) -> bool:
    """Whether one is a decimal and the other an irrational number that rounds to it, in five significant digits at least."""
    if gold.symbols or candidate.symbols or _is_decimal(gold) == _is_decimal(candidate):
        return False
    try:
        a, b = evaluate(gold, {}), evaluate(candidate, {})
    except (ArithmeticError, ValueError):
        return False
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return False
    if not (is_real(a) and is_real(b)):
        return False
    x, y = (value if isinstance(value, Fraction) else Fraction(mp.nstr(value.real, 40)) for value in (a, b))
    return abs(x - y) <= Fraction(1, 10**6) and abs(x - y) <= abs(x) / 10**5


def _is_decimal(node: Node) -> bool:
    if node.op == "neg":
        return _is_decimal(node.parts[0])
    return node.op == "num" and "." in node.name


@lru_cache(maxsize=1024)
def _rational(node: Node) -> Fraction | None:
    if node.symbols:
        return None
    try:
        value = evaluate(node, {})
    except (ArithmeticError, ValueError):
        return None
    return value if isinstance(value, Fraction) else None


def _is_worked_out(node: Node, *, is_whole: bool) -> bool:
    """Whether a tree is a number as one writes it down, with no arithmetic left to do but powers, roots and factorials."""
    if node.op in ("num", "sym", "const"):
        return True
    if node.op == "div":
        return not is_whole and not node.name and all(_is_written_number(part) for part in node.parts)
    if node.op == "mul":
        factor, power = node.parts
        return _is_written_number(factor) and power.op == "pow" and power.parts[0] in _TIMES_A_POWER_OF_TEN
    return node.op != "add" and all(_is_worked_out(part, is_whole=False) for part in node.parts)


def _is_plain(node: Node) -> bool:
    return _is_written_number(node) or (node.op == "div" and all(_is_written_number(part) for part in node.parts))


def _is_written_number(node: Node) -> bool:
    return node.op == "num" or (node.op == "neg" and _is_written_number(node.parts[0]))


def _same_items(gold: Sequence[Value], candidate: Sequence[Value]) -> bool:
    return len(gold) == len(candidate) and all(map(same_value, gold, candidate))


def _same_listing(gold: Listing, candidate: Listing) -> bool:
    """The same members, however often they are named."""
    if len(gold.items) != len(candidate.items):
        return False
    left = list(candidate.items)
    for item in gold.items:
        match = next((at for at, other in enumerate(left) if same_value(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_region(gold: Region, candidate: Region) -> bool:
    if gold.name and candidate.name and gold.name != candidate.name:
        return False
    if len(gold.pieces) != len(candidate.pieces):
        return False
    left = list(candidate.pieces)
    for piece in gold.pieces:
        match = next((at for at, other in enumerate(left) if _same_piece(piece, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_piece(gold: Piece, candidate: Piece) -> bool:
    ends = (gold.is_low_closed, gold.is_high_closed) == (candidate.is_low_closed, candidate.is_high_closed)
    return ends and _same_number(gold.low, candidate.low) and _same_number(gold.high, candidate.high)


def _same_relation(gold: Relation, candidate: Relation) -> bool:
    """Whether left minus right is a constant multiple of the other's; a positive one for an inequality."""
    if gold.sign != candidate.sign:
        return False
    a, b = (Node("add", (each.left, Node("neg", (each.right,)))) for each in (gold, candidate))
    names = a.symbols
    if not names or names != b.symbols:
        return False
    try:
        x, y = (evaluate(node, point(names, 0)) for node in (a, b))
        factor = num(Fraction(x) / Fraction(y)) if isinstance(x, Fraction) and isinstance(y, Fraction) else None
    except (ArithmeticError, ValueError):
        return False
    if factor is None:  # irrational coefficients: as written, or with both sides swapped in sign
        return same_expression(a, b) or (gold.sign != "<" and same_expression(a, Node("neg", (b,))))
    is_allowed = factor.number > 0 or (factor.number != 0 and gold.sign in ("=", "!="))
    return is_allowed and same_expression(a, Node("mul", (factor, b)))


def _same_congruence(gold: Congruence, candidate: Congruence) -> bool:
    if (gold.name and candidate.name and gold.name != candidate.name) or not _same_number(
        gold.modulus, candidate.modulus
    ):
        return False
    if _same_number(gold.residue, candidate.residue):
        return True
    a, b, modulus = (_rational(node) for node in (gold.residue, candidate.residue, gold.modulus))
    return None not in (a, b) and bool(modulus) and ((a - b) / modulus).denominator == 1  # type: ignore[operator]


def _same_ratio(gold: Ratio, candidate: Ratio) -> bool:
    pairs = list(zip(gold.parts, candidate.parts, strict=False))
    first_a, first_b = pairs[0]
    return len(gold.parts) == len(candidate.parts) and all(
        same_expression(Node("mul", (a, first_b)), Node("mul", (b, first_a))) for a, b in pairs[1:]
    )


def _same_named(gold: Named, candidate: Named) -> bool:
    if gold.name == candidate.name:
        return same_value(gold.value, candidate.value)
    a, b = _as_relation(gold), _as_relation(candidate)
    return a is not None and b is not None and bool(a.right.symbols) and _same_relation(a, b)


def _as_relation(value: Value) -> Relation | None:
    if isinstance(value, Relation):
        return value
    if isinstance(value, Named) and value.symbol is not None and isinstance(value.value, Scalar):
        return Relation(value.symbol, "=", value.value.node)
    return None


_BY_TYPE: dict[type, Callable[[Any, Any], bool]] = {
    Scalar: _same_scalar,
    Based: lambda a, b: a.number == b.number,
    Listing: _same_listing,
    Tuple: lambda a, b: a.bracket == b.bracket and _same_items(a.items, b.items),
    Named: _same_named,
    Record: lambda a, b: (
        [entry.name for entry in a.entries] == [entry.name for entry in b.entries]
        and _same_items([entry.value for entry in a.entries], [entry.value for entry in b.entries])
    ),
    Region: _same_region,
    Relation: _same_relation,
    Congruence: _same_congruence,
    Matrix: lambda a, b: a.kind == b.kind and len(a.rows) == len(b.rows) and all(map(_same_items, a.rows, b.rows)),
    Clock: lambda a, b: (a.hour, a.minute) == (b.hour, b.minute) and (a.half == b.half or "" in (a.half, b.half)),
    Ratio: _same_ratio,
    Words: lambda a, b: a.words == b.words,
}


# ---- of two types: None leaves the verdict to the next rule -----------------------------------------------------------


def _relation_and_name(gold: Value, candidate: Value) -> bool | None:
    a, b = _as_relation(gold), _as_relation(candidate)
    return _same_relation(a, b) if a is not None and b is not None else None


def _named_and_plain(gold: Value, candidate: Value) -> bool | None:
    """A name may be left out, or added to a value in which it does not occur."""
    if isinstance(gold, Named) and not isinstance(candidate, Named | Region | Relation | Congruence):
        return same_value(gold.value, candidate)
    if isinstance(candidate, Named) and not isinstance(gold, Named | Region | Relation | Congruence):
        return candidate.name not in _symbols(gold) and same_value(gold, candidate.value)
    return None


def _symbols(value: Value) -> frozenset[str]:
    return frozenset[str]().union(*(node.symbols for node in _nodes(value)))


def _region_and_brackets(gold: Value, candidate: Value) -> bool | None:
    a, b = as_region(gold), as_region(candidate)
    return _same_region(a, b) if a is not None and b is not None else None


def _ordered(value: Value) -> Sequence[Value] | None:
    """The members of what has an order: a point, a column, named values by their names, a bare list as it stands."""
    if isinstance(value, Tuple) and value.bracket == "(":
        return value.items
    if isinstance(value, Matrix) and value.kind == "matrix" and all(len(row) == 1 for row in value.rows):
        return [row[0] for row in value.rows]
    if isinstance(value, Record):
        return [entry.value for entry in value.entries]
    return value.items if isinstance(value, Listing) and value.kind == "list" else None


def _both_ordered(gold: Value, candidate: Value) -> bool | None:
    if type(gold) is type(candidate):
        return None
    a, b = _ordered(gold), _ordered(candidate)
    return _same_items(a, b) if a is not None and b is not None else None


def _base_and_number(gold: Value, candidate: Value) -> bool | None:
    """Digits in a base are that number; where they are the gold answer, the bare digits will do, but not the decimal number."""
    if isinstance(gold, Based) and isinstance(candidate, Scalar):
        sign, node = ("-", candidate.node.parts[0]) if candidate.node.op == "neg" else ("", candidate.node)
        return node.op == "num" and sign + node.name == gold.digits and not candidate.unit
    if isinstance(candidate, Based) and isinstance(gold, Scalar):
        return _rational(gold.node) == candidate.number and not gold.unit
    return None


def _residue_and_number(gold: Value, candidate: Value) -> bool | None:
    if isinstance(gold, Congruence) and isinstance(candidate, Scalar):
        return _same_number(gold.residue, candidate.node) and not candidate.unit
    if isinstance(candidate, Congruence) and isinstance(gold, Scalar):
        return _same_number(gold.node, candidate.residue) and not gold.unit
    return None


def _choice_and_letter(gold: Value, candidate: Value) -> bool | None:
    """The letter of a choice, in lower case or as a symbol; T for true and F for false."""
    letter = candidate.node.name if isinstance(candidate, Scalar) and candidate.node.op in ("sym", "const") else None
    if isinstance(candidate, Words) and len(candidate.words[0]) == 1:
        letter = candidate.words[0].upper()
    if not isinstance(gold, Words) or letter is None:
        return None
    return (
        (letter,) == gold.words
        if gold.is_choice and isinstance(candidate, Scalar)
        else _TRUTH.get(letter) == gold.words or None
    )


_MIXED: list[tuple[Any, Callable[[Value, Value], bool | None]]] = [
    (Words, _choice_and_letter),
    (Relation, _relation_and_name),
    (Named, _named_and_plain),
    (Region, _region_and_brackets),
    (Based, _base_and_number),
    (Congruence, _residue_and_number),
    (Tuple | Listing | Matrix | Record, _both_ordered),
]
