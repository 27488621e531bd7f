"""Tokens that were not sampled from the policy stop the run in the first step where it shows, with the right cause first."""

import copy
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch, tiny_config
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo import Trainer
from grpo.config import Config
from grpo.data.prompts import TEMPLATES, build_prompts
from grpo.rollout.hf import HFGenerator
from grpo.run import checkpoint, post_mortem
from grpo.run.tripwire import Probe, SamplingGapError, _probed, gap_limit, measure_rounding
from grpo.system.jsonl import read_jsonl
from grpo.types import Batch, Completion, Group, Prompt, Sampling


class Wrong:
    """An engine that samples from something else than it is asked for."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def sample(self, prompts: list[Prompt], sampling: Sampling, **options: Any) -> list[Group]:
        return self.engine.sample(prompts, sampling, **options)

    def sync(self) -> None:
        self.engine.sync()

    def release_memory(self) -> None:
        self.engine.release_memory()

    def metrics(self) -> dict[str, float]:
        return {}


class Hotter(Wrong):
    def sample(self, prompts: list[Prompt], sampling: Sampling, **options: Any) -> list[Group]:
        return self.engine.sample(prompts, replace(sampling, temperature=1.4), **options)


class OtherPrompts(Wrong):
    """Reads the prompts in its own way, and hands back the completions as if they were of those it was given."""

    def sample(self, prompts: list[Prompt], sampling: Sampling, **options: Any) -> list[Group]:
        groups = self.engine.sample([self.changed(prompt) for prompt in prompts], sampling, **options)
        return [Group(prompt, group.completions) for prompt, group in zip(prompts, groups, strict=True)]

    def changed(self, prompt: Prompt) -> Prompt:
        raise NotImplementedError


class BareQuestions(OtherPrompts):
    def changed(self, prompt: Prompt) -> Prompt:
        policy = self.engine.policy
        data = policy._config.data.model_copy(update={"template": "none"})
        return build_prompts([prompt.columns], policy.tokenizer, data)[0][0]


class WithoutLastToken(OtherPrompts):
    def changed(self, prompt: Prompt) -> Prompt:
        return replace(prompt, token_ids=prompt.token_ids[:-1])


class KeepsTopTwo(Wrong):
    """Draws from the two likeliest tokens and reports their log-probabilities among these, as some engines do."""

    def sample(self, prompts: list[Prompt], sampling: Sampling, **options: Any) -> list[Group]:
        groups = self.engine.sample(prompts, replace(sampling, top_k=2), **options)
        return [Group(g.prompt, [self.renormalised(g.prompt, c) for c in g.completions]) for g in groups]

    def renormalised(self, prompt: Prompt, completion: Any) -> Any:
        with self.engine.policy.sampling_model() as lm, torch.no_grad():
            ids = torch.tensor([prompt.token_ids + completion.token_ids])
            logits = lm(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
        kept = logits.topk(2).values.logsumexp(-1) - logits.logsumexp(-1)
        return replace(completion, logprobs=(torch.tensor(completion.logprobs) - kept).tolist())


class CopyOfItsOwn:
    """A policy to sample from whose weights are those of the moment it was made."""

    def __init__(self, policy: Any) -> None:
        self.tokenizer, self.end_token_ids, self.processes = policy.tokenizer, policy.end_token_ids, policy.processes
        with policy.sampling_model() as lm:
            self.lm = copy.deepcopy(lm)
            self.lm.set_attn_implementation("sdpa")
        self.policy = policy

    @contextmanager
    def sampling_model(self) -> Any:
        yield self.lm

    def sync(self) -> None:
        self.lm.load_state_dict(self.policy.lm.state_dict())


def probed(run: Path, **sections: Any) -> Config:
    """Whose passes hold all 16 sequences: a diagnosis makes 27 times as many passes as these take."""
    return tiny_config(run, memory={"micro_batch_tokens": 2048}, **sections)


def tripped(trainer: Trainer, *, step: int = 1) -> str:
    """The first cause in the message with which the run stops in this step, before its update."""
    weights = [weight.detach().clone() for weight in trainer.policy.lm.parameters()]
    with pytest.raises(SamplingGapError, match=rf"nats in step {step}, above 0.001") as raised:
        trainer.train_step()
    trainer.close()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.policy.lm.parameters(), strict=True))
    assert checkpoint.complete_checkpoints(trainer.log.directory / "checkpoints") == []
    causes = re.findall(r"^ +(\d+)%  (.*)$", str(raised.value), re.MULTILINE)
    assert len(causes) == 6
    assert int(causes[0][0]) > 50, raised.value
    assert int(causes[0][0]) >= int(causes[1][0]) + 10, raised.value
    return causes[0][1]


def test_another_temperature_is_found_with_its_value(tmp_path: Path):
    trainer = Trainer(probed(tmp_path / "run"))
    trainer.collector.generator = Hotter(trainer.collector.generator)
    cause = tripped(trainer)
    found = re.match(r"sampled at another temperature: at (\S+) instead of 1 ", cause)
    assert found
    assert float(found[1]) == pytest.approx(1.4, rel=0.03)


def test_another_template_is_found_by_its_name(tmp_path: Path):
    trainer = Trainer(probed(tmp_path / "run"))
    trainer.collector.generator = BareQuestions(trainer.collector.generator)
    assert "from another prompt: from data.template none, " in tripped(trainer)


def test_a_prompt_that_lost_its_last_token_is_found(tmp_path: Path):
    trainer = Trainer(probed(tmp_path / "run"))
    trainer.collector.generator = WithoutLastToken(trainer.collector.generator)
    assert "from another prompt: from the prompt without its last token, " in tripped(trainer)


def test_every_template_is_tried():
    assert set(TEMPLATES) == {"r1_zero", "r1_zero_think", "chat", "none"}


def test_log_probabilities_among_the_tokens_that_were_left_are_found(tmp_path: Path):
    trainer = Trainer(probed(tmp_path / "run"))
    trainer.collector.generator = KeepsTopTwo(trainer.collector.generator)
    assert "that top-k, top-p or min-p left" in tripped(trainer)


@pytest.mark.parametrize("fault", ["the replica is never merged", "never asked", "does not do it"])
def test_stale_weights_are_found(tmp_path: Path, fault: str):
    """The replica of adapters, or an engine with weights of its own: the trainer forgets to refresh it, or it does nothing."""
    rank = 8 if fault == "the replica is never merged" else 0
    trainer = Trainer(probed(tmp_path / "run", lora={"rank": rank}, optimizer={"learning_rate": 3e-3}))
    if rank == 0:
        trainer.collector.generator = HFGenerator(CopyOfItsOwn(trainer.policy), max_sequences=64)
    sync, trainer.collector.generator.sync = trainer.collector.generator.sync, lambda: None
    trainer.train_step()  # on the weights that both began with
    if fault == "never asked":
        trainer.collector.generator.sync = sync  # when it is asked to find the cause, it does
    assert "sampled with old weights" in tripped(trainer, step=2)


def test_a_forward_pass_that_is_not_the_models_is_found(tmp_path: Path):
    """As when ZeRO-3 left the policy, and not the model to sample from, with rotary frequencies rounded to bfloat16."""
    trainer = Trainer(probed(tmp_path / "run", lora={"rank": 8}))
    frequencies = dict(trainer.policy.lm.named_buffers())["model.rotary_emb.inv_freq"]
    frequencies.mul_(1.02)
    assert "another forward pass in training" in tripped(trainer)


def test_all_processes_stop_together_before_a_checkpoint(tmp_path: Path):
    output = launch("worker_tripwire.py", str(tmp_path), processes=2)
    assert sorted(re.findall(r"rank \d stopped in step 2: old weights", output)) == [
        f"rank {rank} stopped in step 2: old weights" for rank in range(2)
    ]
    assert not (tmp_path / "run/checkpoints").exists()
    left = tmp_path / "run/post_mortem/step-00000002"
    rows = read_jsonl(left / "completions.jsonl")
    assert [row["rank"] for row in rows] == [0] * 8 + [1] * 8
    sampled = [load_file(left / f"rollout-rank-{rank}.safetensors") for rank in range(2)]
    trained = [load_file(left / f"update-rank-{rank}.safetensors") for rank in range(2)]
    key = "sampling_logprobs"
    both = [torch.cat([part[key] for part in parts]).sort().values for parts in (sampled, trained)]
    assert torch.equal(*both)  # dealt anew, but the same tokens


@pytest.mark.parametrize(
    "options",
    [
        ["--fault", "temperature", "--offload", "optimizer", "parameters"],
        ["--fault", "temperature", "--lora", "4"],
    ],
)
def test_the_cause_is_found_with_shards_adapters_and_offload(tmp_path: Path, options: list[str]):
    """The diagnosis gathers weights after forward passes, when ZeRO-3 has begun to fetch what it expects to be next."""
    output = launch("worker_tripwire.py", str(tmp_path), *options, processes=2)
    assert len(re.findall(r"rank \d stopped in step 1: another temperature", output)) == 2


def test_the_post_mortem_holds_the_batch_and_what_the_policy_says_of_it(tmp_path: Path):
    trainer = Trainer(probed(tmp_path / "run"))
    trainer.collector.generator = Hotter(trainer.collector.generator)
    with pytest.raises(SamplingGapError) as raised:
        trainer.train()
    trainer.close()
    left = tmp_path / "run/post_mortem/step-00000001"
    assert str(left) in str(raised.value)
    assert (left / "alarm.txt").read_text().startswith("policy/sampling_gap is ")
    assert (left / "config.yaml").read_text() == (tmp_path / "run/config.yaml").read_text()
    rows, sampled = read_jsonl(left / "completions.jsonl"), load_file(left / "rollout-rank-0.safetensors")
    assert len(rows) == len(sampled["prompt_lens"]) == 16
    assert sampled["advantages"].tolist() == pytest.approx([row["advantage"] for row in rows])
    ends, lens = sampled["cu_seqlens"][1:], [row["num_tokens"] for row in rows]
    assert (sampled["cu_seqlens"].diff() - sampled["prompt_lens"]).tolist() == lens
    tokenizer = trainer.policy.tokenizer
    for row, end, length in zip(rows, ends.tolist(), lens, strict=True):
        text = tokenizer.decode(sampled["tokens"][end - length : end], skip_special_tokens=True)
        assert text == row["completion"]
    trained = load_file(left / "update-rank-0.safetensors")
    read = [row["num_tokens"] for row in rows if row["advantage"] != 0]  # without a KL term the others make no gradient
    assert sorted(trained["completion_lens"].tolist()) == sorted(read)
    gap = (trained["logprobs"] - trained["sampling_logprobs"]).abs().mean()
    assert f"policy/sampling_gap is {gap:.3g} nats" in str(raised.value)


@pytest.mark.parametrize(
    ("writes", "error", "left"),
    [
        ("_claim", OSError(28, "No space left on device"), "No post-mortem could be written"),
        ("save_file", SafetensorError("I/O error: No space left on device"), "The batch and the last metrics lie in"),
    ],
)
def test_a_full_disk_does_not_hide_the_alarm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    writes: str,
    error: Exception,
    left: str,
):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(post_mortem, writes, full)
    trainer = Trainer(probed(tmp_path / "run"))
    trainer.collector.generator = Hotter(trainer.collector.generator)
    with pytest.raises(SamplingGapError, match=rf"(?s)sampled at another temperature.*{left}"):
        trainer.train_step()
    trainer.close()
    assert f"the post-mortem could not be written: {error}" in capsys.readouterr().out


def test_the_limit_follows_precision_rounding_and_temperature(tmp_path: Path):
    config = tiny_config(tmp_path)
    assert gap_limit(config, torch.float32, 1e-5) == 0.001
    assert gap_limit(config, torch.bfloat16, 0.01) == 0.04
    assert gap_limit(config, torch.bfloat16, 0.0224) < 0.073  # 1.5B, and what the rotary fault made of it
    assert gap_limit(config, torch.bfloat16, 0.0524) > 0.1  # 7B
    cold = tiny_config(tmp_path, rollout={"temperature": 0.5})
    assert gap_limit(cold, torch.bfloat16, 0.01) == 0.08
    own = tiny_config(tmp_path, rollout={"temperature": 0.5}, algorithm={"max_sampling_gap": 0.01})
    assert gap_limit(own, torch.bfloat16, 0.02) == 0.01


@pytest.mark.parametrize("engine", ["its own", "hotter"])
def test_what_rounding_explains_is_measured_on_the_model_and_not_on_an_engines_faults(tmp_path: Path, engine: str):
    trainer = Trainer(tiny_config(tmp_path / "run", model={"dtype": "bfloat16"}))
    if engine == "hotter":
        trainer.collector.generator = Hotter(trainer.collector.generator)
    weights = {name: weight.data_ptr() for name, weight in trainer.policy.lm.named_parameters()}
    groups, _ = trainer.collector.sample(trainer.prompts.draw(4), trainer.config.sampling, num_completions=4, seed=0)
    rounding = measure_rounding(trainer.policy, groups)
    assert 1e-5 < rounding < 0.01  # a temperature of 1.4 makes a tenth of a nat
    after = {name: weight.data_ptr() for name, weight in trainer.policy.lm.named_parameters()}
    assert after == weights  # captured graphs and flat tensors still point at them
    assert {weight.dtype for weight in trainer.policy.lm.parameters()} == {torch.bfloat16}
    trainer.close()


def test_of_long_sequences_the_beginning_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In float32 attention holds a score for each pair of tokens: 7B's of 32,000 tokens would be 115 GB."""
    trainer = Trainer(tiny_config(tmp_path / "run", model={"dtype": "bfloat16"}))
    groups, _ = trainer.collector.sample(trainer.prompts.draw(4), trainer.config.sampling, num_completions=4, seed=0)
    longest = max(len(group.prompt.token_ids) for group in groups) + 3
    monkeypatch.setattr("grpo.run.tripwire.PROBED_TOKENS", longest)
    seen: list[int] = []
    whole = trainer.policy.unpacked_logprobs

    def watched(batch: Batch, **named: Any) -> torch.Tensor:
        seen.extend(batch.sequence_lens.tolist())
        return whole(batch, **named)

    monkeypatch.setattr(trainer.policy, "unpacked_logprobs", watched)
    assert 0 < measure_rounding(trainer.policy, groups) < 0.01
    assert max(seen) == longest
    whole_sequences = [len(prompt.token_ids) + len(each.token_ids) for prompt, each in _probed(trainer.policy, groups)]
    assert max(whole_sequences) > longest, "causes are sought in all of them"
    trainer.close()


