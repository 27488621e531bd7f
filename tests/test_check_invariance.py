"""The invariance check passes where the update is the same, and fails where it is not."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, launch_group, tiny_config
from safetensors.torch import save_file

from grpo.check import invariance
from grpo.check.dry_run import changed
from grpo.check.invariance import TOLERANCE, Variant, conclusion, plan, row, verdict
from grpo.check.variant import EPSILON, SCALE, Replay, compare, to_replay
from grpo.config import Config
from grpo.types import Completion, Episode, Prompt, Sampling

WORKER = str(ROOT / "tests/worker_variant.py")


def small_config(tmp_path: Path, **sections: Any) -> Config:
    """Settings that the check overrides, so that it would show if it did not."""
    return tiny_config(
        tmp_path / "run",
        rollout={"num_prompts": 6, "group_size": 3},
        memory={"micro_batch_tokens": 512},
        algorithm={"num_minibatches": 2, "kl_coef": 0.1},
        optimizer={"weight_decay": 0.1, "warmup_steps": 3, "schedule": "linear"},
        distributed={"zero_stage": 2},
        **sections,
    )


class Forked:
    """In place of a launcher: forks of its workers, but for the launch that is the `launches`-th, which is a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, launches: int) -> None:
        self.launch, self.left = invariance._launch, launches
        monkeypatch.setattr(invariance, "_launch", self)

    def __call__(self, command: list[str], log: Path) -> int | None:
        self.left -= 1
        if self.left == 0:
            return self.launch(command, log)
        place = command.index("--nproc_per_node")
        ranks = launch_group(*command[place + 2 :], processes=int(command[place + 1]), timeout=200)
        log.write_text("".join(done.stdout + done.stderr for done in ranks))
        return max(abs(done.returncode) for done in ranks)


