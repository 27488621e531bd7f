"""Every kind of answer that the verifier reads, on random values: right spellings are paid, and nothing under another gold."""

import random
from collections import Counter

import pytest
from grpo.rewards import accuracy
from grpo.rewards.verifier.reading import read
from grpo.rewards.verifier.values import Unread

from scripts.fuzz_answers import KINDS, Draw
from scripts.fuzz_verifier import NO_GOLD, Case, false_reward, is_refused, typed


def grade(text: str, gold: str) -> set[float | None]:
    """In a tag and in a box."""
    boxed = text if "\\boxed" in text else f"\\boxed{{{text}}}"
    in_tag = accuracy(f"<think> so </think> <answer>{text}</answer>", gold)
    return {in_tag, accuracy(f"So {boxed}", gold, source="boxed")}


@pytest.mark.parametrize("draw", KINDS, ids=lambda draw: draw.__name__)
def test_a_right_spelling_is_paid_under_its_gold_and_under_no_other(draw: Draw):
    rng = random.Random(draw.__name__)
    for _ in range(4):
        answer = draw(rng)
        gold = answer.right[0]
        assert [text for text in answer.right if grade(text, gold) != {1.0}] == []
        assert [text for text in answer.wrong if grade(text, gold) != {0.0}] == []
        texts = rng.sample(answer.right + answer.wrong, 3)
        assert [(text, other) for text in texts for other in answer.others if grade(text, other) != {0.0}] == []


MENDED = [  # right, and once refused or not gradable; and what must not be paid beside it
    ("(12, 102)", "(12,102)", "12102"),
    ("(2,12) \\cup (12,102)", "(2, 12) \\cup (12, 102)", "(2, 102)"),
    ("f(x) = 2x", "f\\left(x\\right) = 2x", "2f(x)"),
    ("]-6, 10]", "(-6, 10]", "[-6, 10]"),
    ("[0,7) \\cup \\{-1\\}", "\\{-1\\} \\cup [0,7)", "[0,7)"),
    ("-0221_3", "-221_3", "221_3"),
    ("0.0110_2", "0.011_{2}", "0.11_2"),
    ("2^{n-2} n", "n 2^{n-2}", "n2"),
    ("\\frac12 (x + (y + 1))", "\\frac{1}{2}\\left[x + (y + 1)\\right]", "\\frac12 x"),
    ("-0.50", "-\\$0.50", "0.50"),
    ("9:00 a.m.", "9\\text{ a.m.}", "9 p.m."),
    ("11√10", "11\\sqrt{10}", "11√1 0"),
    ("993 m^2", "993 \\text{ m}^2", "993 m^3"),
    ("$980$ cm", "980 \\text{ cm}", "$980$ mm"),
    ("A: because it is so", "\\text{(A)}", "B: because it is so"),
]


@pytest.mark.parametrize(("right", "gold", "wrong"), MENDED)
def test_what_was_refused_is_paid_and_what_resembles_it_is_not(right: str, gold: str, wrong: str):
    assert grade(right, gold) == {1.0}
    assert grade(wrong, gold) == {0.0}


def test_a_digit_that_a_command_takes_leaves_no_rest_that_is_no_number():
    """Once a ValueError, which ends a run."""
    for text in ("\\frac9e-7", "5\\frac9e-7", "\\frac1,000", "\\sqrt2e3"):
        assert isinstance(read(text), Unread)
        assert grade(text, "5") == {0.0}


def test_the_fuzzers_cases_say_what_has_to_be_paid():
    rng = random.Random(0)
    cases = [typed(rng) for _ in range(400)]
    wrong = [case for case in cases if case.value == NO_GOLD]
    assert 20 < len(wrong) < 150
    assert all(case.must_be_paid != (case.value == NO_GOLD) for case in cases)
    assert len(Counter(case.strategy for case in cases)) == len(KINDS)
    right = Case("typed", "", ["1", "2"], "1", must_be_paid=True)
    assert is_refused(right, [])
    assert not is_refused(right, ["1"])
    assert false_reward(right, ["2"])
    assert false_reward(wrong[0], [wrong[0].golds[0]])
    assert not false_reward(wrong[0], [])
