"""The code reward, and programs that would rather not be graded."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from code_cases import ATTEMPTS, CLUTTER, FREE, RIGHT_BY_KIND, UNENDING
from grpo.rewards import code, sandbox
from grpo.rewards.code import last_fence

from grpo.scoring.reward import Reward
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt

ADD = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6"}]
RIGHT = "a, b = map(int, input().split())\nprint(a + b)"
ASSERTS = ["assert f(2) == 4", "assert f(-3) == 9", "assert f(0) == 0"]
REAL_LAYERS = sandbox.working_layers()


@pytest.fixture(params=["bwrap", "landlock"], autouse=True)
def mode(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Everything here holds with bubblewrap and without it."""
    if request.param == "bwrap" and "bwrap" not in REAL_LAYERS:
        pytest.skip("bubblewrap is not installed, or user namespaces are forbidden")
    if (
        request.param == "landlock" and ctypes.CDLL(None).syscall(444, None, 0, 1) < 1
    ):  # landlock_create_ruleset: its version
        pytest.skip("this kernel has no Landlock")
    layers = REAL_LAYERS if request.param == "bwrap" else sandbox._run("", False, 20.0, 1.0).layers
    assert layers == {request.param, "seccomp"}
    monkeypatch.setattr(sandbox, "working_layers", lambda: layers)
    monkeypatch.setattr(sys.modules["grpo.rewards.code"], "runs_as_root", lambda: False)  # containers of CI are root's
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmpdir")))
    return request.param


def answer(program: str) -> str:
    return f"<think> let me write it </think> <answer>Here:\n```python\n{program}\n```\n</answer>"


def run(program: str, seconds: float = 10.0, **options: Any) -> sandbox.Run:
    return sandbox.run_python(program, seconds=seconds, memory_gib=0.5, **options)


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_a_program_is_paid_for_the_tests_it_passes() -> None:
    half = "a, b = map(int, input().split())\nprint(3)"
    assert code(answer(RIGHT), ADD) == code(answer(RIGHT), json.dumps(ADD)) == 1.0
    assert (code(answer(half), ADD), code(answer(half), ADD, share=True)) == (0.0, 0.5)
    assert code(answer("print('  3  ')\nprint()"), ADD[:1]) == 0.0  # white space in front counts
    assert code(answer("print('3  ')\nprint()"), ADD[:1]) == 1.0
    assert code(answer(RIGHT + "\nraise ValueError"), ADD) == 0.0
    assert code(answer("print('"), ADD) == 0.0


def test_statements_are_tests_too() -> None:
    square = "def f(x):\n    print('noise')\n    return x * x"
    tests = [*ASSERTS, "assert abs(f(0.5) - 0.25) < 1e-9 and f(1)", "for i in range(9):\n    assert f(i) == i ** 2"]
    assert code(answer(square), tests) == 1.0
    assert code(answer(square.replace("x * x", "x + x")), tests, share=True) == pytest.approx(2 / 5)  # f(2), f(0)
    assert code(answer(square.replace("x * x", "abs(x) * 2 if x else 0")), ASSERTS[:2], share=True) == 0.5
    values = [
        "assert f(1) == [1, (2, 3), {'a': None}, {4}, 'é', b'b', 1.5, True, 10 ** 50]",
        "assert math.isclose(f(2), 2.0)",
    ]
    assert (
        code(
            answer(
                "def f(x):\n    return [1, (2, 3), {'a': None}, {4}, 'é', b'b', 1.5, True, 10**50] if x == 1 else 2"
            ),
            values,
        )
        == 1.0
    )
    class_tests = [
        "s = Stack()\ns.push(1)\nassert s.pop() == 1",
        "assert Stack().size() == 0",
        "assert len(Stack().items()) == 0",
    ]
    stack = "class Stack:\n  def __init__(self): self.l = []\n  def push(self, x): self.l.append(x)\n"
    stack += "  def pop(self): return self.l.pop()"
    assert (
        code(answer(stack + "\n  def size(self): return len(self.l)\n  def items(self): return self.l"), class_tests)
        == 1.0
    )


