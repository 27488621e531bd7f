"""Read a whole answer: lists, equations and inequalities, sets, tuples, intervals, matrices, congruences."""

from __future__ import annotations

from .containers import combined, difference, in_brackets, set_builder, union
from .quantities import QuantityParser
from .relations import related
from .tokens import UnreadError
from .values import REALS, Congruence, Listing, Matrix, Named, Scalar, Value, Words

MAX_ITEMS = 64

_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=",
    "\\geq": ">=", "\\geqslant": ">=", "\\ne": "!=", "\\neq": "!=", "\\in": "in", "\\approx": "approx", "\\equiv": "equiv",
}  # fmt: skip
_OPEN = {"(": ")]", "[": ")][", "]": "[]", "\\{": ("\\}",), "\\langle": ("\\rangle",)}


class AnswerParser(QuantityParser):
    """Recursive descent over the tokens of one answer."""

    def answer(self) -> Value:
        value = self.items()
        if self.now.kind != "end":
            raise UnreadError(f"{self.now.text!r} is not understood")
        return value

    def items(self) -> Value:
        found = [self.item()]
        separators: list[str] = []
        while True:
            separator = self.separator()
            if separator is None:
                return combined(found, separators)
            separators.append(separator)
            found.append(self.item())
            if len(found) > MAX_ITEMS:
                raise UnreadError("it is a long list")

    def separator(self) -> str | None:
        taken = None
        while self.now.kind == "separator" or self.now.text in (",", ";", "\\\\"):
            taken = self.now.text if taken in (None, ",", ";") else "?"
            self.at += 1
        if taken == "?":
            raise UnreadError("two separators in a row")
        return taken

    def item(self) -> Value:
        """A chain of relations."""
        sides, signs = [self.side()], []
        while True:
            sign = self.relation_sign()
            if sign is None:
                break
            signs.append(sign)
            sides.append(self.side())
        value = related(sides, signs) if signs else sides[0]
        return self.modulo(value)

    def relation_sign(self) -> str | None:
        text = self.now.text
        if self.now.kind in ("command", "sign"):
            if text in ("<=", ">=", "!="):
                self.at += 1
                return text
            if text in _RELATIONS:
                self.at += 1
                if text in "<>" and self.take("="):
                    return text + "="
                return _RELATIONS[text]
            if text == "\\not" and self.ahead(1).text == "=":
                self.at += 2
                return "!="
        return None

    def modulo(self, value: Value) -> Value:
        bracket = self.now.text == "(" and self.ahead(1).text in ("\\bmod", "\\mod")
        self.at += bracket
        if not self.take("\\pmod", "\\bmod", "\\mod"):
            if isinstance(value, Named) and value.name.startswith("≡"):
                raise UnreadError("a congruence has no modulus")
            return value
        modulus = self.sum()
        if bracket:
            self.need(")")
        name = ""
        if isinstance(value, Named):
            name, value = value.name.removeprefix("≡"), value.value
        if not isinstance(value, Scalar) or value.unit:
            raise UnreadError("a congruence of something that is no number")
        return Congruence(value.node, modulus, name)

    def side(self) -> Value:
        value = self.set_part()
        while True:
            sign = self.take("\\cup", "\\setminus", "\\backslash")
            if sign is None:
                return value
            other = self.set_part()
            value = union(value, other) if sign == "\\cup" else difference(value, other)

    def set_part(self) -> Value:
        if self.now.kind == "command" and self.now.text in ("\\mathbb", "\\Bbb"):
            self.at += 1
            self.take("{")
            letter = self.now.text
            self.at += 1
            self.take("}")
            if letter == "R":
                return REALS
            return Words(("the", "set", letter))
        if self.take("\\emptyset", "\\varnothing"):
            return Listing((), "set")
        return self.attempt(self.container) or self.scalar()

    def container(self) -> Value | None:
        """A set, tuple, interval or matrix; None for brackets around an expression."""
        if self.now.text == "\\begin":
            value: Value = self.matrix()
        else:
            value = self.bracketed()
        end = self.now
        is_whole = end.kind in ("end", "separator") or end.text in (
            *",;=)]}[", "\\}", "\\rangle", "\\cup", "\\setminus", "\\backslash", "\\\\", "|", "\\mid", ":", "\\in"
        )  # fmt: skip
        return value if is_whole else None

    def bracketed(self) -> Value:
        opened = self.need(*_OPEN)
        self.enter()
        if opened == "\\{" and self.take("\\}"):
            return Listing((), "set")
        bars, self.bars_open = self.bars_open, opened != "\\{"
        first = self.item()
        if opened == "\\{" and self.take("|", "\\mid", ":"):
            self.bars_open = bars
            condition = self.items()
            self.need("\\}")
            return set_builder(first, condition)
        found = [first]
        while self.separator() is not None:
            found.append(self.item())
            if len(found) > MAX_ITEMS:
                raise UnreadError("it is a long list")
        self.bars_open = bars
        closed = self.need(*_OPEN[opened])
        self.depth -= 1
        return in_brackets(opened, closed, found)

    def matrix(self) -> Value:
        self.need("\\begin")
        kind = self.environment()
        if kind not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "smallmatrix"):
            raise UnreadError(f"the environment {kind} is not understood")
        rows: list[tuple[Value, ...]] = []
        row: list[Value] = []
        while True:
            row.append(self.item())
            taken = self.need("&", "\\\\", "\\end")
            if taken != "&":
                rows.append(tuple(row))
                row = []
            if taken == "\\end" or (taken == "\\\\" and self.take("\\end")):
                break
            if len(rows) * len(rows[0] if rows else [1]) > MAX_ITEMS:
                raise UnreadError("it is a large matrix")
        if self.environment() != kind or len({len(each) for each in rows}) != 1:
            raise UnreadError("the matrix is not rectangular")
        return Matrix(tuple(rows), "determinant" if kind == "vmatrix" else "matrix")

    def environment(self) -> str:
        self.need("{")
        name = ""
        while self.now.kind in ("symbol", "text", "unit"):
            name += self.now.text
            self.at += 1
        self.need("}")
        return name
