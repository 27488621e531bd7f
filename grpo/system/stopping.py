"""Being asked to stop: by a signal, by the end of `run.max_hours`, or by the death of the launcher. The trainer saves and exits
with EXIT_STOPPED.

A signal does not interrupt what processes do together, or an update; it sets a flag that they agree on between optimizer steps.
Only what a process does for itself, sampling and scoring, it breaks off at once (`abortable`), since that can be done again.

Python runs a signal's handler in the main thread, and not before that has returned from C, where it may wait for other processes
for ever. So a thread hears of signals too, through `signal.set_wakeup_fd`: it tells the heartbeat, and ends the process on a
second signal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from grpo.system import progress, terminal

if TYPE_CHECKING:  # this module is imported before torch
    from grpo.system.distributed import Processes

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: start it again to go on."""
EXIT_INTERRUPTED = 130
"""After Ctrl-C before there was anything to save, as a shell counts SIGINT."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""From a user, a launcher, a closed terminal, and a scheduler that announces the end of a job's time."""

ONE_REQUEST_SECONDS = 2.0
"""Signals this close together are one request: on Ctrl-C a process gets one from the terminal and one from its launcher."""

WAKE = signal.SIGURG
"""By which a process rouses its own main thread; one that comes from elsewhere does nothing, as without a handler."""

WATCH_SECONDS = 1.0

LAUNCHED = "GRPO_LAUNCHED"
"""Set in the processes that a command here starts, so that a run saves and stops when that one is gone."""

SAFE_PATH = "-P"
"""Option of Python for these processes: the working directory is no place to import from, as it is none for the command `grpo`. A
folder `grpo` there, such as that of a clone, would hide the library."""
SAFE_PATH_VARIABLE = {"PYTHONSAFEPATH": "1"}
"""The same for processes that another launcher starts."""

LAUNCHERS = {
    "TORCHELASTIC_RUN_ID": "torchrun or accelerate",
    "ACCELERATE_MIXED_PRECISION": "accelerate",
    "CROSS_RANK": "deepspeed",
    LAUNCHED: "grpo train",
}
"""Environment variables that launchers set, and nothing within the processes that they start."""

_parent = os.getppid()  # when this is imported, which is early

T = TypeVar("T")


class RunError(RuntimeError):
    """A run ends by design, because something is wrong with what it was given or where it writes; the message says all of it."""

    @property
    def sentence(self) -> str:
        """What a person who started a command reads; the traceback of the process that runs rewards is no part of it."""
        return str(self)


class Stopped(SystemExit):
    """The run was asked to stop, and has saved where it stood."""

    def __init__(self, reason: str, settings: tuple[str, ...] = ()) -> None:
        """Args: settings: with which the run itself wants to go on at once."""
        super().__init__(EXIT_STOPPED)
        self.reason = reason
        self.settings = settings


class StoppedInNotebook(KeyboardInterrupt):
    """The same in a notebook, where a SystemExit would be taken for a wish to end the kernel; the cell ends with its sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the run has said all of it."""
        return [f"stopped: {self.reason}"]


class Interrupted(Exception):
    """All processes agree to stop, between two updates or before a rollout."""

    def __init__(self, reason: str, settings: tuple[str, ...] = ()) -> None:
        """Args: settings: what to set when the run goes on."""
        super().__init__(reason)
        self.settings = settings


class _Abort(BaseException):
    """Raised by the handler within `abortable`."""


