"""Sampling with weights in 8 bits: the kernels, the layers, and what a run makes of it."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, save_family, tiny_config
from test_engine import (
    FAMILIES,
    FUSED,
    GREEDY,
    SIZES,
    all_completions,
    lm_logprobs,
    make_policy,
    some_prompts,
    tokens_of,
)
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig

from grpo import Trainer
from grpo.check.advice import advice
from grpo.config import Config
from grpo.inference.resolve_model import RULES, sampling_of
from grpo.rejection.reject import _told
from grpo.rollout import check_engine, fp8, make_generator, plain_kernels
from grpo.rollout.engine import (
    NativeGenerator,
    _teacher_forced,
    make_decoder,
    unsupported,
    unsupported_in_8_bits,
)
from grpo.rollout.fp8 import FP8, Fp8Layers, Product, rounded_products
from grpo.rollout.hf import HFGenerator
from grpo.rollout.layers import FusedLayers
from grpo.rollout.paged import PAGE, num_pages_for
from grpo.run.tripwire import gap_limit, measure_rounding
from grpo.types import Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_8_BITS = {"rollout": {"weights": "fp8"}, "algorithm": {"importance": "truncate", "importance_high": 2.0}}
EIGHT_BIT_FAMILIES = {name: FAMILIES[name] for name in FUSED if "llama" not in name} | {"llama": LlamaConfig(**SIZES)}
needs_8_bits = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < fp8.CAPABILITY,
    reason="this GPU does not multiply numbers of 8 bits",
)
pytestmark = needs_8_bits


def kernels_of(name: str) -> Any:
    if name == "kernels":
        pytest.importorskip("triton")
    return importlib.import_module(f"grpo.rollout.{name}")


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (made * torch.tensor([10.0**i for i in range(shape[0])]).view(-1, *[1] * (len(shape) - 1))).to(DEVICE, dtype)


def assert_rounded(values: Tensor, scales: Tensor, exact: Tensor, *, name: str) -> None:
    """Each number is within half a step of float8 (four bits of mantissa, the hidden one included) of what it stands for, and the
    largest of a row is the largest there is. Triton's interpreter halves what rounds up to a power of two."""
    assert values.dtype == FP8
    assert scales.dtype == torch.float32
    wide = values.float()
    top = torch.full((len(exact),), fp8.LARGEST, device=exact.device)
    torch.testing.assert_close(wide.abs().amax(1), top)
    stands_for = wide * scales[:, None]
    step = torch.maximum(exact.float().abs() / 16, scales[:, None] * 2**-10)
    near = (stands_for - exact.float()).abs() <= step * 1.01
    if name == "kernels" and DEVICE == "cpu":
        near |= torch.frexp(exact.float() / scales[:, None])[0].abs() >= 15.5 / 16
    assert near.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain_kernels", "kernels"])
def test_rows_are_rounded_to_the_nearest_number_of_8_bits(name: str, dtype: torch.dtype):
    kernels, x = kernels_of(name), rows(3, 200, dtype=dtype)
    assert_rounded(*kernels.round_rows(x), x, name=name)
    values, scales = kernels.round_rows(torch.zeros(2, 32, device=DEVICE, dtype=dtype))
    assert not values.float().any()
    assert scales.isfinite().all()


@pytest.mark.parametrize("name", ["plain_kernels", "kernels"])
def test_a_norm_takes_the_scales_of_its_input_and_rounds_its_output(name: str):
    kernels, x, residual = kernels_of(name), rows(3, 96), rows(3, 96, seed=1)
    scales, weight = torch.tensor([2.0, 0.5, 0.01], device=DEVICE), rows(1, 96, seed=2)[0]
    wanted = plain_kernels.add_rms_norm(x * scales[:, None], residual, weight, 1e-6)
    torch.testing.assert_close(kernels.add_rms_norm(x, residual, weight, 1e-6, scales=scales), wanted)
    summed, *rounded = kernels.add_rms_norm_fp8(x, scales, residual, weight, 1e-6)
    torch.testing.assert_close(summed, wanted[0])
    assert_rounded(*rounded, wanted[1], name=name)
    first = kernels.add_rms_norm_fp8(x, None, None, weight, 1e-6)
    torch.testing.assert_close(first[0], x)


