r"""Random answers of every kind that the verifier knows: spellings that say the same, and golds that say something else.

Each function of KINDS draws one value and gives its spellings, the first of which is the gold answer, and gold answers of other
values of the same kind: near ones, and those that a careless reader takes for it. No spelling may be paid under one of these.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Answer:
    right: list[str]  # the gold answer, and other spellings of it
    others: list[str]  # gold answers of other values
    wrong: list[str] = field(default_factory=list)  # texts that are no spelling of any value here


Draw = Callable[[random.Random], Answer]

LENGTHS = ("cm", "m", "km", "ft", "mm")
WORDS = ("even", "odd", "Evelyn", "Tuesday", "parabola", "ellipse", "undefined", "yes", "increasing", "red")


def _numbers(rng: random.Random, num: int, low: int = -20, high: int = 20) -> list[int]:
    return rng.sample([n for n in range(low, high + 1) if n], num)


def _joined(items: list[int]) -> str:
    return ", ".join(map(str, items))


def unit(rng: random.Random) -> Answer:
    n = rng.randint(2, 999)
    name, other = rng.sample(LENGTHS, 2)
    power = rng.choice(["", "^2", "^3"])
    different = {"": "^2", "^2": "^3", "^3": "^2"}[power]
    braced = power.replace("^", "^{") + "}" * bool(power)
    return Answer(
        [
            f"{n} \\text{{ {name}}}{power}",
            f"{n} {name}{power}",
            f"{n}\\,\\mathrm{{{name}}}{braced}",
            f"${n}$ {name}{power}",
        ],
        [f"{n} \\text{{ {other}}}{power}", f"{n + 1} \\text{{ {name}}}{power}", f"{n} \\text{{ {name}}}{different}"],
        [f"{n} \\text{{ thousand {name}}}", f"{n} \\text{{ million }} {name}"],
    )


def speed(rng: random.Random) -> Answer:
    n = rng.randint(2, 99)
    return Answer(
        [
            f"{n} \\text{{ km/h}}",
            f"{n} km/h",
            f"{n} \\frac{{\\text{{km}}}}{{\\text{{h}}}}",
            f"{n} \\text{{ km per hour}}",
        ],
        [f"{n} \\text{{ m/s}}", f"{n} \\text{{ h/km}}", f"{n} \\text{{ km}}", f"{n - 1} \\text{{ km/h}}"],
    )


def money(rng: random.Random) -> Answer:
    n = rng.randint(2, 999)
    return Answer(
        [f"\\${n}", f"{n} \\text{{ dollars}}", f"${n}", f"\\${n}.00", f"{n} dollars"],
        [f"\\${n + 1}", f"{n} \\text{{ cents}}", f"-\\${n}", f"\\${n}.50"],
        [f"\\${n} \\text{{ million}}"],
    )


def angle(rng: random.Random) -> Answer:
    n = rng.randint(2, 359)
    return Answer(
        [f"{n}^\\circ", f"{n}^{{\\circ}}", f"{n}°", f"{n} \\text{{ degrees}}"],
        [f"{n + 1}^\\circ", f"{n} \\text{{ radians}}", f"-{n}^\\circ"],
    )


def base(rng: random.Random) -> Answer:
    one, two = rng.sample(range(5, 10), 2)
    digits = str(rng.randint(1, 4)) + "".join(str(rng.randint(0, 4)) for _ in range(rng.randint(1, 4)))
    return Answer(
        [f"{digits}_{one}", f"{digits}_{{{one}}}", f"0{digits}_{one}", f"{digits}_{{\\text{{{one}}}}}"],
        [f"{digits}_{two}", f"{digits}0_{one}", f"1{digits}_{one}", f"-{digits}_{one}"],
    )


def percent(rng: random.Random) -> Answer:
    n = rng.randint(2, 99)
    return Answer(
        [f"{n}\\%", f"{n}%", f"{n} \\%", f"{n / 100}", f"{n} \\text{{ percent}}", f"{n}"],
        [f"{n + 1}\\%", f"-{n}\\%", f"{10 * n}\\%"],
        [f"{n}\\%\\%", f"\\text{{less than }} {n}\\%"],
    )


def complex_number(rng: random.Random) -> Answer:
    a, b = rng.sample(range(2, 30), 2)
    return Answer(
        [
            f"{a} + {b}i",
            f"{b}i + {a}",
            f"{a}+{b} \\mathrm{{i}}",
            f"({a} + {b}i)",
            f"{a} - (-{b}i)",
            f"{a} + i \\cdot {b}",
        ],
        [f"{a} - {b}i", f"{b} + {a}i", f"-{a} + {b}i", f"{a + b}", f"{a}", f"{a} + {b}"],
    )


def a_set(rng: random.Random) -> Answer:
    items = _numbers(rng, rng.randint(2, 5))
    mixed = rng.sample(items, len(items))
    fewer, more = _joined(items[1:]), _joined([*items, 21])
    return Answer(
        [f"\\{{{_joined(items)}\\}}", f"\\{{{_joined(mixed)}\\}}", f"\\left\\{{{_joined(mixed)}\\right\\}}"],
        [
            f"({_joined(items)})",
            f"\\{{{fewer}\\}}",
            f"\\{{{more}\\}}",
            f"\\{{{_joined([items[0] + 50, *items[1:]])}\\}}",
        ],
    )


def a_list(rng: random.Random) -> Answer:
    items = _numbers(rng, rng.randint(2, 4))
    mixed = rng.sample(items, len(items))
    *first, last = map(str, mixed)
    return Answer(
        [_joined(items), _joined(mixed), f"{', '.join(first)} \\text{{ and }} {last}", f"{', '.join(first)} or {last}"],
        [_joined(items[1:]), _joined([*items, 30]), _joined([items[0] + 50, *items[1:]]), str(sum(items))],
    )


def multiset(rng: random.Random) -> Answer:
    a, b = _numbers(rng, 2)
    return Answer(
        [f"{a}, {a}, {b}", f"{a}, {b}, {a}", f"{b}, {a} \\text{{ and }} {a}"],
        [f"{a}, {b}, {b}", f"{a}, {b}", f"{a}, {a}, {b}, {b}", f"{a}, {a}, {a}"],
    )


def a_tuple(rng: random.Random) -> Answer:
    items = _numbers(rng, rng.randint(3, 4))
    turned = [*items[1:], items[0]]
    rows = " \\\\ ".join(map(str, items))
    return Answer(
        [
            f"({_joined(items)})",
            f"\\left( {_joined(items)} \\right)",
            f"({','.join(map(str, items))})",
            f"\\begin{{pmatrix}} {rows} \\end{{pmatrix}}",
            f"\\langle {_joined(items)} \\rangle",
        ],
        [f"({_joined(turned)})", f"({_joined(items[1:])})", f"({_joined([-items[0], *items[1:]])})"],
    )


def named(rng: random.Random) -> Answer:
    a, b = _numbers(rng, 2)
    return Answer(
        [
            f"x = {a}, y = {b}",
            f"y = {b}, x = {a}",
            f"x={a} \\text{{ and }} y={b}",
            f"(x, y) = ({a}, {b})",
            f"$x={a}$, $y={b}$",
        ],
        [f"x = {b}, y = {a}", f"x = {a}, z = {b}", f"x = {a}, y = {b + 1}", f"x = {a}, y = {b}, z = 0"],
    )


def interval(rng: random.Random) -> Answer:
    a, b = sorted(_numbers(rng, 2))
    opened, closed = rng.choice("[("), rng.choice("])")
    below, above = "<" if opened == "(" else "\\le", "<" if closed == ")" else "\\leq"
    flipped = f"{'[' if opened == '(' else '('}{a}, {b}{closed}"
    return Answer(
        [
            f"{opened}{a}, {b}{closed}",
            f"\\left{opened} {a}, {b} \\right{closed}",
            f"{a} {below} x {above} {b}",
            f"x \\in {opened}{a}, {b}{closed}",
            f"{']' if opened == '(' else '['}{a}, {b}{'[' if closed == ')' else ']'}",
        ],
        [flipped, f"{opened}{a}, {b + 1}{closed}", f"\\{{{a}, {b}\\}}", f"{opened}{a - 1}, {b}{closed}"],
    )


def ray(rng: random.Random) -> Answer:
    a = rng.choice(_numbers(rng, 1))
    return Answer(
        [
            f"({a}, \\infty)",
            f"x > {a}",
            f"{a} < x",
            f"\\left({a}, +\\infty\\right)",
            f"]{a}, \\infty[",
            f"x \\in ({a},\\infty)",
        ],
        [f"[{a}, \\infty)", f"(-\\infty, {a})", f"({a + 1}, \\infty)", f"{a}", "(-\\infty, \\infty)"],
    )


def union(rng: random.Random) -> Answer:
    a, b, c, d = sorted(_numbers(rng, 4))
    return Answer(
        [
            f"({a}, {b}] \\cup [{c}, {d})",
            f"[{c}, {d}) \\cup ({a}, {b}]",
            f"\\left({a},{b}\\right] \\cup \\left[{c},{d}\\right)",
        ],
        [f"({a}, {b}) \\cup [{c}, {d})", f"({a}, {d})", f"({a}, {b}]", f"({a}, {b}] \\cup [{c}, {d}]"],
    )


def line(rng: random.Random) -> Answer:
    a, b = rng.sample(range(2, 15), 2)
    return Answer(
        [f"y = {a}x + {b}", f"y = {b} + {a}x", f"{a}x + {b} = y", f"{a}x - y + {b} = 0", f"y - {b} = {a}x"],
        [f"y = {a}x - {b}", f"y = {b}x + {a}", f"x = {a}y + {b}", f"y = {a}x", f"y = {a}", f"y < {a}x + {b}"],
    )


def circle(rng: random.Random) -> Answer:
    a, r = rng.randint(2, 9), rng.randint(2, 9)
    return Answer(
        [f"(x-{a})^2 + y^2 = {r * r}", f"y^2 + (x - {a})^2 = {r}^2", f"x^2 - {2 * a}x + {a * a} + y^2 = {r * r}"],
        [f"(x+{a})^2 + y^2 = {r * r}", f"(x-{a})^2 + y^2 = {r * r + 1}", f"x^2 + (y-{a})^2 = {r * r}", f"{r * r}"],
    )


def congruence(rng: random.Random) -> Answer:
    m = rng.randint(3, 19)
    r = rng.randrange(1, m)
    return Answer(
        [f"x \\equiv {r} \\pmod{{{m}}}", f"x \\equiv {r + m} \\pmod{{{m}}}", f"x \\equiv {r - m} \\pmod {{{m}}}"],
        [f"x \\equiv {r + 1} \\pmod{{{m}}}", f"x \\equiv {r} \\pmod{{{m + 1}}}", f"y \\equiv {r} \\pmod{{{m}}}"],
    )


def matrix(rng: random.Random) -> Answer:
    a, b, c, d = _numbers(rng, 4)
    body = f"{a} & {b} \\\\ {c} & {d}"
    return Answer(
        [
            f"\\begin{{pmatrix}} {body} \\end{{pmatrix}}",
            f"\\begin{{bmatrix}} {body} \\end{{bmatrix}}",
            f"\\begin{{pmatrix}}{body.replace(' ', '')}\\end{{pmatrix}}",
            f"[[{a}, {b}], [{c}, {d}]]",
        ],
        [
            f"\\begin{{pmatrix}} {a} & {c} \\\\ {b} & {d} \\end{{pmatrix}}",
            f"\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d + 1} \\end{{pmatrix}}",
            f"\\begin{{vmatrix}} {body} \\end{{vmatrix}}",
            f"\\begin{{pmatrix}} {a} & {b} & {c} & {d} \\end{{pmatrix}}",
            str(a * d - b * c),
        ],
    )


def choice(rng: random.Random) -> Answer:
    letter, *others = rng.sample("ABCDE", 4)
    return Answer(
        [
            f"\\text{{({letter})}}",
            letter,
            f"({letter})",
            f"\\textbf{{({letter})}}",
            f"The answer is {letter}",
            f"{letter}.",
            f"\\mathrm{{{letter}}}",
            f"{letter}: because it is so",
        ],
        [f"\\text{{({each})}}" for each in others],
        [f"{letter} or {others[0]}", f"not {letter}", f"{letter}{others[0]}", f"either {letter} or {others[0]}"],
    )


def words(rng: random.Random) -> Answer:
    word, *others = rng.sample(WORDS, 4)
    return Answer(
        [
            f"\\text{{{word}}}",
            word,
            word.lower(),
            word.upper(),
            f"\\text{{ {word} }}",
            f"**{word}**",
            f"\\textit{{{word}}}",
        ],
        [f"\\text{{{each}}}" for each in others],
        [f"not {word}", f"{word} or {others[0]}", f"{word} {others[0]}", word[::-1]],
    )


def ratio(rng: random.Random) -> Answer:
    a, b = rng.sample(range(1, 10), 2)
    while math.gcd(a, b) > 1:
        a, b = rng.sample(range(1, 10), 2)
    k = rng.randint(2, 5)
    return Answer(
        [f"{a}:{b}", f"{a} : {b}", f"{10 * k * a}:{10 * k * b}"],
        [f"{b}:{a}", f"{a + 10}:{b}", f"{a}:{b}:1", f"{a + b}"],
    )


def clock(rng: random.Random) -> Answer:
    hour, minute = rng.randint(1, 11), rng.randint(10, 58)
    return Answer(
        [
            f"{hour}:{minute} \\text{{ p.m.}}",
            f"{hour}:{minute} pm",
            f"{hour}:{minute}PM",
            f"{hour}:{minute}\\text{{ p.m.}}",
            f"{hour}:{minute}",
        ],
        [f"{hour}:{minute + 1} \\text{{ p.m.}}", f"{hour + 1}:{minute} \\text{{ p.m.}}", f"{minute}"],
        [f"{hour}.{minute}"],
    )


def radical(rng: random.Random) -> Answer:
    a, b = rng.randint(2, 20), rng.choice([2, 3, 5, 6, 7, 10])
    return Answer(
        [
            f"{a}\\sqrt{{{b}}}",
            f"\\sqrt{{{a * a * b}}}",
            f"{a}*sqrt({b})",
            f"{a}√{b}",
            f"{a} \\cdot \\sqrt {b}" if b < 10 else f"{a} \\cdot \\sqrt{{{b}}}",
            f"\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}",
            f"{a * math.sqrt(b):.9f}",
        ],
        [f"{a + 1}\\sqrt{{{b}}}", f"{a}\\sqrt{{{b + 1}}}", f"-{a}\\sqrt{{{b}}}", f"{a * b}", f"\\pm {a}\\sqrt{{{b}}}"],
        [f"{a * math.sqrt(b):.2f}"],
    )


def fraction(rng: random.Random) -> Answer:
    p, q = rng.randint(1, 40), rng.choice([3, 7, 9, 11, 13])
    value = Fraction(p, q)
    if value.denominator == 1:
        value += Fraction(1, 3)
    p, q = value.numerator, value.denominator
    whole, rest = divmod(p, q)
    mixed = [f"{whole}\\frac{{{rest}}}{{{q}}}", f"{whole} {rest}/{q}"] if whole else [f"\\tfrac{{{p}}}{{{q}}}"]
    return Answer(
        [f"\\frac{{{p}}}{{{q}}}", f"{p}/{q}", f"\\dfrac{{{3 * p}}}{{{3 * q}}}", f"{{{p} \\over {q}}}", *mixed],
        [f"\\frac{{{q}}}{{{p}}}", f"\\frac{{{p + 1}}}{{{q}}}", f"-\\frac{{{p}}}{{{q}}}", f"{p}", f"{float(value):.3f}"],
        [f"{float(value):.8f}", f"{p}, {q}", f"{p} \\text{{ in }} {q}"],
    )


def repeating(rng: random.Random) -> Answer:
    n = rng.choice([each for each in range(10, 99) if each % 11])
    return Answer(
        [f"0.\\overline{{{n}}}", f"\\frac{{{n}}}{{99}}", f"{n}/99", f"0.{n}{n}{n}..."],
        [f"0.{n}", f"0.\\overline{{{n + 1}}}", f"\\frac{{{n}}}{{100}}", f"0.{n}{n}{n}", f"0.\\overline{{0{n}}}"],
    )


def polynomial(rng: random.Random) -> Answer:
    a, b = rng.sample(range(2, 9), 2)
    s, p = a + b, a * b
    return Answer(
        [
            f"x^2 + {s}x + {p}",
            f"{p} + {s}x + x^2",
            f"(x+{a})(x+{b})",
            f"x^{{2}}+{s} x+{p}",
            f"x**2 + {s}*x + {p}",
            f"x² + {s}x + {p}",
        ],
        [
            f"x^2 - {s}x + {p}",
            f"x^2 + {s}x",
            f"x^2 + {p}x + {s}",
            f"y^2 + {s}y + {p}",
            f"x^3 + {s}x + {p}",
            f"x^2 + {s}x + {p + 1}",
        ],
        [f"x_2 + {s}x + {p}", f"x^2 + {s}x + {p} \\ldots"],
    )


def pi_multiple(rng: random.Random) -> Answer:
    a, b = rng.sample([2, 3, 5, 7, 11], 2)
    return Answer(
        [
            f"\\frac{{{a}\\pi}}{{{b}}}",
            f"{a}\\pi/{b}",
            f"{a}*pi/{b}",
            f"\\frac{{{a}}}{{{b}}} \\pi",
            f"\\frac{{{a}π}}{{{b}}}",
        ],
        [f"\\frac{{{b}\\pi}}{{{a}}}", f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a}\\pi}}{{{b + 1}}}", f"{a}\\pi"],
        [f"{a * 3.14 / b:.2f}"],
    )


def function_value(rng: random.Random) -> Answer:
    n = rng.randint(3, 30)
    name = rng.choice(["sin", "cos", "tan", "ln"])
    return Answer(
        [f"\\{name} {n}", f"\\{name}({n})", f"\\{name}\\left({n}\\right)", f"{name}({n})"],
        [
            f"\\{name} {n + 1}",
            f"\\{'cos' if name == 'sin' else 'sin'} {n}",
            f"{n}",
            f"-\\{name} {n}",
            f"\\{name} {n}^\\circ",
        ],
    )


def power(rng: random.Random) -> Answer:
    a, n = rng.randint(2, 9), rng.randint(3, 12)
    return Answer(
        [f"{a}^{{{n}}}", f"{a**n}", f"{a}**{n}", f"{a}^{{{n}}}.", f"{a**n:,}"],
        [f"{a}^{{{n + 1}}}", f"{a * n}", f"{a}^{{-{n}}}", f"-{a}^{{{n}}}", f"{a**n + 1}"],
    )


def large(rng: random.Random) -> Answer:
    n = rng.randint(10**6, 10**9)
    spaced = f"{n:,}"
    return Answer(
        [
            str(n),
            spaced,
            spaced.replace(",", "{,}"),
            spaced.replace(",", "\\,"),
            spaced.replace(",", " "),
            f"{n}.0",
            f"\\${n}",
        ],
        [str(n + 1), str(n * 10), str(n // 1000), f"-{n}", f"{n}.5"],
    )


def scientific(rng: random.Random) -> Answer:
    a, n = rng.randint(2, 9), rng.randint(2, 12)
    return Answer(
        [
            f"{a} \\times 10^{{{n}}}",
            f"{a}\\cdot 10^{{{n}}}",
            f"{a}e{n}",
            f"{a * 10**n}",
            f"{a} * 10^{n}" if n < 10 else f"{a}*10**{n}",
        ],
        [f"{a} \\times 10^{{{n + 1}}}", f"{a} \\times 10^{{-{n}}}", f"{a + 1} \\times 10^{{{n}}}", f"{a}"],
    )


def function_rule(rng: random.Random) -> Answer:
    a, b = rng.sample(range(2, 9), 2)
    return Answer(
        [f"f(x) = {a}x + {b}", f"f\\left(x\\right) = {b} + {a}x", f"{a}x + {b}"],
        [f"f(x) = {b}x + {a}", f"f(x) = {a}x - {b}", f"f'(x) = {a}x + {b + 1}"],
        [f"f(x) = {a}x + {b} \\text{{ or }} f(x) = {a}x"],
    )


def several_boxes(rng: random.Random) -> Answer:
    a, b = _numbers(rng, 2)
    between = rng.choice([" and ", ", ", " \\text{ or } ", " \\quad ", " \\\\ "])
    return Answer(
        [f"{a}, {b}", f"\\boxed{{{a}}}{between}\\boxed{{{b}}}", f"\\boxed{{{b}}}{between}\\boxed{{{a}}}"],
        [f"{a}", f"{b}"],
    )


def undecided(rng: random.Random) -> Answer:
    a, b = _numbers(rng, 2, 100, 999)
    return Answer(
        [str(a), f"The answer is {a}.", f"n = {a}"],
        [str(b)],
        [
            f"{a} but maybe {b}",
            f"either {a} or else {b}",
            f"not {a}",
            f"{a} = {b}",
            f"{a} or {b}",
            f"perhaps {a}",
            f"{a} \\ne {b}",
            f"{a} \\text{{ or }} {b}",
            f"neither {a} nor {b}",
        ],
    )


def dressed_up(rng: random.Random) -> Answer:
    """A number with something beside it that changes it."""
    n = rng.randint(2, 99)
    return Answer(
        [str(n), f" {n} ", f"${n}$", f"\\mathbf{{{n}}}", f"{n}.", f"{{{n}}}"],
        [str(n + 1), f"-{n}"],
        [
            f"{n}'",
            f"\\overline{{{n}}}",
            f"\\dot{{{n}}}",
            f"{n}\\text{{ million}}",
            f"\\text{{negative }}{n}",
            f"\\text{{half of }}{n}",
            f"{n}i",
            f"{n}\\mathrm{{i}}",
            f">{n}",
            f"\\sqrt{{{n}}}",
            f"{n}!" if n > 2 else f"{n}!!",
            f"{n}x",
            f"{n - 1}+1",
            f"{n}\\ldots",
            f"\\frac{{{n}}}{{1}} + 0",
        ],
    )


KINDS: list[Draw] = [
    unit, speed, money, angle, base, percent, complex_number, a_set, a_list, multiset, a_tuple, named, interval, ray, union,
    line, circle, congruence, matrix, choice, words, ratio, clock, radical, fraction, repeating, polynomial, pi_multiple,
    function_value, power, large, scientific, function_rule, several_boxes, undecided, dressed_up,
]  # fmt: skip
