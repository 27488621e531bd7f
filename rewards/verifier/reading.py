r"""Read an answer into a typed value.

`read(r"x \in (0, \frac12]")` is a Region, `read("3:45 pm")` a Clock, `read("1, 2")` a Listing. A text that the grammar does not
cover in full is Unread, with the reason: no part of an answer is ever left out.
"""

from __future__ import annotations

import re

from .answers import AnswerParser
from .cleaning import TEXT_COMMAND, clean
from .expressions import FUNCTIONS, num
from .tokens import UnreadError, tokens
from .values import INFINITY, REALS, Based, Clock, Either, Listing, Scalar, Unread, Value, Words
from .vocabulary import ARTICLES, NUMBER_WORDS, SAME_WORDS, is_word

MAX_BRACKETS = 6  # within each other; the golds of MATH, OlympiadBench and Minerva have 5

_COMMA_NUMBER = re.compile(r"(?<!\d)[1-9]\d{0,2}(?:,\d{3})+(?!\d)")
_IN_BRACKETS = re.compile(r"[(\[{][^()\[\]{}]*\d,\d{3}")
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
_PROSE = re.compile(r"[a-zA-Z ,.()'\-]+")
_BASED = re.compile(r"(-?[0-9A-Z]+(?:\.[0-9A-Z]+)?)_(?:\{\s*(?:\\text\{)?(\d{1,2}|two|eight|sixteen)\}?\s*\}|(\d))")
_CLOCK = re.compile(r"([01]?\d|2[0-4])(?:\s*:\s*([0-5]\d))?(?:\s*([ap])\.?\s?m\.?)?", re.IGNORECASE)


def read(text: str) -> Value | Unread:
    """The value that the whole of a text spells, or the reason why it spells none."""
    text = _QUANTIFIER.sub("", clean(text))
    if not text:
        return Unread("it is empty")
    if _num_nested(text) > MAX_BRACKETS:
        return Unread("it is too deeply nested")
    lead = _LEAD_IN.match(text)
    is_label = _CHOICE.fullmatch(text) is not None  # "A: because ...", where A is no article
    if lead is not None and not is_label and lead.end() < len(text) and re.search(r"[:\w]", lead[0]):
        rest = clean(text[lead.end() :])
        if _CHOICE.fullmatch(rest) or rest[:1] != "=":
            text = rest or text
    wrapped = TEXT_COMMAND.fullmatch(text)
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
    if len(words) > 1 and (words[-1] not in ARTICLES):
        words = tuple(word for word in words if word not in ARTICLES)
    return Words(SAME_WORDS.get(words, words)) if words else Unread("it is empty")


def _unwrapped(text: str) -> str:
    return TEXT_COMMAND.sub(r"\1", text).strip().strip("{}")


def _is_prose(text: str) -> bool:
    return any(is_word(word) for word in re.findall(r"[a-zA-Z]{2,}", text)) or text.strip().lower() in ("no",)


def _read_whole(text: str) -> Value | None:
    """What has a form of its own: digits in a base, a time of day."""
    based = _BASED.fullmatch(text.replace(" ", ""))
    if based is not None and (based[2] or based[3] or "0").isdigit():
        base = int(based[2] or based[3])
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in re.sub(r"[-.]", "", based[1])):
            return Based(_without_zeros(based[1]), base)
    clock = _CLOCK.fullmatch(" ".join(_unwrapped(text).split()))
    if clock is None or (clock[2] is None and clock[3] is None):  # an hour alone is a number
        return None
    return Clock(int(clock[1]), int(clock[2] or 0), clock[3].lower() if clock[3] else "")


def _without_zeros(digits: str) -> str:
    """-0101 is -101, 0.110 is 0.11."""
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    whole, point, part = digits.partition(".")
    part = part.rstrip("0")
    return sign + (whole.lstrip("0") or "0") + (point + part if part else "")


def _read_mathematics(text: str) -> Value | Unread:
    value = _parsed(text)
    if not _COMMA_NUMBER.search(text) or re.search(r",0\d", text):
        return value
    apart = _parsed(text.replace(",", ", "))  # 1,234 may be two numbers
    if not _COMMA_NUMBER.fullmatch(text.strip("{}")):
        if not _IN_BRACKETS.search(text) or isinstance(apart, Scalar):
            return value
        if ", " not in text and not isinstance(apart, Unread):  # (12,102) is a pair; in {1,234, 5} a comma is either
            return apart
    readings = tuple(each for each in (value, apart) if not isinstance(each, Unread))
    return Either(readings) if len(readings) == 2 else readings[0] if readings else value


def _parsed(text: str) -> Value | Unread:
    try:
        return AnswerParser(tokens(text)).answer()
    except UnreadError as error:
        return Unread(str(error))
    except (RecursionError, ZeroDivisionError):
        return Unread("it is too deeply nested, or divides by zero")
