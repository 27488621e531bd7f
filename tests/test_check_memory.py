"""The dry run: are its steps the longest there can be, does it leave nothing behind, what does it say when memory runs out?"""

import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, launch_group, run_script, tiny_config

from grpo import Trainer
from grpo.algorithm.batch import micro_batch, pack, plan_passes, take
from grpo.check import memory
from grpo.check.advice import LADDERS, advice, supervised_advice
from grpo.check.dry_run import RandomRewards
from grpo.config import Config, SupervisedConfig, setting_names
from grpo.run import disk
from grpo.system import distributed
from grpo.system.out_of_memory import is_out_of_memory
from grpo.types import Completion, Group, Prompt


def long_config(tmp_path: Path, **sections: Any) -> Config:
    """32 x 16 completions of at most 512 + 1,024 tokens; nothing is loaded."""
    rollout = {"num_prompts": 32, "group_size": 16, "max_completion_tokens": 1024, **sections.pop("rollout", {})}
    memory_section = {"micro_batch_tokens": 32768, **sections.pop("memory", {})}
    return tiny_config(
        tmp_path / "run", data={"max_prompt_tokens": 512}, rollout=rollout, memory=memory_section, **sections
    )


def settings_named(suggestions: list[str]) -> list[str]:
    return [match.group(1) for text in suggestions if (match := re.match(r"set ([\w.]+) from", text))]


def test_smaller_passes_are_advised_first_down_to_one_sequence(tmp_path: Path):
    config = long_config(tmp_path)
    assert "memory.micro_batch_tokens from 32768 to 16384" in advice("update", config, world_size=1)[0]
    two = long_config(tmp_path, memory={"micro_batch_tokens": 2 * 1536})
    assert "memory.micro_batch_tokens from 3072 to 1536" in advice("logprobs", two, world_size=1)[0]
    # half is less than a sequence; two completions of one prompt fill 512 + 2 * 1,024 of it, and shorter ones all of it
    more = long_config(tmp_path, memory={"micro_batch_tokens": 2 * 1536 - 1})
    assert "memory.micro_batch_tokens from 3071 to 1536" in advice("update", more, world_size=1)[0]
    hardly = long_config(tmp_path, memory={"micro_batch_tokens": 2000})  # 1,536 is more than three quarters
    # nor has a pass more completion tokens than that
    assert "memory.logprob_chunk_tokens from 4096 to 1000" in advice("update", hardly, world_size=1)[0]


def test_a_budget_above_what_a_process_has_is_halved_from_what_it_has(tmp_path: Path):
    # a minibatch of 2 questions on 2 processes: for each 16 completions of 1,024 tokens, and their prompt of 512 once
    config = long_config(tmp_path, memory={"micro_batch_tokens": 10**6}, algorithm={"num_minibatches": 16})
    half = (512 + 16 * 1024) // 2
    assert f"memory.micro_batch_tokens from 1000000 to {half} " in advice("update", config, world_size=2)[0]
    # 16 sequences of their own would be 24,576; the pass has 16,896, which a budget of half those would not make smaller
    close = long_config(tmp_path, memory={"micro_batch_tokens": 24576}, algorithm={"num_minibatches": 16})
    assert f"memory.micro_batch_tokens from 24576 to {half} " in advice("update", close, world_size=2)[0]
    # one question on 4 processes: each reads the prompt for its 4 completions
    config = long_config(tmp_path, memory={"micro_batch_tokens": 10**6}, algorithm={"num_minibatches": 32})
    assert f"from 1000000 to {(512 + 4 * 1024) // 2} " in advice("update", config, world_size=4)[0]


def test_adapters_are_advised_to_lie_over_4_bits_and_these_are_never_advised_to_be_sharded(tmp_path: Path):
    def advised(phase: str, **sections: Any) -> str:
        config = long_config(tmp_path, lora={"rank": 8, **sections.pop("lora", {})}, **sections)
        return "; ".join(text for count in (1, 2) for text in advice(phase, config, world_size=count))

    for phase in LADDERS:
        assert "lora.quantization from null to nf4" in advised(phase)
        four_bits = advised(phase, lora={"quantization": "nf4"})
        assert "quantization" not in four_bits
        assert not re.search("zero_stage (from . to )?3", four_bits), "which is refused beside it"
        assert "quantization" not in advised(phase, distributed={"zero_stage": 3})
        assert "quantization" not in "; ".join(advice(phase, long_config(tmp_path), world_size=1))


