"""A folder that appears whole or not at all, checked before the work."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.system.files import GIB, flush, free_bytes


def check_destination(out: Path) -> None:
    """Raises ValueError if something is there already, or nothing can be made there."""
    if out.exists() or out.is_symlink():
        raise ValueError(
            f"--out is {str(out)!r}; it is there already, and nothing is written over. Name another, or remove it."
        )
    there = next(path for path in out.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"--out is {str(out)!r}; nothing can be made in {there}. Correct its permissions, or name another."
        )


def check_room(out: Path, num_bytes: int, *, setting: str = "--out") -> None:
    """Raises ValueError if the disk has no room for so many bytes."""
    free = free_bytes(out)
    if num_bytes > free:
        raise ValueError(
            f"{setting} is {str(out)!r}; the export takes about {num_bytes / GIB:.3g} GiB, and {free / GIB:.3g} GiB are free "
            "there. Free some space, name a directory on another disk, or choose a smaller --quantization."
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write in, which is renamed to `out` at the end; removed if that is not reached."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        yield partial
        for path in sorted(partial.rglob("*")):
            flush(path)
        flush(partial)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
