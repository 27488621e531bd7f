"""Functions called in processes that can be killed: both ends of the pipe.

The parent keeps a pool of workers, sends each a chunk of calls and gets the results back one by one, so that a time
limit holds for every single call. A worker that exceeds it is killed and replaced. The worker is this file run as a
script; it imports the standard library and what the functions import, and nothing else (no torch), and sees no GPU.

    parent -> worker    once: import path, source files, functions, memory limit; then (output file, calls)
    worker -> parent    ("ready", None) or ("broken", traceback); then per call ("value", pickled result and what it logged),
                        ("bug", traceback), ("exhausted", None) or ("exit", None)

What a call starts ends with it. Each worker has a keeper, the process that the parent starts and that forks the worker: as a
"child subreaper" (man 2 prctl) it inherits whatever the worker's children leave behind, even if they made themselves a session
of their own, and ends it. What a call prints goes to a file, and what it changes in its process (folder, environment, signal
handlers, recursion limit) is put back. A call that finds no memory left, or whose worker dies, is made once more in a fresh
worker, so that a leak is not blamed on the call that happens to come last. Of the environment a worker is given what INHERITED
names and no more: an access key that it does not have cannot end up in what a call prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import pickle
import re
import resource
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
import types
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_end
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

START_SECONDS = 120.0  # for importing the functions' modules, with every other worker of the machine doing the same
MAX_CHUNK = 64  # calls sent at once: enough to hide the round trip, few enough to share the tail
MAX_PROCESSES = 64  # that a call may have started at a time; more is a fork bomb
MAX_OUTPUT_BYTES = 64 * 2**20  # of what the functions print; then the file starts anew
WATCH_SECONDS = 0.2  # how often a keeper looks
END_SECONDS = 10.0  # for a keeper to end what a call left behind
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


# ---- the pipe ---------------------------------------------------------------------------------------------------------


class Corrupt(Exception):
    """Something else than a message is in the pipe: a call wrote to a descriptor that is not its own."""


class Pipe:
    """Messages over a socket, each after a header with a key that only the two ends know.

    A reader that believed a length which a stray `os.write` left there would wait for the rest for ever.
    """

    HEADER = struct.Struct("16sQ")

    def __init__(self, end: socket.socket, key: bytes) -> None:
        self.socket = end
        self.key = key
        self._received = bytearray()

    def send(self, message: Any) -> None:
        """Raises OSError (also TimeoutError) if the other end is gone or does not read."""
        data = pickle.dumps(message)
        self.socket.sendall(self.HEADER.pack(self.key, len(data)) + data)

    def receive(self) -> Any:
        """Wait for a message. Raises EOFError or ConnectionError if the other end is gone, and Corrupt."""
        while (message := self._first()) is None:
            self._fill(0)
        return pickle.loads(message)

    def poll(self) -> Any | None:
        """The next message if it has arrived whole, else None. Raises as `receive` does."""
        if (message := self._first()) is None:
            with contextlib.suppress(BlockingIOError):
                self._fill(socket.MSG_DONTWAIT)
            message = self._first()
        return None if message is None else pickle.loads(message)

    def _fill(self, flags: int) -> None:
        data = self.socket.recv(2**20, flags)
        if not data:
            raise EOFError
        self._received += data

    def _first(self) -> bytes | None:
        """The first message received, taken out, if it is whole."""
        if len(self._received) < self.HEADER.size:
            return None
        key, size = self.HEADER.unpack_from(self._received)
        if key != self.key:
            raise Corrupt
        end = self.HEADER.size + size
        if len(self._received) < end:
            return None
        message = bytes(self._received[self.HEADER.size : end])
        del self._received[:end]
        return message


# ---- the parent's end ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call to make: which of the pool's functions, with what, and for how long at most."""

    function: int
    arguments: dict[str, Any]
    seconds: float
    logs: tuple[str, ...] = ()  # methods of Logged that the function is handed under their names


@dataclass
class Logged:
    """What a call has logged. Its methods are what TRL hands to a reward function under these names."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """A number; a metric of the step is the mean of those of its name."""
        if not math.isfinite(value):
            raise ValueError(f"log_metric({name!r}, {value!r}): it must be a finite number.")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """A value for each completion of the call."""
        self.columns.setdefault(column, []).extend(values)


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    It returned `value`; or its worker was killed for time ("timeout"), or died or ran out of memory ("crash").
    """

    kind: Literal["value", "timeout", "crash"]
    value: Any = None
    seconds: float = 0.0  # until it ended
    metrics: dict[str, list[float]] = field(default_factory=dict)  # what it logged
    columns: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceFile:
    """A module that no import statement finds; `text` is what its file held when the parent loaded it."""

    module: str
    path: str
    text: str

    @property
    def folder(self) -> str:
        """What lies beside the file is imported from here, as for a script."""
        return os.path.dirname(self.path)

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
                    outcomes.update(worker.collect())
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


