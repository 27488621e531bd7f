"""Functions called in processes that can be killed: both ends of the pipe.

The parent keeps a pool of workers, sends each a chunk of calls and gets the results back one by one, so that a time
limit holds for every single call. A worker that exceeds it is killed and replaced. The worker is this file run as a
script; it imports the standard library and what the functions import, and nothing else (no torch), and sees no GPU.

    parent -> worker    once: import path, source files, functions, memory limit; then lists of (function, arguments)
    worker -> parent    ("ready", None) or ("broken", traceback); then per call ("value", result), ("bug", traceback)
                        or ("memory", None)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_end
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Literal

START_SECONDS = 120.0  # for importing the functions' modules, with every other worker of the machine doing the same
MAX_CHUNK = 64  # calls sent at once: enough to hide the round trip, few enough to share the tail

_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # a reward that iterates over a set gives the same value after a resume
}


# ---- the parent's end ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call to make: which of the pool's functions, with what, and for how long at most."""

    function: int
    arguments: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    It returned `value`; or its worker was killed for time ("timeout"), or died or ran out of memory ("crash").
    """

    kind: Literal["value", "timeout", "crash"]
    value: Any = None
    seconds: float = 0.0  # until it ended


@dataclass(frozen=True)
class SourceFile:
    """A module that no import statement finds; `text` is what its file held when the parent loaded it."""

    module: str
    path: str
    text: str

    def load(self) -> types.ModuleType:
        """Run the text as a module of that name."""
        module = types.ModuleType(self.module)
        module.__file__ = self.path
        sys.modules[self.module] = module
        exec(compile(self.text, self.path, "exec"), module.__dict__)
        return module


class FunctionBug(Exception):
    """A call raised an exception: the number of the call, and the worker's traceback."""

    def __init__(self, call: int, worker_traceback: str) -> None:
        super().__init__(worker_traceback)
        self.call = call
        self.worker_traceback = worker_traceback


