"""memory.release_kv_cache: when keys and values have memory, and that nothing else depends on it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from helpers import TINY, tiny_config
from test_engine import (
    CUDA,
    GREEDY,
    all_completions,
    keep_a_free_segment,
    make_policy,
    native,
    some_prompts,
    tokens_of,
)
from test_sft import sft_config
from torch import Tensor

from grpo import SupervisedTrainer, Trainer
from grpo.check import memory as check_memory
from grpo.check import supervised
from grpo.check.advice import advice, supervised_advice
from grpo.policy.policy import Policy
from grpo.rollout import make_generator
from grpo.rollout.engine import NativeGenerator
from grpo.run.resumable import MAY_CHANGE, changed_setting
from grpo.system import mapped_memory
from grpo.types import Group, Sampling

on_cpu = pytest.mark.skipif(CUDA, reason="stands in for a GPU's memory on a CPU")


class Recorded:
    """Memory of a CPU that loses what it holds when it is released: all of it is NaN then."""

    log: list[str]
    fails: bool

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.is_taken = False
        self.take()

    def tensor(self) -> Tensor:
        return self.bytes

    def take(self) -> None:
        if self.is_taken:
            return
        if Recorded.fails:
            Recorded.fails = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to map 0.01 GiB.")
        Recorded.log.append("take")
        self.is_taken = True
        self.bytes.zero_()

    def release(self) -> None:
        if self.is_taken:
            Recorded.log.append("release")
            self.is_taken = False
            self.bytes.fill_(0xFF)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with the memory of keys and values."""
    Recorded.log, Recorded.fails = [], False
    monkeypatch.setattr("grpo.rollout.paged.MappedMemory", Recorded)
    monkeypatch.setattr("grpo.assembly.check_engine", lambda config: None)  # it refuses a CPU
    return Recorded.log


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return make_policy(tmp_path_factory.mktemp("run"))


def logprobs_of(groups: list[Group]) -> list[list[float]]:
    return [completion.logprobs for completion in all_completions(groups)]


# ---- samples -----------------------------------------------------------------------------------------------------------


@on_cpu
def test_samples_are_equal_to_the_bit_whatever_was_lost_between_the_calls(policy: Policy, log: list[str]):
    prompts, found = some_prompts(), []
    for releases in (False, True):
        engine = native(policy, max_sequences=8, release_kv_cache=releases)
        for seed in range(3):
            groups = engine.sample(prompts, Sampling(40), num_completions=2, seed=seed)
            found.append((tokens_of(groups), logprobs_of(groups)))
            engine.release_memory()
            engine.release_memory()  # a second time is none
    assert found[:3] == found[3:]
    assert log == ["take", "release"] * 4  # made and found to fit, then three calls


@on_cpu
def test_calls_without_a_release_between_keep_the_memory(policy: Policy, log: list[str]):
    engine = native(policy, max_sequences=8, release_kv_cache=True)
    for seed in range(3):
        engine.sample(some_prompts(2), GREEDY, num_completions=1, seed=seed)
    assert log == ["take", "release", "take"]


@on_cpu
def test_keys_and_values_of_pages_that_were_lost_would_show(policy: Policy, log: list[str]):
    """The tests here see what they are for: an engine that sampled from released memory would draw from NaN."""
    engine = native(policy, max_sequences=8, release_kv_cache=True)
    decoder = engine._decoder
    assert decoder is not None
    assert decoder.cache.keys.isnan().all()
    decoder.cache.take()
    assert not decoder.cache.keys.any()
    assert decoder.cache.num_bytes == decoder.cache.memory.tensor().nbytes  # type: ignore[union-attr]


# ---- in a run ------------------------------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {
    "memory": {"max_sequences": 16},
    "algorithm": {"kl_coef": 0.1, "max_sampling_gap": 100},
    "rollout": {"engine": "native", "num_prompts": 4, "group_size": 4, "max_oversampling": 3.0},
    "run": {"steps": 2},
    "data": {"eval_name": str(TINY / "test.jsonl")},
    "evaluation": {"num_questions": 2, "every_steps": 1},
}