class Errand:
    """Calls on their way from the thread that has them to the pool's own, which makes them.

    A context manager: calls that are not made yet when it is left are given up.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.made: dict[int, Outcome] = {}  # by the number of the call; the thread's to fill
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
                    [sys.executable, "-P", __file__, str(descriptor), str(os.getpid())],
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
        """Start a new process; the running call is tried again in it, unless the old one was new as well."""
        if self.ready and self.num_answers:
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


# ---- the keeper -------------------------------------------------------------------------------------------------------


def main(descriptor: int, parent: int) -> None:
    """Fork the worker; when it is gone, or the parent is, or has had enough, end whatever the worker started."""
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        _prctl(_SET_CHILD_SUBREAPER, 1)
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            work(socket.socket(fileno=descriptor))
        os._exit(0)
    os.close(descriptor)  # so that the parent sees the worker's end
    while os.getppid() == parent and not _has_ended(worker):
        # Not the parent-death signal: it comes when the thread ends that started this process, and a pool may be a thread's
        received = signal.sigtimedwait(signals, WATCH_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM:
            break
        if len(_descendants(keeper)) > MAX_PROCESSES + 1:
            break
    _end_descendants(set())


def _has_ended(worker: int) -> bool:
    """Reap what has ended; whether the worker was among it."""
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            if pid == worker:
                return True
    return False


_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


def _descendants(pid: int) -> list[int]:
    """The processes that a process started, those that they started, and so on."""
    found, parents = [], [pid]
    while parents:
        tasks = f"/proc/{parents.pop()}/task"
        with contextlib.suppress(OSError):  # it has ended
            for task in os.listdir(tasks):
                with open(f"{tasks}/{task}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                parents += children
    return found


def _end_descendants(spared: set[int]) -> None:
    """Stop this process's descendants, so that they start no more of them, then kill them."""
    deadline = time.monotonic() + END_SECONDS / 2
    stopped: set[int] = set()
    while (alive := set(_descendants(os.getpid())) - spared) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if alive <= stopped else signal.SIGSTOP)
        for pid in alive:
            with contextlib.suppress(ChildProcessError):  # not ours to reap, yet
                os.waitpid(pid, os.WNOHANG)
        stopped |= alive


# ---- the worker's end ------------------------------------------------------------------------------------------------


def work(end: socket.socket) -> None:
    """Load the functions, then answer calls until the parent is gone."""
    os.set_inheritable(end.fileno(), False)
    # A forked child's copy would hide this process's end from the parent, and a child that returns from the call would answer
    os.register_at_fork(after_in_child=end.close)
    pipe = Pipe(end, end.recv(16, socket.MSG_WAITALL))
    try:
        functions = _load(pipe.receive())
    except Exception:
        pipe.send(("broken", traceback.format_exc()))
        return
    surroundings = _Surroundings()
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError, OSError):
        while True:
            output, calls = pipe.receive()
            surroundings.print_to(output)
            for function, arguments, logs in calls:
                answer = _answer(functions[function], arguments, logs)
                surroundings.restore()
                pipe.send(answer)


class _Surroundings:
    """What a call finds in its process, and finds there again after another call has changed it."""

    def __init__(self) -> None:
        self.directory = os.getcwd()
        self.environment = dict(os.environ)
        self.recursion_limit = sys.getrecursionlimit()
        self.handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        self.children = set(_descendants(os.getpid()))  # started with the functions, not by a call
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        self.streams = sys.stdin, sys.stdout, sys.stderr
        self.path = ""
        self.print_to(os.devnull)

    def print_to(self, path: str) -> None:
        """Let what is printed from here on be appended to a file."""
        if path == self.path:
            return
        self.path = path
        self.output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._redirect()

    def restore(self) -> None:
        """End what the call started and put back what it changed. Where that fails, a later call tells."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # raises if there is no child: the usual case
            _end_descendants(self.children)
        signal.alarm(0)
        for number, handler in self.handlers.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
        sys.setrecursionlimit(self.recursion_limit)
        sys.stdin, sys.stdout, sys.stderr = self.streams
        if os.environ != self.environment:
            os.environ.clear()
            os.environ.update(self.environment)
        with contextlib.suppress(OSError):
            os.chdir(self.directory)
            self._redirect()

    def _redirect(self) -> None:
        os.dup2(self.output, 1)
        os.dup2(self.output, 2)


def _load(setup: tuple[list[str], list[tuple[str, str, str]], list[bytes], int]) -> list[Callable[..., Any]]:
    path, fields, functions, memory = setup
    files = [SourceFile(*each) for each in fields]
    sys.path[:] = [*dict.fromkeys(file.folder for file in files), *path]
    for file in files:
        file.load()
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


def _answer(function: Callable[..., Any], arguments: dict[str, Any], logs: tuple[str, ...]) -> tuple[str, Any]:
    """Make the call; what to tell the parent."""
    logged = Logged()
    try:
        value = function(**arguments, **{name: getattr(logged, name) for name in logs})
        if hasattr(value, "__await__"):
            value = _awaited(value)
        return "value", pickle.dumps((value, logged.metrics, logged.columns))
    except MemoryError:
        return "exhausted", None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EMFILE, errno.EAGAIN):
            return "exhausted", None
        frames = error.__traceback__ and error.__traceback__.tb_next  # without this function's own
        return "bug", "".join(traceback.format_exception(type(error), error, frames))
    except BaseException:  # SystemExit and KeyboardInterrupt ask for the end of the process
        return "exit", None


def _awaited(value: Awaitable[Any]) -> Any:
    """What an `async` function returns."""
    import asyncio  # few need it, and every worker would wait for it

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
