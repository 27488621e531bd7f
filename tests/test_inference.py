"""A model loaded only to be sampled gives what the policy it was saved from gives, on both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from grpo import Trainer
from grpo.inference import model as inference
from grpo.inference.model import Sampler, sampling_config
from grpo.policy.model_source import model_directory
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.engine import NativeGenerator
from grpo.rollout.hf import HFGenerator
from grpo.system import distributed
from grpo.types import Prompt, Sampling


def load(model: str, **settings: object) -> Sampler:
    config = sampling_config(model, **{"max_prompt_tokens": 96, "max_completion_tokens": 24, **settings})
    return inference.load(config, load_tokenizer(config.model))


def prompts_of(sampler: Sampler, *, seeds: list[int | None]) -> list[Prompt]:
    texts = ["How many", "Finn has 14 coins.", "Two"]
    ids = sampler.tokenizer(texts)["input_ids"]
    return [Prompt(i, ids[i], texts[i], "", {}, seed=seed) for i, seed in enumerate(seeds)]


def tokens(sampler: Sampler, prompts: list[Prompt], *, seed: int = 0, temperature: float = 1.0) -> list[list[int]]:
    groups = sampler.generator.sample(prompts, Sampling(12, temperature=temperature), num_completions=3, seed=seed)
    return [completion.token_ids for group in groups for completion in group.completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with adapters, so that its checkpoint is right only if they are merged."""
    directory = tmp_path_factory.mktemp("inference") / "run"
    settings = {"lora": {"rank": 4}, "optimizer": {"learning_rate": 0.05}, "run": {"dir": str(directory), "steps": 1}}
    trainer = Trainer(tiny_config(directory, **settings), rewards=[num_characters])
    trainer.train()
    assert trainer.log.metrics()[-1]["group/with_signal"] > 0
    return trainer


def num_characters(completion: str) -> float:
    return float(len(completion))


@pytest.mark.parametrize("engine", ["hf", "native"])
def test_a_runs_directory_is_sampled_as_the_policy_that_it_was_saved_from(run: Trainer, engine: str):
    sampler = load(model_directory(str(run.directory)), engine=engine)
    assert isinstance(sampler.generator, {"hf": HFGenerator, "native": NativeGenerator}[engine])
    prompts = prompts_of(sampler, seeds=[None] * 3)
    policy = Sampler(run.policy, HFGenerator(run.policy, max_sequences=256))
    assert tokens(sampler, prompts, temperature=0) == tokens(policy, prompts, temperature=0)
    base = load(str(TINY / "model"), engine=engine)
    assert tokens(sampler, prompts, temperature=0) != tokens(base, prompts, temperature=0)  # training has changed it
    assert tokens(sampler, prompts, seed=1) == tokens(sampler, prompts, seed=1) != tokens(sampler, prompts, seed=2)


def test_a_trainer_that_was_refused_under_zero_3_leaves_models_to_sample_whole(tmp_path: Path):
    distributed.start(tiny_config(tmp_path / "run", distributed={"zero_stage": 3}), dtype=torch.float32)
    try:
        sampler = load(str(TINY / "model"), engine="hf")
        assert all(weight.numel() for weight in sampler.model.lm.parameters())
    finally:
        unset_hf_deepspeed_config()


@pytest.mark.parametrize("engine", ["hf", "native"])
def test_a_prompt_with_a_seed_of_its_own_draws_the_same_beside_any_others(engine: str):
    sampler = load(str(TINY / "model"), engine=engine)
    prompts = prompts_of(sampler, seeds=[7, None, 8])
    together, alone = tokens(sampler, prompts, seed=0), tokens(sampler, prompts[2:], seed=5)
    assert together[6:] == alone
    assert len(set(map(tuple, alone))) == 3  # completions of one prompt differ all the same
    again = tokens(sampler, prompts, seed=5)
    assert again[:3] == together[:3]
    assert again[3:6] != together[3:6]


def test_a_model_that_is_only_sampled_needs_no_gradients():
    sampler = load(str(TINY / "model"))
    assert not any(parameter.requires_grad for parameter in sampler.model.lm.parameters())
    assert isinstance(sampler.generator, NativeGenerator)


def test_a_run_a_checkpoint_and_a_model_directory_are_all_models(run: Trainer, tmp_path: Path):
    checkpoint = run.directory / "checkpoints" / "step-00000001"
    (run.directory / "checkpoints" / "step-00000002.partial").mkdir()
    for name in (run.directory, checkpoint, checkpoint / "hf"):
        assert model_directory(str(name)) == str(checkpoint / "hf")
    assert model_directory("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert model_directory(str(checkpoint / "adapter")) == str(checkpoint / "adapter")
    with pytest.raises(ValueError, match=r"^--model is .*; it is neither a model .* Name one of these"):
        model_directory(str(tmp_path))
    with pytest.raises(ValueError, match=r"^--model is '/nowhere'; there is no such directory\. Correct"):
        model_directory("/nowhere")


def test_a_checkpoint_loads_where_others_load_models_from(run: Trainer):
    """As lm-evaluation-harness and lighteval do; the merged weights are those that were sampled."""
    directory = model_directory(str(run.directory))
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("Finn has 14 coins.", return_tensors="pt").input_ids
    with run.policy.sampling_model() as own:
        torch.testing.assert_close(lm(ids).logits.float(), own(ids.to(own.device)).logits.float().cpu())


def test_vllm_is_refused_where_nothing_is_trained():
    with pytest.raises(ValueError, match=r"^rollout\.engine is vllm; .* Set it to auto\.$"):
        sampling_config("x", max_prompt_tokens=8, max_completion_tokens=8, engine="vllm")


def test_a_cpus_memory_bounds_what_is_sampled_at_once(monkeypatch: pytest.MonkeyPatch):
    lm = load(str(TINY / "model")).model.lm
    config = lm.config
    head_dim = config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 128 * 4  # of two pages
    each = keys_and_values + 8 * 4 * config.vocab_size
    monkeypatch.setattr(inference, "free_bytes", lambda device: 4 * (7 * each + 5))
    assert inference.max_sequences_in_memory(lm, 100) == 7
    assert load(str(TINY / "model"), max_completion_tokens=32).generator.max_sequences == 7
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1)
    assert inference.max_sequences_in_memory(lm, 100) == 1


@pytest.mark.parametrize(("with_all", "taken"), [(0.5, 4), (0.9, 1), (4.0, 1)])
def test_a_model_that_is_not_clearly_faster_with_all_threads_has_one(
    with_all: float, taken: int, monkeypatch: pytest.MonkeyPatch
):
    threads = [4]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(inference, "_timed_step", lambda lm: 1.0 if threads[-1] == 1 else with_all)
    inference.use_fastest_threads(torch.nn.Linear(1, 1))
    assert threads[-1] == taken
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    before = list(threads)
    inference.use_fastest_threads(torch.nn.Linear(1, 1))
    assert threads == before


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/nope", "runs/nope/checkpoints", "a/b/c", "./x", "/x"):
        with pytest.raises(ValueError, match=rf"^--model is '{name}'; there is no such directory"):
            model_directory(name)
    assert model_directory("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