def test_processes_are_advised_to_share_passes_as_far_as_they_can_be_grouped(tmp_path: Path):
    def advised(config: Config, world_size: int) -> list[str]:
        return [text for text in advice("update", config, world_size=world_size) if "sequence_parallel" in text]

    (text,) = advised(long_config(tmp_path), 4)
    assert "distributed.sequence_parallel from 1 to 2" in text
    config = long_config(tmp_path, distributed={"sequence_parallel": 2}, memory={"micro_batch_tokens": 768})
    assert "from 2 to 4" in advised(config, 4)[0]
    assert not advised(config, 6)
    assert not any("micro_batch" in text for text in advice("update", config, world_size=4)), (
        "a sequence, shared by two"
    )


def test_supervised_training_is_advised_of_a_share_of_the_longest_row():
    config = SupervisedConfig(
        model={"name": "x"},
        data={"name": "rows.jsonl", "max_tokens": 4096},
        memory={"micro_batch_tokens": 4096},
        distributed={"sequence_parallel": 2},
        run={"dir": "runs/x"},
    )
    said = supervised_advice("update", config, world_size=4)
    assert "memory.micro_batch_tokens from 4096 to 2048" in said[0]
    assert any("distributed.sequence_parallel from 2 to 4" in text for text in said)


def test_what_is_advised_about_offloading_is_one_that_the_configuration_takes(tmp_path: Path):
    for stage in (0, 1, 2, 3):
        (text,) = [
            t
            for t in advice("loading", long_config(tmp_path, distributed={"zero_stage": stage}), world_size=1)
            if "offload" in t
        ]
        assert text.startswith("set distributed.offload_optimizer from false to true ")
        advised = re.search(r"with distributed.zero_stage (\d)", text)
        offloading = {"zero_stage": int(advised[1]) if advised else stage, "offload_optimizer": True}
        followed = long_config(tmp_path, distributed=offloading)
        assert not any("offload" in t for t in advice("loading", followed, world_size=1))


def test_every_legal_budget_that_is_advised_is_one_that_the_configuration_takes(tmp_path: Path):
    config = long_config(tmp_path)
    budgets = []
    while True:
        match = re.search(r"micro_batch_tokens from \d+ to (\d+)", advice("update", config, world_size=1)[0])
        if match is None:
            break
        budgets.append(int(match.group(1)))
        config = long_config(tmp_path, memory={"micro_batch_tokens": budgets[-1]})
    assert budgets == [16384, 8192, 4096, 2048, 1536]


def test_after_the_passes_come_activations_and_then_more_gpus(tmp_path: Path):
    last = {"micro_batch_tokens": 1536, "logprob_chunk_tokens": 128}
    suggestions = advice("update", long_config(tmp_path, memory=last), world_size=1)
    assert "memory.activation_checkpointing from 0 to 1" in suggestions[0]
    assert any("launch on 2 GPUs or more" in text and "zero_stage 3" in text for text in suggestions)
    # nothing is kept for a backward pass when log-probabilities are computed without one
    assert not any("checkpointing" in text for text in advice("logprobs", long_config(tmp_path), world_size=1))


def test_sampling_is_given_less_memory_for_keys_and_values_never_below_the_fewest(tmp_path: Path):
    config = long_config(tmp_path)
    first = advice("rollout", config, world_size=1, kv_gib=(40.0, 1.0))[0]
    assert "memory.kv_cache_gib from null (40 GiB) to 20 " in first
    assert "to 1.01 " in advice("rollout", config, world_size=1, kv_gib=(1.5, 1.0))[0]
    for kv_gib in (None, (1.0, 1.0)):  # transformers' generate; a cache as small as can be
        assert "memory.max_sequences from 256 to 128" in advice("rollout", config, world_size=1, kv_gib=kv_gib)[0]
    # each of 8 processes samples 64 completions at most: 128 at once would change nothing
    assert "memory.max_sequences from 256 to 32" in advice("rollout", config, world_size=8)[0]


