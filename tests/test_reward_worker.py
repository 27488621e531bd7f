"""Reward functions are a user's code: whatever one does to its process, the run and the other calls go on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import graders
import pytest

from grpo.scoring.worker import Call, FunctionBug
from grpo.scoring.worker_pool import WorkerPool


@pytest.fixture(autouse=True)
def workers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreters, as users have them, and not forks."""
    monkeypatch.setattr("grpo.scoring.worker_pool._Worker._open", graders.own_interpreter)


def run(
    function: Callable[..., Any], arguments: list[Any], *, output: Path | None = None, seconds: float = 10.0
) -> list[Any]:
    """What becomes of each call, in one worker: its value, or "timeout" or "crash"."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = WorkerPool([cloudpickle.dumps(function)], files=[], num_workers=1, memory_gib=0.125)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    pool.output = output or pool.output
    try:
        outcomes = pool.run([Call(0, {"x": argument}, seconds) for argument in arguments])
    finally:
        pool.close()
    return [outcome.value if outcome.kind == "value" else outcome.kind for outcome in outcomes]


def test_calls_that_are_handed_on_after_a_bug_do_not_wait_for_ever() -> None:
    def fail(x: int) -> None:
        raise KeyError(x)

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = WorkerPool([cloudpickle.dumps(fail)], files=[], num_workers=1, memory_gib=0.125)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    try:
        with pool.begin() as errand:
            errand.add([Call(0, {"x": 1}, 10.0)])
            assert isinstance(errand.outcomes.exception(), FunctionBug)
            for _ in range(2000):  # what `add` does between the bug and its notice; a socket holds a few hundred
                errand._ring()
            with pytest.raises(FunctionBug):
                errand.add([Call(0, {"x": 2}, 10.0)])
    finally:
        pool.close()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def start_daemon() -> int:
    """A process in a session of its own whose parent has ended: nothing ties it to the worker any more."""
    script = "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nprint(os.getpid(), flush=True)\ntime.sleep(1000)"
    with subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        return int(process.stdout.readline())


def test_what_a_call_starts_ends_with_it_even_a_daemon() -> None:
    def leave_behind(x: str) -> list[int]:
        if x == "look":
            return [pid for pid in started if is_alive(pid)]
        if x == "daemon":
            started.append(start_daemon())
        if x == "child":
            started.append(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)
        return started

    started: list[int] = []
    outcomes = run(leave_behind, ["child", "daemon", "look"])
    assert len(outcomes[1]) == 2
    assert outcomes[2] == []
    assert not any(map(is_alive, outcomes[1]))


@pytest.mark.parametrize("ending", ["exit", "hang", "segfault"])
def test_a_daemon_does_not_survive_a_worker_that_dies_or_is_killed(ending: str, tmp_path: Path) -> None:
    def start(x: str) -> None:
        Path(x).write_text(str(start_daemon()))
        if ending == "exit":
            os._exit(0)
        if ending == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(1000)

    assert run(start, [str(tmp_path / "pid")], seconds=4.0) == ["timeout" if ending == "hang" else "crash"]
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_helper_started_with_the_functions_lives_on(tmp_path: Path) -> None:
    class Helped:
        def __setstate__(self, state: dict[str, Any]) -> None:  # runs when the worker loads the function
            self.helper = subprocess.Popen(["sleep", "1000"])

        def __getstate__(self) -> dict[str, Any]:
            return {"loaded": True}

        def __call__(self, x: int) -> tuple[int, bool]:
            subprocess.Popen(["sleep", "1000"])
            return self.helper.pid, is_alive(self.helper.pid)

    first, second = run(Helped(), [1, 2])
    assert first == second == (first[0], True)
    assert not is_alive(first[0])  # until the pool closes


def test_a_fork_bomb_is_a_crash_and_nothing_of_it_remains(tmp_path: Path) -> None:
    def bomb(x: str) -> int:
        if x == "bomb":
            os.environ["THE_BOMB"] = str(
                tmp_path
            )  # to be found by; the processes are stopped and killed, never waited for
            for _ in range(5000):
                subprocess.Popen(["sleep", "1000"])
        return 1

    started = time.monotonic()
    assert run(bomb, ["a", "bomb", "a"], seconds=60.0) == [1, "crash", 1]
    assert time.monotonic() - started < 50
    assert not [pid for pid in Path("/proc").iterdir() if str(tmp_path).encode() in environment_of(pid)]


def environment_of(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_a_forked_child_that_returns_from_the_function_answers_nobody() -> None:
    def fork(x: int) -> int:
        return -1 if os.fork() == 0 else x

    assert run(fork, list(range(20))) == list(range(20))


def test_what_functions_print_goes_to_the_file_and_not_to_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(x: str) -> int:
        print("printed", x)
        print("complained", x, file=sys.stderr)
        os.write(1, b"written\n")
        subprocess.run(["echo", "child", x], check=True)
        sys.stdin.read()
        if x == "close":
            os.close(1)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        return len(x)

    log = tmp_path / "rewards.log"
    assert run(noisy, ["a", "close", "bb"], output=log) == [1, 5, 2]
    assert log.read_text().split("\n")[:4] == ["printed a", "complained a", "written", "child a"]
    assert log.read_text().endswith("printed bb\ncomplained bb\nwritten\nchild bb\n")
    assert run(noisy, ["a"]) == [1]  # without a file it is dropped
    assert capfd.readouterr() == ("", "")


def test_endless_printing_neither_blocks_nor_fills_the_disk(tmp_path: Path) -> None:
    def chatter(x: int) -> int:
        for _ in range(x):
            os.write(1, b"x" * 2**20)
        return x

    log = tmp_path / "rewards.log"
    assert run(chatter, [100] * 8, output=log) == [100] * 8  # 800 MiB
    assert log.stat().st_size < 300 * 2**20


def test_a_leak_is_not_blamed_on_the_call_that_comes_last() -> None:
    def leak(x: int) -> int:
        leaked.append(bytearray(x * 2**20))
        return len(leaked)

    leaked: list[bytearray] = []
    counts = run(leak, [25] * 12)  # 128 MiB: room for four
    assert all(isinstance(count, int) for count in counts)
    assert max(counts) < 6
    assert counts.count(1) >= 2
    assert run(leak, [25, 250, 25]) == [1, "crash", 1]  # one that cannot fit is tried in a fresh worker, and blamed


def test_leaked_descriptors_are_not_blamed_on_the_call_that_comes_last() -> None:
    def leak(x: int) -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        leaked.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(x))
        return 1

    leaked: list[int] = []
    assert run(leak, [10] * 20) == [1] * 20
    assert run(leak, [10, 100, 10]) == [1, "crash", 1]


def test_a_worker_that_dies_is_tried_again_only_if_another_call_may_have_hurt_it(tmp_path: Path) -> None:
    def die(x: str) -> int:
        with open(tmp_path / "tries", "a") as file:
            file.write(x)
        if x == "d" or (x == "h" and state):  # "l" spoils the worker for "h", "d" dies by itself
            os._exit(1)
        state.extend([x] if x == "l" else [])
        return 1

    state: list[str] = []
    assert run(die, ["d", "l", "h", "d", "a"]) == ["crash", 1, 1, "crash", 1]
    assert (tmp_path / "tries").read_text() == "dlhhdda"


@pytest.mark.parametrize(
    "act",
    [
        lambda: os._exit(0),
        lambda: sys.exit(0),
        lambda: (_ for _ in ()).throw(KeyboardInterrupt),
        lambda: (_ for _ in ()).throw(GeneratorExit),
        lambda: os.closerange(0, 4096),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        lambda: write_everywhere(b"\x00\x00\x7f\xff junk " * 9),
    ],
    ids=["_exit", "SystemExit", "KeyboardInterrupt", "BaseException", "close all", "kill", "junk in the pipe"],
)
def test_a_call_that_destroys_its_process_is_a_crash_and_the_others_are_made(act: Callable[[], Any]) -> None:
    def do(x: int) -> int:
        return act() and -1 if x == 0 else x

    assert run(do, [1, 0, 2, 3], seconds=20.0) == [1, "crash", 2, 3]


def write_everywhere(content: bytes) -> int:
    """To whatever this process has open besides the standard streams."""
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        if fd > 2:
            with contextlib.suppress(OSError):  # the listing itself is closed by now
                os.write(fd, content)
    return 1


def test_junk_that_looks_like_the_start_of_a_message_does_not_make_the_parent_wait() -> None:
    def write(x: int) -> int:
        if x == 0:
            write_everywhere(b"\x01")  # less than a header: the next message is read shifted
        return x

    assert run(write, [1, 0, 2], seconds=5.0) in ([1, "crash", 2], [1, "timeout", 2])


def test_what_a_call_changes_in_its_process_is_put_back(tmp_path: Path) -> None:
    def meddle(x: bool) -> tuple[Any, ...]:
        if x:
            os.chdir(tmp_path)
            os.environ["MEDDLED"] = "1"
            del os.environ["PATH"]
            sys.setrecursionlimit(60)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.alarm(1)
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
        elif sleep:
            time.sleep(1.5)  # past the alarm
        print("still works")
        handlers = [str(signal.getsignal(number)) for number in (signal.SIGUSR1, signal.SIGTERM)]
        return (
            os.getcwd(),
            "MEDDLED" in os.environ,
            "PATH" in os.environ,
            sys.getrecursionlimit(),
            handlers,
            os.getpid(),
        )

    sleep = False
    before, _, after = run(meddle, [False, True, False])
    assert before == after
    sleep = True
    assert run(meddle, [True, False])[1] not in ("crash", "timeout")


def test_an_exception_carries_the_workers_traceback_and_an_unreadable_value_is_one() -> None:
    class Unreadable:
        def __reduce__(self) -> tuple[Any, ...]:
            return (int, ("not a number",))  # pickles, and fails to unpickle

    def buggy(x: str) -> Any:
        if x == "raise":
            raise RuntimeError("broken reward")
        return {"lambda": lambda: 1, "unreadable": Unreadable()}[x]

    with pytest.raises(FunctionBug, match=r"in buggy[\s\S]*RuntimeError: broken reward"):
        run(buggy, ["raise"])
    for value in ("lambda", "unreadable"):
        with pytest.raises(FunctionBug, match=r"pickle|invalid literal for int"):
            run(buggy, [value])


def test_a_worker_that_stops_reading_does_not_block_the_parent() -> None:
    def stop_later(x: bytes) -> int:
        if x == b"stop":
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
        return len(x)

    assert run(stop_later, [b"a", b"stop", b"a" * 2**24], seconds=4.0) == [1, "timeout", 2**24]


def test_messages_are_read_whole_whatever_their_size() -> None:
    assert run(lambda x: x * 2, [b"a" * 2**23, b"b"]) == [b"a" * 2**24, b"bb"]


class Loaded:
    """Loading it for the first time works; then as often as `failures` says it kills its process or fails."""

    def __init__(self, tries: Path, failures: list[str]) -> None:
        self.tries, self.failures = tries, failures

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        with open(self.tries, "a") as file:
            file.write("x")
        number = len(self.tries.read_text()) - 2
        if 0 <= number < len(self.failures):
            if self.failures[number] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no memory today")

    def __call__(self, x: int) -> int:
        if x == 0:
            os._exit(1)
        return x


def test_a_replacement_that_is_killed_while_it_loads_is_replaced_too(tmp_path: Path) -> None:
    outcomes = run(Loaded(tmp_path / "tries", ["kill", "fail", "kill"]), [1, 0, 2])
    assert outcomes == [1, "crash", 2]
    # once at the start, thrice in vain, then for the call that is tried alone, and again after it
    assert len((tmp_path / "tries").read_text()) == 6


def test_a_worker_that_can_no_longer_be_replaced_ends_the_run_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo.scoring.worker_pool.PAUSE_SECONDS", 0.01)
    with pytest.raises(
        RuntimeError, match=r"had to be replaced could not load[\s\S]*no memory today[\s\S]*5 times in a row"
    ):
        run(Loaded(tmp_path / "tries", ["fail"] * 9), [1, 0, 2])
