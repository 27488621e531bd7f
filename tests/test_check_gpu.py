"""What `make gpu` would run is valid, the runner keeps its promises, and a wrong result is a failure."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from gpu import jobs
from gpu.checks import CHECKS, QUICKSTART, Check, Failed, Machine, eight_bit_judge, learns_judge, sound, zero_judge
from gpu.figures import Figure, at_equal_yardstick, documented, gain, table
from gpu.jobs import Job, Result, in_order, log_of, run
from helpers import ROOT, clean_environment

from grpo.config import Config

sys.path.insert(0, str(ROOT / "scripts"))
from check_gpu import judged

MACHINES = {
    "1 x H200": Machine(num_gpus=1, gib=140),
    "2 x H200": Machine(num_gpus=2, gib=140),
    "8 x H100": Machine(num_gpus=8, gib=79),
    "a real model": Machine(num_gpus=2, gib=140, model=QUICKSTART / "model", train=QUICKSTART / "test.jsonl"),
    "a rehearsal": Machine(num_gpus=2, gib=80, on_cpu=True),
}


def check_gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/check_gpu.py", *options]
    return subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False
    )


# ---- the checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES)
def test_every_command_is_of_a_script_that_exists_with_settings_that_are_valid(machine: str):
    jobs = [job for check in CHECKS for job in check.jobs(MACHINES[machine])]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        scripts = [word for word in job.command if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts) or job.skip, job.command
        assert job.skip or 1 <= job.processes <= MACHINES[machine].num_gpus
        if "--config" in job.command and "--set" in job.command:
            settings = [word.replace("{out}", "here") for word in job.command[job.command.index("--set") + 1 :]]
            config = Config.load(ROOT / job.command[job.command.index("--config") + 1], settings)
            config.check_world_size(job.processes)


def test_no_two_jobs_are_told_the_same_port_or_directory(tmp_path: Path):
    jobs = [Job(f"a/{n}", (sys.executable, "-c", "print('{out}', '{port}')")) for n in range(4)]
    said = [result.output for result in run(jobs, devices=[""], places=4, out=tmp_path)]
    assert len({line.split()[0] for line in said}) == len({line.split()[1] for line in said}) == 4


def test_nothing_of_an_earlier_run_is_taken_for_this_ones(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.jsonl").write_text("old")
    (result,) = run([Job("a", (sys.executable, "-c", ""))], devices=[""], places=1, out=tmp_path)
    assert sorted(path.name for path in result.directory.iterdir()) == ["output.txt", "typed.txt"]


def test_the_list_needs_no_gpu():
    done = check_gpu("--list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [check.name for check in CHECKS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "zeros"], "--only has 'zeros'; there is pytest, engines"),
        (["--data", "configs", "--cpu"], "--data is 'configs'; it has no effect"),
        (["--model", "nowhere"], "--model is 'nowhere'; there is no such"),
        ([], "there is no GPU here that torch can use"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = check_gpu(*options)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_a_rehearsal_without_a_gpu_leaves_a_table_and_what_was_printed(tmp_path: Path):
    done = check_gpu("--cpu", "--only", "chat", "pytest", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| pytest | skipped | 1 | 0 | pytest: needs a GPU |" in lines
    assert any(re.fullmatch(r"\| chat \| passed \| 1 \| \d+ \|  \|", line) for line in lines)
    assert "<answer>" in (tmp_path / "chat/output.txt").read_text()
    checks = {check["name"]: check for check in json.loads((tmp_path / "table.json").read_text())["checks"]}
    assert checks["chat"]["jobs"][0]["command"][1] == "scripts/chat.py"


# ---- the runner --------------------------------------------------------------------------------------------------------

SHOW = (
    "import os, sys, time; print(time.time(), os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.3); print(time.time())"
)


MEET = "open(f'{sys.argv[1]}/{os.getpid()}', 'w').close(); exec('while len(os.listdir(sys.argv[1])) < 4: time.sleep(0.01)')"
"""Wait for all four, which must run at once."""


def spans(results: list[Result]) -> dict[str, tuple[float, float, list[str]]]:
    """From when to when each ran, and on which GPUs."""
    said = {result.job.name: result.output.split() for result in results}
    return {name: (float(words[0]), float(words[2]), words[1].split(",")) for name, words in said.items()}


def test_jobs_share_a_gpu_unless_they_measure_speed(tmp_path: Path):
    command, meeting = (sys.executable, "-c", SHOW), tmp_path / "meeting"
    meeting.mkdir()
    together = (sys.executable, "-c", SHOW.replace("time.sleep(0.3)", MEET), str(meeting))
    shared = [Job(f"shared{n}", together) for n in range(3)] + [Job("both", together, processes=2)]
    alone = [Job(f"alone{n}", command, alone=True) for n in range(3)] + [Job("all", command, processes=2, alone=True)]
    results = list(run([*alone, *shared], devices=["4", "7"], places=4, out=tmp_path))
    assert [result.problem for result in results] == [""] * 8
    ran = spans(results)
    assert ran["both"][2] == ran["all"][2] == ["4", "7"]
    of = {name: set(gpus) for name, (_, _, gpus) in ran.items()}
    for a in ran:
        for b in ran:
            overlap = a != b and of[a] & of[b] and ran[a][0] < ran[b][1] and ran[b][0] < ran[a][1]
            assert not overlap or {a, b} <= {"shared0", "shared1", "shared2", "both"}, (a, b)
    assert max(ran[job.name][1] for job in shared) < min(ran[job.name][0] for job in alone)


def test_the_order_is_what_takes_longest_first_and_all_gpus_last_where_speed_is_measured():
    jobs = [Job("short", (), seconds=10), Job("long", (), seconds=90), Job("wide", (), processes=2, seconds=20)]
    alone = [replace(job, name=f"{job.name} alone", alone=True) for job in jobs]
    together, measured = in_order([*alone, *jobs])
    assert [job.name for job in together] == ["wide", "long", "short"]
    assert [job.name for job in measured] == ["long alone", "short alone", "wide alone"]


def test_a_job_over_its_limit_is_killed_with_all_that_it_started(tmp_path: Path):
    start = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    code = f"import subprocess, sys, time; print({start}.pid, flush=True); time.sleep(600)"
    began = time.monotonic()
    (result,) = run([Job("hangs", (sys.executable, "-c", code), seconds=5)], devices=[""], places=1, out=tmp_path)
    assert result.problem == "killed after its 5 s"
    assert time.monotonic() - began < 30
    child = int(result.output)
    while is_alive(child):  # a killed process takes its time to end
        assert time.monotonic() - began < 40
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_runs_is_killed_when_the_caller_leaves(tmp_path: Path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    jobs = [Job("ends", (sys.executable, "-c", "")), Job("hangs", (sys.executable, "-c", code))]
    results = run(jobs, devices=[""], places=2, out=tmp_path)
    assert next(results).job.name == "ends"
    log = tmp_path / "hangs/output.txt"
    while not log.read_text():
        time.sleep(0.05)
    results.close()
    pid = int(log.read_text())
    assert not psutil.pid_exists(pid)


def test_a_signal_that_comes_twice_leaves_nothing_behind(tmp_path: Path):
    """As `timeout` sends it: to the program, and to its group."""
    command = [sys.executable, "scripts/check_gpu.py", "--cpu", "--only", "sample", "chat", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=clean_environment())
    while len(family := psutil.Process(process.pid).children(recursive=True)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.terminate()
    assert process.wait(60) == 143
    _, alive = psutil.wait_procs(family, timeout=10)  # what was killed takes a moment to be gone
    assert alive == []


def test_a_signal_while_a_job_is_started_is_heard_when_it_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[int] = []

    def popen(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(*words, **options)
        started.append(process.pid)
        os.kill(os.getpid(), signal.SIGTERM)  # before anybody has been told of it
        return process

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit):
            list(
                run(
                    [Job("a", (sys.executable, "-c", "import time; time.sleep(60)"))],
                    devices=[""],
                    places=1,
                    out=tmp_path,
                )
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    (pid,) = started
    assert not psutil.pid_exists(pid)


def test_nothing_begins_after_the_deadline_and_it_is_said(tmp_path: Path):
    jobs = [Job("late", (sys.executable, "-c", ""))]
    (result,) = run(jobs, devices=[""], places=1, out=tmp_path, deadline=time.monotonic() - 1)
    assert result.problem == "not begun: the time was over"


def test_an_exit_code_fails_its_check_and_a_job_that_cannot_run_is_skipped(tmp_path: Path):
    check = Check("a", "", lambda machine: ())
    bad = Result(Job("a/1", ()), tmp_path, 1.0, "exit code 3")
    without = Result(Job("a/2", (), skip="vllm is not installed"), tmp_path)
    assert judged(check, [bad]).verdict == "failed"
    assert judged(check, [without]).verdict == "skipped"
    good = judged(check, [replace(bad, problem=""), without])
    assert (good.verdict, good.why) == ("passed", "a/2: vllm is not installed")


def test_output_that_cannot_be_read_is_a_failure(tmp_path: Path):
    check = Check("a", "", lambda machine: (), lambda results: [Figure("x", float(results["a"].output), "s")])
    outcome = judged(check, [Result(Job("a", ()), tmp_path)])
    assert outcome.verdict == "failed"
    assert "cannot be read: FileNotFoundError" in outcome.why


# ---- what is made of the results -----------------------------------------------------------------------------------------

STEP = {
    "step": 1, "optimizer/loss": 0.0, "optimizer/skipped": 0.0, "optimizer/grad_norm": 0.2, "policy/entropy": 0.2,
    "policy/sampling_gap": 0.005, "reward/mean": 0.4, "reward/accuracy": 0.1,
}  # fmt: skip


def ran(directory: Path, name: str, rows: list[dict[str, Any]]) -> Result:
    (directory / name / "run").mkdir(parents=True)
    (directory / name / "run/metrics.jsonl").write_text("".join(json.dumps(STEP | row) + "\n" for row in rows))
    return Result(Job(name, ()), directory / name)


def test_a_step_without_a_gap_is_sound_only_where_all_its_tokens_are_old(tmp_path: Path):
    row = {"step": 1, "optimizer/loss": 0.0, "optimizer/skipped": 0}
    (tmp_path / "run").mkdir()
    result = Result(Job("turns/a", ()), tmp_path)
    for extra, is_sound in (
        ({}, False),
        ({"rollout/staleness": 0.5}, False),
        ({"rollout/staleness": 1.0}, True),
        ({"policy/sampling_gap": 0.01}, True),
    ):
        (tmp_path / "run/metrics.jsonl").write_text(json.dumps(row | extra) + "\n")
        if is_sound:
            assert len(sound(result)) == 1
        else:
            with pytest.raises(Failed, match=r"turns/a: step 1: policy/sampling_gap inf, limit 0.04"):
                sound(result)


def test_8_bits_that_are_no_faster_fail_on_a_gpu_alone(tmp_path: Path):
    lines = "native: 9 tokens in 1.00 s = 28,000 tokens/s\nnative, 8 bits: 9 tokens in 1.00 s = {:,} tokens/s\n"
    for device, rate, passes in (("NVIDIA H200", 39_000, True), ("NVIDIA H200", 30_000, False), ("CPU", 20_000, True)):
        log_of(tmp_path).write_text(f"{device}, torch\n" + lines.format(rate))
        results = {"8-bit": Result(Job("8-bit", ()), tmp_path)}
        if passes:
            assert [each.value for each in eight_bit_judge(results)] == [28_000, rate]
        else:
            with pytest.raises(Failed, match=r"8-bit: not 1.2 times as fast"):
                eight_bit_judge(results)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"optimizer/grad_norm": 0.21}, "optimizer/grad_norm 0.21, of zero/full 2 ZeRO-0 0.2"),
        ({"optimizer/grad_norm": float("nan")}, "optimizer/grad_norm not finite"),
        ({"policy/sampling_gap": 0.05}, "sampling_gap 0.05, limit 0.04"),
        ({"optimizer/skipped": 1.0}, "an update was left out"),
    ],
)
def test_a_zero_stage_that_differs_is_found(tmp_path: Path, change: dict[str, float], problem: str):
    rows = {"zero/full 2 ZeRO-0": {}, "zero/full 2 ZeRO-3": change, "zero/LoRA 2 ZeRO-0": {"optimizer/grad_norm": 9.0}}
    results = {name: ran(tmp_path, name, [row]) for name, row in rows.items()}
    if problem:
        with pytest.raises(Failed, match=problem):
            zero_judge(results)
    else:
        assert [figure.name for figure in zero_judge(results)][-1] == "gradient norm, ZeRO stages apart"


@pytest.mark.parametrize(("end", "passes"), [(0.9, True), (0.5, False)])
def test_a_run_that_does_not_learn_fails(tmp_path: Path, end: float, passes: bool):
    rows = [{"step": n, "reward/accuracy": 0.1 if n < 20 else end} for n in range(40)]
    results = {f"learns/{name}": ran(tmp_path, f"learns/{name}", rows) for name in ("full", "LoRA", "offload")}
    if passes:
        assert learns_judge(results)[-1].value == pytest.approx(end)
    else:
        with pytest.raises(Failed, match=r"accuracy 0\.100 at first, 0\.500 at the end"):
            learns_judge(results)


def test_a_slow_host_does_not_read_as_a_regression():
    """Step 5.4 s where 2.7 s are documented: half as fast. The card at 339 of 678 TFLOP/s is so, too; at 678, it is ours."""
    step = Figure("step 0.5b", 5.4, "s", "matrix rate")
    assert gain(step) == pytest.approx(0.5)
    for rate, left in ((339.0, 1.0), (678.0, 0.5)):
        figures = {each.name: each for each in (step, Figure("matrix rate", rate, "TFLOP/s"))}
        assert at_equal_yardstick(step, figures) == pytest.approx(left)
    assert at_equal_yardstick(step, {}) is None
    assert gain(Figure("no such", 1.0, "s")) is None


def test_the_table_has_each_figure_beside_the_documented_one(tmp_path: Path):
    check = Check("card", "", lambda machine: (), lambda results: [Figure("matrix rate", 339.0, "TFLOP/s")])
    written = table([judged(check, [Result(Job("card", ()), tmp_path, 2.0)])], "1 x H200")
    assert "| card | passed | 1 | 2 |  |" in written
    assert "| matrix rate | 339 TFLOP/s | 678 TFLOP/s | 0.50 |  |  |" in written


def test_the_documented_figures_are_those_of_the_documentation():
    lines = (ROOT / "docs/performance.md").read_text().splitlines()
    for name, known in documented().items():
        places = [line for line in lines if known["row"] in line and known["text"] in line]
        assert places, f"{name}: no line of docs/performance.md has {known['row']!r} and {known['text']!r}"
        numbers = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", known["text"])]
        low, high = min(numbers), max(numbers)
        assert any(known["value"] in (number, 1000 * number) for number in numbers) or low <= known["value"] <= high, (
            name
        )


def test_the_makefile_takes_the_python_of_the_environment_where_there_is_no_venv(tmp_path: Path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())

    def would_run() -> str:
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", "gpu", "ARGS=--list"],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if "MAKE" not in name},  # of one that runs this test
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert would_run() == "python scripts/check_gpu.py --list"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert would_run() == ".venv/bin/python scripts/check_gpu.py --list"
