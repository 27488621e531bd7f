"""Run a Python program that nobody has read: no network, no files but a scratch folder, bounded time, memory and processes.

Two layers:

- bubblewrap (`bwrap`), where it is installed and allowed: the program sees Python's files and nothing else, has network,
  processes, users and System V objects of its own, and a scratch folder in memory, limited in bytes and files.
- the guard, in the program's own process before it runs: resource limits, no capabilities, a seccomp filter that lists what is
  allowed; and, without bubblewrap, Landlock (Linux 5.13), which closes all files but the same few. None of it needs a
  privilege. See man 2 seccomp, man 7 landlock, man 7 capabilities.

A process that cannot start others, nor leave its process group, is ended by one kill. `unprotected` names what a machine
leaves open. Whatever goes wrong around a program is a SandboxError.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import marshal
import os
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 16 * 2**20  # of a file that the program writes, its output included
MAX_OPEN_FILES = 64
MAX_SCRATCH_BYTES = 64 * 2**20  # of all its files; without bubblewrap it is ended soon after it wrote more
MAX_SCRATCH_FILES = 1_000
WATCH_SECONDS = 0.05
START_SECONDS = 20.0  # for the sandbox itself: a program that is late on a busy machine is wrong, not unknown
REMOVE_SECONDS = 1.0
SWEEP_SECONDS = 60.0  # between looks for folders that a killed worker or a slow disk left

_PREFIX = "grpo-code-"
_SCRATCH = "/scratch"
_GUARD = Path(__file__).with_name("sandbox_guard.py")
_HARNESS = Path(__file__).with_name("sandbox_tests.py")
_BEGINNING = "import marshal, os, sys; exec(marshal.loads(os.pread(0, int(sys.argv[1]), 0)))"
_SYSTEM = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
_DEVICES = ["/dev/null", "/dev/urandom"]


class SandboxError(RuntimeError):
    """The sandbox did not start, or broke; what the program would have done is not known."""


@dataclass(frozen=True)
class Run:
    """What a program did: what it wrote to standard output, and its exit code; None if it was over its time."""

    output: bytes
    exit_code: int | None
    layers: frozenset[str]  # what protected from it: "bwrap", "seccomp", "landlock"


def run_python(
    program: str, *, seconds: float, memory_gib: float, stdin: str = "", tests: dict[str, Any] | None = None
) -> Run:
    """Run a program under `__main__`; or with `tests` beside it, whose results are then the output.

    Args:
        program: Python.
        seconds: wall-clock limit, once the sandbox has started.
        memory_gib: limit of the address space, of the program and of its tests each.
        stdin: what it reads.
        tests: handed to `sandbox_tests.judge`.

    Raises:
        SandboxError: the sandbox did not start, or broke.
    """
    return _run(program, "bwrap" in working_layers(), seconds, memory_gib, stdin, tests)


@lru_cache(maxsize=1)
def working_layers() -> frozenset[str]:
    """The layers that work here; tried once."""
    if shutil.which("bwrap") is not None:
        try:
            return _run("", True, 20.0, 1.0).layers
        except SandboxError:  # user namespaces are forbidden, as in most containers
            pass
    return _run("", False, 20.0, 1.0).layers


def runs_as_root() -> bool:
    """Whether a program runs as the machine's root: without bubblewrap there are no users of its own."""
    return os.geteuid() == 0 and "bwrap" not in working_layers()


def unprotected() -> str | None:
    """What a program could do on this machine, each thing by name; None if nothing is open."""
    layers = working_layers()
    missing = []
    if not layers & {"bwrap", "landlock"}:
        missing.append(
            "read and write every file that this user can, and through /proc the environment and memory of its processes"
        )
    if not layers & {"bwrap", "seccomp"}:
        missing.append(
            "use the network and UNIX sockets, signal, renice and pin this user's processes, leave System V objects, and "
            "start processes that outlive it"
        )
    elif "seccomp" not in layers:
        missing.append("start any number of processes until its time is up")
    if "bwrap" not in layers:
        missing.append("fill the disk of TMPDIR until its time is up, with files that it has removed and holds open")
    if "bwrap" not in layers and os.geteuid() == 0:
        missing.append("run as root, without root's capabilities")
    if not missing:
        return None
    return (
        f"Programs that the model writes can {'; '.join(missing)}: of the sandbox only "
        f"{', '.join(sorted(layers)) or 'resource limits'} works here. Install bubblewrap and allow user namespaces, or use "
        "a kernel with Landlock (5.13), on x86-64 or arm64; or run in a container that has nothing to lose."
    )


