import math
import random

import pytest
import torch

from grpo.loss import KL_ESTIMATORS, grpo_loss, token_weights

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def slow_loss(sequences, *, aggregation, clip_low, clip_high, kl_coef, kl_estimator, max_completion_tokens):
    """The objective as the papers write it: float64, Python loops, one token at a time, each algorithm's own formula.

    `sequences` is a list of (advantage, tokens); a token is (logprob, old, ref).
    """

    def token_loss(advantage, lp, old, ref):
        ratio = math.exp(lp - old)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        surrogate = min(ratio * advantage, clipped * advantage)
        kl = {
            "k1": lambda: lp - ref,
            "k2": lambda: (lp - ref) ** 2 / 2,
            "k3": lambda: math.exp(ref - lp) - (ref - lp) - 1,
        }[kl_estimator]()
        return -surrogate + kl_coef * kl

    losses = [[token_loss(advantage, *token) for token in tokens] for advantage, tokens in sequences]
    if aggregation == "sequence":
        return sum(sum(row) / len(row) for row in losses) / len(losses)
    if aggregation == "token":
        return sum(map(sum, losses)) / sum(map(len, losses))
    return sum(map(sum, losses)) / (len(losses) * max_completion_tokens)


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


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_equals_a_slow_float64_reference(aggregation, kl_estimator, seed):
    sequences = random_sequences(random.Random(seed))
    (logprobs, old, ref), lens, advantages = packed(sequences)
    weights = token_weights(
        aggregation, lens, num_completions=len(lens), num_tokens=int(lens.sum()), max_completion_tokens=11
    ).double()
    settings = {**CLIP, "kl_coef": 0.3, "kl_estimator": kl_estimator}
    result = grpo_loss(logprobs, advantages, weights, old_logprobs=old, ref_logprobs=ref, **settings)
    expected = slow_loss(sequences, aggregation=aggregation, max_completion_tokens=11, **settings)
    # weights are float32 quotients, hence 1e-6
    assert result.loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_hand_worked_2x3_case():
    # two completions of 3 tokens, advantages 1 and -1, clip 0.2/0.3, weights 1/6 each
    # ratios of completion 0: 1, 1.5, 0.5 -> min(r, clip r): 1, 1.3, 0.5      surrogate  1   1.3   0.5
    # ratios of completion 1: 1, 1.5, 0.5 -> -max(r, clip r): 1, 1.5, 0.8     surrogate -1  -1.5  -0.8
    # loss = -(1 + 1.3 + 0.5 - 1 - 1.5 - 0.8) / 6 = 0.5 / 6
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.0, 1.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    old = torch.full((6,), -2.0, dtype=torch.float64)
    result = grpo_loss(old + ratios.log(), advantages, torch.full((6,), 1 / 6), old_logprobs=old, **CLIP)
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
    settings = {**CLIP, "kl_coef": 0.3, "kl_estimator": kl_estimator, "old_logprobs": old, "ref_logprobs": ref}
    logprobs.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, advantages, weights, **settings).loss, (logprobs,), eps=1e-7)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    (logprobs, _, _), _, advantages = packed(random_sequences(random.Random(2)))
    weights = torch.rand(len(logprobs), dtype=torch.float64)
    logprobs.requires_grad_(True)
    result = grpo_loss(logprobs, advantages, weights, **CLIP)
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
    result = grpo_loss(logprobs, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), **others, **CLIP, kl_coef=1.0)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert logprobs.grad[1] == 0
    assert torch.isfinite(logprobs.grad[0])


def test_kl_is_zero_for_equal_policies_and_k3_is_never_negative():
    x = torch.randn(50, dtype=torch.float64)
    for estimator in KL_ESTIMATORS.values():
        assert (estimator(x, x) == 0).all()
    assert (KL_ESTIMATORS["k3"](x, torch.randn(50, dtype=torch.float64)) >= 0).all()