def test_a_model_too_large_is_shared_out(tmp_path: Path):
    alone = advice("loading", long_config(tmp_path), world_size=1)
    assert "launch on 2 GPUs or more" in " ".join(alone)
    assert "distributed.zero_stage from 0 to 3" in " ".join(advice("loading", long_config(tmp_path), world_size=4))
    sharded = long_config(tmp_path, distributed={"zero_stage": 3})
    assert "launch on 8 GPUs instead of 4" in " ".join(advice("loading", sharded, world_size=4))


@pytest.mark.parametrize("phase", LADDERS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_something_is_always_advised_and_names_real_settings(tmp_path: Path, phase: str, world_size: int):
    least = {"micro_batch_tokens": 1536, "logprob_chunk_tokens": 1, "max_sequences": 1}
    config = long_config(tmp_path, memory=least, distributed={"zero_stage": 3})
    for each in (config, long_config(tmp_path)):
        suggestions = advice(phase, each, world_size=world_size)
        assert suggestions
        assert set(settings_named(suggestions)) <= set(setting_names())


@pytest.mark.parametrize("engine", ["hf", "native"])
def test_the_longest_step_is_as_long_as_the_settings_allow(tmp_path: Path, engine: str):
    config = tiny_config(
        tmp_path / "run",
        rollout={"stop": ["e"], "num_prompts": 3, "engine": engine},  # the text would end nearly every completion
        algorithm={"kl_coef": 0.1, "num_minibatches": 3},
        run={"steps": 1},
    )
    trainer = memory.worst_case(config)
    metrics = [trainer.train_step() for _ in range(memory.NUM_STEPS)][-1]
    assert metrics["completion/length_mean"] == metrics["completion/length_max"] == 24
    assert metrics["completion/truncated"] == 1
    assert metrics["group/with_signal"] == 1
    assert metrics["optimizer/steps"] == 2 * 3
    assert round(metrics["throughput/update"] * metrics["time/update"]) == 3 * 4 * (96 + 24)
    assert metrics["optimizer/learning_rate"] > 0


def test_how_full_a_pass_is_agrees_with_the_passes_of_real_sequences(tmp_path: Path):
    config = tiny_config(
        tmp_path, data={"max_prompt_tokens": 10}, rollout={"num_prompts": 6, "group_size": 5, "max_completion_tokens": 30},
        algorithm={"num_minibatches": 2}, memory={"micro_batch_tokens": 100},
    )  # fmt: skip
    for length in (30, 15, 10, 1):
        completion = Completion([1] * length, [0.0] * length, "", "length")
        batch = pack([Group(Prompt(0, [2] * 10, "", "", {}), [completion] * 5)] * 3, torch.ones(3, 5))
        for processes in (1, 2):
            plan = plan_passes(batch, token_budget=100, num_processes=processes)
            passes = [take(batch, each) for share in plan for each in share if each]
            sizes = [len(micro_batch(part, torch.ones(int(part.completion_lens.sum()))).tokens) for part in passes]
            assert memory.fullest_pass(config, length, world_size=processes) == max(sizes) / 100


def test_completions_that_fill_the_passes_are_found(tmp_path: Path):
    def config(budget: int, **algorithm: int) -> Config:
        return tiny_config(
            tmp_path,
            data={"max_prompt_tokens": 1024},
            rollout={"num_prompts": 8, "group_size": 16, "max_completion_tokens": 8192},
            memory={"micro_batch_tokens": budget},
            algorithm=algorithm,
        )

    assert memory.fullest_pass(config(16384), 8192, world_size=1) == 9216 / 16384  # a second one does not fit
    length = memory.filling_length(config(16384), world_size=1)
    assert length == 8192 // 4
    assert memory.fullest_pass(config(16384), length, world_size=1) >= memory.FULL > 0.9
    # one of the longest fills a pass, or two of one prompt do; or a whole minibatch does not, and shorter ones even less
    assert memory.filling_length(config(9400), world_size=1) is None
    assert memory.filling_length(config(1024 + 2 * 8192), world_size=1) is None
    assert memory.filling_length(config(10**6, num_minibatches=8), world_size=2) is None


@pytest.mark.parametrize("peaks", [[1.0, 2.0, 3.0], [1.0, 2.0, 1.5]])
def test_a_step_that_fills_the_passes_counts_for_the_peaks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], peaks: list[float]
):
    config = tiny_config(tmp_path / "run", memory={"micro_batch_tokens": 132}, run={"steps": 1})
    trainer, steps = memory.worst_case(config), []
    train_step = trainer.train_step

    def step() -> dict[str, float]:
        steps.append(train_step() | {"memory/update": peaks[len(steps)]})
        return steps[-1]

    monkeypatch.setattr(trainer, "train_step", step)
    metrics = memory.run(trainer)
    # at most 132 tokens: a prompt of 96 with one completion of 24 leaves no room for a second one, with three of 12 it is full
    assert [each["completion/length_mean"] for each in steps] == [24, 24, 12]
    assert "completions of 12 tokens, which fill a pass to 100%" in capsys.readouterr().out
    assert metrics["time/step"] == steps[1]["time/step"]
    assert metrics["memory/update"] == max(peaks)


