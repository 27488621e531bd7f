"""Being asked to stop: SIGTERM, SIGINT (Ctrl-C), or the end of `run.max_hours`. The trainer saves and exits with EXIT_STOPPED.

A signal does not interrupt what processes do together, or an update; it sets a flag that they agree on between optimizer steps.
Only what a process does for itself, sampling and scoring, it breaks off at once (`abortable`), since that can be done again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from grpo import terminal

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: start it again to go on."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_SECONDS = 2.0
"""Signals this close together are one request: on Ctrl-C a process gets one from the terminal and one from its launcher."""


T = TypeVar("T")


class Stopped(SystemExit):
    """The run was asked to stop, and has saved where it stood."""

    def __init__(self, reason: str, settings: tuple[str, ...] = ()) -> None:
        """Args: settings: with which the run itself wants to go on at once."""
        super().__init__(EXIT_STOPPED)
        self.reason = reason
        self.settings = settings


class _Abort(BaseException):
    """Raised by the handler within `abortable`."""


class StopRequest:
    """Whether this process was asked to stop, and by what. As a context it handles the signals and watches the clock."""

    def __init__(self, max_hours: float | None) -> None:
        """Args: max_hours: counted from here."""
        self.is_handled = False  # whether signals and clock are, which is within the context
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._max_hours = max_hours
        self._reason: str | None = None
        self._signalled_at: float | None = None
        self._is_clock = False  # what raises the next signal
        self._is_abortable = False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    @property
    def reason(self) -> str | None:
        """What asked for a stop; None if nothing has."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = f"run.max_hours ({self._max_hours:g}) are over"
        return self._reason

    @property
    def settings(self) -> tuple[str, ...]:
        """For a process that goes on in place of this one: the hours that are left."""
        return () if self._deadline is None else (f"run.max_hours={(self._deadline - time.monotonic()) / 3600:.6f}",)

    def __enter__(self) -> StopRequest:
        self.is_handled = True
        if threading.current_thread() is threading.main_thread():  # nobody else may handle signals
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if self._deadline is not None:
                self._timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), self._time_is_up)
                self._timer.daemon = True
                self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_handled = False
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

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

    def _time_is_up(self) -> None:
        self._is_clock = True
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNALS[0])  # to break off what is abortable

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._is_clock:
            self._is_clock = False
        elif self._signalled_at is None:
            self._signalled_at = now
            self._reason = self.reason or signal.Signals(number).name
            os.write(
                2, f"{signal.Signals(number).name}: saving, then stopping; a second signal stops at once\n".encode()
            )
        elif now - self._signalled_at > ONE_REQUEST_SECONDS:
            terminal.wipe()
            os._exit(128 + number)  # reward workers die with their parent
        if self._is_abortable:
            self._is_abortable = False
            raise _Abort
