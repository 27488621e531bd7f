import math
import random
import re
from dataclasses import fields, replace

import pytest
import torch
import yaml
from helpers import ROOT
from slow_family import FAMILY, Told, gspo, gspo_token

from grpo.algorithm.loss import (
    KL_ESTIMATORS,
    Objective,
    TokenLoss,
    _importance,
    covariances,
    entropy_threshold,
    grpo_loss,
    lot_limit,
    lots,
    token_sums,
    token_weights,
)
from grpo.config import AlgorithmConfig

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def random_sequences(rng, num_sequences=7):
    def token():
        old = -rng.expovariate(1)
        return old + rng.gauss(0, 0.4), old, old + rng.gauss(0, 0.4)

    return [(rng.gauss(0, 1), [token() for _ in range(rng.randint(1, 9))]) for _ in range(num_sequences)]


def packed(sequences):
    columns = torch.tensor([t for _, tokens in sequences for t in tokens], dtype=torch.float64).unbind(1)
    lens = torch.tensor([len(tokens) for _, tokens in sequences])
    advantages = torch.tensor([a for a, _ in sequences], dtype=torch.float64).repeat_interleave(lens)
    return columns, lens, advantages


LONGEST = 11
TABLE = re.findall(r"^\| ([^|`]+) \| `(algorithm\.[^`]+)` \|", (ROOT / "docs/algorithms.md").read_text(), re.M)


def random_completions(seed: int) -> list[Told]:
    rng = random.Random(seed)

    def told() -> Told:
        old = [-rng.expovariate(1) for _ in range(rng.randint(1, 9))]
        columns = [[x + rng.gauss(0, spread) for x in old] for spread in (0.4, 0.4, 1.5)]
        entropies = [rng.expovariate(1) for _ in old]
        logprobs, ref, sampled = columns
        now = torch.tensor([logprobs, entropies], dtype=torch.float64, requires_grad=True).unbind(0)
        targets = [7 * place % 300 for place in range(len(old))]
        return Told(rng.gauss(0, 1), now[0], now[1], old, [rng.random() for _ in old], ref, sampled, targets=targets)

    return [told() for _ in range(7)]


def of(settings: str) -> AlgorithmConfig:
    pairs = [setting.removeprefix("algorithm.").split("=") for setting in settings.split()]
    return AlgorithmConfig(**{name: yaml.safe_load(value) for name, value in pairs})


def objective_of(algorithm: AlgorithmConfig) -> Objective:
    return Objective(**{field.name: getattr(algorithm, field.name) for field in fields(Objective)})


def fast_loss(tolds: list[Told], algorithm: AlgorithmConfig) -> TokenLoss:
    """What the trainer makes of the same completions."""
    lens = torch.tensor([len(told.old) for told in tolds])
    counts = {"num_completions": len(tolds), "num_tokens": int(lens.sum()), "max_completion_tokens": LONGEST}
    old, old_entropies, ref, sampled = (
        torch.tensor([x for told in tolds for x in getattr(told, name)], dtype=torch.float64)
        for name in ("old", "old_entropies", "ref", "sampled")
    )
    has_kl = algorithm.kl_coef > 0 and algorithm.kl_in == "loss"
    advantages = torch.tensor([told.advantage for told in tolds], dtype=torch.float64).repeat_interleave(lens)
    selected = old_entropies >= entropy_threshold(old_entropies, algorithm.top_entropy)
    if algorithm.clip_cov:
        covariance = covariances(advantages, old, [token_sums(advantages, old)])
        within = (covariance > algorithm.clip_cov_low) & (covariance < algorithm.clip_cov_high)
        drawn = lots(sampled, torch.tensor([x for told in tolds for x in told.targets]), lens)
        selected &= ~(within & (drawn <= lot_limit(drawn[within], max(int(algorithm.clip_cov * len(old)), 1))))
    return grpo_loss(
        torch.cat([told.logprobs for told in tolds]),
        advantages,
        token_weights(algorithm.aggregation, lens, **counts).double(),
        objective_of(algorithm),
        completion_lens=lens,
        entropy=torch.cat([told.entropies for told in tolds]),
        old_logprobs=old,
        ref_logprobs=ref if has_kl else None,
        sampling_logprobs=sampled,
        selected=selected if algorithm.selects else None,
    )


def gradient(loss: torch.Tensor, tolds: list[Told]) -> torch.Tensor:
    inputs = [x for told in tolds for x in (told.logprobs, told.entropies)]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return torch.cat([torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)])


