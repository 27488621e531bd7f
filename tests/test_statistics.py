"""pass@k, majority vote and intervals against worked examples and slow references."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest

from grpo.scoring.statistics import Estimate, estimate, majority, pass_at_k, powers_of_two


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample():
    for n, c in ((1, 0), (1, 1), (4, 1), (5, 2), (6, 0), (6, 6), (7, 3)):
        verdicts = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(verdicts, k))
            assert pass_at_k(verdicts, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_a_worked_example():
    # n = 4, c = 1: 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
    assert pass_at_k([False, True, False, False], 2) == 0.5
    assert pass_at_k([False] * 40 + [True] * 24, 1) == 24 / 64


def test_unknown_verdicts_are_neither_right_nor_wrong():
    assert pass_at_k([True, None, False], 1) == 0.5
    assert pass_at_k([True, None, False, False], 2) == pytest.approx(2 / 3)  # of three known ones
    assert math.isnan(pass_at_k([None], 1))


def test_an_unknown_verdict_that_changes_nothing_does_not_count_against_a_question():
    assert pass_at_k([True, None, False], 3) == 1.0  # one of the three is right, whatever the second is
    assert math.isnan(pass_at_k([False, None, False], 3))


def test_the_most_frequent_answer_wins_and_ties_are_shared():
    right = {0.0: True, 1.0: False, 2.0: False, -1.0: False}

    def cons(*votes: float) -> float:
        return majority(votes, [right[vote] for vote in votes])

    assert cons(0, 0, 1) == 1
    assert cons(0, 1, 1) == 0
    assert cons(0, 0, 1, 1) == 0.5
    assert cons(0, 1, 2) == pytest.approx(1 / 3)
    assert cons(0, -1, -1, -1) == 1  # who has no answer has no vote
    assert cons(-1, -1) == 0
    assert math.isnan(majority([0.0, None], [True, True]))
    assert math.isnan(majority([1.0, 1.0], [None, None]))
    assert majority([1.0, 1.0, 0.0], [None, False, True]) == 0


def test_powers_of_two_end_at_the_samples():
    assert powers_of_two(1) == [1]
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(12) == [1, 2, 4, 8]


def test_the_interval_is_that_of_a_slow_bootstrap():
    rng = random.Random(0)
    values = [rng.choice([0.0, 0.25, 1.0]) for _ in range(60)]
    means = sorted(sum(rng.choices(values, k=60)) / 60 for _ in range(20_000))
    found = estimate({"x": np.array(values)})["x"]
    assert found.value == pytest.approx(sum(values) / 60)
    # the standard error of a 2.5 % quantile from 2,000 resamples is about 0.003 here; five of them
    assert found.low == pytest.approx(means[500], abs=0.015)
    assert found.high == pytest.approx(means[-500], abs=0.015)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        found = estimate({"x": rng.binomial(8, 0.3, 100) / 8}, seed=trial)["x"]
        covered += found.low <= 0.3 <= found.high
    assert 0.92 <= covered / 300 <= 0.98  # 0.95 give or take 2.4 standard errors


def test_the_same_seed_gives_the_same_interval_and_another_another():
    values = {"x": np.random.default_rng(1).random(50)}
    assert estimate(values) == estimate(values)
    assert estimate(values) != estimate(values, seed=1)


def test_questions_without_a_value_do_not_count():
    x = np.array([1.0, math.nan, 0.0, math.nan])
    found = estimate({"x": x, "nothing": np.full(4, math.nan)})
    assert list(found) == ["x"]
    assert found["x"].value == 0.5
    assert (found["x"].low, found["x"].high) == (0.0, 1.0)
    assert estimate({"nothing": np.full(3, math.nan)}) == {}


def test_the_numbers_of_gsm8k_take_less_than_a_second():
    rng = random.Random(0)
    verdicts = [[rng.random() < 0.3 for _ in range(16)] for _ in range(1319)]
    votes = [[0.0 if verdict else float(rng.randint(1, 5)) for verdict in each] for each in verdicts]
    started = time.process_time()
    columns = {f"pass@{k}": np.array([pass_at_k(each, k) for each in verdicts]) for k in powers_of_two(16)}
    columns["cons@16"] = np.array([majority(*each) for each in zip(votes, verdicts, strict=True)])
    found = estimate(columns)
    assert time.process_time() - started < 3  # 0.3 s on a quiet core
    assert found["pass@1"].low < found["pass@1"].value < found["pass@1"].high < found["pass@16"].value


def test_where_all_questions_agree_the_interval_of_a_share_is_wilsons_and_not_of_zero_width():
    found = estimate(
        {"pass@1": np.array([1.0] * 10 + [math.nan]), "length": np.ones(11), "format": np.array([0.0] * 11)}
    )
    assert (found["pass@1"].value, found["pass@1"].high) == (1.0, 1.0)
    assert found["pass@1"].low == pytest.approx(0.7225, abs=1e-4)  # Wilson, 10 of 10
    assert found["format"].low == 0.0
    assert found["format"].high == pytest.approx(1.96**2 / (11 + 1.96**2), abs=1e-3)
    assert found["length"] == Estimate(1.0, 1.0, 1.0)


def test_a_difference_of_0_on_every_question_is_no_share_of_0():
    (found,) = estimate({"difference": np.zeros(16)}).values()
    assert (found.value, found.low, found.high) == (0, 0, 0)
