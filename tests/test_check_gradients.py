"""The check of gradients passes where the fast update's is right, and names what is wrong where it is not."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config

from grpo.check import __main__, gradients, steps
from grpo.check.gradients import (
    EVERYTHING,
    PLAIN,
    REFERENCE,
    TOLERANCE,
    Match,
    Variant,
    Work,
    compare,
    faults,
    groups_of,
)
from grpo.check.plain import PlainLM, PlainTrainer, real_trainer
from grpo.config import Config
from grpo.policy import attention, logprobs
from grpo.types import Completion, Group, Prompt

PACKED, SHARED, KERNELS = Variant("packed"), Variant("shared", shared=True), Variant("kernels", kernels=True)
FLOAT32 = TOLERANCE[torch.float32]


def small_config(tmp_path: Path, **sections: Any) -> Config:
    """Every term of the loss has a gradient that counts."""
    return tiny_config(
        tmp_path / "run",
        algorithm={"kl_coef": 0.5, "entropy_coef": 0.3},
        rollout={"temperature": 0.8, "num_prompts": 8},  # enough for twelve completions with an advantage
        memory={"micro_batch_tokens": 256, "logprob_chunk_tokens": 50},
        rewards=[{"function": "accuracy"}, {"function": "format", "weight": 0.5}],
        **sections,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return gradients.sample(small_config(tmp_path_factory.mktemp("work")), 12)


@pytest.fixture(scope="module")
def reference(work: Work) -> dict[str, torch.Tensor]:
    return gradients.gradient(work, REFERENCE)


def found(work: Work, reference: dict[str, torch.Tensor], variant: Variant) -> set[str]:
    """The groups that are wrong, but for the layers and the whole, in which a wrong kind shows too."""
    groups = compare(gradients.gradient(work, variant), reference)
    plain = compare(gradients.gradient(work, PLAIN), reference)
    return {name for name in faults(groups, plain, FLOAT32) if name != "all" and not name.startswith("layer")}


@pytest.mark.slow
def test_every_part_of_the_fast_update_has_the_plain_models_gradient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "report.json"
    assert gradients.check(small_config(tmp_path, distributed={"zero_stage": 3}), num_sequences=12, out=out) == 0
    variants = json.loads(out.read_text())["variants"]
    assert [each["zero_stage"] for each in variants if each["zero_stage"] is not None] == [0, 0, 2, 2, 3, 3]
    for each in variants:
        assert {"all", "embed_tokens", "q_proj", "k_proj.bias", "down_proj", "norm", "layer 2"} <= set(each["groups"])
        for name, group in each["groups"].items():
            assert group["one_minus_cosine"] < 5e-9, (each["name"], name)  # 1e-4 of the gradient
            assert group["slope"] == pytest.approx(1, abs=1e-4)
    passes = {each["name"]: each["passes"] for each in variants}
    assert passes[PLAIN.name] == 12
    assert passes["everything, small passes"] > passes["everything"]
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "12 completions of" in printed
    assert f"All {len(variants)} variants have the gradient" in printed


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device for flash attention and Triton's kernels"
)
def test_in_bfloat16_on_a_gpu_no_fast_part_is_further_off_than_the_precision_explains(tmp_path: Path):
    config = small_config(tmp_path, model={"dtype": "bfloat16"})
    assert gradients.check(config, num_sequences=16, out=tmp_path / "report.json") == 0
    names = [each["name"] for each in json.loads((tmp_path / "report.json").read_text())["variants"]]
    assert {"packed, fused layers", "packed, deterministic"} <= set(names)


def scale_up_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: in the variant KERNELS the gradient of one kind of weight is a thousandth too long."""
    original = gradients._model

    def faulty(work: Work, variant: Variant) -> Any:
        model = original(work, variant)
        if variant == KERNELS:
            for layer in model.lm.model.layers:
                layer.mlp.up_proj.weight.register_hook(lambda gradient: 1.001 * gradient)
        return model

    monkeypatch.setattr(gradients, "_model", faulty)


