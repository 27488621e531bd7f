"""Read a mathematical expression into a tree: sums, products, powers, fractions, roots, functions."""

from __future__ import annotations

import re
from fractions import Fraction

from .expressions import FUNCTIONS, Node, num
from .tokens import Token, TokenReader, UnreadError
from .vocabulary import DECORATIONS, GREEK

_TIMES = ("\\times", "\\cdot", "*", "\\ast")
_UNKNOWN_FUNCTIONS = frozenset("fghFGHOPQ")


class FormulaParser(TokenReader):
    """Recursive descent; each method reads one rule of the grammar and returns its tree."""

    def sum(self) -> Node:
        self.enter()
        sign = self.take("-", "+", "\\pm", "\\mp")
        node = signed(sign, self.product())
        while True:
            sign = self.take("-", "+", "\\pm", "\\mp")
            if sign is None:
                break
            node = Node("add", (node, signed(sign, self.product())))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.factor()
        while True:
            if (self.now.text in _TIMES and self.now.kind in ("command", "sign")) or (
                self.now.text == "x" and self.is_times_sign()
            ):
                self.at += 1
                node = Node("mul", (node, self.signed_factor()))
            elif self.now.text in ("/", "\\div") and self.ahead(1).kind != "unit":
                name = self.take("/", "\\div")
                over = self.signed_factor()
                node = Node("div", (node, over), "div" if name == "\\div" else "")
            elif self.take("\\over"):
                node = Node("div", (node, self.product()))
            elif self.starts_factor():
                node = self.juxtaposed(node)
            else:
                return node

    def is_times_sign(self) -> bool:
        before, after = self.tokens[self.at - 1], self.ahead(1)
        return before.kind == "number" and after.kind == "number" and after.text == "10"

    def juxtaposed(self, node: Node) -> Node:
        """A mixed number, or a product without a sign; two numbers side by side are neither."""
        before = self.tokens[self.at - 1]
        if self.now.kind == "number":
            if self.is_mixed_number(node):
                top, bottom = self.now.text, self.ahead(2).text
                self.at += 3
                return self.mixed(node, num(int(top)), num(int(bottom)))
            is_power = before.kind == "symbol" and self.now.space and self.ahead(1).text == "^"  # n 2^{n-1}
            if not is_power and (before.text not in ("!", "}", ")") or node.op == "num"):
                raise UnreadError("two numbers stand side by side")
        is_frac = self.now.text == "\\frac"
        factor = self.factor()
        if (
            is_frac
            and node.op == "num"
            and before.kind == "number"
            and factor.op == "div"
            and all(p.op == "num" for p in factor.parts)
        ):
            return self.mixed(node, *factor.parts)
        return Node("mul", (node, factor))

    def is_mixed_number(self, node: Node) -> bool:
        """Whether 5 1/2 stands here, after its 5."""
        is_whole = node.op == "num" and self.tokens[self.at - 1].text.isdigit()
        return is_whole and self.ahead(1).text == "/" and self.now.text.isdigit() and self.ahead(2).text.isdigit()

    def mixed(self, whole: Node, top: Node, bottom: Node) -> Node:
        is_proper = all(part.number.denominator == 1 for part in (whole, top, bottom)) and top.number < bottom.number
        if not is_proper:
            raise UnreadError("a mixed number's fraction is not below one")
        return num(whole.number + top.number / bottom.number, "mixed")

    def starts_factor(self) -> bool:
        now = self.now
        if now.kind in ("number", "symbol"):
            return True
        if now.kind == "sign":
            return now.text in "({" or (now.text == "|" and self.bars_open) or self.starts_square_group()
        if now.kind != "command" or (now.text == "\\frac" and self.ahead(2).kind == "unit"):
            return False
        name = now.text[1:]
        return (
            name in FUNCTIONS
            or now.text in GREEK
            or now.text in DECORATIONS
            or name
            in ("frac", "sqrt", "binom", "dbinom", "tbinom", "pi", "i", "e", "infty", "lfloor", "lceil", "lvert", "log")
        )

    def starts_square_group(self) -> bool:
        """Whether a square bracket opens a group, as in 2[x + 1]; in ]0, 1[ it closes an interval."""
        after = self.ahead(1)
        begins = after.kind in ("number", "symbol") or after.text in ("-", "(", "{", "\\frac", "\\sqrt", "\\binom")
        return self.now.text == "[" and begins

    def signed_factor(self) -> Node:
        sign = self.take("-", "+")
        return signed(sign, self.factor())

    def factor(self) -> Node:
        self.enter()
        node = self.postfix(self.primary())
        self.depth -= 1
        return node

    def postfix(self, node: Node) -> Node:
        while True:
            if self.take("!"):
                node = Node("fact", (node,))
            elif self.now.text in ("^", "**") and self.now.kind == "sign":
                self.at += 1
                node = self.raised(node)
            else:
                return node

    def raised(self, node: Node) -> Node:
        braced = self.take("{")
        if self.take("\\circ"):
            if braced:
                self.need("}")
            return Node("degree", (node,))
        if self.now.text in ("\\prime", "'"):
            self.fail()
        if braced:
            exponent = self.sum()
            self.need("}")
        else:
            exponent = self.attempt(lambda: signed(self.take("-", "+"), self.power_part())) or self.fail()
        return Node("pow", (node, exponent))

    def power_part(self) -> Node:
        """The exponent of a bare ^ binds to the right: 2^3^2."""
        return self.postfix(self.primary())

    def digit(self) -> Node:
        r"""The first digit of a number, whose others are left to be read: \frac12 is a half, \frac123 three halves."""
        text = self.now.text
        if not re.fullmatch(r"[0-9]+(?:\.[0-9]*)?", text):  # 1e-7, 1,000: what would be left is no number
            self.fail()
        self.tokens[self.at] = Token("number", text[1:]) if len(text) > 1 else self.tokens[self.at]
        self.at += len(text) == 1
        return num(int(text[0]))

    def argument(self) -> Node:
        r"""What a command takes: a group, or one digit, letter or command: \frac12, \sqrt2."""
        if self.take("{"):
            node = self.sum()
            self.need("}")
            return node
        if self.now.kind == "number" and self.now.text[0].isdigit():
            return self.digit()
        return self.primary()

    def primary(self) -> Node:
        token = self.now
        self.at += 1
        if token.kind == "number":
            return _number(token.text)
        if token.kind == "symbol":
            return self.symbol(token.text)
        if token.kind == "sign" and token.text in "({[":
            node = self.sum()
            self.need({"(": ")", "{": "}", "[": "]"}[token.text])
            return node
        if (token.kind == "sign" and token.text == "|") or token.text == "\\lvert":
            bars, self.bars_open = self.bars_open, False
            node = self.sum()
            self.bars_open = bars
            self.need("|", "\\rvert")
            return Node("call", (node,), "abs")
        if token.kind == "command":
            return self.command(token.text)
        self.at -= 1
        return self.fail()

    def symbol(self, name: str) -> Node:
        name += self.marks()
        if name in ("e", "i"):
            return Node("const", (), name)
        if name[0] in _UNKNOWN_FUNCTIONS and self.now.text == "(" and not self.now.space:
            return Node("apply", self.arguments(), name)
        return Node("sym", (), name)

    def marks(self) -> str:
        """Primes and subscripts are part of a name."""
        found = ""
        while self.take("'"):
            found += "'"
        if self.take("_"):
            depth = 0
            while True:
                depth += (self.now.text == "{") - (self.now.text == "}")
                found += "_" + self.now.text
                if self.now.kind == "end":
                    self.fail()
                self.at += 1
                if depth == 0:
                    break
            found = found.replace("_{", "").replace("_}", "")
        return found

    def arguments(self) -> tuple[Node, ...]:
        self.need("(")
        found = [self.sum()]
        while self.take(","):
            found.append(self.sum())
        self.need(")")
        return tuple(found)

    def command(self, text: str) -> Node:
        name = text[1:]
        if text == "\\frac":
            return Node("div", (self.argument(), self.argument()))
        if name in ("binom", "dbinom", "tbinom"):
            return Node("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name in ("pi", "e", "i", "infty"):
            return Node("const", (), "inf" if name == "infty" else name)
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.need("\\r" + name[1:])
            return Node("call", (node,), {"lfloor": "floor", "lceil": "ceil"}[name])
        if name in FUNCTIONS:
            return self.function(name)
        if text in GREEK:
            return Node("sym", (), text + self.marks())
        if text in DECORATIONS:
            return self.decorated(text)
        self.at -= 1
        return self.fail()

    def decorated(self, text: str) -> Node:
        braced = self.take("{")
        letters = ""
        while self.now.kind == "symbol":
            letters += self.now.text
            self.at += 1
        if not letters:
            self.fail()
        if braced:
            self.need("}")
        return Node("sym", (), text + letters + self.marks())

    def root(self) -> Node:
        index = num(2)
        if self.take("["):
            index = self.sum()
            self.need("]")
        return Node("root", (self.argument(), index))

    def function(self, name: str) -> Node:
        power = base = None
        for _ in range(2):
            if self.take("^"):
                power = self.argument() if self.now.text == "{" or self.now.kind == "number" else self.fail()
            elif name == "log" and self.take("_"):
                base = self.argument()
        node = self.function_argument()
        if power is not None and power == Node("neg", (num(1, "1"),)):
            inverse = "arc" + name
            return Node("call", (node,), inverse) if inverse in FUNCTIONS else self.fail()
        call = Node("call", (node,) if base is None else (node, base), name)
        return call if power is None else Node("pow", (call, power))

    def function_argument(self) -> Node:
        r"""A group, or all factors up to the next sign or function: \sin 2x, \log \log n."""
        if self.now.text in ("(", "{"):
            return self.primary()
        node = self.signed_factor()
        while self.starts_factor() and self.now.text not in ("(", "|") and self.now.text[1:] not in FUNCTIONS:
            node = self.juxtaposed(node)
        if self.now.text == "/" and self.now.kind == "sign":
            self.fail() if self.tokens[self.at - 1].kind != "number" and node.op != "const" else None
        return node


def _number(text: str) -> Node:
    return num(Fraction(text.replace(",", "").rstrip(".") or "0"), text.replace(",", ""))


def signed(sign: str | None, node: Node) -> Node:
    if sign in ("\\pm", "\\mp"):
        return Node("pm", (node,), sign[1:])
    return Node("neg", (node,)) if sign == "-" else node
