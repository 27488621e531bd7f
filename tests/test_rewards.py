"""The reward functions, called directly."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import accuracy, exact_match, format, language, overlong, repetition
from grpo.rewards.verifier.extraction import last_box, last_number
from grpo.rewards.verifier.reading import read
from grpo.rewards.verifier.values import Unread

from grpo.scoring.worker import Outcome

N = 50_000


def tag(content: str) -> str:
    return f"<think> let me see </think> <answer>{content}</answer>"


# ---- accuracy: what is right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("18", "18"),
        (" 18.0 ", "18"),
        ("$18", "18"),
        ("\\$18.00", "18"),
        ("18 dollars", "18"),
        ("**18**", "18"),
        ("18 %", "18"),
        ("-5", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("12,000", "12000"),
        ("12{,}000", "12,\\!000"),
        ("0.5", "\\frac{1}{2}"),
        ("1/2", "\\frac12"),
        ("\\dfrac{1}{2}", "0.5"),
        ("50%", "50"),
        ("20", "20%"),
        ("0.2", "20%"),
        (
            "20%",
            "0.2",
        ),  # a gold of at most one is the number that a percentage is; above one, it was asked for in percent
        ("1.45e-5", "0.0000145"),
        ("120", "120^\\circ"),
        ("1" + "0" * 40, "1" + "0" * 40),
        ("The answer is 18.", "18"),
        ("Janet makes 9 * 2 = $18 every day.", "18"),
        ("She pays $5 and gets $18 back", "18"),
        ("If $x=2$ then the total is 18", "18"),
        ("So it costs $x = 18$ dollars.", "18"),
        ("Step 1: \\boxed{7}. Step 2: \\boxed{18}", "18"),
        ("The total is \\boxed{18} for 4 people", "18"),
        ("It is $ 2\\sqrt{2} $.", "\\sqrt{8}"),
        ("$x = \\text{even}$", "\\text{even}"),
        ("\\[ x = \\frac{3}{2} \\]", "\\frac{3}{2}"),
        ("n = 18", "18"),
        ("9 * 2 = 18", "18"),
        ("18 \\text{ dollars}", "18"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("x = \\frac{3}{2}", "x=1.5"),
        ("3/2", "x = \\frac{3}{2}"),
        ("3, 1, 2", "1,2,3"),
        ("$1$, $2$ and $3$", "1,2,3"),
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("Evelyn", "\\text{Evelyn}"),
        ("\\text{evelyn}", "Evelyn"),
        ("C", "\\text{(C)}"),
        ("\\[\n\\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}\n\\]", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("\\boxed{60}", "\\[\n\\boxed{60}\n\\]"),
    ],
)
def test_an_answer_equal_to_gold_is_right(content: str, answer: str) -> None:
    assert accuracy(tag(content), answer) == 1.0


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("19", "18"),
        ("18.01", "18"),
        ("-18", "18"),
        ("0.333333", "1/3"),  # plain numbers are compared exactly
        ("1" + "0" * 40 + "1", "1" + "0" * 40 + "2"),  # equal as floats
        ("50", "1/2"),
        ("18 or 19", "18"),
        ("19 or 18", "18"),
        ("(2,1)", "(1,2)"),
        ("neve", "\\text{even}"),  # an anagram has the same letters as factors
        ("5", "5t"),
        ("3 2", "5"),  # neither a mixed number,
        ("3 000", "0"),  # a product,
        ("1 2 3", "6"),  # and another
        ("x=3, x=4", "4"),
        ("(" * 8 + "18" + ")" * 8, "18"),  # too deep to be read
        ("10^5 metres", "5"),
        ("9 + 2 dollars", "2"),
        ("See step_3", "3"),
        ("at 5:30 in the morning", "30"),
        ("CO2", "2"),
    ],
)
def test_an_answer_different_from_gold_is_wrong(content: str, answer: str) -> None:
    assert accuracy(tag(content), answer) == 0.0


def test_each_source_looks_in_its_own_place_only() -> None:
    completion = "<think> 3 </think><answer> 1 </answer> \\boxed{2} done, 3"
    for source, right in (("answer_tag", "1"), ("boxed", "2"), ("last_number", "3")):
        verdicts = {answer: accuracy(completion, answer, source=source) for answer in "123"}
        assert verdicts == {answer: float(answer == right) for answer in "123"}


def test_the_last_of_several_tags_or_boxes_counts() -> None:
    assert accuracy("<answer>1</answer> wait, <answer>2</answer>", "2") == 1.0
    assert accuracy("<answer>1</answer> wait, <answer>2</answer>", "1") == 0.0
    assert accuracy("<answer>2</answer> wait, <answer>1", "2") == 1.0  # cut off: the last complete pair
    assert last_box("\\boxed{1}. Half: \\boxed{\\frac{1}{2}} \\boxed{unclosed") == "\\frac{1}{2}"
    assert last_box("\\boxed{0} so \\boxed{1}, \\boxed{2} or \\boxed{3} \\boxed{3}") == "1, 2, 3"  # one list
    assert last_box("{\\boxed{\\boxed{5} \\{}}") == "5"
    assert last_box("no box, \\boxed 5") is None


def test_a_number_that_ends_a_list_of_alternatives_is_no_answer() -> None:
    assert last_number("It is 3 or 4") is None
    assert last_number("1, 2, 3, 4") is None
    assert last_number("7, or 7") == "7"
    assert last_number("3 apples cost $4") == "$4"


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source is 'tag'; it is one of answer_tag, boxed, last_number"):
        accuracy("5", "5", source="tag")  # type: ignore[arg-type]


# ---- accuracy: what must never be paid -------------------------------------------------------------------------------

NUMBERS = [str(n) for n in range(31)]
LISTED = ", ".join(NUMBERS)
SPAM = [
    LISTED,
    "\\{" + LISTED + "\\}",
    "[" + LISTED + "]",
    "(" + LISTED + ")",
    " or ".join(NUMBERS),
    " ".join(NUMBERS),
    "/".join(NUMBERS),
    "=".join(NUMBERS),
    "; ".join(NUMBERS),
    "\n".join(NUMBERS),
    "\\pm ".join(NUMBERS),
    "".join(f"\\boxed{{{n}}}" for n in NUMBERS),
    ", ".join(f"${n}$" for n in NUMBERS),
    " ".join(f"$x={n}$" for n in NUMBERS),
    ", ".join(f"x={n}" for n in NUMBERS),
    "\\boxed{" + LISTED + "}",
    "\\boxed{\\{0,\\ldots,30\\}}",
    "It is 1, 2, 3, 4, or 5",
    "It is 3 or 4",
    "3 \\approx 4",
    "0 \\le x \\le 30",
    "[0, 30]",
    "(-\\infty,\\infty)",
    "\\mathbb{R}",
    "x",
    "x=x",
    "0=0",
    "0/0",
    "1/0",
    "nan",
    "\\infty",
    "\\emptyset",
    "0 \\pm 30",
]
ECHOES = ["answer here", "", " ", "\\boxed{}", "\\boxed{ }", "$$", "...", "?", "\x00\x00", "\\text{}", "{}", "[]"]


@pytest.mark.parametrize("spam", SPAM)
def test_no_text_is_right_for_two_different_answers(spam: str) -> None:
    answers = [*NUMBERS, "1/2", "-1", "\\sqrt{2}", "y", "\\text{(A)}", "\\text{(B)}", "1,2"]
    for completion, source in ((tag(spam), "answer_tag"), (f"\\boxed{{{spam}}}", "boxed"), (spam, "last_number")):
        paid = [answer for answer in answers if accuracy(completion, answer, source=source) == 1.0]
        assert len(paid) <= 1, (source, paid)


@pytest.mark.parametrize("echo", ECHOES)
def test_an_echo_of_the_prompt_or_an_empty_answer_is_wrong(echo: str) -> None:
    for answer in ("0", "1", "x", "\\text{even}", "\\frac{1}{2}"):
        for completion in (tag(echo), echo, f"\\boxed{{{echo}}}"):
            for source in ("answer_tag", "boxed", "last_number"):
                assert accuracy(completion, answer, source=source) == 0.0


BOMBS = [
    "10**10**10",
    "10^{10^{10}}",
    "9^{(9+9)^9}",
    "{9^9}^{9^9}",
    "(((9^9)^9)^9)^9",
    "2^{99999999}",
    "(x+1)^{9999}",
    "99999999!",
    "3!!!!!!",
    "\\gcd(10^{10^{10}}, 3)",
    "\\Gamma(99999999)",
    "\\binom{99999999}{5555555}",
    "\\sqrt[9^{9^9}]{3}",
    "\\sum_{k=1}^{99999999} k",
    "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}^{99999999}",
    "(" * 30 + "1" + ")" * 30,
    "9" * N,
    "9" * 400,
    "9," * N,
    "1,111" * N,
    "1" + ",111" * N + "1",
    "9." * N,
    "9/" * N,
    "-" * N + "9",
    " " * N + "x 9",
    "$" * N,
    "$9" * N,
    "\\(" * N,
    "\\[9" * N,
    "(" * N,
    "\\frac{" * N + "1" + "}{2}" * N,
    "\\sqrt{" * N + "2" + "}" * N,
    "\\boxed{" * N,
    "\\boxed{" * N + "7" + "}" * (N - 1) + "8}",
    "\\boxed " * N,
    "{" * N,
    "}" * N,
    "<answer>" * N,
    "</answer>" * N,
    "\x00" * N,
    "9\x00" * N,
    "\u202e7" * N,
    "\N{SUPERSCRIPT TWO}" * N,
    "1 " + "," * N + " 2",
    "e" * N,
    "\\text{" * N,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: f"{bomb[:12]!r}x{len(bomb)}")
def test_hostile_text_is_wrong_and_costs_little(bomb: str) -> None:
    started = time.process_time()
    for answer in ("7777", "\\sqrt{2}+x"):
        assert accuracy(tag(bomb), answer) == 0.0
        assert accuracy(f"\\boxed{{{bomb}}}", answer, source="boxed") == 0.0
        assert accuracy(bomb, answer, source="last_number") == 0.0
    assert exact_match(tag(bomb), "7777") == 0.0
    assert format(bomb) == 0.0
    assert -1.0 <= repetition(bomb) <= 0.0
    assert 0.0 <= language(bomb, "How many?") <= 1.0
    assert time.process_time() - started < 3.0  # most take a few ms; a quadratic scan would take minutes


CORPUS = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "hostile_completions.jsonl").read_text().splitlines()
]


def spelled_out(completion: str | list[list[Any]]) -> str:
    """Long completions are stored as pieces and how often each comes."""
    return completion if isinstance(completion, str) else "".join(piece * times for piece, times in completion)


@pytest.mark.parametrize("why", sorted({entry["why"] for entry in CORPUS}))
def test_every_hostile_completion_gets_its_verdict_in_time(why: str) -> None:
    """Written by hand: `why` it is hostile (or right, oddly spelled), the gold `answer`, and the one right verdict."""
    for entry in (entry for entry in CORPUS if entry["why"] == why):
        started = time.process_time()
        verdict = accuracy(spelled_out(entry["completion"]), entry["answer"], source=entry.get("source", "answer_tag"))
        assert verdict == entry["verdict"], entry
        assert time.process_time() - started < 2.0, entry  # the slowest takes 0.3 s


def test_the_corpus_cannot_be_passed_by_refusing_or_paying_everything() -> None:
    counts = {verdict: sum(entry["verdict"] == verdict for entry in CORPUS) for verdict in (0, 1, None)}
    assert counts[0] > 800
    assert counts[1] > 150
    assert counts[None] > 50


def test_no_hostile_completion_is_paid_under_two_numerically_different_golds() -> None:
    # none is a hundred times another: which of the two a percentage is, the gold decides
    golds = ["0", "0.2", "1/2", "17", "18", "21", "51", "2000", "7776", "7777", "6.63 \\times 10^{-34}"]
    for entry in CORPUS[::8]:
        completion, source = spelled_out(entry["completion"]), entry.get("source", "answer_tag")
        paid = [gold for gold in golds if accuracy(completion, gold, source=source) == 1.0]
        assert len(paid) <= 1, (entry, paid)


# ---- accuracy: kinds of answers ---------------------------------------------------------------------------------------


def verdicts(candidate: str, answer: str) -> set[float | None]:
    """In a tag and in a box."""
    return {accuracy(tag(candidate), answer), accuracy(f"So \\boxed{{{candidate}}}", answer, source="boxed")}


EQUAL = {
    "complex numbers": "1+2i ¦ 1+2\\mathrm{i} ¦ 2\\cdot i+1 ¦ 1+2j",
    "nested radicals": "\\frac{1+\\sqrt{7}}{2} ¦ \\sqrt{\\frac{4+\\sqrt{7}}{2}} ¦ \\frac{\\sqrt{8+2\\sqrt{7}}}{2}",
    "plus or minus": "\\frac{2 \\pm \\sqrt{3}}{5} ¦ "
    "\\frac{2+\\sqrt3}{5}, \\frac{2-\\sqrt3}{5} ¦ x = \\frac{2 \\pm \\sqrt 3}{5}",
    "repeating decimals": "\\frac{5}{11} ¦ 0.\\overline{45} ¦ 0.4545\\ldots ¦ 5/11",
    "times": "9:05 ¦ 9:05 \\text{ am} ¦ \\text{9:05 a.m.}",
    "mixed percentages": "12\\frac12\\% ¦ 12.5 ¦ \\frac{1}{8} ¦ 12\\frac{1}{2} ¦ 12.5 \\text{ percent}",
    "congruences": "n \\equiv 4 \\pmod 9 ¦ n \\equiv 13 \\pmod{9} ¦ 4 \\pmod 9 ¦ 4",
    "styles": "8 ¦ {\\bf 8} ¦ \\color{blue}{8} ¦ \\therefore 8 ¦ {{8}} ¦ "
    "8\\quad ¦ 8~ ¦ “8” ¦ \\large 8 ¦ \\underline{8} ¦ \\text{8}",
    "plain spellings": "\\frac{\\pi}{3} ¦ pi/3 ¦ π/3 ¦ \\pi/3",
    "stars": "6\\sqrt{5}x^3 ¦ 6*sqrt(5)*x**3 ¦ 6√5x³ ¦ \\sqrt{180} x^3",
    "halves": "7\\frac12 ¦ 7½ ¦ 7.5 ¦ \\frac{15}{2} ¦ 7 1/2",
    "intervals": "(4,\\infty) ¦ x>4 ¦ 4<x ¦ ]4,\\infty[ ¦ x \\in (4, \\infty)",
    "unions": "x<1 \\text{ or } x \\ge 5 ¦ (-\\infty,1)\\cup[5,\\infty) ¦ [5,\\infty) \\cup (-\\infty,1)",
    "all but a number": "\\mathbb{R} \\setminus \\{2\\} ¦ x \\ne 2 ¦ (-\\infty,2)\\cup(2,\\infty)",
    "trigonometry": "\\frac{\\sqrt{3}}{2} ¦ \\sin 60^\\circ ¦ \\cos\\frac{\\pi}{6}",
    "logarithms": "\\ln 27 ¦ 3\\ln 3 ¦ \\log_e 27",
    "logarithms to a base": "\\log_2 3 ¦ \\frac{\\ln 3}{\\ln 2}",
    "thousands": "2500000 ¦ 2 500 000 ¦ 2\\,500\\,000 ¦ 2{,}500{,}000 ¦ 2,500,000 ¦ 2~500~000",
    "choices": "D ¦ (D) ¦ \\text{D: none of them} ¦ The answer is D ¦ \\textbf{(D)}",
    "labels in Chinese": "31 ¦ 答案是31 ¦ 答案：31。 ¦ 31元",
    "full-width brackets": "(3,8) ¦ （3，8）",
    "columns": "\\begin{pmatrix} 4 \\\\ 9 \\end{pmatrix} ¦ (4,9) ¦ "
    "\\begin{bmatrix}4\\\\9\\end{bmatrix} ¦ \\langle 4, 9\\rangle",
    "named values": "a=2, b=7 ¦ b=7, a=2 ¦ (a,b)=(2,7) ¦ a=2 \\text{ and } b=7",
    "units": "12 ¦ 12 \\text{ cm}^2 ¦ 12 cm^2 ¦ "
    "12 square inches ¦ 12 \\frac{\\text{m}}{\\text{s}} ¦ 12 \\mathrm{m\\,s^{-1}}",
    "bases": "213_5 ¦ 213 ¦ 213_{5}",
    "lines": "y = 3x-4 ¦ 3x-y-4=0 ¦ y=-4+3x",
    "sums to one variable": "17 ¦ m+n=17 ¦ AB = 17 ¦ \\text{Area} = 17 ¦ S_{10} = 17",
    "large powers": "\\frac{(x^{40}-1)(y^{40}-1)}{(x-1)(y-1)} ¦ \\frac{(1-y^{40})(1-x^{40})}{(1-y)(1-x)}",
    "words": "\\text{does not exist} ¦ DNE",
}  # fmt: skip


@pytest.mark.parametrize("kind", EQUAL)
def test_spellings_of_one_value_are_right_for_each_other(kind: str) -> None:
    gold, *candidates = EQUAL[kind].split(" ¦ ")
    refused = [candidate for candidate in [gold, *candidates] if verdicts(candidate, gold) != {1.0}]
    assert refused == []


DIFFERENT = {
    "text is no unit": "3 ¦ 3\\mathrm{i} ¦ \\text{negative }3 ¦ "
    "3\\text{ million} ¦ \\text{half of }3 ¦ 3\\text{ or less} ¦ \\text{at least }3",
    "other units": "6\\text{ hours} ¦ 6\\text{ minutes} ¦ 6\\text{ m}",
    "powers of units": "6\\text{ cm}^2 ¦ 6\\text{ cm}^3 ¦ 6\\text{ cm}",
    "radians": "30^\\circ ¦ 30\\text{ radians}",
    "degrees under a function": "\\cos 40^\\circ ¦ \\cos 40 ¦ \\cos 40^\\circ + 10^{-40}",
    "other bases": "25_6 ¦ 25_7 ¦ 17",
    "order of assignments": "x=1, y=2 ¦ 2, 1 ¦ x=2, y=1 ¦ (2,1) ¦ y=1, x=2",
    "end points": "[3,5] ¦ 3, 5 ¦ (3,5) ¦ \\{3,5\\}",
    "a set is no tuple": "\\{1,2\\} ¦ (1,2) ¦ [1,2]",
    "a side of an equation": "x^2+y^2=9 ¦ 9 ¦ x^2+y^2 ¦ x^2+y^2=3",
    "primes, dots and bars": "x ¦ x' ¦ \\dot{x} ¦ \\bar{x} ¦ \\hat x ¦ x_1",
    "tiny numbers": "\\frac{1}{2004!} ¦ \\frac{1}{2006!} ¦ 0",
    "nearly two": "2 ¦ 2-2^{-99} ¦ 2+10^{-300}",
    "irrational and tiny": "e^{-900} ¦ 0 ¦ e^{-901} ¦ 2e^{-900}",
    "cancellation": "\\sqrt{10^{90}+1}-10^{45} ¦ 0",
    "several boxes": "8 ¦ \\boxed{7}\\quad\\boxed{8} ¦ "
    "\\boxed{7} \\text{ or } \\boxed{8} ¦ \\boxed{7}\\\\ \\boxed{8} ¦ \\(\\boxed{7}\\) or \\(\\boxed{8}\\)",
    "undecided": "204 ¦ 203 but maybe 204 ¦ either 203 or else 204 ¦ not 204 ¦ 203 = 204 ¦ perhaps 204",
    "arithmetic": "24 ¦ 20+4 ¦ 4 \\cdot 6 ¦ (4)(6) ¦ \\frac{48}{2} ¦ \\sqrt{500+76} ¦ |4-28| ¦ x-x+24",
    "percent": "20\\% ¦ 2 ¦ 2000 ¦ 0.002 ¦ 2000\\%",
    "percent of a large number": "20 ¦ 0.2 ¦ 2000\\%",
    "percent of a small number": "0.2 ¦ 20 ¦ 0.2\\%",
    "rounded": "\\sqrt{2} ¦ 1.414 ¦ 1.41421",
    "moduli": "x \\equiv 3 \\pmod 7 ¦ x \\equiv 3 \\pmod 8 ¦ x \\equiv 4 \\pmod 7 ¦ y \\equiv 3 \\pmod 7",
    "inequalities": "x > 3 ¦ x \\ge 3 ¦ x < 3 ¦ y > 3 ¦ 3",
    "choices": "B ¦ B or C ¦ not B ¦ BC ¦ A bee",
    "functions": "f(x)=x^2 ¦ g(x)=x^2 ¦ f'(x)=x^2 ¦ f(x)=x^3",
    "absolute values": "|x| ¦ x ¦ -x",
    "rows": "\\begin{pmatrix}1\\\\2\\end{pmatrix} ¦ \\begin{pmatrix}1&2\\end{pmatrix} ¦ (2,1)",
    "determinants": "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix} ¦ \\begin{pmatrix}1&2\\\\3&4\\end{pmatrix} ¦ -2",
    "signs that say something": "3 ¦ >3 ¦ \\neq 3 ¦ \\overline{3} ¦ 3' ¦ 3^\\prime ¦ 3\\times ¦ \\ldots 3 ¦ 3? ¦ \\#3",
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_only_looks_like_the_gold_answer_is_wrong(kind: str) -> None:
    gold, *candidates = DIFFERENT[kind].split(" ¦ ")
    assert verdicts(gold, gold) == {1.0}
    assert [candidate for candidate in candidates if 1.0 in verdicts(candidate, gold)] == []


def test_a_gold_answer_of_several_boxes_is_a_list_and_not_its_last() -> None:
    gold = "\\boxed{4} \\text{ and } \\boxed{9}"
    assert accuracy(tag("9, 4"), gold) == 1.0
    assert accuracy(tag("9"), gold) == 0.0


def test_an_answer_that_the_grammar_does_not_cover_is_unread_with_a_reason() -> None:
    for text in (
        "3 4",
        "\\int_0^1 x dx",
        "1, 2, \\ldots, n",
        "5 @ 6",
        "x > 3 > 2 < 5",
        "\\frac{1}",
        "3 \\text{ half}",
        "(1;",
    ):
        value = read(text)
        assert isinstance(value, Unread), (text, value)
        assert value.reason


@pytest.mark.parametrize(
    "text",
    ["9\\frac", "\\mathbb", "3 2.5/4", "3 2/", "x_", "\\log_", "5:\\pm 3", "3 \\pmod{\\pm 2}", "\\begin", "(", "5^"],
)
def test_an_answer_that_breaks_off_is_wrong_and_raises_nothing(text: str) -> None:
    for answer in ("5", "x^2", "\\{1, 2\\}", text):
        assert accuracy(tag(text), answer) in ((0.0,) if answer != text else (0.0, None, 1.0))


@pytest.mark.parametrize(
    "candidate", ["(" + "+".join(f"\\sqrt{{{n}}}" for n in range(2, 14)) + ")^{40}", "(x+y+z)^{400}"]
)
def test_a_wrong_expression_that_is_costly_to_expand_is_wrong_at_once(candidate: str) -> None:
    started = time.process_time()
    for gold in ("\\frac{(x^{40}-1)(y^{40}-1)}{(x-1)(y-1)}", "\\sqrt{2}", "x+y+z", "7"):
        assert accuracy(tag(candidate), gold) == 0.0
    assert time.process_time() - started < 1.0  # takes about 20 ms


def test_random_polynomials_equal_their_rearrangements_and_not_a_neighbour() -> None:
    rng = random.Random(5)
    for _ in range(60):
        terms = [f"{rng.randint(2, 9)}x^{{{power}}}y" for power in rng.sample(range(2, 9), 3)] + [
            f"\\frac{{{rng.randint(1, 8)}}}{{9}}"
        ]
        shuffled = rng.sample(terms, len(terms))
        gold = "+".join(terms)
        assert accuracy(tag(" + ".join(shuffled).replace("\\frac", "\\dfrac")), gold) == 1.0
        assert accuracy(tag(f"\\left({'+'.join(shuffled)}\\right)"), gold) == 1.0
        assert accuracy(tag("+".join(terms[1:])), gold) == 0.0
        assert accuracy(tag(f"{gold}+1"), gold) == 0.0


def load_fuzzer() -> Any:
    path = Path(__file__).parents[1] / "scripts" / "fuzz_verifier.py"
    spec = importlib.util.spec_from_file_location("fuzz_verifier", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_verifier"] = module
    spec.loader.exec_module(module)
    return module


def test_a_slice_of_the_fuzzer_finds_nothing() -> None:
    command = [sys.executable, "scripts/fuzz_verifier.py", "--cases", "180", "--seed", "7"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "false rewards 0, hangs 0, crashes 0" in done.stdout


def test_the_fuzzer_tells_a_false_reward_and_a_crash_from_an_honest_one(capsys: pytest.CaptureFixture[str]) -> None:
    fuzzer = load_fuzzer()
    two, three = Fraction(2), Fraction(3)
    case = fuzzer.Case("value", "<answer>2</answer>", [two, three], two)

    def exit_code(*verdicts: bool | str) -> int:
        outcomes = [[Outcome("timeout") if v == "hang" else Outcome("value", (v, 0.1)) for v in verdicts]]
        return fuzzer.report([case], outcomes, 2, 1.0)

    assert exit_code(True, False) == exit_code(False, False) == 0
    assert (
        exit_code(False, True)
        == exit_code(True, True)
        == exit_code("ValueError()", False)
        == exit_code("hang", False)
        == 1
    )
    assert "false rewards 1, hangs 0, crashes 0" in capsys.readouterr().out
    assert list(fuzzer.cases(12, 3)) == list(fuzzer.cases(12, 3)) != list(fuzzer.cases(12, 4))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "$$",
        "\\boxed{}",
        "\\frac{5055}{2^{15}",
        "f(x) = ax+b where b is an arbitrary integer",
        "\\frac{1}{0}{",
        "a\x0crac{1}{2}",
        "10^{10^{10}}",
        "9" * 1000,
    ],
)
def test_a_gold_answer_that_cannot_be_graded_pays_nobody(answer: str) -> None:
    """With open-r1's first release, a gold answer that failed to parse paid 1 to everything (open-r1#293)."""
    for content in (answer, "", "5", "anything"):
        assert accuracy(tag(content), answer) is None
    assert "Rewrite or drop the row" in accuracy.check_row(answer)


