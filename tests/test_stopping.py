"""What asks a process to stop, and what happens if it cannot."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT, clean_environment, tiny_config

from grpo import Trainer
from grpo.policy.model_source import complete_checkpoints, name_of
from grpo.system.stopping import EXIT_STOPPED, SIGNALS, Stopped, StopRequest
from grpo.types import MicroBatch


@contextmanager
def started(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this code, which says "ready" when it is."""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=clean_environment()) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


STUCK_IN_C = """
import ctypes
from grpo.system.stopping import StopRequest
mutex = ctypes.create_string_buffer(64)  # zeros are an open one
lock = ctypes.CDLL(None).pthread_mutex_lock  # which no signal interrupts
with StopRequest(None):
    lock(mutex)
    print("ready", flush=True)
    lock(mutex)
"""


def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck_in_c():
    with started(STUCK_IN_C) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT
        assert process.stderr is not None
        assert process.stderr.read() == "SIGTERM: saving, then stopping; a second signal stops at once\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_each_of_these_signals_is_a_request_to_stop(number: signal.Signals):
    before = signal.getsignal(number)
    with StopRequest(None) as stopping:
        assert stopping.reason is None
        assert stopping.abortable(lambda: os.kill(os.getpid(), number) or time.sleep(60)) is None
        assert stopping.reason == number.name
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_the_end_of_a_jobs_time_save_the_run(tmp_path: Path, number: signal.Signals):
    trainer = Trainer(tiny_config(tmp_path / "run", algorithm={"kl_coef": 0.0, "num_minibatches": 2}))
    own = trainer._optimizer_step

    def step(minibatch: list[MicroBatch]) -> None:
        os.kill(os.getpid(), number)
        own(minibatch)

    trainer._optimizer_step = step
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert (stopped.value.code, stopped.value.reason) == (EXIT_STOPPED, number.name)
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == [name_of(0, 1)]


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(None) as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_a_fork_is_none_to_its_parent():
    with StopRequest(None) as stopping:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.5)
        assert stopping.reason is None


PRINTS = """
import time
from grpo.system.stopping import StopRequest
with StopRequest(None) as stopping:
    print("ready", flush=True)
    while stopping.reason is None:
        time.sleep(0.01)
    time.sleep(2)
    print("still here", flush=True)
    raise SystemExit(75)
"""


def test_a_reader_that_has_gone_does_not_make_what_is_printed_while_saving_an_error():
    with started(PRINTS) as process:  # as in `... | tee log`, where Ctrl-C ends both
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 75


# ---- launchers -------------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision=no"],
    "torchrun or accelerate": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize(
    ("launcher", "number"), [("accelerate", signal.SIGTERM), ("torchrun or accelerate", signal.SIGKILL)]
)
def test_the_death_of_the_launcher_is_a_request_to_stop(tmp_path: Path, launcher: str, number: signal.Signals):
    script = [str(ROOT / "tests/worker_launcher.py"), str(tmp_path), "120"]
    processes = 1 if launcher == "accelerate" else 2
    with background([sys.executable, "-m", *LAUNCHERS[launcher], *script]) as process:
        pids = [wait_for(tmp_path / f"{rank}.pid") for rank in range(processes)]
        assert {int(pid.split()[1]) for pid in pids} == {process.pid}
        process.send_signal(number)
        process.wait()
        told = [wait_for(tmp_path / f"{rank}.stopped") for rank in range(processes)]
        assert told == [repr(f"the launcher ({launcher}) has ended")] * processes


def test_the_end_of_a_shell_that_started_a_run_in_the_background_is_none(tmp_path: Path):
    script = (
        f"{sys.executable} tests/worker_launcher.py {tmp_path} 4 &\nuntil [ -e {tmp_path}/0.pid ]; do sleep 0.1; done"
    )
    with background(["bash", "-c", script]) as shell:
        shell.wait(timeout=100)
        assert int(wait_for(tmp_path / "0.pid").split()[1]) == shell.pid
        assert wait_for(tmp_path / "0.stopped") == "None"


@contextmanager
def background(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left afterwards."""
    environment = {**clean_environment(), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        for line in subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True).stdout.splitlines()[1:]:
            pid, session = map(int, line.split())
            if session == process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for(path: Path, seconds: float = 120) -> str:
    until = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until, f"no {path.name} came"
        time.sleep(0.1)
    return path.read_text()
