"""The kinds of value that an answer may be: a number with a unit, a set, an interval, a choice, and so on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from .expressions import Node


@dataclass(frozen=True)
class Unread:
    reason: str


@dataclass(frozen=True)
class Scalar:
    """An expression, perhaps with a unit (its names and powers; empty if none) or a percent sign."""

    node: Node
    unit: tuple[tuple[str, int], ...] = ()
    is_percent: bool = False


@dataclass(frozen=True)
class Based:
    """Digits in a base: 101_2, -0.11_2."""

    digits: str
    base: int

    @property
    def number(self) -> Fraction:
        whole, _, part = self.digits.partition(".")
        return Fraction(int(whole + part, self.base), self.base ** len(part))


@dataclass(frozen=True)
class Listing:
    """Several answers, in no order: "1, 2" (kind list) or {1, 2} (kind set)."""

    items: tuple[Value, ...]
    kind: str = "list"


@dataclass(frozen=True)
class Tuple:
    """Values in an order, in round or square brackets: a point, a vector, an open or closed interval."""

    items: tuple[Value, ...]
    bracket: str = "("


@dataclass(frozen=True)
class Named:
    """A value that is given a name: x = 5, f(x) = 2x."""

    name: str
    value: Value
    symbol: Node | None = None


@dataclass(frozen=True)
class Record:
    """Several named values: x = 1, y = 2."""

    entries: tuple[Named, ...]


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that gives no single name a value: x^2 + y^2 = 4."""

    left: Node
    sign: str  # one of = < <= !=
    right: Node


@dataclass(frozen=True)
class Piece:
    """An interval. Open or closed at its ends, which may be infinite."""

    low: Node
    high: Node
    is_low_closed: bool
    is_high_closed: bool


@dataclass(frozen=True)
class Region:
    """Real numbers: intervals, perhaps of a named variable."""

    pieces: tuple[Piece, ...]
    name: str = ""


@dataclass(frozen=True)
class Congruence:
    """A residue, perhaps of a named variable: x = 3 mod 7."""

    residue: Node
    modulus: Node
    name: str = ""


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Value, ...], ...]
    kind: str = "matrix"  # or determinant


@dataclass(frozen=True)
class Clock:
    """A time of day; `half` is am, pm or empty."""

    hour: int
    minute: int
    half: str = ""


@dataclass(frozen=True)
class Ratio:
    """1:2:3."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Words:
    """Nothing but words, in lower case, or one letter that names a choice."""

    words: tuple[str, ...]
    is_choice: bool = False


@dataclass(frozen=True)
class Either:
    """Two readings of one text: 1,234 is a number, or a list of two."""

    readings: tuple[Value, ...]


Value = (
    Scalar
    | Based
    | Listing
    | Tuple
    | Named
    | Record
    | Relation
    | Region
    | Congruence
    | Matrix
    | Clock
    | Ratio
    | Words
    | Either
)

INFINITY = Node("const", (), "inf")
MINUS_INFINITY = Node("neg", (INFINITY,))
REALS = Region((Piece(MINUS_INFINITY, INFINITY, False, False),))


def as_region(value: Value) -> Region | None:
    """The interval that a pair in brackets may be."""
    if isinstance(value, Region):
        return value
    if isinstance(value, Named):
        inner = as_region(value.value)
        return None if inner is None else replace(inner, name=value.name)
    if isinstance(value, Tuple) and len(value.items) == 2 and all(isinstance(each, Scalar) for each in value.items):
        low, high = (each.node for each in value.items if isinstance(each, Scalar))
        is_closed = value.bracket == "["
        return Region((Piece(low, high, is_closed, is_closed),))
    return None


def all_but(node: Node, name: str) -> Region:
    """All real numbers but one."""
    return Region((Piece(MINUS_INFINITY, node, False, False), Piece(node, INFINITY, False, False)), name)