def test_check_row_passes_what_accuracy_can_grade_and_names_what_it_cannot() -> None:
    assert accuracy.check_row("18") is None
    assert accuracy.check_row("\\frac{\\pi}{2}") is None
    assert accuracy.check_row("\\text{(C)}", source="boxed") is None
    assert "only finds plain numbers" in accuracy.check_row("\\sqrt{2}", source="last_number")
    assert accuracy.check_row(18).startswith("answer is 18, a int")


# ---- the others ------------------------------------------------------------------------------------------------------


def test_exact_match_takes_the_whole_tag_and_overlooks_only_spaces_and_thousands_commas() -> None:
    assert exact_match(tag(" 12,000 "), "12000") == 1.0
    assert exact_match(tag("two\n lines"), "two lines") == 1.0
    for content in ("12000.0", "$12000", "12000 dollars", "1,2000", "1, 2000", ""):
        assert exact_match(tag(content), "12000") == 0.0
    assert exact_match("12000", "12000") == 0.0
    assert exact_match(tag(""), "") == 0.0


@pytest.mark.parametrize(
    "completion",
    ["<think>a</think><answer>b</answer>", " \n<think>\na\n\nb\n</think>\n\n<answer>\nb < c\n</answer>\n", tag("5")],
)
def test_format_accepts_thought_then_answer(completion: str) -> None:
    assert format(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "5",
        "<think>a</think>",
        "<answer>b</answer>",
        "<think></think><answer>b</answer>",
        "<think>\u200b\u2060\ufeff</think><answer>b</answer>",
        "<think>\u2800\u3164</think><answer>b</answer>",
        "<think>a</think><answer> </answer>",
        "a</think><answer>b</answer>",  # a prompt's prefilled <think> has to be put back
        "<think>a</think><answer>b",
        "<think>a</think><answer>b</answer> and more",
        "well, <think>a</think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a</answer></think><answer>b",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a<think>b</think><answer>c</answer>",
        "<Think>a</Think><Answer>b</Answer>",
        "<think>a</think><answer>b</answer>\x00",
        "<think>" * N + "a" + "</think>" * N + "<answer>b</answer>",
    ],
)
def test_format_refuses_everything_else(completion: str) -> None:
    assert format(completion) == 0.0


