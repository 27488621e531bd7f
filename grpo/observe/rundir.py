"""A run's directory: which one to use, what is written into it, and what of it a resumed run takes up again."""

from __future__ import annotations

import fcntl
import gc
import math
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.metadata import version
from itertools import chain, count, takewhile
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from grpo.config import AnyConfig, PlaceConfig
from grpo.observe.console import OF_ROLLOUTS, show_samples
from grpo.observe.screen import Screen, console_sink
from grpo.observe.sinks import InBackground, JsonlSink, Sink, TensorBoardSink, WandbSink, end_wandb_service
from grpo.scoring.answers import is_right, summarize, training_rows, verdicts_of
from grpo.system.build import commit, own_version, processor
from grpo.system.distributed import Processes
from grpo.system.files import replace_text, to_json
from grpo.system.jsonl import append_jsonl, iterate_backwards, iterate_jsonl, read_jsonl, read_metrics, rewind_jsonl
from grpo.system.terminal import say
from grpo.text import aha, language
from grpo.types import Group, Scores

ROLL_BACKS = "roll_backs.jsonl"
STEP = ("step",)
"""What a row has at least."""

RECORDED = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "mpmath")


EARLIER_TRACEBACKS = "traceback.superseded.txt"
"""Those of the attempts that a run has gone on from, one after another."""


def claim(config: PlaceConfig, lock: DirectoryLock) -> Path:
    """Create and return the run's directory: `run.dir` itself to resume or if it is new; else the first of dir-2, dir-3, ...

    Creating it is the claim, so two runs started together do not share one; nor do two that resume, for one of them has its lock.

    Raises:
        ValueError: another run is at work in the directory to resume in, it cannot be written to, or is a file.
    """
    config.check_dir()
    wanted = Path(config.dir)
    with _writing(wanted):
        directory = wanted if config.resume == "auto" else _new(wanted)
        directory.mkdir(parents=True, exist_ok=True)
        lock.take(directory)
    if directory != wanted:
        say(f"run.dir {wanted} is used already; this run goes to {directory} (run.resume=auto goes on in the first)")
    return directory


def _new(wanted: Path) -> Path:
    for path in chain([wanted], (wanted.with_name(f"{wanted.name}-{n}") for n in count(2))):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("count(2) does not end")


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Say what a user can do where the disk is full or read-only, or a directory belongs to another."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"run.dir is {str(directory)!r}; it cannot be written to: {error}. Make room there, correct its permissions, or "
            "choose another run.dir."
        ) from error