def test_the_last_fenced_block_of_the_place_it_is_looked_for_counts() -> None:
    wrong, right = "```python\nprint(0)\n```\n", f"```\n{RIGHT}\n```\n"
    assert code(f"{right}<answer>{wrong}{right}</answer>{wrong}", ADD) == 1.0
    assert code(f"{right}<answer>{right}{wrong}</answer>{right}", ADD) == 0.0
    assert code(f"<answer>{wrong}</answer>{right}", ADD, source="fence") == 1.0
    assert code(f"<answer>{RIGHT}</answer>", ADD) == code(right, ADD) == code("", ADD) == 0.0
    assert last_fence("```python\na\n```\ntext\n```bash\nb\n```\n```py\nc") == "a"
    with pytest.raises(ValueError, match="source is 'tag'; it is one of answer_tag, fence"):
        code(right, ADD, source="tag")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("", "neither a list"),
        ([], "empty"),
        ([{"input": "1"}], "no input and output"),
        ([{"input": "1", "output": " "}], "expects no output"),
        (["assert f(1"], "no Python"),
        (["assert True"], "does not call the program"),
        (["x", {"input": "", "output": "1"}], "neither all"),
        ({"input": "1", "output": "1"}, "no list"),
        ([1], "neither all"),
        (object(), "neither a list"),
    ],
)
def test_tests_that_cannot_grade_are_named_and_pay_nobody(tests: Any, reason: str) -> None:
    assert reason in code.check_row(tests)
    assert code(answer("print(1)"), tests) is None
    assert code.check_row(ADD) is code.check_row(json.dumps(ASSERTS)) is None


@pytest.mark.parametrize("kind", RIGHT_BY_KIND)
def test_right_programs_are_paid_whatever_they_return(kind: str) -> None:
    program, tests = RIGHT_BY_KIND[kind]
    namespace: dict[str, Any] = {}
    exec("import numpy as np\nfrom collections import *\nfrom datetime import date\n" + program, namespace)
    for test in tests:
        if "f(3) == [0, 1, 2]" not in test:  # an array is no list in plain Python
            exec(test, namespace)
    assert code(answer(program), tests, share=True) == 1.0


def test_tests_that_no_program_can_be_graded_by_are_named() -> None:
    assert "defines a class" in code.check_row(["class A: pass\nassert f(A()) == 1"])
    assert "check nothing" in code.check_row(["x = f(1)"])
    assert "does not call the program" in code.check_row(["assert len(sorted([1])) == 1"])
    assert "does not call the program" in code.check_row(["assert f(1) == 1", "assert True"])
    assert code(answer("def f(x): return 1"), ["assert f(NotImplemented) == 1"]) is None  # it cannot be handed over


# ---- hostile programs ------------------------------------------------------------------------------------------------

CHEATS = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "print('passed'); print('True'); print('4'); print('3')",
    "def f(x): import os; os._exit(0)",
    "def f(x): import sys; sys.exit(0)",
    "class A:\n  def __eq__(self, o): return True\n  def __ne__(self, o): return False\ndef f(x): return A()",
    "class A(int):\n  def __eq__(self, o): return True\ndef f(x): return A(5)",
    "class A(list):\n  def __eq__(self, o): return True\ndef f(x): return A()",
    "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.abs = builtins.bool = lambda *a: True\ndef f(x): return 5",
    'import json\njson.dumps = lambda *a, **k: \'[0, true, [["int", "0x4"]]]\'\ndef f(x): return 5',
    "import sys\nsys._getframe(1).f_locals\ndef f(x): return sys._getframe(1).f_locals",
    'import os\nfor fd in range(64):\n  try: os.write(fd, b\'[0, true, [["int", "0x4"]]]\\n\')\n  except OSError: pass\nf = abs',
    "import os\nprint(os.pread(0, 10**6, 0))\nos.lseek(0, 0, 0)\ndef f(x): return open(0).read()",
    "import gc\ndef f(x): return [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o][0]",
    "def f(x):\n  yield x * x",
    "f = None",
    "raise SystemExit",
    "import sys\nsys.modules['__main__'].examine = None\nsys.settrace(lambda *a: None)\ndef f(x): raise AssertionError",
]


@pytest.mark.parametrize("program", CHEATS)
def test_a_program_that_does_not_know_the_answer_earns_nothing(program: str) -> None:
    assert code(answer(program), ["assert f(2) == 4", "assert f(3) == 9"], share=True, seconds=5.0) == 0.0
    assert code(answer(program), [{"input": "5 5", "output": "10"}], seconds=5.0) == 0.0