def test_format_is_linear_in_the_length() -> None:
    started = time.process_time()
    assert format("<think>" + "<" * 10**6 + "</think><answer>" + " >" * 10**6 + "</answer>") == 1.0
    assert format("<think>" + "<think " * 10**6) == 0.0
    assert time.process_time() - started < 1.0  # takes about 10 ms


def test_overlong_follows_dapo_equation_13() -> None:
    # limit 100, buffer 20: free up to 80; 90 is half way: (80 - 90) / 20 = -0.5; 100 and beyond: -1
    penalties = [overlong(n, 100, buffer=20) for n in (0, 80, 81, 90, 100, 101)]
    assert penalties == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match=f"buffer is {buffer}; it must be between 1 and max_completion_tokens"):
            overlong.check_limit(100, buffer=buffer)
    with pytest.raises(ValueError, match="buffer is 0"):
        overlong(5, 100, buffer=0)
    assert overlong(4, 10, buffer=20) == -0.7, "results of tools have left 10 of 100 tokens: as 94 of 100"


@pytest.mark.parametrize(
    ("completion", "question", "share"),
    [
        ("<think> We add the numbers </think> 答案", "How many?", 1.0),  # the answer is not the thought
        ("<think> We 加 the 数 now", "How many?", 3 / 5),  # no end: all of it
        ("сорок two", "How many?", 1 / 2),
        ("我们有 $\\frac{a}{b}$ `print` 5 the", "有几个？", 3 / 4),
        ("naïve × ½ m² π x", "How many?", 1.0),
        ("fünf plus drei", "How many?", 1.0),  # scripts do not tell German from English
        ("5 + 3 = 8 </think> eight", "How many?", 0.0),  # no words, no reward
        ("", "How many?", 0.0),
        ("the sum", "7 × 8?", 1.0),
    ],
)
def test_language_is_the_share_of_words_in_the_questions_script(completion: str, question: str, share: float) -> None:
    assert language(completion, question) == pytest.approx(share)


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    # bigrams of "a b a b a": ab ba ab ba: 2 distinct of 4 -> -(1 - 2/4)
    assert repetition("a b A b a", ngram=2) == -0.5
    assert repetition("a b a b a", ngram=2, max_penalty=0.2) == pytest.approx(-0.1)
    assert repetition("a b c d e", ngram=2) == 0.0
    assert repetition("a", ngram=2) == repetition("") == 0.0
    # 1,000 words of one: 981 20-grams, 1 distinct
    assert repetition("wait " * 1000) == pytest.approx(-(1 - 1 / 981))
    with pytest.raises(ValueError, match="ngram is 0"):
        repetition("a", ngram=0)


def test_rewards_import_neither_torch_nor_another_part_of_grpo() -> None:
    code = "import grpo.rewards, sys; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "grpo.rewards.accuracy" in loaded
    assert not {"torch", "transformers"} & loaded
    assert all(name.startswith("grpo.rewards") for name in loaded if name.startswith("grpo."))
