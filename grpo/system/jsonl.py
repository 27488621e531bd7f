"""JSON Lines files of a run: appended through to the disk, read around what a kill cut short, rewound from their end.

A process may be killed, or a machine lose its power, at any byte of a line, so a line may end within a character or hold no
row at all. Nothing here reads a whole file into memory except `read_jsonl`, which returns its rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from grpo.system import progress
from grpo.system.files import to_json
from grpo.system.terminal import UNSAFE, say

Row = dict[str, Any]

BLOCK_BYTES = 2**20
"""That are read at a time, from a file's end."""


def json_line(row: Mapping[str, Any]) -> str:
    """A row as JSON in one line. It reads back exactly; what a terminal would obey, or UTF-8 cannot hold, is escaped."""
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", to_json(row, ensure_ascii=False))


@progress.busy("writing rows")
def append_jsonl(path: Path, rows: list[Row]) -> None:
    """Write rows through to the disk, on lines of their own even if the last one there was cut short.

    Raises:
        OSError: not one of them was written.
    """
    lines = "".join(json_line(row) + "\n" for row in rows).encode()
    with _appending(path) as file:
        file.write(lines)


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """A file to write whole lines to its end; through to the disk, or the file is as before and OSError is raised."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(b"\n" * _is_torn(path, size))
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


@contextmanager
def replacing_jsonl(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes rows, one at a time, to a file that takes the place of `path` when all of them are on the disk.

    Raises:
        OSError: `path` is as before; so it is after any other exception.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield lambda row: print(json_line(row), file=file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _is_torn(path: Path, size: int) -> bool:
    if size == 0:
        return False
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) != b"\n"


def read_jsonl(path: Path, keys: Collection[str] = ()) -> list[Row]:
    """All rows of a file; see `iterate_jsonl`."""
    return list(iterate_jsonl(path, keys))


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; NaN where a metric was no finite number."""
    return [{name: math.nan if v is None else v for name, v in row.items()} for row in iterate_jsonl(path, ["step"])]


def iterate_jsonl(path: Path, keys: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a file, one at a time; none if there is no file.

    Lines that are no objects with all the `keys` are left out, which is said; but for a last one without its line feed, which
    a kill cut short or which is being written.
    """
    if not path.exists():
        return
    unreadable: list[int] = []
    with path.open("rb") as file:  # not as text, of which `str.splitlines` would make more lines than there are
        for number, line in enumerate(file, 1):
            row = row_of(line, keys)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                unreadable.append(number)
    if unreadable:
        say(
            f"warning: {path}: {len(unreadable)} lines are no rows and are left out; the first is line {unreadable[0]}."
        )


def iterate_backwards(path: Path) -> Iterator[Row]:
    """The rows of a file that have a step, the last one first."""
    if path.exists():
        with path.open("rb") as file:
            yield from (row for _, line in _lines_backwards(file) if (row := row_of(line, ["step"])) is not None)


@progress.busy("setting rows aside")
def rewind_jsonl(path: Path, step: float) -> None:
    """Move what follows the last row of `step` or before to `<name>.superseded.jsonl`: a resumed run writes those steps anew,
    and loses nothing. A last line that a kill cut short goes there too.

    Rows are in the order of their steps, so the cut is found from the end. The file is cut only when its tail is safe elsewhere.

    Raises:
        OSError: there is no room for the tail, or the directory cannot be written to; the file is as before.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        cut = _end_of_last_row(file, step, size)
        if cut < size:
            file.seek(cut)
            _set_aside(file, path.with_suffix(".superseded.jsonl"))
            file.truncate(cut)
        if _is_torn(path, cut):  # a whole row, but for its line feed
            file.seek(cut)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _set_aside(tail: BinaryIO, path: Path) -> None:
    with _appending(path) as file:
        shutil.copyfileobj(tail, file, BLOCK_BYTES)


def _end_of_last_row(file: BinaryIO, step: float, size: int) -> int:
    """Where the last row of `step` or before ends, its line feed included; 0 if there is none."""
    for end, line in _lines_backwards(file):
        row = row_of(line, ["step"])
        if row is not None and row["step"] <= step:
            return min(end + 1, size)
    return 0


def _lines_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line ends, and the line without its line feed; the last one first, empty if the file ends with a line feed."""
    begin = end = file.seek(0, os.SEEK_END)
    first = b""
    while begin > 0:
        size = min(BLOCK_BYTES, begin)
        begin -= size
        file.seek(begin)
        first, *others = (file.read(size) + first).split(b"\n")
        for line in chain(reversed(others), [first] if begin == 0 else []):
            yield end, line
            end -= len(line) + 1


def row_of(line: bytes, keys: Collection[str]) -> Row | None:
    """None if a line is no row: cut short, overwritten with zeros, or something else than an object with these keys, of which
    `step` is a number.
    """
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(value, dict) and value.keys() >= set(keys)
    return value if is_row and ("step" not in keys or isinstance(value["step"], (int, float))) else None
