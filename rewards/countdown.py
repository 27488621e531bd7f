"""Countdown: do the given numbers make the target?"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from .verifier.extraction import MAX_TAG_CHARS, last_answer_tag, last_box, last_math, without_emphasis

MAX_CHARS = 200  # of an expression; six numbers with every bracket take fewer

SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "[": "(", "]": ")"})
LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
_EXPRESSION = re.compile(r"[-+*/()\d\s]+")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(completion: str, nums: Sequence[int | str], target: int | str) -> float:
    """1 if the expression in the last `<answer>` makes `target` from `nums`, each used exactly once; else 0 (TinyZero's task).

    It may use + - * / and brackets, is computed in fractions, and may end in `= target`. A `\\boxed{}` or `$...$` around it is
    taken off, and so are back-ticks, stars of emphasis and a full stop. Any expression that is right counts, not only the one
    that a data set names. A tag of more than 2,000 characters without a box holds an essay, as for `accuracy`.
    """
    return float(_wrong(completion, nums, target) is None)


def explain_countdown(completion: str, nums: Sequence[int | str], target: int | str) -> str:
    """What is wrong with the expression; "right" if nothing is."""
    return _wrong(completion, nums, target) or "right"


countdown.explain = explain_countdown  # type: ignore[attr-defined]


def _wrong(completion: str, nums: Sequence[int | str], target: int | str) -> str | None:
    content = last_answer_tag(completion)
    given, wanted = Counter(int(number) for number in nums), int(target)
    expression = None if content is None else _expression(content, wanted)
    if expression is None:
        return "There is no <answer> with an arithmetic expression."
    try:
        tree = ast.parse(expression, mode="eval").body
        used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        value = value_of(tree)
    except (SyntaxError, NotArithmeticError):
        return f"{expression} is no arithmetic expression."
    except ZeroDivisionError:
        return f"{expression} divides by 0."
    for number in sorted(map(int, {*given, *used})):  # type: ignore[arg-type]  # digits only, see _EXPRESSION
        if used[number] != given[number]:
            return f"{expression} has {number} {_times(used[number])}; the numbers have it {_times(given[number])}."
    return None if value == wanted else f"{expression} makes {value}, not {wanted}."


def _times(number: int) -> str:
    return {0: "not at all", 1: "once", 2: "twice"}.get(number, f"{number} times")


class NotArithmeticError(Exception):
    """More than the four operations."""


def _expression(content: str, target: int) -> str | None:
    text = last_box(content)
    if not text:
        if len(content) > MAX_TAG_CHARS:
            return None
        math = last_math(content)
        text = math[0] if math else content
    text = " ".join(without_emphasis(text).strip(" \n`*").removesuffix(".").strip("`* ").split())
    for latex, sign in LATEX.items():
        text = text.replace(latex, sign)
    left, equals, right = text.translate(SIGNS).partition("=")
    if len(text) > MAX_CHARS or (equals and right.strip() != str(target)):
        return None
    return left.strip() if _EXPRESSION.fullmatch(left) and left.isascii() else None


def value_of(node: ast.expr) -> Fraction:
    """What an expression of whole numbers makes. Walks the tree; nothing that a model wrote is ever run.

    Raises:
        NotArithmeticError, ZeroDivisionError
    """
    if isinstance(node, ast.Constant):
        return Fraction(node.value)  # type: ignore[arg-type]  # digits only, see _EXPRESSION
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    raise NotArithmeticError(ast.dump(node))
