"""A file of samples that several processes write, question by question, and that another start goes on with.

    DIR/settings.json     what is asked of which model; other settings are refused
    DIR/samples.jsonl     the samples of a question in one piece, in whatever order the questions are done
    DIR/lock              one start at a time

A question whose samples were cut short by a kill is taken out of the file and answered again.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from grpo.observe.bar import Bar
from grpo.system import jsonl
from grpo.system.files import replace_text
from grpo.system.jsonl import append_jsonl, iterate_jsonl, replacing_jsonl

SAMPLES, SETTINGS = "samples.jsonl", "settings.json"


class Book:
    """Samples on their way into the file, the samples of a question at once."""

    WRITE_EVERY = 2.0  # seconds; writing waits for the disk

    def __init__(self, path: Path, key: Mapping[str, Any], bar: Bar) -> None:
        """
        Args:
            key: columns that every row of this book has in front.
            bar: of the questions of this process.
        """
        self.path, self.key, self.bar = path, dict(key), bar
        self.written: set[int] = set()
        self._waiting: list[dict[str, Any]] = []
        self._last_write = time.monotonic()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of a question, which each have its number as `row`."""
        self._waiting += [{**self.key, **row} for row in rows]
        self.written.add(rows[0]["row"])
        self.bar.add()
        if time.monotonic() - self._last_write > self.WRITE_EVERY:
            self.flush()

    def flush(self) -> None:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            append_jsonl(self.path, self._waiting)
        self._waiting = []
        self._last_write = time.monotonic()


class Samples:
    """The rows of a file that grows, of one benchmark after the other.

    A line is read when it is new, and once more if it is of a benchmark that comes later. What is kept of it is its place.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """
        Args:
            names: of the columns that say to what a row belongs.
        """
        self.path, self.names = path, tuple(names)
        self._end = 0  # of what has been read
        self._places: dict[tuple[Any, ...], list[int]] = {}

    def of(self, key: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows with these values of the columns, by question and sample."""
        wanted = tuple(key[name] for name in self.names)
        with self.path.open("rb") as file:
            found = [_row_at(file, place) for place in self._places.get(wanted, [])]
            file.seek(self._end)
            for line in file:
                if (row := jsonl.row_of(line, (*self.names, "row", "sample"))) is not None:
                    own = tuple(row[name] for name in self.names)
                    self._places.setdefault(own, []).append(self._end)
                    found += [row] if own == wanted else []
                self._end += len(line)
        return sorted(found, key=lambda row: (row["row"], row["sample"]))


def _row_at(file: BinaryIO, place: int) -> dict[str, Any]:
    file.seek(place)
    row = jsonl.row_of(file.readline(), ())
    assert row is not None, "it was a row when its place was noted, and the file is only added to"
    return row


@contextmanager
def writing(out: Path, option: str) -> Iterator[None]:
    """Say what a user can do where the disk is full or read-only, or a directory belongs to another."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{option} is {str(out)!r}; it cannot be written to: {error}. Make room there, correct its permissions, or choose "
            f"another {option}."
        ) from error


Difference = Callable[[str, Any, Any], str]
"""Of the name of a setting, its value there and the one that is wanted: how they differ, in words."""


@contextmanager
def claimed(
    out: Path, wanted: Mapping[str, Any], *, option: str, difference: Difference, results: Sequence[str] = ()
) -> Iterator[None]:
    """Make the directory, or see that it holds samples of the same settings, and keep other starts out of it.

    Args:
        wanted: what settings.json is to hold.
        option: what the directory was named with, for errors.
        results: other files that bind a start to the settings, besides samples.

    Raises:
        ValueError: it holds something else, or samples of other settings; another process is at work there; or it cannot be
            written to.
    """
    with writing(out, option):
        found = {path.name for path in out.iterdir()} if out.exists() else set()
        if SETTINGS not in found and found - {"lock"}:
            raise ValueError(
                f"{option} is {str(out)!r}; the directory holds something else. Choose another, or empty it."
            )
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("w")
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{option} is {str(out)!r}; another process is at work there, and both would answer the same questions. Wait "
                f"until it has ended, or choose another {option}."
            ) from None
        if any((out / name).exists() and (out / name).stat().st_size for name in (SAMPLES, *results)):
            before = _settings_of(out, option)
            for name, value in wanted.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{option} is {str(out)!r}; {difference(name, before.get(name), value)}: their samples must not be "
                        f"mixed. Choose another {option}, or the same settings to go on."
                    )
        with writing(out, option):
            replace_text(out / SETTINGS, json.dumps(wanted, indent=1))
        yield


def _settings_of(out: Path, option: str) -> dict[str, Any]:
    try:
        settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no mapping")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{option} is {str(out)!r}; {SETTINGS} there cannot be read ({error}), and says which settings the samples are of. "
            f"Restore it, or choose another {option}."
        ) from None
    return settings


def finished(path: Path, names: Sequence[str], wanted: Mapping[Any, int]) -> set[Any]:
    """The questions all of whose samples are in the file. Others, which a kill cut short, are taken out: they come again.

    The file may be larger than memory: it is read line by line, and written anew only if something has to go.

    Args:
        names: of the columns that tell questions apart; a single one is the key itself, several are a tuple.
        wanted: how many samples each question has.
    """
    if not path.exists():
        return set()

    def key(row: Mapping[str, Any]) -> Any:
        return row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)

    needed = (*names, "sample")
    counts = Counter(key(row) for row in iterate_jsonl(path, needed))
    done = {each for each, count in counts.items() if count == wanted.get(each)}
    with path.open("rb") as file:
        num_lines, is_whole = 0, True
        for line in file:
            num_lines, is_whole = num_lines + 1, line.endswith(b"\n")
    if done != set(counts) or num_lines != counts.total() or not is_whole:
        with replacing_jsonl(path) as write:
            for row in iterate_jsonl(path, needed):
                if key(row) in done:
                    write(row)
    return done