@pytest.mark.parametrize("name", ["plain_kernels", "kernels"])
def test_a_gate_takes_the_scales_of_its_input_and_rounds_its_output(name: str):
    both, scales = rows(3, 160) / 10, torch.tensor([1.0, 0.3, 0.05], device=DEVICE)
    gate, up = both.split(80, 1)
    wanted = plain_kernels.silu_mul(gate * scales[:, None], up * scales[:, None])
    assert_rounded(*kernels_of(name).silu_mul_fp8(gate, up, scales), wanted, name=name)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["plain_kernels", "kernels"])
def test_heads_are_rotated_behind_their_scales_and_biases(name: str, biased: bool, norm: bool):
    """What is kept and handed on is what it would be of the finished products; values, which attention reads, are changed."""
    kernels, heads, kv_heads, dim = kernels_of(name), 4, 2, 16
    product = rows(3, (heads + 2 * kv_heads) * dim)
    bias = rows(1, product.shape[1], seed=1)[0] if biased else None
    scales = torch.tensor([1.5, 0.1, 0.01], device=DEVICE)
    finished = product * scales[:, None] + (0 if bias is None else bias)
    norms = {"q_norm": rows(1, dim, seed=2)[0], "k_norm": rows(1, dim, seed=3)[0]} if norm else dict.fromkeys(
        ("q_norm", "k_norm")
    )  # fmt: skip
    angles = rows(3, dim // 2, seed=4).repeat(1, 2)
    places = torch.tensor([5, PAGE + 1, PAGE + 63], device=DEVICE)

    def rotated(own: Any, of: Tensor, **given: Any) -> tuple[Tensor, ...]:
        q, k, v = (part.unflatten(1, (-1, dim)) for part in of.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
        keys, values = (torch.zeros(3, kv_heads, PAGE, dim, device=DEVICE) for _ in range(2))
        done = own.rotate_and_store(
            q, k, v, angles.cos(), angles.sin(), keys, values, places, **norms, eps=1e-6, **given
        )
        return (*done, v, keys, values)

    wanted = rotated(plain_kernels, finished.clone())
    found = rotated(kernels, product.clone(), scales=scales, bias=bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_product_divides_its_weights_by_one_scale_and_leaves_biases_out():
    torch.manual_seed(0)
    parts = [nn.Linear(32, 16, device=DEVICE), nn.Linear(32, 48, device=DEVICE)]
    with torch.no_grad():
        parts[1].weight.mul_(100)
    product = Product(parts)
    product.round_weight()
    weight = torch.cat([part.weight for part in parts])
    torch.testing.assert_close(product.weight.float().abs().max().item(), fp8.LARGEST)
    step = torch.maximum(weight.abs() / 16, product.scale * 2**-10)
    assert ((product.weight.float() * product.scale - weight).abs() <= step * 1.01).all()
    torch.testing.assert_close(product.bias, torch.cat([part.bias for part in parts]))
    x = torch.randn(4, 32, device=DEVICE).to(FP8)
    torch.testing.assert_close(
        product(x), linear(x.float(), product.weight.float()) * product.scale, rtol=1e-3, atol=1e-3
    )
    address = product.weight.data_ptr()
    with torch.no_grad():
        parts[0].weight.zero_()
        parts[1].weight.zero_()
    product.round_weight()
    assert product.weight.data_ptr() == address
    assert not product.weight.float().any()


# --- the layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain_kernels", "kernels"])
@pytest.mark.parametrize("family", EIGHT_BIT_FAMILIES)
def test_layers_in_8_bits_equal_the_models_own_with_products_in_8_bits(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if name == "kernels" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter rounds otherwise")
    kernels = kernels_of(name)
    monkeypatch.setattr("grpo.rollout.layers.kernels_for", lambda tensor: kernels)
    policy = make_policy(tmp_path, save_family(tmp_path / "model", EIGHT_BIT_FAMILIES[family]))
    with torch.no_grad():
        for parameter, weight in policy.lm.named_parameters():
            if "norm" in parameter or "bias" in parameter:
                weight.add_(torch.randn_like(weight) * 0.2)
    monkeypatch.setattr("grpo.rollout.engine.CHECKED_STEPS", 6)
    tokens = torch.randint(5, 500, (2, PAGE + 4), device=policy.processes.device)
    with policy.sampling_model("paged") as lm, torch.no_grad():
        decoder = make_decoder(lm, [0], num_slots=2, pages_each=num_pages_for(PAGE + 4), gib=0.5, fused=True)
        decoder.check_weights()
        decoder.begin(Sampling(1, weights="fp8"))
        found = _teacher_forced(decoder, tokens, temperature=1.0)
        assert isinstance(decoder._layers, Fp8Layers)
    exact = policy.sentence_logprobs(tokens)[:, -found.shape[1] :]
    with rounded_products(policy.whole_lm):
        rounded = policy.sentence_logprobs(tokens)[:, -found.shape[1] :]
    assert torch.equal(policy.sentence_logprobs(tokens)[:, -found.shape[1] :], exact)  # it is as it was
    off, between = (rounded - exact).abs().mean(), (found - rounded).abs().mean()
    assert off > 0.01
    assert between < 0.3 * off  # a number on the border between two may be rounded to either


def test_each_call_reads_the_weights_of_its_time_and_a_call_for_all_bits_has_all(tmp_path: Path):
    policy = make_policy(tmp_path, **IN_8_BITS)
    engine, prompts = make_generator(policy._config, policy), some_prompts(4, longest=40)
    assert isinstance(engine, NativeGenerator)
    rounded = Sampling(12, weights="fp8")

    def gaps(sampling: Sampling) -> tuple[float, float]:
        """Of what is sampled to the model's own forward pass, and to that in 8 bits."""
        groups = engine.sample(prompts, sampling, num_completions=2, seed=0)
        pairs = [(group, each) for group in groups for each in group.completions]
        with policy.sampling_model() as lm:
            own = torch.cat([lm_logprobs(lm, group, each) for group, each in pairs])
            with rounded_products(lm):
                in_8_bits = torch.cat([lm_logprobs(lm, group, each) for group, each in pairs])
        sampled = torch.tensor([logprob for _, each in pairs for logprob in each.logprobs])
        return float((sampled - own).abs().mean()), float((sampled - in_8_bits).abs().mean())

    def check() -> None:
        own, in_8_bits = gaps(rounded)
        assert 1e-3 < own < 0.2
        assert (
            in_8_bits < (0.3 if DEVICE == "cpu" else 0.7) * own
        )  # a GPU adds up fewer bits, and more is rounded otherwise
        assert gaps(Sampling(12))[0] < 1e-4

    check()
    plain = tokens_of(engine.sample(prompts, GREEDY, num_completions=1, seed=0))
    decoder = engine._decoder
    assert decoder is not None
    assert type(decoder._layers) is FusedLayers
    exact = decoder._variant()
    decoder.begin(rounded)
    assert type(decoder._layers) is Fp8Layers
    assert decoder._variant() != exact  # captured steps of the two are not taken for each other
    with torch.no_grad():
        for weight in policy.lm.parameters():
            weight.data = weight * (1 + 0.2 * torch.randn_like(weight))  # where it lies changes, too
    check()
    assert tokens_of(engine.sample(prompts, GREEDY, num_completions=1, seed=0)) != plain


# --- a run ------------------------------------------------------------------------------------------------------------------


def run_in_8_bits(directory: Path, **sections: Any) -> Trainer:
    rollout = {"engine": "native", "weights": "fp8"}
    return Trainer(
        tiny_config(
            directory,
            model={"name": str(TINY / "model"), "dtype": "float32"},
            rollout=rollout,
            algorithm={"kl_coef": 0.0, "importance": "truncate", "importance_high": 2.0},
            **sections,
        )
    )


def test_a_run_weighs_what_is_rounded_and_evaluates_the_policy_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its gap is above what all other engines are held to in float32 (0.001), and below a limit of its own."""
    seen = []
    sample = NativeGenerator.sample

    def watched(self: NativeGenerator, prompts: Any, sampling: Sampling, **given: Any) -> Any:
        seen.append(sampling.weights)
        return sample(self, prompts, sampling, **given)

    monkeypatch.setattr(NativeGenerator, "sample", watched)
    run = tmp_path / "run"
    trainer = run_in_8_bits(
        run,
        run={"dir": str(run), "steps": 2},
        evaluation={"num_questions": 2, "every_steps": 2},
        data={"eval_name": str(TINY / "test.jsonl")},
    )
    trainer.train()
    assert "policy" in seen
    assert seen.count("fp8") == 2
    steps = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if "optimizer/loss" in row]
    assert len(steps) == 2
    for row in steps:
        assert 0.001 < row["policy/sampling_gap"] < 0.2
        assert row["policy/importance_bounded"] < 0.2


def test_tokens_of_another_temperature_stop_a_run_in_8_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = run_in_8_bits(tmp_path / "run")
    sample = NativeGenerator.sample
    trainer.train_step()
    limit = trainer.guard.rounding
    assert limit is not None
    assert 0.001 < limit < 0.1

    def hotter(self: NativeGenerator, prompts: Any, sampling: Sampling, **given: Any) -> Any:
        return sample(self, prompts, replace(sampling, temperature=1.6), **given)

    monkeypatch.setattr(NativeGenerator, "sample", hotter)
    try:
        with pytest.raises(RuntimeError, match=r"another temperature: at 1\.[4-8]"):
            trainer.train_step()
    finally:
        trainer.close()


# --- what cannot be -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"rollout": {"weights": "fp8"}}, "rollout.weights is fp8; tokens are then drawn by weights that are rounded"),
        (
            {**IN_8_BITS, "rollout": {"weights": "fp8", "engine": "hf"}},
            "and rollout.engine is hf. Set rollout.engine to native",
        ),
        (
            {**IN_8_BITS, "rollout": {"weights": "fp8", "engine": "vllm"}},
            "and rollout.engine is vllm. Set rollout.engine to native",
        ),
        (
            {**IN_8_BITS, "teacher": {"name": "somebody/large"}},
            r"rollout.weights is fp8; the divergence from the teacher \(somebody/large\) has a gradient only on tokens",
        ),
        (
            {**IN_8_BITS, "rollout": {"weights": "fp8", "fused_layers": False}},
            "rollout.weights is fp8 and rollout.fused_layers false; .* Remove one of the two",
        ),
    ],
)
def test_what_does_not_go_with_8_bits_is_refused_before_a_model_is_loaded(
    tmp_path: Path, sections: dict[str, Any], expected: str
):
    with pytest.raises(ValueError, match=expected):
        tiny_config(tmp_path, **sections)


def test_bounds_of_the_divergence_need_no_importance_weight(tmp_path: Path):
    config = tiny_config(
        tmp_path, rollout={"weights": "fp8"}, algorithm={"clip": "divergence", "clip_low": 0.2, "clip_high": 0.2}
    )
    assert isinstance(config, Config)
    assert config.sampling.weights == "fp8"
    assert config.eval_sampling.weights == "policy"


def test_a_family_without_such_layers_is_refused_by_name_and_not_sampled_otherwise(tmp_path: Path):
    policy = make_policy(tmp_path, save_family(tmp_path / "model", FAMILIES["gemma"]), **IN_8_BITS)
    with pytest.raises(
        ValueError,
        match=r"rollout.weights is fp8; there are no layers in 8 bits for this model \(gemma\), only for llama, .* of the usual "
        "build. Set rollout.weights to policy",
    ):
        make_generator(policy._config, policy)
    with pytest.raises(ValueError, match=r"no layers in 8 bits for this model \(gemma\)"):
        check_engine(policy._config)


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path):
    config = type(FAMILIES["qwen3"])(**{**FAMILIES["qwen3"].to_dict(), "intermediate_size": 100})
    policy = make_policy(tmp_path, save_family(tmp_path / "model", config))
    assert unsupported(policy, fused=True) is None
    assert unsupported_in_8_bits(policy) == ("products in 8 bits need weights whose sizes divide by 16; 100 does not")
    assert all(each.finish_reason for each in all_completions(make_generator(policy._config, policy).sample(
        some_prompts(2), GREEDY, num_completions=1, seed=0
    )))  # fmt: skip


def test_a_bias_that_no_kernel_adds_is_refused(tmp_path: Path):
    policy = make_policy(tmp_path, save_family(tmp_path / "model", FAMILIES["llama without grouped heads"]))
    assert unsupported_in_8_bits(policy) == (
        "products in 8 bits have no bias but those of queries, keys and values; model.layers.0.self_attn.o_proj has one"
    )


def test_an_engine_samples_in_8_bits_only_if_it_was_made_to(tmp_path: Path):
    policy, prompts = make_policy(tmp_path), some_prompts(1)
    for engine in (NativeGenerator(policy, policy._config), HFGenerator(policy, max_sequences=2)):
        with pytest.raises(
            ValueError, match=r"sampling.weights is fp8; this engine|sampling.weights is fp8, which the native"
        ):
            engine.sample(prompts, Sampling(4, weights="fp8"), num_completions=1, seed=0)


def test_products_that_are_wrong_are_seen_before_anything_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = make_policy(tmp_path, **IN_8_BITS)
    assert unsupported_in_8_bits(policy) is None
    own = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda self, x: 3 * own(self, x))
    with pytest.raises(
        ValueError, match=r"rollout.weights is fp8; with weights in 8 bits the log-probabilities of .* differ"
    ):
        make_generator(policy._config, policy)


def test_an_older_gpu_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, expected in (
        ((8, 0), "NVIDIA A100 does not multiply numbers of 8 bits; Ada and Hopper GPUs do"),
        ((8, 9), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fp8.unsupported_here(FAMILIES["qwen3"], torch.device("cuda")) == expected


def test_the_cache_leaves_room_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.rollout.engine.free_bytes", lambda device: 8 * 2**20)
    policy = make_policy(tmp_path, **IN_8_BITS)
    copy = fp8.num_bytes(policy.lm)
    assert copy == sum(each.numel() for name, each in policy.lm.named_parameters() if "proj.weight" in name)
    without = policy._config.model_copy(deep=True)
    without.rollout.weights = "policy"
    sizes = []
    for config in (policy._config, without):
        config.memory.max_sequences = 4096
        decoder = NativeGenerator(policy, config)._decoder
        assert decoder is not None
        sizes.append(decoder.cache.num_bytes)
    page = sizes[0] / decoder.cache.keys.shape[1]
    assert sizes[0] < sizes[1]
    assert abs(sizes[1] - sizes[0] - copy / 2) <= page  # half of what is free


# --- the limit of the gap -----------------------------------------------------------------------------------------------------


def test_the_limit_is_that_of_temperature_1_and_has_a_ceiling(tmp_path: Path):
    config = tiny_config(tmp_path, **IN_8_BITS)
    assert gap_limit(config, torch.float32, 0.02) == pytest.approx(0.06)
    assert gap_limit(config, torch.float32, 5.0) == fp8.TOLERANCE  # whatever is rounded, that is another model
    policy = make_policy(tmp_path / "run", **IN_8_BITS)
    groups = make_generator(policy._config, policy).sample(some_prompts(6), Sampling(30), num_completions=2, seed=0)
    found = []
    for temperature in (1.0, 0.5):
        policy.use_temperature(temperature)
        found.append(measure_rounding(policy, groups, in_8_bits=True))
    assert found[0] > 1e-3
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_a_limit_that_is_measured_anew_is_that_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def measured(*_: Any, in_8_bits: bool) -> float:
        asked.append(in_8_bits)
        return 0.0

    monkeypatch.setattr("grpo.run.tripwire.measure_rounding", measured)
    trainer = run_in_8_bits(tmp_path / "run")
    try:
        with pytest.raises(RuntimeError, match=r"of this model in 8 bits \(rollout.weights\)"):
            trainer.train_step()
    finally:
        trainer.close()
    assert asked == [True, True]


# --- what else knows of it ------------------------------------------------------------------------------------------------------


def test_a_model_is_asked_with_all_its_bits_whatever_its_run_sampled_with():
    options = argparse.Namespace(**dict.fromkeys(RULES))
    assert sampling_of(options, Sampling(8, temperature=0.7, weights="fp8")) == Sampling(8, temperature=0.7)


def test_samples_that_are_there_stay_those_of_the_same_sampling():
    assert "weights" not in _told(Sampling(8))
    assert _told(Sampling(8))["max_tokens"] == 8


def test_advice_and_plans_know_of_the_copy(tmp_path: Path):
    config, without = tiny_config(tmp_path, **IN_8_BITS), tiny_config(tmp_path)
    rung = "set rollout.weights from fp8 to policy (no copy of the layers in 8 bits; sampling takes longer)"
    assert advice("rollout", config, world_size=1)[0] == rung
    assert rung not in advice("rollout", without, world_size=1)


def test_a_loss_of_ones_own_is_told_to_weigh_the_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = Trainer(tiny_config(tmp_path, **IN_8_BITS), loss=lambda logprobs, *_: -logprobs.mean())
    trainer.close()
    said = capsys.readouterr()
    assert (
        "rollout.weights is fp8, and loss was given to Trainer: it must weigh all tokens itself" in said.out + said.err
    )
