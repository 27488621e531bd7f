"""Reward workers that are forks of one process instead of interpreters of their own: a fiftieth of a second, not a quarter.

`use()` makes a run's WorkerPool fork them. The process (`python tests/graders.py`) has imported worker.py and the built-in
rewards, and forks at a connection to its socket. The fork is the keeper of grpo/scoring/worker.py, with the environment, the
streams and the pipe that it would have; it differs in its parent, which is not the run. So the run's end of the connection
stands for the run: when it is gone, the keeper is told to end, as it does when its parent is gone.

A worker is an interpreter of its own where a fork would be another thing: where the environment has other variables that Python
reads when it starts, where `grpo` is not this repository's, and in test_reward_worker.py, which is about the start.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from grpo.scoring import worker, worker_pool  # noqa: E402

PRELOADED = "cloudpickle mpmath grpo.rewards grpo.turns.episode"
READ_AT_START = ("PYTHON", "OMP_", "OPENBLAS_", "MKL_", "LD_")
"""Beginnings of names of variables that are read before a fork could change them; PYTHONPATH a worker replaces anyway."""


# ---- in a process that has a WorkerPool --------------------------------------------------------------------------------


class Worker:
    """Of subprocess.Popen what a WorkerPool uses."""

    def __init__(self, address: str, environment: dict[str, str], pipe: int) -> None:
        self.returncode: int | None = None
        self._status = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status.connect(address)
        with tempfile.TemporaryFile() as text:
            text.write(json.dumps({"environment": environment, "directory": os.getcwd()}).encode())
            text.flush()
            socket.send_fds(self._status, [b"fork"], [text.fileno(), pipe, 2])
            (self.pid,) = struct.unpack("i", self._status.recv(4))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                message = self._status.recv(4)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a reward worker", timeout or 0.0) from None
            assert message, "the process that forks reward workers has ended"
            self.returncode = os.waitstatus_to_exitcode(struct.unpack("i", message)[0])
            self._status.close()
        return self.returncode

    def terminate(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # ended, and its status is under way
                os.kill(self.pid, signal.SIGTERM)


class Forker:
    """The process that forks, as the one that has started it sees it."""

    def __init__(self) -> None:
        self.address = f"\0grpo-graders-{os.getpid()}-{os.urandom(8).hex()}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.address)
        listener.listen(64)
        self._control, theirs = socket.socketpair()
        with listener, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(listener.fileno()), str(theirs.fileno())],
                pass_fds=[listener.fileno(), theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )

    def processor_seconds(self) -> float:
        """Of its forks that have ended."""
        own = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, own[13:15])) / os.sysconf("SC_CLK_TCK")


_ENVIRONMENT = dict(os.environ)  # of conftest.py, before any test changes its own
_started: dict[int, Forker] = {}
"""By the process that has started it: a fork of that has the address alone."""
_known: dict[str, str] = {}


def address() -> str:
    """Of the socket; the first call starts the process."""
    if not _known:
        _started[os.getpid()] = Forker()
        _known["address"] = _started[os.getpid()].address
    return _known["address"]


def use(known: str | None = None) -> None:
    """From here on the workers of this process and its forks are forks.

    Args:
        known: the address of what another process has started.
    """
    if known is not None:
        _known["address"] = known
    worker_pool._Worker._open = _open  # type: ignore[method-assign]


def processor_seconds() -> float:
    """Of the workers that have ended; not what their parent takes to import everything, once."""
    return _started[os.getpid()].processor_seconds() if os.getpid() in _started else 0.0


own_interpreter: Callable[[Any, int], Any] = worker_pool._Worker._open
"""What `use` replaces."""


def _open(self: Any, descriptor: int) -> Any:
    if _would_differ(self.environment):
        return own_interpreter(self, descriptor)
    return Worker(address(), self.environment, descriptor)


def _environment() -> dict[str, str]:
    return {**worker_pool.inherited(_ENVIRONMENT, ()), **worker_pool._ENVIRONMENT}


def _would_differ(environment: dict[str, str]) -> bool:
    """Whether an interpreter of its own would start otherwise, or import another `grpo` than this repository's."""
    own = _environment()
    for name in environment.keys() | own.keys():
        if name != "PYTHONPATH" and name.startswith(READ_AT_START) and environment.get(name) != own.get(name):
            return True
    return Path(worker.__file__) != ROOT / "grpo" / "scoring" / "worker.py"


# ---- in the process that forks, and in a fork --------------------------------------------------------------------------


def serve(listener: socket.socket, control: socket.socket) -> NoReturn:
    """Fork at each connection. Ends with all forks when the process that has started it has ended."""
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keepers: dict[int, socket.socket] = {}
    told: set[int] = set()  # to end
    while True:
        awaited = {status: pid for pid, status in keepers.items() if pid not in told}
        ready, _, _ = select.select([listener, control, woken, *awaited], [], [])
        if control in ready:
            for pid in keepers:
                os.kill(pid, signal.SIGTERM)
            os._exit(0)
        for status in awaited.keys() & set(ready):  # nothing is ever sent: its run is gone
            told.add(awaited[status])
            os.kill(awaited[status], signal.SIGTERM)
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                while woken.recv(4096):
                    pass
        while keepers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            told.discard(ended[0])
            with keepers.pop(ended[0]) as status, contextlib.suppress(OSError):
                status.send(struct.pack("i", ended[1]))
        if listener in ready:
            status, _ = listener.accept()
            _, fds, _, _ = socket.recv_fds(status, 16, 3)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for each in (listener, control, woken, wake, status, *keepers.values()):
                    each.close()
                become_keeper(*fds)
            for fd in fds:
                os.close(fd)
            keepers[pid] = status
            with contextlib.suppress(OSError):
                status.send(struct.pack("i", pid))


def become_keeper(text: int, pipe: int, errors: int) -> NoReturn:
    """As `python -P worker.py PIPE PARENT` with stdout closed, in a process group of its own."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(errors, 2)
        os.close(errors)
        with open(text, "rb") as file:
            file.seek(0)
            request = json.load(file)
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = [worker.__file__, str(pipe), str(os.getppid())]
        worker.main(pipe, os.getppid())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    for name in PRELOADED.split():
        importlib.import_module(name)
    tasks = os.listdir("/proc/self/task")
    assert len(tasks) == 1, f"{len(tasks)} threads; a fork would have one, and the locks of all"
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2])))
