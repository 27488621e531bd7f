"""benchmarks/ runs, and counts operations as torch does. Its numbers are for a GPU; here it has to work."""

import importlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_trl
import pytest
import torch
import warm
from helpers import ROOT, TINY, clean_environment, launch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from grpo.algorithm.batch import empty_micro_batch, join, micro_batch, pack
from grpo.policy.language_model import PackedLM
from grpo.system import distributed
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
    masked = 12 * 128 * 3 * sum(q * (q - 1) // 2 for q in (7, 5, 20, 1, 12, 9))
    head_again = 2 * 100 * 128 * (20 + 1 + 12 + 9)  # the logits are computed once more for the backward pass
    # transformers 5.17 has the angles as a product of 16 frequencies and the positions, 5.23 has not
    rotation = 2 * 16 * len(micro.tokens)
    assert counter.get_total_flops() - masked - head_again - step.update_flops(config, [micro]) in (0, rotation)


def test_an_updates_operations_do_not_count_passes_without_work():
    import step
    import workload

    config, micro = workload.model_config("tiny"), a_pass(prompt_lens=[7], completion_lens=[[20, 1]])
    assert step.update_flops(config, [micro, empty_micro_batch(), micro]) == 2 * step.update_flops(config, [micro])


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
    for ids in workload.prompt_ids(4, "7b"):
        assert 90 <= len(ids) <= 199
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert tokenizer.eos_token_id == 151936
    assert tokenizer.pad_token_id < 151936


@dataclass(frozen=True)
class Done:
    """A benchmark that has run: what it printed and what it appended to --out."""

    printed: str
    records: list[dict[str, Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the random model of all these tests is kept."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a benchmark in this process, as it is started from the command line."""

    def run(script: str, arguments: str, *more: object) -> Done:
        out = tmp_path / "out.jsonl"
        monkeypatch.setattr(distributed, "stop", lambda: None)  # DeepSpeed does not start a second time in a process
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments), *map(str, more), "--out", str(out)])
        importlib.import_module(script.removesuffix(".py")).main()
        return Done(capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()])

    return run


