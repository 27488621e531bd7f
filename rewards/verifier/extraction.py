r"""Find the one answer that a completion commits to.

Everything here returns a single candidate or None. A completion that lists several answers must not be paid for the one
that happens to be right, so a list is handed on as a list ("1, 2, 3" equals a set, never a number), and a sentence that
ends in alternatives ("3 or 4") holds no answer. Every function is linear in the length of the text.
"""

from __future__ import annotations

import re

from .reading import read
from .values import Unread

MAX_TAG_CHARS = 2_000  # an answer tag without a box that is longer than this holds an essay, not an answer
MAX_WHOLE_CHARS = 100  # of words and digits that are read as one value: "15 square centimeters"
MAX_UNIT_CHARS = 40
MAX_OPEN_BRACES = 1_000  # a text that opens more without closing them is no answer

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_MATH = re.compile(  # a closing "$" may not stand before a digit: "$18 and $5" is money
    r"\$\$(?P<display>[^$]+)\$\$"
    r"|\\\[(?P<bracket>(?:[^\\]|\\(?!\]))+)\\\]"
    r"|\\\((?P<paren>(?:[^\\]|\\(?!\)))+)\\\)"
    r"|(?<!\\)\$(?P<inline>(?:[^$\n\\]|\\.)+)\$(?!\s?\d)"
)
_NUMBER = re.compile(
    r"(?:(?<![\w)}\]])[-+\u2212])?(?:\\?[$€£¥]\s?)?"
    r"(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
    r"|(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:\s?/\s?[0-9]+)?|\.[0-9]+)(?:\s?\\?%)?"
)
_BELONGS_TO_TEXT_BEFORE = re.compile(
    r"(?:[\w{}]|[0-9][:.]|(?:[-+\u2212*\u00d7\u00f7\u00b7/^_]|\\times|\\cdot)\s*|[\^_]\{\s*)$"
)
_BELONGS_TO_TEXT_AFTER = re.compile(r"\s*[\^_{]|[:.][0-9]|\d")  # \d: a digit of another script
_MARK = r"(?:[\s,;/$*]|\\[,;:! ()\[\]\\]|\\q?quad(?![a-zA-Z]))*"  # between two boxes, or two numbers, of one list
_LIST_SEPARATOR = re.compile(
    rf"{_MARK}(?:(?:\b(?:or|and)\b|\\(?:text|mbox|textrm)\s*\{{\s*,?\s*(?:or|and)\s*\}}){_MARK})?"
)
_LATEX_WORDS = re.compile(r"\\(?:text\w*|mbox|math\w+|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_UNDECIDED = re.compile(  # "203 but maybe 204", "either 203 or else 204", "not 204", "203 = 204"
    r"\b(?:maybe|perhaps|possibly|might be|could be|either|or else|unless|neither|nor|(?:is|am|it's) not sure|unsure)\b"
    r"|\b(?:not|isn't|never|no longer)\s+(?:\$\s*)?[-+]?[0-9][^a-zA-Z]*$",
    re.IGNORECASE,
)
_ENDS_IN_ITS_NUMBER = re.compile(r"\b(?:is|are|was)\s+\\?\$?-?[0-9][0-9,]*(?:\.[0-9]+)?\.?$")  # "The answer is 18."
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_PROSE = re.compile(r"(?!(?:sin|cos|tan|log|exp|mod|det|max|min|and)\b)[a-zA-Z]{3,}|\b(?:[kcm]m|[km]g|ml|ft|hr|is)\b")


_EMPHASIS = re.compile(r"(?<![\w*)\]}])(\*\*|__|\*)(?=[^\s*])([^\n*]{1,200}?)(?<=[^\s*])\1(?![\w*])")
_BOLD = re.compile(r"\\(?:mathbf|textbf|boldsymbol|bm)\s*\{([^{}]{1,200})\}")


def without_emphasis(text: str) -> str:
    r"""Without Markdown's and LaTeX's marks for bold and italics: in "It is **18**." the stars are no multiplication signs."""
    return _BOLD.sub(r"\1", _EMPHASIS.sub(r"\2", text))


