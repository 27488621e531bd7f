"""benchmarks/ runs, and counts operations as torch does. Its numbers are for a GPU; here it has to work."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, clean_environment
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_an_updates_operations_are_those_that_torch_counts():
    import step
    import workload

    config = workload.model_config("tiny")
    config.vocab_size = 100
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        lm(torch.arange(20).unsqueeze(0)).logits.sum().backward()
    # eager attention computes all 20 x 20 pairs, of which the 20 * 21 / 2 that are not masked count; 12 H operations each
    masked = 12 * 64 * 2 * (20 * 20 - 20 * 21 // 2)
    # transformers 5.17 has the angles as a product of 8 frequencies and 20 positions, 5.23 has not
    rotation = 2 * 8 * 20
    assert counter.get_total_flops() - masked - step.update_flops(config, [0], 20) in (0, rotation)


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
    workload = shlex.split("--size tiny --prompts 2 --completions 2 --new-tokens 8 --steps 1 --warmup 0 --profile")
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", *workload, "--cache", str(tmp_path), "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out").read_text())
    middle = record["medians"]
    assert middle["completion/length_mean"] == middle["completion/length_max"] == 8
    phases = [value for name, value in middle.items() if name.startswith("time/") and name != "time/step"]
    assert record["step"] == pytest.approx(sum(phases), rel=1e-6)
    assert "over the vocabulary" in done.stdout