@pytest.mark.parametrize(("name", "settings"), TABLE)
@pytest.mark.parametrize("seed", range(2))
def test_each_algorithms_loss_and_gradient_equal_its_own_formula_in_float64(name: str, settings: str, seed: int):
    tolds = random_completions(seed)
    slow, fast = FAMILY[name].loss(tolds, LONGEST), fast_loss(tolds, of(settings)).loss
    # weights are float32 quotients, hence 1e-6
    assert fast.item() == pytest.approx(slow.item(), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(gradient(fast, tolds), gradient(slow, tolds), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_gspo_and_gspo_token_are_the_same_where_a_completion_has_one_advantage(seed: int):
    tolds = random_completions(seed)
    whole, tokens = gspo(tolds, LONGEST), gspo_token(tolds, LONGEST)
    assert whole.item() == pytest.approx(tokens.item(), rel=1e-12)
    torch.testing.assert_close(gradient(whole, tolds), gradient(tokens, tolds), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
        {"importance": "mask", "importance_level": "sequence", "importance_high": 2.0},
        {"importance": "truncate", "importance_high": 1.5},
    ],
)
def test_a_completions_own_sums_do_not_see_a_neighbour_that_is_not_finite(settings: dict):
    algorithm, tolds = AlgorithmConfig(kl_coef=0, **settings), random_completions(3)
    alone = [gradient(fast_loss([told], algorithm).loss, [told]) for told in tolds]
    for bad in (math.nan, -math.inf, 10_000.0):
        loud = replace(tolds[2], old=[bad for _ in tolds[2].old], sampled=[bad for _ in tolds[2].old])
        both = [tolds[0], loud, tolds[1]]
        found = gradient(fast_loss(both, algorithm).loss, [tolds[0], tolds[1]])
        torch.testing.assert_close(3 * found, torch.cat(alone[:2]), rtol=1e-6, atol=1e-7)  # a third of the weight


@pytest.mark.parametrize("clip", ["surrogate", "weight"])
def test_on_policy_the_bounds_do_nothing(clip: str):
    tolds = [replace(told, old=told.logprobs.tolist()) for told in random_completions(4)]
    bounded = fast_loss(tolds, AlgorithmConfig(kl_coef=0, clip=clip, clip_low=1e-3, clip_high=1e-3))
    free = fast_loss(tolds, AlgorithmConfig(kl_coef=0, clip_low=None, clip_high=None))
    torch.testing.assert_close(gradient(bounded.loss, tolds), gradient(free.loss, tolds))
    assert not bounded.clipped.any()


def test_what_a_bound_does_to_each_side_is_told_apart():
    # ratios 0.5 1 2 for advantage 1, then for -1; bounds 0.8 and 1.3
    ratios = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    advantages, zeros = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64), torch.zeros(6, dtype=torch.float64)

    def result(clip: str) -> TokenLoss:
        return grpo_loss(
            ratios.log(),
            advantages,
            torch.ones(6, dtype=torch.float64),
            Objective(clip=clip, **CLIP),
            completion_lens=torch.tensor([3, 3]),
            old_logprobs=zeros,
        )

    # the minimum is at a bound where that is lower: 1.3 < 2, and -0.8 < -0.5
    assert result("surrogate").clipped_high.tolist() == [False, False, True, False, False, False]
    assert result("surrogate").clipped_low.tolist() == [False, False, False, True, False, False]
    assert result("weight").clipped_high.tolist() == [False, False, True, False, False, True]
    assert result("weight").clipped_low.tolist() == [True, False, False, True, False, False]
    assert not result("soft").clipped.any()


