"""The parent's end of worker.py: a pool of workers, calls handed to them in chunks, time limits, replacements."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_end
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from grpo.scoring import worker as script
from grpo.scoring.worker import END_SECONDS, Call, Corrupt, FunctionBug, Outcome, Pipe, SourceFile

START_SECONDS = 120.0  # for importing the functions' modules, with every other worker of the machine doing the same
MAX_CHUNK = 64  # calls sent at once: enough to hide the round trip, few enough to share the tail
MAX_OUTPUT_BYTES = 64 * 2**20  # of what the functions print; then the file starts anew
MAX_FAILED_STARTS = 5  # in a row, of a worker that has run before; the machine may be short of memory for a while
PAUSE_SECONDS = 0.5  # before a start that follows a failed one, times how many failed

_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # a reward that iterates over a set gives the same value after a resume
}


INHERITED = re.compile(
    "PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_.*|TZ|TERM|TMPDIR|TEMP|TMP|HOSTNAME|VIRTUAL_ENV|LD_LIBRARY_PATH"
    "|PYTHON(PATH|HOME|UTF8|WARNINGS|IOENCODING|DONTWRITEBYTECODE|PYCACHEPREFIX|NOUSERSITE|USERBASE)"
    "|CONDA_(PREFIX|DEFAULT_ENV)|XDG_(CACHE|CONFIG|DATA|RUNTIME)_(HOME|DIR)|SSL_CERT_(FILE|DIR)|NLTK_DATA"
    "|HF_(HOME|HUB_CACHE|DATASETS_CACHE|HUB_OFFLINE|DATASETS_OFFLINE)|TRANSFORMERS_(CACHE|OFFLINE)"
)
"""Variables that a worker is given: where programs, libraries and caches lie, and the language. No keys, no addresses."""


def inherited(environment: Mapping[str, str], also: Iterable[str]) -> dict[str, str]:
    """What workers are given of an environment.

    Args:
        also: names of further variables.
    """
    names = set(also)
    return {name: value for name, value in environment.items() if name in names or INHERITED.fullmatch(name)}


class WorkerPool:
    """Worker processes that all know the same functions."""

    def __init__(
        self,
        functions: list[bytes],
        *,
        files: list[SourceFile],
        num_workers: int,
        memory_gib: float,
        environment: Iterable[str] = (),
    ) -> None:
        """Start the workers and wait until each has loaded the functions.

        Args:
            functions: pickles (cloudpickle's) of the functions that calls name by number.
            files: modules to load first, because functions come from them.
            num_workers: how many processes.
            memory_gib: address space that calls may add, per worker, to what loading the functions took.
            environment: names of variables that workers are given besides INHERITED.

        Raises:
            RuntimeError: a worker could not load them.
        """
        fields = [(file.module, file.path, file.text) for file in files]
        setup = (sys.path, fields, functions, int(memory_gib * 2**30))
        self.output = Path(os.devnull)  # what the functions print is appended to this file
        variables = {**inherited(os.environ, environment), **_ENVIRONMENT}
        self._workers = [_Worker(setup, variables) for _ in range(num_workers)]
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
        outcomes = errand.made
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
                    errand.take_in(worker.collect())
                _bound(self.output)
        finally:
            for worker in self._workers:
                if worker.is_busy:  # after a bug or an interruption; the next run starts it again
                    worker.kill()
                    worker.assigned.clear()
                    worker.suspect = None

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
                if not worker.send([(i, calls[i]) for i in numbers], self.output):  # it died while idle: nobody's fault
                    pending.extendleft(reversed(numbers))
                    worker.start()


_FORGOTTEN = Call(-1, {}, 0.0), Outcome("value")


class Errand:
    """Calls on their way from the thread that has them to the pool's own, which makes them.

    A context manager: calls that are not made yet when it is left are given up.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.made: dict[int, Outcome] = {}  # by the number of the call; the thread's to fill
        self.outcomes: Future[list[Outcome]] = Future()  # the thread's to set
        self._changed = threading.Condition()
        self.outcomes.add_done_callback(lambda _: self.take_in([]))
        self.signal, self._bell = socket.socketpair()
        self.signal.setblocking(False)
        self._bell.setblocking(False)
        self._state: Literal["open", "complete", "given up"] = "open"

    def add(self, calls: list[Call]) -> None:
        """Have these made too.

        Raises:
            FunctionBug: an earlier call raised an exception.
        """
        self.check()
        self.calls += calls
        self._ring()

    def take_in(self, made: list[tuple[int, Outcome]]) -> None:
        """Calls that have been made, with their numbers; for the pool's thread."""
        with self._changed:
            self.made.update(made)
            self._changed.notify_all()

    def forget(self, number: int) -> None:
        """What a call was handed and what it returned, objects among them, which nobody asks for any more."""
        self.calls[number], self.made[number] = _FORGOTTEN

    def wait_for_more(self, num_made: int) -> None:
        """Wait until more calls than so many have been made.

        Raises:
            FunctionBug: a call raised an exception.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self.made) > num_made or self.outcomes.done())
        self.check()

    def check(self) -> None:
        """Raises FunctionBug if a call raised an exception."""
        if self._state == "open" and self.outcomes.done():  # before its time: only by an error
            self.outcomes.result()

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
        with contextlib.suppress(BlockingIOError):  # full of rings that nobody has heard yet, or after a bug ever will
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

    `assigned` are the calls it was sent and has not answered; the first of them is running. A call on which it died after
    it had made others is the `suspect`: it alone is sent to the new process, and if that dies too, it is the call's fault.
    """

    def __init__(self, setup: tuple[Any, ...], environment: dict[str, str]) -> None:
        self.setup = setup
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.assigned: deque[tuple[int, Call]] = deque()
        self.suspect: tuple[int, Call] | None = None
        self.output = Path(os.devnull)
        self.num_answers = 0  # of this process
        self.ready = False
        self.has_loaded = False  # the functions, in this process or one before it
        self.num_failed_starts = 0  # in a row
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
        with theirs:
            self.process = self._open(theirs.fileno())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(END_SECONDS), 0))
        key = secrets.token_bytes(16)
        self.pipe = Pipe(ours, key)
        self.ready, self.num_answers, self.deadline = False, 0, time.monotonic() + START_SECONDS
        with contextlib.suppress(OSError):  # then `collect` finds it dead
            ours.sendall(key)
            self.pipe.send(self.setup)

    def _open(self, descriptor: int) -> subprocess.Popen[bytes]:
        while True:
            try:
                return subprocess.Popen(
                    # By path, not "-m": importing the package first would import torch. -P: its folder has a types.py.
                    [sys.executable, "-P", script.__file__, str(descriptor), str(os.getpid())],
                    pass_fds=[descriptor],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # its errors are shown until the functions are loaded
                    process_group=0,
                    env=self.environment,
                )
            except OSError as error:  # no memory, or no process
                self._bear_failed_start(f"could not be started: {error}")

    def _bear_failed_start(self, what: str) -> None:
        """Pause before the next; raise RuntimeError if it is not to be hoped for."""
        self.num_failed_starts += 1
        if not self.has_loaded:
            raise RuntimeError(f"A reward worker {what}")
        if self.num_failed_starts == MAX_FAILED_STARTS:
            raise RuntimeError(
                f"A reward worker that had to be replaced {what} That was {MAX_FAILED_STARTS} times in a row."
            )
        time.sleep(PAUSE_SECONDS * self.num_failed_starts)

    def kill(self) -> None:
        """End the process and whatever it started."""
        if self.process is None:
            return
        self.process.terminate()  # its keeper ends the rest
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None
        self.pipe.socket.close()

    def send(self, calls: list[tuple[int, Call]], output: Path) -> bool:
        """Let it make these calls; False if its process turns out to be dead."""
        try:
            self.pipe.send((str(output), [(call.function, call.arguments, call.logs) for _, call in calls]))
        except OSError:
            self.kill()
            return False
        self.assigned.extend(calls)
        self.output = output
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
            while self.is_busy and (message := self.pipe.poll()) is not None:
                starting = not self.ready
                ended += self._read(*message)
                if starting or not self.ready:
                    return ended  # it has just started, or starts again
        except (EOFError, OSError, Corrupt):
            return ended + self._replace_after_crash()
        if not ended and time.monotonic() >= self.deadline:
            return self._replace("timeout")
        return ended

    def _read(self, kind: str, value: Any) -> list[tuple[int, Outcome]]:
        if kind == "ready":
            self.ready = self.has_loaded = True
            self.num_failed_starts = 0
            if self.suspect is not None:
                suspect, self.suspect = self.suspect, None
                if not self.send([suspect], self.output):
                    raise EOFError
            return []
        if kind == "broken":
            return self._start_again(f"could not load the reward functions:\n{value}")
        if kind == "exhausted":  # whatever the call left behind may hurt the next
            return self._replace_after_crash()
        if kind == "exit":
            return self._replace("crash")
        number, _ = self.assigned.popleft()
        if kind == "bug":
            raise FunctionBug(number, value)
        try:
            result, metrics, columns = pickle.loads(value)
        except Exception:
            raise FunctionBug(number, f"What it returned cannot be read:\n{traceback.format_exc()}") from None
        self.num_answers += 1
        seconds = self._seconds()
        self._restart_clock()
        return [(number, Outcome("value", result, seconds, metrics, columns))]

    def _replace_after_crash(self) -> list[tuple[int, Outcome]]:
        """Start a new process; the running call is tried again in it, unless it may not or the old one was new as well."""
        if self.ready and self.num_answers and not self.assigned[0][1].once:
            self.kill()
            self.suspect = self.assigned.popleft()
            self.start()
            return []
        return self._replace("crash")

    def _replace(self, kind: Literal["timeout", "crash"]) -> list[tuple[int, Outcome]]:
        """Blame the running call, if there is one, and start a new process."""
        if not self.ready:
            return self._start_again(f"ended in a {kind} while it loaded the reward functions.")
        self.kill()
        number, _ = self.assigned.popleft()
        seconds = self._seconds()
        self.start()
        return [(number, Outcome(kind, seconds=seconds))]

    def _start_again(self, what: str) -> list[tuple[int, Outcome]]:
        """After a start that failed; no call is to blame."""
        self.kill()
        self._bear_failed_start(what)
        self.start()
        return []

    def _restart_clock(self) -> None:
        self.started = time.monotonic()
        if self.ready and self.assigned:
            self.deadline = self.started + self.assigned[0][1].seconds

    def _seconds(self) -> float:
        """How long the call that has just ended took."""
        return time.monotonic() - self.started


def _wait(workers: list[_Worker], *others: socket.socket) -> list[_Worker]:
    """Block until some of these have something to say or are over their time (a second at most), and return those; or until
    another has."""
    deadline = min((worker.deadline for worker in workers), default=math.inf)
    patience = max(0.0, min(1.0, deadline - time.monotonic()))
    poll = select.poll()  # unlike select.select, it takes descriptors above 1,023
    for descriptor in [*(worker.pipe.socket.fileno() for worker in workers), *(each.fileno() for each in others)]:
        poll.register(descriptor, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(patience * 1000)}
    now = time.monotonic()
    return [worker for worker in workers if worker.pipe.socket.fileno() in ready or now >= worker.deadline]


def _bound(output: Path) -> None:
    """Empty the file if the functions printed too much."""
    with contextlib.suppress(OSError):
        if output.stat().st_size > MAX_OUTPUT_BYTES:
            os.truncate(output, 0)


def _kill_all(workers: Iterable[_Worker], errands: SimpleQueue[Any], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner must not take its workers down
        return
    errands.put(None)
    for worker in workers:
        if worker.process is not None:
            worker.process.terminate()  # all at once; then wait for each
    for worker in workers:
        worker.kill()
