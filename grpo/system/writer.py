"""Files of a directory that is to appear whole or not at all: written at once, or in a thread from copies, with checksums.

Every process has a Writer of its own for the files that it adds. Whoever makes the directory appear asks all of them for their
lists first. Nothing here raises: a full disk on one process must not leave the others waiting in a collective.
"""

from __future__ import annotations

import datetime
import decimal
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from grpo.system import progress
from grpo.system.files import checksum, flush

Files = dict[str, tuple[int, str]]
"""Path of each file within its directory, its size in bytes, and its checksum."""

Write = Callable[[Path, Any, Callable[[Any, Path], Any]], None]
"""`write(path, data, save)` lets `save(data, path)` make a file or a directory of files, now or later, but of `data` as it is."""


def write_now(path: Path, data: Any, save: Callable[[Any, Path], Any]) -> None:
    """The plainest Write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress.busy(f"writing {path.name}"):
        save(data, path)


class Writer:
    """One process's files below `directory`."""

    def __init__(self, directory: Path, *, background: bool) -> None:
        """Args: background: copy what is to be written into the machine's memory, and write in a thread from `start` on."""
        self.directory = directory
        self.background = background
        self.error: str | None = None  # the first thing that went wrong; nothing is written after it
        self.files: Files = {}
        self._jobs: list[Callable[[], None]] = []
        self._thread = Thread(target=self._work)

    def write(self, path: Path, data: Any, save: Callable[[Any, Path], Any]) -> None:
        """See Write."""
        if self.background:
            self._jobs.append(partial(self._attempt, self._save, path, copied(data), save))
        else:
            self._attempt(self._save, path, data, save)

    def start(self) -> None:
        """Let the thread write what was given to `write`; without `background` it is written already."""
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until `files` and `error` are final."""
        with progress.busy("writing a checkpoint"):
            self._thread.join()

    def _work(self) -> None:
        while self._jobs:
            self._jobs.pop(0)()  # and let go of its copy

    def _save(self, path: Path, data: Any, save: Callable[[Any, Path], Any]) -> None:
        with progress.busy(f"writing {path.name}"):
            write_now(path, data, save)
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    flush(file)
                    self.files[str(file.relative_to(self.directory))] = file.stat().st_size, checksum(file)

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        if self.error is None:
            try:
                work(*arguments)
            except Exception as error:  # of a disk, a file system, or a library on top of them
                self.error = f"{type(error).__name__}: {error}"


class Own(dict[str, Tensor]):
    """Tensors in the machine's memory that nobody else has: they may be written later without a copy."""


def copied(data: Any) -> Any:
    """Nested dictionaries, lists and tuples with copies of their tensors in the machine's memory; one copy of tied ones.

    Of `Own` there is no need for any.
    """
    if isinstance(data, Own):
        return data
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = _copy(value.detach(), threads)
        return copies[key]

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # other threads copy than the one that computed
    with ThreadPoolExecutor(COPY_THREADS) as threads, progress.busy("copying what is to be written"):
        return tree_map(copy, data)


COPY_THREADS = 8
COPY_BYTES = 2**26
"""A GPU fills fresh memory of the machine at about 1 GiB/s for each thread that asks for it, in pieces of this size."""


def _copy(source: Tensor, threads: ThreadPoolExecutor) -> Tensor:
    target = torch.empty(source.shape, dtype=source.dtype)
    step = COPY_BYTES // max(source.element_size(), 1)
    pairs = zip(target.view(-1).split(step), source.reshape(-1).split(step), strict=True)
    list(threads.map(lambda pair: pair[0].copy_(pair[1]), pairs))
    return target


def problem_with(directory: Path, files: Files) -> str | None:
    """What is wrong with the first of these files that is not as it was written; None if all are."""
    for name, (size, expected) in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if checksum(path) != expected:
            return f"{name} is not what was written: its checksum differs"
    return None


def load_tensors(path: Path, *, classes: Sequence[type | tuple[type, str]] = (), mmap: bool = False) -> Any:
    """What `save_tensors` wrote, into the machine's memory, without running code that a file may bring along.

    Args:
        classes: of the objects that may be in it, besides tensors and plain values; beside one, another name that a file may have
            for it.

    Raises:
        ValueError: there are others.
    """
    try:
        with torch.serialization.safe_globals([*classes, *PLAIN]):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise ValueError(
            f"{path} is not loaded, because what it holds may run code ({', '.join(unknown) or error}). If the checkpoint is "
            "your own, move it away, and the run resumes from the one before; else do not trust it."
        ) from None


PLAIN = (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal)
"""What a column of a data set may hold besides numbers and text."""


def save_tensors(data: Any, path: Path) -> None:
    """torch.save without its own checksums, which are slower than ours."""
    own = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(data, path)
    finally:
        torch.serialization.set_crc32_options(own)
