"""Started by test_heartbeat: in each scenario something happens to one of three processes while the others wait for it.

All are forked from one process that has imported torch, and no launcher watches them. ends.json says what became of each.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import free_port

from grpo.system import heartbeat, progress
from grpo.system.distributed import Processes
from grpo.system.stopping import StopRequest

LIMIT = 4.0  # seconds
LIMITS = heartbeat.Limits(beat=LIMIT / 10, silence=LIMIT, stall=1.5 * LIMIT, stop=0.5 * LIMIT)
LONG = 3 * LIMIT  # twice what a stall takes
NUM_PROCESSES = 3
OUT = Path(sys.argv[1])


def wait_for_all(rank: int) -> None:
    """In C, without the GIL, as for a collective of NCCL, which gets no error when a process dies."""
    dist.all_reduce(torch.zeros(1))


def wait_in_c(rank: int) -> None:
    ctypes.CDLL(None).sleep(60)


def fails(rank: int, *, victim: int = 1) -> None:
    if rank == victim:
        raise RuntimeError("the reward number_in_text is broken\nand says so at length")
    wait_in_c(rank)


def all_fail(rank: int) -> None:
    raise FloatingPointError("the loss of step 1 is nan")


def store_fails_in_finally(rank: int) -> None:
    try:
        fails(rank, victim=0)
    finally:
        heartbeat.stop()


def one_is_slow(rank: int) -> None:
    if rank == 1:
        ctypes.CDLL(None).sleep(int(3 * LIMIT))
    wait_for_all(rank)


def one_stays(rank: int) -> None:
    """All leave and meet again; then rank 2 goes on for longer than the limit without the others, at last without the store."""
    heartbeat.stop()
    heartbeat.start(rank=rank, world_size=NUM_PROCESSES, limits=LIMITS)
    if rank == 2:
        time.sleep(3.5 * LIMIT)
    heartbeat.stop()
    if rank == 0:
        time.sleep(0.5 * LIMIT)


def sleep_and_meet(rank: int) -> None:
    time.sleep(1)
    wait_for_all(rank)


def hears_of(pid: int) -> Path:
    """There once the process handles signals."""
    return OUT / f"{pid}.hears"


def gather_once_less(rank: int) -> None:
    """As a trainer whose processes differ in the number of passes: one is in the next phase, and in another collective."""
    others = dist.new_group([0, 1, 2])
    with StopRequest(None) as stopping:
        hears_of(os.getpid()).touch()
        if rank == 2:
            with progress.phase("saving"):
                stopping.abortable(lambda: dist.barrier(group=others))
        with progress.phase("update"):
            everyone(rank).sum(1.0)


def work_before_they_meet(work: Callable[[], None]) -> Callable[[int], None]:
    """Of rank 1 alone, within the package, while the others wait in a collective of the package's."""

    def body(rank: int) -> None:
        if rank == 1:
            StopRequest(None).abortable(work)
        everyone(rank).sum(1.0)

    return body


def draw_tokens() -> None:
    """A rollout that takes long: it is always found at the same place, but counts its tokens."""
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        ctypes.CDLL(None).usleep(100_000)
        progress.tick()


def write_a_file() -> None:
    """A single call that takes long."""
    with progress.busy("writing model.safetensors"):
        ctypes.CDLL(None).sleep(int(LONG))


def read_source_slowly(rank: int) -> None:
    """The line of code that a process says it waits in comes from a file, here on a disk that does not answer."""
    linecache.getline = lambda filename, lineno: str(ctypes.CDLL(None).sleep(int(LONG)))
    StopRequest(None).abortable(draw_tokens)
    everyone(rank).sum(1.0)


def own_code(rank: int) -> None:
    """A script that steps a trainer by hand, and does something else between two steps."""
    if rank == 1:
        ctypes.CDLL(None).sleep(int(LONG))
    everyone(rank).sum(1.0)


def everyone(rank: int) -> Processes:
    return Processes(rank, NUM_PROCESSES, torch.device("cpu"))


@dataclass(frozen=True)
class Scenario:
    """What each process does, and what is then done to one of them, or to all."""

    body: Callable[[int], None]
    victim: int | None = None
    blow: signal.Signals | None = None
    asked: int | None = None  # to stop, by SIGTERM
    at_once: bool = False  # Python takes many seconds to take itself down; not here


