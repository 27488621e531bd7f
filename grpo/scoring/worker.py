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
worker, so that a leak is not blamed on the call that happens to come last; a call of a tool is not (Call.once). Of the
environment a worker is given what INHERITED names and no more: an access key that it does not have cannot end up in what a call
prints.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
import traceback
import types
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_PROCESSES = 64  # that a call may have started at a time; more is a fork bomb
WATCH_SECONDS = 0.2  # how often a keeper looks
END_SECONDS = 10.0  # for a keeper to end what a call left behind


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


# ---- what goes through it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call to make: which of the pool's functions, with what, and for how long at most."""

    function: int
    arguments: dict[str, Any]
    seconds: float
    logs: tuple[str, ...] = ()  # methods of Logged that the function is handed under their names
    once: bool = False  # not made again where its worker dies, since what it does in the world would be done twice


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
        if isinstance(value, types.GeneratorType | types.AsyncGeneratorType):
            raise TypeError(
                "it returned a generator, whose values nobody has computed yet. Return a number, or a list with one for each "
                "completion."
            )
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