def test_a_prompt_is_stretched_to_exactly_the_length_asked_for():
    prompt = Prompt(0, [5, 6, 7], "", "", {}, max_tokens=4)
    assert memory.stretched(prompt, 7).token_ids == [5, 6, 7, 5, 6, 7, 5]
    assert memory.stretched(prompt, 3).token_ids == [5, 6, 7]
    assert memory.stretched(prompt, 7).max_tokens is None


def test_random_rewards_give_every_group_a_signal_and_depend_on_the_question_alone():
    groups = [Group(Prompt(row, [1], "", "", {}), [Completion([1], [0.0], "", "stop")] * 3) for row in (4, 7)]
    rewards = RandomRewards().score(groups).rewards
    assert len(set(rewards.flatten().tolist())) == 6
    assert torch.equal(RandomRewards().score(groups[1:]).rewards, rewards[1:])


def test_what_fits_is_reported_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    config = tiny_config(
        tmp_path / "run", run={"steps": 100, "resume": "auto"}, evaluation={"num_questions": 3, "every_steps": 40},
        data={"eval_name": str(ROOT / "configs/quickstart/test.jsonl")},
    )  # fmt: skip
    assert memory.check(config) == 0
    out = capsys.readouterr().out
    assert re.search(r"^update +\d+\.\d\d +-$", out, re.MULTILINE)
    assert re.search(r"^It fits\. The largest process took \d+\.\d\d GiB", out, re.MULTILINE)
    assert "100 such steps take" in out
    assert re.search(
        r"^A checkpoint takes about 0\.007\d+ GiB of the disk, at most 2 are there at once, and", out, re.MULTILINE
    )
    assert f"are free for {tmp_path / 'run'}.\n" in out
    assert "4 evaluations of 3 questions" in out  # after steps 0, 40, 80, 100
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("room", "enough"), [(1.5, False), (2.5, True)])
def test_a_disk_without_room_for_the_checkpoints_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: float, enough: bool
):
    monkeypatch.setattr(disk, "free_bytes", lambda directory: room * 16 * 496_128)
    assert memory.check(tiny_config(tmp_path / "run", run={"steps": 100})) == 0
    assert ("That is not enough: free some space" in capsys.readouterr().out) != enough


def test_on_a_gpu_peaks_and_what_is_left_are_reported(tmp_path: Path):
    metrics = {f"time/{phase}": 1.5 for phase in memory.PHASES} | {"memory/update": 61.234, "memory/step": 61.234}
    left = memory.GpuMemory(free=17.94, total=79.1, resident=9.0, processes=torch.cuda.device_count() or 1)
    text = memory.report(long_config(tmp_path), metrics, left, "of the disk")
    assert re.search(r"^update +1\.50 +61\.23$", text, re.MULTILINE)
    assert "Of the fullest GPU's 79.1 GiB 17.9 are free" in text
    assert "GPUs were used" not in text