def test_neither_files_nor_network_nor_other_processes_can_be_reached(tmp_path: Path) -> None:
    secret = tmp_path / "tests.json"
    secret.write_text("expected")
    attempts = f"""
import os, socket, shutil, signal, subprocess, ctypes, pathlib
def reads(path): return lambda: open(path).read()
def writes(path): return lambda: open(path, "w").write("x")
attempts = dict(
    passwd=reads("/etc/passwd"), tests=reads({str(secret)!r}), proc=reads("/proc/self/environ"), host=reads("/etc/hostname"),
    module=reads({str(Path(__file__))!r}), parent=lambda: open(f"/proc/{{os.getppid()}}/mem", "rb"),
    write=writes({str(tmp_path / "x")!r}), write_tmp=writes("/tmp/written"), write_lib=writes(os.__file__),
    remove=lambda: os.remove({str(secret)!r}), rename=lambda: os.rename({str(secret)!r}, "stolen"),
    chmod=lambda: os.chmod({str(tmp_path)!r}, 0), link=lambda: os.link({str(secret)!r}, "linked") or open("linked").read(),
    symlink=lambda: (os.symlink({str(secret)!r}, "s"), open("s").read()),
    tcp=lambda: socket.create_connection(("127.0.0.1", 22), 1), udp=lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    unix=lambda: socket.socket(socket.AF_UNIX), resolve=lambda: socket.getaddrinfo("localhost", 80)[0][4][0] == "" or 1 / 0,
    fork=os.fork, run=lambda: subprocess.run(["/bin/echo"]), spawn=lambda: os.posix_spawn("/bin/echo", ["echo"], {{}}),
    execute=lambda: os.execv("/bin/echo", ["echo"]), shell=lambda: os.system("true") and 1 / 0, session=os.setsid,
    kill_parent=lambda: os.kill(os.getppid(), 9), kill_all=lambda: os.kill(-1, 9), stop=lambda: os.kill(os.getpid(), 19),
    raw_fork=lambda: ctypes.CDLL(None).fork() == -1 and 1 / 0,
    ptrace=lambda: ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) and 1 / 0,
    unshare=lambda: ctypes.CDLL(None).unshare(0x10000000) and 1 / 0, memfd=lambda: os.memfd_create("x"),
)
for name, attempt in attempts.items():
    try: attempt()
    except BaseException: continue
    print("could", name)
print("end")
"""
    assert run(attempts).output.decode() == "end\n"
    assert secret.read_text() == "expected"
    assert os.listdir(tmp_path) == ["tests.json"]
    assert not Path("/tmp/written").exists()


@pytest.mark.parametrize("kind", FREE)
def test_a_program_is_paid_for_nothing_that_it_did_not_compute(kind: str) -> None:
    program, tests = FREE[kind]
    assert code(answer(program), tests, seconds=2.5) == 0.0


@pytest.mark.parametrize("kind", UNENDING)
def test_what_a_program_makes_endless_for_its_tests_is_late_and_late_is_wrong(kind: str) -> None:
    program, tests = UNENDING[kind]
    started = time.monotonic()
    assert code(answer(program), tests, seconds=0.2) == 0.0
    assert time.monotonic() - started < 15.0


def test_no_attempt_to_reach_out_succeeds(tmp_path: Path) -> None:
    """All in one program, which prints what it could; the parent is the bait."""
    bait = subprocess.Popen(["sleep", "60"])
    before = os.getpriority(os.PRIO_PROCESS, bait.pid), os.sched_getaffinity(bait.pid), queues()
    try:
        said = run(f"PID, TRAINER, FOLDER = {bait.pid}, {os.getpid()}, {str(tmp_path)!r}\n" + ATTEMPTS, seconds=30.0)
        assert said.output.decode().split() == ["end"]
        assert bait.poll() is None
        assert (os.getpriority(os.PRIO_PROCESS, bait.pid), os.sched_getaffinity(bait.pid), queues()) == before
        assert os.listdir(tmp_path) == []
    finally:
        bait.kill()
        bait.wait()


def queues() -> list[str]:
    return [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "sem", "msg")]


