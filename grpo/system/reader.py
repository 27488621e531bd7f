"""Standard output that goes to a reader which may end before it has read all, as `head` does."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_WITHOUT_READER = 141
"""128 + SIGPIPE, as a shell counts the signal that ends other tools then."""


class ReaderEnded(BrokenPipeError):
    """Of standard output alone. The broken pipe of a worker or a socket is an error like any other."""


class _Pipe(io.FileIO):
    def write(self, data: Any) -> int:
        """Raises ReaderEnded."""
        try:
            return super().write(data)
        except BrokenPipeError as error:
            raise ReaderEnded(*error.args) from None


@contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """What prints here ends with its reader, without a traceback.

    Raises:
        SystemExit: EXIT_WITHOUT_READER.
    """
    before, pipe = sys.stdout, _told_apart(sys.stdout)
    if pipe is None:
        yield
        return
    sys.stdout = pipe
    try:
        yield
        pipe.flush()
    except ReaderEnded:
        raise SystemExit(EXIT_WITHOUT_READER) from None
    finally:
        _flush_or_lose()
        sys.stdout = before


@contextmanager
def outlives_its_reader() -> Iterator[None]:
    """What prints here goes on without its reader, as far as it does not mind, and keeps its exit code."""
    try:
        yield
    finally:
        _flush_or_lose()


def _flush_or_lose() -> None:
    """What standard output still holds would be an error as Python ends, and the exit code 120."""
    if sys.stdout is None:  # of a process that was started without
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.flush()


def _told_apart(stream: Any) -> io.TextIOWrapper | None:
    """The same stream, whose broken pipe is a ReaderEnded; None if it is no pipe."""
    if not isinstance(stream, io.TextIOWrapper):
        return None
    try:
        number = stream.fileno()
        mode = os.fstat(number).st_mode
    except (OSError, ValueError):
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    pipe = _Pipe(number, "w", closefd=False)
    return io.TextIOWrapper(
        pipe if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(pipe),  # the former with python -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