def vary(completion: str) -> float:
    return float(len(completion) % 2)


def trained(run_dir: Path, log: list[str], *, releases: bool) -> list[dict[str, float]]:
    """The metrics of a run; what samples and what is a pass of the reference or the update goes to the log."""
    memory = STEPS["memory"] | {"release_kv_cache": releases}
    trainer = Trainer(tiny_config(run_dir, **{**STEPS, "memory": memory}), rewards=[vary])
    note(trainer.collector.generator, "sample", "sample", log)
    note(trainer.policy, "ref_logprobs", "pass", log)
    note(trainer.policy, "backward", "pass", log)
    trainer.train()
    return trainer.log.metrics()


def note(owner: Any, method: str, word: str, log: list[str]) -> None:
    own = getattr(owner, method)

    def noted(*arguments: Any, **options: Any) -> Any:
        log.append(word)
        return own(*arguments, **options)

    setattr(owner, method, noted)


def without_repeats(words: list[str]) -> list[str]:
    return [word for place, word in enumerate(words) if words[max(place - 1, 0)] != word or place == 0]


@on_cpu
def test_a_run_releases_once_a_step_before_the_reference_and_an_evaluation_keeps_what_it_takes(
    tmp_path: Path, log: list[str]
):
    plain = trained(tmp_path / "plain", [], releases=False)
    ours = trained(tmp_path / "run", log, releases=True)
    steps = ["take", "release", "sample", "take", "sample", "release", "pass"]  # evaluation and draws of the first step
    steps += ["sample", "take", "sample", "release", "pass", "sample", "take"]
    assert without_repeats(log) == steps
    assert log.count("sample") > 5, "no step drew more than once"
    timed = ("time/", "throughput/", "memory/")
    kept = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows] for rows in (plain, ours)]
    assert kept[0] == kept[1]


@on_cpu
def test_what_an_evaluation_took_is_released_before_a_step_goes_on_with_its_update(tmp_path: Path, log: list[str]):
    memory = STEPS["memory"] | {"release_kv_cache": True}
    trainer = Trainer(tiny_config(tmp_path / "run", **{**STEPS, "memory": memory}), rewards=[vary])
    trainer._follow_schedules()
    trainer._sample()
    trainer.held_out.evaluate(0, seed=0)
    assert log[-1] == "take"
    trainer.train_step()
    trainer.close()
    assert log[-1] == "release"


@on_cpu
def test_memory_that_others_have_is_done_without(tmp_path: Path, log: list[str], capsys: pytest.CaptureFixture[str]):
    memory = STEPS["memory"] | {"release_kv_cache": True}
    trainer = Trainer(tiny_config(tmp_path / "run", **{**STEPS, "memory": memory}), rewards=[vary])
    Recorded.fails = True
    trainer.train_step()
    trainer.close()
    generator = trainer.collector.generator
    assert isinstance(generator, NativeGenerator)
    assert generator.max_sequences == 8
    assert (
        "out of memory while sampling, process 0: CUDA out of memory. Tried to map 0.01 GiB." in capsys.readouterr().out
    )


@on_cpu
def test_supervised_training_releases_what_an_evaluation_took(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
):
    own: dict[str, Any] = {
        "evaluation": {"num_questions": 2, "every_steps": 1, "max_completion_tokens": 8},
        "data": {"eval_name": str(TINY / "test.jsonl")},
        "memory": {"release_kv_cache": True, "max_sequences": 4},
        "run": {"dir": str(tmp_path / "run"), "steps": 2},
    }
    config = sft_config(tmp_path / "run", **own)
    rows = [{"question": f"What is {n}+1?", "completion": str(n + 1)} for n in range(8)]
    with pytest.raises(ValueError, match=r"memory\.release_kv_cache is true; .* no GPU here\. Remove it\."):
        SupervisedTrainer(config, train_dataset=rows, rewards=[vary])
    monkeypatch.setattr("grpo.sft.assembly.check_engine", lambda config: None)
    trainer = SupervisedTrainer(config, train_dataset=rows, rewards=[vary])
    note(trainer.policy, "backward", "pass", log)
    trainer.train()
    assert without_repeats(log) == ["take", "release", "take", "release", "pass", "take", "release", "pass", "take"]


