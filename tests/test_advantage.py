import math
import random
from itertools import combinations

import pytest
import torch

from grpo.algorithm.advantage import (
    advantages_of_batch,
    divided_by_batch_std,
    group_advantages,
    has_signal,
    separate_advantages,
    square_sum,
    teaches,
)
from grpo.algorithm.objective import AdvantageRule

NAN = float("nan")


def test_a_hand_worked_2x3_case():
    # group 0: rewards 1 0 0, mean 1/3, deviations 2/3 -1/3 -1/3, variance (4+1+1)/9/3 = 2/9, std sqrt(2)/3
    #          advantages 2/sqrt(2) -1/sqrt(2) -1/sqrt(2)
    # group 1: rewards 3 1 2, mean 2, deviations 1 -1 0, variance 2/3; advantages +-sqrt(3/2) and 0
    rewards = torch.tensor([[1.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    expected = torch.tensor([[2**0.5, -(2**-0.5), -(2**-0.5)], [1.5**0.5, -(1.5**0.5), 0.0]])
    torch.testing.assert_close(group_advantages(rewards, normalize_by_std=True), expected)


def test_without_normalization_advantages_are_centred_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [3.0, 1.0, 2.0]])
    expected = torch.tensor([[2 / 3, -1 / 3, -1 / 3], [1.0, -1.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards, normalize_by_std=False), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_up_to_float_noise_give_exactly_zero(normalize: bool):
    # 0.1 + 0.2 and 0.3 differ in float32 arithmetic too; dividing such a spread by itself would make it an advantage of 1
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3], [1 / 3, 1 / 3 + 3e-8, 1 / 3], [1e6, 1e6 + 0.06, 1e6]])
    assert (group_advantages(rewards, normalize_by_std=normalize) == 0).all()
    assert not has_signal(rewards).any()


def test_unknown_rewards_do_not_move_the_baseline():
    # without the unknown one the group is 1 0: mean 1/2, std 1/2, advantages 1 -1
    advantages = group_advantages(torch.tensor([[1.0, NAN, 0.0]]), normalize_by_std=True)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, NAN, -1.0]]), equal_nan=True)


def test_a_group_of_unknown_rewards_has_no_signal():
    rewards = torch.tensor([[NAN, NAN], [1.0, NAN], [1.0, 0.0]])
    advantages = group_advantages(rewards, normalize_by_std=True)
    assert has_signal(rewards).tolist() == [False, False, True]
    assert advantages[0].isnan().all()
    assert advantages[1, 0] == 0


def test_leaving_one_out_subtracts_the_mean_of_the_others():
    # 1 - (0 + 0)/2, 0 - (1 + 0)/2 twice; of three known: 3 - (1 + 2)/2, 1 - (3 + 2)/2, 2 - (3 + 1)/2
    rewards = torch.tensor([[1.0, 0.0, 0.0, NAN], [3.0, 1.0, 2.0, NAN], [1.0, NAN, NAN, NAN], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, -0.5, -0.5, NAN], [1.5, -1.5, 0.0, NAN], [0.0, NAN, NAN, NAN], [0.0, 0.0, 0.0, 0.0]])
    advantages = group_advantages(rewards, normalize_by_std=False, baseline="leave_one_out")
    torch.testing.assert_close(advantages, expected, equal_nan=True)


# ---- the best of k ---------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def pass_at_k_training(rewards: list[float], k: int, *, divide: bool) -> list[float]:
    """Each set of k completions is one response of its own; a completion has the mean advantage of its sets."""
    sets = [*combinations(range(len(rewards)), k)]
    best = [max(rewards[i] for i in each) for each in sets]
    std = math.sqrt(mean([(x - mean(best)) ** 2 for x in best]))
    if std == 0:
        return [0.0] * len(rewards)
    own = [
        [(x - mean(best)) / (std if divide else 1) for x, each in zip(best, sets, strict=True) if i in each]
        for i in range(len(rewards))
    ]
    return [mean(each) for each in own]


def pkpo(rewards: list[float], k: int) -> list[float]:
    """Equation 33 of arXiv 2505.15201, times the number of completions."""
    gains = [0.0] * len(rewards)
    sets = [*combinations(range(len(rewards)), k)]
    for each in sets:
        for i in each:
            gains[i] += max(rewards[j] for j in each) - max(rewards[j] for j in each if j != i)
    return [len(rewards) * gain / len(sets) for gain in gains]


@pytest.mark.parametrize("k", [2, 3, 6])
def test_the_best_of_k_is_that_of_all_sets_of_k(k: int):
    rng = random.Random(k)
    rows = [[float(rng.random() < 0.4) for _ in range(6)] for _ in range(6)] + [[rng.gauss(0, 2) for _ in range(6)]]
    rewards = torch.tensor(rows, dtype=torch.float64)
    for divide in (True, False):
        expected = [pass_at_k_training(row, k, divide=divide) for row in rows]
        found = group_advantages(rewards, normalize_by_std=divide, pass_at=k)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert (found.abs().max() > 0) == (k < 6), "of all six there is one set"
    expected = [pkpo(row, k) for row in rows]
    found = group_advantages(rewards, normalize_by_std=False, baseline="leave_one_out", pass_at=k)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("k", "num_wrong"), [(1, 5), (3, 5), (4, 6), (4, 3)])