def _run(
    program: str,
    in_bwrap: bool,
    seconds: float,
    memory_gib: float,
    stdin: str = "",
    tests: dict[str, Any] | None = None,
) -> Run:
    """Whatever is raised around a program, a full disk or a text that is no UTF-8, is no bug of the reward's."""
    scratch, lock = None, None
    files: list[int] = []
    try:
        if not in_bwrap:
            scratch = tempfile.mkdtemp(prefix=_PREFIX)
            lock = _lock(scratch)
        for name in ("stdin", "stdout", "stderr"):  # no pipes: nothing can block
            files.append(os.memfd_create(name))
        rest = stdin.encode("utf-8", "surrogatepass") if tests is None else json.dumps(tests).encode()
        guard = _compiled(_GUARD.read_text(), _GUARD.name)
        head = marshal.dumps(_request(program, scratch, seconds, memory_gib, None if tests is None else len(rest)))
        _write_all(files[0], guard + head + rest)
        os.lseek(files[0], 0, os.SEEK_SET)
        command = [sys.executable, "-I", "-S", "-c", _BEGINNING, str(len(guard)), str(len(head))]
        command = [*_bwrap(), *command] if in_bwrap else command
        code = _wait(command, scratch, files, seconds)
        return _read(files, code, in_bwrap)
    except SandboxError:
        raise
    except Exception as error:
        raise SandboxError(f"{type(error).__name__}: {error}") from error
    finally:
        for file in files:
            os.close(file)
        if scratch is not None:
            _remove(scratch, time.monotonic() + REMOVE_SECONDS)
            _sweep(os.path.dirname(scratch))
        if lock is not None:
            os.close(lock)


@lru_cache(maxsize=8)
def _compiled(text: str, name: str) -> bytes:
    return marshal.dumps(compile(text, name, "exec"))


def _packages() -> list[str]:
    """Where installed packages lie: `site` takes three times as long to find them as the rest of a start."""
    return [path for path in site.getsitepackages() if os.path.isdir(path)]


def _request(
    program: str, scratch: str | None, seconds: float, memory_gib: float, num_test_bytes: int | None
) -> dict[str, Any]:
    """What the guard is told; without a scratch folder it is in bubblewrap and makes one."""
    in_memory = {"path": _SCRATCH, "num_bytes": MAX_SCRATCH_BYTES, "num_files": MAX_SCRATCH_FILES}
    return {
        "program": program,
        "harness": None if num_test_bytes is None else _compiled(_HARNESS.read_text(), _HARNESS.name),
        "packages": _packages(),
        "num_test_bytes": num_test_bytes,
        "seconds": seconds,
        "memory": int(memory_gib * 2**30),
        "file_bytes": MAX_FILE_BYTES,
        "files": MAX_OPEN_FILES,
        "tmpfs": in_memory if scratch is None else None,
        "landlock": None if scratch is None else {"readable": _readable(), "devices": _DEVICES, "scratch": scratch},
    }


def _read(files: list[int], code: int | None, in_bwrap: bool) -> Run:
    said = os.pread(files[2], 10_000, 0).decode("utf-8", "replace")
    ready, _, layers = said.partition("\n")[0].partition("sandbox ready:")
    if ready or not said.startswith("sandbox ready:"):
        raise SandboxError(said.strip()[-500:] or f"exit code {code}")
    outer = {"bwrap"} if in_bwrap else set()
    return Run(os.pread(files[1], MAX_FILE_BYTES + 1, 0), code, frozenset(layers.split()) | outer)


