"""What a run shows while it runs: a display on a terminal (display.py), elsewhere a line per step."""

from __future__ import annotations

import errno
import itertools
import math
import os
import sys
import tempfile
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from grpo.observe.metric_names import is_bound
from grpo.system import heartbeat
from grpo.system.stopping import EXIT_INTERRUPTED, RunError
from grpo.system.terminal import SilencedConsole, printable, say, show

WIDE, WIDEST = 9, 20
"""A column is as wide as its title, within these."""

ESTIMATE_OVER = 10
"""Steps whose mean duration gives the time left."""


OF_ROLLOUTS = {
    "reward": "reward/mean",
    "<rewards>": "",
    "signal": "group/with_signal",
    "length": "completion/length_mean",
    "cut off": "completion/truncated",
    "entropy": "policy/entropy",
    "KL": "policy/kl",
    "tok/s": "throughput/rollout",
    "slots": "rollout/slots",
    "KV GiB": "rollout/kv_gib",
    "s/step": "time/step",
}
OF_ROWS = {
    "loss": "supervised/loss",
    "accuracy": "supervised/accuracy",
    "entropy": "policy/entropy",
    "gradient": "optimizer/grad_norm",
    "rate": "optimizer/learning_rate",
    "epoch": "progress/epoch",
    "rows": "supervised/rows",
    "tok/s": "throughput/update",
    "s/step": "time/step",
}
"""What a line shows of a step, title -> metric: of reinforcement learning, with the functions in place of <rewards>, and of
supervised training."""


class LineSink:
    """A line for each step with the metrics in columns, and the time left by the last steps."""

    HEADER_EVERY = 20

    def __init__(self, *, num_steps: int, reward_names: list[str], columns: Mapping[str, str] = OF_ROLLOUTS) -> None:
        self.num_steps = num_steps
        self.columns: dict[str, str] = {}
        for title, name in columns.items():
            self.columns |= {title: name} if name else {each: f"reward/{each}" for each in reward_names}
        self.console = console()
        self._lines = 0
        self._seconds: list[float] = []
        self._shown: list[str] = []
        self._sizes: list[int] = []
        self._left_out: list[str] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "time/step" in metrics:
            self._log_step(step, metrics)
        show_evaluation(self.console, step, metrics)

    def _log_step(self, step: int, metrics: dict[str, float]) -> None:
        self._seconds = [*self._seconds, metrics["time/step"]][-ESTIMATE_OVER:]
        seconds_left = (self.num_steps - step) * sum(self._seconds) / len(self._seconds)
        if self._lines == 0:  # not every engine has slots
            self.columns = {t: n for t, n in self.columns.items() if n in metrics or not n.startswith("rollout/")}
        if self._lines % self.HEADER_EVERY == 0:
            self._lay_out()
        cells = [f"{step}/{self.num_steps}", *(number(metrics.get(self.columns[each])) for each in self._shown)]
        left = time.strftime("%H:%M:%S", time.gmtime(seconds_left))
        self._show_row([*cells, left])
        self._lines += 1

    def _lay_out(self) -> None:
        """Choose columns and their widths, and print the header. A terminal that is too narrow has the first ones."""
        width = self.console.width if self.console.is_terminal else math.inf
        room = width + 1  # no space follows the last column
        titles = ["step", "time left", *self.columns]
        needed = [*titles[:2], *(title for title, name in self.columns.items() if name.startswith("reward/"))]
        widest = next((most for most in range(WIDEST, WIDE, -1) if sum(_widths(needed, most)) <= room), WIDE)
        ends = itertools.accumulate(_widths(titles, widest))
        self._shown = [title for title, end in zip(titles, ends, strict=True) if end <= room][2:]
        left_out = list(self.columns)[len(self._shown) :]
        if left_out and left_out != self._left_out:
            show(
                self.console,
                f"metrics.jsonl has what {width} columns have no room for: {', '.join(left_out)}",
                style="dim",
            )
        self._left_out = left_out
        header = ["step", *self._shown, "time left"]
        self._sizes = [size - 1 for size in _widths(header, widest)]
        self._show_row(short(header, widest), style="dim")

    def _show_row(self, cells: Sequence[str], style: str = "") -> None:
        show(
            self.console,
            " ".join(f"{cell:>{size}}" for cell, size in zip(cells, self._sizes, strict=True)),
            style=style,
        )

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Completions go to completions.jsonl."""

    def alarm(self, rule: str, text: str) -> None:
        """The trainer has printed it."""

    def close(self) -> None:
        """Every line is out."""


def _widths(titles: Sequence[str], widest: int) -> list[int]:
    """Of columns, each with the space beside it."""
    return [min(max(len(title), WIDE), widest) + 1 for title in titles]


def short(titles: Sequence[str], width: int) -> list[str]:
    """Titles of at most so many characters: as they are, or the beginning, or the end of those that begin alike."""
    found: list[str] = []
    for title in titles:
        begin, end = title[: width - 1], title[1 - width :]
        is_alone = sum(each.startswith(begin) for each in titles) == 1
        ways = [title] if len(title) <= width else [f"{begin}…"] if is_alone else []
        ways += ["…" + (end.partition("_")[2] or end), "…" + end]
        found.append(next((way for way in ways if way not in found), f"{title[: width - 3]}…{len(found)}"))
    return found


def console(*, markup: bool = True) -> Console:
    """On stdout, whichever that is when something is printed; long lines are the terminal's to break."""
    return SilencedConsole(highlight=False, markup=markup, soft_wrap=True)


