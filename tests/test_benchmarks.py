"""benchmarks/ runs, and counts operations as torch does. Its numbers are for a GPU; here it has to work."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, clean_environment
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from grpo.batch import join, micro_batch, pack, spare
from grpo.policy import PackedLM
from grpo.types import Completion, Group, MicroBatch, Prompt


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_an_updates_operations_are_those_that_torch_counts():
    import step
    import workload

    config = workload.model_config("tiny")
    config.vocab_size = 100
    micro = a_pass(prompt_lens=[7, 5], completion_lens=[[20, 1, 12], [9]])
    assert len(micro.tokens) == 7 + 5 + 20 + 1 + 12 + 9
    lm = AutoModelForCausalLM.from_config(config)
    lm.set_attn_implementation("packed")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        PackedLM(lm, temperature=1.0, chunk_tokens=16)(micro)[0].sum().backward()
    # sdpa computes all pairs of a run's queries and keys; q (q - 1) / 2 of them are masked and do not count, 12 H operations each
    masked = 12 * 64 * 2 * sum(q * (q - 1) // 2 for q in (7, 5, 20, 1, 12, 9))
    head_again = 2 * 100 * 64 * (20 + 1 + 12 + 9)  # the logits are computed once more for the backward pass
    # transformers 5.17 has the angles as a product of 8 frequencies and the positions, 5.23 has not
    rotation = 2 * 8 * len(micro.tokens)
    assert counter.get_total_flops() - masked - head_again - step.update_flops(config, [micro]) in (0, rotation)


def test_an_updates_operations_do_not_count_passes_without_work():
    import step
    import workload

    config, micro = workload.model_config("tiny"), a_pass(prompt_lens=[7], completion_lens=[[20, 1]])
    assert step.update_flops(config, [micro, spare(), micro]) == 2 * step.update_flops(config, [micro])


def a_pass(*, prompt_lens: list[int], completion_lens: list[list[int]]) -> MicroBatch:
    """All completions of all prompts, of tokens 0, 1, 2, ..."""
    groups = [
        Group(
            Prompt(0, list(range(length)), "", "", {}),
            [Completion(list(range(n)), [0.0] * n, "", "length") for n in lens],
        )
        for length, lens in zip(prompt_lens, completion_lens, strict=True)
    ]
    batch = join([pack([group], torch.zeros(1, len(group.completions))) for group in groups])
    return micro_batch(batch, torch.ones(sum(map(sum, completion_lens))))


def test_a_text_of_words_reads_back_as_its_tokens_and_none_of_them_ends_it():
    import workload

    tokenizer = workload.word_tokenizer(151936)
    for ids in workload.prompt_ids(4):
        assert 90 <= len(ids) <= 199
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert tokenizer.eos_token_id == 151936
    assert tokenizer.pad_token_id < 151936


@pytest.mark.slow
def test_a_step_is_measured_and_has_exactly_the_tokens_it_says(tmp_path: Path):
    import step
    import workload

    arguments = shlex.split("--size tiny --prompts 2 --completions 2 --new-tokens 8 --steps 1 --warmup 0 --profile")
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", *arguments, "--cache", str(tmp_path), "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out").read_text())
    middle = record["medians"]
    assert middle["completion/length_mean"] == middle["completion/length_max"] == 8
    phases = [value for name, value in middle.items() if name.startswith("time/") and name != "time/step"]
    assert record["step"] == pytest.approx(sum(phases), rel=1e-6)
    prompt_lens = [len(ids) for ids in workload.prompt_ids(2)]
    assert middle["batch/shared"] == pytest.approx(sum(prompt_lens) / (2 * sum(prompt_lens) + 4 * 8))
    micro = a_pass(prompt_lens=prompt_lens, completion_lens=[[8, 8], [8, 8]])
    assert middle["update/tflop"] == pytest.approx(step.update_flops(workload.model_config("tiny"), [micro]) / 1e12)
    assert record["tflops_update"] == pytest.approx(middle["update/tflop"] / middle["time/update"])
    read = f"{middle['throughput/update'] * (1 - middle['batch/shared']):,.0f} of them read"
    assert read in done.stdout
    assert f"batch/shared {middle['batch/shared']:.3f}, batch/imbalance 0.000" in done.stdout
    assert "over the vocabulary" in done.stdout
