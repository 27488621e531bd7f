"""A checkpoint is whole or not there, what is corrupt is found, and a killed or stopped run goes on as if it had not been."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import warm
from helpers import QUESTIONS, ROOT, TINY, clean_environment, launch, tiny_config
from test_sft import sft_config
from test_trainer import steps_of

from grpo import SupervisedTrainer, Trainer
from grpo.algorithm.batch import empty_micro_batch, micro_batch, pack, take
from grpo.config import Config, RewardConfig, as_override
from grpo.observe.metrics import Meter
from grpo.policy.model_source import complete_checkpoints, name_of, numbers_of
from grpo.run import checkpoint, disk, inputs
from grpo.run.checkpoint import CheckpointError
from grpo.run.resumable import changed_setting, read_state
from grpo.scoring import reward as scoring
from grpo.system.distributed import Processes
from grpo.system.files import checksum
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import EXIT_STOPPED, Stopped
from grpo.system.writer import Own, Writer, copied, problem_with, save_tensors
from grpo.training.state import Rollout, StepState, redistribute
from grpo.types import Completion, Group, MicroBatch, Prompt, Scores

EVERY_STEP = {"every_steps": 1, "keep": 10}


def names(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run / "checkpoints")]


# ---- killed at random moments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (4, []),
        (4, ["--lora", "4", "--background"]),
        (4, ["--processes", "2", "--zero", "2"]),
        (4, ["--processes", "2", "--zero", "3", "--background"]),
    ],
)
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    tmp_path: Path, kills: int, options: list[str]
):
    """Takes long because each kill is followed by a start, and a run must get somewhere before the next."""
    done = warm.run(
        ["tests/worker_kills.py", str(tmp_path / "runs"), "--kills", str(kills), *options],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills
    assert result["differences"] == []


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_a_writer_writes_copies_in_the_background_and_knows_each_files_size_and_checksum(tmp_path: Path):
    weights = {"a": torch.arange(4.0)}
    writer = Writer(tmp_path, background=True)
    writer.write(tmp_path / "deep/weights.pt", weights, save_tensors)
    weights["a"].zero_()
    assert not list(tmp_path.iterdir())
    writer.start()
    writer.wait()
    assert torch.load(tmp_path / "deep/weights.pt")["a"].tolist() == [0, 1, 2, 3]
    path = tmp_path / "deep/weights.pt"
    assert writer.files == {"deep/weights.pt": (path.stat().st_size, checksum(path))}
    assert writer.error is None
    assert problem_with(tmp_path, writer.files) is None


def test_a_copy_of_tied_tensors_is_one_tensor(tmp_path: Path):
    tied = torch.arange(6.0)
    own = Own(head=tied)
    assert copied(own)["head"] is tied
    copy = copied({"head": tied, "embedding": [tied], "view": tied[2:]})
    assert copy["head"] is copy["embedding"][0]
    assert copy["head"].data_ptr() != tied.data_ptr()
    assert copy["view"].tolist() == [2, 3, 4, 5]


def test_a_writer_keeps_its_first_error_to_itself_and_writes_nothing_more(tmp_path: Path):
    (tmp_path / "file").write_text("in the way of a folder")
    writer = Writer(tmp_path, background=False)
    writer.write(tmp_path / "file/weights.pt", {}, save_tensors)
    writer.write(tmp_path / "other.pt", {}, save_tensors)
    writer.start()
    writer.wait()
    assert writer.error is not None
    assert "file" in writer.error
    assert not (tmp_path / "other.pt").exists()


GPU = torch.device("cuda", 0)


def test_a_copy_fits_on_gpus_where_it_takes_a_third_of_the_memory_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(tiny_config(tmp_path / "run"))
    trainer.close()
    policy = trainer.policy
    weights = sum(weight.numel() for weight in policy.lm.parameters())
    # of each weight in float32: itself in hf/ and in DeepSpeed's file; itself with two averages to go on from
    needed = (4 + 4 + 12) * weights
    for left, device, fits in [
        (3 * needed, GPU, True),
        (3 * needed - 3, GPU, False),
        (2**60, torch.device("cpu"), False),
    ]:
        monkeypatch.setattr(checkpoint, "available_bytes", lambda left=left: left)
        assert checkpoint.copy_fits(policy, Processes(0, 1, device)) is fits
    # one of two machines: what one process writes alone may be here, of the training state it is half
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for left, fits in [(3 * (4 + 4 + 6) * weights, True), (3 * (4 + 4 + 6) * weights - 3, False)]:
        monkeypatch.setattr(checkpoint, "available_bytes", lambda left=left: left)
        assert checkpoint.copy_fits(policy, Processes(1, 4, GPU)) is fits
    policy.reference_moved = True
    assert checkpoint.num_copied_bytes(policy, share=1) == needed + 4 * weights


@contextmanager
def copies_noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each checkpoint was written in the background."""
    noted: list[bool] = []
    made = Writer.__init__

    def note(self: Writer, directory: Path, *, background: bool) -> None:
        noted.append(background)
        made(self, directory, background=background)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "__init__", note)
        yield noted


@pytest.mark.parametrize(
    ("setting", "fits", "expected"),
    [("auto", True, True), ("auto", False, False), (True, False, True), (False, True, False)],
)
def test_what_a_run_does_not_wait_for_is_written_in_the_background_if_that_is_set_or_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | bool, fits: bool, expected: bool
):
    monkeypatch.setattr(checkpoint, "copy_fits", lambda *_: fits)
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint={"background": setting}))
    with copies_noted(monkeypatch) as noted:
        trainer.train_step()
        trainer.save(wait=False)
        trainer.train_step()
        trainer.save()
    assert noted == [expected, False]
    assert names(tmp_path / "run") == [name_of(1), name_of(2)]
    trainer.close()


def test_a_run_on_a_cpu_writes_at_once_by_default_and_a_resume_may_choose_otherwise(
    tmp_path: Path, saved_run: Path, monkeypatch: pytest.MonkeyPatch
):
    if torch.cuda.is_available():
        pytest.skip("a CPU is not what trains here")
    run = shutil.copytree(saved_run, tmp_path / "run")
    assert read_state(run / "checkpoints" / name_of(2))["config"]["checkpoint"]["background"] == "auto"
    for steps, changed, expected in [
        (3, {}, [False]),
        (5, {"background": True}, [True, False]),
        (6, {"background": False}, [False]),
    ]:
        saving = {**EVERY_STEP, **changed}
        with copies_noted(monkeypatch) as noted:
            Trainer(tiny_config(run, checkpoint=saving, run={"steps": steps, "resume": "auto"})).train()
        assert noted == expected
        assert names(run)[-1] == name_of(steps)