def test_a_program_sees_no_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "k-1")
    sees = "import os\ntry: more = open('/proc/self/environ').read() + open(f'/proc/{os.getppid()}/environ').read()\n"
    sees += "except OSError: more = ''\nprint(sorted(os.environ), 'k-1' in str(os.environ) + more)"
    names = ["HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "TMPDIR"]
    said = run(sees).output.decode()
    assert "True" not in said
    assert set(ast.literal_eval(said.removesuffix(" False\n"))) <= {*names, "PWD", "LC_CTYPE"}


@pytest.mark.parametrize("kind", CLUTTER)
def test_what_a_program_leaves_in_its_folder_neither_raises_nor_remains(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "REMOVE_SECONDS", 20.0)  # removing a folder takes some file systems 3 ms
    for waits, seconds in (("", 1.5), ("\nimport time\ntime.sleep(9)", 0.5)):
        program = f"{CLUTTER[kind]}{waits}\nprint(3)"
        assert code(answer(program), [{"input": "1", "output": "4"}], seconds=seconds) == 0.0
        assert os.listdir(tempfile.gettempdir()) == []


def test_folders_that_a_killed_worker_left_are_removed_and_those_in_use_are_not(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    if mode == "bwrap":
        pytest.skip("with bubblewrap there is no folder")
    monkeypatch.setattr(sandbox, "_last_sweep", float("-inf"))
    left, used, new = (Path(tempfile.gettempdir(), f"grpo-code-{name}") for name in ("left", "used", "new"))
    for folder in (left, used, new):
        (folder / "a" / "b").mkdir(parents=True)
        os.utime(folder, (0, 0) if folder != new else None)
    lock = sandbox._lock(str(used))
    assert lock is not None
    run("pass")
    assert sorted(os.listdir(tempfile.gettempdir())) == ["grpo-code-new", "grpo-code-used"]
    os.close(lock)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folders_that_are_closed_to_an_ordinary_user_are_noticed_and_removed() -> None:
    """Root may list any folder, so this is tried as somebody else."""
    top = tempfile.mkdtemp(dir="/tmp")
    os.chown(top, 65534, 65534)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os.makedirs(f"{top}/a/b")
        Path(f"{top}/a/b/c").touch()
        os.chmod(f"{top}/a/b", 0)
        os.chmod(f"{top}/a", 0o300)
        noticed = sandbox._overflows(top)
        sandbox._remove(top, time.monotonic() + 10.0)
        os._exit(0 if noticed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not os.path.exists(top)


def test_a_program_has_what_a_session_has_without_site() -> None:
    assert code(answer("import numpy\nprint(int(numpy.ones(3).sum()))"), ADD[:1], seconds=10.0) == 1.0
    assert code(answer("print(3 if callable(help) else 4)"), ADD[:1]) == 1.0
    for leave in ("exit()", "quit()", "exit(0)"):
        assert code(answer(f"print(3)\n{leave}\nprint(4)"), ADD[:1]) == 1.0


def test_a_slow_start_of_the_sandbox_is_not_the_programs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import time; time.sleep(2.5)\n"
    guard = sandbox._GUARD.read_text().replace("def main() -> None:", slow + "def main() -> None:")
    monkeypatch.setattr(sandbox, "_GUARD", SimpleNamespace(read_text=lambda: guard, name="guard"))
    assert code(answer("import time\ntime.sleep(100)"), ADD, seconds=0.5) == 0.0
    assert code(answer("import time\nprint(3)"), ADD[:1], seconds=2.0) == 1.0


def test_a_full_disk_or_text_that_is_no_unicode_is_cannot_tell(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    assert code(answer("print(input())"), [{"input": "\ud800", "output": "3"}]) == 0.0
    assert code(answer("print('\ud800')"), ADD) == 0.0
    assert code(answer("'\ud800'\ndef f(x): return 4"), ["assert f(2) == 4"]) == 0.0
    assert code(answer("def f(x): return '\\ud800'"), ["assert f(2) == '\\ud800'"]) == 1.0
    name = "os.memfd_create" if mode == "bwrap" else "tempfile.mkdtemp"

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"grpo.rewards.sandbox.{name}", full)
    assert code(answer(RIGHT), ADD) is None
    assert code(answer("f = abs"), ASSERTS) is None


def test_root_without_bubblewrap_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(sys.modules["grpo.rewards.code"], "runs_as_root", sandbox.runs_as_root)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    options: dict[str, Any] = {"columns": ["tests"], "max_completion_tokens": 10, "num_workers": 1}
    options |= {"timeout_seconds": 20.0, "memory_gib": 1.0}
    with Scorer([Reward(code, args={"as_root": True})], **options) as scorer:
        scorer.check_limits([10])
    with Scorer([Reward(code)], **options) as scorer:
        if mode == "bwrap":
            scorer.check_limits([10])
            return
        with pytest.raises(ValueError, match="as_root is false; code would run the model's programs as root"):
            scorer.check_limits([10])
    with pytest.raises(ValueError, match="as_root is false"):
        code(answer(RIGHT), ADD)
    assert code(answer(RIGHT), ADD, as_root=True) == 1.0
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert code(answer(RIGHT), ADD) == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "x = 'a' * 10**12",
        "while True: print('x' * 1000)",
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(): return g()\ng()",
        "import sys\nsys.stdin.read()\nwhile True: sys.stdin.read()",
        "import time\ntime.sleep(1000)",
        "import time, signal\nfor s in (1, 2, 3, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import shutil, os\nshutil.rmtree(os.getcwd(), ignore_errors=True)\nraise SystemExit(1)",
        "10 ** 10 ** 10",
        "import os\ni = 0\nwhile True:\n  open(str(i), 'w').write('x' * 10**6); i += 1",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
        "eval('(' * 10**6)",
        "\x00",
    ],
    ids=lambda program: repr(program)[:60],
)
def test_a_program_that_devours_is_wrong_in_time_and_leaves_nothing_behind(program: str) -> None:
    started = time.monotonic()
    assert code(answer(program), ADD, seconds=0.5, memory_gib=0.5) == 0.0
    assert time.monotonic() - started < 20.0
    assert os.listdir(tempfile.gettempdir()) == []
    assert not [pid for pid in Path("/proc").iterdir() if tempfile.gettempdir().encode() in environment_of(pid)]


def environment_of(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_threads_scratch_files_and_numpy_work_in_the_sandbox() -> None:
    program = (
        "import threading, os, numpy\n"
        "t = threading.Thread(target=lambda: open('note', 'w').write('kept')); t.start(); t.join()\n"
        "print(open('note').read(), os.listdir('.'), numpy.arange(4).sum())"
    )
    assert run(program).output == b"kept ['note'] 6\n"
    assert code(answer("import numpy\ndef f(x): return numpy.int64(x) ** 2"), ASSERTS) == 1.0


def test_a_sandbox_that_does_not_start_is_cannot_tell(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    name = "_bwrap" if mode == "bwrap" else "_readable"
    broken = ["bwrap", "--no-such-option"] if mode == "bwrap" else ["/no/such/folder"]
    monkeypatch.setattr(sandbox, name, lambda *_: broken)
    assert code(answer(RIGHT), ADD) is None


def test_what_is_left_open_is_said(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    text = sandbox.unprotected()
    assert (text is None) == (mode == "bwrap")
    assert mode == "bwrap" or ("fill the disk" in text and ("as root" in text) == (os.geteuid() == 0))
    monkeypatch.setattr(sandbox, "working_layers", lambda: frozenset({"seccomp"}))
    text = sandbox.unprotected() or ""
    assert "read and write every file" in text
    assert "network" not in text
    assert "only seccomp works here. Install bubblewrap" in text
    monkeypatch.setattr(sandbox, "working_layers", lambda: frozenset())
    text = sandbox.unprotected() or ""
    for way in ("use the network", "UNIX sockets", "signal", "renice", "System V", "/proc", "TMPDIR"):
        assert way in text
    assert "only resource limits works here" in text


def test_it_runs_in_the_workers_of_a_run_and_a_killed_worker_takes_its_program_along(mode: str) -> None:
    """With the worker's own memory limit around it, and when the worker is killed while the program runs."""
    if mode != ("bwrap" if "bwrap" in REAL_LAYERS else "landlock"):
        pytest.skip("the workers take the best there is")
    texts = [answer(RIGHT), answer("print(0)"), answer("import time\ntime.sleep(1000.125)")]
    prompt = Prompt(0, [1], "", "", {"tests": ADD})
    group = Group(prompt, [Completion([1], [0.0], text, "stop") for text in texts])
    options: dict[str, Any] = {
        "max_completion_tokens": 10,
        "num_workers": 1,
        "memory_gib": 1.0,
    }
    with Scorer(
        [Reward(code, args={"seconds": 3.0, "as_root": True})], columns=["tests"], timeout_seconds=20.0, **options
    ) as scorer:
        assert len(scorer.notices()) == (mode == "landlock")
        assert scorer.check_rows([{"tests": ADD}, {"tests": []}])[0] is None
        assert "empty" in (scorer.check_rows([{"tests": []}])[0] or "")
        assert scorer.score([group]).rewards.tolist() == [[1.0, 0.0, 0.0]]
    with Scorer([Reward(code, args={"as_root": True})], columns=["tests"], timeout_seconds=4.0, **options) as scorer:
        scores = scorer.score([group])
        assert (scores.num_timeouts, scores.num_crashes) == (1, 0)
        assert not [pid for pid in Path("/proc").iterdir() if b"1000.125" in command_of(pid)]


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