def test_of_right_and_wrong_answers_it_is_the_papers_formula(k: int, num_wrong: int):
    """arXiv 2508.10751, section 2.4: advantages of a right and of a wrong answer, of 8."""
    rewards = torch.tensor([[1.0] * (8 - num_wrong) + [0.0] * num_wrong], dtype=torch.float64)
    found = group_advantages(rewards, normalize_by_std=True, pass_at=k)[0]
    reward = 1 - math.comb(num_wrong, k) / math.comb(8, k)
    if reward == 1:  # of 3 wrong ones no 4 can be chosen
        assert (found == 0).all()
        return
    std = math.sqrt(reward * (1 - reward))
    right, wrong = (1 - reward) / std, (1 - reward - math.comb(num_wrong - 1, k - 1) / math.comb(7, k - 1)) / std
    assert found[0].item() == pytest.approx(right)
    assert found[-1].item() == pytest.approx(wrong)


def test_a_group_teaches_where_its_advantages_are_not_all_zero():
    # of 6, the number that are wrong; all sets of 3 hold a right one where fewer than 3 are, and PKPO's right ones of 2 gain
    rewards = torch.tensor([[0.0] * wrong + [1.0] * (6 - wrong) for wrong in range(7)])
    for options, first in (({"pass_at": 3}, 3), ({"pass_at": 3, "baseline": "leave_one_out"}, 2), ({}, 1)):
        found = teaches(AdvantageRule(**options), rewards)
        assert found.tolist() == [first <= wrong < 6 for wrong in range(7)]
    noise = rewards + torch.tensor([0, 1e-7, 0, 2e-7, 0, 1e-7])
    assert (
        teaches(AdvantageRule("leave_one_out", pass_at=3), noise).tolist()
        == found.logical_and(torch.arange(7) >= 2).tolist()
    ), "float noise is no gain"


def test_unknown_rewards_are_in_no_set():
    rewards = torch.tensor([[NAN, 1.0, 0.0, 0.5], [NAN, NAN, 1.0, 0.0], [NAN, NAN, NAN, NAN]])
    for options in ({"normalize_by_std": True}, {"normalize_by_std": False, "baseline": "leave_one_out"}):
        found = group_advantages(rewards, pass_at=2, **options)
        assert found.isnan().equal(rewards.isnan())
        alone = group_advantages(rewards[:1, 1:], pass_at=2, **options)
        torch.testing.assert_close(found[:1, 1:], alone)
        few = group_advantages(rewards[1:2, 2:], pass_at=2, **options)
        torch.testing.assert_close(group_advantages(rewards[1:2], pass_at=3, **options)[:, 2:], few)  # k is 2 there


# ---- other divisors --------------------------------------------------------------------------------------------------


def test_divided_by_its_mean_a_group_counts_by_how_seldom_it_is_right():
    # 1 of 4 right: (1 - 1/4) / (1/4) = 3, -1; 3 of 4: 1/3, -1; none: 0
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [NAN, 1.0, 0.0, NAN]])
    expected = torch.tensor([[3, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0, 0, 0, 0], [NAN, 1, -1, NAN]])
    found = group_advantages(rewards, normalize_by_std=False, normalize_by_mean=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    with pytest.raises(ValueError, match=r"a completion has the reward -0.5, and a mean of rewards below 0"):
        group_advantages(torch.tensor([[1.0, -0.5]]), normalize_by_std=False, normalize_by_mean=True)


def test_the_deviation_of_a_batch_is_the_same_however_it_is_shared_out():
    rewards = torch.tensor([[1.0, 0.0, 0.0, NAN], [3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    # centred: 2/3 -1/3 -1/3; 1 -1 0 0; 0 0 0 0. Squares: 6/9 + 2 over 3 + 4 + 4 known ones
    expected = group_advantages(rewards, normalize_by_std=False) / math.sqrt((6 / 9 + 2) / 11)
    whole = advantages_of_batch(AdvantageRule(normalize_by_std="batch"), rewards, [])
    torch.testing.assert_close(whole, expected, equal_nan=True)
    halves = [group_advantages(part, normalize_by_std=False) for part in rewards.split(2)]
    sums = [square_sum(half) for half in halves]
    torch.testing.assert_close(torch.cat([divided_by_batch_std(h, sums) for h in halves]), whole, equal_nan=True)
    assert (divided_by_batch_std(torch.zeros(2, 2), [(0.0, 4)]) == 0).all()


def test_separate_rewards_are_each_divided_by_their_own_deviation():
    # accuracy 1 0 0 0 and format 0 0 1 1: (r - 1/4) / (sqrt(3)/4) and (r - 1/2) / (1/2), the latter times 0.5
    accuracy = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [NAN, NAN, NAN, NAN], [1.0, NAN, 0.0, 0.0]])
    form = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [1.0, 1.0, 1.5, 1.5], [0.0, 0.5, 0.5, 0.0], [1.5, NAN, 0.0, 0.0]])
    found = separate_advantages(rewards, [(1.0, accuracy), (0.5, form)])
    a, b = 3**0.5, -(3**-0.5)
    last = [2**0.5, NAN, -(2**-0.5), -(2**-0.5)]
    expected = [
        [a - 0.5, b - 0.5, b + 0.5, b + 0.5],
        [-0.5, -0.5, 0.5, 0.5],
        [-0.5, 0.5, 0.5, -0.5],
        [x * 1.5 for x in last],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    of_batch = advantages_of_batch(
        AdvantageRule("mean", "batch", separate_rewards=True), rewards, [(1.0, accuracy), (0.5, form)]
    )
    torch.testing.assert_close(of_batch, found / found[~found.isnan()].square().mean().sqrt(), equal_nan=True)