def test_tokens_of_older_weights_say_nothing_about_the_present_ones(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", model={"dtype": "bfloat16"}))
    groups, _ = trainer.collector.sample(trainer.prompts.draw(4), trainer.config.sampling, num_completions=4, seed=0)

    def begun_earlier(completion: Completion) -> Completion:
        half = len(completion.token_ids) // 2
        far = [logprob - 3 for logprob in completion.logprobs[:half]]
        ages = [1] * half + [0] * (len(completion.token_ids) - half)
        return replace(completion, logprobs=far + completion.logprobs[half:], ages=ages)

    old = [replace(group, completions=[begun_earlier(each) for each in group.completions]) for group in groups]
    unmarked = [replace(g, completions=[replace(each, ages=None) for each in g.completions]) for g in old]

    def gap(groups: list[Group]) -> float:
        return Probe(trainer.policy, [(g.prompt, each) for g in groups for each in g.completions], 4).gap

    assert gap(old) < 0.02 < 1 < gap(unmarked)
    assert measure_rounding(trainer.policy, old) < 0.01
    trainer.close()


def test_larger_logits_are_rounded_more(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", model={"dtype": "bfloat16"}))
    groups, _ = trainer.collector.sample(trainer.prompts.draw(4), trainer.config.sampling, num_completions=4, seed=0)
    before = measure_rounding(trainer.policy, groups)
    with torch.no_grad():
        trainer.policy.lm.model.norm.weight.mul_(10)
    groups, _ = trainer.collector.sample(trainer.prompts.draw(4), trainer.config.sampling, num_completions=4, seed=0)
    assert measure_rounding(trainer.policy, groups) > 2 * before
    trainer.close()
