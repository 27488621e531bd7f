"""Starts the processes of a run on this machine, one for each GPU, and ends as they do; and what each of them does."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from grpo.config import AnyConfig
from grpo.observe.console import errors_for_users
from grpo.run.resumable import other_place
from grpo.system.heartbeat import PEER_LOST
from grpo.system.stopping import EXIT_INTERRUPTED, EXIT_STOPPED, LAUNCHED, SAFE_PATH, SIGNALS, Stopped
from grpo.system.terminal import say

if TYPE_CHECKING:
    from grpo.run.loop import Loop

PATIENCE = 240.0
"""Seconds; a little more than heartbeat takes to tell that all wait for each other."""

PATIENCE_ONCE_LOST = 60.0
"""Seconds, in which all that have missed another's heartbeat have ended."""

LOOK_SECONDS = 0.1

PROCESSES_PER_CORE = 4
"""Most that are started where there is no GPU: more is a slip of the finger, and stops the machine."""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it Ctrl-C ends the process: modules that are imported may take a KeyboardInterrupt for a fault of theirs."""
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_processes(module: str, wanted: int | None) -> None:
    """Run the module in several processes and leave with their exit code, unless one is enough or this is one of them."""
    if "RANK" not in os.environ and (number := num_processes(wanted)) > 1:
        raise SystemExit(run(module, sys.argv[1:], num_processes=number))


def say_other_place(config: AnyConfig, path: str) -> None:
    """Before a run begins anew in one place whose checkpoints lie in another; the first process says it."""
    if os.environ.get("RANK", "0") == "0" and (told := other_place(config, path)) is not None:
        say(told)


def train(make: Callable[[], Loop], module: str) -> int:
    """The exit code of a run, in each of its processes.

    Args:
        make: the trainer; imports what it needs.
        module: that this process runs, for a start in its place.
    """
    with errors_for_users():
        trainer = make()
    from grpo.run.preflight import PreflightRefused
    from grpo.system import distributed

    exit_code = 0
    try:
        with errors_for_users(trainer.directory):
            trainer.train()
    except Stopped as stopped:
        if stopped.settings:  # out of memory: go on in a fresh process, in place of this one
            distributed.leave_environment()
            given = [*sys.argv[1:], "--processes", "1", "--set", *stopped.settings]
            os.execv(sys.executable, [sys.executable, SAFE_PATH, "-m", module, *given])
        exit_code = EXIT_STOPPED
    except PreflightRefused:  # on all processes; what is wrong has been printed
        exit_code = 1
    distributed.stop()  # not after an error: the heartbeat lets the others know of it
    return exit_code


def num_processes(wanted: int | None) -> int:
    """One for each GPU, or one; or as many as are wanted.

    Raises:
        ValueError: there are GPUs, and fewer than that; or there are none, and far fewer cores.
    """
    import torch

    gpus = torch.cuda.device_count()
    if wanted is not None and 0 < gpus < wanted:
        raise ValueError(
            f"--processes is {wanted}; this machine has {gpus} GPU{'s' * (gpus > 1)}, and each process needs one. Set it to "
            f"{gpus} or less."
        )
    cores = os.cpu_count() or 1
    most = PROCESSES_PER_CORE * cores
    if wanted is not None and gpus == 0 and wanted > most:
        raise ValueError(
            f"--processes is {wanted}; this machine has no GPU and {cores} cores, and each process needs one. Set it to {most} "
            "or less."
        )
    return wanted or max(gpus, 1)


def run(module: str, arguments: Sequence[str], *, num_processes: int) -> int:
    """Run a module in that many processes, which find each other; the exit code of the run.

    Every signal that asks for a stop is handed on. Where one fails, the others end by themselves (system/heartbeat.py). Those
    that do not, because they have not met yet or hang, are ended after PATIENCE seconds; those that are frozen are killed
    PATIENCE_ONCE_LOST seconds after another has missed one. Nothing is printed beside what they print.
    """
    environment = {
        **os.environ,
        LAUNCHED: "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    command = [sys.executable, SAFE_PATH, "-m", module, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    heard: list[int] = []

    def hand_on(number: int, _: FrameType | None = None) -> None:
        heard.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}  # first: none may come before it is heard
    try:
        for rank in range(num_processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment | own))
            for number in heard:  # before this process was known
                processes[-1].send_signal(number)
        frozen = _wait(processes, hand_on)
        return exit_code([process.wait() for process in processes if process not in frozen])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], end: Callable[[int], None]
) -> Sequence[subprocess.Popen[bytes]]:
    """Until all have ended, or were made to after the seconds that `run` tells of. Returns who was frozen, and killed."""
    deadlines: list[tuple[float, int]] = []
    lost_at = math.inf
    frozen: list[subprocess.Popen[bytes]] = []
    while None in (codes := [process.poll() for process in processes]):
        now = time.monotonic()
        if not deadlines and any(code not in (None, 0, EXIT_STOPPED) for code in codes):
            deadlines = [(now + PATIENCE, signal.SIGTERM), (now + 2 * PATIENCE, signal.SIGKILL)]
        if deadlines and now > deadlines[0][0]:
            end(deadlines.pop(0)[1])
            deadlines = deadlines or [(math.inf, signal.SIGKILL)]
        if PEER_LOST in codes:
            lost_at = min(lost_at, now)
        if now > lost_at + PATIENCE_ONCE_LOST:
            for process in processes:
                if process.poll() is None and process not in frozen and _is_frozen(process.pid):
                    process.kill()
                    frozen.append(process)
        time.sleep(LOOK_SECONDS)
    return frozen


def _is_frozen(pid: int) -> bool:
    """Whether a signal has stopped a process, as the kernel says. One that ends slowly, such as while it writes, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def exit_code(codes: Sequence[int]) -> int:
    """Of a run, from those of its processes: that of the one that failed, if the others ended because of it."""
    own = sorted((code for code in codes if code not in (0, PEER_LOST)), key=lambda code: code < 0)
    code = own[0] if own else max(codes)  # what a signal has ended comes after what ended by itself
    return 128 - code if code < 0 else code  # as a shell counts a signal


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
