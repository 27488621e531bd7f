"""A model loaded only to be sampled gives what the policy it was saved from gives, on both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo import Trainer
from grpo.inference import model as inference
from grpo.inference.model import Sampler, sampling_config
from grpo.policy.model_source import model_directory
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.engine import NativeGenerator
from grpo.rollout.hf import HFGenerator
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
