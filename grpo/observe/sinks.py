"""Where a run's numbers and texts go: metrics.jsonl and completions.jsonl, Weights & Biases, TensorBoard."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Protocol

from grpo.config import AnyConfig
from grpo.scoring.answers import is_right, metrics_of
from grpo.system.files import replace_text, to_json
from grpo.system.jsonl import append_jsonl
from grpo.system.terminal import say
from grpo.text import aha

Row = Mapping[str, Any]


class Sink(Protocol):
    """Somewhere metrics go. Only the main process has sinks."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class RowsLost(OSError):
    """Rows of a run could be written nowhere."""


class JsonlSink:
    """metrics.jsonl, completions.jsonl: one JSON object a line, written through at once. What is no finite number is null.

    Rows that cannot be written are kept, and tried again with the next.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._waiting: dict[str, list[dict[str, Any]]] = {}  # by the name of their file

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.append("metrics.jsonl", [{"step": step, **metrics}])

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.append("completions.jsonl", rows)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to the file of that name."""
        rows = self._waiting.pop(name, []) + rows
        try:
            append_jsonl(self.directory / name, rows)
        except OSError as error:
            self._waiting[name] = rows
            say(f"warning: {name} cannot be written: {error}; {len(rows)} rows wait in memory.")

    def close(self) -> None:
        """What still cannot be written goes to the directory for temporary files.

        Raises:
            RowsLost: nor there.
        """
        for name in list(self._waiting):
            self.append(name, [])
        waiting, self._waiting = self._waiting, {}
        lost = [problem for name, rows in waiting.items() if (problem := self._write_elsewhere(name, rows))]
        if lost:
            raise RowsLost(
                f"the last {' and '.join(lost)} are lost: neither {self.directory} nor the directory for temporary files took "
                "them."
            )

    def _write_elsewhere(self, name: str, rows: list[dict[str, Any]]) -> str | None:
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix=f"{self.directory.name}-")) / name
            append_jsonl(elsewhere, rows)
        except OSError as error:
            return f"{len(rows)} rows of {name} ({error})"
        say(f"warning: the last {len(rows)} rows of {name} are in {elsewhere}.")
        return None


