"""Small files: written whole or not at all, pushed to the disk, told apart by their content; and JSON proper."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash

from grpo.system import progress

GIB = 2**30


def to_json(value: Any, **options: Any) -> str:
    """As JSON proper: of numbers, NaN and the infinities become null, for which JSON has no other word."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def flush(path: Path) -> None:
    """Push a file, or a directory's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file that is there whole, or as before, whatever ends the process meanwhile."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    flush(new)
    os.replace(new, path)


def checksum(path: Path) -> str:
    """XXH3 of a file's content, 128 bits: as fast as the file is read, and blind to intent, not to chance."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
            progress.tick()
    return digest.hexdigest()


def free_bytes(directory: Path) -> int:
    """Of the disk that it lies on, or will."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