def test_the_last_checkpoint_is_copied_only_where_an_evaluation_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saving, run = {"every_steps": 1, "keep": 9, "background": True}, {"steps": 2}
    asks = {"data": {"eval_name": str(TINY / "test.jsonl")}, "evaluation": {"num_questions": 1}}
    config = tiny_config(tmp_path / "plain", checkpoint=saving, run=run)
    asking = tiny_config(tmp_path / "asking", checkpoint=saving, run=run, **asks)

    def of_rows(directory: Path, num_aside: int) -> SupervisedTrainer:
        own = {"dir": str(directory), **run}
        config = sft_config(directory, checkpoint=saving, evaluation={"num_rows": num_aside}, run=own)
        return SupervisedTrainer(config, train_dataset=[{"prompt": f"{n}", "completion": " 1"} for n in range(4)])

    for make, expected in [
        (lambda: Trainer(config), [True, False]),
        (lambda: Trainer(asking), [True, True]),
        (lambda: of_rows(tmp_path / "rows", 0), [True, False]),
        (lambda: of_rows(tmp_path / "aside", 1), [True, True]),
    ]:
        trainer = make()
        with copies_noted(monkeypatch) as noted:
            trainer.train()
        assert noted == expected
        assert names(trainer.directory) == [name_of(1), name_of(2)]


def test_a_step_under_way_is_saved_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint={"background": True}))
    trainer._sample()
    with copies_noted(monkeypatch) as noted:
        trainer.save(wait=False)
    assert noted == [False]
    assert names(tmp_path / "run") == [name_of(0, 0)]
    trainer.close()


def test_one_process_without_memory_for_its_copy_lets_all_write_at_once(tmp_path: Path):
    said = launch("worker_background.py", str(tmp_path), processes=2, timeout=120)
    for rank in (0, 1):
        assert f"rank {rank} in the background: [False, True]\n" in said
    assert names(tmp_path / "run") == [name_of(1), name_of(2)]


def test_the_row_of_a_step_says_how_long_the_checkpoint_before_it_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint={"every_steps": 2}, run={"steps": 4}))
    own = trainer.checkpoints.save

    def slowly(*arguments: object, **options: object) -> Path:
        time.sleep(0.2)
        return own(*arguments, **options)

    trainer.checkpoints.save = slowly
    trainer.train()
    rows = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "time/step" in row]
    assert ["time/checkpoint" in row for row in rows] == [False, False, True, False]
    assert 0.2 < rows[2]["time/checkpoint"] < 20


