r"""Read an answer into a typed value.

`read(r"x \in (0, \frac12]")` is a Region, `read("3:45 pm")` a Clock, `read("1, 2")` a Listing. A text that the grammar does not
cover in full is Unread, with the reason: no part of an answer is ever left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from .expressions import FUNCTIONS, Node, is_near, num, same_expression, with_sign, word_list

MAX_DEPTH = 30  # of rules within each other
MAX_BRACKETS = 6  # within each other; the golds of MATH, OlympiadBench and Minerva have 5
MAX_TOKENS = 400
MAX_ITEMS = 64


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
    """Digits in a base: 101_2."""

    digits: str
    base: int


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

# ---- vocabulary ------------------------------------------------------------------------------------------------------

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gm", "kg": "kilogram",
    "lb": "pound lbs", "oz": "ounce", "ton": "tonne", "s": "second sec", "min": "minute mins", "h": "hour hr hrs", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs", "ml": "milliliter millilitre mL", "L": "liter litre l",
    "cup": "cups", "gal": "gallon", "dollar": "dollars usd USD buck bucks", "cent": "cents", "euro": "euros EUR",
    "yen": "", "rupee": "rupees Rs", "yuan": "元", "个": "",
    "pound sterling": "GBP", "degree": "degrees deg", "radian": "radians rad",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere amp", "K": "kelvin", "Pa": "pascal", "Hz": "hertz",
    "kW": "kilowatt", "kJ": "kilojoule", "mol": "mole", "unit": "units", "mph": "", "kph": "", "nm": "nanometer", "eV": "",
    "C": "coulomb", "T": "tesla", "F": "farad", "ms": "millisecond", "acre": "acres", "percent": "pct",
}  # fmt: skip
UNITS = {
    word: name for name, words in _UNITS.items() for word in [name, *words.split(), *(w + "s" for w in words.split())]
}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NUMBER_WORDS = dict(
    zip(
        word_list(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
            "sixteen seventeen eighteen nineteen twenty"
        ),
        range(21),
        strict=True,
    )
)
# words that say something about the number they stand beside; anything else beside a number is what was counted
_MEANINGFUL = frozenset(
    word_list(
    "and or not no nor of to from than then if else but maybe perhaps possibly either neither negative "
    "minus plus times over half halves third thirds quarter quarters twice thrice double triple less more "
    "most least about around approximately almost nearly up down between through least mod modulo squared "
    "cubed root point divided by in all any some none only without except plus with true false yes is are "
    "was be equals equal undefined infinite infinity for every each when where while until before after "
    "unless until ago per hundredths tenths thousandths hundredth tenth base prime factorial"
)
) | set(_SCALES) | set(NUMBER_WORDS)  # fmt: skip
_SAME_WORDS = {
    ("does", "not", "exist"): ("dne",), ("doesn", "t", "exist"): ("dne",), ("t",): ("true",), ("f",): ("false",),
    ("no", "solutions"): ("no", "solution"),
}  # fmt: skip
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=",
    "\\geq": ">=", "\\geqslant": ">=", "\\ne": "!=", "\\neq": "!=", "\\in": "in", "\\approx": "approx", "\\equiv": "equiv",
}  # fmt: skip
_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ",
        "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∞": "\\infty ", "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ",
        "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "λ": "\\lambda ", "μ": "\\mu ", "φ": "\\varphi ", "ω": "\\omega ",
        "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "ℝ": "\\mathbb{R}", "°": "^\\circ ", "²": "^2 ", "³": "^3 ", "√": "\\sqrt ",
        "½": "\\frac12 ", "⅓": "\\frac13 ", "⅔": "\\frac23 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "…": "\\ldots ",
        "（": "(", "）": ")", "［": "[", "］": "]", "｛": "{", "｝": "}", "，": ", ", "、": ", ", "；": "; ", "：": ": ",
        "。": ".", "％": "\\%", "“": '"', "”": '"', "‘": "'", "’": "'", "\xa0": " ",
        "€": "\\euro ", "£": "\\pounds ", "¥": "\\yen ",
    }
)  # fmt: skip
_SPACE = r"(?:(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|[~\s])"
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|strut|mathstrut|therefore|large|Large|LARGE|huge|Huge|small|normalsize|bf|rm|it|sf"
    r"|left(?=\s*[(\[|\\{.])|right(?=\s*[)\]|\\}.])|left(?=\])|right(?=\[)|[bB]igg?[lrm]?)(?![a-zA-Z])\.?"
    r"|\\phantom\s*(?:\{[^{}]*\}|-)|\\color\s*\{[a-zA-Z!0-9]*\}|\\textcolor\s*\{[a-zA-Z!0-9]*\}"
    r"|\\(?:underline|mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|boxed|fbox|operatorname|ensuremath|mathop)(?![a-zA-Z])\s*(?=\{)"
    r"|(?<!\\)\\[\[\]()]|\\begin\{(?:aligned|align\*?|equation\*?|gathered)\}|\\end\{(?:aligned|align\*?|equation\*?|gathered)\}"
)
_THOUSANDS = re.compile(r"(?<![\d.,_^{])\d{1,3}(?:(?:\\,|\\!|,\\!|\{,\}|~|_|\\ | )\d{3})+(?!\d|[.,]\d{1,2}(?!\d))")
_COMMA_NUMBER = re.compile(r"(?<!\d)[1-9]\d{0,2}(?:,\d{3})+(?!\d)")
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*(?:\{(\d{1,40})\}|(\d))")
_DOTTED = re.compile(r"(?<![\d.])(\d*)\.(\d{1,40}?)(?:\\[lc]?dots(?![a-zA-Z])|\.\.\.)")
_LEAD_IN = re.compile(
    r"^(?:[^\w\s\\({\[$|+\-.]+\s*)?"
    r"(?:(?:so|thus|hence|therefore|the|final|correct|an?|statement|answer|choice|option|is|it|答案|是|为)\b[\s,]*)*"
    r"(?:(?:answer|choice|option|is|答案是?|答案为)\s*[:=]?\s*|[:]\s*)",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[.):]\s*\S.*|[.):])?")
_CHOICES = re.compile(r"(?:\([A-J]\)|[A-J])(?:(?:\s*,\s*(?:and\s)?|\s+and\s+)\s*(?:\([A-J]\)|[A-J]))+")
_QUANTIFIER = re.compile(
    r"(?:,|\\q?quad)?\s*\\(?:text|mbox|textrm)\{\s*,?\s*for (?:all|any|every|each)(?: real| numbers?| integers?| positive)*"
    r"\s*\$?(?:[a-zA-Z]\$?\s*\}|\}\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\s*\{?[RNZQC]\}?)?)$"
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|mathrm|mathtt)\s*\{([^{}]*)\}")
_ARTICLES = frozenset(("a", "an", "the"))
_PROSE = re.compile(r"[a-zA-Z ,.()'\-]+")
_BASED = re.compile(r"([0-9A-Z]+)_(?:\{\s*(?:\\text\{)?(\d{1,2}|two|eight|sixteen)\}?\s*\}|(\d))")
_CLOCK = re.compile(r"([01]?\d|2[0-4])\s*:\s*([0-5]\d)(?:\s*([ap])\.?\s?m\.?)?", re.IGNORECASE)


def clean(text: str) -> str:
    """The text without what has no meaning: styles, delimiters, spaces of LaTeX, marks of emphasis and quotation."""
    text = text.translate(_UNICODE)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    text = _STYLE.sub(" ", text.replace("\\!", ""))
    text = text.replace("\\$", "\\dollar ") if "\\$" in text else text
    text = text.replace("$", " ") if text.count("$") % 2 == 0 else text.replace("$", "\\dollar ")
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(rf"{_SPACE}+", " ", text)
    text = _TEXT.sub(lambda match: match[0] if match[1].strip() else " ", text)
    while len(text) > 1:
        shorter = _without_wrapping(text.strip(' *`"').strip())
        if shorter == text:
            break
        text = shorter
    return text


def _without_wrapping(text: str) -> str:
    if text.endswith((".", ",", ";")) and not text.endswith(("..", "\\,", "\\;")):
        return text[:-1]
    if text.endswith("\\") and not text.endswith("\\\\"):
        return text[:-1]
    if text[:1] == "{" and _closing(text) == len(text) - 1:
        return text[1:-1]
    return text[1:-1] if text[:1] == text[-1:] == "'" and len(text) > 2 else text


def _closing(text: str) -> int:
    depth = 0
    for at, character in enumerate(text):
        if character in "{}" and (at == 0 or text[at - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return at
    return -1


def read(text: str) -> Value | Unread:
    """The value that the whole of a text spells, or the reason why it spells none."""
    text = _QUANTIFIER.sub("", clean(text))
    if not text:
        return Unread("it is empty")
    if _num_nested(text) > MAX_BRACKETS:
        return Unread("it is too deeply nested")
    lead = _LEAD_IN.match(text)
    if lead is not None and lead.end() < len(text) and re.search(r"[:\w]", lead[0]):
        rest = clean(text[lead.end() :])
        if _CHOICE.fullmatch(rest) or rest[:1] != "=":
            text = rest or text
    wrapped = _TEXT.fullmatch(text)
    if wrapped is not None and any(character.isdigit() for character in wrapped[1]):
        text = clean(_LEAD_IN.sub("", wrapped[1].strip()))
    value = _read_words(text)
    if value is not None:
        return value
    value = _read_whole(text)
    return _read_mathematics(text) if value is None else value


def _num_nested(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _read_words(text: str) -> Value | Unread | None:
    unwrapped = _unwrapped(text)
    choice = _CHOICE.fullmatch(unwrapped)
    if choice is not None:
        return Words((choice[1].lower(),), is_choice=True)
    if _CHOICES.fullmatch(unwrapped):
        return Listing(tuple(Words((letter.lower(),), is_choice=True) for letter in re.findall("[A-J]", unwrapped)))
    if not _PROSE.fullmatch(unwrapped) or not (unwrapped != text or _is_prose(unwrapped)):
        return None
    words = tuple(re.findall(r"[a-z]+", unwrapped.lower()))
    if len(words) == 1 and words[0] in NUMBER_WORDS:
        return Scalar(num(NUMBER_WORDS[words[0]]))
    if words in (("all", "real", "numbers"), ("all", "reals"), ("all", "real", "number")):
        return REALS
    if words in (("infinity",), ("positive", "infinity")):
        return Scalar(INFINITY)
    if len(words) == 1 and (words[0] in FUNCTIONS or words[0] == "pi" or unwrapped.strip() in ("i", "e")):
        return None
    if len(words) > 1 and (words[-1] not in _ARTICLES):
        words = tuple(word for word in words if word not in _ARTICLES)
    return Words(_SAME_WORDS.get(words, words)) if words else Unread("it is empty")


def _unwrapped(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip().strip("{}")


def _is_prose(text: str) -> bool:
    return any(_is_word(word) for word in re.findall(r"[a-zA-Z]{2,}", text)) or text.strip().lower() in ("no",)


def _is_word(word: str) -> bool:
    """Whether letters are a word rather than a product of symbols."""
    if word in FUNCTIONS or word in ("pi", "mod", "infty", "or", "and"):
        return False
    is_alphabet = word.lower() in "abcdefghijklmnopqrstuvwxyz"
    return len(word) > 2 and not is_alphabet


def _read_whole(text: str) -> Value | None:
    """What has a form of its own: digits in a base, a time of day."""
    based = _BASED.fullmatch(text.replace(" ", ""))
    if based is not None and (based[2] or based[3] or "0").isdigit():
        base = int(based[2] or based[3])
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in based[1]):
            return Based(based[1].lstrip("0") or "0", base)
    clock = _CLOCK.fullmatch(" ".join(_unwrapped(text).split()))
    return Clock(int(clock[1]), int(clock[2]), clock[3].lower() if clock[3] else "") if clock else None


def _read_mathematics(text: str) -> Value | Unread:
    try:
        value = Parser(tokens(text)).answer()
        if not _COMMA_NUMBER.search(text):
            return value
        items = _COMMA_NUMBER.fullmatch(text.strip("{}"))
        if items is None or re.search(r",0\d", text):
            return value
        return Either((value, Parser(tokens(text.replace(",", ", "))).answer()))
    except _UnreadError as error:
        return Unread(str(error))
    except (RecursionError, ZeroDivisionError):
        return Unread("it is too deeply nested, or divides by zero")


class _UnreadError(Exception):
    """What the grammar does not cover."""


# ---- tokens ----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?![\d.a-zA-Z]))?|\d+\.(?!\d)|\.\d+)"
    r"|\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|mathrm|mathtt)\s*(?:\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}|(?P<letter>[a-zA-Z]))"
    r"|(?P<command>\\[a-zA-Z]+|\\.)|(?P<word>[a-zA-Z]+)|(?P<sign>\*\*|<=|>=|!=|\.\.\.|[^\s])|(?P<space>\s+)"
)


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
            raise _UnreadError("it is too long")
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


_COMPOUND_UNIT = r"[a-zA-Z]+(?:\s*[/^]\s*[a-zA-Z0-9]+|\s+[a-zA-Z]+|\^\{-?[1-9]\})+"


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


_SHORT_WORDS = frozenset(word_list("is it to of by at on if no be we so as an not but per"))


def _plain(kind: str, text: str) -> list[Token]:
    if kind != "word":
        return [Token(kind, text)]
    if text in ("or", "and"):
        return [Token("separator", text)]
    if text in _SHORT_WORDS:
        return [Token("text", text)]
    if text in FUNCTIONS or text in ("pi", "infinity", "inf", "mod"):
        return [Token("command", "\\" + {"infinity": "infty", "inf": "infty"}.get(text, text))]
    if len(text) > 1 and text in UNITS and text not in ("in", "mi", "ms", "nm"):
        return [Token("unit", text)]
    if _is_word(text):
        return [Token("text", text)]
    return [Token("symbol", letter) for letter in text]


# ---- grammar ---------------------------------------------------------------------------------------------------------

_GREEK = frozenset(
    "\\" + name
    for name in word_list(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
    )
)
_TIMES = ("\\times", "\\cdot", "*", "\\ast")
_DECORATIONS = frozenset(
    word_list("\\overline \\bar \\dot \\ddot \\vec \\hat \\tilde \\widehat \\overrightarrow \\angle \\triangle")
)
_UNKNOWN_FUNCTIONS = frozenset("fghFGHOPQ")
_OPEN = {"(": ")]", "[": ")][", "]": "[", "\\{": ("\\}",), "\\langle": ("\\rangle",)}
_COUNTERS = {"个": "个", "元": "yuan", "米": "m"}
_CURRENCY = {"\\dollar": "dollar", "\\euro": "euro", "\\pounds": "pound sterling", "\\yen": "yen"}


class Parser:
    """Recursive descent over the tokens of one answer."""

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
            raise _UnreadError(f"{self.now.text or 'its end'!r} stands where {' or '.join(texts)} is expected")
        return taken

    def attempt(self, rule: Any) -> Any:
        """What a rule reads, or None and no token passed."""
        start, depth, bars, found_tokens = self.at, self.depth, self.bars_open, self.tokens.copy()
        try:
            found = rule()
        except _UnreadError:
            found = None
        if found is None:
            self.at, self.depth, self.bars_open, self.tokens = start, depth, bars, found_tokens
        return found

    # -- answers

    def answer(self) -> Value:
        value = self.items()
        if self.now.kind != "end":
            raise _UnreadError(f"{self.now.text!r} is not understood")
        return value

    def items(self) -> Value:
        found = [self.item()]
        separators: list[str] = []
        while True:
            separator = self.separator()
            if separator is None:
                return _combined(found, separators)
            separators.append(separator)
            found.append(self.item())
            if len(found) > MAX_ITEMS:
                raise _UnreadError("it is a long list")

    def separator(self) -> str | None:
        taken = None
        while self.now.kind == "separator" or self.now.text in (",", ";", "\\\\"):
            taken = self.now.text if taken in (None, ",", ";") else "?"
            self.at += 1
        if taken == "?":
            raise _UnreadError("two separators in a row")
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
        value = _related(sides, signs) if signs else sides[0]
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
                raise _UnreadError("a congruence has no modulus")
            return value
        modulus = self.sum()
        if bracket:
            self.need(")")
        name = ""
        if isinstance(value, Named):
            name, value = value.name.removeprefix("≡"), value.value
        if not isinstance(value, Scalar) or value.unit:
            raise _UnreadError("a congruence of something that is no number")
        return Congruence(value.node, modulus, name)

    def side(self) -> Value:
        value = self.set_part()
        while True:
            sign = self.take("\\cup", "\\setminus", "\\backslash")
            if sign is None:
                return value
            other = self.set_part()
            value = _union(value, other) if sign == "\\cup" else _without(value, other)

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
            return _set_builder(first, condition)
        found = [first]
        while self.separator() is not None:
            found.append(self.item())
            if len(found) > MAX_ITEMS:
                raise _UnreadError("it is a long list")
        self.bars_open = bars
        closed = self.need(*_OPEN[opened])
        self.depth -= 1
        return _container(opened, closed, found)

    def matrix(self) -> Value:
        self.need("\\begin")
        kind = self.environment()
        if kind not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix", "smallmatrix"):
            raise _UnreadError(f"the environment {kind} is not understood")
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
                raise _UnreadError("it is a large matrix")
        if self.environment() != kind or len({len(each) for each in rows}) != 1:
            raise _UnreadError("the matrix is not rectangular")
        return Matrix(tuple(rows), "determinant" if kind == "vmatrix" else "matrix")

    def environment(self) -> str:
        self.need("{")
        name = ""
        while self.now.kind in ("symbol", "text", "unit"):
            name += self.now.text
            self.at += 1
        self.need("}")
        return name

    # -- numbers with units

    def scalar(self) -> Value:
        if self.now.kind == "text" and self.now.text in ("about", "approximately", "roughly"):
            self.at += 1
        if self.now.kind == "text":
            return self.label()
        currency = next((_CURRENCY[name] for name in _CURRENCY if self.take(name)), None)
        if currency is None and self.now.text in ("Rs", "Rs.", "USD") and self.now.kind == "unit":
            currency = UNITS[self.now.text.rstrip(".")]
            self.at += 1
            self.take(".")
        node = self.sum()
        if self.now.text == ":" and currency is None and self.bars_open:
            return self.ratio(node)
        if self.now.text in _SCALES and self.now.kind == "text":
            node = Node("num", (), "", node.number * _SCALES[self.now.text]) if node.op == "num" else self.fail()
            self.at += 1
        is_percent = self.take("%", "\\%") is not None or (
            self.now.kind == "unit" and UNITS.get(self.now.text) == "percent"
        )
        self.at += is_percent and self.now.kind == "unit" and UNITS.get(self.now.text) == "percent"
        unit = self.unit()
        if currency is not None:
            unit = ((currency, 1),) if not unit or unit == ((currency, 1),) else self.fail()
        if node.op == "degree" and not unit:
            node, unit = node.parts[0], (("degree", 1),)
        return _without_pm(Scalar(node, unit, is_percent))

    def fail(self) -> Any:
        raise _UnreadError(f"{self.now.text or 'its end'!r} is not understood")

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
        if (self.now.text != "=" and self.now.kind not in ("end", "separator")) or _MEANINGFUL & set(words):
            raise _UnreadError(f"the words {' '.join(words)!r} stand in an expression")
        return Words(tuple(words))

    def unit(self) -> tuple[tuple[str, int], ...]:
        powers: dict[str, int] = {}
        sign = 1
        while True:
            if self.now.text == "\\frac" and self.ahead(2).kind == "unit":
                self.at += 1
                for each in (1, -1):
                    self.need("{")
                    self.unit_word(powers, each)
                    self.need("}")
            elif (
                self.now.text in ("/", "per", "\\cdot") and self.ahead(1).kind in ("unit", "text", "symbol") and powers
            ):
                sign = 1 if self.now.text == "\\cdot" else -1
                self.at += 1
                self.unit_word(powers, sign)
            elif self.now.kind in ("unit", "text"):
                self.unit_word(powers, sign)
            elif self.now.text in _CURRENCY and not powers:
                powers[_CURRENCY[self.now.text]] = 1
                self.at += 1
            elif self.now.text in _COUNTERS:
                powers[_COUNTERS[self.now.text]] = 1
                self.at += 1
            else:
                break
        names = {name: power for name, power in powers.items() if power}
        return tuple(sorted(names.items()))

    def unit_word(self, powers: dict[str, int], sign: int) -> None:
        word = self.now.text
        power = 1
        while word in ("square", "cubic", "sq", "sq."):
            power = 3 if word == "cubic" else 2
            self.at += 1
            word = self.now.text
        if self.now.kind not in ("unit", "text", "symbol") or word.lower().rstrip(".") in _MEANINGFUL:
            raise _UnreadError(f"{word!r} is no unit")
        if not re.fullmatch(r"[a-zA-Z'\-]+\.?", word) and word not in UNITS:
            raise _UnreadError(f"{word!r} is no unit")
        self.at += 1
        if self.take("^"):
            braced = self.take("{")
            negative = self.take("-")
            if not re.fullmatch("[1-9]", self.now.text):
                raise _UnreadError("the power of a unit is no digit")
            power = int(self.now.text) * (-1 if negative else 1)
            self.at += 1
            if braced:
                self.need("}")
        name = UNITS.get(word, UNITS.get(word.rstrip("."), UNITS.get(word.lower(), word.lower().rstrip(".s"))))
        powers[name] = powers.get(name, 0) + power * sign

    # -- expressions

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _UnreadError("it is too deeply nested")

    def sum(self) -> Node:
        self.enter()
        sign = self.take("-", "+", "\\pm", "\\mp")
        node = _signed(sign, self.product())
        while True:
            sign = self.take("-", "+", "\\pm", "\\mp")
            if sign is None:
                break
            node = Node("add", (node, _signed(sign, self.product())))
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
            if before.text not in ("!", "}", ")") or node.op == "num":
                raise _UnreadError("two numbers stand side by side")
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
            raise _UnreadError("a mixed number's fraction is not below one")
        return num(whole.number + top.number / bottom.number, "mixed")

    def starts_factor(self) -> bool:
        now = self.now
        if now.kind in ("number", "symbol"):
            return True
        if now.kind == "sign":
            return now.text in "({" or (now.text == "|" and self.bars_open)
        if now.kind != "command" or (now.text == "\\frac" and self.ahead(2).kind == "unit"):
            return False
        name = now.text[1:]
        return (
            name in FUNCTIONS
            or now.text in _GREEK
            or now.text in _DECORATIONS
            or name
            in ("frac", "sqrt", "binom", "dbinom", "tbinom", "pi", "i", "e", "infty", "lfloor", "lceil", "lvert", "log")
        )

    def signed_factor(self) -> Node:
        sign = self.take("-", "+")
        return _signed(sign, self.factor())

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
            exponent = self.attempt(lambda: _signed(self.take("-", "+"), self.power_part())) or self.fail()
        return Node("pow", (node, exponent))

    def power_part(self) -> Node:
        """The exponent of a bare ^ binds to the right: 2^3^2."""
        return self.postfix(self.primary())

    def digit(self) -> Node:
        text = self.now.text
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
        if text in _GREEK:
            return Node("sym", (), text + self.marks())
        if text in _DECORATIONS:
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


def _signed(sign: str | None, node: Node) -> Node:
    if sign in ("\\pm", "\\mp"):
        return Node("pm", (node,), sign[1:])
    return Node("neg", (node,)) if sign == "-" else node


def _without_pm(value: Scalar) -> Value:
    if not value.node.has("pm"):
        return value
    return Listing(tuple(replace(value, node=with_sign(value.node, sign)) for sign in (1, -1)))


# ---- from parts to a value -------------------------------------------------------------------------------------------


def _combined(found: list[Value], separators: list[str]) -> Value:
    if not separators:
        return found[0]
    if all(isinstance(each, Region) for each in found):
        if "and" in separators:
            raise _UnreadError("inequalities joined by and")
        return _union(*found)
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
        raise _UnreadError("a name is given two values")
    return Record(tuple(sorted(found, key=lambda each: each.name)))


def _listing(found: list[Value]) -> Listing:
    items: list[Value] = []
    for each in found:
        items += each.items if isinstance(each, Listing) and each.kind == "list" else [each]
    return Listing(tuple(items))


def _container(opened: str, closed: str, found: list[Value]) -> Value:
    if opened == "\\{":
        return Listing(_listing(found).items, "set")
    if len(found) == 1 and opened == "[" and closed == "]":
        return Tuple((found[0],), "[")
    if opened == "(" and closed == ")" and len(found) == 1 and isinstance(found[0], Matrix):
        return found[0]
    if opened == "\\langle":
        return Tuple(tuple(found))
    if len(found) < 2:
        raise _UnreadError("brackets around one expression")
    if opened == "[" and closed == "]":
        if all(isinstance(each, Tuple) and each.bracket == "[" for each in found):
            rows = tuple(each.items for each in found if isinstance(each, Tuple))
            if len({len(row) for row in rows}) == 1:
                return Matrix(rows)
        return Tuple(tuple(found), "[")
    if opened == "(" and closed == ")":
        return Tuple(tuple(found))
    if len(found) != 2 or not all(isinstance(each, Scalar) for each in found):
        raise _UnreadError(f"{opened} and {closed} do not belong together")
    low, high = (each.node for each in found if isinstance(each, Scalar))
    return Region((Piece(low, high, opened == "[", closed == "]"),))


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


def _union(*parts: Value) -> Value:
    regions = [as_region(part) for part in parts]
    if all(isinstance(part, Listing) and part.kind == "set" for part in parts):
        return Listing(tuple(item for part in parts if isinstance(part, Listing) for item in part.items), "set")
    if any(region is None for region in regions):
        raise _UnreadError("a union of something that is no interval")
    names = {region.name for region in regions if region is not None}
    if len(names) > 1:
        raise _UnreadError("a union over two variables")
    return Region(tuple(piece for region in regions if region is not None for piece in region.pieces), names.pop())


def _without(whole: Value, points: Value) -> Value:
    """All reals but some numbers."""
    if whole != REALS or not isinstance(points, Listing) or len(points.items) != 1:
        raise _UnreadError("a difference of sets")
    point = points.items[0]
    if not isinstance(point, Scalar):
        raise _UnreadError("a difference of sets")
    return _all_but(point.node, "")


def _all_but(node: Node, name: str) -> Region:
    return Region((Piece(MINUS_INFINITY, node, False, False), Piece(node, INFINITY, False, False)), name)


def _set_builder(first: Value, condition: Value) -> Value:
    if isinstance(first, Region) and isinstance(condition, Region) and first == replace(REALS, name=condition.name):
        return replace(condition, name="")
    is_symbol = isinstance(first, Scalar) and first.node.op == "sym"
    if is_symbol and isinstance(condition, Region) and condition.name == _name(first):
        return replace(condition, name="")
    raise _UnreadError("a set given by a condition")


def _related(sides: list[Value], signs: list[str]) -> Value:
    if "approx" in signs:
        return _approximated(sides, signs, signs.index("approx"))
    if signs == ["in"]:
        region = as_region(sides[1])
        name = _name(sides[0])
        if region is None and name is not None and isinstance(sides[1], Listing):
            return Named(name, replace(sides[1], kind="list"))
        if region is None or name is None:
            raise _UnreadError("membership of something that is no interval")
        return replace(region, name=name)
    if signs == ["equiv"]:
        return Named("≡" + (_name(sides[0]) or "?"), sides[1])
    if set(signs) == {"="}:
        return _equated(sides)
    return _inequality(sides, signs)


def _approximated(sides: list[Value], signs: list[str], at: int) -> Value:
    """What stands before the sign; after it, if that is a name: 2/3 is about 0.67, x is about 0.67."""
    if at == 0 and _name(sides[0]) is not None and len(sides) == 2:
        return _equated(sides)
    exact, rounded = sides[at], sides[-1]
    if at != len(signs) - 1 or not isinstance(exact, Scalar) or not isinstance(rounded, Scalar):
        raise _UnreadError("an approximation of something that is no number")
    if not is_near(exact.node, rounded.node):
        raise _UnreadError("the two sides of an approximation are far apart")
    return _related(sides[: at + 1], signs[:at]) if at else exact


def _name(value: Value) -> str | None:
    if isinstance(value, Words):
        return " ".join(value.words)
    if isinstance(value, Tuple):
        names = [_name(each) for each in value.items]
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
            raise _UnreadError("two sides of an equation differ")
    name = _name(first)
    if name is not None:
        return _assigned(name, first, last)
    if not isinstance(first, Scalar) or not isinstance(last, Scalar):
        raise _UnreadError("an equation between things that are no expressions")
    if _is_number(last) and (_is_number(first) or not first.node.has("num")):
        return last if _is_number(first) else Named(_spelled(first.node), last, first.node)
    return Relation(first.node, "=", last.node)


def _is_number(value: Value) -> bool:
    return isinstance(value, Scalar) and not value.node.symbols


def _assigned(name: str, first: Value, last: Value) -> Value:
    if isinstance(first, Tuple) and isinstance(last, Tuple) and len(first.items) == len(last.items):
        pairs = zip(first.items, last.items, strict=True)
        entries = [Named(_name(each) or "", value) for each, value in pairs]
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
        raise _UnreadError("an inequality between things that are no numbers")
    if all(sign in (">", ">=") for sign in signs):
        nodes, signs = nodes[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if signs == ["!="]:
        if nodes[0].op == "sym" and not nodes[1].symbols:
            return _all_but(nodes[1], nodes[0].name)
        return Relation(nodes[0], "!=", nodes[1])
    if not all(sign in ("<", "<=") for sign in signs) or len(nodes) > 3:
        raise _UnreadError("inequalities in both directions")
    low = nodes[0] if len(nodes) == 3 or nodes[-1].op == "sym" else MINUS_INFINITY
    high = nodes[-1] if len(nodes) == 3 or low is MINUS_INFINITY else INFINITY
    variable = nodes[1] if len(nodes) == 3 or low is not MINUS_INFINITY else nodes[0]
    if variable.op == "sym" and variable.name not in low.symbols | high.symbols:
        closed_low = low is not MINUS_INFINITY and signs[0] == "<="
        closed_high = high is not INFINITY and signs[-1] == "<="
        return Region((Piece(low, high, closed_low, closed_high),), variable.name)
    if len(nodes) == 2:
        return Relation(nodes[0], signs[0], nodes[1])
    raise _UnreadError("a chain of inequalities around an expression")
