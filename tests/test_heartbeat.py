"""A process dies, fails or freezes while others wait for it, or all wait for each other: they end, and say why.

Each scenario has three processes.
"""

import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
from helpers import ROOT, clean_environment, launch_group, read_json

from grpo.policy.model_source import complete_checkpoints
from grpo.run.resumable import read_state
from grpo.system import distributed, progress
from grpo.system.heartbeat import PEER_LOST
from grpo.system.writer import problem_with

LIMIT = 4.0  # seconds of silence, in worker_heartbeat.py; without progress 1.5 times, and after a signal half of it


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios at the same time. They take half a minute of waiting: who works is waited for longer than the limits."""
    out = tmp_path_factory.mktemp("scenarios")
    environment = {**clean_environment(), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = warm.run([str(ROOT / "tests/worker_heartbeat.py"), str(out)], env=environment, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def ends(ended: Path, name: str) -> list[dict[str, float]]:
    return read_json(ended / "ends.json")[name]


def output(ended: Path, name: str, rank: int) -> str:
    return (ended / f"{name}-{rank}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "victim", "message"),
    [
        ("killed", 1, "rank 1 on .* has died: nothing was heard from it for 4 s"),
        ("killed in a collective", 1, "rank 1 on .* has died: nothing was heard from it for 4 s"),
        ("frozen", 2, "rank 2 on .* has died: nothing was heard from it for 4 s"),
        (
            "store killed",
            0,
            "the store at 127.0.0.1:[0-9]+, in rank 0, (is gone|has not answered)",
        ),  # rarely so
        ("store frozen", 0, "has not answered for 4 s: rank 0 on .* is frozen"),
    ],
)
def test_the_others_end_and_name_the_process_that_died(ended: Path, name: str, victim: int, message: str):
    for rank in {0, 1, 2} - {victim}:
        assert ends(ended, name)[rank]["code"] == PEER_LOST
        assert ends(ended, name)[rank]["seconds"] < 3 * LIMIT
        said = [line for line in output(ended, name, rank).splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert re.search(f"rank {rank} ends, because .*{message}", said[0])
        assert "Traceback" not in output(ended, name, rank)


@pytest.mark.parametrize(("name", "victim"), [("fails", 1), ("store fails in finally", 0)])
def test_the_others_end_with_the_error_of_the_process_that_failed(ended: Path, name: str, victim: int):
    broken = "RuntimeError: the reward number_in_text is broken"
    assert f"{broken}\n[rank{victim}]: and says so at length" in output(ended, name, victim)
    assert ends(ended, name)[victim]["code"] == 1
    for rank in {0, 1, 2} - {victim}:
        assert ends(ended, name)[rank]["code"] == PEER_LOST
        assert ends(ended, name)[rank]["seconds"] < LIMIT  # it was told, and did not have to wait
        assert "Traceback" not in output(ended, name, rank)
        # torch may have said by itself that its store is gone
        (said,) = (line for line in output(ended, name, rank).splitlines() if line.startswith("error: "))
        assert re.fullmatch(f"error: rank {rank} ends, because rank {victim} on .* has failed: {broken}", said)


def test_of_processes_that_fail_together_one_shows_its_traceback(ended: Path):
    assert sorted(end["code"] for end in ends(ended, "all fail")) == [1, PEER_LOST, PEER_LOST]
    outputs = [output(ended, "all fail", rank) for rank in range(3)]
    assert sum("Traceback" in text for text in outputs) == 1
    assert sum("has failed: FloatingPointError: the loss of step 1 is nan" in text for text in outputs) == 2


@pytest.mark.parametrize("name", ["one is slow", "one stays", "all frozen for a while"])
def test_who_is_slow_or_has_left_or_is_frozen_with_all_others_is_not_taken_for_dead(ended: Path, name: str):
    assert [end["code"] for end in ends(ended, name)] == [0, 0, 0]
    assert max(end["seconds"] for end in ends(ended, name)) > 1.5 * LIMIT
    for rank in range(3):  # torch says by itself that its store is gone
        assert not re.search("error: |Traceback", output(ended, name, rank))


@pytest.mark.parametrize(("name", "seconds"), [("never joined", 1.5), ("never joined, and asked to stop", 0.5)])
def test_processes_that_wait_for_each_other_end_and_say_where_each_of_them_is(ended: Path, name: str, seconds: float):
    why = f"all processes wait for each other: none has made progress for {seconds * LIMIT:g} s"
    places = [
        r"update, at grpo/system/distributed\.py:\d+ \(sum\), in torch/.*\(all_reduce\), waiting in: work\.wait\(\)",
        r"update, at grpo/system/distributed\.py:\d+ \(sum\), in torch/.*\(all_reduce\), waiting in: work\.wait\(\)",
        r"saving, at grpo/system/stopping\.py:\d+ \(abortable\), in torch/.*\(barrier\), waiting in: work\.wait\(\)",
    ]
    tables = 0
    for rank in range(3):
        assert ends(ended, name)[rank]["code"] == PEER_LOST
        assert ends(ended, name)[rank]["seconds"] < (seconds + 2) * LIMIT
        said = output(ended, name, rank)
        assert len(re.findall("^error: ", said, re.MULTILINE)) == 1
        assert re.search(
            f"error: rank {rank} ends, because {why}.*; it is in phase {places[rank]}; no checkpoint was", said
        )
        assert ("so the stop that a signal asked for cannot be carried out" in said) == ("asked" in name)
        assert re.search(
            rf"\[rank{rank}\] thread MainThread:\n(\[rank{rank}\] .*\n)*\[rank{rank}\] +work\.wait\(\)", said
        )
        table = re.search(r"^where each of them is:\n((?:  rank .*\n)+)", said, re.MULTILINE)
        if table is not None:
            tables += 1
            for line, other, place in zip(table[1].splitlines(), range(3), places, strict=True):
                assert re.fullmatch(f"  rank {other} on .*: {place}", line)
    assert tables == 1


@pytest.mark.parametrize(
    "name", ["one draws tokens", "one writes a file", "one is in its own code", "source on a slow disk"]
)
def test_who_works_is_waited_for_however_long(ended: Path, name: str):
    assert [end["code"] for end in ends(ended, name)] == [0, 0, 0]
    assert max(end["seconds"] for end in ends(ended, name)) > 2.5 * LIMIT  # 1.5 without progress would have ended them
    for rank in range(3):
        assert not re.search("error: |Traceback", output(ended, name, rank))


def run_stall(*arguments: str) -> str:
    """What two processes of worker_stall.py say before they end; no process is left behind."""
    ranks = launch_group("worker_stall.py", *arguments, processes=2, timeout=280)
    said = "".join(done.stderr for done in ranks)
    assert [done.returncode for done in ranks] == [PEER_LOST] * 2, said[-5000:]
    return said


def test_a_run_whose_processes_wait_for_each_other_ends_and_leaves_its_checkpoint_whole(tmp_path: Path):
    said = run_stall(str(tmp_path / "run"))
    (checkpoint,) = complete_checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint.name == "step-00000001"
    assert problem_with(checkpoint, read_state(checkpoint)["files"]) is None
    for rank in (0, 1):
        ends = f"error: rank {rank} ends, because all processes wait for each other: none has made progress for 10 s"
        assert re.search(f"{ends}; it is in phase update, .*; the last checkpoint is {checkpoint}", said), said[-5000:]
    assert re.search(
        r"  rank 0 on .*: update, at grpo/(trainer|policy/policy|system/distributed)\.py:.*, waiting in: ", said
    )
    assert re.search(
        r"  rank 1 on .*: update, at grpo/trainer\.py:\d+ \(train_step\), in torch/.*\(barrier\), waiting", said
    )


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="two processes that wait for each other over NCCL need two GPUs"
)
def test_processes_that_wait_for_each_other_over_nccl_end_too():
    said = run_stall()
    places = (
        r"update, at grpo/system/distributed\.py:\d+ \(sum\), waiting in: .*tolist",
        r"saving, at grpo/system/distributed\.py:\d+ \(synchronize\)",
    )
    for rank, place in enumerate(places):
        ends = f"error: rank {rank} ends, because all processes wait for each other: none has made progress for 10 s"
        assert re.search(f"{ends}; it is in phase {place}", said), said[-5000:]
        assert re.search(f"  rank {rank} on .*: {place}", said), said[-5000:]


def test_a_frame_between_two_lines_has_no_line_number_and_is_described_all_the_same(monkeypatch: pytest.MonkeyPatch):
    code = SimpleNamespace(co_filename=f"{progress.PACKAGE}trainer.py", co_name="train_step")
    monkeypatch.setattr(progress, "_frames", lambda: iter([SimpleNamespace(f_code=code, f_lineno=None)]))
    assert "(train_step), waiting in: train_step" in progress.describe()


def test_what_torch_says_of_the_devices_of_a_barrier_is_no_part_of_a_runs_output():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        distributed.quiet()
        warnings.warn(
            "barrier(): using the device under current context. You can specify `device_id` in ...", stacklevel=1
        )
        warnings.warn("something else", stacklevel=1)
    assert [str(each.message) for each in said] == ["something else"]
