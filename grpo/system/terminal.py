"""Lines that stay at the bottom of a terminal while anything is printed above them.

The cursor waits at the first of these lines, which is empty, and each repaint wipes everything from there on. So whatever another
process, a C library or a logger writes past this module appears above the region too, at worst with remains of it behind its
second line until the next repaint; a terminal that is made narrower is wiped as well; and since the cursor is never hidden, a
process that is killed leaves a terminal that works, with the region's remains beneath the prompt. (`rich.live.Live` leaves the
cursor at the last line and goes up as many lines as it has painted: a line that something else prints is erased, and one of its
own stays behind.)
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.segment import ControlType, Segment
from rich.text import Text

REFRESH_SECONDS = 1.0
"""A clock goes by seconds; new numbers are painted when they come."""


def can_repaint(file: TextIO | None, environment: Mapping[str, str]) -> bool:
    """Whether `file` is a terminal to paint on: no pipe, no log of a CI job, none that asks for plain text."""
    plain = environment.get("TERM") in (None, "dumb", "unknown") or environment.get("NO_COLOR") or environment.get("CI")
    return file is not None and file.isatty() and not plain and file.encoding.lower().startswith("utf")


def in_notebook() -> bool:
    """Whether this process is a kernel of Jupyter's, whose outputs can be replaced."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey instead of showing: escape sequences, and what reverses the direction of text. Also lone surrogates,
which UTF-8 cannot hold, and separators that some take for the end of a line."""


def printable(text: str) -> str:
    """`text`, such as a model's, made safe for a terminal: a replacement character for what is UNSAFE."""
    return UNSAFE.sub("\ufffd", text)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a line on stdout, or on `file`, made safe for a terminal. It never raises.

    A log on a full disk, a closed pipe or a terminal that is gone costs the line, and neither the run nor its exit code. What
    goes to stdout goes through the logger, so that whoever uses the library can silence it or send it elsewhere.
    """
    if file is not None:
        _print(text, file)
    else:
        start = text.lstrip().partition(":")[0]
        logger.log({"warning": logging.WARNING, "error": logging.ERROR}.get(start, logging.INFO), "%s", printable(text))


logger = logging.getLogger("grpo")
"""Of all that the library says. Its one handler prints on stdout: `logger.setLevel(logging.WARNING)` leaves warnings,
`logger.handlers.clear()` nothing, `logger.addHandler(...)` writes it to another place too. Nothing is handed on to the root
logger, whose handlers would print it a second time."""


class ConsoleHandler(logging.Handler):
    """Prints as `say` and `show` were asked to."""

    def emit(self, record: logging.LogRecord) -> None:
        show = getattr(record, "show", None)
        if show is None:
            _print(record.getMessage(), sys.stdout)
        else:
            show()


if not logger.handlers:
    if logger.level == logging.NOTSET:  # else somebody has said what they want to read
        logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(ConsoleHandler())


def show(console: Console, line: str | Text, *, style: str | None = None) -> None:
    """Print a line of a run on a console of rich, through the logger."""
    plain = line if isinstance(line, str) else line.plain
    logger.info("%s", printable(plain), extra={"show": lambda: console.print(line, style=style, markup=False)})


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:  # Python's own, of a process that was started without
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with silenced():
        line = printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n"
        print(line, end="", file=stream, flush=True)  # whole, so that another thread's line does not end up in it


def say_at_once(text: str) -> None:
    """Print a line on stderr past Python's buffers and their locks, in one piece beside what other processes write.

    For a thread that must not wait for another one, and never raises either.
    """
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"{printable(text)}\n".encode())


def flush_within(seconds: float) -> None:
    """Write out what stdout still holds, unless another thread has its lock for so long."""

    def flush() -> None:
        if sys.stdout is not None:
            with silenced():
                sys.stdout.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(seconds)


@contextmanager
def silenced() -> Iterator[None]:
    """For output that may be lost: errors of the stream that it goes to end here."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: the stream was closed, or has not the characters
        _forget_at_exit()


@cache
def _forget_at_exit() -> None:
    """Python ends with 120 if it cannot write, at its end, what a stream still holds."""
    atexit.register(_forget)


