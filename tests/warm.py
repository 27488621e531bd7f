"""Starts Python processes that need not import torch, transformers and DeepSpeed: forks of one that has.

`warm.run(["tests/worker.py", "--kills", "3"])` is `subprocess.run([sys.executable, "tests/worker.py", "--kills", "3"])`, ten
seconds faster; `-c CODE` and `-m MODULE` are understood too. `warm.Process` is what tests use of subprocess.Popen.

The parent (`python tests/warm.py`) holds packages of others and what of grpo a run imports, one thread and no process group. A
fork has the environment, directory, arguments and streams that it is given, and imports the tests' modules itself, and grpo too
where its path leads to another one. It differs from an interpreter of its own in this:

- its parent is not the test, and /proc/self/cmdline is that of `warm.py`: tests of launchers and of orphans start a real one;
- variables that Python or a package reads when it starts cannot be changed (`FROZEN`): a ValueError;
- when its threads have ended and what atexit is to do is done, it is gone: objects are not taken down one by one, for seconds;
- all forks hash strings alike, so that sets of strings have one order in all ranks; the tests of launchers keep that difference.

Where there is a GPU, whose driver does not survive a fork, each becomes an interpreter of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

if __name__ != "__main__":
    import graders

ROOT = Path(__file__).parents[1]
PACKAGES = """
torch torch.distributed torch.utils.flop_counter torch.utils.module_tracker torch.nn.attention.varlen
transformers transformers.models.qwen2.modeling_qwen2 transformers.models.qwen2.tokenization_qwen2 transformers.generation
accelerate deepspeed deepspeed.ops.op_builder.all_ops deepspeed.runtime.zero.muon.muon_optimizer
deepspeed.runtime.zero.stage_1_and_2 deepspeed.runtime.zero.stage3 deepspeed.runtime.bf16_optimizer
deepspeed.module_inject.auto_ep_layer peft peft.tuners.lora datasets safetensors.torch numpy.ctypeslib
rich.console rich.live rich.table rich._emoji_codes pydantic yaml cloudpickle xxhash mpmath pytest
setuptools torch.utils.serialization.config
matplotlib.pyplot matplotlib.backends.backend_agg
"""
OURS = """
grpo grpo.trainer grpo.assembly grpo.cli grpo.cli.train grpo.sft.trainer grpo.rollout.engine grpo.rollout.hf grpo.run.reshard
grpo.rewards.accuracy grpo.rewards.format
"""
"""Of this repository, what a run imports. A fork that would find another grpo, or none, has none of it."""
FROZEN = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TRITON_", "CUDA_", "HF_", "TRANSFORMERS_", "LD_")
"""Beginnings of the names of variables that are read when something is imported."""
GRACE_SECONDS = 20.0
"""In which the others of a group can end by themselves, and say why, after one has failed; a launcher gives them 30."""
PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL


# ---- in the process that tests ---------------------------------------------------------------------------------------


class Process:
    """A Python process; of subprocess.Popen what tests use. The streams are of text."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        in_terminal: bool = False,
    ) -> None:
        """Args: arguments: those of `python`. in_terminal: stdin is one, which becomes the controlling one of a new session."""
        self.returncode: int | None = None
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        theirs = []  # of the pipes, what the process gets
        streams: list[int] = []
        stdout, stderr = (stdin, stdin) if in_terminal else (stdout, stderr)
        for number, (name, stream) in enumerate(
            zip(("stdin", "stdout", "stderr"), (stdin, stdout, stderr), strict=True)
        ):
            if stream == PIPE:
                read, write = os.pipe()
                theirs.append(write if number else read)
                setattr(self, name, os.fdopen(read) if number else os.fdopen(write, "w"))
                streams.append(theirs[-1])
            elif stream == DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
                streams.append(theirs[-1])
            elif stream == STDOUT:
                streams.append(streams[1])
            else:
                streams.append(number if stream is None else stream if isinstance(stream, int) else stream.fileno())
        try:
            request = {
                "arguments": [str(argument) for argument in arguments],
                "environment": dict(os.environ if env is None else env),
                "directory": str(cwd or Path.cwd()),
                "in_terminal": in_terminal,
                "graders": graders.address(),
            }
            self._status = _parent().start(request, streams)
        finally:
            for end in theirs:
                os.close(end)
        (self.pid,) = struct.unpack("i", self._status.recv(4))

    def poll(self) -> int | None:
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises: TimeoutError."""
        if self._await(timeout) is None:
            raise TimeoutError(f"process {self.pid} has not ended within {timeout} s")
        assert self.returncode is not None, "it has ended"
        return self.returncode

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                message = self._status.recv(4)
            except (TimeoutError, BlockingIOError):
                return None
            assert message, "the parent of all forks has ended"
            self.returncode = os.waitstatus_to_exitcode(struct.unpack("i", message)[0])
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    arguments: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    stdout: int | IO[Any] | None = PIPE,
    stderr: int | IO[Any] | None = PIPE,
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([sys.executable, *arguments], capture_output=True, text=True).

    Raises:
        AssertionError: it was killed after so many seconds; with what it had written.
    """
    (done,) = run_together([arguments], timeout=timeout, envs=[env], cwd=cwd, stdout=stdout, stderr=stderr)
    return done


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    timeout: float,
    envs: Sequence[Mapping[str, str] | None],
    cwd: Path | str | None = None,
    stdout: int | IO[Any] | None = PIPE,
    stderr: int | IO[Any] | None = PIPE,
) -> list[subprocess.CompletedProcess[str]]:
    """Processes of one group: all are killed once one has failed and the others have had some seconds to end by themselves.

    Raises:
        AssertionError: none has failed, but not all have ended after so many seconds; with what they had written.
    """
    files = [[_file() if stream == PIPE else stream for stream in (stdout, stderr)] for _ in commands]
    processes: list[Process] = []
    try:
        for command, env, (out, err) in zip(commands, envs, files, strict=True):
            processes.append(Process(command, env=env, cwd=cwd, stdin=DEVNULL, stdout=out, stderr=err))
        deadline = time.monotonic() + timeout  # without what the parent's imports take
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
            if any(codes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.01)
        is_late = None in codes and not any(codes)
    finally:
        for process in processes:
            process.kill()
    done = []
    for command, process, pair in zip(commands, processes, files, strict=True):
        said = [
            _read(file) if original == PIPE else None for file, original in zip(pair, (stdout, stderr), strict=True)
        ]
        done.append(subprocess.CompletedProcess(list(command), process.wait(), *said))
    if is_late:
        written = "\n".join(f"rank {rank}: {each.stdout}\n{each.stderr}" for rank, each in enumerate(done))
        raise AssertionError(f"{commands[0]} did not end within {timeout} s:\n{written[-12000:]}")
    return done


