"""Low-rank adapters: what is trained, what the reference is, and that sampling and exports have what was trained."""

import json
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, FixedGenerator, sequences_of, tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo import Trainer
from grpo.algorithm.batch import micro_batch, pack
from grpo.config import Config
from grpo.config.sections import LoRAConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows
from grpo.inference.model import merged
from grpo.policy import lora
from grpo.policy.language_model import PackedLM, load_lm
from grpo.policy.model_source import base_quantization
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import load_tokenizer
from grpo.run import checkpoint
from grpo.run.disk import num_bytes
from grpo.system import distributed
from grpo.system.jsonl import read_jsonl
from grpo.types import MicroBatch

LORA = {"rank": 4, "alpha": 8}
BASE = load_file(TINY / "model/model.safetensors")


def lora_config(directory: Path, **sections: Any) -> Config:
    """With steps a hundred times larger than usual."""
    defaults: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "lora": LORA,
        "algorithm": {"kl_coef": 0.05},
        "optimizer": {"learning_rate": 1e-2},
    }
    return tiny_config(directory, **{**defaults, **sections})


def make_policy(directory: Path, **sections: Any) -> Policy:
    config = lora_config(directory, **sections)
    return Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))


def fixed_batch(policy: Policy) -> MicroBatch:
    prompts, _ = build_prompts(load_rows(policy._config.data)[:4], policy.tokenizer, policy._config.data)
    groups = FixedGenerator().sample(prompts, policy._config.sampling, num_completions=3, seed=0)
    batch = pack(groups, torch.ones(len(groups), 3))
    return micro_batch(batch, torch.ones_like(batch.sampling_logprobs)).to(policy.processes.device)


def move(policy: Policy, batch: MicroBatch, *, steps: int = 3, rate: float = 1e-2) -> None:
    """Make the batch likelier."""
    for _ in range(steps):
        policy.backward(-policy.logprobs(batch)[0].mean(), last=True)
        policy.optimizer_step(rate)
    policy.sync()


def test_the_policy_starts_as_the_reference_and_as_what_is_sampled_from_to_the_last_bit(tmp_path: Path):
    policy = make_policy(tmp_path)
    batch = fixed_batch(policy)
    assert torch.equal(policy.old_logprobs(batch), policy.ref_logprobs(batch))
    policy.sync()
    with policy.sampling_model() as lm:
        for name, weight in lm.named_parameters():
            assert torch.equal(weight.cpu(), BASE[name].float()), name


@pytest.mark.parametrize("zero", [0, 2])
def test_what_has_no_adapter_is_in_memory_once(tmp_path: Path, zero: int):
    policy = make_policy(tmp_path, distributed={"zero_stage": zero})
    own = {weight.data_ptr() for weight in policy.lm.parameters()}
    with policy.sampling_model() as lm:
        shared = {name for name, weight in lm.named_parameters() if weight.data_ptr() in own}
    assert "model.embed_tokens.weight" in shared
    assert {name for name in BASE if "norm" in name or "embed" in name} == shared


def test_adapters_alone_are_trained_and_the_reference_does_not_move(tmp_path: Path):
    policy = make_policy(tmp_path)
    batch = fixed_batch(policy)
    before = {name: weight.clone() for name, weight in policy.lm.named_parameters()}
    start = policy.ref_logprobs(batch)
    move(policy, batch)
    changed = {name for name, weight in policy.lm.named_parameters() if not torch.equal(weight, before[name])}
    adapters = {name for name in before if ".lora_" in name and ".default." in name}
    assert changed == adapters
    assert len(adapters) == 2 * 7 * policy.lm.config.num_hidden_layers  # A and B of q, k, v, o, gate, up, down
    assert all(weight.grad is None for name, weight in policy.lm.named_parameters() if name not in adapters)
    assert torch.equal(policy.ref_logprobs(batch), start)
    assert {name for name, weight in policy.lm.named_parameters() if weight.requires_grad} == adapters
    # 12 random completions become likelier by nats a token: far from where they started
    assert (policy.old_logprobs(batch) - start).mean() > 0.1


def test_the_reference_can_be_asked_between_a_forward_and_its_backward_pass(tmp_path: Path):
    gradients = []
    for name in ("a", "b"):
        policy = make_policy(tmp_path / name)
        batch = fixed_batch(policy)
        move(policy, batch, steps=1)
        loss = -policy.logprobs(batch)[0].mean()
        if name == "b":
            policy.ref_logprobs(batch)
        policy.backward(loss, last=True)
        gradients.append(policy.optimizer_step(0.0))
    assert gradients[0] == gradients[1] > 0


