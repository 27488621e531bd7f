"""Whatever a logging service does, training goes on; and W&B's own environment variables hold."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, clean_environment

from grpo.observe.sinks import InBackground, Sink, WandbSink
from grpo.text import aha


class Recording:
    def __init__(self, log: Callable[[int], None] = lambda step: None) -> None:
        self.logged: list[int] = []
        self.is_closed = False
        self._log = log

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._log(step)
        self.logged.append(step)

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.logged.append(-step)

    def close(self) -> None:
        self.is_closed = True


def nothing() -> None:
    """There is nothing to abandon."""


def test_calls_in_the_background_are_made_in_order_and_all_of_them_before_it_is_closed():
    inner = Recording(lambda step: time.sleep(0.01))
    sink = InBackground("service", lambda: inner, abandon=nothing)
    for step in range(1, 20):
        sink.log(step, {})
        sink.log_completions(step, [])
    sink.close()
    assert inner.logged == [sign * step for step in range(1, 20) for sign in (1, -1)]
    assert inner.is_closed


def test_a_call_that_fails_is_said_once_and_the_next_are_made(capsys: pytest.CaptureFixture[str]):
    def log(step: int) -> None:
        if step < 4:
            raise RuntimeError("no such project")

    inner = Recording(log)
    sink = InBackground("service", lambda: inner, abandon=nothing)
    for step in range(1, 6):
        sink.log(step, {})
    sink.close()
    assert inner.logged == [4, 5]
    said = "service: no such project; what it should have logged is in the run's own files.\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("error", [ImportError("broken"), SystemExit(3), KeyError("x")])
def test_a_sink_that_cannot_be_made_is_given_up_with_one_line(capsys: pytest.CaptureFixture[str], error: BaseException):
    def make() -> Sink:
        raise error

    sink = InBackground("service", make, abandon=nothing)
    for step in range(2000):
        sink.log(step, {})
    sink.close()
    said = capsys.readouterr().out
    assert said == f"service: {type(error).__name__}: {error}; from here on this run is in its own files only.\n"


@pytest.mark.parametrize("where", ["made", "logs", "closes"])
def test_a_sink_that_hangs_is_given_up_after_a_while_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
):
    monkeypatch.setattr(InBackground, "LIMIT_SECONDS", 0.5)
    for_ever, abandoned = threading.Event(), []
    inner = Recording((lambda step: for_ever.wait() and None) if where == "logs" else lambda step: None)
    if where == "closes":
        inner.close = for_ever.wait  # type: ignore[method-assign]
    make = (lambda: for_ever.wait() and inner) if where == "made" else lambda: inner
    sink = InBackground("service", make, abandon=lambda: abandoned.append(1))  # type: ignore[arg-type, return-value]
    began = time.monotonic()
    sink.log(1, {})
    sink.close()
    sink.log(2, {})
    assert time.monotonic() - began < 20
    assert abandoned == [1]
    for_ever.set()
    assert capsys.readouterr().out == (
        "service: it has not answered for 0.5 s; from here on this run is in its own files only.\n"
    )


def test_calls_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(InBackground, "MAX_WAITING", 10)
    for_ever = threading.Event()
    sink = InBackground("service", lambda: Recording(lambda step: for_ever.wait() and None), abandon=nothing)
    for step in range(100):
        sink.log(step, {})
    sink.close()
    for_ever.set()
    assert capsys.readouterr().out.startswith("service: 10 calls wait for it; from here on")


class FakeWandb:
    """What WandbSink asks of the package when it starts."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def init(self, **options: Any) -> FakeWandb:
        self.options = options
        return self

    def define_metric(self, *_: object, **__: object) -> None:
        """Nothing is drawn."""


@pytest.mark.parametrize("project", [None, "of-the-yaml"])
def test_wandbs_environment_variables_hold_where_the_configuration_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str | None
):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def options() -> dict[str, Any]:
        words = aha.with_own({})
        WandbSink("offline", project=project, directory=tmp_path, config={}, verdicts=["f"], words=words, history=[])
        return fake.options

    for name in ("PROJECT", "NAME", "ENTITY", "RUN_ID"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert options()["project"] == (project or "grpo")
    assert options()["name"] == tmp_path.name
    (tmp_path / "wandb_id").unlink()
    for name in ("PROJECT", "NAME", "ENTITY", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", f"my-{name.lower()}")
    assert options()["project"] == (project or "my-project")
    assert options()["name"] == "my-name"
    assert options()["id"] == "my-run_id"
    assert "entity" not in options(), "W&B reads it by itself unless it is overridden"


FROZEN = """
import os, signal, sys, time
from pathlib import Path
from grpo.text import aha
from grpo.observe.sinks import InBackground, WandbSink, end_wandb_service

InBackground.LIMIT_SECONDS = float(sys.argv[2])
directory = Path(sys.argv[1])

def make():
    return WandbSink(
        "offline", project="p", directory=directory, config={}, verdicts=["f"], words=aha.with_own({}), history=[]
    )

sink = InBackground("wandb", make, abandon=end_wandb_service)
while not list(directory.glob("wandb/offline-run-*/*.wandb")):
    time.sleep(0.1)
for stat in Path("/proc").glob("[0-9]*/stat"):
    fields = stat.read_text().rpartition(")")[2].split()
    if int(fields[1]) == os.getpid():
        os.kill(int(stat.parent.name), signal.SIGSTOP)
for step in range(1, 5000):
    sink.log(step, {f"name-{i}": step / 3 for i in range(100)})
sink.close()
print("trained", flush=True)
"""


def test_a_frozen_wandb_holds_up_neither_training_nor_the_end_of_the_process(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FROZEN, str(tmp_path), "10"],
        cwd=tmp_path,
        env={**clean_environment(), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from here on this run is in its own files only") == 1
    assert done.stdout.endswith("trained\n")


def test_wandb_that_fails_offline_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Broken(FakeWandb):
        def init(self, mode: str, **options: Any) -> Any:
            asked.append(mode)
            if len(asked) == 1:
                raise ConnectionResetError("Connection lost")
            return super().init(mode=mode, **options)

        def login(self, prompt: bool) -> bool:
            return True

    def make(mode: str) -> None:
        asked.clear()
        WandbSink(mode, project="p", directory=tmp_path, config={}, verdicts=["f"], words=aha.with_own({}), history=[])

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    make("online")
    assert asked == ["online", "offline"]
    with pytest.raises(ConnectionResetError):
        make("offline")
    assert asked == ["offline"], "after its service was ended, another would be started and waited for"


@pytest.mark.parametrize("harm", ["wandb.py", "wandb"])
def test_a_file_named_wandb_costs_the_curves_there_and_not_the_run(tmp_path: Path, harm: str):
    code = FROZEN.partition("while not list")[0] + "sink.log(1, {'a': 1.0})\nsink.close()\nprint('trained')"
    (tmp_path / harm).write_text("raise RuntimeError('not the package')\n")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "60"],
        cwd=tmp_path,
        env={**clean_environment(), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    assert ("not the package; from here on" in done.stdout) == (harm == "wandb.py")