def _file() -> IO[str]:
    """Rather than a pipe, which somebody would have to empty all the time."""
    return tempfile.TemporaryFile("w+", errors="replace")


def _read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


_ENVIRONMENT = dict(os.environ)  # of conftest.py, before any test changes its own


class _Parent:
    """The process that forks."""

    def __init__(self) -> None:
        import torch

        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as it
        environment = {name: value for name, value in _ENVIRONMENT.items() if name != "PYTHONPATH"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), "exec" if torch.cuda.is_available() else "fork"],
                pass_fds=[theirs.fileno()],
                stdin=DEVNULL,
                stdout=self._log,
                stderr=STDOUT,
                cwd=ROOT,
                env=environment,
            )

    def processor_seconds(self) -> float:
        """Of its forks that have ended."""
        own = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, own[13:15])) / os.sysconf("SC_CLK_TCK")

    def start(self, request: dict[str, Any], streams: list[int]) -> socket.socket:
        """Fork; what comes through the socket is the process id and, in the end, the wait status."""
        for name in request["environment"].keys() | _ENVIRONMENT.keys():
            value, before = request["environment"].get(name), _ENVIRONMENT.get(name)
            if name != "PYTHONPATH" and name.startswith(FROZEN) and value != before:
                raise ValueError(
                    f"{name} is {value!r}; a fork of tests/warm.py has what it had when its packages were imported, {before!r}. "
                    "Start a process of its own, by subprocess."
                )
        ours, theirs = socket.socketpair()
        text = os.memfd_create("request")
        try:
            with theirs:
                os.write(text, json.dumps(request).encode())
                socket.send_fds(self._control, [b"fork"], [text, theirs.fileno(), *streams])
        except OSError as error:
            self._log.seek(0)
            raise RuntimeError(f"the parent of all forks has ended: {self._log.read()[-3000:]}") from error
        finally:
            os.close(text)
        return ours


_started: list[_Parent] = []


def _parent() -> _Parent:
    """The one of this process; a fork of it, or a process that it starts, has its own."""
    if not _started:
        _started.append(_Parent())
    return _started[0]


def processor_seconds() -> float:
    """Of all forks that have ended; not what their parent takes to import everything, once."""
    return sum(parent.processor_seconds() for parent in _started) + graders.processor_seconds()


# ---- in the parent of all forks, and in a fork -----------------------------------------------------------------------