def on_a_disk_for(room: float, directory: Path, needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many checkpoints fit, where `needed` bytes are thought to be one; more fail as on a full disk."""
    own = checkpoint._prepare

    def free(_: Path) -> float:
        return room * 1.06 * needed - sum(map(disk._size, checkpoint.complete_checkpoints(directory)))

    monkeypatch.setattr(disk, "free_bytes", free)
    monkeypatch.setattr(
        checkpoint, "_prepare", lambda partial: own(partial) if free(partial) >= needed else "No space left on device"
    )


@pytest.mark.parametrize(
    ("keep", "keep_every", "room", "gone", "left", "at_once"),
    [
        (2, 0, 3, [], [3, 4], 2),
        (2, 0, 2, [1, 2], [3, 4], 2),  # each before the one that takes its place
        (3, 0, 2, [1, 2], [3, 4], 3),  # more than fit were to stay
        (1, 0, 1, [], [1], 2),  # the only one stays
        (2, 2, 2, [1], [2, 3], 3),  # the second is there for good
    ],
)
def test_on_a_full_disk_the_oldest_checkpoint_makes_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keep: int,
    keep_every: int,
    room: int,
    gone: list[int],
    left: list[int],
    at_once: int,
):
    saving = {"every_steps": 1, "keep": keep, "keep_every": keep_every}
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint=saving, run={"steps": 4}))
    on_a_disk_for(room, trainer.checkpoints.directory, disk.num_bytes(trainer.policy), monkeypatch)
    if left[-1] < 4:
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
            trainer.train()
    else:
        trainer.train()
    said = capsys.readouterr().out
    assert [int(number) for number in removed(said)] == gone
    assert names(tmp_path / "run") == [name_of(step) for step in left]
    assert (f" GiB; {at_once} are to be there at once" in said) == (room < at_once)


def removed(said: str) -> list[str]:
    found = re.findall(r"no room for another checkpoint, so (step.*) went before it", said)
    return [number for each in found for number in re.findall(r"step-0*(\d+)", each)]


@pytest.mark.parametrize(
    ("room", "settings", "gone", "left"),
    [
        (4, {}, [], [1, 2, 3, 4]),
        (3, {}, ["1"], [2, 3, 4]),  # the oldest alone
        (2, {}, ["1", "2"], [3, 4]),
        (0.5, {}, [], [1, 2, 3]),  # others' files fill the disk: all that may go would not be enough
        (3, {"watchdog": {"reward": "roll_back", "patience": 2, "max_skipped": 2}}, [], [1, 2, 3]),  # which needs them
    ],
)
def test_a_resumed_run_makes_room_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: float,
    settings: dict[str, Any],
    gone: list[str],
    left: list[int],
):
    saving = {"every_steps": 1, "keep": 4}
    Trainer(tiny_config(tmp_path / "run", checkpoint=saving, run={"steps": 3}, **settings)).train()
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint=saving, run={"steps": 4, "resume": "auto"}, **settings))
    on_a_disk_for(room, trainer.checkpoints.directory, disk.num_bytes(trainer.policy), monkeypatch)
    if 4 in left:
        trainer.train()
    else:
        with pytest.raises(checkpoint.CheckpointError):
            trainer.train()
    assert removed(capsys.readouterr().out) == gone
    assert names(tmp_path / "run") == [name_of(step) for step in left]


def test_what_makes_room_is_as_large_as_the_newest_and_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config(tmp_path / "run", checkpoint={"every_steps": 1, "keep": 4})
    Trainer(tiny_config(tmp_path / "run", checkpoint={"every_steps": 1, "keep": 4}, run={"steps": 4})).train()
    directory = tmp_path / "run/checkpoints"
    first, second, third, last = checkpoint.complete_checkpoints(directory)
    assert [*disk.may_go(directory, config)] == [first, second, third]
    monkeypatch.setattr(disk, "free_bytes", lambda _: disk._size(last) - 1)
    assert disk.to_go(directory, config, 1) == [first]
    first.rename(tmp_path / "elsewhere")
    first.symlink_to(tmp_path / "elsewhere")
    assert disk.to_go(directory, config, 1) == [second]


@pytest.mark.parametrize(
    ("settings", "num_steps", "at_once"),
    [
        ({"keep": 2, "every_steps": 1}, 1, 1),
        ({"keep": 2, "every_steps": 0}, 100, 1),
        ({"keep": 1, "every_steps": 50}, 1000, 2),
        ({"keep": 5, "every_steps": 50}, 1000, 5),
        ({"keep": 2, "keep_every": 100, "every_steps": 50}, 1000, 11),
        ({"keep": 5, "keep_every": 100, "every_steps": 50}, 500, 7),
    ],
)
def test_how_many_checkpoints_are_to_be_there_at_once(
    tmp_path: Path, settings: dict[str, Any], num_steps: int, at_once: int
):
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint=settings, run={"steps": num_steps}))
    directory = trainer.checkpoints.directory
    assert disk.Room.at(directory, trainer.config, trainer.policy, step=0, num_steps=num_steps).at_once == at_once


def test_names_sort_by_time_and_are_read_back():
    numbers = [(9, None), (9, 0), (9, 3), (10, None), (10, 12), (100, None)]
    assert sorted(name_of(*each) for each in reversed(numbers)) == [name_of(*each) for each in numbers]
    assert [numbers_of(Path(name_of(*each))) for each in numbers] == numbers


def test_the_newest_stay_and_those_after_every_so_many_steps_for_good(tmp_path: Path):
    saving = {"every_steps": 1, "keep": 2, "keep_every": 3}
    Trainer(tiny_config(tmp_path / "run", checkpoint=saving, run={"steps": 8})).train()
    assert names(tmp_path / "run") == [name_of(step) for step in (3, 6, 7, 8)]


@pytest.mark.parametrize("every", [0, 2])
def test_keeping_checkpoints_that_are_not_written_is_refused(tmp_path: Path, every: int):
    with pytest.raises(ValueError, match=f"checkpoint.keep_every is 3; checkpoint.every_steps is {every}"):
        tiny_config(tmp_path, checkpoint={"every_steps": every, "keep_every": 3})


def test_saving_in_the_background_gives_the_same_files_as_saving_at_once(tmp_path: Path):
    for name, background in (("at-once", False), ("background", True)):
        saving = {**EVERY_STEP, "background": background}
        Trainer(tiny_config(tmp_path / name, checkpoint=saving, run={"steps": 2})).train()
    files = [read_state(tmp_path / name / "checkpoints" / name_of(1))["files"] for name in ("at-once", "background")]
    assert files[0].keys() == files[1].keys()
    weights = "hf/model.safetensors"
    assert files[0][weights] == files[1][weights]


# ---- what cannot be trusted ------------------------------------------------------------------------------------------


def truncate(checkpoint_dir: Path) -> None:
    path = next(checkpoint_dir.glob("training/*model_states.pt"))
    os.truncate(path, path.stat().st_size - 100)


def flip_a_bit(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / "hf/model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "random/rank-0.pt").unlink()


def change_the_state(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / "state.json"
    path.write_text(path.read_text().replace('"position": 8', '"position": 4'))


def cut_the_state(checkpoint_dir: Path) -> None:
    os.truncate(checkpoint_dir / "state.json", 50)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved") / "run"
    Trainer(tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 2})).train()
    return run


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "bytes instead of"),
        (flip_a_bit, "hf/model.safetensors is not what was written: its checksum differs"),
        (remove, "random/rank-0.pt is missing"),
        (change_the_state, "state.json is not what was written"),
        (cut_the_state, "state.json cannot be read"),
    ],
)
def test_a_corrupt_checkpoint_is_set_aside_and_said_and_the_one_before_is_taken(
    tmp_path: Path, saved_run: Path, capsys: pytest.CaptureFixture[str], harm, said: str
):
    run = shutil.copytree(saved_run, tmp_path / "run")
    harm(run / "checkpoints" / name_of(2))
    trainer = Trainer(tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 2, "resume": "auto"}))
    assert trainer.state.step == 1
    output = capsys.readouterr().out
    assert said in output
    assert "is corrupt and was renamed to step-00000002.corrupt" in output
    trainer.train()
    assert steps_of(run) == steps_of(saved_run)
    assert (run / "checkpoints/step-00000002.corrupt").is_dir()


def test_without_one_good_checkpoint_a_run_does_not_start_anew_in_silence(tmp_path: Path):
    config = tiny_config(tmp_path / "run", checkpoint=EVERY_STEP, run={"steps": 2, "resume": "auto"})
    Trainer(config).train()
    for each in complete_checkpoints(tmp_path / "run/checkpoints"):
        flip_a_bit(each)
    with pytest.raises(ValueError, match=r"not one of the 2 checkpoints in .* is as it was written"):
        Trainer(config)


def test_a_run_resumes_with_the_settings_it_began_with_but_for_those_that_may_change():
    before = {"run": {"steps": 3, "seed": 0}, "memory": {"max_sequences": 8}, "rewards": [{"weight": 1.0}]}
    may = {"run.steps", "memory"}
    assert changed_setting(before, before | {"run": {"steps": 9, "seed": 0}, "memory": {}}, may_change=may) is None
    assert changed_setting(before, before | {"run": {"steps": 3, "seed": 1}}, may_change=may) == "run.seed"
    assert changed_setting(before, before | {"rewards": [{"weight": 2.0}]}, may_change=may) == "rewards."


# ---- asked to stop ---------------------------------------------------------------------------------------------------

UPDATES = {
    "algorithm": {
        "kl_coef": 0.05,
        "num_minibatches": 2,
        "num_epochs": 2,
        "top_entropy": 0.5,
        "reference_refresh_steps": 8,
    },
    "data": {"eval_name": str(ROOT / "configs/quickstart/test.jsonl")},
    "evaluation": {"num_questions": 4, "every_steps": 2},
    "checkpoint": {"every_steps": 0},
}


def a_run(directory: Path, **settings: float) -> Trainer:
    return Trainer(tiny_config(directory, **UPDATES, run={"steps": 4, "resume": "auto", **settings}))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    a_run(run).train()
    return run


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert steps_of(run) == steps_of(whole)
    for name in ("completions", "evaluations"):
        assert read_jsonl(run / f"{name}.jsonl") == read_jsonl(whole / f"{name}.jsonl")


def stop_at_call(trainer: Trainer, name: str, number: int) -> None:
    """Let the process be asked to stop when the trainer's method of that name begins for the so-manieth time."""
    own, calls = getattr(trainer, name), []

    def method(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments, **options)

    setattr(trainer, name, method)


def test_a_stop_between_two_updates_saves_the_rest_of_the_rollout_and_goes_on_with_it(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = a_run(tmp_path / "run")
    stop_at_call(trainer, "_optimizer_step", 7)  # of four each step
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == EXIT_STOPPED == 75
    assert names(tmp_path / "run") == ["step-00000001-0003"]
    assert "stopped: SIGTERM. Saved to" in capsys.readouterr().out
    trainer = a_run(tmp_path / "run")
    assert "resumed after step 1 and 3 updates of the next" in capsys.readouterr().out
    assert trainer.state.optimizer_steps == 7
    assert len(trainer.step.minibatches) == 1
    trainer.train()
    assert_equal_runs(tmp_path / "run", whole_run)


def test_a_stop_while_sampling_breaks_it_off_and_saves_the_step_before(tmp_path: Path, whole_run: Path):
    trainer = a_run(tmp_path / "run")
    own, calls = trainer.collector.generator.sample, []

    def sample(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # the evaluation before the first step is one, too
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return own(*arguments, **options)

    trainer.collector.generator.sample = sample
    began = time.monotonic()
    with pytest.raises(Stopped):
        trainer.train()
    assert time.monotonic() - began < 30
    assert names(tmp_path / "run") == ["step-00000001"]
    a_run(tmp_path / "run").train()
    assert_equal_runs(tmp_path / "run", whole_run)


def test_a_stop_in_an_evaluation_evaluates_again_later(tmp_path: Path, whole_run: Path):
    trainer = a_run(tmp_path / "run")
    stop_at_call(trainer, "_evaluate_if_due", 3)  # after step 2
    with pytest.raises(Stopped):
        trainer.train()
    assert names(tmp_path / "run") == ["step-00000002"]
    a_run(tmp_path / "run").train()
    assert_equal_runs(tmp_path / "run", whole_run)


def test_the_end_of_max_hours_saves_and_stops_even_in_the_middle_of_a_rollout(tmp_path: Path, whole_run: Path):
    trainer = a_run(tmp_path / "run", max_hours=4 / 3600)
    trainer.collector.generator.sample = lambda *_, **__: time.sleep(60)
    with pytest.raises(Stopped, match="75") as stopped:
        trainer.train()
    assert stopped.value.reason == "run.max_hours (0.00111111) are over"
    assert names(tmp_path / "run") == ["step-00000000"]
    a_run(tmp_path / "run").train()
    assert_equal_runs(tmp_path / "run", whole_run)


def test_handlers_are_as_before_once_training_has_ended(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    Trainer(tiny_config(tmp_path / "run", run={"steps": 1})).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


SLOW_TO_STOP = """
import time
from grpo.system.stopping import StopRequest
with StopRequest(None):
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


def test_a_second_signal_ends_a_process_at_once_and_one_that_comes_with_the_first_does_not():
    command = [sys.executable, "-c", SLOW_TO_STOP]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)  # a launcher hands on what the terminal has sent to everyone
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_the_script_ends_with_75_when_it_is_asked_to_stop(tmp_path: Path):
    settings = ["run.max_hours=1e-6", "evaluation.num_questions=0", f"run.dir={tmp_path / 'run'}"]
    done = warm.run(
        ["scripts/train_zero.py", "--config", "configs/quickstart.yaml", "--set", *settings],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == EXIT_STOPPED, done.stderr[-3000:]
    assert f"run.resume=auto run.dir={tmp_path / 'run'} goes on from there" in done.stdout
    assert names(tmp_path / "run") == ["step-00000000"]


def test_a_run_without_a_checkpoint_says_that_it_starts_anew_and_where_those_of_a_moved_one_are(tmp_path: Path):
    def lines(config: Path | str, *settings: str) -> list[str]:
        done = warm.run(
            ["scripts/train_zero.py", "--config", str(config), "--set", *settings, "run.resume=auto"],
            cwd=ROOT,
            env={**clean_environment(), "PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        assert done.returncode == EXIT_STOPPED, done.stderr[-3000:]
        return done.stdout.splitlines()

    before, moved = tmp_path / "before", tmp_path / "moved here"
    short = ["run.max_hours=1e-6", "evaluation.num_questions=0"]
    told = f"no checkpoint in {before}: starts at step 1"
    beside = f"checkpoints lie beside the configuration, in {moved}: 'run.dir={moved}' goes on from there"
    assert told in lines("configs/quickstart.yaml", *short, f"run.dir={before}")
    assert not [line for line in lines(before / "config.yaml") if line.startswith(("no checkpoint", "checkpoints lie"))]
    before.rename(moved)
    said = lines(moved / "config.yaml")
    assert said.index(beside) < said.index(told)
    assert not [line for line in lines(moved / "config.yaml", f"run.dir={moved}") if "no checkpoint" in line]


# ---- disks ---------------------------------------------------------------------------------------------------------------


@contextmanager
def no_room(size: int = 100_000) -> Iterator[None]:
    """Files of this process cannot grow beyond so many bytes; writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], background: bool
):
    saving = {"every_steps": 1, "keep": 10, "background": background}
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint=saving, run={"steps": 4}))
    own = trainer.checkpoints.save

    def save(state, step, **options):
        with no_room() if state.step == 2 else no_room(2**40):
            path = own(state, step, **options)
            if background and state.step == 2:
                trainer.checkpoints._pending.writer.wait()
            return path

    trainer.checkpoints.save = save
    trainer.train()
    assert names(tmp_path / "run") == [name_of(step) for step in (1, 3, 4)]
    output = capsys.readouterr().out
    assert "warning: checkpoint step-00000002 was not written:" in output
    assert "GiB are free there. Complete checkpoints in" in output
    assert "step-00000001." in output
    assert len(steps_of(tmp_path / "run")) == 4
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 1}))
    remedy = r"checkpoint step-00000001 was not written: .*Complete.* start it again with run.resume=auto\.$"
    with no_room(), pytest.raises(CheckpointError, match=remedy):
        trainer.train()
    assert len(steps_of(tmp_path / "run")) == 1