class StopRequest:
    """Whether this process was asked to stop, and by what. As a context it handles signals and watches clock and launcher."""

    def __init__(self, max_hours: float | None) -> None:
        """Args: max_hours: counted from here."""
        self.is_handled = False  # whether signals and the rest are, which is within the context
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._max_hours = max_hours
        self._launcher = next((name for variable, name in LAUNCHERS.items() if variable in os.environ), None)
        self._reason: str | None = None
        self._signalled_at: float | None = None
        self._is_abortable = False
        self._ends_cell = False  # in a notebook, on a second signal
        self._before: dict[int, Any] = {}
        self._watcher: _Watcher | None = None

    @property
    def reason(self) -> str | None:
        """What asked for a stop; None if nothing has."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = f"run.max_hours ({self._max_hours:g}) are over"
        return self._reason

    def ask(self, reason: str) -> None:
        """Ask for a stop from within the run."""
        self._reason = self.reason or reason

    @property
    def settings(self) -> tuple[str, ...]:
        """For a process that goes on in place of this one: the hours that are left."""
        return () if self._deadline is None else (f"run.max_hours={(self._deadline - time.monotonic()) / 3600:.6f}",)

    def __enter__(self) -> StopRequest:
        self.is_handled = True
        if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
            self._before = {number: signal.signal(number, self._handle) for number in (*_heard(), WAKE)}
            self._watcher = _Watcher(self._heard, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_handled = False
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        progress.stop_was_asked_by("")

    def abortable(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None if a request broke it off or came before it."""
        try:
            try:
                self._is_abortable = True
                return None if self.reason is not None else work()
            finally:
                self._is_abortable = False
        except _Abort:
            return None

    def _handle(self, number: int, _: FrameType | None) -> None:
        """In the main thread, once it is back from C."""
        if number != WAKE:
            self._reason = self.reason or signal.Signals(number).name
        if self._ends_cell:
            raise KeyboardInterrupt
        if self._is_abortable and self.reason is not None:
            self._is_abortable = False
            raise _Abort

    def _heard(self, number: int) -> None:
        """In the watcher's thread, at once."""
        if number not in SIGNALS or number not in self._before:
            return
        now, name = time.monotonic(), signal.Signals(number).name
        if self._signalled_at is None:
            self._signalled_at = now
            self._reason = self.reason or name
            progress.stop_was_asked_by(name)
            terminal.say_at_once(f"{name}: saving, then stopping; a second signal stops at once")
        elif now - self._signalled_at > ONE_REQUEST_SECONDS and terminal.in_notebook():
            self._ends_cell = True  # and not the kernel, with all that a person has computed in it
            signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
        elif now - self._signalled_at > ONE_REQUEST_SECONDS:
            terminal.wipe()
            os._exit(128 + number)  # reward workers die with their parent

    def _look(self) -> float:
        """In the watcher's thread, now and then: ask for what no signal asks for. Seconds until it should look again."""
        if self._reason is not None:
            _drop_closed_outputs()
            return WATCH_SECONDS
        if self._launcher is not None and os.getppid() != _parent:
            self._reason = f"the launcher ({self._launcher}) has ended"
            terminal.say_at_once(f"{self._reason}: saving, then stopping")
        if self.reason is not None:
            signal.pthread_kill(threading.main_thread().ident or 0, WAKE)  # to break off what is abortable
        return WATCH_SECONDS if self._deadline is None else min(WATCH_SECONDS, self._deadline - time.monotonic())


class StopAgreement:
    """What all processes agree on of a request to stop, which may have reached one of them only."""

    def __init__(self, request: StopRequest, processes: Processes) -> None:
        self.request = request
        self.processes = processes
        self.reason = ""  # why all processes are about to stop, once they agree

    def agree(self, mine: Any = None) -> list[Any]:
        """Tell each other of requests; `mine` of every process. A collective."""
        told = self.processes.gather((self.request.reason, mine))
        self.reason = next((reason for reason, _ in told if reason is not None), "")
        return [each for _, each in told]

    def sync(self, mine: Any = None) -> list[Any]:
        """The same after work that each process did for itself, which a request may have broken off.

        Raises:
            Interrupted: on all processes, if one of them was asked to stop.
        """
        everyones = self.agree(mine)
        if self.reason:
            raise Interrupted(self.reason)
        return everyones


class _Watcher:
    """A thread that hears of each signal that Python handles, as soon as the process gets it. To be made by the main thread."""

    def __init__(self, heard: Callable[[int], None], look: Callable[[], float]) -> None:
        """Args:
        heard: called with each signal's number.
        look: called in between; how many seconds at most until the next call.
        """
        global _is_listening
        self._heard, self._look = heard, look
        self._ear, self._mouth = socket.socketpair()
        for end in (self._ear, self._mouth):
            end.setblocking(False)
        self._over = False
        self._before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        _is_listening = True
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        poll = select.poll()  # unlike select.select, it takes descriptors above 1,023
        poll.register(self._ear, select.POLLIN)
        while not self._over:
            patience = max(0.0, self._look())
            if poll.poll(1000 * patience):
                for number in self._ear.recv(4096):
                    self._heard(number)

    def close(self) -> None:
        global _is_listening
        _is_listening = False
        signal.set_wakeup_fd(self._before)
        self._over = True
        with contextlib.suppress(BlockingIOError):
            self._mouth.send(b"\0")
        self._thread.join()
        self._ear.close()
        self._mouth.close()


_is_listening = False


def _begin_anew() -> None:
    """In a fork, which shares the socket: what it is sent would be taken for a signal to its parent."""
    global _parent
    _parent = os.getppid()
    if _is_listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_begin_anew)


def _heard() -> list[signal.Signals]:
    """The signals that ask for a stop here: `nohup` and others have some ignored, but what a user sends on purpose is heard."""
    always = (signal.SIGTERM, signal.SIGINT)
    return [number for number in SIGNALS if number in always or signal.getsignal(number) != signal.SIG_IGN]


def _drop_closed_outputs() -> None:
    """A terminal that was closed, or a `tee` that the same Ctrl-C ended, must not make the next line that is printed an error."""
    for number in (1, 2):
        poll = select.poll()
        with contextlib.suppress(OSError):
            poll.register(number, 0)  # errors are told anyway
            if poll.poll(0):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