class InBackground:
    """Another sink, whose calls are made in a thread, one after the other. It may fail or hang without harm to the run.

    What goes wrong is said once. A sink that cannot be made, or that takes longer for a call than LIMIT_SECONDS, is given up.
    """

    LIMIT_SECONDS = 120.0
    MAX_WAITING = 1000  # calls; their completions are in memory

    def __init__(self, name: str, make: Callable[[], Sink], *, abandon: Callable[[], None]) -> None:
        """Args:
        make: called in the thread; what it imports may be broken too.
        abandon: called when the sink is given up, in whatever state it is.
        """
        self._name = name
        self._abandon = abandon
        self._calls: Queue[Callable[[Sink], None] | None] = Queue(self.MAX_WAITING)
        self._began: float | None = None  # the call that is being made
        self._is_over = False
        self._said: set[str] = set()
        self._thread = Thread(target=self._work, args=[make], name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        copy = dict(metrics)
        self._put(lambda sink: sink.log(step, copy))

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._put(lambda sink: sink.log_completions(step, rows))

    def close(self) -> None:
        """Wait until everything is logged, or the sink hangs."""
        self._put(lambda sink: sink.close())
        self._put(None)
        while self._thread.is_alive() and not self._is_over:
            self._thread.join(0.1)
            self._give_up_if_it_hangs()

    def _put(self, call: Callable[[Sink], None] | None) -> None:
        self._give_up_if_it_hangs()
        if not self._is_over:
            try:
                self._calls.put_nowait(call)
            except Full:
                self._give_up(f"{self.MAX_WAITING} calls wait for it")

    def _give_up_if_it_hangs(self) -> None:
        began = self._began
        if began is not None and time.monotonic() - began > self.LIMIT_SECONDS:
            self._give_up(f"it has not answered for {self.LIMIT_SECONDS:g} s")

    def _give_up(self, why: str) -> None:
        if not self._is_over:
            self._is_over = True
            say(f"{self._name}: {why}; from here on this run is in its own files only.")
            self._abandon()

    def _work(self, make: Callable[[], Sink]) -> None:
        self._began = time.monotonic()
        try:
            sink = make()
        except BaseException as error:  # an import may even want to end the process
            self._give_up(f"{type(error).__name__}: {error}")
            return
        self._began = None
        while (call := self._calls.get()) is not None and not self._is_over:
            self._began = time.monotonic()
            self._make(call, sink)
            self._began = None

    def _make(self, call: Callable[[Sink], None], sink: Sink) -> None:
        try:
            call(sink)
        except Exception as error:
            if not self._is_over and str(error) not in self._said:
                self._said.add(str(error))
                say(f"{self._name}: {error}; what it should have logged is in the run's own files.")


CHARTS = {
    "reflection": ("share of completions with a reflective word", "aha/reflection_share"),
    "reflection_rate": ("reflective words per 1,000 tokens", "aha/reflection_per_1k"),
    "length_by_verdict": ("tokens per completion", "completion/length"),
}
"""Charts of several lines each: all completions, right ones, wrong ones, and the level of the untrained model."""

UNTRAINED = "untrained model"

COMPLETIONS, REFLECTIVE = "samples/completions", "samples/reflective"
"""W&B's tables."""


def overview(verdicts: Sequence[str]) -> dict[str, str]:
    """The few metrics that W&B has once more, under these names; `verdicts` are the rewards that say what is right."""
    sampled, held_out = metrics_of(verdicts)
    name = verdicts[0] if len(verdicts) == 1 else "right"
    return {
        "reward/mean": "reward",
        sampled: name,
        held_out: f"held-out {name}",
        "completion/length_mean": "length",
        "completion/truncated": "cut off",
        "policy/entropy": "entropy",
        "policy/kl": "KL",
    }


def chart_lines(metric: str) -> dict[str, str]:
    """What a chart's lines are called, and the metric of each."""
    every = "completion/length_mean" if metric == "completion/length" else metric
    return {"all": every, "right": f"{metric}_right", "wrong": f"{metric}_wrong"}


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many of the points, evenly spread, with the last one."""
    return points[:: -math.ceil(len(points) / most)][::-1] if points else points


class Rarely:
    """Says when something large is due: at first every five steps, later after a tenth of the steps so far."""

    def __init__(self) -> None:
        self._next = 0

    def due(self, step: int) -> bool:
        if step < self._next:
            return False
        self._next = step + max(step // 10, 5)
        return True


class ReflectiveSamples:
    """Of some steps, the right and the wrong completions that have the most reflective words."""

    NUM = 4

    def __init__(self, words: aha.Words) -> None:
        self._words = words
        self._rarely = Rarely()

    def pick(self, step: int, rows: Sequence[Row]) -> list[tuple[str, Row, list[tuple[int, int]]]]:
        """`right` or `wrong`, a row of `training_rows`, and where its words are."""
        if not self._rarely.due(step):
            return []
        verdicts = [is_right(row) for row in rows]
        return [
            (label, row, spans)
            for label, verdict in (("right", True), ("wrong", False))
            for row, spans in aha.most_reflective(rows, verdicts, self._words, verdict=verdict, num=self.NUM)
        ]


class WandbSink:
    """A Weights & Biases run with the curves, the resolved config, and tables of completions.

    A workspace makes a panel of each name, and a section of what stands before its first slash; names without one are in the
    section that comes first. There go the few curves that matter, once more, and CHARTS; texts go to `samples`.

    Without a login, or when the service cannot be reached, the run is kept on disk (`wandb sync` uploads it later) and a
    line says so. Anything here may raise or hang: it is called by InBackground. The environment variables of W&B hold where
    the configuration says nothing.
    """

    TABLE_ROWS = 32
    CHART_ROWS = 10_000  # W&B shows no more of a table

    def __init__(
        self,
        mode: str,
        *,
        project: str | None,
        directory: Path,
        config: dict[str, Any],
        verdicts: Sequence[str],
        words: aha.Words,
        history: Sequence[Row],
    ) -> None:
        """Args:
        verdicts: names of the rewards that say what is right.
        history: the rows of metrics.jsonl so far.
        """
        import wandb

        self._wandb = wandb
        if mode == "online" and not _has_login(wandb):
            say("wandb: no login found (run `wandb login`); this run is logged offline.")
            mode = "offline"
        options: dict[str, Any] = {
            "project": project or default_project(),
            "name": os.environ.get("WANDB_NAME") or directory.name,
            "dir": str(directory),
            "config": config,
            "id": _wandb_id(directory),
            "resume": "allow",
        }
        try:
            self._run = wandb.init(mode=mode, **options)  # type: ignore[arg-type]
        except Exception as error:
            if mode == "offline":
                raise
            say(f"wandb: {error}; this run is logged offline.")
            self._run = wandb.init(mode="offline", **options)
        self._overview = overview(verdicts)
        # W&B's own step cannot go back; a run that resumes or rolls back does
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        for name in metrics_of(verdicts):  # the list of runs shows the best beside the last
            self._run.define_metric(name, step_metric=STEP, summary="max,last")
        self._samples = ReflectiveSamples(words)
        self._history: list[Row] = list(history)
        self._charts_due = Rarely()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        overview = {short: metrics[name] for name, short in self._overview.items() if name in metrics}
        self._history.append({"step": step, **metrics})
        self._run.log({"step": step, **metrics, **overview})
        if self._charts_due.due(step):
            self._send_charts()

    def _send_charts(self) -> None:
        step = self._history[-1]["step"]
        charts = {name: self._chart(title, metric) for name, (title, metric) in CHARTS.items()}
        self._run.log({"step": step, **{name: chart for name, chart in charts.items() if chart}})

    def _chart(self, title: str, metric: str) -> Any:
        """All of a chart's lines up to now, those of an earlier attempt at the run included; None while there are none."""
        lines = chart_lines(metric)
        most = self.CHART_ROWS // (len(lines) + 1)
        points = {
            label: _thinned([(row["step"], row[name]) for row in self._history if name in row], most)
            for label, name in lines.items()
        }
        if lines["all"] in (base := aha.base_level(self._history)):
            points[UNTRAINED] = [(step, base[lines["all"]]) for step, _ in points["all"]]
        drawn = {label: list(zip(*each, strict=True)) for label, each in points.items() if each}
        if not drawn:
            return None
        xs, ys = ([list(each[axis]) for each in drawn.values()] for axis in (0, 1))
        return chart_of(self._wandb, title, xs, ys, list(drawn))

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        self._log_tables(step, rows)

    def _log_tables(self, step: int, rows: list[dict[str, Any]]) -> None:
        shown = rows[: self.TABLE_ROWS]
        columns = list(dict.fromkeys(name for row in shown for name in row))  # `extra` is not in all
        table = self._wandb.Table(columns=[*columns])
        for row in shown:
            cells = [row.get(name) for name in columns]
            table.add_data(*(to_json(cell) if isinstance(cell, dict) else cell for cell in cells))
        self._run.log({"step": step, COMPLETIONS: table})
        if picked := self._samples.pick(step, rows):
            self._run.log({"step": step, REFLECTIVE: self._reflective_table(picked)})

    def _reflective_table(self, picked: list[tuple[str, Row, list[tuple[int, int]]]]) -> Any:
        columns: list[str | int] = [
            "step",
            "verdict",
            "words",
            "tokens",
            "excerpts",
            "question",
            "answer",
            "completion",
        ]
        table = self._wandb.Table(columns=columns)
        for label, row, spans in picked:
            marked = aha.as_html(aha.excerpts(row["completion"], spans))
            passages = self._wandb.Html(f'<meta charset="utf-8">{marked}', inject=False)
            texts = (row["question"], str(row["answer"]), row["completion"])
            table.add_data(row["step"], label, len(spans), row["num_tokens"], passages, *texts)
        return table

    def close(self) -> None:
        try:
            if self._history:
                self._send_charts()
        finally:
            self._run.finish()


STEP = "step"
"""The metric over which W&B draws all others."""


def chart_of(wandb: Any, title: str, xs: list[list[float]], ys: list[list[float]], labels: list[str]) -> Any:
    """Lines over the step. Its table is in no section of the workspace where the samples are."""
    return wandb.plot.line_series(xs, ys, labels, title, STEP, split_table=True)


def default_project() -> str:
    """Of a W&B run whose configuration names none."""
    return os.environ.get("WANDB_PROJECT") or "grpo"


def end_wandb_service() -> None:
    """Kill W&B's own process. Its hook at the end of Python waits without limit for one that is frozen."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"wandb" in (stat.parent / "cmdline").read_bytes():
                os.kill(int(stat.parent.name), signal.SIGKILL)


def _has_login(wandb: Any) -> bool:
    try:
        return wandb.login(prompt=False)
    except Exception as error:  # a key that is no key, a service that cannot be reached
        say(f"wandb: {error}")
        return False


def _wandb_id(directory: Path) -> str:
    """The run's id, kept beside its results so that a resumed run continues the same curves."""
    path = directory / "wandb_id"
    if not path.exists():
        replace_text(path, os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex())
    return path.read_text()


class TensorBoardSink:
    """The same names in TensorBoard's event files, with CHARTS under "custom scalars" and reflective completions as text."""

    def __init__(self, directory: Path, *, first_step: int, words: aha.Words, history: Sequence[Row]) -> None:
        """Args:
        first_step: the first that this process may log; whatever an earlier attempt logged of it and later is not shown.
        history: the rows of metrics.jsonl so far.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
        layout = {
            title: ["Multiline", [f"^{re.escape(tag)}$" for tag in (*chart_lines(metric).values(), _untrained(metric))]]
            for title, metric in CHARTS.values()
        }
        self._writer.add_custom_scalars({"reflection": layout})
        self._base = aha.base_level(history)
        self._samples = ReflectiveSamples(words)
        self._failed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self._failed:
            with self._surviving(step):
                self._log(step, metrics)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self._base = self._base or aha.base_level([{"step": step, **metrics}])
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for _, metric in CHARTS.values():
            every = chart_lines(metric)["all"]
            if every in self._base and every in metrics:
                self._writer.add_scalar(_untrained(metric), self._base[every], step)
        self._writer.flush()

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        if self._failed:
            return
        texts: dict[str, list[str]] = {}
        for label, row, spans in self._samples.pick(step, rows):
            marked = aha.as_text(aha.excerpts(row["completion"], spans), mark=("**", "**"))
            texts.setdefault(label, []).append(f"{row['question']}\n\n> {marked}".replace("<", "&lt;"))
        with self._surviving(step):
            for label, each in texts.items():
                self._writer.add_text(f"samples/reflective_{label}", "\n\n---\n\n".join(each), step)

    @contextlib.contextmanager
    def _surviving(self, step: int) -> Iterator[None]:
        """A full disk ends these files and not the run: after one error their writer only repeats it."""
        try:
            yield
        except OSError as error:
            self._failed = True
            say(f"warning: tensorboard/ cannot be written: {error}; from step {step} on it has nothing.")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


def _untrained(metric: str) -> str:
    return f"{metric}_untrained"


def check_sinks(config: AnyConfig) -> None:
    """Raises:
    ValueError: a package that logging needs is missing.
    """
    if config.logging.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "logging.tensorboard is true; it needs the package tensorboard, which is not installed. Run "
            "`pip install 'tensorboard>=2.20'`, or remove it."
        )
