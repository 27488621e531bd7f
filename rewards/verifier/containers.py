"""What several values make together: a list, a set, a tuple, an interval, a union."""

from __future__ import annotations

from dataclasses import replace

from .relations import name_of
from .tokens import UnreadError
from .values import REALS, Listing, Matrix, Named, Piece, Record, Region, Scalar, Tuple, Value, all_but, as_region


def combined(found: list[Value], separators: list[str]) -> Value:
    """What values make with commas, "and" or "or" between them."""
    if not separators:
        return found[0]
    if all(isinstance(each, Region) for each in found):
        if "and" in separators:
            raise UnreadError("inequalities joined by and")
        return union(*found)
    if isinstance(found[0], Named) and not any(isinstance(each, Named) for each in found[1:]):
        return replace(found[0], value=_listing([found[0].value, *found[1:]]))
    if all(isinstance(each, Named) for each in found):
        return _named(found)  # type: ignore[arg-type]
    return _listing(found)


def _named(found: list[Named]) -> Value:
    names = {each.name for each in found}
    if len(names) == 1:
        return replace(found[0], value=_listing([each.value for each in found]))
    if len(names) < len(found):
        raise UnreadError("a name is given two values")
    return Record(tuple(sorted(found, key=lambda each: each.name)))


def _listing(found: list[Value]) -> Listing:
    items: list[Value] = []
    for each in found:
        items += each.items if isinstance(each, Listing) and each.kind == "list" else [each]
    return Listing(tuple(items))


def in_brackets(opened: str, closed: str, found: list[Value]) -> Value:
    """The value of what stands between two brackets, by their kind and number: {1, 2}, (1, 2), [1, 2), [[1, 2], [3, 4]]."""
    if opened == "\\{":
        return Listing(_listing(found).items, "set")
    if opened == "\\langle":
        return Tuple(tuple(found))
    if (opened, closed) == ("[", "]"):
        return _in_square_brackets(found)
    if (opened, closed) == ("(", ")") and len(found) == 1 and isinstance(found[0], Matrix):
        return found[0]
    if len(found) < 2:
        raise UnreadError("brackets around one expression")
    return Tuple(tuple(found)) if (opened, closed) == ("(", ")") else _half_open(opened, closed, found)


def _in_square_brackets(found: list[Value]) -> Value:
    rows = [each.items for each in found if isinstance(each, Tuple) and each.bracket == "["]
    is_matrix = 1 < len(found) == len(rows) and len({len(row) for row in rows}) == 1
    return Matrix(tuple(rows)) if is_matrix else Tuple(tuple(found), "[")


def _half_open(opened: str, closed: str, found: list[Value]) -> Region:
    if len(found) != 2 or not all(isinstance(each, Scalar) for each in found):
        raise UnreadError(f"{opened} and {closed} do not belong together")
    low, high = (each.node for each in found if isinstance(each, Scalar))
    return Region((Piece(low, high, opened == "[", closed == "]"),))


def union(*parts: Value) -> Value:
    """Of intervals of one variable, or of sets."""
    if all(isinstance(part, Listing) and part.kind == "set" for part in parts):
        return Listing(tuple(item for part in parts if isinstance(part, Listing) for item in part.items), "set")
    regions = [as_region(part) or _points(part) for part in parts]
    if any(region is None for region in regions):
        raise UnreadError("a union of something that is no interval")
    names = {region.name for region in regions if region is not None}
    if len(names) > 1:
        raise UnreadError("a union over two variables")
    return Region(tuple(piece for region in regions if region is not None for piece in region.pieces), names.pop())


def _points(value: Value) -> Region | None:
    """A set of numbers as intervals of one point each."""
    if not isinstance(value, Listing) or value.kind != "set":
        return None
    nodes = [each.node for each in value.items if isinstance(each, Scalar)]
    return Region(tuple(Piece(node, node, True, True) for node in nodes)) if len(nodes) == len(value.items) else None


def difference(whole: Value, points: Value) -> Value:
    """All reals but some numbers."""
    if whole != REALS or not isinstance(points, Listing) or len(points.items) != 1:
        raise UnreadError("a difference of sets")
    point = points.items[0]
    if not isinstance(point, Scalar):
        raise UnreadError("a difference of sets")
    return all_but(point.node, "")


def set_builder(first: Value, condition: Value) -> Value:
    r"""\{x : x > 3\} and \{x \in R : x > 3\}."""
    if isinstance(first, Region) and isinstance(condition, Region) and first == replace(REALS, name=condition.name):
        return replace(condition, name="")
    is_symbol = isinstance(first, Scalar) and first.node.op == "sym"
    if is_symbol and isinstance(condition, Region) and condition.name == name_of(first):
        return replace(condition, name="")
    raise UnreadError("a set given by a condition")
