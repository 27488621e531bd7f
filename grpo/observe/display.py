"""What the terminal shows of a run: progress, curves, speed, alarms, and a right and a wrong completion."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from grpo.observe.console import ESTIMATE_OVER, OF_ROLLOUTS, LineSink, console, number, show_evaluation
from grpo.observe.metrics import LOSS
from grpo.scoring.answers import is_right
from grpo.system.terminal import ConsoleHandler, Region, can_repaint, logger, printable
from grpo.text.thinking import Kind, parts

BARS = "▁▂▃▄▅▆▇█"
LABEL, NUMBER = 18, 9
"""Columns of a curve's name and of each of its two values."""

FEWEST_FREE_ROWS, FREE_SHARE = 4, 5
"""Rows that are left to messages: so many, or one in so many of a tall terminal."""

SAMPLE_SECONDS = 20.0
"""A sample stays at least so long, to be read."""

COMPLETION_ROWS = 2
"""At least."""

EXCERPT = 2000
"""Characters of a completion's beginning and of its end that are kept to be shown."""

MAIN = {
    "loss": LOSS,
    "held-out loss": "supervised/held_out_loss",
    "next token": "supervised/accuracy",
    "length": "completion/length_mean",
    "KL": "policy/kl",
    "entropy": "policy/entropy",
}
MORE = {
    "reflection / 1k": "aha/reflection_per_1k",
    "signal": "group/with_signal",
    "cut off": "completion/truncated",
    "repetition": "completion/repetition",
    "grad norm": "optimizer/grad_norm",
}
"""Where there is room."""

PHASES = ("rollout", "scoring", "logprobs", "update")
TROUBLES = {
    "optimizer/skipped": "updates left out",
    "scoring/timeouts": "reward calls timed out",
    "scoring/crashes": "reward calls crashed",
}

STYLES: dict[Kind, str] = {"text": "", "think": "dim", "answer": "bold", "tag": "dim cyan"}
"""How the parts of a completion look."""


