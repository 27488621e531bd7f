"""A fork of a parent that has imported everything is, to a test, a Python process: output, exit code, signals, environment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from helpers import ROOT, clean_environment, launch


def run(code: str, *arguments: str, **variables: str):
    return warm.run(["-c", code, *arguments], timeout=30, env={**clean_environment(), **variables})


@pytest.mark.parametrize(
    ("code", "returncode"),
    [
        ("print(1)", 0),
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('why')", 1),
        ("def f():\n    1 / 0\nf()", 1),
        ("import sys; sys.excepthook = lambda *_: print('hook'); 1 / 0", 1),
        ("import sys; print(sys.argv)", 0),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.kill(os.getpid(), 2)", -2),
        ("import os; os._exit(3)", 3),
        ("import atexit; atexit.register(print, 'last'); print('first')", 0),
        (
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\nprint(1)",
            0,
        ),
        ("import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); sys.stdout.write('lost')", 120),
    ],
)
def test_a_fork_prints_and_ends_as_python_does(code: str, returncode: int):
    command = ["-c", code, "an", "--option"]
    started = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=30, env=clean_environment()
    )
    forked = warm.run(command, timeout=30, env=clean_environment())
    if returncode == 120 and "PYTHONUNBUFFERED" in os.environ:  # then it is the call itself that fails
        returncode = 1
    assert (started.returncode, forked.returncode) == (returncode, returncode)
    assert forked.stdout == started.stdout
    assert forked.stderr == started.stderr or returncode == 120, "at its end Python says that it could not write, too"


SHOWS = """
import json, os, signal, sys, threading
handlers = {n.name: repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)}
print(json.dumps({
    "environment": dict(os.environ), "handlers": handlers, "argv": sys.argv, "name": __name__, "path": sys.path,
    "cwd": os.getcwd(), "threads": threading.active_count(), "wakeup": signal.set_wakeup_fd(-1),
    "open": sorted(os.listdir("/proc/self/fd"))[:-1], "mask": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "tests": [name for name in sys.modules if name.partition(".")[0] in ("helpers", "conftest")],
}))
"""


def test_a_fork_has_what_a_process_of_its_own_has(tmp_path: Path):
    """The same script, in both; but for file descriptors that packages hold open, and grpo, which the next test is about."""
    (tmp_path / "shows.py").write_text(SHOWS)
    arguments = [str(tmp_path / "shows.py"), "--option"]
    environment = {**clean_environment(), "PYTHONPATH": "/one:/two", "OWN": "value"}
    forked = warm.run(arguments, timeout=30, env=environment, cwd=tmp_path)
    started = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=30, env=environment, cwd=tmp_path
    )
    ours, theirs = json.loads(forked.stdout), json.loads(started.stdout)
    del ours["open"], theirs["open"]
    assert ours == theirs


def test_a_fork_has_the_grpo_that_its_path_leads_to(tmp_path: Path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/__init__.py").touch()
    code = "import sys; print('grpo.trainer' in sys.modules); import grpo; print(grpo.__file__)"
    for place, is_ready in ((ROOT, not torch.cuda.is_available()), (tmp_path, False)):
        environment = {**clean_environment(), "PYTHONPATH": str(place)}
        done = warm.run(["-c", code], timeout=30, env=environment, cwd=tmp_path / "grpo")
        assert done.stdout.split() == [str(is_ready), str(place / "grpo/__init__.py")]


def test_a_process_can_be_spoken_to_waited_for_and_signalled():
    code = "print(input(), flush=True)\nimport time\ntime.sleep(60)"
    with warm.Process(["-c", code], stdin=warm.PIPE, stdout=warm.PIPE, stderr=warm.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == "hello\n"
        assert process.poll() is None
        with pytest.raises(TimeoutError):
            process.wait(timeout=0.1)
        os.kill(process.pid, 0)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
        process.kill()  # does nothing
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_what_is_read_when_packages_are_imported_cannot_be_changed():
    with pytest.raises(ValueError, match=r"OMP_NUM_THREADS is '3'; a fork of tests/warm\.py has what it had"):
        run("", OMP_NUM_THREADS="3")


def test_a_run_that_does_not_end_is_killed_and_what_it_said_is_shown():
    with pytest.raises(AssertionError, match=r"did not end within 3 s:\nrank 0: begun"):
        warm.run(["-c", "print('begun', flush=True)\nimport time\ntime.sleep(60)"], timeout=3)


def test_a_rank_that_fails_ends_the_others_and_its_output_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm, "GRACE_SECONDS", 1.0)
    (tmp_path / "worker.py").write_text(
        "import os, sys, time\n"
        "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], flush=True)\n"
        "if os.environ['RANK'] == '1':\n    raise RuntimeError('broken here')\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(AssertionError) as failed:
        launch(str(tmp_path / "worker.py"), processes=2, timeout=30)
    said = str(failed.value)
    assert "rank 0:\nrank 0 of 2" in said
    assert "RuntimeError: broken here" in said


HANGS = """
import sys, threading, time
import cloudpickle
from grpo.scoring.worker import Call
from grpo.scoring.worker_pool import WorkerPool

def hang(path):
    import os, time
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {os.getppid()}")
    os.rename(path, path + ".whole")
    time.sleep(60)

pool = WorkerPool([cloudpickle.dumps(hang)], files=[], num_workers=1, memory_gib=1.0)
print(pool._workers[0].process.__class__.__module__, flush=True)
pool.run([Call(0, {"path": sys.argv[1]}, 60.0)])
"""


def test_a_reward_worker_that_is_a_fork_ends_with_its_run_even_in_the_middle_of_a_call(tmp_path: Path):
    written = tmp_path / "pids.whole"
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    with warm.Process(["-c", HANGS, str(tmp_path / "pids")], env=environment, stdout=warm.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == ("subprocess\n" if torch.cuda.is_available() else "graders\n")
        while not written.exists():
            time.sleep(0.01)
        worker, keeper = map(int, written.read_text().split())
        process.kill()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in (worker, keeper)) and time.monotonic() < until:
        time.sleep(0.01)
    assert [pid for pid in (worker, keeper) if Path(f"/proc/{pid}").exists()] == []