# ---- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_another_engine_is_refused(tmp_path: Path, engine: str):
    rule = (
        rf"memory\.release_kv_cache is True; only the native engine reads it, and rollout\.engine is {engine}\. Remove"
    )
    with pytest.raises(ValueError, match=rule):
        tiny_config(tmp_path, rollout={"engine": engine}, memory={"release_kv_cache": True})
    asks = {"evaluation": {"num_questions": 2, "engine": engine}, "data": {"eval_name": str(TINY / "test.jsonl")}}
    with pytest.raises(
        ValueError, match=rule.replace("rollout", "evaluation") if engine == "hf" else "evaluation.engine"
    ):
        sft_config(tmp_path, **asks, memory={"release_kv_cache": True})


@on_cpu
def test_a_supervised_dry_run_has_keys_and_values_as_the_run_does_and_samples_nothing(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("grpo.sft.assembly.check_engine", lambda config: None)
    (tmp_path / "rows.jsonl").write_text('{"question": "What is 1+1?", "completion": "2"}\n')
    config = sft_config(
        tmp_path / "run",
        evaluation={"num_rows": 0, "num_questions": 2, "max_completion_tokens": 8},
        data={"name": str(tmp_path / "rows.jsonl"), "eval_name": str(TINY / "test.jsonl")},
        memory={"release_kv_cache": True},
    )
    trainer = supervised.rehearse(config)
    assert trainer.policy.holds_whole
    supervised.report(config, trainer)
    assert without_repeats(log) == ["take", "release"]


@on_cpu
def test_a_machine_without_a_gpu_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.policy.policy.load_lm", lambda *arguments, **options: pytest.fail("it was loaded"))
    config = tiny_config(tmp_path / "run", memory={"release_kv_cache": True})
    with pytest.raises(ValueError, match=r"memory\.release_kv_cache is true; .* no GPU here\. Remove it\."):
        Trainer(config, rewards=[vary])
    assert not (tmp_path / "run").exists()


def test_what_cannot_have_an_effect_is_refused_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(
        ValueError, match=r"memory\.release_kv_cache is true; it has no effect while evaluation\.num_questions is 0"
    ):
        sft_config(tmp_path, memory={"release_kv_cache": True})
    policy = make_policy(tmp_path)
    monkeypatch.setattr("grpo.rollout.engine.unsupported", lambda *given, **named: "it is odd")
    make_generator(tiny_config(tmp_path, rollout={"engine": "auto"}, memory={"release_kv_cache": True}), policy)
    assert "because it is odd; memory.release_kv_cache has no effect then" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert mapped_memory.missing() == "that takes CUDA, not ROCm"
    monkeypatch.setattr(torch.version, "hip", None)
    mapped_memory._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: no such file")))
    assert "driver library cannot be loaded (libcuda.so.1: no such file)" in str(mapped_memory.missing())


def test_a_run_may_be_resumed_with_another_choice(tmp_path: Path):
    before, now = (
        tiny_config(tmp_path, memory={"release_kv_cache": releases}).model_dump(mode="json")
        for releases in (False, True)
    )
    assert before != now
    assert changed_setting(before, now, may_change=MAY_CHANGE) is None


# ---- what is said of memory ----------------------------------------------------------------------------------------------


def test_the_peak_counts_what_is_taken_only_while_it_is(monkeypatch: pytest.MonkeyPatch):
    class Taken:
        num_bytes, is_taken = 40, False

    memory, allocated, peak = Taken(), 10, 10
    monkeypatch.setattr(mapped_memory, "_ALL", {memory})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)

    def reset(device: torch.device) -> None:
        nonlocal peak
        peak = allocated

    def allocate(num_bytes: int) -> None:
        nonlocal allocated, peak
        allocated += num_bytes
        peak = max(peak, allocated)

    def change(*, is_taken: bool) -> None:
        mapped_memory._keep_peak(device)
        memory.is_taken = is_taken

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    device = torch.device("cuda", 0)
    mapped_memory.reset_peak(device)
    assert mapped_memory.released_bytes() == 40
    allocate(5)
    allocate(-5)
    change(is_taken=True)
    assert mapped_memory.peak_bytes(device) == 10 + 40  # the 5 were gone by then
    allocate(7)
    allocate(-7)
    change(is_taken=False)
    assert mapped_memory.peak_bytes(device) == 10 + 7 + 40
    allocate(45)
    assert mapped_memory.peak_bytes(device) == 57
    mapped_memory.reset_peak(device)
    assert mapped_memory.peak_bytes(device) == 10 + 45