def _wait(command: list[str], scratch: str | None, files: list[int], seconds: float) -> int | None:
    """Run a command; its exit code, or None if it had to be killed, for its time or for what it wrote.

    The time is counted from when the sandbox says that it is ready.
    """
    home = scratch or _SCRATCH
    environment = {
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        command,
        stdin=files[0],
        stdout=files[1],
        stderr=files[2],
        env=environment,
        cwd=scratch or "/",
        start_new_session=True,
    )
    has_ended = is_ready = False
    deadline = time.monotonic() + START_SECONDS
    try:
        with _closing(os.pidfd_open(process.pid)) as ended:
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            while not has_ended and (left := deadline - time.monotonic()) > 0 and not _overflows(scratch):
                has_ended = bool(poll.poll(min(left, WATCH_SECONDS) * 1000))
                if not is_ready and os.fstat(files[2]).st_size > 0:
                    is_ready, deadline = True, time.monotonic() + seconds
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the group's number is still its own
        process.wait()
    return process.returncode if has_ended else None


def _overflows(scratch: str | None) -> bool:
    """Whether there is more in the folder than allowed, or something that cannot be looked into."""
    folders = [] if scratch is None else [scratch]
    num_bytes = num_files = 0
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    num_files += 1
                    num_bytes += _num_bytes(entry)
                    if num_files > MAX_SCRATCH_FILES or num_bytes > MAX_SCRATCH_BYTES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:  # closed to its owner, or too deep for a path
            return True
    return False


def _num_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _remove(scratch: str, deadline: float) -> None:
    """Remove the folder, however deep it is and whatever its modes, also while the last of the program is dying."""
    while os.path.exists(scratch) and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            _remove_once(scratch, deadline)


def _lock(scratch: str) -> int | None:
    """Who uses a folder holds its lock; None if another does."""
    folder = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(folder)
        return None
    return folder


_last_sweep = float("-inf")


def _sweep(parent: str) -> None:
    """Remove, now and then and for a bounded time, this user's folders that nobody uses any more."""
    global _last_sweep
    if time.monotonic() - _last_sweep < SWEEP_SECONDS:
        return
    _last_sweep = time.monotonic()
    with contextlib.suppress(OSError):
        for folder in [entry for entry in os.scandir(parent) if entry.name.startswith(_PREFIX)]:
            found = folder.stat(follow_symlinks=False)
            is_old = time.time() - found.st_mtime > SWEEP_SECONDS  # one just made has no lock yet
            if found.st_uid == os.geteuid() and is_old and (lock := _lock(folder.path)) is not None:
                _remove(folder.path, _last_sweep + REMOVE_SECONDS)
                os.close(lock)


def _remove_once(scratch: str, deadline: float) -> None:
    """Folders inside are emptied into the topmost one, so that neither recursion nor the length of a path limits depth."""
    with _closing(os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)) as top:
        names = os.listdir(top)
        number = 0
        while names and time.monotonic() < deadline:
            name = names.pop()
            if _is_unlinked(name, top):
                continue
            with _closing(_open_folder(name, top)) as folder:
                for child in os.listdir(folder):
                    if _is_unlinked(child, folder):
                        continue
                    os.close(_open_folder(child, folder))  # makes it ours to move
                    number += 1
                    names.append(f".{number}-{time.monotonic_ns()}")
                    os.rename(child, names[-1], src_dir_fd=folder, dst_dir_fd=top)
            os.rmdir(name, dir_fd=top)
    os.rmdir(scratch)


def _is_unlinked(name: str, folder: int) -> bool:
    """Remove a file; False if it is a folder."""
    try:
        os.unlink(name, dir_fd=folder)
    except (IsADirectoryError, PermissionError):
        return False
    return True


def _open_folder(name: str, parent: int) -> int:
    """Open a folder of any mode, and never what a link points to."""
    with _closing(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)) as handle:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _readable() -> list[str]:
    """Python's own folders and the system's libraries."""
    return [path for path in dict.fromkeys([sys.base_prefix, sys.prefix, *_SYSTEM]) if os.path.exists(path)]


def _bwrap() -> list[str]:
    """The guard mounts the scratch folder, which takes a capability in a user namespace of its own, and drops it."""
    shown = [word for path in _readable() for word in ("--ro-bind", path, path)]
    devices = [word for path in _DEVICES for word in ("--dev-bind", path, path)]
    isolated = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    powers = ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]
    program = shutil.which("bwrap") or "bwrap"  # found by this process's PATH; the program's environment has none
    return [program, *isolated, *powers, *shown, *devices, "--dir", _SCRATCH, "--remount-ro", "/", "--chdir", "/", "--"]