def test_a_full_disk_on_one_process_does_not_leave_the_other_waiting(tmp_path: Path):
    launch("worker_full_disk.py", str(tmp_path), processes=2, timeout=120)
    assert names(tmp_path / "run") == [name_of(step) for step in (1, 3)]


def test_rows_that_cannot_be_written_wait_and_follow_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 3}))
    path = tmp_path / "run/metrics.jsonl"
    trainer.train_step()
    first = path.rename(tmp_path / "first.jsonl")
    path.symlink_to("/dev/full")
    trainer.train_step()
    assert (
        "warning: metrics.jsonl cannot be written: [Errno 28] No space left on device; 1 rows wait"
        in capsys.readouterr().out
    )
    path.unlink()
    first.rename(path)
    trainer.train()
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_rows_that_can_never_be_written_end_up_elsewhere_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 2}))
    (tmp_path / "run/completions.jsonl").symlink_to("/dev/full")
    trainer.train()
    said = [
        line for line in capsys.readouterr().out.splitlines() if "the last 32 rows of completions.jsonl are in" in line
    ]
    rows = read_jsonl(Path(said[0].split(" are in ")[1].removesuffix(".")))
    assert [row["step"] for row in rows] == [1] * 16 + [2] * 16


# ---- out of memory ---------------------------------------------------------------------------------------------------


