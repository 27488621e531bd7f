"""Odd forms of right answers, one by one and over a step."""

from contextlib import nullcontext

import pytest

from grpo import Config, rewards
from grpo.scoring.deciding import forms_tell
from grpo.scoring.reward import resolve_rewards
from grpo.text.answer_forms import FORMS, committed_answer, excerpts, forms, tally, tell_of


def tag(answer: str, thought: str = "so it is") -> str:
    return f"<think> {thought} </think> <answer> {answer} </answer>"


ODD = [  # of docs/results/gsm8k.md the first two
    ("(12 * 5) / 10", "6", {"arithmetic", "unstated"}),
    ("4 + 3 * 4 + 5 * (3 * 4)", "76", {"arithmetic", "unstated"}),
    ("$3 \\times 6$", "18", {"arithmetic", "unstated"}),
    ("It costs 3 * 6 dollars.", "18", {"arithmetic", "unstated"}),
    ("36 / 2", "18", {"arithmetic", "unstated"}),
    ("18 + 0", "18", {"arithmetic"}),
    ("x = 20 - 2", "18", {"arithmetic", "unstated"}),
    ("17, 18, 19", "18", {"several"}),
    ("18 or 19", "18", {"several"}),
    ("\\boxed{17}, \\boxed{18}", "18", {"several"}),
    ("17\n18", "18", {"several"}),
    ("1 \\text{ or } 2", "2", {"several"}),
    ("It is " + "really " * 40 + "18", "18", {"long"}),
    ("18.00", "18", {"unstated"}),
    ("0.5", "\\frac{1}{2}", {"unstated"}),
    ("eighteen", "18", {"unstated"}),
]
ORDINARY = [
    ("18", "18"),
    ("$18", "18"),
    ("$ 1{,}800 $", "1800"),
    ("1,800", "1800"),
    ("The answer is 18.", "18"),
    ("Janet makes 9 * 2 = $18 every day.", "18"),
    ("She pays $5 and gets $18 back", "18"),
    ("\\boxed{18}", "18"),
    ("-5", "-5"),
    ("3/4", "\\frac{3}{4}"),
    ("\\dfrac34", "\\frac{3}{4}"),
    ("\\left( 1, 2 \\right)", "(1,2)"),
    ("1, 2", "1,2"),
    ("2 \\times 10^5", "2 \\times 10^5"),
    ("x = 5", "5"),
    ("3 + 2i", "3+2i"),
    ("2 + 3\\sqrt{5}", "2+3\\sqrt{5}"),
    ("C", "(C)"),
    ("\\text{even}", "\\text{even}"),
    ("x^2 + 2x + 1", "x^2+2x+1"),
    ("(44 + 19) - 3", "44 - 3 + 19"),  # Countdown: its gold answers are arithmetic
]


@pytest.mark.parametrize(("answer", "gold", "expected"), ODD)
def test_an_odd_form_is_seen(answer: str, gold: str, expected: set[str]):
    assert set(forms(tag(answer), gold)) == expected


@pytest.mark.parametrize(("answer", "gold"), ORDINARY)
def test_an_ordinary_answer_has_none(answer: str, gold: str):
    assert forms(tag(answer), gold) == ()


def test_a_thought_of_nothing_is_seen_and_no_thought_at_all_is_none():
    assert forms(tag("18", thought=""), "18") == ("no_thought",)
    assert forms(tag("18", thought="\u200b ... "), "18") == ("no_thought",)
    assert forms(" </think> <answer>18</answer>", "18") == ("no_thought",)  # the prompt opened it
    assert forms("thus 2 * 9 </think> <answer>18</answer>", "18") == ()
    assert forms("18", "18") == ()


def test_the_answer_is_what_stands_in_the_last_tag_then_box_then_line():
    assert committed_answer("<answer>1</answer> <answer> 2 </answer> \\boxed{3}") == "2"
    assert committed_answer("\\boxed{1} \\boxed{\\frac{1}{2}} so") == "\\frac{1}{2}"
    assert committed_answer("\\boxed{1") == "1"
    assert committed_answer("first\nthe last \n\n") == "the last"
    assert committed_answer("") == ""


def row(completion: str, answer: object = "18", question: str = "q") -> dict[str, object]:
    return {"completion": completion, "answer": answer, "question": question}


def test_shares_are_of_the_right_answers_with_a_gold_text():
    rows = [row(tag("2 * 9")), row(tag("18")), row(tag("9 + 9")), row(tag("19")), row("x", answer=["assert 1"])]
    tallied = tally(rows, [True, True, False, False, True])
    # of four with a gold text two are right, and one of these is arithmetic in which 18 does not stand
    assert tallied["answer/judged"] == (4, 5)
    assert tallied["answer/right"] == (2, 4)
    assert tallied["answer/arithmetic"] == tallied["answer/unstated"] == (1, 2)
    assert tallied["answer/several"] == (0, 2)
    assert set(tallied) == {"answer/judged", "answer/right", *(f"answer/{name}" for name in FORMS)}
    assert tally(rows[3:4], [False]) == {"answer/judged": (1, 1), "answer/right": (0, 1)}
    assert tally(rows[4:], [True]) == {"answer/judged": (0, 1)}
    assert tally([], []) == {}


def test_shares_are_of_what_has_a_verdict_and_a_gold_answer():
    """A question without a gold answer has the answer "" here, and one of another kind than the verdict's has no verdict."""
    rows = [row(tag("18")), row(tag("2 * 9")), row(tag("18")), row("a story", answer=""), row("a story", answer=" ")]
    tallied = tally(rows, [True, False, None, True, None])
    assert tallied["answer/judged"] == (2, 5)
    assert tallied["answer/right"] == (1, 2)
    assert tallied["answer/no_thought"] == (0, 1)
    assert excerpts([row("so " * 300, answer="")], [True], num=1) == []


def test_excerpts_are_right_answers_in_odd_forms_of_different_questions():
    rows = [row(tag("2 * 9"), question=q) for q in "aab"] + [row(tag("18")), row(tag("9+9"), question="c")]
    assert excerpts(rows, [True, True, True, True, False], num=3) == ["'2 * 9' for '18' (arithmetic, unstated)"] * 2
    assert len(excerpts(rows, [True] * 5, num=2)) == 2
    assert len(excerpts([row(tag("1 + " * 500 + "1"))], [True], num=1)[0]) < 250


def test_forms_tell_nothing_of_answers_that_are_whatever_does_the_task():
    """In Countdown every right answer is arithmetic: an alarm of that told of nothing."""
    silent = {name for name in rewards.__all__ if not tell_of(getattr(rewards, name))}
    assert silent == {"code", "countdown", "reasoning_gym"}

    def countdown(completion: str) -> float:  # somebody's own
        return 1.0

    assert tell_of(countdown)


@pytest.mark.parametrize(("function", "is_refused"), [("countdown", True), ("accuracy", False)])
def test_a_watchdog_that_is_to_act_on_forms_that_tell_nothing_is_refused(function: str, is_refused: bool):
    config = Config(
        model={"name": "m"},
        run={"dir": "d", "steps": 1},
        watchdog={"reward_hacking": "stop"},
        rewards=[{"function": function}],
    )
    with (
        pytest.raises(ValueError, match=r"watchdog.reward_hacking is 'stop'.*countdown")
        if is_refused
        else nullcontext()
    ):
        assert forms_tell(config, resolve_rewards(config.rewards))