class DirectoryLock:
    """Keeps other runs out of a directory, those of this process too: until it is released, nobody holds on to it, or the process
    ends, however it ends."""

    def __init__(self) -> None:
        self._let_go: Callable[[], object] | None = None  # None: it is not held
        self._path = Path()  # of the file
        self._began_at: int | None = None  # as the file has it, which everybody touches who begins to write

    @property
    def is_held(self) -> bool:
        return self._let_go is not None

    def take(self, directory: Path) -> None:
        """Does nothing if it is held.

        Raises:
            ValueError: another has it.
            RuntimeError: the directory is gone; or another has begun to write there since this one was released.
        """
        if self.is_held:
            return
        path = (directory / "lock").resolve()
        if path in _held:
            gc.collect()  # a trainer that nobody can use any more
        try:
            file = path.open("a")
        except FileNotFoundError:
            raise RuntimeError(
                f"run.dir is {str(directory)!r}, which is gone: it was removed or renamed. Put it back to go on, or make a new "
                "trainer."
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            last = _held.get(path)
            own = last is not None and last.is_held
            raise ValueError(
                f"run.dir is {str(directory)!r}; another {'trainer of this process' if own else 'process'} is at work there, and "
                f"two would overwrite each other's files. {'Close it (trainer.close())' if own else 'Wait until it has ended'}, "
                "or choose another run.dir."
            ) from None
        let_go = weakref.finalize(self, _unlock, file, os.getpid())
        let_go.atexit = False
        if self._began_at not in (None, os.fstat(file.fileno()).st_mtime_ns):
            let_go()
            raise RuntimeError(
                f"this trainer has failed, and another has been at work in {directory} since. To go on from there, make a "
                "new one with run.resume=auto."
            )
        self._let_go, self._path = let_go, path
        _held[path] = self

    def begin(self) -> None:
        """Before the first file of a run is written: a trainer that failed here before does not go on from now on. One that is
        refused earlier, for its settings, has changed nothing."""
        os.utime(self._path)
        self._began_at = self._path.stat().st_mtime_ns

    def release(self) -> None:
        """Let others in. Does nothing if it is not held."""
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    def __enter__(self) -> DirectoryLock:
        """Around what makes a trainer, which keeps it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Release it if that failed: the traceback may hold on to the parts for as long as a notebook runs."""
        if kind is not None:
            self.release()


_held: WeakValueDictionary[Path, DirectoryLock] = WeakValueDictionary()
"""By its file, the last lock that this process has taken; it may be released."""


def _unlock(file: IO[str], owner: int) -> None:
    """A process that was forked has a copy of the file, and must not unlock it for its parent."""
    if os.getpid() == owner:
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def record(directory: Path, config: AnyConfig, processes: Processes) -> None:
    """Write the resolved configuration and what the run runs on."""
    replace_text(directory / "config.yaml", config.to_yaml())
    device = torch.cuda.get_device_name() if processes.device.type == "cuda" else "cpu"
    environment = {
        "command": sys.argv,
        "grpo": own_version(),
        "commit": commit(),
        "processes": processes.world_size,
        "device": device,
        "processor": processor(),
        "python": platform.python_version(),
        **_versions(),
    }
    replace_text(directory / "environment.json", to_json(environment, indent=1))


@cache
def _versions() -> dict[str, str]:
    """Of the packages that a run depends on; reading them takes a tenth of a second."""
    return {name: version(name) for name in RECORDED}


class RunLog:
    """Everything a run writes down. Only the main process writes; the others call the same methods without effect."""

    def __init__(
        self,
        directory: Path,
        config: AnyConfig,
        processes: Processes,
        *,
        reward_names: list[str],
        num_steps: int | None = None,
        columns: Mapping[str, str] = OF_ROLLOUTS,
        engine: str = "",
    ) -> None:
        """Args:
        engine: that samples, in a word.
        num_steps: of the run, where `run.steps` does not say.
        columns: what a line of the console shows: title -> metric.
        """
        self.engine = engine
        self.num_steps = num_steps or config.run.steps or 0
        self.columns = columns
        self.directory = directory
        self.config = config
        self.processes = processes
        self.reward_names = reward_names
        self.words = aha.with_own(config.logging.reflection_words)
        self.sinks: list[Sink] = []
        self.files: JsonlSink | None = None
        self.console: Screen | None = None

    def open(self, *, resumed_step: int | None) -> None:
        """Start writing, after a checkpoint of `resumed_step` if there was one.

        What an earlier attempt wrote of later steps, or all of it without a checkpoint, is set aside.
        """
        if not self.processes.is_main:
            return
        last = -1 if resumed_step is None else resumed_step
        with _writing(self.directory):
            self._rewind(last)
            record(self.directory, self.config, self.processes)
        logging, history = self.config.logging, self.metrics()
        self.files = JsonlSink(self.directory)
        self.sinks = [self.files]
        if logging.wandb != "disabled":
            make = partial(
                WandbSink,
                logging.wandb,
                project=logging.wandb_project,
                directory=self.directory,
                config=self.config.model_dump(),
                verdicts=verdicts_of(self.config.scoring.verdict, self.reward_names) or [""],
                words=self.words,
                history=history,
            )
            self.sinks.append(InBackground("wandb", make, abandon=end_wandb_service))
        if logging.tensorboard:
            self.sinks.append(TensorBoardSink(self.directory, first_step=last + 1, words=self.words, history=history))
        self.console = console_sink(
            title=self.directory.name,
            num_steps=self.num_steps,
            first_step=resumed_step or 0,
            reward_names=self.reward_names,
            rows=history,
            columns=self.columns,
            about=self._about(),
        )
        self.sinks.append(self.console)

    def _about(self) -> str:
        """What is trained, on what, and where: the heading of a display."""
        gpu, number = self.processes.device.type == "cuda", self.processes.world_size
        device = f"{number} x " * (number > 1) + (torch.cuda.get_device_name() if gpu else "CPU")
        path = Path(self.config.model.name)
        model = "/".join(path.parts[-2:]) if path.is_dir() else str(path)
        return ", ".join([model, device, *([self.engine] if self.engine else []), str(self.directory)])

    def _rewind(self, last: int) -> None:
        for name in ("metrics", "completions"):
            rewind_jsonl(self.directory / f"{name}.jsonl", last)
        rewind_jsonl(self.directory / "evaluations.jsonl", last if self._is_evaluated(last) else last - 1)
        # whatever checkpoint a run goes on from, its roll-backs happened; but for one whose row a kill cut short
        rewind_jsonl(self.directory / ROLL_BACKS, -1 if last < 0 else math.inf)
        if last < 0:
            (self.directory / "wandb_id").unlink(missing_ok=True)
        for path in sorted(self.directory.glob("traceback*.txt")):
            if path.name != EARLIER_TRACEBACKS:
                with (self.directory / EARLIER_TRACEBACKS).open("a", encoding="utf-8") as file:
                    file.write(path.read_text(encoding="utf-8", errors="replace") + "\n")
                path.unlink()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._tell(lambda sink: sink.log(step, metrics))

    def log_completions_if_due(
        self, step: int, groups: list[Group], scores: Scores, advantages: Tensor, *, in_batch: Tensor
    ) -> None:
        """Those of all processes, after every `logging.completions_every` steps; see training_rows."""
        every = self.config.logging.completions_every
        if every and step % every == 0:
            mine = training_rows(step, groups, scores, advantages, in_batch=in_batch)
            rows = [row for part in self.processes.gather(mine) for row in part]
            self._tell(lambda sink: sink.log_completions(step, rows))

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            what(sink)

    def log_alarm(self, rule: str, text: str) -> None:
        if self.console is not None:
            self.console.alarm(rule, text)

    def log_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        if self.files is not None:
            self.files.append("evaluations.jsonl", [{"step": step, **row} for row in rows])
        verdicts = [is_right(row) for row in rows]
        self.log(
            step,
            summarize(rows) | aha.evaluation_metrics(rows, verdicts, self.words) | language.evaluation_metrics(rows),
        )

    def evaluation(self, step: int) -> list[dict[str, Any]]:
        """The rows logged for `step`; empty if it has not been evaluated. Mostly it is the last, or the first."""
        path = self.directory / "evaluations.jsonl"
        if step == 0:
            return list(takewhile(lambda row: row["step"] <= step, iterate_jsonl(path, STEP)))
        rows = takewhile(lambda row: row["step"] >= step, iterate_backwards(path))
        return [row for row in rows if row["step"] == step][::-1]

    def show_samples(self, step: int) -> None:
        """Answers to the same questions, before the first step and after this one, where both were given."""
        if self.processes.is_main:
            before, after = self.evaluation(0), self.evaluation(step)
            if before and after:  # a trainer that was first stepped by hand has not seen the base model's answers
                show_samples(before, after, self.config.logging.num_samples)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far. For the main process."""
        return read_metrics(self.directory / "metrics.jsonl")

    def log_roll_back(self, row: dict[str, Any]) -> None:
        if self.processes.is_main:
            append_jsonl(self.directory / ROLL_BACKS, [row])

    def roll_backs(self) -> list[dict[str, Any]]:
        """All roll-backs so far: whatever checkpoint a run goes on from, they happened. For the main process."""
        return read_jsonl(self.directory / ROLL_BACKS, STEP)

    def _is_evaluated(self, step: int) -> bool:
        """Whether an evaluation of it is complete: its metrics are written after its answers; a kill may have come between."""
        return self.has_metric(step, "eval/length_mean")

    def has_metric(self, step: int, name: str) -> bool:
        """Whether a metric of one of the last steps is logged. For the main process."""
        rows = takewhile(lambda row: row["step"] >= step, iterate_backwards(self.directory / "metrics.jsonl"))
        return any(row["step"] == step and name in row for row in rows)

    @property
    def is_closed(self) -> bool:
        """Whether nobody would hear what is logged, on the main process."""
        return self.processes.is_main and not self.sinks

    def close(self) -> None:
        """Close every sink.

        Raises:
            RowsLost: rows could be written nowhere.
        """
        with ExitStack() as stack:
            for sink in reversed(self.sinks):
                stack.callback(sink.close)
            self.sinks = []