def short_of_memory_once(trainer: Trainer, *, at_call: int) -> None:
    own, calls = trainer.policy.backward, []

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        calls.append(1)
        if len(calls) == at_call:
            trainer.failed = weakref.ref(loss)  # and the whole graph with it
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        own(loss, last=last)

    trainer.policy.backward = backward


def test_out_of_memory_in_an_update_leaves_a_checkpoint_and_goes_on_with_smaller_passes(
    tmp_path: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = a_run(tmp_path / "run")
    num_passes = [len(passes) for passes in first_rollout(a_run(tmp_path / "other"))]
    short_of_memory_once(trainer, at_call=sum(num_passes[:2]) + num_passes[2])  # the last pass of the third update
    own, is_freed = trainer.checkpoints.save, []

    def save(*arguments, **options):
        is_freed.append(trainer.failed() is None)
        return own(*arguments, **options)

    trainer.checkpoints.save = save
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert is_freed == [True]  # or there would be no room to save
    assert stopped.value.settings == (
        "run.resume=auto",
        f"run.dir={tmp_path / 'run'}",
        "memory.micro_batch_tokens=128",
    )
    assert (
        "out of memory in phase update of step 1: CUDA out of memory. Tried to allocate 2.00 GiB."
        in capsys.readouterr().out
    )
    assert names(tmp_path / "run") == ["step-00000000-0002"]
    config = tiny_config(
        tmp_path / "run", **UPDATES, memory={"micro_batch_tokens": 128}, run={"steps": 4, "resume": "auto"}
    )
    trainer = Trainer(config)
    assert all(len(micro.tokens) <= 128 for passes in trainer.step.minibatches for micro in passes)
    trainer.train()
    for ours, theirs in zip(steps_of(tmp_path / "run"), steps_of(whole_run), strict=True):
        for name in ("optimizer/grad_norm", "optimizer/loss", "policy/kl", "policy/entropy", "completion/length_mean"):
            # smaller passes add in another order
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def first_rollout(trainer: Trainer) -> list[list[MicroBatch]]:
    trainer._sample()
    trainer.close()
    return trainer.step.minibatches


SHORT_SCRIPT = """
import runpy, sys
sys.path.insert(0, "tests")
from test_checkpoint import short_of_memory_once
import grpo
train = grpo.Trainer.train

def short(trainer):
    short_of_memory_once(trainer, at_call=2)
    return train(trainer)

grpo.Trainer.train = short
sys.argv = ["scripts/train_zero.py", *sys.argv[1:]]
runpy.run_path("scripts/train_zero.py", run_name="__main__")
"""


def test_the_script_goes_on_by_itself_after_a_shortage(tmp_path: Path):
    settings = ["run.steps=2", "evaluation.num_questions=0", "preflight.num_questions=0", f"run.dir={tmp_path / 'run'}"]
    settings += [
        f"data.name={QUESTIONS}",
        "rollout.num_prompts=4",
        "rollout.max_completion_tokens=24",
        "memory.micro_batch_tokens=512",
    ]
    arguments = ["--config", "configs/quickstart.yaml", "--set", *settings]
    done = warm.run(
        ["-c", SHORT_SCRIPT, *arguments],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped: out of memory in phase update of step 1" in done.stdout
    assert "resumed after step 0" in done.stdout
    assert [row["step"] for row in steps_of(tmp_path / "run")] == [1, 2]
    assert "micro_batch_tokens: 256" in (tmp_path / "run/config.yaml").read_text()


def test_a_pass_that_cannot_be_smaller_is_an_error(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", memory={"micro_batch_tokens": 120}))  # one sequence
    short_of_memory_once(trainer, at_call=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


HOLDS_THE_LOCK = """
import sys
from grpo.config import RunConfig
from grpo.observe.rundir import DirectoryLock, claim
lock = DirectoryLock()
claim(RunConfig(dir=sys.argv[1], steps=1, resume="auto"), lock)
print("holds", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_resume_in_one_directory_and_a_killed_one_leaves_it_free(tmp_path: Path):
    config = tiny_config(tmp_path / "run", run={"steps": 1, "resume": "auto"})
    command = ["-c", HOLDS_THE_LOCK, str(tmp_path / "run")]
    with warm.Process(command, cwd=ROOT, stdin=warm.PIPE, stdout=warm.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(ValueError, match=r"run.dir is .*run'; another process is at work there"):
            Trainer(config)
        other.kill()
    Trainer(config).train()
    assert names(tmp_path / "run") == ["step-00000001"]


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path):
    for steps in (1, 2):
        settings = {"logging": {"wandb": "offline"}, "run": {"steps": steps, "resume": "auto"}}
        Trainer(tiny_config(tmp_path / "run", **settings)).train()
    parts = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert {part.name.rsplit("-", 1)[1] for part in parts} == {(tmp_path / "run/wandb_id").read_text()}


def test_a_wandb_that_cannot_be_reached_costs_seconds_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    Trainer(tiny_config(tmp_path / "run", logging={"wandb": "online"}, run={"steps": 1})).train()
    assert "this run is logged offline" in capsys.readouterr().out
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(steps_of(tmp_path / "run")) == 1


# ---- a step under way, on other processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2])
def test_a_stop_that_one_process_hears_of_stops_all_and_the_rest_of_the_rollout_goes_on_elsewhere(
    together: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Also of two processes that ran their passes together, and hold the same ones."""
    output = launch("worker_stop.py", str(tmp_path / "run"), str(together), processes=2, timeout=120)
    assert all(f"rank {rank} stopped: SIGTERM" in output for rank in (0, 1))
    assert names(tmp_path / "run") == ["step-00000001-0003"]
    settings = {**UPDATES, "distributed": {"zero_stage": 2}}
    trainer = Trainer(tiny_config(tmp_path / "run", **settings, run={"steps": 2, "resume": "auto"}))
    assert "resumed on 1 process what 2 saved" in capsys.readouterr().out
    (passes,) = trainer.step.minibatches
    parts = [micro.sampling_logprobs.split(micro.completion_lens.tolist()) for micro in passes if not micro.is_spare]
    drawn = [tuple(logprobs.tolist()) for part in parts for logprobs in part]
    assert len({*drawn}) == len(drawn) > 1, "a sequence is there twice"
    trainer.train()
    rows = [row for row in read_jsonl(tmp_path / "run/completions.jsonl") if row["step"] == 2]
    assert len(rows) == 16
    assert len({row["row"] for row in rows}) == 4
    step = steps_of(tmp_path / "run")[-1]
    assert step["optimizer/steps"] == 8
    assert step["completion/length_mean"] == pytest.approx(sum(row["num_tokens"] for row in rows) / 16)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (3, 2), (2, 5)])
def test_a_step_under_way_is_redistributed_without_losing_a_sequence(before: int, now: int):
    rng = random.Random(0)
    parts = [part_of_a_step(rng, number) for number in range(before)]
    dealt = [redistribute(parts, rank=rank, num_processes=now) for rank in range(now)]

    def sequences(steps: list[StepState], minibatch: int) -> list[list[int]]:
        passes = [micro for step in steps for micro in step.minibatches[minibatch] if not micro.is_spare]
        return sorted(micro.targets.tolist() for micro in passes)

    for minibatch in (0, 1):
        assert sequences(dealt, minibatch) == sequences(parts, minibatch)
        assert len({len(step.minibatches[minibatch]) for step in dealt}) == 1  # as many passes on every process
    assert sorted(g.prompt.row for step in dealt for g in step.rollout.groups) == list(range(2 * before))
    assert sum(len(step.rollout.advantages) for step in dealt) == 2 * before
    assert sum(step.meter.sums.get("x", 0.0) for step in dealt) == sum(range(before))
    assert sum(step.meter.counts.get("x", 0.0) for step in dealt) == before
    assert all(step.first_update == 3 for step in dealt)


@pytest.mark.parametrize(("before", "now"), [((2, 2), (2, 1)), ((2, 1), (2, 2)), ((4, 2), (2, 1)), ((2, 1), (6, 3))])
def test_processes_that_run_passes_together_have_the_same_and_none_is_run_twice(
    before: tuple[int, int], now: tuple[int, int]
):
    """Each is a number of processes, and how many of them run passes together."""
    rng = random.Random(0)
    alone = [part_of_a_step(rng, number) for number in range(before[0] // before[1])]
    parts = [replace(part_of_a_step(rng, n), minibatches=alone[n // before[1]].minibatches) for n in range(before[0])]
    dealt = [
        redistribute(parts, rank=rank, num_processes=now[0], together_before=before[1], together=now[1])
        for rank in range(now[0])
    ]

    def sequences(steps: list[StepState]) -> list[list[list[int]]]:
        passes = [[micro for step in steps for micro in step.minibatches[n] if not micro.is_spare] for n in (0, 1)]
        return [sorted(micro.targets.tolist() for micro in each) for each in passes]

    for first in range(0, now[0], now[1]):
        for other in dealt[first : first + now[1]]:
            assert sequences([other]) == sequences([dealt[first]])
            assert len(other.minibatches[0]) == len(dealt[first].minibatches[0])
    assert sequences(dealt[:: now[1]]) == sequences(alone)
    rows = sorted(g.prompt.row for step in dealt if step.rollout is not None for g in step.rollout.groups)
    assert rows == list(range(2 * before[0])), "of completions each process has its own"


def part_of_a_step(rng: random.Random, number: int) -> StepState:
    groups = [
        Group(
            Prompt(2 * number + i, [1, 2, 3], "", "", {}),
            [Completion([rng.randrange(99) for _ in range(5)], [-1.0] * 5, "", "stop") for _ in range(2)],
        )
        for i in range(2)
    ]
    advantages = torch.tensor([[1.0, -1.0]] * 2)
    whole = pack(groups, advantages)
    passes = [micro_batch(take(whole, [i]), torch.ones(5)) for i in range(4)]
    meter = Meter()
    meter.mean("x", torch.tensor(float(number)))
    rollout = Rollout(groups, Scores(advantages, {"f": advantages}, 0, 0), advantages, torch.tensor([0, 1]))
    return StepState(rollout, 3, [passes[:2], [*passes[2:], empty_micro_batch()]], meter, {})


# ---- at the seams ----------------------------------------------------------------------------------------------------


def test_a_run_resumed_with_fewer_steps_than_it_has_made_ends_at_once(tmp_path: Path, saved_run: Path):
    run = shutil.copytree(saved_run, tmp_path / "run")
    Trainer(tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 1, "resume": "auto"})).train()
    assert steps_of(run) == steps_of(saved_run)


def test_a_checkpoint_written_in_the_background_is_complete_with_the_next_update(tmp_path: Path):
    """And not only with the next save, which may be hours away."""
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint={"background": True}))
    trainer.train_step()
    trainer.save(wait=False)
    while not trainer.checkpoints.is_written:
        time.sleep(0.01)
    assert complete_checkpoints(tmp_path / "run/checkpoints") == []
    trainer.train_step()
    trainer.close()
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == [name_of(1)]


def test_a_stop_saves_even_if_the_background_save_before_it_failed(tmp_path: Path):
    saving = {"every_steps": 2, "keep": 10, "background": True}
    trainer = Trainer(tiny_config(tmp_path / "run", checkpoint=saving, run={"steps": 4}))
    own, calls = trainer.checkpoints.save, []

    def save(state, step, **options):
        calls.append(state.step)
        if len(calls) > 1:
            return own(state, step, **options)
        with no_room():
            path = own(state, step, **options)
            trainer.checkpoints._pending.writer.wait()
            os.kill(os.getpid(), signal.SIGTERM)  # before anyone has asked what became of it
            return path

    trainer.checkpoints.save = save
    with pytest.raises(Stopped):
        trainer.train()
    assert calls == [2, 2]
    assert names(tmp_path / "run") == ["step-00000002"]


def test_the_end_of_max_hours_is_no_signal_so_the_first_one_after_it_does_not_end_the_process():
    code = SLOW_TO_STOP.replace("StopRequest(None)", "StopRequest(1e-6)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(2.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()


def test_max_hours_hold_in_another_thread_too(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 50, "max_hours": 1e-6}))
    ended: list[BaseException] = []

    def train() -> None:
        try:
            trainer.train()
        except Stopped as stopped:
            ended.append(stopped)

    thread = Thread(target=train)
    thread.start()
    thread.join(timeout=60)
    assert len(ended) == 1
    assert names(tmp_path / "run") == ["step-00000000"]


def test_a_checkpoint_that_is_corrupt_twice_is_set_aside_twice(tmp_path: Path, saved_run: Path):
    run = shutil.copytree(saved_run, tmp_path / "run")
    for _ in range(2):
        flip_a_bit(run / "checkpoints" / name_of(2))
        Trainer(tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 2, "resume": "auto"})).train()
    aside = {path.name for path in (run / "checkpoints").iterdir() if path.suffix}
    assert aside == {"step-00000002.corrupt", "step-00000002.corrupt-2"}


