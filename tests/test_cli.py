"""The command `grpo`: what it finds, how fast it answers, and how it starts and stops the processes of a run."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, read_json, tiny_settings

from grpo import cli
from grpo.cli import launch
from grpo.cli.settings import as_markdown, chosen, settings
from grpo.config import Config, SupervisedConfig, setting_names, write_yaml
from grpo.config.elsewhere import ELSEWHERE
from grpo.config.shipped import names, shipped
from grpo.observe.console import errors_for_users
from grpo.system.heartbeat import PEER_LOST
from grpo.system.jsonl import read_jsonl
from grpo.system.reader import EXIT_WITHOUT_READER, ends_with_its_reader

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "deepspeed", "accelerate")


def call(*arguments: str, cwd: Path | None = None, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "grpo", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_shown_without_the_libraries_that_take_seconds_to_import(command: str):
    code = f"""
import sys
from grpo import cli
try:
    cli.main([{command!r}, "--help"])
except SystemExit as ended:
    assert ended.code == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: grpo {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def call_unread(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "grpo", *arguments]
    try:
        return subprocess.run(
            command, cwd=cwd, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=200
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["settings"], ["completion", "bash"], ["--help"]], ids=str)
def test_a_command_ends_quietly_with_what_reads_its_output(tmp_path: Path, arguments: list[str], unbuffered: str):
    done = call_unread(*arguments, cwd=tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (EXIT_WITHOUT_READER, "")


def test_a_run_goes_on_without_what_reads_its_output(tmp_path: Path):
    settings = tiny_settings(tmp_path / "run")
    (tmp_path / "config.yaml").write_text(write_yaml(settings))
    done = call_unread("train", "--config", "config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "time/step" in row] == [1, 2]
    helped = call_unread("train", "--help", cwd=tmp_path)
    assert (helped.returncode, helped.stderr) == (0, "")


def raise_from_a_worker(pipe: int) -> None:
    print("held back")
    os.write(pipe, b"to a worker")


def test_the_broken_pipe_of_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """Also where what reads the output has ended too."""
    readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
    for reader in readers:
        os.close(reader)
    with os.fdopen(writers[0], "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError) as broken, ends_with_its_reader():
            raise_from_a_worker(writers[1])
        assert type(broken.value) is BrokenPipeError
        assert sys.stdout is stdout
    os.close(writers[1])


def test_commands_version_and_what_is_no_command(tmp_path: Path):
    shown = call("--help", cwd=tmp_path).stdout
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in cli.COMMANDS)
    assert re.fullmatch(r"grpo (\d+\.\d+\.\d+|of a folder that is not installed)\n", call("--version").stdout)
    wrong = call("trian", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "error: grpo has no command 'trian'. Did you mean train?\n")


def test_a_configuration_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "qwen1.5b", "recipes/dapo-32b"} <= set(names())
    config = Config.load("quickstart")
    assert Path(config.model.name).is_dir()
    assert Path(str(config.data.name)).is_file()
    assert Path(str(config.data.eval_name)).is_file()
    for name in names():
        text = shipped(name).read_text()
        load = SupervisedConfig.load if "training:" in text else Config.load
        (load if "\nrun:" in text else Config.load_questions)(name)
    with pytest.raises(
        ValueError, match=r"--config is 'quikstart'; there is no such file, .* Did you mean quickstart\?"
    ):
        Config.load("quikstart")


def test_what_lies_beside_a_configuration_is_found_and_the_working_directory_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = tmp_path / "there"
    there.mkdir()
    (there / "a.jsonl").touch()
    (there / "b.jsonl").touch()
    (there / "c.yaml").write_text(
        "model: {name: some/hub-model}\ndata: {name: [a.jsonl, {name: b.jsonl}], eval_name: openai/gsm8k}\n"
        "run: {dir: runs/x, steps: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = Config.load("there/c.yaml")
    assert (config.model.name, config.data.eval_name, config.run.dir) == ("some/hub-model", "openai/gsm8k", "runs/x")
    assert isinstance(config.data.name, list)
    assert [each.name for each in config.data.name] == [str(there / "a.jsonl"), str(there / "b.jsonl")]
    (tmp_path / "a.jsonl").touch()
    config = Config.load("there/c.yaml")
    assert isinstance(config.data.name, list)
    assert config.data.name[0].name == "a.jsonl"


def test_every_setting_is_told_with_its_meaning_type_and_default():
    every = list(settings())
    assert len([each for each in every if not each.name.startswith("sft ")]) == len(setting_names())
    assert "sft training.epochs" in {each.name for each in every}
    assert [each.name for each in every if len(each.meaning) < 10] == []
    assert not [
        each.name for each in every if "<class" in each.type or "typing" in each.type or "Undefined" in each.default
    ]
    by_name = {each.name: each for each in every}
    assert by_name["algorithm.kl_coef"].default == "0.001"
    assert by_name["algorithm.clip_high"].type == "number or null"
    assert by_name["model.name"].default == "none; it must be set"
    assert by_name["run.deterministic"].default == "true"
    assert [each.name for each in chosen(every, "lora")] == [
        "lora.rank",
        "lora.alpha",
        "lora.target_modules",
        "lora.quantization",
    ]
    assert [each.name for each in chosen(every, "kl_coef")] == ["algorithm.kl_coef"]
    assert "optimizer.offload" not in as_markdown(chosen(every, "lora"))
    assert "| `lora.rank` | whole number | `0` | Train low-rank adapters" in as_markdown(every)
    assert call("settings", "no such thing").returncode == 2


def test_a_word_that_is_no_setting_is_answered_with_the_nearest_and_another_librarys_with_ours():
    assert (
        "has 'rolout' in its name or meaning. Did you mean rollout? `grpo settings" in call("settings", "rolout").stderr
    )
    said = call("settings", "num_generations").stdout.splitlines()
    assert said[0] == "That is a name of TRL or verl; here it is rollout.group_size."
    assert said[1].startswith("rollout.group_size  (whole number; default: ")
    assert call("settings", "beta").stdout.splitlines()[1].startswith("algorithm.kl_coef  (")
    assert call("settings", "max_steps").stdout.splitlines()[2].startswith("run.steps  (")
    for word in ("reward_funcs", "packing"):  # which no single setting answers
        assert (call("settings", word).returncode, call("settings", word).stderr) == (0, "")


def test_names_of_other_libraries_are_answered_with_ours():
    ours = setting_names()
    for theirs, answer in ELSEWHERE.items():
        first = re.search(r"here it is (\w+(?:\.\w+)?)", answer)
        assert first is not None, theirs
        assert any(name == first[1] or name.startswith(f"{first[1]}.") for name in ours), answer
        assert not any(name.split(".")[-1] == theirs for name in ours if first[1] != name), theirs
    with pytest.raises(ValueError, match=r"algorithm.beta is not a setting here.*it is algorithm.kl_coef"):
        Config(model={"name": "m"}, run={"dir": "d", "steps": 1}, algorithm={"beta": 0.1})
    with pytest.raises(ValueError, match=r"num_generations is not a setting here.*it is rollout.group_size"):
        Config(model={"name": "m"}, run={"dir": "d", "steps": 1}, num_generations=8)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([PEER_LOST, 1], 1),
        ([PEER_LOST, -9], 137),
        ([PEER_LOST, PEER_LOST], PEER_LOST),
        ([-15, 3], 3),
    ],
)
def test_the_exit_code_of_a_run_is_that_of_the_process_that_failed(codes: list[int], expected: int):
    assert launch.exit_code(codes) == expected


