"""What the start-up check of gold answers found, kept from one start to the next.

Reading 3,000 LaTeX answers takes some twenty seconds, and the next run on the same data would get the same verdicts. They are
kept under a key of everything that they can depend on: the rows' contents, the functions with their arguments, the source of the
whole package `grpo.rewards`, Python's version and that of every installed package. Functions from elsewhere are asked at every
start: nobody can say what else they read. The files lie in $XDG_CACHE_HOME/grpo or ~/.cache/grpo and may be removed at any time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import xxhash

KEPT_PACKAGE = "grpo.rewards"
Reasons = list[str | None]
_NAME_OR_VERSION = re.compile(r"^(?:Name|Version):.*$", re.MULTILINE)


def key(calls: Iterable[bytes], functions: Sequence[Callable[..., Any]]) -> str | None:
    """The name under which the verdicts of these calls are kept; None: they are not to be.

    Args:
        calls: what each call is given, and which function it is of, in bytes that are the same for the same contents.
        functions: the functions that are called.
    """
    if not functions or any(not _is_ours(function) for function in functions):
        return None
    state = xxhash.xxh3_128(_environment())
    for function in functions:
        state.update(f"{function.__module__}.{function.__qualname__}\n".encode())
    for call in calls:
        state.update(call + b"\n")
    return state.hexdigest()


def _is_ours(function: Callable[..., Any]) -> bool:
    """Whether its source is that of the package, as it lies there: nothing that was patched or defined in a session."""
    if not f"{getattr(function, '__module__', '')}.".startswith(f"{KEPT_PACKAGE}.") or not hasattr(
        function, "__code__"
    ):
        return False
    return Path(function.__code__.co_filename).resolve().parent == _package_folder()


def _package_folder() -> Path | None:
    found = importlib.util.find_spec(KEPT_PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).resolve().parent


@cache
def _environment() -> bytes:
    """Python, every installed package's version, and the source of the rewards."""
    folder = _package_folder()
    assert folder is not None, "asked only for functions of this package"
    state = xxhash.xxh3_128(platform.python_version().encode())
    for package in sorted(map(_name_and_version, distributions())):
        state.update(package.encode() + b"\n")
    for path in sorted(folder.rglob("*.py")):
        state.update(str(path.relative_to(folder)).encode() + b"\n" + path.read_bytes())
    return state.digest()


def _name_and_version(package: Distribution) -> str:
    """Of what it says of itself the two lines; parsing all of it (`package.version`) takes half a second for 200 packages."""
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    return " ".join(sorted(_NAME_OR_VERSION.findall(text.partition("\n\n")[0])))


def load(name: str, num_rows: int) -> Reasons | None:
    """The verdicts kept under a name: why each row cannot be graded, None if it can. None as a whole: there are none."""
    try:
        kept = json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
        reasons = kept["reasons"]
        if kept["num_rows"] != num_rows or not all(isinstance(reason, str) for reason in reasons.values()):
            return None
        return [reasons.get(str(number)) for number in range(num_rows)]
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # no file, no home, or a damaged file
        return None


def save(name: str, reasons: Reasons) -> None:
    """Keep verdicts. A folder that cannot be written to is no error, and the file appears whole or not at all."""
    kept = {"num_rows": len(reasons), "reasons": {n: reason for n, reason in enumerate(reasons) if reason is not None}}
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(path, folder / f"{name}.json")
        except OSError:
            os.unlink(path)


def _folder() -> Path:
    """Raises RuntimeError if there is no home directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "grpo" / "graded-rows"