def test_a_rehearsal_says_what_is_not_taken_at_its_end():
    left = check_memory.GpuMemory(free=60.0, total=139.8, resident=9.0, processes=1, released=40.0)
    (text,) = check_memory.fits(left)
    assert "139.8 GiB 60.0 are free" in text
    assert "Keys and values of 40.0 GiB are released until the next rollout" in text
    (text,) = check_memory.fits(check_memory.GpuMemory(free=60.0, total=139.8, resident=9.0, processes=1))
    assert "released" not in text


def test_it_is_advised_where_the_update_does_not_fit_beside_keys_and_values(tmp_path: Path):
    config = tiny_config(tmp_path)
    text = "set memory.release_kv_cache from false to true (the 40 GiB of keys and values are free from the end of sampling on)"
    for phase in ("logprobs", "update"):
        assert advice(phase, config, world_size=1, kv_gib=(40.0, 1.0), on_gpu=True)[0] == text
        assert text not in advice(phase, config, world_size=1, kv_gib=(40.0, 1.0))
        assert text not in advice(phase, config, world_size=1, on_gpu=True)
    assert text not in advice("rollout", config, world_size=1, kv_gib=(40.0, 1.0), on_gpu=True)
    rows = sft_config(tmp_path)
    assert supervised_advice("update", rows, world_size=1, kv_gib=(40.0, 1.0), on_gpu=True)[0] == text
    assert text not in supervised_advice("update", rows, world_size=1)
    has_it = tiny_config(tmp_path, memory={"release_kv_cache": True})
    assert text not in advice("update", has_it, world_size=1, kv_gib=(40.0, 1.0), on_gpu=True)


def test_structures_lie_as_the_driver_reads_them():
    """cuda.h: CUmemLocation is two ints; CUmemAllocationProp has 32 bytes, CUmemAccessDesc 12."""
    assert [ctypes.sizeof(each) for each in (mapped_memory.Location, mapped_memory.Properties)] == [8, 32]
    assert ctypes.sizeof(mapped_memory.Access) == 12
    fields = ("type", "requested_handle_types", "location", "win32_metadata", "flags")
    assert [getattr(mapped_memory.Properties, name).offset for name in fields] == [0, 4, 8, 16, 24]


# ---- on a GPU ------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device, whose memory is given back")
MIB = 2**20
MANY = 16384  # completions at once, so that the tiny model's keys and values take a good GiB


def given_back(memory: mapped_memory.MappedMemory) -> float:
    """Bytes that the GPU has more after a release; the median of five, because other processes may use the GPU, too."""
    found = []
    for _ in range(5):
        memory.take()
        torch.cuda.synchronize()
        taken = torch.cuda.mem_get_info()[0]
        memory.release()
        found.append(torch.cuda.mem_get_info()[0] - taken)
    return median(found)