def test_who_waits_for_a_process_that_died_at_its_start_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It died before there was a process group, so that nobody else can tell."""
    (tmp_path / "dies.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise SystemExit(3)\ntime.sleep(100)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "PATIENCE", 1.0)
    started = time.monotonic()
    assert launch.run("dies", [], num_processes=2) == 3
    assert 1 < time.monotonic() - started < 50


def test_a_process_that_is_frozen_is_killed_once_another_has_missed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It hears no signal but the last one, and its GPU would stay taken."""
    (tmp_path / "freezes.py").write_text(
        "import os, signal\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        f"raise SystemExit({PEER_LOST})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "PATIENCE_ONCE_LOST", 1.0)
    monkeypatch.setattr(launch, "PATIENCE", 30.0)  # in the end, if the kernel's word were not heard
    started = time.monotonic()
    assert launch.run("freezes", [], num_processes=2) == PEER_LOST
    assert 1 < time.monotonic() - started < 50


def test_a_process_that_has_failed_and_still_writes_is_left_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The others have heard of its failure and are gone; what it writes is not lost, and its exit code is the run's."""
    (tmp_path / "writes.py").write_text(
        "import os, sys, time, threading\nif os.environ['RANK'] == '1':\n"
        "    threading.Thread(target=time.sleep, args=(4,)).start()\n    raise SystemExit(1)\n"
        f"raise SystemExit({PEER_LOST})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "PATIENCE_ONCE_LOST", 0.5)
    assert launch.run("writes", [], num_processes=2) == 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.num_processes(None) == 2
    assert launch.num_processes(1) == 1
    with pytest.raises(ValueError, match="--processes is 3; this machine has 2 GPUs"):
        launch.num_processes(3)


def test_a_machine_without_gpus_is_not_buried_in_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert launch.num_processes(8) == 8
    with pytest.raises(
        ValueError, match=r"--processes is 1000; this machine has no GPU and 2 cores.* Set it to 8 or less"
    ):
        launch.num_processes(1000)


def test_the_quickstart_trains_in_an_empty_directory_in_two_processes_and_stops_on_a_signal(tmp_path: Path):
    """It starts two interpreters, which takes ten seconds each where there is one core for both."""
    quick = ["run.steps=500", "evaluation.num_questions=4", "preflight.num_questions=0", "checkpoint.every_steps=0"]
    command = [sys.executable, "-m", "grpo", "train", "--config", "quickstart", "--processes", "2", "--set", *quick]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        metrics, deadline = tmp_path / "runs/quickstart/metrics.jsonl", time.monotonic() + 150
        while not (metrics.exists() and '"step": 1,' in metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert "stopped: SIGTERM. Saved to runs/quickstart/checkpoints/step-" in said
    assert "Traceback" not in said
    assert "accelerate" not in said
    (saved,) = (tmp_path / "runs/quickstart/checkpoints").glob("step-*")
    assert read_json(saved / "state.json")["world_size"] == 2


FAULTY = """
def faulty(completion, question):
    if "Finn" in question:
        raise KeyError("gold")
    return 0.0
"""


@pytest.mark.parametrize(
    ("command", "own"),
    [
        (["train", "--config", "quickstart"], ["preflight.on_failure=warn", "run.steps=1"]),
        (["sft", "--config", "sft-quickstart"], ["evaluation.num_questions=8", "training.epochs=1"]),
    ],
    ids=["train", "sft"],
)
def test_a_rewards_error_is_its_sentence_with_the_sample_and_the_traceback_is_in_a_file(
    tmp_path: Path, command: list[str], own: list[str]
):
    (tmp_path / "faulty.py").write_text(FAULTY)
    settings = ["run.dir=run", "rewards=[{function: faulty.py:faulty}]", *own]
    done = call(*command, "--set", *settings, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith(
        "error: Reward faulty raised an exception: KeyError: 'gold' (faulty.py, line 4). This is a bug in the reward"
    )
    assert "  question: '" in done.stderr
    *_, last = done.stderr.splitlines()
    kept = tmp_path / last.removeprefix("The traceback is in ").removesuffix(".")
    assert kept == tmp_path / "run" / "traceback.txt"
    assert 'raise KeyError("gold")' in kept.read_text()


def test_an_evaluation_whose_folder_cannot_be_made_names_the_option_and_exits_with_2(tmp_path: Path):
    (tmp_path / "file").write_text("")
    model = ["--model", str(ROOT / "configs/r1-tiny/base"), "--benchmarks", "probes", "--templates", "none"]
    done = call("evaluate", *model, "--out", "file/below", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out is 'file/below'; it cannot be written to: [Errno 20] Not a directory")
    assert done.stderr.endswith("choose another --out.\n")


def test_a_disk_error_keeps_its_traceback_where_it_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    with pytest.raises(SystemExit) as end, errors_for_users(tmp_path / "gone"):
        raise full
    assert end.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: [Errno 28] No space left on device: 'x'. Free some space, or write elsewhere."
    kept = Path(second.removeprefix("The traceback is in ").removesuffix("."))
    assert kept.parent.name.startswith("grpo-")
    assert "raise full" in kept.read_text()
    with pytest.raises(FileNotFoundError), errors_for_users(tmp_path):
        (tmp_path / "missing").read_text()


def test_a_folder_of_the_librarys_name_hides_it_from_no_process_of_a_run(tmp_path: Path):
    """As beside a clone; for python -m the working directory comes first otherwise, and before an editable installation."""
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/__init__.py").write_text("raise SystemExit('the wrong one')")
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    code = "from grpo.cli import launch; raise SystemExit(launch.run('grpo.cli.train', ['--help'], num_processes=2))"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: train.py" in done.stdout
    assert "the wrong one" not in done.stderr


def test_ctrl_c_while_modules_are_imported_ends_the_process_with_its_exit_code():
    """As some of them do, this one takes the KeyboardInterrupt for a fault of its own."""
    code = """
import os, signal
from grpo.cli import launch
with launch.ending_at_once():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
    except KeyboardInterrupt:
        raise ImportError("cannot load module more than once per process")
"""
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"")
    before = signal.getsignal(signal.SIGINT)
    with launch.ending_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_what_an_encoding_lacks_is_written_in_its_code(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.main(["--help"])
    print("✗ wrong", flush=True)
    assert written.getvalue().endswith(b"\\u2717 wrong\n")


def test_a_stream_that_cannot_be_set_otherwise_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch):
    class Pipe(io.TextIOWrapper):
        def reconfigure(self, **_: object) -> None:
            raise OSError(errno.ESPIPE, "Illegal seek")

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Pipe(written, encoding="ascii"))
    cli.main(["--version"])
    sys.stdout.flush()
    assert written.getvalue().startswith(b"grpo ")