class Dashboard:
    """Collects a run's numbers, and lays them out for a terminal of any size."""

    def __init__(
        self,
        *,
        title: str,
        num_steps: int,
        first_step: int,
        reward_names: Sequence[str],
        rows: Iterable[Mapping[str, Any]],
    ) -> None:
        """Args: rows: the metrics so far, of a run that goes on after `first_step`."""
        self.title = title
        self.num_steps = num_steps
        self.step = first_step
        self.history: dict[str, list[float]] = {}
        self.last: Mapping[str, float] = {}  # metrics of the last training step
        self.alarms: dict[str, str] = {}  # the last words of each rule that had any, the newest last
        self.samples: list[Sample] = []
        self._reward_names = list(reward_names)
        self._sampled_at = -math.inf
        self._began = self._stepped_at = time.monotonic()
        for row in rows:
            self._remember({name: value for name, value in row.items() if name != "step"})

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured after a step, in training or on held-out questions."""
        self.step = step
        self._remember(metrics)
        if "time/step" in metrics:
            self._stepped_at = time.monotonic()

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)
        if "time/step" in metrics:
            self.last = metrics

    def alarm(self, rule: str, text: str) -> None:
        self.alarms.pop(rule, None)
        self.alarms[rule] = text

    def take_samples(self, rows: list[dict[str, Any]]) -> None:
        """Show a right and a wrong completion of these, once the ones shown have been there for a while."""
        if time.monotonic() - self._sampled_at >= SAMPLE_SECONDS:
            self._sampled_at = time.monotonic()
            self.samples = samples(contrast(rows))

    def lines(self, terminal: Console) -> list[Text]:
        """As much as fits, the more important first: progress, speed, alarms, main curves, samples, more curves."""
        width, height = terminal.size
        room = max(height - 1 - max(FEWEST_FREE_ROWS, height // FREE_SHARE), 1)  # the first row of a region is empty
        below = [self._speed(), *self._alarm_lines()][: room - 1]
        room -= 1 + len(below)
        main = self._curves(self._main_names(), width)[: max(room - 1, 0)]
        heading = [_styled((f"{'':{LABEL}}{'start':>{NUMBER}}{'now':>{NUMBER}}", "dim"))] if main else []
        room -= len(heading) + len(main)
        needed = sum(sample.num_rows(COMPLETION_ROWS) for sample in self.samples) + 1
        shown = self.samples if needed <= room else []
        room -= needed if shown else 0
        more = self._curves(MORE, width)[:room]
        rows_each = COMPLETION_ROWS + (room - len(more)) // max(len(shown), 1)
        texts = [line for sample in shown for line in sample.lines(terminal, rows_each)]
        return [self._progress(width), *heading, *main, *more, *below, *[Text("")] * bool(texts), *texts]

    def _progress(self, width: int) -> Text:
        now, left = time.monotonic(), ""
        seconds = self.history.get("time/step", [])[-ESTIMATE_OVER:]
        if seconds and self.step < self.num_steps:
            expected = (self.num_steps - self.step) * sum(seconds) / len(seconds)
            left = f"  {_clock(max(expected - (now - self._stepped_at), 0))} left"
        words = f" step {self.step}/{self.num_steps}  {_clock(now - self._began)}{left}"
        size = max(width - len(self.title) - len(words) - 1, 0)
        done = size * self.step // self.num_steps
        return _styled((self.title + " ", "bold"), ("━" * done, "green"), ("─" * (size - done), "dim"), (words, ""))

    def _main_names(self) -> dict[str, str]:
        trained = {"reward": "reward/mean", **{name: f"reward/{name}" for name in self._reward_names}, **MAIN}
        return trained | {f"held-out {name}": f"eval/{name}" for name in self._reward_names}

    def _curves(self, names: Mapping[str, str], width: int) -> list[Text]:
        """A line for each metric that has values: its name, first and newest value, and shape."""
        lines = []
        for label, name in names.items():
            values = self.history.get(name)
            if values:
                start, now = (f"{number(value):>{NUMBER}}" for value in (values[0], values[-1]))
                shape = sparkline(values, max(width - LABEL - 2 * NUMBER - 2, 0))
                lines.append(
                    _styled((f"{label[:LABEL]:{LABEL}}", ""), (start, "dim"), (now, "bold"), (f"  {shape}", "cyan"))
                )
        return lines

    def _speed(self) -> Text:
        if not self.last:
            return _styled(("the first step is under way", "dim"))
        seconds = self.last["time/step"]
        shares = [
            f"{name} {share:.0%}" for name in PHASES if (share := self.last.get(f"time/{name}", 0.0) / seconds) >= 0.005
        ]
        rate = self.last.get(
            "throughput/rollout", self.last.get("throughput/update")
        )  # supervised training has no rollout
        said = [f"{number(seconds)} s a step ({', '.join(shares)})", f"{number(rate)} tok/s"]
        if "memory/step" in self.last:
            said.append(f"{number(self.last['memory/step'])} GiB")
        troubles = [
            f"{total:.0f} {what}" for name, what in TROUBLES.items() if (total := sum(self.history.get(name, []))) > 0
        ]
        return _styled((", ".join(said), ""), ("".join(f", {trouble}" for trouble in troubles), "yellow"))

    def _alarm_lines(self) -> list[Text]:
        return [_styled(("! ", "bold red"), (text, "yellow")) for text in list(self.alarms.values())[:-3:-1]]


class DisplaySink:
    """The dashboard at the bottom of a terminal, and what is evaluated above it."""

    def __init__(self, dashboard: Dashboard) -> None:
        self.dashboard = dashboard
        self.console = console()
        self._region = Region(self.console, dashboard.lines)
        self._region.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.dashboard.add(step, metrics)
        show_evaluation(self.console, step, metrics)
        self._region.refresh()

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.dashboard.take_samples(rows)

    def alarm(self, rule: str, text: str) -> None:
        self.dashboard.alarm(rule, text)

    def close(self) -> None:
        self._region.stop()


def console_sink(
    *,
    title: str,
    num_steps: int,
    first_step: int,
    reward_names: list[str],
    rows: list[dict[str, Any]],
    columns: Mapping[str, str] = OF_ROLLOUTS,
) -> DisplaySink | LineSink:
    """A display on a terminal, else lines; the latter also if the logger's are not to go to the terminal as they are."""
    routed = not (
        logger.isEnabledFor(logging.INFO) and any(isinstance(each, ConsoleHandler) for each in logger.handlers)
    )
    if routed or not can_repaint(sys.stdout, os.environ):
        return LineSink(num_steps=num_steps, reward_names=reward_names, columns=columns)
    return DisplaySink(
        Dashboard(title=title, num_steps=num_steps, first_step=first_step, reward_names=reward_names, rows=rows)
    )