def test_a_refresh_makes_the_policy_the_reference_and_it_stays_there(tmp_path: Path):
    policy = make_policy(tmp_path)
    batch = fixed_batch(policy)
    move(policy, batch)
    policy.refresh_reference()
    moved = policy.old_logprobs(batch)
    assert torch.equal(policy.ref_logprobs(batch), moved)
    move(policy, batch)
    assert torch.equal(policy.ref_logprobs(batch), moved)
    assert not torch.allclose(policy.old_logprobs(batch), moved, atol=1e-2)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_is_sampled_from_has_the_trained_adapters(tmp_path: Path, zero: int):
    policy = make_policy(tmp_path, distributed={"zero_stage": zero})
    batch = fixed_batch(policy)
    move(policy, batch)
    trained = policy.old_logprobs(batch)
    with policy.sampling_model() as lm, torch.no_grad():
        rows = []
        for ids, prompt_len in sequences_of(batch):
            logprobs = lm(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1].log_softmax(-1)
            rows.append(logprobs.gather(1, ids[1:].unsqueeze(1)).squeeze(1)[prompt_len - 1 :])
    # W x + s B A x against (W + s B A) x in float32; the steps moved them by a thousand times that
    torch.testing.assert_close(torch.cat(rows), trained, rtol=0, atol=1e-3)
    assert (trained - policy.ref_logprobs(batch)).abs().mean() > 0.1


