"""What values with signs of relation between them say: a named value, an equation, an inequality, a membership."""

from __future__ import annotations

from dataclasses import replace

from .expressions import Node, is_near, same_expression
from .tokens import UnreadError
from .values import (
    INFINITY,
    MINUS_INFINITY,
    Listing,
    Named,
    Piece,
    Record,
    Region,
    Relation,
    Scalar,
    Tuple,
    Value,
    Words,
    all_but,
    as_region,
)


def related(sides: list[Value], signs: list[str]) -> Value:
    if "approx" in signs:
        return _approximated(sides, signs, signs.index("approx"))
    if signs == ["in"]:
        region = as_region(sides[1])
        name = name_of(sides[0])
        if region is None and name is not None and isinstance(sides[1], Listing):
            return Named(name, replace(sides[1], kind="list"))
        if region is None or name is None:
            raise UnreadError("membership of something that is no interval")
        return replace(region, name=name)
    if signs == ["equiv"]:
        return Named("≡" + (name_of(sides[0]) or "?"), sides[1])
    if set(signs) == {"="}:
        return _equated(sides)
    return _inequality(sides, signs)


def _approximated(sides: list[Value], signs: list[str], at: int) -> Value:
    """What stands before the sign; after it, if that is a name: 2/3 is about 0.67, x is about 0.67."""
    if at == 0 and name_of(sides[0]) is not None and len(sides) == 2:
        return _equated(sides)
    exact, rounded = sides[at], sides[-1]
    if at != len(signs) - 1 or not isinstance(exact, Scalar) or not isinstance(rounded, Scalar):
        raise UnreadError("an approximation of something that is no number")
    if not is_near(exact.node, rounded.node):
        raise UnreadError("the two sides of an approximation are far apart")
    return related(sides[: at + 1], signs[:at]) if at else exact


def name_of(value: Value) -> str | None:
    if isinstance(value, Words):
        return " ".join(value.words)
    if isinstance(value, Tuple):
        names = [name_of(each) for each in value.items]
        return None if None in names else f"({','.join(str(name) for name in names)})"
    if not isinstance(value, Scalar) or value.unit or value.is_percent:
        return None
    if value.node.op == "sym":
        return value.node.name
    if value.node.op == "apply":
        return value.node.name
    return None


def _equated(sides: list[Value]) -> Value:
    """A named value, an equation, or, where all sides are numbers, the last: 9 * 2 = 18 says 18."""
    first, last = sides[0], sides[-1]
    for side in sides[:-1]:
        if _is_number(side) and _is_number(last) and not same_expression(side.node, last.node):  # type: ignore[union-attr]
            raise UnreadError("two sides of an equation differ")
    name = name_of(first)
    if name is not None:
        return _assigned(name, first, last)
    if not isinstance(first, Scalar) or not isinstance(last, Scalar):
        raise UnreadError("an equation between things that are no expressions")
    if _is_number(last) and (_is_number(first) or not first.node.has("num")):
        return last if _is_number(first) else Named(_spelled(first.node), last, first.node)
    return Relation(first.node, "=", last.node)


def _is_number(value: Value) -> bool:
    return isinstance(value, Scalar) and not value.node.symbols


def _assigned(name: str, first: Value, last: Value) -> Value:
    if isinstance(first, Tuple) and isinstance(last, Tuple) and len(first.items) == len(last.items):
        pairs = zip(first.items, last.items, strict=True)
        entries = [Named(name_of(each) or "", value) for each, value in pairs]
        return Record(tuple(sorted(entries, key=lambda entry: entry.name)))
    symbol = first.node if isinstance(first, Scalar) else None
    if symbol is not None and symbol.op == "sym" and isinstance(last, Scalar) and name in last.node.symbols:
        return Relation(symbol, "=", last.node)
    return Named(name, last, symbol)


def _spelled(node: Node) -> str:
    return f"{node.op}{node.name}({','.join(_spelled(part) for part in node.parts)})"


def _inequality(sides: list[Value], signs: list[str]) -> Value:
    nodes = [side.node for side in sides if isinstance(side, Scalar) and not side.unit]
    if len(nodes) < len(sides) or not set(signs) <= {"<", ">", "<=", ">=", "!="}:
        raise UnreadError("an inequality between things that are no numbers")
    if all(sign in (">", ">=") for sign in signs):
        nodes, signs = nodes[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if signs == ["!="]:
        if nodes[0].op == "sym" and not nodes[1].symbols:
            return all_but(nodes[1], nodes[0].name)
        return Relation(nodes[0], "!=", nodes[1])
    if not all(sign in ("<", "<=") for sign in signs) or len(nodes) > 3:
        raise UnreadError("inequalities in both directions")
    low = nodes[0] if len(nodes) == 3 or nodes[-1].op == "sym" else MINUS_INFINITY
    high = nodes[-1] if len(nodes) == 3 or low is MINUS_INFINITY else INFINITY
    variable = nodes[1] if len(nodes) == 3 or low is not MINUS_INFINITY else nodes[0]
    if variable.op == "sym" and variable.name not in low.symbols | high.symbols:
        closed_low = low is not MINUS_INFINITY and signs[0] == "<="
        closed_high = high is not INFINITY and signs[-1] == "<="
        return Region((Piece(low, high, closed_low, closed_high),), variable.name)
    if len(nodes) == 2:
        return Relation(nodes[0], signs[0], nodes[1])
    raise UnreadError("a chain of inequalities around an expression")
