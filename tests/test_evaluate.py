"""What counts as right."""

import pytest

from grpo.evaluate import is_right, verdict_name


def test_the_verdict_is_that_of_accuracy_wherever_it_stands_and_else_of_the_first_reward():
    assert verdict_name(["format", "accuracy"]) == "accuracy"
    assert verdict_name(iter(["code", "format"])) == "code"


@pytest.mark.parametrize(
    ("value", "right"),
    [(1.0, True), (sum([0.1] * 10), True), (0.999, False), (0.0, False), (-1.0, False), (2.0, True), (None, None)],
)
def test_right_is_a_verdict_of_one_and_an_unknown_one_is_neither(value: float | None, right: bool | None):
    assert is_right({"rewards": {"format": 0.0, "accuracy": value}}) is right
    assert is_right({"rewards": {"number_in_text": value, "format": 0.0}}) is right
