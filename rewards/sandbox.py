"""Run a Python program that nobody has read: no network, no files but a scratch folder, bounded time, memory and processes.

Two layers, of which each suffices where the other is missing:

- bubblewrap (`bwrap`), where it is installed and allowed: the program sees Python's files and its scratch folder and nothing
  else, and has network, processes and users of its own.
- the guard, in the program's own process before it runs: resource limits; a seccomp filter that forbids starting processes
  and other programs, signals, sockets and changing files' owners and modes; and, without bubblewrap, Landlock (Linux 5.13),
  which closes all files but the same few. Neither needs a privilege. See man 2 seccomp, man 7 landlock.

One process that cannot fork is ended by one kill. `unprotected` names what a machine leaves open.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 16 * 2**20  # of a file that the program writes, its output included
MAX_OPEN_FILES = 64
MAX_SCRATCH_BYTES = 64 * 2**20  # of all its files; it is ended soon after it wrote more
MAX_SCRATCH_FILES = 1_000
WATCH_SECONDS = 0.05

_SCRATCH = "/scratch"
_GUARD = Path(__file__).with_name("sandbox_guard.py")
_SYSTEM = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
_DEVICES = ["/dev/null", "/dev/urandom"]


class SandboxError(RuntimeError):
    """The sandbox did not start; the program never ran."""


@dataclass(frozen=True)
class Run:
    """What a program did: what it wrote to standard output, and its exit code; None if it was over its time."""

    output: bytes
    exit_code: int | None
    layers: frozenset[str]  # what protected from it: "bwrap", "seccomp", "landlock"


def run_python(
    program: str, *, seconds: float, memory_gib: float, stdin: str = "", tests: list[Any] | None = None
) -> Run:
    """Run a program under `__main__`; with `tests`, evaluate those in it afterwards, as `sandbox_guard.examine` says.

    Args:
        program: Python.
        seconds: wall-clock limit.
        memory_gib: limit of its address space.
        stdin: what it reads.
        tests: handed to `sandbox_guard.examine`.

    Raises:
        SandboxError: the sandbox did not start.
    """
    return _run(program, "bwrap" in working_layers(), seconds, memory_gib, stdin, tests)


@lru_cache(maxsize=1)
def working_layers() -> frozenset[str]:
    """The layers that work here; tried once.

    Raises:
        SandboxError: not even the guard starts.
    """
    if shutil.which("bwrap") is not None:
        try:
            return _run("", True, 20.0, 1.0).layers
        except SandboxError:  # user namespaces are forbidden, as in most containers
            pass
    return _run("", False, 20.0, 1.0).layers


def unprotected() -> str | None:
    """What a program could do on this machine; None if nothing is open."""
    layers = working_layers()
    missing = []
    if not layers & {"bwrap", "landlock"}:
        missing.append("read and write every file that this user can")
    if not layers & {"bwrap", "seccomp"}:
        missing.append("use the network, signal this user's processes and start processes that outlive it")
    elif "seccomp" not in layers:
        missing.append("start any number of processes until its time is up")
    if not missing:
        return None
    return (
        f"Programs that the model writes can {'; '.join(missing)}: of the sandbox only "
        f"{', '.join(sorted(layers)) or 'resource limits'} works here. Install bubblewrap and allow user namespaces, or use "
        "a kernel with Landlock (5.13), on x86-64 or arm64; or run in a container that has nothing to lose."
    )


def _run(
    program: str, in_bwrap: bool, seconds: float, memory_gib: float, stdin: str = "", tests: list[Any] | None = None
) -> Run:
    scratch = tempfile.mkdtemp(prefix="grpo-code-")
    request = {
        "program": program,
        "tests": tests,
        "seconds": seconds,
        "memory": int(memory_gib * 2**30),
        "file_bytes": MAX_FILE_BYTES,
        "files": MAX_OPEN_FILES,
        "landlock": None if in_bwrap else {"readable": _readable(), "devices": _DEVICES, "scratch": scratch},
    }
    head = json.dumps(request).encode()
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]  # no pipes: nothing can block
    try:
        os.write(files[0], head)
        _write_all(files[0], stdin.encode("utf-8", "surrogateescape"))
        os.lseek(files[0], 0, os.SEEK_SET)
        guard = [sys.executable, "-I", "-c", _GUARD.read_text(), str(len(head))]
        command = [*_bwrap(scratch), *guard] if in_bwrap else guard
        code = _wait(command, _SCRATCH if in_bwrap else scratch, scratch, files, time.monotonic() + seconds)
        said = os.pread(files[2], 10_000, 0).decode("utf-8", "replace")
        ready, _, layers = said.partition("\n")[0].partition("sandbox ready:")
        if ready or not said.startswith("sandbox ready:"):
            raise SandboxError(said.strip()[-500:] or f"exit code {code}")
        return Run(
            os.pread(files[1], MAX_FILE_BYTES + 1, 0),
            code,
            frozenset(layers.split()) | ({"bwrap"} if in_bwrap else set()),
        )
    except OSError as error:
        raise SandboxError(str(error)) from error
    finally:
        for file in files:
            os.close(file)
        _remove(scratch)


def _wait(command: list[str], home: str, scratch: str, files: list[int], deadline: float) -> int | None:
    """Run a command; its exit code, or None if it had to be killed, for its time or for what it wrote."""
    environment = {
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    process = subprocess.Popen(command, stdin=files[0], stdout=files[1], stderr=files[2], env=environment, cwd=scratch)
    ended = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        has_ended = False
        while not has_ended and (left := deadline - time.monotonic()) > 0 and not _overflows(scratch):
            has_ended = bool(poll.poll(min(left, WATCH_SECONDS) * 1000))
    finally:
        os.close(ended)
        process.kill()
        process.wait()
    return process.returncode if has_ended else None


def _overflows(scratch: str) -> bool:
    num_bytes = num_files = 0
    for folder, folders, names in os.walk(scratch):
        num_files += len(folders) + len(names)
        if num_files > MAX_SCRATCH_FILES:
            return True
        for name in names:
            with contextlib.suppress(OSError):
                num_bytes += os.lstat(os.path.join(folder, name)).st_size
    return num_bytes > MAX_SCRATCH_BYTES


def _remove(scratch: str) -> None:
    """Remove the folder, also from under a program whose bubblewrap was killed a moment ago."""
    deadline = time.monotonic() + 2.0
    while os.path.exists(scratch) and time.monotonic() < deadline:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _readable() -> list[str]:
    """Python's own folders and the system's libraries."""
    return [path for path in dict.fromkeys([sys.base_prefix, sys.prefix, *_SYSTEM]) if os.path.exists(path)]


def _bwrap(scratch: str) -> list[str]:
    shown = [word for path in _readable() for word in ("--ro-bind", path, path)]
    devices = [word for path in _DEVICES for word in ("--dev-bind", path, path)]
    isolated = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    return [
        "bwrap",
        *isolated,
        *shown,
        *devices,
        "--bind",
        scratch,
        _SCRATCH,
        "--remount-ro",
        "/",
        "--chdir",
        _SCRATCH,
        "--",
    ]
