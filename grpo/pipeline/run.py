"""Runs the stages that are not done yet, each as a process of its own, and records what came from what."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from grpo.pipeline import outcome, page
from grpo.pipeline.lineage import FINISHED, Lineage
from grpo.pipeline.stages import Plan, Stage
from grpo.system.stopping import EXIT_STOPPED, LAUNCHED, SAFE_PATH, SIGNALS
from grpo.system.terminal import say


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended."""

    code: int
    was_asked: bool = False  # to stop, by a signal that this process got


Launch = Callable[[Sequence[str]], Ended]
"""Runs `grpo` with these arguments to its end."""

Check = Callable[[Plan, Sequence[Stage]], None]
"""Raises ValueError: one of these stages has a mistake."""


def line(plan: Plan, stage: Stage) -> str:
    """As a shell reads it."""
    return shlex.join(["grpo", *plan.launch(stage)])


def run(plan: Plan, launch: Launch | None = None, *, check: Check | None = None) -> int:
    """Run what is not done; the exit code: 0, that of a stage that failed, or 75 if one was stopped.

    Args:
        launch: runs a stage; None: as a process of this Python.
        check: tells what is wrong with the stages that are to run, before the first of them does.

    Raises:
        ValueError: settings, an input or an output of a stage that has begun changed since; a stage that is to run has a mistake
            that `check` tells; or another process is at work in OUT.
    """
    launch = launch or process
    plan.out.mkdir(parents=True, exist_ok=True)
    with _locked(plan):
        lineage = Lineage(plan)
        lineage.check()
        if check is not None:
            check(plan, [stage for stage in plan.stages if not lineage.is_finished(stage.name)])
        for number, stage in enumerate(plan.stages, start=1):
            where = f"{number}/{len(plan.stages)} {stage.name}"
            if lineage.is_finished(stage.name):
                say(f"{where}: done")
                continue
            code = _run_stage(plan, stage, lineage, where, launch)
            if code:
                return code
        page.write(plan, lineage)
        say(f"\n{page.summary(plan, lineage)}\n\npage       {plan.out / page.HTML}\nlineage    {lineage.path}")
    return 0


def _run_stage(plan: Plan, stage: Stage, lineage: Lineage, where: str, launch: Launch) -> int:
    written = line(plan, stage)
    entry = lineage.begin(stage, written)
    plan.directory(stage).mkdir(exist_ok=True)
    say(f"\n{where}: {written}")
    began = time.monotonic()
    ended = launch(plan.launch(stage))
    entry["seconds"] += time.monotonic() - began
    if ended.code == 0:
        entry["counts"] = outcome.counts(plan, stage)
        if entry["counts"].get("rows") == 0:
            entry["status"] = "failed"
            lineage.write()
            raise ValueError(
                f"stage {stage.name}: no row is kept of {entry['counts']['samples']:,} samples: {page.in_words(entry)}. Ask "
                f"more questions, or loosen a rule; then delete {plan.directory(stage)}."
            )
        entry["status"] = FINISHED
        entry["evaluation"] = outcome.evaluation(plan, stage)
        entry["outputs"] = lineage.outputs(stage)
        lineage.write()
        say(f"{where}: {page.in_words(entry)}")
        return 0
    was_stopped = ended.code == EXIT_STOPPED or ended.was_asked
    entry["status"] = "stopped" if was_stopped else "failed"
    lineage.write()
    what = "was stopped" if was_stopped else f"failed with exit code {ended.code}"
    say(f"{where}: it {what}; the same command goes on from here.", file=sys.stderr)
    return EXIT_STOPPED if was_stopped else ended.code


def process(arguments: Sequence[str]) -> Ended:
    """`grpo` with these arguments, in a process of this Python, which gets the signals that this process gets."""
    heard: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: FrameType | None) -> None:
        heard.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        if not heard:
            child = subprocess.Popen(
                [sys.executable, SAFE_PATH, "-m", "grpo", *arguments], env={**os.environ, LAUNCHED: "1"}
            )
            for number in heard:  # while it was started
                child.send_signal(number)
        code = EXIT_STOPPED if child is None else child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Ended(128 - code if code < 0 else code, bool(heard))  # as a shell counts a signal


@contextlib.contextmanager
def _locked(plan: Plan) -> Iterator[None]:
    """One pipeline at a time in a directory."""
    with (plan.out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out is {str(plan.out)!r}; another process is at work there. Wait until it has ended, or name another --out."
            ) from None
        yield