def test_the_bound_of_negative_advantages_takes_the_gradient_of_a_large_ratio():
    logprobs = torch.tensor([0.5, 2.0, 4.0, 4.0], dtype=torch.float64).log().requires_grad_()
    result = grpo_loss(
        logprobs,
        torch.tensor([-1.0, -1.0, -1.0, 1.0], dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
        Objective(clip_dual=3.0),
        completion_lens=torch.tensor([4]),
        old_logprobs=torch.zeros(4, dtype=torch.float64),
    )
    assert result.loss.item() == pytest.approx(0.5 + 2 + 3 - 4)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert gradient.tolist() == pytest.approx([0.5, 2, 0, -4])
    assert result.clipped_high.tolist() == [False, False, True, False]


def test_a_token_is_left_out_where_its_probability_has_moved_further_from_where_it_was_drawn():
    drawn = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.001], dtype=torch.float64)
    now = torch.tensor([0.8, 0.2, 0.8, 0.6, 0.1], dtype=torch.float64)  # the last ratio is 100
    logprobs = now.log().requires_grad_()
    result = grpo_loss(
        logprobs,
        torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64),
        torch.ones(5, dtype=torch.float64),
        Objective(clip="divergence", clip_low=0.2, clip_high=0.2),
        completion_lens=torch.tensor([5]),
        old_logprobs=logprobs.detach(),  # one update: what counts is the policy that drew it
        sampling_logprobs=drawn.log(),
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert gradient.tolist() == pytest.approx([0, -0.4, 1.6, -1.2, -100])
    assert result.clipped_high.tolist() == [True, False, False, False, False]


def test_the_gate_closes_as_the_ratio_leaves_one_and_sooner_for_negative_advantages():
    def weight(ratio: float, advantage: float) -> float:
        logprobs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
        one = torch.ones(1, dtype=torch.float64)
        objective = Objective(clip="soft", soft_negative=2.0)
        result = grpo_loss(
            logprobs, advantage * one, one, objective, completion_lens=torch.tensor([1]), old_logprobs=0 * one
        )
        return torch.autograd.grad(result.loss, logprobs)[0].item() / (-advantage * ratio)

    assert weight(1.0, 1.0) == pytest.approx(1)
    assert 1 > weight(1.5, 1.0) > weight(3.0, 1.0) > weight(3.0, -1.0) > 0


def test_weighted_by_the_ratio_k3_has_the_gradient_of_the_kl_off_policy_too():
    # over all of three tokens, so that nothing is left to chance: the sum of q * (pi / q) * k3 is KL(pi, ref) for any q
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    logprobs, ref = logits.log_softmax(0), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    drawn = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    result = grpo_loss(
        logprobs,
        torch.zeros(3, dtype=torch.float64),
        drawn,
        Objective(kl_coef=1.0, kl_weighted=True),
        completion_lens=torch.tensor([3]),
        old_logprobs=drawn.log(),
        ref_logprobs=ref,
    )
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    assert result.loss.item() == pytest.approx(exact.item())
    ours, theirs = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (result.loss, exact))
    torch.testing.assert_close(ours, theirs)


def test_importance_weights_on_a_hand_worked_case():
    # pi_old / pi_rollout is 2 and 1/4 in the first completion (product 1/2), 8 in the second
    weights = torch.tensor([2.0, 0.25, 8.0], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)

    def factors(**settings: object) -> tuple[list[float], list[bool]]:
        objective = Objective(**settings)
        importance, factor = _importance(weights.log(), zeros, torch.tensor([2, 1]), objective)
        return factor.tolist(), (factor != importance).tolist()

    assert factors(importance="truncate", importance_high=4.0) == (pytest.approx([2, 0.25, 4]), [False, False, True])
    assert factors(importance="truncate", importance_low=0.5, importance_high=4.0)[0] == pytest.approx([2, 0.5, 4])
    assert factors(importance="mask", importance_low=0.5, importance_high=4.0) == (
        pytest.approx([2, 0, 0]),
        [False, True, True],
    )
    of_completions = {"importance_level": "sequence", "importance_high": 4.0}
    assert factors(importance="mask", **of_completions) == (pytest.approx([0.5, 0.5, 0]), [False, False, True])
    assert factors() == ([1, 1, 1], [False] * 3)


def test_the_entropy_threshold_keeps_the_share_of_all_tokens_rounded_up():
    entropies = torch.tensor([0.1, 3.0, 0.2, 2.0, 1.0])
    assert [entropy_threshold(entropies, share) for share in (0.2, 0.4, 0.41, 1.0)] == pytest.approx(
        [3.0, 2.0, 1.0, 0.1]
    )
    assert entropy_threshold(entropies, 1e-9) == 3.0