def test_the_projection_adds_up(tmp_path: Path):
    config = long_config(tmp_path, run={"steps": 100}, evaluation={"num_questions": 50, "every_steps": 50})
    text = memory.projection(config, {"time/step": 72.0, "throughput/rollout": 1024.0})
    assert "100 such steps take 2.0 hours" in text  # 7,200 s
    assert "3 evaluations of 50 questions about 2.5 minutes" in text  # 3 * 50 * 1,024 tokens at 1,024 a second: 150 s


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def raising(*args: object, **kwargs: object) -> None:
    raise OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("target", "where", "first"),
    [
        ("grpo.policy.policy.load_lm", "while the model is loaded", "true with distributed.zero_stage 1 instead of 0"),
        ("grpo.rollout.engine.NativeGenerator.sample", "while sampling (rollout)", "memory.kv_cache_gib from null"),
        ("grpo.rollout.hf.HFGenerator.sample", "while sampling (rollout)", "memory.max_sequences from 256 to 8"),
        ("grpo.policy.policy.Policy.ref_logprobs", "(logprobs)", "true with distributed.zero_stage 1 instead of 0"),
        ("grpo.policy.policy.Policy.backward", "(update)", "memory.micro_batch_tokens from 512 to 256"),
        ("grpo.policy.policy.Policy.optimizer_step", "(update)", "memory.micro_batch_tokens from 512 to 256"),
    ],
)
def test_a_shortage_is_told_with_its_phase_and_its_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    where: str,
    first: str,
):
    monkeypatch.setattr(target, raising)
    budget = 512 if "(update)" in where else 128  # one sequence has 120
    config = tiny_config(
        tmp_path / "run",
        algorithm={"kl_coef": 0.1},
        memory={"micro_batch_tokens": budget},
        rollout={"engine": "hf" if "HFGenerator" in target else "native"},
    )
    assert memory.check(config) == 1
    error = capsys.readouterr().err
    assert error.startswith("It does not fit: out of memory ")
    assert where in error.splitlines()[0]
    assert error.splitlines()[1] == "  CUDA out of memory. Tried to allocate 2.00 GiB."
    assert first in error.splitlines()[2]
    assert not (tmp_path / "run").exists()


def test_another_error_is_not_taken_for_a_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("grpo.policy.policy.Policy.backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        memory.check(tiny_config(tmp_path / "run"))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    ],
)
def test_shortages_that_do_not_come_from_torchs_allocator_are_known(text: str):
    assert is_out_of_memory(RuntimeError(text))


def test_a_dry_run_refuses_a_logger_that_is_not_there_as_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.observe.sinks.find_spec", lambda name: None)
    config = tiny_config(tmp_path / "run", logging={"tensorboard": True})
    for start in (Trainer, memory.check):
        with pytest.raises(ValueError, match=r"^logging\.tensorboard is true; it needs the package tensorboard"):
            start(config)


@pytest.mark.slow
def test_the_training_script_rehearses_with_dry_run(tmp_path: Path):
    overrides = ("rollout.num_prompts=2", "rollout.group_size=2", f"run.dir={tmp_path / 'run'}", "--dry-run")
    done = run_script(*overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "It fits." in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_shortage_on_one_process_of_two_ends_both(tmp_path: Path):
    # the other one would wait for ten minutes
    ranks = launch_group("worker_shortage.py", str(tmp_path / "run"), processes=2, timeout=120)
    said = "".join(done.stdout + done.stderr for done in ranks)
    assert ranks[1].returncode == 1, said[-4000:]
    assert ranks[0].returncode > 0, "it did not end by itself"
    assert "on rank 1 of 2: It does not fit: out of memory in forward and backward passes" in said
    assert "It fits" not in said


@pytest.mark.parametrize(("exit_code", "arguments"), [(1, ["memory"]), (0, ["invariance", "--processes", "1", "2"])])
def test_the_module_checks_the_configuration_with_its_overrides_and_exits_as_the_check_says(
    exit_code: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    checked = []

    def check(config: Config, **options: object) -> int:
        checked.append((config, options))
        return exit_code

    command, *more = arguments
    monkeypatch.setattr(f"grpo.check.{command}.check", check)
    monkeypatch.setattr(distributed, "stop", lambda: None)
    given = ["--config", str(ROOT / "configs/quickstart.yaml"), "--set", "run.seed=7"]
    monkeypatch.setattr(sys, "argv", ["grpo.check", command, *given, *more])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("grpo.check", run_name="__main__")
    assert ended.value.code == exit_code
    ((config, options),) = checked
    assert config.run.seed == 7
    assert options == ({"processes": [1, 2]} if more else {})