@pytest.mark.gpu
@gpu
def test_released_memory_is_free_for_others_and_samples_and_graphs_stay(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
):
    prompts, sampling, seeds = some_prompts(longest=70), Sampling(40), (0, 1, 0, 1)  # as long as the settings allow
    plain = native(policy, max_sequences=MANY)
    expected = [plain.sample(prompts, sampling, num_completions=4, seed=seed) for seed in seeds]
    del plain
    captures: list[int] = []
    graph = torch.cuda.graph

    def counted(*arguments: Any, **options: Any) -> Any:
        captures.append(1)
        return graph(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", counted)
    engine = native(policy, max_sequences=MANY, release_kv_cache=True)
    decoder = engine._decoder
    assert decoder is not None
    memory = decoder.cache.memory
    assert memory is not None
    assert not memory.is_taken
    size, address = memory._size, memory._address
    assert size > 512 * MIB
    num_captured = []
    for seed, before in zip(seeds, expected, strict=True):
        groups = engine.sample(prompts, sampling, num_completions=4, seed=seed)
        assert tokens_of(groups) == tokens_of(before)
        assert logprobs_of(groups) == logprobs_of(before)
        num_captured.append(len(captures))
        assert memory.is_taken
        engine.release_memory()
        filler = torch.empty(size // 4, dtype=torch.float32, device="cuda")  # as an update would
        filler.fill_(torch.nan)
        del filler
        torch.cuda.empty_cache()  # so that what is taken next may be this
    assert num_captured[0] > 0
    assert num_captured[1:] == [num_captured[1]] * 3, "a step was captured anew"
    assert decoder is engine._decoder
    assert decoder.cache.keys.data_ptr() == address
    assert given_back(memory) == pytest.approx(size, abs=16 * MIB)
    gone = weakref.ref(memory)
    del engine, decoder, memory
    gc.collect()
    assert gone() is None, "the memory outlives its engine"


@pytest.mark.gpu
@gpu
def test_what_torch_keeps_is_given_back_when_there_is_too_little(monkeypatch: pytest.MonkeyPatch):
    memory = mapped_memory.MappedMemory(512 * MIB + 1, torch.device("cuda", torch.cuda.current_device()))
    whole = memory.tensor()
    assert whole.shape == (512 * MIB + 1,)
    assert not whole.any()
    whole.fill_(7)
    memory.release()
    keep_a_free_segment(256 * MIB)
    own, failures, reserved = mapped_memory._call, [1], torch.cuda.memory_reserved()

    def short_once(name: str, *arguments: Any) -> None:
        if name == "cuMemCreate" and failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory in cuMemCreate")
        own(name, *arguments)

    monkeypatch.setattr(mapped_memory, "_call", short_once)
    memory.take()
    assert torch.cuda.memory_reserved() <= reserved - 256 * MIB
    assert not whole.any()
    monkeypatch.setattr(mapped_memory, "_call", own)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried to map 4096.00 GiB"):
        mapped_memory.MappedMemory(2**42, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
@gpu
def test_the_peak_of_an_update_is_without_keys_and_values(tmp_path: Path):
    found = []
    for releases in (True, False):  # of the first, what may linger takes nothing
        memory = {"max_sequences": MANY, "release_kv_cache": releases}
        settings = {**STEPS, "memory": memory, "evaluation": {"num_questions": 0}, "data": {}}
        trainer = Trainer(tiny_config(tmp_path / str(releases), **settings), rewards=[vary])
        trainer.train_step()
        found.append(trainer.train_step())
        trainer.close()
        del trainer
    ours, plain = found
    gib = plain["rollout/kv_gib"]
    assert ours["rollout/kv_gib"] == gib > 1
    assert abs(plain["memory/rollout"] - ours["memory/rollout"]) < 0.1 * gib
    for phase in ("logprobs", "update"):
        assert plain[f"memory/{phase}"] - ours[f"memory/{phase}"] == pytest.approx(gib, rel=0.1)
    assert ours["memory/rollout"] <= ours["memory/step"] < plain["memory/step"] + 0.1 * gib
