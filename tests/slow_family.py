"""The algorithms as their papers write them: Python loops over completions and tokens, each with a formula of its own."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Told:
    """A completion of a minibatch, with what is known of each of its tokens."""

    advantage: float
    logprobs: Tensor  # of the policy as it is now, with gradient
    entropies: Tensor  # the same
    old: list[float]
    old_entropies: list[float]
    ref: list[float]
    sampled: list[float]
    cut_off: bool = False
    targets: list[int] = field(default_factory=list)


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return min(max(x, torch.tensor(low, dtype=x.dtype)), torch.tensor(high, dtype=x.dtype))


def ratio(told: Told, t: int) -> Tensor:
    return torch.exp(told.logprobs[t] - told.old[t])


def ppo(told: Told, t: int, low: float, high: float) -> Tensor:
    r = ratio(told, t)
    return min(r * told.advantage, clip(r, 1 - low, 1 + high) * told.advantage)


def k2(told: Told, t: int) -> Tensor:
    return (told.logprobs[t] - told.ref[t]) ** 2 / 2


def k3(told: Told, t: int) -> Tensor:
    log_ratio = told.ref[t] - told.logprobs[t]
    return torch.exp(log_ratio) - log_ratio - 1


def mean_of_means(tolds: list[Told], of_token: Callable[[Told, int], Tensor]) -> Tensor:
    """GRPO: 1/G sum_i 1/|o_i| sum_t."""
    return sum(sum(of_token(told, t) for t in range(len(told.old))) / len(told.old) for told in tolds) / len(tolds)


def mean_of_tokens(tolds: list[Told], of_token: Callable[[Told, int], Tensor]) -> Tensor:
    """DAPO: 1/sum_i |o_i| sum_i sum_t."""
    num_tokens = sum(len(told.old) for told in tolds)
    return sum(sum(of_token(told, t) for t in range(len(told.old))) for told in tolds) / num_tokens


def sum_of_tokens(tolds: list[Told], of_token: Callable[[Told, int], Tensor], longest: int) -> Tensor:
    """Dr. GRPO: 1/G sum_i sum_t, and a constant."""
    return sum(sum(of_token(told, t) for t in range(len(told.old))) for told in tolds) / (len(tolds) * longest)


def grpo(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_means(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2) + 0.04 * k3(told, t))


def dr_grpo(tolds: list[Told], longest: int) -> Tensor:
    return sum_of_tokens(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2), longest)


def dapo(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_tokens(tolds, lambda told, t: -ppo(told, t, 0.2, 0.28))


def dapo_filtered(tolds: list[Told], longest: int) -> Tensor:
    return dapo([told for told in tolds if not told.cut_off], longest)


def gspo(tolds: list[Told], longest: int) -> Tensor:
    total = 0.0
    for told in tolds:
        log_ratios = [told.logprobs[t] - told.old[t] for t in range(len(told.old))]
        s = torch.exp(sum(log_ratios) / len(log_ratios))
        total = total - min(s * told.advantage, clip(s, 1 - 3e-4, 1 + 4e-4) * told.advantage)
    return total / len(tolds)


def gspo_token(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        mean = sum(told.logprobs[k].item() - told.old[k] for k in range(len(told.old))) / len(told.old)
        s = math.exp(mean) * torch.exp(told.logprobs[t]) / torch.exp(told.logprobs[t]).item()
        return -min(s * told.advantage, clip(s, 1 - 3e-4, 1 + 4e-4) * told.advantage)

    return mean_of_means(tolds, of_token)


def cispo(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_tokens(tolds, lambda told, t: -min(ratio(told, t).item(), 5.0) * told.advantage * told.logprobs[t])


def reinforce(tolds: list[Told], longest: int) -> Tensor:
    return sum_of_tokens(tolds, lambda told, t: -ratio(told, t) * told.advantage, longest)


def top_entropy(tolds: list[Told], longest: int) -> Tensor:
    ranked = sorted((entropy for told in tolds for entropy in told.old_entropies), reverse=True)
    threshold = ranked[math.ceil(0.2 * len(ranked)) - 1]
    return mean_of_tokens(
        tolds, lambda told, t: -ppo(told, t, 0.2, 0.28) if told.old_entropies[t] >= threshold else 0 * told.logprobs[t]
    )


def clip_cov(tolds: list[Told], longest: int) -> Tensor:
    every = [(i, t) for i, told in enumerate(tolds) for t in range(len(told.old))]
    mean_advantage = sum(tolds[i].advantage for i, _ in every) / len(every)
    mean_logprob = sum(tolds[i].old[t] for i, t in every) / len(every)

    def covariance(i: int, t: int) -> float:
        return (tolds[i].old[t] - mean_logprob) * (tolds[i].advantage - mean_advantage)

    def number(i: int, t: int) -> int:
        (bits,) = struct.unpack("<i", struct.pack("<f", tolds[i].sampled[t]))
        return bits * 2_654_435_761 + tolds[i].targets[t] * 40_503

    def lot(i: int, t: int) -> int:
        whole = sum(number(i, k) for k in range(len(tolds[i].old)))
        mixed = (sum(number(i, k) for k in range(t + 1)) + 2_246_822_519 * whole) % 2**32
        return ((mixed ^ (mixed >> 15)) * 2_246_822_519) % 2**32

    within = sorted((place for place in every if 1 < covariance(*place) < 5), key=lambda place: lot(*place))
    left_out = within[: max(int(0.0002 * len(every)), 1)]
    total = sum(0 * tolds[i].logprobs[t] if (i, t) in left_out else -ppo(tolds[i], t, 0.2, 0.2) for i, t in every)
    return total / len(every)


def tis(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        weight = min(math.exp(told.old[t] - told.sampled[t]), 2.0)
        return -weight * ppo(told, t, 0.2, 0.2) + 0.001 * k3(told, t)

    return mean_of_means(tolds, of_token)


def icepop(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        weight = math.exp(told.old[t] - told.sampled[t])
        surrogate = weight * ppo(told, t, 0.2, 0.2) if 0.5 <= weight <= 5 else 0.0
        return -surrogate + 0.001 * k3(told, t)

    return mean_of_means(tolds, of_token)


def mis_of_completions(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        weight = math.prod(math.exp(told.old[k] - told.sampled[k]) for k in range(len(told.old)))
        return -(weight * ppo(told, t, 0.2, 0.2) if weight <= 2 else 0.0) + 0.001 * k3(told, t)

    return mean_of_means(tolds, of_token)


def mis_by_geometric_mean(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        product = math.prod(math.exp(told.old[k] - told.sampled[k]) for k in range(len(told.old)))
        weight = product ** (1 / len(told.old))
        return -(weight * ppo(told, t, 0.2, 0.2) if 0.5 <= weight <= 2 else 0.0) + 0.001 * k3(told, t)

    return mean_of_means(tolds, of_token)


def dual_clip(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        surrogate = ppo(told, t, 0.2, 0.2)
        return -(max(surrogate, torch.tensor(1.5 * told.advantage)) if told.advantage < 0 else surrogate)

    return mean_of_means(tolds, of_token)


def sapo(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        tau = 1.0 if told.advantage > 0 else 1.05
        return -4 / tau / (1 + torch.exp(-tau * (ratio(told, t) - 1))) * told.advantage

    return mean_of_means(tolds, of_token)


def dppo(tolds: list[Told], longest: int) -> Tensor:
    def of_token(told: Told, t: int) -> Tensor:
        r = torch.exp(told.logprobs[t] - told.sampled[t])
        outward = r.item() > 1 if told.advantage > 0 else r.item() < 1
        variation = abs(math.exp(told.logprobs[t].item()) - math.exp(told.sampled[t]))
        return 0 * r if outward and variation > 0.2 else -r * told.advantage

    return mean_of_tokens(tolds, of_token)


def grpo_weighted_kl(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_means(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2) + 0.04 * ratio(told, t) * k3(told, t))


def grpo_without_kl(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_means(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2))


def reinforce_plus_plus(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_tokens(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2) + 0.001 * k2(told, t))


def grpo_k2(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_means(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2) + 0.001 * k2(told, t))


def grpo_plain(tolds: list[Told], longest: int) -> Tensor:
    return mean_of_means(tolds, lambda told, t: -ppo(told, t, 0.2, 0.2) + 0.001 * k3(told, t))


def grpo_entropy(tolds: list[Told], longest: int) -> Tensor:
    return grpo_plain(tolds, longest) - 0.001 * mean_of_means(tolds, lambda told, t: told.entropies[t])


def group_mean(rewards: list[float]) -> list[float]:
    return [reward - sum(rewards) / len(rewards) for reward in rewards]


def standardized(rewards: list[float]) -> list[float]:
    centred = group_mean(rewards)
    std = math.sqrt(sum(x * x for x in centred) / len(centred))
    return [x / std for x in centred]


def leave_one_out(rewards: list[float]) -> list[float]:
    return [
        reward - sum(others) / len(others)
        for i, reward in enumerate(rewards)
        for others in [[other for j, other in enumerate(rewards) if j != i]]
    ]


def over_mean(rewards: list[float]) -> list[float]:
    """MaxRL."""
    return [x / (sum(rewards) / len(rewards)) for x in group_mean(rewards)]


def best_of_two(rewards: list[float]) -> list[float]:
    """Pass@k training with k = 2, whose responses are pairs."""
    pairs = [(i, j) for i in range(len(rewards)) for j in range(i)]
    advantages = standardized([max(rewards[i], rewards[j]) for i, j in pairs])
    own = [[x for x, pair in zip(advantages, pairs, strict=True) if i in pair] for i in range(len(rewards))]
    return [sum(each) / len(each) for each in own]


def pkpo_of_two(rewards: list[float]) -> list[float]:
    """What each adds to the best of a pair, over all pairs, times the number of completions."""
    size, num_pairs = len(rewards), len(rewards) * (len(rewards) - 1) / 2
    return [
        size / num_pairs * sum(max(x, y) - y for j, y in enumerate(rewards) if j != i) for i, x in enumerate(rewards)
    ]


@dataclass(frozen=True)
class Algorithm:
    loss: Callable[[list[Told], int], Tensor]
    advantages: Callable[[list[float]], list[float]] = standardized
    kl_in_reward: float = 0.0
    over_batch: bool = False  # advantages are divided by their deviation over the batch
    separate: bool = False  # of two rewards, each with advantages of its own


FAMILY = {
    "GRPO": Algorithm(grpo),
    "GRPO, several epochs": Algorithm(grpo_plain),
    "GRPO, k2": Algorithm(grpo_k2),
    "GRPO, entropy bonus": Algorithm(grpo_entropy),
    "Dr. GRPO": Algorithm(dr_grpo, group_mean),
    "DAPO": Algorithm(dapo),
    "DAPO, overlong filtering": Algorithm(dapo_filtered),
    "80/20": Algorithm(top_entropy),
    "GSPO": Algorithm(gspo),
    "CISPO": Algorithm(cispo),
    "RLOO": Algorithm(reinforce, leave_one_out, kl_in_reward=0.03),
    "REINFORCE": Algorithm(reinforce, group_mean),
    "TIS": Algorithm(tis),
    "IcePop": Algorithm(icepop),
    "MIS of completions": Algorithm(mis_of_completions),
    "MIS by the geometric mean": Algorithm(mis_by_geometric_mean),
    "Dual-clip PPO": Algorithm(dual_clip),
    "SAPO": Algorithm(sapo),
    "DPPO": Algorithm(dppo),
    "GRPO, KL of DeepSeek-V3.2": Algorithm(grpo_weighted_kl),
    "REINFORCE++ with a baseline": Algorithm(reinforce_plus_plus, group_mean, over_batch=True),
    "GDPO": Algorithm(grpo_without_kl, standardized, over_batch=True, separate=True),
    "Clip-Cov": Algorithm(clip_cov),
    "MaxRL": Algorithm(grpo_without_kl, over_mean),
    "Pass@k training": Algorithm(grpo_without_kl, best_of_two),
    "PKPO": Algorithm(grpo_without_kl, pkpo_of_two),
}