@pytest.fixture
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launched workers need, and nothing of a process group that another test has set up here."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_path")
def test_the_tiny_models_update_is_the_same_in_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Of its four launches one is of torchrun, whose two processes import everything."""
    # ZeRO 0 and 1 on two processes, and passes that both run, are left to test_distributed
    launches = Forked(monkeypatch, launches=1)  # the first goes through torchrun
    left_out = ("ZeRO 0", "ZeRO 1", "passes on 2 processes together")
    monkeypatch.setattr(invariance, "plan", lambda *args: [v for v in plan(*args) if v.name not in left_out])
    assert invariance.check(small_config(tmp_path), processes=[1, 2], worker=(WORKER, "sharded")) == 0
    out = capsys.readouterr().out
    assert "Tolerance in float32: 2e-05 of the norm, 0.0001 of the update." in out
    assert out.count("  ok\n") == 3
    first, other = (int(re.search(rf"^{name}.*? +1 +(\d+) ", out, re.MULTILINE)[1]) for name in ("as conf", "passes"))  # type: ignore[index]
    assert other > first, "the smaller passes were not more of them"
    assert "All 3 variants make the same update." in out
    assert launches.left == -3
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_path")
def test_a_loss_that_is_normalized_by_pass_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(invariance, "plan", lambda *args: list(plan(*args))[:2])  # the budgets alone: it takes no more
    Forked(monkeypatch, launches=0)
    assert invariance.check(small_config(tmp_path), processes=[1], worker=(WORKER, "normalized_by_pass")) == 1
    out = capsys.readouterr().out
    assert re.search(r"^passes of 120 tokens .* FAIL \([\w.]+\)$", out, re.MULTILINE)
    assert "1 of 1 variants failed" in out


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_path")
def test_a_run_that_cannot_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = small_config(tmp_path, data={"name": "absent.jsonl"})
    assert invariance.check(config, processes=[1]) == 1
    out = capsys.readouterr().out
    assert "crashed:\nerror: data.name is 'absent.jsonl'; there is no such file." in out
    assert "did not run, so there is nothing to compare" in out
    assert "Traceback" not in out


HANGING = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "a").write(f"{os.getpid()} ")
if os.fork() == 0:
    open(sys.argv[1], "a").write(f"{os.getpid()} ")
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_path")
def test_a_variant_that_hangs_is_ended_with_all_it_started_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setattr(invariance, "LONGEST_SECONDS", 15)
    worker = (str(tmp_path / "hanging.py"), str(tmp_path / "pids"))
    assert invariance.check(small_config(tmp_path), processes=[2], worker=worker) == 1
    assert "FAIL: did not end within 15 seconds" in capsys.readouterr().out
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 4
    # what has ended may wait as a zombie for its parent to notice
    alive = [
        pid for pid in pids if Path(f"/proc/{pid}").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    ]
    assert alive == []


def test_the_variants_are_budgets_processes_and_stages(tmp_path: Path):
    variants = list(plan(small_config(tmp_path), [1, 2, 4]))
    assert [(v.name, v.processes) for v in variants] == [
        ("as configured: ZeRO 2, passes of 512 tokens", 1),
        ("passes of 120 tokens", 1),
        ("as configured", 2),
        ("as configured", 4),
        ("ZeRO 0", 4),
        ("ZeRO 1", 4),
        ("ZeRO 3", 4),
        ("passes on 2 processes together", 4),
    ]
    configs = [v.config for v in variants if v.config is not None]
    assert [c.memory.micro_batch_tokens for c in configs] == [512, 120, *[512] * 5, 256]
    assert [c.distributed.zero_stage for c in configs] == [2, 2, 2, 2, 0, 1, 3, 2]
    assert [c.distributed.sequence_parallel for c in configs] == [*[1] * 7, 2]
    for config in configs:
        assert config.algorithm.num_minibatches == 1
        assert config.algorithm.kl_coef == 0.1
        assert config.optimizer.learning_rate == SCALE * EPSILON
        assert (config.optimizer.weight_decay, config.optimizer.warmup_steps) == (0, 0)


def test_passes_are_run_together_by_as_many_as_are_configured_and_heads_allow(tmp_path: Path):
    config = changed(small_config(tmp_path), distributed={"sequence_parallel": 4}, memory={"micro_batch_tokens": 128})
    (alone, *_, together) = [v.config for v in plan(config, [1, 4]) if v.config is not None]
    assert (alone.distributed.sequence_parallel, alone.memory.micro_batch_tokens) == (1, 512)
    assert (together.distributed.sequence_parallel, together.memory.micro_batch_tokens) == (4, 128)
    assert not any("together" in v.name for v in plan(config, [1, 3])), "four heads on three processes"


def test_a_budget_that_is_the_smallest_already_is_doubled(tmp_path: Path):
    config = tiny_config(tmp_path / "run", memory={"micro_batch_tokens": 120})
    assert [v.config.memory.micro_batch_tokens for v in plan(config, [1]) if v.config][:2] == [120, 240]


def test_stages_that_the_settings_refuse_are_told_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refusing(config: Config, **changes: dict[str, Any]) -> Config:
        if changes.get("distributed", {}).get("zero_stage") == 0:
            raise ValueError("distributed.zero_stage is 0; no.")
        return config

    monkeypatch.setattr(invariance, "changed", refusing)
    (refused,) = [v for v in plan(small_config(tmp_path), [1]) if v.config is None]
    assert refused.name == "ZeRO 0"
    result = invariance._run(refused, tmp_path, ())
    assert verdict(result, FIRST, TOLERANCE[torch.float32]) == "not run"
    assert "distributed.zero_stage is 0; no." in row(refused, result, FIRST, "not run")


FIRST = {"passes": 2, "grad_norm": 0.5, "update": 0.0, "weight": "w", "weight_update": 0.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"grad_norm": 0.5 * (1 + 1.9e-5)}, "ok"),
        ({"grad_norm": 0.5 * (1 - 2.1e-5)}, "FAIL"),
        ({"grad_norm": float("nan")}, "FAIL"),
        ({"update": 1.1e-4}, "FAIL"),
        ({"weight_update": 1.1e-4}, "FAIL"),
        ({"update": float("nan")}, "FAIL"),
    ],
)
def test_each_of_the_three_differences_alone_fails_a_variant(changes: dict[str, float], expected: str):
    assert verdict({**FIRST, **changes}, FIRST, TOLERANCE[torch.float32]) == expected


def test_a_crash_fails_and_a_shortage_of_memory_is_no_verdict():
    tolerance = TOLERANCE[torch.bfloat16]
    assert verdict(FIRST, FIRST, tolerance) == "first"
    assert verdict({"failed": "crashed:\nTraceback"}, FIRST, tolerance) == "FAIL"
    assert verdict({"out_of_memory": "CUDA out of memory."}, FIRST, tolerance) == "not run"
    shown = row(Variant("ZeRO 0", 2, None), {"out_of_memory": "CUDA out of memory."}, FIRST, "not run")
    assert shown.endswith("not run: out of memory: CUDA out of memory.")
    assert "All 2 variants make" in conclusion(["first", "ok", "not run", "ok"])
    assert "1 of 2 variants failed" in conclusion(["first", "ok", "FAIL", "not run"])
    assert "nothing was compared" in conclusion(["first", "not run"])


def test_updates_are_compared_as_a_whole_and_weight_by_weight(tmp_path: Path):
    before = {"large": torch.tensor([1.0, 1.0]), "small": torch.tensor([2.0]), "still": torch.tensor([5.0])}
    reference = {"large": torch.tensor([4.0, 5.0]), "small": torch.tensor([2.05]), "still": torch.tensor([5.0])}
    save_file(reference, tmp_path / "weights.safetensors")
    assert compare(before, reference, tmp_path / "weights.safetensors")["update"] == 0
    # the reference moves `large` by (3, 4), of norm 5, `small` by 0.05; this one moves `small` by half of it
    after = {**reference, "small": torch.tensor([2.025])}
    found = compare(before, after, tmp_path / "weights.safetensors")
    assert found["weight"] == "small"
    assert found["update"] == pytest.approx(0.025 / 5.00025, rel=1e-4)
    assert found["weight_update"] == pytest.approx(0.025 / (0.05 + 0.01 * 5.00025), rel=1e-4)
    # a weight without a gradient: noise of a millionth of the whole update is no difference to speak of
    noisy = compare(before, {**reference, "still": torch.tensor([5.000005])}, tmp_path / "weights.safetensors")
    assert noisy["weight_update"] == pytest.approx(1e-4, rel=0.1)
    broken = compare(before, {**reference, "still": torch.tensor([float("nan")])}, tmp_path / "weights.safetensors")
    assert broken["weight"] == "still"
    assert broken["update"] != broken["update"]


def test_completions_are_replayed_as_they_were_written(tmp_path: Path):
    completions = [
        Completion([3, 4], [-0.1, -0.25], "a", "stop", trained=[True, False]),
        Completion([5], [-1.5], "b", "length"),
    ]
    played = [replace(each, episode=Episode(1.0, ended=True, num_turns=2)) for each in completions]
    (tmp_path / "rollout.json").write_text(json.dumps({"7": [to_replay(each) for each in played]}))
    prompt = Prompt(7, [1], "", "", {})
    replay = Replay(tmp_path / "rollout.json", None)  # type: ignore[arg-type]
    (group,) = replay.sample([prompt], Sampling(max_tokens=4), num_completions=2, seed=0)
    assert group.prompt is prompt
    assert group.completions == completions
    with pytest.raises(KeyError):
        replay.sample([replace(prompt, row=8)], Sampling(max_tokens=4), num_completions=2, seed=0)


@pytest.mark.parametrize(
    ("world_size", "processes", "message"),
    [
        ("2", [1], "WORLD_SIZE is 2; this check launches its variants itself"),
        ("1", [-1], "--processes is -1; "),
        ("1", [0], "--processes is 0; "),
        ("1", [7], "rollout.num_prompts is 6; each of the 7 processes"),
    ],
)
def test_processes_that_cannot_be_launched_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: str, processes: list[int], message: str
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 if processes == [7] else 0)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match=message):
        invariance.check(small_config(tmp_path), processes=processes)


@pytest.mark.parametrize(("gpus", "expected"), [(0, [1, 2]), (1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (8, [1, 2])])
def test_without_a_wish_one_two_and_all_processes_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, expected: list[int]
):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = small_config(tmp_path)  # six questions: eight processes would have nothing to do
    assert invariance._counts(config, None) == expected