def serve(control: socket.socket) -> dict[str, Any]:
    """Fork at each request; returns in forks alone, with theirs. Ends with all forks when the process that tests has ended."""
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forks: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            while _drained(woken):
                pass
            while forks and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with forks.pop(ended[0]) as status:
                    _tell(status, ended[1])
        if control not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(control, 16, 5)
        if not message:
            for pid in forks:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        threads = {Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
        # jemalloc, which pyarrow brings along, takes care of forks itself
        assert len(threads - {"jemalloc_bg_thd"}) == 1, (
            f"threads {threads}; a fork would have one, and the locks of all"
        )
        text, status, *streams = fds
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for each in (control, woken, wake, *forks.values()):
                each.close()
            os.close(status)
            with open(text, "rb") as file:
                file.seek(0)
                request = json.load(file)
            _become(request, streams)
            return request
        forks[pid] = socket.socket(fileno=status)
        _tell(forks[pid], pid)
        for fd in (text, *streams):
            os.close(fd)


def _drained(woken: socket.socket) -> bytes:
    try:
        return woken.recv(4096)
    except BlockingIOError:
        return b""


def _tell(status: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        status.send(struct.pack("i", number))


def _become(request: dict[str, Any], streams: list[int]) -> None:
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
    if request["in_terminal"]:
        os.login_tty(os.dup(streams[0]))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    if "graders" in sys.modules:  # not where interpreters are started
        sys.modules["graders"].use(request["graders"])
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    for name in ("numpy",):
        if name in sys.modules:
            sys.modules[name].random.seed()


def forget_ours_if_others_are_found() -> None:
    """Keep the modules of this repository only where `import grpo` would find them, by the fork's own sys.path."""
    import importlib.util

    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "grpo"}
    found = importlib.util.find_spec("grpo")
    if loaded and found is not None and found.origin == loaded["grpo"].__file__:
        sys.modules.update(loaded)


def execute(request: dict[str, Any], path: list[str]) -> None:
    """As `python`, with these arguments."""
    import runpy
    from types import ModuleType

    first, *rest = request["arguments"]
    beside = [entry for entry in request["environment"].get("PYTHONPATH", "").split(":") if entry]
    sys.argv = [first, *rest]
    if first == "-m":
        module, *sys.argv[1:] = rest
        sys.path[:] = [os.getcwd(), *beside, *path]
        forget_ours_if_others_are_found()
        sys.modules.pop(module, None)  # or runpy warns
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    if first == "-c":
        code, name, place = rest[0], "<string>", ""
        sys.argv[1:] = rest[1:]
    else:
        code, name, place = Path(first).read_text(), str(Path(first).absolute()), str(Path(first).resolve().parent)
    sys.path[:] = [place, *beside, *path]
    forget_ours_if_others_are_found()
    main = ModuleType("__main__")
    if first != "-c":
        main.__file__ = name
    sys.modules["__main__"] = main
    exec(compile(code, name, "exec"), main.__dict__)


def end(request: dict[str, Any], path: list[str]) -> NoReturn:
    """Execute, and leave with the exit code, the messages and the last acts of Python."""
    code: Any = 0
    try:
        execute(request, path)
    except SystemExit as error:
        code = 0 if error.code is None else error.code
    except BaseException as error:
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        places = error.__traceback__
        while places is not None and places.tb_frame.f_code.co_filename == __file__:
            places = places.tb_next
        sys.excepthook(type(error), error.with_traceback(places), places)
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError):
            code = 120 if stream is sys.stdout else code
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def fill_caches() -> None:
    """What packages find out once in a process, for a second, when a run first needs it: the same in every fork."""
    import deepspeed.ops
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    _ = deepspeed.ops.__compatible_ops__  # asks the compiler what it can build
    get_checkpoint_conversion_mapping("qwen2")  # compiles the expressions of all families


def fill_our_caches() -> None:
    """What this repository finds out once in a process."""
    from transformers import AutoConfig

    from grpo.observe import metric_names, rundir
    from grpo.policy import families
    from grpo.system import build
    from grpo.text import aha

    rundir._versions(), build.own_version(), build.commit(), aha._built_in(), metric_names._own_names()
    for num_layers in (1, 2, 3):
        config = AutoConfig.from_pretrained(ROOT / "configs" / "quickstart" / "model")
        config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
        families.unfit(config)


def take_down_no_libraries() -> None:
    """torch.library would take its 200 libraries of operations out of the dispatcher at each fork's end, for 0.1 s."""
    import weakref

    import torch

    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        alive = finalizer.peek()
        if alive is not None and alive[1] is torch.library._del_library:
            finalizer.atexit = False


def prepare() -> None:
    import gc
    import importlib

    for name in PACKAGES.split():
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    fill_caches()
    sys.path.insert(0, str(ROOT))
    for name in OURS.split():
        importlib.import_module(name)
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("graders").use()
    fill_our_caches()
    sys.path[:2] = []
    take_down_no_libraries()
    gc.collect()
    gc.freeze()  # what is not looked at by a fork's collections stays shared


if __name__ == "__main__":
    _path = list(sys.path)
    if sys.argv[2] == "fork":
        prepare()
    _request = serve(socket.socket(fileno=int(sys.argv[1])))
    if sys.argv[2] == "exec":
        os.execv(sys.executable, [sys.executable, *_request["arguments"]])
    end(_request, _path)
