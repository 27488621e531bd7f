import pytest
import torch

from grpo.algorithm.advantage import group_advantages, has_signal

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