def test_a_hand_worked_2x3_case():
    # two completions of 3 tokens, advantages 1 and -1, clip 0.2/0.3, weights 1/6 each
    # ratios of completion 0: 1, 1.5, 0.5 -> min(r, clip r): 1, 1.3, 0.5      surrogate  1   1.3   0.5
    # ratios of completion 1: 1, 1.5, 0.5 -> -max(r, clip r): 1, 1.5, 0.8     surrogate -1  -1.5  -0.8
    # loss = -(1 + 1.3 + 0.5 - 1 - 1.5 - 0.8) / 6 = 0.5 / 6
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.0, 1.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    old = torch.full((6,), -2.0, dtype=torch.float64)
    weights, lens = torch.full((6,), 1 / 6), torch.tensor([3, 3])
    result = grpo_loss(
        old + ratios.log(), advantages, weights, Objective(**CLIP), completion_lens=lens, old_logprobs=old
    )
    assert result.loss.item() == pytest.approx(0.5 / 6, rel=1e-6)
    assert result.clipped.tolist() == [False, True, False, False, False, True]
    torch.testing.assert_close(result.ratio, ratios)


def test_weights_per_aggregation_on_a_hand_worked_case():
    lens = torch.tensor([1, 3])
    counts = {
        "num_completions": 4,
        "num_tokens": 10,
        "max_completion_tokens": 5,
    }  # of the whole step: more than is here
    assert token_weights("sequence", lens, **counts).tolist() == pytest.approx([1 / 4, 1 / 12, 1 / 12, 1 / 12])
    assert token_weights("token", lens, **counts).tolist() == pytest.approx([1 / 10] * 4)
    assert token_weights("constant", lens, **counts).tolist() == pytest.approx([1 / 20] * 4)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_the_gradient_equals_finite_differences(kl_estimator):
    (logprobs, old, ref), lens, advantages = packed(random_sequences(random.Random(5)))
    weights = token_weights("sequence", lens, num_completions=7, num_tokens=0, max_completion_tokens=0).double()
    objective = Objective(**CLIP, kl_coef=0.3, kl_estimator=kl_estimator)
    known = {"completion_lens": lens, "old_logprobs": old, "ref_logprobs": ref}
    logprobs.requires_grad_(True)
    loss = lambda x: grpo_loss(x, advantages, weights, objective, **known).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logprobs,), eps=1e-7)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    (logprobs, _, _), lens, advantages = packed(random_sequences(random.Random(2)))
    weights = torch.rand(len(logprobs), dtype=torch.float64)
    logprobs.requires_grad_(True)
    result = grpo_loss(logprobs, advantages, weights, Objective(**CLIP), completion_lens=lens)
    result.loss.backward()
    assert (result.ratio == 1).all()
    assert not result.clipped.any()
    torch.testing.assert_close(logprobs.grad, -weights * advantages)


def test_k3_restrains_and_k1_does_not():
    # expected gradient over the policy's own samples, for two outcomes with policy p and reference q, by the logit of p
    p, q = 0.3, 0.6
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    gradient = {}
    for name, estimator in KL_ESTIMATORS.items():
        total = torch.zeros((), dtype=torch.float64)
        for outcome, ref in ((logit.sigmoid(), q), (1 - logit.sigmoid(), 1 - q)):
            logprob = outcome.log()
            total = total + outcome.detach() * estimator(logprob, torch.tensor(ref, dtype=torch.float64).log())
        (gradient[name],) = torch.autograd.grad(total, logit)
    assert gradient["k1"].item() == pytest.approx(0.0, abs=1e-12)
    # d/dlogit KL(p || q) = p (1 - p) (log(p/q) - log((1-p)/(1-q)));  d/dlogit KL(q || p) = p - q
    reverse = p * (1 - p) * (math.log(p / q) - math.log((1 - p) / (1 - q)))
    assert gradient["k2"].item() == pytest.approx(reverse)
    assert gradient["k3"].item() == pytest.approx(p - q)


def test_a_token_without_weight_adds_nothing_however_improbable_it_is():
    logprobs = torch.tensor([-1.0, -500.0], requires_grad=True)
    others = {"old_logprobs": torch.tensor([-1.0, 0.0]), "ref_logprobs": torch.tensor([-1.2, 0.0])}
    others["completion_lens"] = torch.tensor([1, 1])
    objective = Objective(**CLIP, kl_coef=1.0)
    result = grpo_loss(logprobs, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), objective, **others)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert logprobs.grad[1] == 0
    assert torch.isfinite(logprobs.grad[0])


def test_kl_is_zero_for_equal_policies_and_k3_is_never_negative():
    x = torch.randn(50, dtype=torch.float64)
    for estimator in KL_ESTIMATORS.values():
        assert (estimator(x, x) == 0).all()
    assert (KL_ESTIMATORS["k3"](x, torch.randn(50, dtype=torch.float64)) >= 0).all()
