"""Cut an answer's text into tokens, and read them one by one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from .expressions import FUNCTIONS
from .vocabulary import SHORT_WORDS, UNITS, is_word

MAX_TOKENS = 400
MAX_DEPTH = 30  # of rules within each other

_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*(?:\{(\d{1,40})\}|(\d))")
_DOTTED = re.compile(r"(?<![\d.])(\d*)\.(\d{1,40}?)(?:\\[lc]?dots(?![a-zA-Z])|\.\.\.)")
_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?![\d.a-zA-Z]))?|\d+\.(?!\d)|\.\d+)"
    r"|\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|mathrm|mathtt)\s*(?:\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}|(?P<letter>[a-zA-Z]))"
    r"|(?P<command>\\[a-zA-Z]+|\\.)|(?P<word>[a-zA-Z]+)|(?P<sign>\*\*|<=|>=|!=|\.\.\.|[^\s])|(?P<space>\s+)"
)
_COMPOUND_UNIT = r"[a-zA-Z]+(?:\s*[/^]\s*[a-zA-Z0-9]+|\s+[a-zA-Z]+|\^\{-?[1-9]\})+"


class UnreadError(Exception):
    """What the grammar does not cover."""


@dataclass(frozen=True)
class Token:
    kind: str  # number, command, symbol, unit, text, separator, sign, end
    text: str
    space: bool = False  # before it


def tokens(text: str) -> list[Token]:
    text = _REPEATING.sub(_repeating, text)
    text = _DOTTED.sub(_dotted, text)
    found: list[Token] = []
    space = False
    for match in _TOKEN.finditer(text):
        kind = "text" if match.lastgroup == "letter" else match.lastgroup or ""
        if kind == "space":
            space = True
            continue
        new = _roman(match["text"] or match["letter"] or "") if kind == "text" else _plain(kind, match[0])
        found += [replace(new[0], space=space), *new[1:]] if new else []
        space = False
        if len(found) > MAX_TOKENS:
            raise UnreadError("it is too long")
    return [*found, Token("end", "")]


def _repeating(match: re.Match[str]) -> str:
    return _as_fraction(match[1], match[2], match[3] or match[4])


def _dotted(match: re.Match[str]) -> str:
    digits = match[2]
    for period in range(1, len(digits) // 2 + 1):
        repeats = 3 if period == 1 else 2
        tail = digits[-period:]
        if digits.endswith(tail * repeats):
            start = digits
            while start.endswith(tail):
                start = start[:-period]
            return _as_fraction(match[1], start, tail)
    return match[0]


def _as_fraction(whole: str, start: str, period: str) -> str:
    """0.1666... is \\frac{15}{90}."""
    scale, nines = 10 ** len(start), 10 ** len(period) - 1
    top = int((whole or "0") + start) * nines + int(period)
    return f"{{\\frac{{{top}}}{{{scale * nines}}}}}"


def _roman(content: str) -> list[Token]:
    content = content.strip()
    lower = content.lower().strip(" ,")
    if lower in ("or", "and"):
        return [Token("separator", lower)]
    if content in ("i", "e", "pi"):
        return [Token("command", "\\" + content)]
    if content in UNITS:
        return [Token("unit", content)]
    if re.fullmatch(_COMPOUND_UNIT, content) and content.split("/")[0].split("^")[0].split()[0] in UNITS:
        return [_text_or_unit(word) for word in re.findall(r"[a-zA-Z]+|[^\sa-zA-Z]", content)]
    if any(character.isdigit() for character in content) and not re.search(r"[a-zA-Z]{2}", content):
        return [Token("sign", "{"), *tokens(content)[:-1], Token("sign", "}")]
    return [_text_or_unit(word) for word in re.findall(r"[^\s,]+|,", content)]


def _text_or_unit(word: str) -> Token:
    if word in (",", "/", "^", "-", "{", "}") or word.isdigit():
        return Token("number" if word.isdigit() else "sign", word)
    return Token("unit", word) if word in UNITS or word.rstrip(".") in UNITS else Token("text", word)


def _plain(kind: str, text: str) -> list[Token]:
    if kind != "word":
        return [Token(kind, text)]
    if text in ("or", "and"):
        return [Token("separator", text)]
    if text in SHORT_WORDS:
        return [Token("text", text)]
    if text in FUNCTIONS or text in ("pi", "infinity", "inf", "mod"):
        return [Token("command", "\\" + {"infinity": "infty", "inf": "infty"}.get(text, text))]
    if len(text) > 1 and text in UNITS and text not in ("in", "mi", "ms", "nm"):
        return [Token("unit", text)]
    if is_word(text):
        return [Token("text", text)]
    return [Token("symbol", letter) for letter in text]


class TokenReader:
    """The tokens of one answer, and how far they have been read."""

    def __init__(self, found: list[Token]) -> None:
        self.tokens = found
        self.at = 0
        self.depth = 0
        self.bars_open = True  # whether a bar may begin an absolute value

    @property
    def now(self) -> Token:
        return self.ahead(0)

    def ahead(self, by: int) -> Token:
        """A token further on; the last one, `end`, from there on."""
        return self.tokens[min(self.at + by, len(self.tokens) - 1)]

    def take(self, *texts: str) -> str | None:
        """The next token's text if it is one of these, passing it."""
        if self.now.kind not in ("end", "text") and self.now.text in texts:
            self.at += 1
            return self.tokens[self.at - 1].text
        return None

    def need(self, *texts: str) -> str:
        taken = self.take(*texts)
        if taken is None:
            raise UnreadError(f"{self.now.text or 'its end'!r} stands where {' or '.join(texts)} is expected")
        return taken

    def attempt(self, rule: Any) -> Any:
        """What a rule reads, or None and no token passed."""
        start, depth, bars, found_tokens = self.at, self.depth, self.bars_open, self.tokens.copy()
        try:
            found = rule()
        except UnreadError:
            found = None
        if found is None:
            self.at, self.depth, self.bars_open, self.tokens = start, depth, bars, found_tokens
        return found

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadError("it is too deeply nested")

    def fail(self) -> Any:
        raise UnreadError(f"{self.now.text or 'its end'!r} is not understood")
