"""Exact arithmetic, without running anything that the model wrote."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 1000  # of an expression
MAX_BITS = 20_000  # of a number: about 6,000 digits
DECIMALS = 12

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", ",": ""})


def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: numbers with + - * / // % ** and parentheses, such as 2485*8919 or (3.5+1/3)**2.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters; at most {MAX_CHARS} are read")
    text = expression.translate(_SIGNS).strip().removesuffix("=").strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    return _written(_value(tree.body, text))


def _value(node: ast.expr, text: str) -> Fraction:
    """The value of a part of an expression; numbers are read from the text, so that 0.1 is a tenth."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return _small(Fraction((ast.get_source_segment(text, node) or "").replace("_", "")))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left, text), _value(node.right, text))
        case ast.BinOp() if type(node.op) in _BINARY:
            return _small(_BINARY[type(node.op)](_value(node.left, text), _value(node.right, text)))
    raise ValueError(f"{ast.get_source_segment(text, node)!r} is no number and no arithmetic operation")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError(f"the exponent {_written(exponent)} is no whole number")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent.numerator) > MAX_BITS and abs(base) not in (0, 1):
        raise ValueError("the power has too many digits")
    return _small(base**exponent.numerator)


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("a number has too many digits")
    return value


def _written(value: Fraction) -> str:
    """Whole and finite decimals as they are; others as a fraction, with decimals that are rounded."""
    if value.denominator == 1:
        return _digits(value.numerator)
    scaled = value * 10**DECIMALS
    whole = round(scaled)
    decimals = f"{'-' * (whole < 0)}{_digits(abs(whole) // 10**DECIMALS)}.{abs(whole) % 10**DECIMALS:0{DECIMALS}d}"
    if scaled.denominator == 1:
        return decimals.rstrip("0")
    return f"{_digits(value.numerator)}/{_digits(value.denominator)} = {decimals}..."


def _digits(number: int) -> str:
    """Python refuses to write a whole number of more than 4,300 digits."""
    if abs(number) < 10**4000:
        return str(number)
    high, low = divmod(abs(number), 10**4000)
    return f"{'-' * (number < 0)}{_digits(high)}{low:04000d}"