def _forget() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Silenced:
    """A stream that may lose what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with silenced():
            self._stream.flush()


class SilencedConsole(Console):
    """Prints like `say`: it never raises because of its stream. (Rich itself ends the process when a pipe is closed.)"""

    @property
    def file(self) -> Any:
        return _Silenced(Console.file.fget(self))  # type: ignore[attr-defined]

    @file.setter
    def file(self, new: Any) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]


def is_text(typed: str) -> bool:
    """Whether what was typed or piped in was UTF-8; Python stands lone surrogates in for bytes that were not."""
    return not re.search(r"[\ud800-\udfff]", typed)


Lines = Callable[[Console], list[Text]]
"""What to show now, top to bottom."""


class Region(RenderHook):
    """Shows `lines` beneath everything that is printed, from `start` until `stop`, which leaves the last state standing."""

    def __init__(self, console: Console, lines: Lines) -> None:
        self.console = console
        self._given = lines
        self._over = threading.Event()
        self._over.set()
        self._streams: tuple[TextIO, TextIO] | None = None
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def start(self) -> None:
        self._over.clear()
        self.console.push_render_hook(self)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (self._above(stream) for stream in self._streams)
        atexit.register(self.stop)
        _shown.append(self)
        self.refresh()
        self._clock.start()

    def stop(self) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._clock.join()
        assert self._streams is not None, "a region that is not over was started"
        for proxy in (sys.stdout, sys.stderr):
            if isinstance(proxy, _Above):
                proxy.end()
        sys.stdout, sys.stderr = self._streams
        self.console.pop_render_hook()
        self.console.print(_Frame(self._lines, parked=False))
        atexit.unregister(self.stop)
        _shown.remove(self)

    def _lines(self, console: Console) -> list[Text]:
        """Painting goes on within every `print`: whatever is wrong with it must end none of them."""
        try:
            return self._given(console)
        except Exception as error:
            return [Text(f"the display failed: {error!r}")]

    def refresh(self) -> None:
        self.console.print(Control())

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by the console with what is about to be printed."""
        return [_WIPE, *renderables, _Frame(self._lines, parked=True)]

    def _tick(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            self.refresh()

    def _above(self, stream: TextIO) -> Any:
        """Of the two streams, those that lead to this terminal."""
        return _Above(stream, self.console) if stream.isatty() else stream


_shown: list[Region] = []


def wipe() -> None:
    """Take away what is shown, past all locks: for a process that is about to end without cleaning up."""
    if _shown:
        with suppress(OSError, ValueError):  # of a terminal that is gone
            os.write(_shown[0].console.file.fileno(), _ERASE.encode())


_ERASE = "\r\x1b[J"


class _Raw:
    """Text that is written as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield Segment(self.text, None, [(ControlType.CARRIAGE_RETURN,)])


_WIPE = _Raw(_ERASE)


class _Frame:
    """The lines, wiped first; `parked` leaves the cursor at the first of them, else it goes beneath the last."""

    def __init__(self, lines: Lines, *, parked: bool) -> None:
        self.lines = lines
        self.parked = parked

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        lines = [Text(""), *self.lines(console)][: max(console.height - 1, 1)]
        yield from _WIPE.__rich_console__(console, options)
        for number, line in enumerate(lines):
            line.truncate(console.width, overflow="ellipsis")
            is_end = self.parked and number == len(lines) - 1
            yield from line.render(console, end="" if is_end else "\n")
        if self.parked and len(lines) > 1:
            yield Segment(f"\x1b[{len(lines) - 1}A\r", None, [(ControlType.CURSOR_UP, len(lines) - 1)])


class _Above:
    """A stream whose whole lines are printed above the region; in all else it is the stream itself."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self.rich_proxied_file = stream  # by this name a Console finds the stream that it should write to
        self._console = console
        self._begun = ""  # of a line whose end has not come
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        with self._lock:
            lines, feed, self._begun = (self._begun + text).rpartition("\n")
            if feed:
                self._console.print(_Raw(lines + feed))
        return len(text)

    def flush(self) -> None:
        self.rich_proxied_file.flush()

    def end(self) -> None:
        """Print what was begun."""
        if self._begun:
            self.write("\n")