def contrast(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A right and a wrong completion, of one question if one has both; of what there is none is left out."""
    right = [row for row in rows if is_right(row)]
    wrong = [row for row in rows if is_right(row) is False]
    places = {row["row"]: row for row in reversed(wrong)}
    for row in right:
        if row["row"] in places:
            return [row, places[row["row"]]]
    return [*right[:1], *wrong[:1]]


def sparkline(values: Sequence[float], width: int) -> str:
    """A character per value, or per mean of equally many neighbours where there are more than `width`; from low to high.

    A place without a finite value is empty.
    """
    num = min(len(values), width)
    bins = [values[i * len(values) // num : (i + 1) * len(values) // num] for i in range(num)]
    means = [_mean([value for value in part if math.isfinite(value)]) for part in bins]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * num
    low, span = min(known), max(known) - min(known)
    levels = [None if mean is None else (mean - low) / span if span else 0.0 for mean in means]
    return "".join(" " if level is None else BARS[round(level * (len(BARS) - 1))] for level in levels)


def verdicts(rewards: Mapping[str, float | None]) -> str:
    """What each reward function said; "?" for "can't tell"."""
    return ", ".join(f"{name} {'?' if value is None else f'{value:g}'}" for name, value in rewards.items())


def styled_completion(completion: str) -> Text:
    """Thoughts dimmed, the answer bold, nothing that a terminal would obey."""
    return _styled(*((printable(text), STYLES[kind]) for kind, text in parts(completion)))


def fold(text: Text, terminal: Console, num_rows: int) -> list[Text]:
    """`text` in at most so many rows, its middle left out."""
    rows = list(text.wrap(terminal, terminal.width))
    if len(rows) > num_rows:
        num_last = num_rows // 2
        rows = [*rows[: num_rows - num_last], *rows[len(rows) - num_last :]]
        cut = rows[num_rows - num_last - 1]
        cut.truncate(max(terminal.width - 2, 1))
        cut.append(" …", "dim")
    return rows


@dataclass(frozen=True)
class Sample:
    """A completion to be shown, each text in one line."""

    question: Text | None  # None: that of the sample before
    completion: Text

    def num_rows(self, rows_of_completion: int) -> int:
        return rows_of_completion + (self.question is not None)

    def lines(self, terminal: Console, rows_of_completion: int) -> list[Text]:
        question = [] if self.question is None else [self.question.copy()]
        return [*question, *fold(self.completion, terminal, rows_of_completion)]


def samples(rows: list[dict[str, Any]]) -> list[Sample]:
    """Rows of completions with their verdicts; a question once for all that follow each other."""
    found = []
    for before, row in zip([None, *rows], rows, strict=False):
        is_same = before is not None and before["row"] == row["row"]
        where = f"step {row['step']}, answer {_one_line(row['answer'])}: "
        question = None if is_same else _styled((where, "dim"), (_one_line(row["question"]), "italic"))
        mark = ("✓ ", "bold green") if is_right(row) else ("✗ ", "bold red")
        verdict = (f"{verdicts(row['rewards'])}, {row['num_tokens']} tokens: ", "")
        text = styled_completion(_one_line(row["completion"]))
        if len(text) > 2 * EXCERPT:
            text = Text.assemble(text[:EXCERPT], " … ", text[-EXCERPT:])
        found.append(Sample(question, Text.assemble(mark, verdict, text)))
    return found


def _one_line(text: str) -> str:
    return printable(re.sub(r"\s+", " ", text).strip())


def _styled(*pieces: tuple[str, str]) -> Text:
    """Each piece in its style; as spans, since the style of a Text as a whole is lost where it is rendered as segments."""
    return Text.assemble(*pieces)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