def waiting_for(victim: int) -> Callable[[int], None]:
    return lambda rank: wait_in_c(rank) if rank == victim else wait_for_all(rank)


SCENARIOS = {
    "killed": Scenario(wait_in_c, 1, signal.SIGKILL),
    "killed in a collective": Scenario(waiting_for(1), 1, signal.SIGKILL),
    "frozen": Scenario(waiting_for(2), 2, signal.SIGSTOP),
    "store killed": Scenario(wait_in_c, 0, signal.SIGKILL),
    "store frozen": Scenario(wait_in_c, 0, signal.SIGSTOP),
    "fails": Scenario(fails),
    "store fails in finally": Scenario(store_fails_in_finally),
    "all fail": Scenario(all_fail),
    "one is slow": Scenario(one_is_slow, at_once=True),
    "one stays": Scenario(one_stays, at_once=True),
    "all frozen for a while": Scenario(sleep_and_meet, None, signal.SIGSTOP, at_once=True),
    "never joined": Scenario(gather_once_less),
    "never joined, and asked to stop": Scenario(gather_once_less, asked=1),
    "one draws tokens": Scenario(work_before_they_meet(draw_tokens), at_once=True),
    "one writes a file": Scenario(work_before_they_meet(write_a_file), at_once=True),
    "source on a slow disk": Scenario(read_source_slowly, at_once=True),
    "one is in its own code": Scenario(own_code, at_once=True),
}


def be(rank: int, name: str, port: int) -> None:
    """One of a scenario's processes; returns to the end of the script, as a script's own work does."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_PROCESSES), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.open(OUT / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    dist.init_process_group("gloo")
    heartbeat.start(rank=rank, world_size=NUM_PROCESSES, limits=LIMITS)
    dist.barrier()
    (OUT / f"{name}-{rank}.ready").touch()
    SCENARIOS[name].body(rank)
    heartbeat.stop()
    if SCENARIOS[name].at_once:
        os._exit(0)


def fork_all() -> dict[str, list[int]]:
    """The pids of each scenario's processes, which return from here as well, but with nothing."""
    pids: dict[str, list[int]] = {}
    ports: set[int] = set()
    while len(ports) < len(SCENARIOS):
        ports.add(free_port())
    for name, port in zip(SCENARIOS, ports, strict=True):
        pids[name] = []
        for rank in range(NUM_PROCESSES):
            pids[name].append(os.fork())
            if pids[name][rank] == 0:
                be(rank, name, port)
                return {}
    return pids


def watch(name: str, pids: list[int]) -> list[dict[str, float]]:
    """Strike once all are ready; the exit code of each process, and the seconds until then."""
    while len(list(OUT.glob(f"{name}-*.ready"))) < len(pids):
        time.sleep(0.05)
    started = time.monotonic()
    strike(SCENARIOS[name], pids)
    ends: list[dict[str, float]] = [{} for _ in pids]
    others = [rank for rank in range(len(pids)) if rank != SCENARIOS[name].victim]
    while time.monotonic() < started + 8 * LIMIT and not all(ends[rank] for rank in others):
        for rank in others:
            if not ends[rank] and (ended := os.waitpid(pids[rank], os.WNOHANG))[0]:
                ends[rank] = {"code": os.waitstatus_to_exitcode(ended[1]), "seconds": time.monotonic() - started}
        time.sleep(0.02)
    for rank, pid in enumerate(pids):
        if not ends[rank]:
            os.kill(pid, signal.SIGKILL)
    return ends


def strike(scenario: Scenario, pids: list[int]) -> None:
    if scenario.asked is not None:
        while not hears_of(pids[scenario.asked]).exists():
            time.sleep(0.02)
        os.kill(pids[scenario.asked], signal.SIGTERM)
    if scenario.blow is None:
        return
    for pid in pids if scenario.victim is None else [pids[scenario.victim]]:
        os.kill(pid, scenario.blow)
    if scenario.victim is None:
        time.sleep(1.5 * LIMIT)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


pids = fork_all()
if pids:
    with ThreadPoolExecutor(len(pids)) as pool:
        watched = dict(zip(pids, pool.map(watch, pids, pids.values()), strict=True))
    (OUT / "ends.json").write_text(json.dumps(watched))