def test_a_scaled_gradient_of_one_kind_is_named(
    work: Work, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    scale_up_proj(monkeypatch)
    assert found(work, reference, KERNELS) == {"up_proj"}
    assert found(work, reference, PACKED) == set()


def test_a_shared_prompt_that_forgets_its_completions_is_named(
    work: Work, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    """Keys and values of a prompt get the gradient of its own tokens alone. Every pack has prompts and completions in runs of
    their own, so it shows there without sharing too."""

    def faulty(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[ctx.packing.own_key], None

    monkeypatch.setattr(attention._Spread, "backward", staticmethod(faulty))
    for variant in (SHARED, PACKED):
        assert {"k_proj", "v_proj", "embed_tokens"} <= found(work, reference, variant)
    assert compare(gradients.gradient(work, PLAIN), reference)["all"].angle < FLOAT32.angle


def test_a_neighbour_that_leaks_in_is_found(
    work: Work, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    """Each run of keys begins a token early: with the last one of the sequence before."""
    original = gradients.micro_batch

    def faulty(batch: Any, weights: torch.Tensor) -> Any:
        micro = original(batch, weights)
        runs, packing = micro.packing.cu_keys.diff(), micro.packing
        starts = packing.cu_keys[:-1].clone()
        starts[1:] -= 1
        index = torch.cat(
            [torch.arange(s, s + n + (s > 0)) for s, n in zip(starts.tolist(), runs.tolist(), strict=True)]
        )
        keys = torch.cat([torch.zeros(1, dtype=torch.int32), (runs + (starts > 0)).cumsum(0).int()])
        micro.packing = replace(packing, key_index=packing.key_index[index], cu_keys=keys)
        return micro

    monkeypatch.setattr(gradients, "micro_batch", faulty)
    monkeypatch.setattr(attention, "spread", lambda x, packing: x[packing.key_index])
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= found(work, reference, PACKED)


def test_a_wrong_sign_in_the_entropys_gradient_is_found_in_our_log_probabilities_alone(
    work: Work, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    original = logprobs.plain_replace_by_gradient

    def faulty(*arguments: Any, of_entropy: tuple[torch.Tensor, torch.Tensor]) -> None:
        entropy, by_entropy = of_entropy
        original(*arguments, of_entropy=(entropy, -by_entropy))

    monkeypatch.setattr(logprobs, "plain_replace_by_gradient", faulty)
    assert {"embed_tokens", "q_proj", "down_proj", "norm"} <= found(work, reference, KERNELS)
    assert found(work, reference, SHARED) == set()


def test_a_pass_that_is_lost_on_the_way_through_deepspeed_is_found(
    work: Work, reference: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    through = replace(EVERYTHING, zero_stage=2, small_passes=True)
    assert found(work, reference, through) == set()
    original, calls = gradients.Policy.backward, iter(range(1000))

    def faulty(policy: Any, loss: torch.Tensor, *, last: bool) -> None:
        original(policy, loss * (next(calls) != 1), last=last)

    monkeypatch.setattr(gradients.Policy, "backward", faulty)
    assert "embed_tokens" in found(work, reference, through)


def test_a_variant_with_a_fault_fails_the_check_and_is_named(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    scale_up_proj(monkeypatch)
    monkeypatch.setattr(gradients, "sample", lambda config, num_sequences: work)
    monkeypatch.setattr(gradients, "plan", lambda config, on_cuda: [PLAIN, PACKED, KERNELS])
    assert gradients.check(work.config) == 1
    printed = capsys.readouterr().out
    assert any(
        line.startswith("c  kernels") and "FAIL: " in line and "up_proj" in line for line in printed.splitlines()
    )
    assert "Further from the float32 gradient than the precision explains: c (kernels)." in printed


def test_cosine_ratio_and_slope_by_hand():
    exact = {"lm_head.weight": torch.tensor([3.0, 0.0])}
    (match,) = {*compare({"lm_head.weight": torch.tensor([3.0, 4.0])}, exact).values()}
    assert (match.dot, match.square, match.ref_square) == (9, 25, 9)
    assert match.angle == pytest.approx(1 - 9 / 15)
    assert match.ratio == pytest.approx(5 / 3)
    assert match.slope == 1  # the 4 is at a right angle


def test_a_gradient_that_is_missing_or_not_finite_is_a_fault():
    exact = {"lm_head.weight": torch.ones(2)}
    plain = compare(exact, exact)
    for wrong in ({}, {"lm_head.weight": torch.tensor([1.0, math.nan])}):
        assert faults(compare(wrong, exact), plain, TOLERANCE[torch.bfloat16]) == ["all", "lm_head"]


@pytest.mark.parametrize(
    ("match", "plain", "wrong"),
    [
        (Match(0.999, 1.0, 1.0), Match(0.9996, 1.0, 1.0), False),  # 1e-3 where the precision has 4e-4
        (Match(0.998, 1.0, 1.0), Match(0.9996, 1.0, 1.0), True),  # five times as much
        (Match(0.99995, 1.0, 1.0), Match(1.0, 1.0, 1.0), False),  # below what ever counts
        (Match(1.03, 1.03**2, 1.0), Match(1.0, 1.0, 1.0), True),  # the right direction, 3 % too long
        (
            Match(1.03, 1.03**2, 1.0),
            Match(1.01, 1.01**2, 1.0),
            False,
        ),  # where it is 1 % too long anyway: not over three times
        (Match(0.0, 8.0, 1e-6), Match(0.0, 1.0, 1e-6), False),  # noise beside noise
        (Match(0.0, 10.0, 1e-6), Match(0.0, 1.0, 1e-6), True),  # noise that is larger than noise
    ],
)
def test_what_is_too_far(match: Match, plain: Match, wrong: bool):
    assert faults({"x": match}, {"x": plain}, TOLERANCE[torch.bfloat16]) == ["x"] * wrong


def test_the_groups_of_weights():
    assert groups_of("model.layers.11.self_attn.k_proj.bias") == ["all", "k_proj.bias", "layer 11"]
    assert groups_of("model.layers.0.post_attention_layernorm.weight") == ["all", "norm", "layer 0"]
    assert groups_of("model.embed_tokens.weight") == ["all", "embed_tokens"]


def test_completions_without_an_advantage_are_left_out_and_equal_rewards_get_made_up_ones():
    groups = [
        Group(Prompt(row, [7], "", "", {}), [Completion([row, c], [-1.0, -1.0], "", "stop") for c in range(4)])
        for row in range(2)
    ]
    batch, made_up = gradients.choose(groups, torch.tensor([[0.0] * 4, [1.0, -1.0, math.nan, 0.5]]), 2)
    assert not made_up
    assert batch.tokens.tolist() == [7, 1, 0, 7, 1, 1]
    assert batch.advantages.tolist() == [1, -1]
    batch, made_up = gradients.choose(groups, torch.zeros(2, 4), 5)
    assert made_up
    assert batch.advantages.tolist() == [1, -1, 1, -1, 1]


def test_adapters_are_refused_before_a_model_is_loaded(tmp_path: Path):
    config = tiny_config(tmp_path / "run", lora={"rank": 4}, model={"name": "no/such-model"})
    with pytest.raises(ValueError, match=r"lora\.rank is 4; .* Set lora\.rank=0"):
        gradients.check(config)


@pytest.mark.slow
def test_fast_and_plain_steps_of_the_tiny_model_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original, made = steps.run, []
    monkeypatch.setattr(steps, "run", lambda *given, **options: made.append(original(*given, **options)) or made[-1])
    assert steps.check(small_config(tmp_path), num_steps=2) == 0
    fast, plain = made
    for one, other in zip(fast, plain, strict=True):
        assert one["optimizer/grad_norm"] == pytest.approx(other["optimizer/grad_norm"], rel=1e-4)
        assert one["policy/kl"] == pytest.approx(other["policy/kl"], rel=1e-3, abs=1e-9)
        assert one["reward/mean"] == other["reward/mean"]
        assert one["batch/shared"] > 0
        assert other["batch/shared"] == 0
    assert plain[-1]["policy/kl"] > 1e-5  # it has moved
    printed = capsys.readouterr().out
    assert "seed 0; fast | plain" in printed
    assert not (tmp_path / "run").exists()


def test_the_plain_trainers_update_and_reference_are_plain(tmp_path: Path):
    with real_trainer(small_config(tmp_path), PlainTrainer) as trainer:
        for model in (trainer.policy.engine.module, trainer.policy.reference):
            assert isinstance(model, PlainLM)


def test_several_seeds_have_a_mean_and_a_deviation():
    def one(kl: float) -> list[dict[str, float]]:
        return [{"policy/kl": 9.0}, {"policy/kl": kl}]

    lines = steps.summary({"fast": [one(1.0), one(3.0)], "plain": [one(4.0), one(4.0)]})
    assert [line.split() for line in lines[2:]] == [["policy/kl", "2", "+-", "1.4", "4", "+-", "0"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["gradients", "--sequences", "5", "--out", "x.json"], {"num_sequences": 5, "out": Path("x.json")}),
        (["steps", "--steps", "7", "--seeds", "1", "2"], {"num_steps": 7, "seeds": [1, 2]}),
    ],
)
def test_the_command_hands_its_options_on(
    monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, Any]
):
    seen: dict[str, Any] = {}

    def check(config: Config, **given: Any) -> int:
        seen.update(given)
        return 1

    monkeypatch.setattr({"gradients": gradients, "steps": steps}[options[0]], "check", check)
    monkeypatch.setattr("sys.argv", ["grpo.check", *options, "--config", "configs/quickstart.yaml"])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert left.value.code == 1
    assert seen == expected