def test_a_stop_asked_for_during_a_shortage_is_not_lost_and_what_goes_on_has_the_hours_left(tmp_path: Path):
    for asked in (False, True):
        trainer = a_run(tmp_path / f"run-{asked}", max_hours=1.0)
        short_of_memory_once(trainer, at_call=1)
        if asked:
            stop_at_call(trainer, "save", 1)
        with pytest.raises(Stopped) as stopped:
            trainer.train()
        hours = [setting for setting in stopped.value.settings if setting.startswith("run.max_hours=")]
        assert bool(stopped.value.settings) == (not asked)
        assert asked or 0.9 < float(hours[0].split("=")[1]) < 1


def test_out_of_memory_in_a_step_made_by_hand_is_out_of_memory(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run"))
    short_of_memory_once(trainer, at_call=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step()
    trainer.close()


def test_a_roll_back_goes_to_a_finished_step_that_has_the_reference_it_needs(tmp_path: Path):
    algorithm = {"kl_coef": 0.05, "reference_refresh_steps": 3}
    trainer = Trainer(tiny_config(tmp_path / "run", algorithm=algorithm, checkpoint=EVERY_STEP, run={"steps": 5}))
    trainer.train()
    saved = tmp_path / "run/checkpoints"
    shutil.copytree(saved / name_of(2), saved / name_of(2, 0))  # as if it held a step under way
    policy = trainer.policy
    assert trainer.checkpoints.last_before(5, policy) == saved / name_of(3)
    assert trainer.checkpoints.last_before(4, policy) is None  # the reference moved after step 3
    policy.reference_moved = False
    assert trainer.checkpoints.last_before(4, policy) == saved / name_of(2)
    flip_a_bit(saved / name_of(2))
    assert trainer.checkpoints.last_before(4, policy) == saved / name_of(1)


def test_text_is_an_override_that_reads_it_back():
    for text in ("/tmp/run", "2024-10-01", "1e3", "true", "a: b"):
        config = Config.load(ROOT / "configs/quickstart.yaml", [f"run.dir={as_override(text)}"])
        assert config.run.dir == text
    assert as_override("/tmp/run") == "/tmp/run"


# ---- what else may lie in the folder of checkpoints ------------------------------------------------------------------


def test_pruning_leaves_alone_what_a_person_has_put_beside_the_checkpoints(tmp_path: Path):
    saved, elsewhere = tmp_path / "run/checkpoints", tmp_path / "elsewhere"
    for directory in (saved / "step-00000002-backup", saved / "step-1", elsewhere):
        directory.mkdir(parents=True)
        (directory / "weights").write_text("mine")
    (saved / "step-00000000").symlink_to(elsewhere)
    (saved / "step-00000001.partial").symlink_to(elsewhere)
    (saved / "step-00000009").write_text("a file")
    saving = {"every_steps": 1, "keep": 1}
    trainer = Trainer(tiny_config(tmp_path / "new", checkpoint=saving, run={"steps": 2}))
    trainer.checkpoints.directory = saved
    trainer.train()
    assert names(tmp_path / "run") == [name_of(2)]
    assert not (saved / "step-00000000").is_symlink()
    for directory in (saved / "step-00000002-backup", saved / "step-1", elsewhere):
        assert (directory / "weights").read_text() == "mine"
    assert checkpoint._tidy(saved) == [saved / name_of(2)]
    assert (elsewhere / "weights").read_text() == "mine"


def unmovable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a directory with the immutable flag, or of another user."""
    own = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == name:
            raise PermissionError(1, "Operation not permitted", str(path))
        return own(path, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_an_old_checkpoint_that_cannot_be_removed_is_said_once_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    unmovable(monkeypatch, name_of(1))
    Trainer(tiny_config(tmp_path / "run", checkpoint={"every_steps": 1, "keep": 1}, run={"steps": 3})).train()
    assert names(tmp_path / "run") == [name_of(1), name_of(3)]
    assert capsys.readouterr().out.count("cannot be removed: [Errno 1] Operation not permitted") == 1


def test_a_corrupt_or_abandoned_checkpoint_that_cannot_be_moved_is_not_built_on(
    tmp_path: Path, saved_run: Path, monkeypatch: pytest.MonkeyPatch
):
    run = shutil.copytree(saved_run, tmp_path / "run")
    unmovable(monkeypatch, name_of(2))
    flip_a_bit(run / "checkpoints" / name_of(2))
    config = tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 2, "resume": "auto"})
    with pytest.raises(ValueError, match=r"step-00000002 is corrupt \(.*\) and cannot be renamed: .*Move it out"):
        Trainer(config)
    monkeypatch.undo()
    trainer = Trainer(config)
    unmovable(monkeypatch, name_of(1))
    with pytest.raises(CheckpointError, match="step-00000001 cannot be removed"):
        trainer.checkpoints.remove_after(run / "checkpoints" / name_of(0))


# ---- questions and rewards that changed ------------------------------------------------------------------------------

REWARD = """
from reward_parts import factor

def short(completion, factor=factor):
    return factor / (1 + len(completion))
"""


def given_run(directory: Path, **settings: object) -> Trainer:
    sys.modules.pop("reward_parts", None)
    scoring.loaded_files.clear()
    rewards = [{"function": f"{directory / 'reward_short.py'}:short"}]
    data = {"name": str(directory / "train.jsonl"), "eval_name": str(directory / "test.jsonl")}
    sections = {"data": data, "rewards": rewards, "evaluation": {"num_questions": 2}}
    return Trainer(tiny_config(directory / "run", **sections, run={"steps": 1, "resume": "auto", **settings}))


def write_given(directory: Path) -> None:
    (directory / "reward_short.py").write_text(REWARD)
    (directory / "reward_parts.py").write_text("factor = 1.0\n")
    for name in ("train", "test"):
        rows = [json.dumps({"question": f"1+{n}=?", "answer": str(1 + n)}) + "\n" for n in range(8)]
        (directory / f"{name}.jsonl").write_text("".join(rows))


def edit(path: Path, before: str, after: str) -> None:
    path.write_text(path.read_text().replace(before, after))


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("train.jsonl", '"answer": "3"', '"answer": "4"', "the training questions changed since"),
        ("test.jsonl", "1+1", "1+11", "the 2 held-out questions changed since"),
        ("reward_short.py", "/ (1", "/ (2", "the reward short changed since"),
        ("reward_parts.py", "1.0", "10.0", "the reward short changed since"),
    ],
)
def test_a_resume_on_other_questions_or_rewards_is_refused_unless_it_is_accepted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    before: str,
    after: str,
    said: str,
):
    monkeypatch.syspath_prepend(str(tmp_path))
    write_given(tmp_path)
    given_run(tmp_path).train()
    given_run(tmp_path, steps=2).close()
    assert "changed" not in capsys.readouterr().out
    edit(tmp_path / file, before, after)
    with pytest.raises(ValueError, match=f"{said}.* run.accept_changes=true to go on"):
        given_run(tmp_path, steps=2)
    given_run(tmp_path, steps=2, accept_changes=True).train()
    assert f"warning: from here on {said.removesuffix(' changed since')} are others" in capsys.readouterr().out
    given_run(tmp_path, steps=2).close()  # its last checkpoint is of what is there now


def test_another_number_of_held_out_questions_is_no_change_and_another_order_of_the_training_questions_is_one():
    def prompts(*rows: int) -> list[Prompt]:
        return [Prompt(row, [1], f"{row}?", "", {"question": f"{row}?", "answer": row}) for row in rows]

    before = inputs.digests(prompts(1, 2), prompts(3, 4), [])
    assert inputs.changed(before, inputs.digests(prompts(1, 2), prompts(3), [])) == []
    assert inputs.changed(before, inputs.digests(prompts(1, 2), [], [])) == []
    assert inputs.changed(before, inputs.digests(prompts(1, 2), prompts(3, 5), [])) == ["the 2 held-out questions"]
    assert inputs.changed(before, inputs.digests(prompts(2, 1), prompts(3, 4), [])) == ["the training questions"]


def test_what_a_class_of_rewards_was_made_with_counts_as_its_arguments_do():
    def given(limit: float) -> dict[str, str]:
        args = {"url": "http://127.0.0.1:1/v1", "model": "m", "timeout_seconds": limit}
        return inputs.digests([], [], scoring.resolve_rewards([RewardConfig(function="judge", args=args)]))

    assert inputs.changed(given(5), given(5)) == []
    assert inputs.changed(given(5), given(6)) == ["the reward judge"]


def test_a_checkpoint_that_does_not_say_what_it_was_given_resumes_with_a_note(
    tmp_path: Path, saved_run: Path, capsys: pytest.CaptureFixture[str]
):
    run = shutil.copytree(saved_run, tmp_path / "run")
    record = read_state(run / "checkpoints" / name_of(2))
    del record["given"]
    checkpoint._write_state(run / "checkpoints" / name_of(2), record)
    Trainer(tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 2, "resume": "auto"})).close()
    assert "note: step-00000002 does not say what questions and rewards it was written with" in capsys.readouterr().out


# ---- files that bring code along -------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["random/rank-0.pt", "training/mp_rank_00_model_states.pt", "under_way/rank-0.pt"])
def test_a_checkpoint_that_brings_code_along_is_refused_and_its_code_is_not_run(
    tmp_path: Path, saved_run: Path, file: str
):
    run = shutil.copytree(saved_run, tmp_path / "run")
    path = run / "checkpoints" / name_of(2) / file
    path.parent.mkdir(exist_ok=True)
    save_tensors({"evil": Evil(tmp_path / "was-run")}, path)
    record = read_state(path.parents[1])
    record["files"][file] = [path.stat().st_size, checksum(path)]
    checkpoint._write_state(path.parents[1], record)
    with pytest.raises(ValueError, match=r"is not loaded, because what it holds may run code \(posix.mkdir\)"):
        Trainer(tiny_config(run, checkpoint=EVERY_STEP, run={"steps": 2, "resume": "auto"}))
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "settings", [{}, {"model": {"dtype": "bfloat16"}}, {"algorithm": {"reference_refresh_steps": 1, "kl_coef": 0.01}}]
)
def test_a_disk_without_room_for_a_checkpoint_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
):
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 1}, **settings))
    needed = disk.num_bytes(trainer.policy)
    weights = sum(weight.numel() for weight in trainer.policy.lm.parameters())
    # float32 for transformers, and float32 with two averages to go on from; or 16 bits for it and for DeepSpeed
    assert needed == 16 * weights
    monkeypatch.setattr(disk, "free_bytes", lambda directory: needed - 1)
    monkeypatch.setattr(trainer, "train_step", lambda: pytest.fail("it trained"))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"^a checkpoint takes about .* GiB are free at .* Free some space, "
    ):
        trainer.train()
    monkeypatch.undo()
    saved = trainer.train()
    written = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert disk.num_bytes(trainer.policy) < written < 1.1 * disk.num_bytes(trainer.policy)
