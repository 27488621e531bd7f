"""Memory that the processes of this machine may still take: of the host, and of the container that they run in.

A container sees the host's /proc/meminfo. What it may take itself, its control groups say: the kernel kills whoever takes more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Of a control group: files with its limit and with what it takes, and in memory.stat the cached files that are dropped first."""


def available_bytes(root: Path = Path("/")) -> int:
    """The least of what the host has available and what every limit above this process leaves; 0 if nothing says.

    Args:
        root: of the file system that has /proc and /sys.
    """
    of_host = [1024 * kib for name, kib in _numbers(root / "proc/meminfo").items() if name == "MemAvailable"]
    return max(0, min([*of_host, *_left_by_limits(root)], default=0))


def _left_by_limits(root: Path) -> Iterator[int]:
    """Bytes that the control group of this process, and each that it is in, may still take, where one has a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers == "":
            yield from _left_by(mount, path, V2)
        elif "memory" in controllers.split(","):
            yield from _left_by(mount / "memory", path, V1)


def _left_by(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Where a container sees its own part alone, `path` may be one of the host's, or lead out of it: what is not there is passed
    over, up to `mount`, which then is the container's."""
    limit_file, usage_file, cached = names
    innermost = mount / path.lstrip("/")
    for group in (innermost, *innermost.parents):
        if not group.is_relative_to(mount):
            break
        limit, usage = _numbers(group / limit_file).get(""), _numbers(group / usage_file).get("")
        if limit is not None and usage is not None:
            yield limit - usage + _numbers(group / "memory.stat").get(cached, 0)


def _numbers(path: Path) -> dict[str, int]:
    """Of a file with a name and a number in each line, or with a lone number, whose name is empty. `max`, no limit, is none."""
    return {name: int(number) for name, number in re.findall(r"^(?:(\w+):? +)?(\d+)", _text(path), re.MULTILINE)}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