class WorkerPool:
    """Worker processes that all know the same functions."""

    def __init__(self, functions: list[bytes], *, files: list[SourceFile], num_workers: int, memory_gib: float) -> None:
        """Start the workers and wait until each has loaded the functions.

        Args:
            functions: pickles (cloudpickle's) of the functions that calls name by number.
            files: modules to load first, because functions come from them.
            num_workers: how many processes.
            memory_gib: address space that calls may add, per worker, to what loading the functions took.

        Raises:
            RuntimeError: a worker could not load them.
        """
        fields = [(file.module, file.path, file.text) for file in files]
        setup = pickle.dumps((sys.path, fields, functions, int(memory_gib * 2**30)))
        self._workers = [_Worker(setup) for _ in range(num_workers)]
        # One thread for as long as the pool lives: a worker dies with the thread that started it (PR_SET_PDEATHSIG).
        self._errands: SimpleQueue[tuple[Callable[[Errand], list[Outcome]], Errand] | None] = SimpleQueue()
        threading.Thread(target=_run_errands, args=(self._errands,), daemon=True, name="reward-workers").start()
        self._last: Errand | None = None
        self.close = weakref.finalize(
            self, _kill_all, self._workers, self._errands, os.getpid()
        )  # also runs at interpreter exit
        for worker in self._workers:
            worker.start()
        while starting := [worker for worker in self._workers if not worker.ready]:
            for worker in _wait(starting):
                worker.collect()

    def run(self, calls: list[Call]) -> list[Outcome]:
        """Make all calls; their outcomes, in order.

        Raises:
            FunctionBug: a call raised an exception. The remaining calls are given up.
        """
        with self.begin() as errand:
            errand.add(calls)
            return errand.result()

    def begin(self) -> Errand:
        """Make calls that are still to come, while this thread does something else. The errand before is given up."""
        if self._last is not None:
            self._last.give_up()  # a signal's handler may have raised before a `with` could see to it
        self._last = Errand()
        self._errands.put((self._serve, self._last))
        return self._last

    def _serve(self, errand: Errand) -> list[Outcome]:
        """Make the calls of an errand as they come in, until there are no more; the pool's own thread runs this."""
        outcomes: dict[int, Outcome] = {}
        pending: deque[int] = deque()
        num_known = 0
        try:
            while True:
                state = errand.news()
                pending.extend(range(num_known, len(errand.calls)))
                num_known = len(errand.calls)
                if state == "given up" or (state == "complete" and len(outcomes) == num_known):
                    return [outcomes[i] for i in sorted(outcomes)]
                self._hand_out(errand.calls, pending)
                for worker in _wait([worker for worker in self._workers if worker.is_busy], errand.signal):
                    outcomes.update(worker.collect())
        finally:
            for worker in self._workers:
                if worker.assigned:  # after a bug or an interruption; the next run starts it again
                    worker.kill()
                    worker.assigned.clear()

    def _hand_out(self, calls: list[Call], pending: deque[int]) -> None:
        """Give each idle worker a chunk. What a dead one left undone is done first."""
        for worker in self._workers:
            pending.extendleft(reversed(worker.take_back_undone()))
        chunk = max(1, min(MAX_CHUNK, len(pending) // (4 * len(self._workers))))
        for worker in self._workers:
            if pending and not worker.is_alive:
                worker.start()
            elif pending and not worker.is_busy:
                numbers = [pending.popleft() for _ in range(min(chunk, len(pending)))]
                if not worker.send(calls, numbers):  # it died while idle: nobody's fault
                    pending.extendleft(reversed(numbers))
                    worker.start()


class Errand:
    """Calls on their way from the thread that has them to the pool's own, which makes them.

    A context manager: calls that are not made yet when it is left are given up.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outcomes: Future[list[Outcome]] = Future()  # the thread's to set
        self.signal, self._bell = socket.socketpair()
        self.signal.setblocking(False)
        self._state: Literal["open", "complete", "given up"] = "open"

    def add(self, calls: list[Call]) -> None:
        """Have these made too.

        Raises:
            FunctionBug: an earlier call raised an exception.
        """
        if self.outcomes.done():  # before its time: only by an error
            self.outcomes.result()
        self.calls += calls
        self._ring()

    def result(self) -> list[Outcome]:
        """Wait for all calls; their outcomes, in the order they were added.

        Raises:
            FunctionBug: a call raised an exception. The remaining calls are given up.
        """
        self._state = "complete"
        self._ring()
        return self.outcomes.result()

    def news(self) -> Literal["open", "complete", "given up"]:
        """Whether more calls may come; to be asked before looking at them, so that none is missed."""
        with contextlib.suppress(BlockingIOError):
            while self.signal.recv(4096):
                pass
        return self._state

    def _ring(self) -> None:
        self._bell.send(b"!")

    def give_up(self) -> None:
        """Wait until no call is being made any more; without effect after the last one."""
        self._state = "given up"
        if not self.outcomes.done():
            self._ring()
            wait_for_end([self.outcomes])
        self.signal.close()
        self._bell.close()

    def __enter__(self) -> Errand:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()


def _run_errands(errands: SimpleQueue[tuple[Callable[[Errand], list[Outcome]], Errand] | None]) -> None:
    """What the pool's thread does, until there is a None."""
    while (item := errands.get()) is not None:
        serve, errand = item
        try:
            errand.outcomes.set_result(serve(errand))
        except BaseException as error:
            errand.outcomes.set_exception(error)
        del item, serve, errand  # or the pool would live as long as this waits for the next


class _Worker:
    """One worker process as its parent sees it.

    `assigned` are the calls it was sent and has not answered; the first of them is running.
    """

    def __init__(self, setup: bytes) -> None:
        self.setup = setup
        self.process: subprocess.Popen[bytes] | None = None
        self.assigned: deque[tuple[int, Call]] = deque()
        self.ready = False
        self.started = 0.0  # when the running call did
        self.deadline = 0.0

    @property
    def is_alive(self) -> bool:
        return self.process is not None

    @property
    def is_busy(self) -> bool:
        """Whether an answer is due, the first being that it has started."""
        return self.is_alive and (not self.ready or bool(self.assigned))

    def start(self) -> None:
        """Start the process; `collect` will find it ready."""
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            # By path, not "-m": importing the package first would import torch. -P: its folder has a types.py.
            [sys.executable, "-P", __file__, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,  # killed with everything it started
            env={**os.environ, **_ENVIRONMENT},
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.ready, self.deadline = False, time.monotonic() + START_SECONDS
        with contextlib.suppress(BrokenPipeError):  # then `collect` finds it dead
            self.connection.send_bytes(self.setup)

    def kill(self) -> None:
        """Kill the process and whatever it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        self.connection.close()

    def send(self, calls: list[Call], numbers: list[int]) -> bool:
        """Let it make these calls; False if its process turns out to be dead."""
        try:
            self.connection.send_bytes(pickle.dumps([(calls[i].function, calls[i].arguments) for i in numbers]))
        except (BrokenPipeError, ConnectionResetError):
            self.kill()
            return False
        self.assigned.extend((i, calls[i]) for i in numbers)
        self._restart_clock()
        return True

    def take_back_undone(self) -> list[int]:
        """The numbers of the calls that a process which is gone was sent but never came to."""
        if self.is_alive and self.ready:
            return []
        undone = [number for number, _ in self.assigned]
        self.assigned.clear()
        return undone

    def collect(self) -> list[tuple[int, Outcome]]:
        """The calls that ended since, with their outcomes; one that is over its time is ended here."""
        ended: list[tuple[int, Outcome]] = []
        try:
            while self.is_busy and self.connection.poll():
                ended += self._read(*pickle.loads(self.connection.recv_bytes()))
                if not ended:
                    return ended  # it has just started
        except (EOFError, ConnectionResetError):
            return ended + self._replace("crash")
        if not ended and time.monotonic() >= self.deadline:
            return self._replace("timeout")
        return ended

    def _read(self, kind: str, value: Any) -> list[tuple[int, Outcome]]:
        if kind == "ready":
            self.ready = True
            return []
        if kind == "broken":
            raise RuntimeError(f"A reward worker could not load the reward functions:\n{value}")
        if kind == "memory":  # whatever the call left behind may hurt the next
            return self._replace("crash")
        number, _ = self.assigned.popleft()
        if kind == "bug":
            raise FunctionBug(number, value)
        seconds = self._seconds()
        self._restart_clock()
        return [(number, Outcome("value", value, seconds))]

    def _replace(self, kind: Literal["timeout", "crash"]) -> list[tuple[int, Outcome]]:
        """Blame the running call and start a new process."""
        self.kill()
        if not self.ready:
            raise RuntimeError(f"A reward worker ended in a {kind} while it loaded the reward functions.")
        number, _ = self.assigned.popleft()
        seconds = self._seconds()
        self.start()
        return [(number, Outcome(kind, seconds=seconds))]

    def _restart_clock(self) -> None:
        self.started = time.monotonic()
        if self.ready and self.assigned:
            self.deadline = self.started + self.assigned[0][1].seconds

    def _seconds(self) -> float:
        """How long the call that has just ended took."""
        return time.monotonic() - self.started


def _wait(workers: list[_Worker], *others: socket.socket) -> list[_Worker]:
    """Block until some of these have something to say or are over their time, and return those; or until another has."""
    deadline = min((worker.deadline for worker in workers), default=None)
    patience = None if deadline is None else max(0.0, deadline - time.monotonic())
    ready = set(wait([*others, *(worker.connection for worker in workers)], patience))
    now = time.monotonic()
    return [worker for worker in workers if worker.connection in ready or now >= worker.deadline]


def _kill_all(workers: Iterable[_Worker], errands: SimpleQueue[Any], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner must not take its workers down
        return
    errands.put(None)
    for worker in workers:
        worker.kill()


# ---- the worker's end ------------------------------------------------------------------------------------------------


def main(descriptor: int, parent: int) -> None:
    """Load the functions, then answer calls until the parent is gone."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    pipe = Connection(descriptor)
    try:
        functions = _load(pipe.recv_bytes())
    except Exception:
        pipe.send_bytes(pickle.dumps(("broken", traceback.format_exc())))
        return
    pipe.send_bytes(pickle.dumps(("ready", None)))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            for function, arguments in pickle.loads(pipe.recv_bytes()):
                pipe.send_bytes(_answer(functions[function], arguments))


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, even in the middle of a call (elsewhere than on Linux: after it)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def _load(setup: bytes) -> list[Callable[..., Any]]:
    path, files, functions, memory = pickle.loads(setup)
    sys.path[:] = path
    for fields in files:
        SourceFile(*fields).load()
    loaded = [pickle.loads(function) for function in functions]
    _limit_memory(memory)
    return loaded


def _limit_memory(allowance: int) -> None:
    """Let the address space grow by `allowance` bytes from here (Linux; elsewhere from zero)."""
    used = 0
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + allowance if most == resource.RLIM_INFINITY else min(used + allowance, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _answer(function: Callable[..., Any], arguments: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps(("value", function(**arguments)))
    except MemoryError:
        return pickle.dumps(("memory", None))
    except Exception as error:
        frames = error.__traceback__ and error.__traceback__.tb_next  # without this function's own
        return pickle.dumps(("bug", "".join(traceback.format_exception(type(error), error, frames))))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
