"""Expression trees, their values, and whether two of them are equal.

Rational values are exact. Others are computed to 60 digits, and once more to 400 before two of them are called equal: a
difference that is zero shrinks with the precision, one that is not stays. Expressions with symbols are compared at fixed
rational points. The size of every number is bounded before it is computed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import mp, mpc, mpf

MAX_BITS = 200_000  # of an exact number: 9999^9999 and 10000! are allowed
MAX_POINT_BITS = 20_000  # the same at the points where symbols have values: nothing an answer needs is larger
DIGITS, MORE_DIGITS = 60, 400


def word_list(text: str) -> list[str]:
    return text.split()


FUNCTIONS = frozenset(
    word_list("sqrt exp ln log lg sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh floor ceil abs")
)
_NUM_POINTS = 6
_CONSTANTS: dict[str, Callable[[], Any]] = {"pi": lambda: +mp.pi, "e": lambda: +mp.e, "i": lambda: mpc(0, 1)}


class NoValueError(ArithmeticError):
    """Division by zero, the logarithm of zero, infinity: there is no value."""


class TooLargeError(ArithmeticError):
    """The value has more digits than an answer needs."""


@dataclass(frozen=True)
class Node:
    """A number, symbol or constant (no parts), an operation or a function of its parts.

    `op` is one of num, sym, const, add, neg, mul, div, pow, root, pm (its part, plus or minus), fact, binom, degree, call (a
    known function) and apply (an unknown one: equal arguments, equal values).
    """

    op: str
    parts: tuple[Node, ...] = ()
    name: str = ""
    number: Fraction = Fraction(0)

    @property
    def symbols(self) -> frozenset[str]:
        own = frozenset([self.name]) if self.op in ("sym", "apply") else frozenset()
        return own.union(*(part.symbols for part in self.parts))

    def has(self, op: str, name: str = "") -> bool:
        return (self.op == op and name in ("", self.name)) or any(part.has(op, name) for part in self.parts)


def num(value: Fraction | int, written: str = "") -> Node:
    return Node("num", (), written, Fraction(value))


def with_sign(node: Node, sign: int) -> Node:
    """The tree with each plus-or-minus decided: the upper sign for 1, the lower for -1."""
    parts = tuple(with_sign(part, sign) for part in node.parts)
    if node.op == "pm":
        is_plus = (node.name == "pm") == (sign > 0)
        return parts[0] if is_plus else Node("neg", parts)
    return Node(node.op, parts, node.name, node.number)


@lru_cache(maxsize=4096)
def same_expression(left: Node, right: Node) -> bool:
    """Whether two trees have the same value wherever both have one."""
    if left == right:
        return True
    if left.symbols != right.symbols:
        right = _with_engineers_unit(right, left)
        if left.symbols != right.symbols:
            return False
    try:
        return _same_at_points(left, right)
    except (TooLargeError, OverflowError):
        return False


def is_near(left: Node, right: Node) -> bool:
    """Whether two numbers are within a twentieth of each other."""
    if left.symbols or right.symbols:
        return False
    try:
        a, b = evaluate(left, {}), evaluate(right, {})
    except (ArithmeticError, ValueError):
        return False
    return bool(_difference(a, b, DIGITS) * 20 <= abs(_float(a)))


def _with_engineers_unit(node: Node, other: Node) -> Node:
    """`j` is the imaginary unit beside an expression with `i` and no `j`."""
    if "j" in other.symbols or not other.has("const", "i"):
        return node
    if node.op == "sym" and node.name == "j":
        return Node("const", (), "i")
    return Node(node.op, tuple(_with_engineers_unit(part, other) for part in node.parts), node.name, node.number)


def _same_at_points(left: Node, right: Node) -> bool:
    names = left.symbols
    is_complex = left.has("const", "i")
    num_equal = num_complex = 0
    for index in range(_NUM_POINTS if names else 1):
        values = point(names, index) if names else {}
        try:
            equal, is_real = _same_at(left, right, values)
        except (NoValueError, ZeroDivisionError, ValueError):
            continue
        if not equal and (is_real or is_complex):
            return False
        num_equal += equal and is_real
        num_complex += equal and not is_real
    # where both are complex, only the branch of a root may differ: such points count if there are no others
    return num_equal >= (2 if names else 1) or (num_equal == 0 and num_complex >= (2 if names else 1))


def _same_at(left: Node, right: Node, values: Mapping[str, Fraction]) -> tuple[bool, bool]:
    """Whether two trees are equal at a point, and whether one of them is real there."""
    a, b = evaluate(left, values), evaluate(right, values)
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b, True
    real = is_real(a) or is_real(b)
    rough = _difference(a, b, DIGITS)
    if rough > mpf(10) ** -40 * _size(a, b, DIGITS):
        return False, real
    a, b = evaluate(left, values, MORE_DIGITS), evaluate(right, values, MORE_DIGITS)
    fine = _difference(a, b, MORE_DIGITS)
    return fine <= mpf(10) ** -300 * _size(a, b, MORE_DIGITS) or _vanishes(fine, rough), real


def _vanishes(fine: Any, rough: Any) -> bool:
    return bool(fine <= mpf(10) ** -200 * rough) if rough else bool(fine <= mpf(10) ** -380)


def _difference(a: Any, b: Any, digits: int) -> Any:
    with mp.workdps(digits):
        return abs(_float(a) - _float(b))


def _size(a: Any, b: Any, digits: int) -> Any:
    with mp.workdps(digits):
        larger = max(abs(_float(a)), abs(_float(b)))
        # a zero that was computed has no size of its own
        return larger if larger > mpf(10) ** -(digits - 10) else mpf(1) if digits == DIGITS else mpf(0)


def is_real(value: Any) -> bool:
    return isinstance(value, Fraction) or abs(value.imag) <= mpf(10) ** -50 * max(abs(value), 1)


@lru_cache(maxsize=512)
def point(names: frozenset[str], index: int) -> dict[str, Fraction]:
    """Values for the symbols: positive, negative, small, between whole numbers, whole; the same in every process."""
    return {name: _coordinate(name, index) for name in names}


def _coordinate(name: str, index: int) -> Fraction:
    drawn = int.from_bytes(hashlib.sha256(f"{index} {name}".encode()).digest()[:6], "big")
    if index in (2, 3):  # whole, odd and even ones
        return Fraction(3 + drawn % 37)
    value = Fraction(101 + drawn % 9900, 1009 if index < 4 else 3001)
    return -value if index == 1 or (index == 5 and drawn >> 40 & 1) else value


def evaluate(node: Node, values: Mapping[str, Fraction], digits: int = DIGITS) -> Any:
    """A Fraction where all of it is rational, else an mpmath complex number of so many digits."""
    with mp.workdps(digits):
        return _evaluate(node, values)


def _evaluate(node: Node, values: Mapping[str, Fraction]) -> Any:
    if node.op == "num":
        return node.number
    if node.op == "sym":
        return values[node.name]
    if node.op == "const":
        if node.name not in _CONSTANTS:
            raise NoValueError(node.name)
        return mpc(_CONSTANTS[node.name]())
    parts = [_evaluate(part, values) for part in node.parts]
    value = _OPERATIONS[node.op](node.name, *parts)
    return _bounded(value, MAX_POINT_BITS if values else MAX_BITS)


def _bounded(value: Any, bits: int) -> Any:
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() > 2 * bits:
            raise TooLargeError
        return value
    value = mpc(value)
    if not (mp.isfinite(value.real) and mp.isfinite(value.imag)):
        raise NoValueError("not finite")
    return value


def _float(value: Any) -> Any:
    return mpc(mpf(value.numerator) / value.denominator) if isinstance(value, Fraction) else value


def _exact(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """An operation of two numbers that is exact between Fractions."""

    def compute(_: str, a: Any, b: Any) -> Any:
        both = isinstance(a, Fraction) and isinstance(b, Fraction)
        return operation(a, b) if both else operation(_float(a), _float(b))

    return compute


def _power(_: str, base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator <= 12:
        if 1 < exponent.denominator <= 12:
            return _root("", _power("", base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and abs(exponent) * bits > MAX_BITS:
            raise TooLargeError
        if base == 0 and exponent < 0:
            raise NoValueError("division by zero")
        return base ** int(exponent) if bits > 1 else base ** int(abs(exponent) % 2 or 2) if exponent else Fraction(1)
    base, exponent = _float(base), _float(exponent)
    if base == 0:
        raise NoValueError("a power of zero")
    if abs(exponent) * (abs(mp.log(base)) + 1) > 10**6:
        raise TooLargeError
    return mp.power(base, exponent)


def _root(_: str, radicand: Any, index: Any) -> Any:
    """The real root where there is one, so of -8 the third is -2."""
    if not (isinstance(index, Fraction) and index.denominator == 1 and 0 < index <= 1000):
        return _power("", _float(radicand), _divide("", Fraction(1), index))
    n = int(index)
    if isinstance(radicand, Fraction):
        exact = _exact_root(radicand, n)
        if exact is not None:
            return exact
    value = _float(radicand)
    if value.imag == 0 and value.real < 0 and n % 2:
        return -mpc(mp.root(-value.real, n))
    return mpc(mp.root(value, n))


def _exact_root(radicand: Fraction, n: int) -> Fraction | None:
    if radicand < 0 and n % 2 == 0:
        return None
    parts = [_whole_root(abs(part), n) for part in (radicand.numerator, radicand.denominator)]
    if parts[0] is None or parts[1] is None:
        return None
    return Fraction(parts[0] if radicand >= 0 else -parts[0], parts[1])


def _whole_root(number: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(number)
    elif number.bit_length() > 4_000:
        return None
    else:
        with mp.workdps(number.bit_length() // 3 + 20):
            root = int(mp.nint(mp.root(number, n)))
    return root if root**n == number else None


def _divide(_: str, a: Any, b: Any) -> Any:
    if (b == 0) if isinstance(b, Fraction) else abs(b) < mpf(10) ** (10 - mp.dps):
        raise NoValueError("division by zero")
    return _exact(lambda x, y: x / y)("", a, b)


def _factorial(_: str, n: Any) -> Any:
    if isinstance(n, Fraction) and n.denominator == 1:
        if n < 0:
            raise NoValueError("the factorial of a negative number")
        if n > 12_000:
            raise TooLargeError
        return Fraction(math.factorial(int(n)))
    if abs(_float(n)) > 10**4:
        raise TooLargeError
    return _gamma(_float(n) + 1)


def _gamma(x: Any) -> Any:
    """Gamma(x + N) / (x (x + 1) ... (x + N - 1)) for a large x + N, where mpmath needs no Taylor series: the first of 400 digits
    takes it 0.5 to 2.6 s, and a worker under load does not come back in time.

    Raises:
        ZeroDivisionError: x is a pole.
    """
    shift = max(0, int(mp.dps - x.real))
    return mp.gamma(x + shift) / math.prod((x + i for i in range(shift)), start=mpc(1))


def _binomial(_: str, n: Any, k: Any) -> Any:
    if all(isinstance(x, Fraction) and x.denominator == 1 and x >= 0 for x in (n, k)):
        if n > 100_000 or min(k, abs(n - k)) > 12_000:
            raise TooLargeError
        return Fraction(math.comb(int(n), int(k)))
    if isinstance(k, Fraction) and k.denominator == 1 and 0 <= k <= 100:  # n (n - 1) ... (n - k + 1) / k!
        number = n if isinstance(n, Fraction) else _float(n)
        return math.prod(
            (number - i for i in range(int(k))), start=Fraction(1) if number is n else mpc(1)
        ) / math.factorial(int(k))
    if max(abs(_float(n)), abs(_float(k))) > 10**4:
        raise TooLargeError
    n, k = _float(n), _float(k)
    return _gamma(n + 1) / (_gamma(k + 1) * _gamma(n - k + 1))


def _call(name: str, *arguments: Any) -> Any:
    if name in ("floor", "ceil", "abs") and isinstance(arguments[0], Fraction):
        return Fraction(_ROUNDING[name](arguments[0]))
    values = [_float(argument) for argument in arguments]
    if any(abs(value) > 10**6 for value in values) and name not in ("ln", "log", "lg", "abs", "sqrt"):
        raise TooLargeError
    if name in ("ln", "log", "lg") and values[0] == 0:
        raise NoValueError("the logarithm of zero")
    return _MATH[name](*values)


def _apply(name: str, *arguments: Any) -> Any:
    """A function that nobody has defined: some value that depends on its name and its arguments alone."""
    shown = [str(a) if isinstance(a, Fraction) else mp.nstr(a, 40) for a in arguments]
    drawn = hashlib.sha256(repr((name, shown)).encode()).digest()
    return Fraction(int.from_bytes(drawn[:6], "big") % 99_991 + 7, 10_007)


def _undecided(*_: Any) -> Any:
    raise NoValueError("plus or minus is two values")


def _logarithm(value: Any, base: Any = None) -> Any:
    if base is None:
        return mp.log(value)
    if base in (0, 1):
        raise NoValueError("a logarithm to base 0 or 1")
    return mp.log(value) / mp.log(base)


_MATH: dict[str, Callable[..., Any]] = {
    **{name: getattr(mp, name) for name in word_list("exp sin cos tan cot sec csc sinh cosh tanh floor ceil sqrt")},
    **{f"arc{name}": getattr(mp, f"a{name}") for name in ("sin", "cos", "tan", "cot")},
    "ln": mp.log,
    "log": _logarithm,
    "lg": lambda value: mp.log(value) / mp.log(10),
    "abs": abs,
}
_ROUNDING: dict[str, Callable[[Fraction], Fraction | int]] = {"floor": math.floor, "ceil": math.ceil, "abs": abs}
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _exact(lambda a, b: a + b),
    "mul": _exact(lambda a, b: a * b),
    "div": _divide,
    "neg": lambda _, a: -a,
    "pow": _power,
    "root": _root,
    "fact": _factorial,
    "binom": _binomial,
    "pm": _undecided,
    "degree": lambda _, a: _float(a) * mp.pi / 180,
    "call": _call,
    "apply": _apply,
}