def show_evaluation(console: Console, step: int, metrics: Mapping[str, float]) -> None:
    """What held-out questions gave, if anything among the metrics is of them."""
    for what, prefix in (("held-out", "eval/"), ("held-out rows", "supervised/held_out_")):
        shown = "  ".join(_evaluation_words({n: v for n, v in metrics.items() if n.startswith(prefix)}, prefix))
        if shown:
            show(console, Text.assemble((f"{what}, step {step}:", "bold"), f"  {shown}"))


def _evaluation_words(metrics: Mapping[str, float], prefix: str) -> Iterator[str]:
    """Each number once, with its standard error where it has one."""
    values = {name: value for name, value in metrics.items() if not is_bound(name)}
    told = [value for name, value in values.items() if f"{name}_stderr" in metrics]
    for name, value in values.items():
        if name == "eval/pass@1" and any(map(partial(math.isclose, value), told)):
            continue
        word, error = name.removeprefix(prefix), metrics.get(f"{name}_stderr")
        yield f"{EVALUATION_WORDS.get(word, word)} {value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


EVALUATION_WORDS = {"length_mean": "length", "truncated": "cut off"}
"""As in the lines of steps."""


def number(value: float | None) -> str:
    """About four digits of it."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return (
        f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.001 or not value else f"{value:.0e}"
    )


def show_samples(before: list[dict[str, Any]], after: list[dict[str, Any]], num_samples: int) -> None:
    """The same held-out questions answered before and after training, the first ones of the set."""
    terminal = console(markup=False)
    answered = {_asked(row): row for row in before if row["sample"] == 0}
    pairs = [(answered[_asked(row)], row) for row in after if row["sample"] == 0 and _asked(row) in answered]
    for old, new in pairs[:num_samples]:
        show(terminal, printable(f"\nQuestion: {old['question']}\nGold answer: {old['answer']}"))
        for label, row in (("before", old), ("after", new)):
            verdicts = ", ".join(f"{name} {value}" for name, value in row["rewards"].items())
            show(terminal, printable(f"  {label} ({verdicts}): {_transcript(row)}"))


def _asked(row: Mapping[str, Any]) -> tuple[int, str]:
    """Of which held-out question an answer is; the questions of a game can all be the same words."""
    return row["row"], row["question"]


def _transcript(row: Mapping[str, Any]) -> str:
    """What the model wrote, and on lines of their own what tools and the environment said in between."""
    turns = row.get("turns") or [{"role": "assistant", "content": row["completion"]}]
    said = [
        each["content"].strip()
        if each["role"] == "assistant"
        else f"{each.get('name') or each['role']}: {each['content']}"
        for each in turns
    ]
    return "\n".join(said)


def positive(text: str) -> int:
    """The value of a script's option."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


@contextmanager
def errors_for_users(directory: Path | None = None) -> Iterator[None]:
    """What is wrong, in a sentence instead of a traceback, and the exit code.

    A ValueError of ours speaks for itself: 2. One out of a library keeps its traceback. A run may end by design (a reward's
    error, the watchdog, a checkpoint that cannot be written), or because a disk is full or must not be written to: 1. The
    traceback then goes to a file in `directory`, the run's, or in a temporary one, which is named. Ctrl-C: 130, without one.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except ValueError as error:
        if not _is_ours(Path(traceback.extract_tb(error.__traceback__)[-1].filename)):
            raise
        print_of_rank(f"error: {error}", f"error on rank {os.environ.get('RANK')}: {error}")
        raise SystemExit(2) from None
    except (RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        said = error.sentence if isinstance(error, RunError) else f"{error}. Free some space, or write elsewhere."
        kept = _keep_traceback(error, directory)
        said += f"\nThe traceback is in {kept}." if kept is not None else ""
        print_of_rank(f"error: {said}", f"error on rank {os.environ.get('RANK')}: {said}")
        raise SystemExit(1) from None


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
"""Of the machine, which no change to the program mends."""


def _keep_traceback(error: Exception, directory: Path | None) -> Path | None:
    """The file that it was written to; None if no disk takes it."""
    rank = os.environ.get("RANK", "0")
    name = "traceback.txt" if rank == "0" else f"traceback-rank-{rank}.txt"
    text = "".join(traceback.format_exception(error))
    for place in (lambda: directory, lambda: Path(tempfile.mkdtemp(prefix="grpo-"))):
        with suppress(OSError):
            folder = place()
            if folder is not None:
                (folder / name).write_text(text)
                return folder / name
    return None


def _is_ours(origin: Path) -> bool:
    """Whether a source file is of this package or of its rewards, which lie beside it in a checkout."""
    package = Path(__file__).parents[1]
    return origin.is_relative_to(package) or origin.parent == package.with_name("rewards")


def print_of_rank(on_main: str, elsewhere: str) -> None:
    """Print to stderr why this process ends, unless another said why before; mostly rank 0 has the same to say."""
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        time.sleep(5)
    if heartbeat.announce(on_main) is None:
        say(on_main if is_main else elsewhere, file=sys.stderr)