# ---- step.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_step(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """step.py with a peer that is not installed, in processes of their own."""
    scratch = tmp_path_factory.mktemp("step")
    (scratch / "trl.py").write_text("raise ImportError('TRL is not installed')")
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{scratch}:{ROOT}:{environment.get('PYTHONPATH', '')}"
    arguments = shlex.split("--size tiny --prompts 2 --completions 2 --new-tokens 8 --steps 1 --warmup 0")
    done = warm.run(
        ["benchmarks/step.py", *arguments, "--peers", "trl", "--cache", str(cache), "--out", str(scratch / "out")],
        cwd=ROOT,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Done(done.stdout, [json.loads(line) for line in (scratch / "out").read_text().splitlines()])


@pytest.mark.slow
def test_a_step_is_measured_and_has_exactly_the_tokens_it_says(whole_step: Done):
    import step
    import workload

    (record,) = whole_step.records
    middle = record["medians"]
    assert middle["completion/length_mean"] == middle["completion/length_max"] == 8
    phases = [value for name, value in middle.items() if name.startswith("time/") and name != "time/step"]
    assert record["step"] == pytest.approx(sum(phases), rel=1e-6)
    prompt_lens = [len(ids) for ids in workload.prompt_ids(2, "tiny")]
    assert middle["batch/shared"] == pytest.approx(sum(prompt_lens) / (2 * sum(prompt_lens) + 4 * 8))
    micro = a_pass(prompt_lens=prompt_lens, completion_lens=[[8, 8], [8, 8]])
    assert middle["update/tflop"] == pytest.approx(step.update_flops(workload.model_config("tiny"), [micro]) / 1e12)
    assert record["tflops_update"] == pytest.approx(middle["update/tflop"] / middle["time/update"])
    read = f"{middle['throughput/update'] * (1 - middle['batch/shared']):,.0f} of them read"
    assert read in whole_step.printed
    assert f"batch/shared {middle['batch/shared']:.3f}, batch/imbalance 0.000" in whole_step.printed
    assert middle["rollout/read_tokens"] == sum(prompt_lens) - 2  # the last of each is read as it is decoded
    assert f"rollout/decoding_steps {middle['rollout/decoding_steps']:,.0f}, rollout/read_tokens" in whole_step.printed


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_reported_and_takes_no_numbers_with_it(whole_step: Done):
    assert "trl: failed with ImportError: TRL is not installed" in whole_step.printed
    assert [record["name"] for record in whole_step.records] == ["grpo"]


@pytest.mark.slow
def test_an_update_alone_is_measured_beside_an_earlier_run(run, cache: Path, tmp_path: Path):
    earlier = {"step": 1.0, "generation": 0.25, "rest": 0.75, "peak_gib": None}
    (tmp_path / "earlier.jsonl").write_text(json.dumps(earlier))
    shape = "--size tiny --prompts 2 --completions 2 --new-tokens 8 --steps 1 --warmup 0 --update-only --profile"
    done = run(
        "step.py", shape, "--compare", tmp_path / "earlier.jsonl", "--cache", cache,
        "--set", "memory.micro_batch_tokens=512", "memory.activation_checkpointing=0.5",
    )  # fmt: skip
    (record,) = done.records
    assert record["update_only"]
    assert record["generation"] is None
    assert record["settings"]["memory"]["micro_batch_tokens"] == 512
    assert record["medians"]["completion/length_mean"] == 8
    table = done.printed[done.printed.index("before") :]
    assert f"{record['step']:.2f} (1.00x)" in table
    assert f"1.00 ({1 / record['step']:.2f}x)" in table
    for part in ("forward", "backward", "optimizer"):
        assert re.search(rf"{part} \d+\.\d+ s", done.printed)
    assert "over the vocabulary" in done.printed
    assert "aten::mm" in done.printed


@pytest.mark.slow
def test_an_update_is_measured_of_a_model_that_is_sampled_elsewhere(run, cache: Path):
    shape = "--size tiny --prompts 2 --completions 2 --new-tokens 8 --steps 1 --warmup 0 --update-only"
    zero3 = ("--set", "distributed.zero_stage=3")
    (record,) = run("step.py", shape, "--sampled-elsewhere", "--cache", cache, *zero3).records
    assert record["sampled_elsewhere"]
    assert record["step"] > 0
    with pytest.raises(SystemExit, match="2"):
        run("step.py", "--size tiny --sampled-elsewhere", "--cache", cache)


@pytest.mark.parametrize("tokens_missing", [0, 1])
def test_trls_steps_are_timed_if_they_have_the_tokens_they_should(
    tokens_missing: int, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import step

    shape = "--size tiny --prompts 2 --completions 4 --new-tokens 8 --steps 3 --warmup 1 --peer-micro-batch 4"
    monkeypatch.setattr(sys, "argv", ["step.py", *shlex.split(shape), "--peers", "trl-liger", "--cache", str(cache)])
    monkeypatch.setattr(step, "in_a_process", lambda run, *arguments: run(*arguments))
    monkeypatch.setattr(fake_trl, "tokens_missing", tokens_missing)
    monkeypatch.setattr("trl_step.time", fake_trl.clock)
    monkeypatch.setitem(sys.modules, "trl", fake_trl)
    args = step.parse_args()
    args.checkpointing = True
    record = step.measure_peer("trl-liger", args)
    if tokens_missing:
        assert record is None
        assert "trl-liger: failed with AssertionError: 63 tokens were sampled instead of 64" in capsys.readouterr().out
        return
    assert record["steps"] == [14, 4, 4, 4]  # by the double's clock; the first one is the warm-up
    assert (record["step"], record["generation"], record["rest"]) == (4, 1, 3)
    own = {"name": "grpo", "step": 0.5, "generation": None, "rest": 0.5, "peak_gib": None}
    assert "4.00 (8.00x)" in step.side_by_side([own, record])


# ---- sft.py ----------------------------------------------------------------------------------------------------------


def test_supervised_training_is_measured_beside_a_plain_loop_and_trl(run, cache: Path, monkeypatch: pytest.MonkeyPatch):
    import sft

    monkeypatch.setattr(sft, "in_a_process", lambda measure, *arguments: measure(*arguments))
    monkeypatch.setattr("trl_step.time", fake_trl.clock)
    monkeypatch.setitem(sys.modules, "trl", fake_trl)
    shape = "--pass-tokens 256 --update-tokens 512 --updates 2 --warmup 1 --peer-length 128 --peer-pass-tokens 256"
    done = run("sft.py", shape, "--peers", "plain", "trl")
    ours, plain, trl = done.records
    for record in (ours, plain):
        assert len(record["rates"]) == 2
        assert record["tokens_per_second"] > 0
    assert trl["rates"] == [2 * 128 / 2] * 2  # of a pass, in which as many are padding; a row is half of our pass
    beside = ours["tokens_per_second"] / 128
    assert f"128 tokens/s   grpo is {beside:.2f} times as fast" in done.printed


def test_padded_passes_hold_all_rows_and_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch):
    import sft

    rows = [([1] * 3, [2] * n) for n in (9, 1, 30, 4, 4, 2)]
    passes = sft.padded_passes(rows, 24)
    assert sorted(len(c) for part in passes for _, c in part) == [1, 2, 4, 4, 9, 30]
    assert [len(part) * max(map(len, (p + c for p, c in part))) for part in passes] == [21, 24, 33]  # the longest alone


# ---- rollout.py ------------------------------------------------------------------------------------------------------


def test_rollouts_are_measured_beside_transformers_with_exactly_the_tokens_they_say(run, cache: Path):
    shape = "--size tiny --prompts 2 --completions 2 --new-tokens 8 --repeats 1 --profile --plain-layers"
    done = run("rollout.py", shape, "--peers", "generate", "continuous", "--peer-batch", 3, "--cache", cache)
    native, generate, continuous = done.records
    for record in (native, generate, continuous):
        assert record["num_tokens"] == 2 * 2 * 8
        assert record["tokens_per_second"] == pytest.approx(32 / record["seconds"])
        assert f"{record['name']}: 32 tokens in {record['seconds']:.2f} s" in done.printed
    assert native["metrics"]["rollout/slots"] == 4
    assert native["seconds"] == native["calls"][1]
    assert f"decoding step, 4 rows of {native['step_at']} tokens: {native['step_seconds'] * 1e3:.2f} ms" in done.printed
    assert "16 decoding steps:" in done.printed
    assert "aten::mm" in done.printed


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the completions that each call of `sample` is asked for; the first is shortened to 3 tokens where it may be."""
    import rollout

    asked: list[int] = []
    timed_call = rollout.timed_call

    def watched(sampler: Any, prompts: Any, sampling: Any, *more: Any) -> Any:
        asked.append(sampling.max_tokens)
        return timed_call(sampler, prompts, sampling, *more)

    monkeypatch.setattr(rollout, "FIRST_CALL", 3)
    monkeypatch.setattr(rollout, "timed_call", watched)
    return asked


def test_of_rollouts_of_one_length_the_first_call_alone_is_short(run, cache: Path, lengths: list[int]):
    done = run("rollout.py", "--size tiny --prompts 2 --completions 2 --new-tokens 8 --repeats 2", "--cache", cache)
    assert lengths == [3, 8, 8]
    assert done.records[0]["mean_length"] == 8


def test_the_first_call_of_rollouts_is_a_whole_one_where_lengths_differ(run, lengths: list[int]):
    shape = "--template chat --prompts 2 --completions 2 --new-tokens 20 --repeats 1"
    run("rollout.py", shape, "--model", TINY / "model", "--questions", TINY / "test.jsonl")
    assert lengths == [20, 20]


def test_the_first_call_of_rollouts_is_a_whole_one_where_keys_and_values_do_not_fit(
    run, cache: Path, lengths: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Sequences are preempted in any call then, and first in a long one."""
    monkeypatch.setattr(
        "grpo.rollout.engine.free_bytes", lambda device: 2 * 40 * 98_304
    )  # 40 pages; 8 sequences take 76
    shape = "--size tiny --prompts 4 --completions 2 --new-tokens 400 --repeats 1"
    done = run("rollout.py", shape, "--cache", cache)
    assert lengths == [400, 400]
    assert done.records[0]["metrics"]["rollout/preempted"] > 0


def test_a_coin_is_as_often_heads_as_tails_whatever_was_written():
    from random_reward import coin

    random.seed(1)
    thrown = Counter(coin("the same") for _ in range(1000))
    assert set(thrown) == {0.0, 1.0}
    assert abs(thrown[1.0] - 500) < 80, "five standard deviations of 16"


def test_rollouts_of_a_real_model_end_by_themselves(run):
    shape = "--template chat --prompts 3 --completions 4 --new-tokens 40 --slots 5 --repeats 2 --temperature 0.5"
    done = run("rollout.py", shape, "--model", TINY / "model", "--questions", TINY / "test.jsonl")
    (native,) = done.records
    assert native["num_tokens"] < 3 * 4 * 40
    assert native["mean_length"] == native["num_tokens"] / 12
    assert native["metrics"]["rollout/slots"] == 5
    assert "5 rows of" in done.printed


def test_vllm_answers_in_a_process_of_its_own(run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its stand-in has what of vLLM's interface the benchmark uses; it writes as many tokens as it is asked for."""
    (tmp_path / "vllm.py").write_text(
        "from types import SimpleNamespace as Of\n"
        "import torch\ntorch.cuda.mem_get_info = lambda: (1, 2)\n"
        "class SamplingParams:\n"
        "    def __init__(self, **named): vars(self).update(named)\n"
        "class LLM:\n"
        "    def __init__(self, model, **named): print('starting', named['max_num_seqs'])\n"
        "    def reset_prefix_cache(self): pass\n"
        "    def generate(self, prompts, sampling, use_tqdm):\n"
        "        one = Of(token_ids=[0] * sampling.max_tokens)\n"
        "        return [Of(outputs=[one] * sampling.n) for _ in prompts]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shape = "--size tiny --prompts 3 --completions 2 --new-tokens 4 --repeats 1 --peers vllm"
    done = run("rollout.py", shape, "--cache", cache)
    assert [(each["name"], each["num_tokens"]) for each in done.records] == [
        ("native", 24),
        ("vllm", 24),
        ("vllm with log-probabilities", 24),
    ]


def test_a_peer_of_rollouts_that_fails_is_reported_and_does_not_take_the_others_with_it(
    run, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    import rollout

    def broken(*_: object) -> int:
        raise AttributeError("no such thing")

    monkeypatch.setitem(rollout.PEERS, "generate", broken)
    monkeypatch.setitem(rollout.PEERS, "continuous", lambda *_: 4)
    shape = "--size tiny --prompts 1 --completions 2 --new-tokens 2 --repeats 1 --peers generate continuous"
    done = run("rollout.py", shape, "--cache", cache)
    assert "generate: failed with AttributeError: no such thing" in done.printed
    assert [record["name"] for record in done.records] == ["native", "continuous"]


def test_a_step_timed_alone_leaves_the_engine_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch):
    import rollout

    monkeypatch.setattr(
        sys,
        "argv",
        [*shlex.split("rollout.py --size tiny --prompts 2 --completions 2 --new-tokens 6 --cache"), str(cache)],
    )
    args = rollout.parse_args()
    model, prompts = rollout.model_and_prompts(args)
    sampler, _ = rollout.make_sampler(model, prompts, args)
    sampling = rollout.Sampling(6)
    before = rollout.timed_call(sampler, prompts, sampling, 2, seed=3)
    with sampler.model.sampling_model("paged"):
        num_slots, _ = rollout.time_a_step(rollout.decoder_of(sampler), 150, sampling, with_kernels=False)
    after = rollout.timed_call(sampler, prompts, sampling, 2, seed=3)
    assert num_slots == 4
    assert after.completions == before.completions
    launches = 3 if rollout.decoder_of(sampler).chunk == 2 else 2  # of 6 steps
    assert [size for _, size in after.launches] == [size for _, size in before.launches] == [4] * launches  # rows


# ---- grading.py, card.py ---------------------------------------------------------------------------------------------


def in_warm(command: list[str], *, text: bool, env: dict[str, str], **given: object) -> warm.Process:
    """Without what a trainer in this process has left in the environment."""
    left = os.environ.keys() - clean_environment().keys()
    return warm.Process(command[1:], env={name: env[name] for name in env.keys() - left}, **given)


def test_a_server_is_measured_with_exactly_the_tokens_it_was_asked_for(
    run, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("uvicorn")
    started = SimpleNamespace(Popen=in_warm, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(importlib.import_module("serve"), "subprocess", started)
    shape = "--size tiny --clients 1 3 --rounds 2 --new-tokens 8 --prompt-words 9"
    done = run("serve.py", shape, "--cache", cache)
    assert [record["clients"] for record in done.records] == [1, 3]
    for record in done.records:
        assert (record["requests"], record["new_tokens"]) == (2 * record["clients"], 8)
        assert record["prompt_tokens"] >= 9
        assert record["tokens_per_second"] == pytest.approx(8 * record["requests"] / record["seconds"])
        assert 0 < record["first_token_p50"] <= record["first_token_p99"] < record["request_p99"] < record["seconds"]
        assert f"{record['tokens_per_second']:,.0f}" in done.printed
    with pytest.raises(SystemExit, match="2"):
        run("serve.py", "--url http://127.0.0.1:1/v1")
    with pytest.raises(OSError, match=r"refused|failed"):
        run("serve.py", "--url http://127.0.0.1:1/v1 --name x --clients 1")


def test_a_server_that_clients_leave_loses_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("uvicorn")
    import soak

    started = SimpleNamespace(Popen=in_warm, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(importlib.import_module("serve"), "subprocess", started)
    shape = "soak.py --size tiny --requests 60 --clients 6 --new-tokens 8 --prompt-words 9 --cache"
    monkeypatch.setattr(sys, "argv", [*shlex.split(shape), str(cache)])
    assert soak.main() == 0
    printed = capsys.readouterr().out
    ends = re.findall(r"'(answered|left after some text|left at once)': (\d+)", printed)
    assert len(ends) == 3
    assert sum(int(number) for _, number in ends) == 60, printed
    assert "nothing was lost" in printed


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import balance

    monkeypatch.setattr(sys, "argv", ["balance.py", "--size", "0.5b", "--processes", "4"])
    balance.main()
    tokens, operations = (float(line.split()[4].rstrip("%")) for line in capsys.readouterr().out.splitlines())
    assert 0 < operations < 0.6 * tokens


def test_grading_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import grading

    monkeypatch.setattr(sys, "argv", ["grading.py", "--scale", "0.01"])
    grading.main()
    printed = capsys.readouterr().out
    for line in ("whole numbers", "LaTeX", "programs, 5 tests each"):
        (rate,) = [float(row.split(line)[1].split()[0].replace(",", "")) for row in printed.splitlines() if line in row]
        assert rate > 0


def test_the_machines_own_rates_are_measured(run):
    done = run("card.py", "")
    (record,) = done.records
    assert record["processes"] == 1
    assert min(record[name] for name in ("matrix_tflops", "copy_gbs", "launches_per_s")) > 0
    assert record["all_reduce_gbs"] is None
    assert record["all_gather_gbs"] is None
    assert f"{record['copy_gbs']:,.4g} GB/s copied" in done.printed


def test_a_rates_numerator_is_what_it_says(monkeypatch: pytest.MonkeyPatch):
    import card

    monkeypatch.setattr(card, "seconds_each", lambda act, repeats: 0.5)
    assert card.matrix_rate() == 2 * 512**3 / 0.5
    assert card.copy_rate() == 2 * 16 * 2**20 / 0.5  # each byte is read and written
    assert card.launch_rate() == 2
    assert card.all_reduce_rate(4) == 2 * 3 / 4 * 2**20 / 0.5
    assert card.all_gather_rate(4) == 3 / 4 * 2**20 / 0.5


@pytest.mark.slow
def test_two_processes_measure_what_is_between_them(tmp_path: Path):
    printed = launch("../benchmarks/card.py", "--out", str(tmp_path / "out"), processes=2)
    (record,) = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert record["processes"] == 2
    assert min(record["all_reduce_gbs"], record["all_gather_gbs"]) > 0
    assert f"all-reduce {record['all_reduce_gbs']:,.4g} GB/s" in printed
