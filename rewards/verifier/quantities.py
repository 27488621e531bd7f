"""Read an expression with what stands beside it: a unit, a currency, a percent sign, a scale, a label in words."""

from __future__ import annotations

import re
from dataclasses import replace

from .expressions import Node, with_sign
from .formulas import FormulaParser, signed
from .tokens import UnreadError
from .values import Listing, Ratio, Scalar, Value, Words
from .vocabulary import COUNTERS, CURRENCIES, MEANINGFUL, SCALES, UNITS

Unit = tuple[tuple[str, int], ...]
"""Names of units with their powers: cm^2 is (("cm", 2),)."""


class QuantityParser(FormulaParser):
    """The rules for a number with what belongs to it."""

    def scalar(self) -> Value:
        if self.now.kind == "text" and self.now.text in ("about", "approximately", "roughly"):
            self.at += 1
        if self.now.kind == "text":
            return self.label()
        is_debt = self.now.text == "-" and self.ahead(1).text in CURRENCIES  # -\$5
        self.at += is_debt
        currency = self.currency()
        node = signed("-", self.sum()) if is_debt else self.sum()
        if self.now.text == ":" and currency is None and self.bars_open:
            return self.ratio(node)
        node = self.scaled(node)
        is_percent = self.percent_sign()
        unit = self.unit()
        if currency is not None:
            unit = ((currency, 1),) if not unit or unit == ((currency, 1),) else self.fail()
        if node.op == "degree" and not unit:
            node, unit = node.parts[0], (("degree", 1),)
        return _without_pm(Scalar(node, unit, is_percent))

    def currency(self) -> str | None:
        """The name of a currency that stands before its amount."""
        name = next((CURRENCIES[sign] for sign in CURRENCIES if self.take(sign)), None)
        if name is None and self.now.text in ("Rs", "Rs.", "USD") and self.now.kind == "unit":
            name = UNITS[self.now.text.rstrip(".")]
            self.at += 1
            self.take(".")
        return name

    def scaled(self, node: Node) -> Node:
        """5 million is 5,000,000; only a number that is written out has a scale."""
        if self.now.text not in SCALES or self.now.kind != "text":
            return node
        factor = SCALES[self.now.text]
        node = Node("num", (), "", node.number * factor) if node.op == "num" else self.fail()
        self.at += 1
        return node

    def percent_sign(self) -> bool:
        """A sign, or else the word."""
        has_sign = self.take("%", "\\%") is not None
        has_word = self.now.kind == "unit" and UNITS.get(self.now.text) == "percent"
        self.at += has_word
        return has_sign or has_word

    def ratio(self, first: Node) -> Value:
        parts = [first]
        while self.take(":"):
            parts.append(self.sum())
        return Ratio(tuple(parts))

    def label(self) -> Value:
        r"""Words beside an equals sign: \text{Area} = 5, x = \text{even}."""
        words = []
        while self.now.kind == "text":
            words.append(self.now.text.lower())
            self.at += 1
        if (self.now.text != "=" and self.now.kind not in ("end", "separator")) or MEANINGFUL & set(words):
            raise UnreadError(f"the words {' '.join(words)!r} stand in an expression")
        return Words(tuple(words))

    def unit(self) -> Unit:
        r"""All unit words from here on: square feet, km/h, \frac{m}{s}, kg m^2 s^{-2}. Empty if none stands here."""
        powers: dict[str, int] = {}
        sign = 1
        while True:
            if self.now.text == "\\frac" and self.ahead(2).kind == "unit":
                self.unit_fraction(powers)
            elif self.joins_units() and powers:
                sign = 1 if self.now.text == "\\cdot" else -1
                self.at += 1
                self.unit_word(powers, sign)
            elif self.now.kind in ("unit", "text"):
                self.unit_word(powers, sign)
            elif not self.unit_sign(powers):
                break
        return tuple(sorted((name, power) for name, power in powers.items() if power))

    def joins_units(self) -> bool:
        is_next = self.ahead(1).kind in ("unit", "text", "symbol")
        return self.now.text in ("/", "per", "\\cdot") and is_next

    def unit_fraction(self, powers: dict[str, int]) -> None:
        self.need("\\frac")
        for sign in (1, -1):
            self.need("{")
            self.unit_word(powers, sign)
            self.need("}")

    def unit_sign(self, powers: dict[str, int]) -> bool:
        """Whether a sign stands here that is a unit: a currency behind its amount, a Chinese counter."""
        text = self.now.text
        name = COUNTERS.get(text) or (None if powers else CURRENCIES.get(text))
        if name is None:
            return False
        powers[name] = 1
        self.at += 1
        return True

    def unit_word(self, powers: dict[str, int], sign: int) -> None:
        """One word with its power, which may stand before it: square feet, ft^2. Words that say something else are refused."""
        power = 1
        while self.now.text in ("square", "cubic", "sq", "sq."):
            power = 3 if self.now.text == "cubic" else 2
            self.at += 1
        word = self.now.text
        if self.now.kind not in ("unit", "text", "symbol") or word.lower().rstrip(".") in MEANINGFUL:
            raise UnreadError(f"{word!r} is no unit")
        if not re.fullmatch(r"[a-zA-Z'\-]+\.?", word) and word not in UNITS:
            raise UnreadError(f"{word!r} is no unit")
        self.at += 1
        if self.take("^"):
            power = self.unit_power()
        name = _unit_name(word)
        powers[name] = powers.get(name, 0) + power * sign

    def unit_power(self) -> int:
        braced = self.take("{")
        negative = self.take("-")
        if not re.fullmatch("[1-9]", self.now.text):
            raise UnreadError("the power of a unit is no digit")
        power = int(self.now.text)
        self.at += 1
        if braced:
            self.need("}")
        return -power if negative else power


def _unit_name(word: str) -> str:
    """The name that all spellings of a unit share; of what is no unit but was counted, the word: 5 apples."""
    known = (UNITS.get(spelling) for spelling in (word, word.rstrip("."), word.lower()))
    return next(filter(None, known), word.lower().rstrip(".s"))


def _without_pm(value: Scalar) -> Value:
    if not value.node.has("pm"):
        return value
    return Listing(tuple(replace(value, node=with_sign(value.node, sign)) for sign in (1, -1)))
