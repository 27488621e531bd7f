"""Countdown: do the given numbers make the target?"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from .verifier.extraction import last_answer_tag, last_box, last_math, without_emphasis

MAX_CHARS = 200  # of an expression; six numbers with every bracket take fewer

_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "[": "(", "]": ")"})
_LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
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
    taken off, and so are back-ticks, stars of emphasis and a full stop. Any expression
    that is right counts, not only the one that a data set names.
    """
    content = last_answer_tag(completion)
    given, wanted = [int(number) for number in nums], int(target)
    expression = None if content is None else _expression(content, wanted)
    if expression is None:
        return 0.0
    try:
        tree = ast.parse(expression, mode="eval").body
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return float(Counter(used) == Counter(given) and _value(tree) == wanted)
    except (SyntaxError, ZeroDivisionError, _NotArithmeticError):
        return 0.0


class _NotArithmeticError(Exception):
    """More than the four operations."""


def _expression(content: str, target: int) -> str | None:
    math = last_math(content)
    text = last_box(content) or (math[0] if math else content)
    text = " ".join(without_emphasis(text).strip(" \n`*").removesuffix(".").strip("`* ").split())
    for latex, sign in _LATEX.items():
        text = text.replace(latex, sign)
    left, equals, right = text.translate(_SIGNS).partition("=")
    if len(text) > MAX_CHARS or (equals and right.strip() != str(target)):
        return None
    return left.strip() if _EXPRESSION.fullmatch(left) and left.isascii() else None


def _value(node: ast.expr) -> Fraction:
    """Walks the tree; nothing that a model wrote is ever run."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)  # type: ignore[arg-type]  # digits only, see _EXPRESSION
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise _NotArithmeticError(ast.dump(node))