def test_the_gradient_checkpointed_backward_gives_the_same_adapters(tmp_path: Path):
    """The inputs of the layers need no gradient, a trap of checkpointing that loses all of it."""
    results = []
    for checkpointing in (0.0, 1.0):
        memory = {"micro_batch_tokens": 256, "activation_checkpointing": checkpointing}
        policy = make_policy(tmp_path / str(checkpointing), memory=memory)
        batch = fixed_batch(policy)
        move(policy, batch)
        results.append([source.clone() for _, source, _ in lora.adapter_pairs(policy.adapters)])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_both_exports_are_the_base_plus_the_adapters(tmp_path: Path):
    policy = make_policy(tmp_path / "run")
    batch = fixed_batch(policy)
    move(policy, batch)
    policy.export(tmp_path / "hf")
    policy.export_adapter(tmp_path / "adapter")
    exported, adapter = (
        load_file(tmp_path / "hf/model.safetensors"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    assert exported.keys() == BASE.keys()
    for name, weight in exported.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        expected = BASE[name].double()
        if key.format("A") in adapter:
            expected = expected + 8 / 4 * adapter[key.format("B")].double() @ adapter[key.format("A")].double()
            assert not torch.equal(weight, BASE[name])
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6, msg=name)  # float32
    assert not any(".lora_" in name for name in exported)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval()
    beside = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(beside(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=0, atol=1e-4)
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(TINY / "model")


def test_only_the_layers_that_were_named_are_adapted(tmp_path: Path):
    policy = make_policy(tmp_path, lora={**LORA, "target_modules": ["q_proj", "1.mlp.down_proj"]})
    layers = range(policy.lm.config.num_hidden_layers)
    assert policy.adapters.keys() == {f"model.layers.{i}.self_attn.q_proj" for i in layers} | {
        "model.layers.1.mlp.down_proj"
    }


@pytest.mark.parametrize("asked", ["q_prjo", "lm_head", "embed_tokens", "norm"])
def test_a_name_of_no_linear_layer_is_refused(tmp_path: Path, asked: str):
    with pytest.raises(ValueError, match=re.escape(f"lora.target_modules holds {asked!r}; no linear layer")) as caught:
        make_policy(tmp_path, lora={**LORA, "target_modules": ["q_proj", asked]})
    assert "Known: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj." in str(caught.value)


def starts_at_once(completion: str) -> float:
    """Begins with the first calculation instead of a guess."""
    return float(re.match(r" <think> \d", completion) is not None)


@pytest.mark.parametrize("engine", ["hf", "native"])
def test_a_run_with_adapters_learns_what_is_rewarded_and_samples_from_what_it_learned(tmp_path: Path, engine: str):
    config = lora_config(
        tmp_path / "run",
        rollout={"num_prompts": 8, "group_size": 8, "max_completion_tokens": 6, "engine": engine},
        run={"steps": 12},
    )
    trainer = Trainer(config, rewards=[starts_at_once])
    rows = [trainer.train_step() for _ in range(12)]
    trainer.close()
    rewards = [row["reward/mean"] for row in rows]
    assert rows[0]["policy/kl"] == 0
    assert rows[0]["policy/ratio_mean"] == 1
    assert sum(rewards[:2]) / 2 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9
    # float32, steps of 1e-2: stale weights would differ by tenths
    assert max(row["policy/sampling_gap_max"] for row in rows) < 1e-3


def test_a_run_with_adapters_resumes_where_it_stopped_without_the_frozen_weights_in_its_checkpoint(tmp_path: Path):
    sections: dict[str, Any] = {
        "algorithm": {"kl_coef": 0.05, "num_minibatches": 2, "reference_refresh_steps": 4},
        "run": {"steps": 4, "resume": "auto"},
    }
    Trainer(lora_config(tmp_path / "whole", **sections)).train()
    first = Trainer(lora_config(tmp_path / "halves", **sections))
    for _ in range(3):
        first.train_step()
    first.save()
    first.train_step()
    first.close()
    second = Trainer(lora_config(tmp_path / "halves", **sections))
    assert second.state.step == 3
    second.train()
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in read_jsonl(path)]
        for path in (tmp_path / "whole/metrics.jsonl", tmp_path / "halves/metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    newest = checkpoint.complete_checkpoints(tmp_path / "halves/checkpoints")[-1]
    trained = sum(source.numel() for _, source, _ in lora.adapter_pairs(second.policy.adapters))
    size = sum(path.stat().st_size for path in (newest / "training").rglob("*.pt"))
    assert size < 1.5 * 16 * trained  # weights, masters and two moments of four bytes, and names
    assert {"hf", "adapter", checkpoint.REFERENCE} < {path.name for path in newest.iterdir()}


# ---- weights in 4 bits ---------------------------------------------------------------------------------------------------

in_four_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
FOUR_BITS = {**LORA, "quantization": "nf4"}


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """What a weight becomes, by loops: of each block of 64 the nearest of NF4's 16 values (QLoRA, appendix E) times the largest
    magnitude, which is kept exactly here."""
    below = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
    values = torch.tensor([*below, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0])
    made = []
    for block in weight.flatten().split(64):
        largest = block.abs().max()
        made += [values[(values - value / largest).abs().argmin()] * largest for value in block]
    return torch.stack(made).view_as(weight)


@in_four_bits
@pytest.mark.parametrize("zero", [0, 2])
def test_sampling_reads_what_the_weights_in_4_bits_stand_for(tmp_path: Path, zero: int):
    policy = make_policy(tmp_path / "run", lora=FOUR_BITS, distributed={"zero_stage": zero})
    for name, layer in policy.adapters.items():
        stored = layer.get_base_layer().weight
        assert stored.dtype == torch.uint8
        assert stored.numel() == BASE[f"{name}.weight"].numel() / 2
        assert not stored.requires_grad
        sampled = policy.whole_lm.get_submodule(name).weight
        assert 0.05 < (sampled - BASE[f"{name}.weight"]).abs().mean() / BASE[f"{name}.weight"].abs().mean() < 0.12
    name = "model.layers.0.self_attn.k_proj"
    expected, found = nf4(BASE[f"{name}.weight"]), policy.whole_lm.get_submodule(name).weight
    # the largest magnitudes are in 8 bits, off by up to a percent; what lies between two values may go to either
    assert torch.isclose(found, expected, rtol=0.02, atol=1e-3).float().mean() > 0.999
    batch = fixed_batch(policy)
    for moved in (False, True):
        if moved:
            move(policy, batch)
        policy._settle()
        with torch.no_grad():
            of_replica = PackedLM(policy.whole_lm, temperature=1.0, chunk_tokens=64)
            policy.whole_lm.set_attn_implementation("packed")
            torch.testing.assert_close(of_replica(batch)[0], policy.old_logprobs(batch), rtol=0, atol=2e-5)
    assert (policy.old_logprobs(batch) - policy.ref_logprobs(batch)).abs().max() > 0.1, "the reference stays"


@in_four_bits
def test_adapters_over_4_bits_have_the_gradient_of_those_over_the_weights_that_these_stand_for(tmp_path: Path):
    four = make_policy(tmp_path / "four", lora=FOUR_BITS, memory={"activation_checkpointing": 1})
    plain = make_policy(tmp_path / "plain", distributed={"zero_stage": 0})
    with torch.no_grad():
        for name, layer in plain.adapters.items():
            layer.get_base_layer().weight.copy_(lora.dense_weight(four.adapters[name].get_base_layer()))
    batch = fixed_batch(four)
    gradients = []
    for policy in (four, plain):
        (policy.engine.module(batch)[0] * torch.linspace(-1, 1, len(batch.targets))).sum().backward()
        gradients.append({name: value.grad for name, value in policy.lm.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().max() > 0.01 for gradient in gradients[1].values() if gradient is not None)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@in_four_bits
def test_a_run_over_4_bits_learns_resumes_and_leaves_a_whole_model(tmp_path: Path):
    def config(name: str, steps: int) -> Config:
        return lora_config(tmp_path / name, lora=FOUR_BITS, run={"steps": steps, "resume": "auto"})

    Trainer(config("whole", 3)).train()
    Trainer(config("halves", 2)).train()
    checkpoint_ = Trainer(config("halves", 3)).train()
    rows = [read_jsonl(tmp_path / name / "completions.jsonl") for name in ("whole", "halves")]
    assert [row["completion"] for row in rows[0]] == [row["completion"] for row in rows[1]]
    stored = sum(path.stat().st_size for path in (checkpoint_ / "training").iterdir())
    trained = sum(value.numel() for value in load_file(checkpoint_ / "adapter/adapter_model.safetensors").values())
    assert stored < 1.5 * 16 * trained, "what is frozen is not stored"
    exported = AutoModelForCausalLM.from_pretrained(checkpoint_ / "hf", dtype=torch.float32)
    assert {value.dtype for value in exported.state_dict().values()} == {torch.float32}
    assert not hasattr(exported.config, "quantization_config")


@in_four_bits
def test_an_adapter_over_4_bits_says_so_and_is_taken_for_no_other(tmp_path: Path):
    checkpoint_ = Trainer(lora_config(tmp_path / "run", lora=FOUR_BITS, run={"steps": 1})).train()
    adapter = checkpoint_ / "adapter"
    assert base_quantization(adapter) == "nf4"
    further = lora_config(tmp_path / "further", model={"name": str(adapter), "dtype": "float32"})
    with pytest.raises(
        ValueError, match=r"trained over weights in 4 bits\. Set lora\.quantization=nf4, or name the folder hf"
    ):
        Trainer(further)
    with pytest.raises(
        ValueError, match=r"--model is '.*adapter', an adapter that was trained over weights in 4 bits; .* hf"
    ):
        merged(load_lm(further.model, dtype=torch.float32), further.model)
    config = further.model_copy(update={"lora": LoRAConfig(**FOUR_BITS)})
    policy = Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))
    stored = AutoModelForCausalLM.from_pretrained(checkpoint_ / "hf", dtype=torch.float32)
    for name, value in stored.named_parameters():
        torch.testing.assert_close(policy.whole_lm.get_parameter(name), value, rtol=0, atol=1e-6)
    assert num_bytes(policy) > (checkpoint_ / "hf/model.safetensors").stat().st_size, "a checkpoint has a dense model"


def test_4_bits_are_refused_without_adapters_with_sharded_weights_and_without_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match=r"lora\.quantization is 'nf4'; it has no effect while lora\.rank is 0"):
        lora_config(tmp_path, lora={"quantization": "nf4"})
    with pytest.raises(ValueError, match=r"lora\.quantization is nf4 with distributed\.zero_stage 3; .* to 2 or less"):
        lora_config(tmp_path, lora=FOUR_BITS, distributed={"zero_stage": 3})
    config = lora_config(tmp_path, lora=FOUR_BITS)  # which can be read where the package is missing
    for version, said in ((None, "it is not installed"), ("0.49.2", "0.49.2 is installed")):

        def installed(_: str, version: str | None = version) -> str:
            if version is None:
                raise metadata.PackageNotFoundError
            return version

        monkeypatch.setattr(metadata, "version", installed)
        with pytest.raises(
            ValueError, match=rf"needs bitsandbytes 0\.50 or newer, and {re.escape(said)}\. Run `pip install"
        ):
            lora.check_quantization(config)
