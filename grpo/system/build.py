"""Which version of this library runs, and on which processor."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "grpo-zero"
"""On PyPI; `grpo` there is somebody else's."""


@cache
def own_version() -> str | None:
    """None where the library is used without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """Of the checkout that this package lies in, with `+` where files of it are changed; None elsewhere. Asked once in a process:
    what it has imported stays as it was."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
        head = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        return head + "+" * bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout)
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Its name, as Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
