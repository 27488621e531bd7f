"""Commands, several at once over the GPUs of a machine, each with a time limit and a file for what it prints.

Jobs that judge numbers share GPUs, since most of their time is a start; then come those that measure speed, which have theirs to
themselves.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A command. In its words `{out}` is the job's own directory, and `{port}` a free port for its processes."""

    name: str
    command: tuple[str, ...]
    processes: int = 1
    """GPUs that it takes, one for each of its processes."""
    alone: bool = False
    """It measures speed: nothing else runs on its GPUs."""
    seconds: float = 180
    """After so long it is killed, with all that it has started."""
    environment: Mapping[str, str] = field(default_factory=dict)
    typed: str = ""
    """Its standard input."""
    skip: str = ""
    """Why it cannot run here."""


@dataclass(frozen=True)
class Result:
    """What has become of a job."""

    job: Job
    directory: Path
    seconds: float = 0.0
    problem: str = ""
    """Empty if it ended with exit code 0."""

    @property
    def output(self) -> str:
        return log_of(self.directory).read_text(errors="replace")


def log_of(directory: Path) -> Path:
    return directory / "output.txt"


class Pool:
    """The GPUs, each with so many places."""

    def __init__(self, num_gpus: int, places: int) -> None:
        self.places = places
        self.free = [places] * num_gpus

    def needs(self, job: Job) -> int:
        """Places on each of its GPUs."""
        return self.places if job.alone else 1

    def take(self, job: Job) -> list[int] | None:
        """The GPUs with most room; None if there is not enough of it now."""
        fitting = [gpu for gpu, free in enumerate(self.free) if free >= self.needs(job)]
        gpus = sorted(fitting, key=lambda gpu: -self.free[gpu])[: job.processes]
        if len(gpus) < job.processes:
            return None
        for gpu in gpus:
            self.free[gpu] -= self.needs(job)
        return sorted(gpus)

    def give_back(self, job: Job, gpus: Sequence[int]) -> None:
        for gpu in gpus:
            self.free[gpu] += self.needs(job)


@dataclass
class Running:
    job: Job
    directory: Path
    gpus: list[int]
    process: subprocess.Popen[bytes]
    since: float


def in_order(jobs: Sequence[Job]) -> list[list[Job]]:
    """The two phases; in each, what takes longest goes first, and in the second what takes all GPUs goes last."""
    together = [job for job in jobs if not job.alone]
    alone = [job for job in jobs if job.alone]
    return [
        sorted(together, key=lambda job: (-job.processes, -job.seconds)),
        sorted(alone, key=lambda job: (job.processes, -job.seconds)),
    ]


def run(
    jobs: Sequence[Job],
    *,
    devices: Sequence[str],
    places: int,
    out: Path,
    deadline: float = float("inf"),
    threads: int = 1,
) -> Iterator[Result]:
    """Run all jobs and yield each when it has ended.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, one for each GPU; empty strings on a machine without.
        places: jobs that share a GPU.
        deadline: of time.monotonic(); what has not begun by then does not begin.
        threads: of a process's operators on the CPU, where jobs share the machine.
    """
    for phase in in_order([job for job in jobs if not job.skip]):
        pool, waiting, running = Pool(len(devices), places), list(phase), list[Running]()
        with killed_at_the_end(running):
            while waiting or running:
                for job in list(waiting):
                    if time.monotonic() > deadline:
                        waiting.remove(job)
                        yield Result(job, out / job.name, problem="not begun: the time was over")
                    elif gpus := pool.take(job):
                        waiting.remove(job)
                        with signals_later():  # between the two nobody would know of it
                            running.append(start(job, gpus, devices, out / job.name, threads))
                for each in list(running):
                    result = ended(each)
                    if result is not None:
                        running.remove(each)
                        pool.give_back(each.job, each.gpus)
                        yield result
                time.sleep(0.05)


def start(job: Job, gpus: list[int], devices: Sequence[str], directory: Path, threads: int) -> Running:
    """In a session of its own, with a free port; nothing is left of an earlier one in its directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    port = str(free_port())
    command = [word.replace("{out}", str(directory)).replace("{port}", port) for word in job.command]
    typed = directory / "typed.txt"
    typed.write_text(job.typed)
    with log_of(directory).open("wb") as log, typed.open("rb") as stdin:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(job, [devices[gpu] for gpu in gpus], port, threads),
            stdin=stdin,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(job, directory, gpus, process, time.monotonic())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(job: Job, devices: Sequence[str], port: str, threads: int) -> dict[str, str]:
    """This one's, less the process group that it may describe; the packages are those of this checkout."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "CUBLAS_WORKSPACE_CONFIG")
    ours = {name: value for name, value in os.environ.items() if name not in group}
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [ours.get("PYTHONPATH")])]
    ours |= {
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    if not job.alone:
        ours["OMP_NUM_THREADS"] = str(threads)
    return ours | dict(job.environment)


def ended(running: Running) -> Result | None:
    """What has become of it; None while it runs."""
    job, code, seconds = running.job, running.process.poll(), time.monotonic() - running.since
    if code is None and seconds < job.seconds:
        return None
    if code is None:
        kill(running.process)
        problem = f"killed after its {job.seconds:g} s"
    else:
        problem = f"exit code {code}" if code else ""
    return Result(job, running.directory, seconds, problem)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started: a launcher's workers have sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for act in (lambda: os.killpg(process.pid, signal.SIGKILL), *(child.kill for child in family)):
        _if_it_is_there(act)
    process.wait()


def _if_it_is_there(act: Callable[[], None]) -> None:
    try:
        act()
    except (ProcessLookupError, psutil.NoSuchProcess):
        return


@contextmanager
def signals_later() -> Iterator[None]:
    """Within it no handler of SIGTERM or SIGINT interrupts; the first of these signals is sent again behind it."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            os.kill(os.getpid(), caught[0])


@contextmanager
def killed_at_the_end(running: list[Running]) -> Iterator[None]:
    """Nothing goes on when whoever asked for it has been interrupted."""
    try:
        yield
    finally:
        for each in running:
            kill(each.process)
