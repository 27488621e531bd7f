"""Does a completion search? What it tries in Countdown, read from its arithmetic and not from its words. For logs: weight 0."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from .countdown import LATEX, MAX_CHARS, SIGNS, NotArithmeticError, value_of

_FRAGMENT = re.compile(
    r"(?:\d+(?:\.\d+)?|[-+*/()= \t])+"
)  # a digit belongs to one part, or a long number is read at each
MAX_FRAGMENTS = 2000  # of a completion; a thought of 10,000 tokens has a thousand


class Trial(NamedTuple):
    """An expression that has each of the given numbers once, written out at once or in steps."""

    expression: str  # equal for those that differ in the order of sums and products alone
    value: Fraction
    claimed: Fraction | None  # what the completion says it makes


def countdown_search(completion: str, nums: Sequence[int | str], target: int | str) -> float:
    """1 if the completion states a trial that misses `target`, gives it up, and tries another; else 0.

    A trial that it says makes `target` is not given up, whatever it makes. The answer counts as a trial.
    """
    found = trials(completion, nums)
    wanted = int(target)
    given_up = (each.value != wanted and each.claimed != wanted for each in found[:-1])
    return float(any(given_up))


def countdown_trials(completion: str, nums: Sequence[int | str]) -> float:
    """How many different trials it states."""
    return float(len(trials(completion, nums)))


def trials(completion: str, nums: Sequence[int | str]) -> list[Trial]:
    """All that differ, in their order.

    Steps are put together: in `50 - 14 = 36, 36 + 3 = 39` the second line is (50 - 14) + 3. A number that was given stands for
    itself as long as it is not used.
    """
    given = Counter(int(number) for number in nums)
    made: dict[Fraction, tuple[Counter[int], str]] = {}
    found: dict[str, Trial] = {}
    for expression, claimed in _statements(completion):
        try:
            tree = ast.parse(expression, mode="eval").body
            value = value_of(tree)
            used, text = _written_out(tree, given, made)
        except (SyntaxError, NotArithmeticError, ZeroDivisionError, RecursionError):
            continue
        if used == given:
            found.setdefault(text, Trial(text, value, claimed))
        else:
            made[value] = used, text
    return list(found.values())


def _statements(completion: str) -> Iterator[tuple[str, Fraction | None]]:
    """Each expression with an operation in it, and the number behind its equals sign."""
    text = completion
    for latex, sign in LATEX.items():
        text = text.replace(latex, sign)
    for number, match in enumerate(_FRAGMENT.finditer(text.translate(SIGNS))):
        if number == MAX_FRAGMENTS:
            return
        fragment = match[0].strip(" \t=")
        if len(fragment) > MAX_CHARS:
            continue
        # a list's number or a dash before it, and a bracket around it in a sentence
        fragment = re.sub(r"^(?:\d+[)] +|[-+*/] +)+(?=.*[-+*/])", "", fragment)
        parts = [part.strip() for part in fragment.split("=")]
        for place, part in enumerate(parts):
            part = _balanced(part)
            if re.search(r"[\d)] *[-+*/]", part):
                yield (
                    part,
                    next(map(Fraction, (p for p in parts[place + 1 :] if re.fullmatch(r"-?\d+(?:\.\d+)?", p))), None),
                )


def _balanced(text: str) -> str:
    """Without brackets at its ends that belong to the sentence."""
    while text.count("(") > text.count(")") and text.startswith("("):
        text = text[1:].strip()
    while text.count(")") > text.count("(") and text.endswith(")"):
        text = text[:-1].strip()
    return text


def _written_out(
    node: ast.expr, given: Counter[int], made: dict[Fraction, tuple[Counter[int], str]]
) -> tuple[Counter[int], str]:
    """Which of the given numbers an expression uses, and how it reads with its steps put in.

    Raises:
        NotArithmeticError: it has a number that is neither given nor made, or one more often than it is there.
    """
    used: Counter[int] = Counter()

    def written(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            number = Fraction(node.value)  # type: ignore[arg-type]  # digits only, as in value_of
            if used[int(number)] < given[int(number)] and number.denominator == 1:
                used[int(number)] += 1
                return str(number)
            parts, text = made.get(number, (None, ""))
            if parts is None or any(used[each] + parts[each] > given[each] for each in parts):
                raise NotArithmeticError(str(number))
            used.update(parts)
            return text
        if isinstance(node, ast.UnaryOp):
            return f"-{written(node.operand)}"
        assert isinstance(node, ast.BinOp), "its value was found"
        sides = [written(node.left), written(node.right)]
        if isinstance(node.op, ast.Add | ast.Mult):
            sides.sort()
        return f"({type(node.op).__name__} {' '.join(sides)})"

    return used, written(node)