def last_answer_tag(completion: str) -> str | None:
    """The content of the last `<answer>...</answer>`, stripped; None without a complete pair."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else completion[start + len("<answer>") : end].strip()


def last_box(text: str) -> str | None:
    r"""The content of the `\boxed{...}` that opens last among those whose braces balance; None without one.

    Boxes with nothing but commas, "and" or "or" between them are one list, so a row of guesses is not its last one:
    `last_box(r"\boxed{1} is half of \boxed{2}")` is `2`, of `\boxed{1}, \boxed{2}` it is `1, 2`.
    """
    contents: list[str] = []  # of the last box and the boxes that it lists
    content_start, ended = -1, 0
    open_braces: list[tuple[int, int]] = []  # where each open box and its content start; -1 for another brace
    for token in _BOX_TOKEN.finditer(text):
        if len(open_braces) > MAX_OPEN_BRACES:
            return None
        if token[0].startswith(("\\boxed", "\\fbox")):
            open_braces.append((token.start(), token.end()))
        elif token[0] == "{":
            open_braces.append((-1, -1))
        elif token[0] == "}" and open_braces:
            box_start, start = open_braces.pop()
            if start > content_start:
                if not _is_list_separator(text, ended, box_start):
                    contents.clear()
                content = text[start : token.start()].strip()
                if content not in contents[-1:]:
                    contents.append(content)
                content_start, ended = start, token.end()
    return ", ".join(contents) if contents else None


def _is_list_separator(text: str, start: int, end: int) -> bool:
    return end - start <= 30 and _LIST_SEPARATOR.fullmatch(text, start, end) is not None


def last_number(text: str) -> str | None:
    """The last number in the text, with its sign, currency or percent sign.

    None if there is none, if its digits belong to something else (`10^5`, `x_2`, `CO2`, `5:30`, `9 + 2`), or if it ends
    a list of different numbers.
    """
    text = without_emphasis(text)
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    start, end = matches[-1].span()
    number = matches[-1][0]
    if _BELONGS_TO_TEXT_BEFORE.search(text[max(0, start - 20) : start]) or _BELONGS_TO_TEXT_AFTER.match(
        text[end : end + 20]
    ):
        return None
    if has_disguise(text[max(0, start - 20) : end + 20]) or _UNDECIDED.search(text[max(0, start - 60) : end + 60]):
        return None
    ends_a_list = len(matches) > 1 and _is_list_separator(text, matches[-2].end(), start)
    return None if ends_a_list and matches[-2][0] != number else number


def last_math(text: str) -> tuple[str, int] | None:
    r"""The last `$...$`, `\(...\)` or `\[...\]` and where it ends; a list of them ("$1$, $2$ and $3$") counts as one."""
    spans = list(_MATH.finditer(text))
    if not spans:
        return None
    first = len(spans) - 1
    while first > 0 and _is_list_separator(text, spans[first - 1].end(), spans[first].start()):
        first -= 1
    return ", ".join(span[span.lastgroup or 0].strip() for span in spans[first:]), spans[-1].end()


def has_disguise(text: str) -> bool:
    """Whether a text holds digits of another script, or characters that cannot be seen (NUL, zero width, right to left).

    What a person reads there and what a parser reads may differ, and no answer needs them.
    """
    return _FOREIGN_DIGIT.search(text) is not None or any(not (c.isprintable() or c.isspace()) for c in text)


def is_prose(text: str) -> bool:
    r"""Whether words remain once LaTeX commands are taken out: they do in "18 dollars", not in "2x" or "\frac{1}{2}"."""
    return _PROSE.search(_LATEX_WORDS.sub(" ", text)) is not None


def final_expression(content: str) -> str | None:
    r"""The expression that the content of an answer tag or box commits to, or None.

    A box wins, then math between delimiters, then, in a sentence, its last number. What is not a sentence is taken
    whole: "1, 2, 3" stays a list and "x = 5" an equation. So is a sentence without a number: "Evelyn".
    """
    boxed = last_box(content)
    if boxed is not None:
        return boxed or None
    if not content or len(content) > MAX_TAG_CHARS:
        return None
    content = without_emphasis(content)
    math = last_math(content)
    if math is not None and not _NUMBER.search(content, math[1]):
        return _with_unit(math[0], content[math[1] :])
    if is_prose(content) and any(character.isdigit() for character in content):
        if _ENDS_IN_ITS_NUMBER.search(content):
            return last_number(content)
        is_whole = len(content) <= MAX_WHOLE_CHARS and not isinstance(read(content), Unread)
        return content if is_whole else last_number(content)
    return content


def _with_unit(expression: str, rest: str) -> str:
    """An expression with the words behind it, if both are one value: of "It is $980$ cm." 980 cm; of "$980$ in all" 980."""
    rest = rest.strip().rstrip(".")
    if not rest or len(rest) > MAX_UNIT_CHARS:
        return expression
    whole = f"{expression} {rest}"
    return expression if isinstance(read(whole), Unread) else whole


def from_answer_tag(completion: str) -> str | None:
    """What the last `<answer>` tag of the completion commits to."""
    content = last_answer_tag(completion)
    return None if content is None else final_expression(content)


def from_box(completion: str) -> str | None:
    r"""What the last `\boxed{}` of the completion commits to."""
    content = last_box(completion)
    return None if content is None else final_expression(content)


def from_anywhere(completion: str) -> str | None:
    r"""What the last `<answer>` tag commits to; without one, the last `\boxed{}`; without one, the last number."""
    if last_answer_tag(completion) is not None:
        return from_answer_tag(completion)
    return last_number(completion) if last_box(completion) is None else from_box(completion)
