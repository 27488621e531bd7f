"""What the terminal shows of a run: progress, curves, speed, alarms, and a right and a wrong completion."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from grpo.observe.console import ESTIMATE_OVER, console, number, short, show_evaluation
from grpo.observe.metric_names import LOSS
from grpo.scoring.answers import is_right
from grpo.system.terminal import Region, printable
from grpo.text.thinking import Kind, parts

BARS = "▁▂▃▄▅▆▇█"
LABEL, NUMBER = 18, 9
"""Columns of a curve's name, at least, and of each of its two values."""

LABEL_SHARE = 3 / 8
"""Of the columns; a curve's name takes so many at most."""

HELD_OUT = "held-out "

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
        about: str = "",
    ) -> None:
        """Args:
        rows: the metrics so far, of a run that goes on after `first_step`.
        about: what is trained, on what, into which directory.
        """
        self.title = title
        self.about = about
        self.num_steps = num_steps
        self.step = first_step
        self.history: dict[str, list[float]] = {}
        self.evaluated: dict[str, int] = {}  # metrics that not every step has -> the step of their last value
        self.last: Mapping[str, float] = {}  # metrics of the last training step
        self.alarms: dict[str, str] = {}  # the last words of each rule that had any, the newest last
        self.samples: list[Sample] = []
        self._reward_names = list(reward_names)
        self._sampled_at = -math.inf
        self._began = self._stepped_at = time.monotonic()
        for row in rows:
            if "time/step" not in row:
                self.evaluated |= dict.fromkeys(row, int(row["step"]))
            self._remember({name: value for name, value in row.items() if name != "step"})

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured after a step, in training or on held-out questions."""
        self.step = step
        self._remember(metrics)
        if "time/step" in metrics:
            self._stepped_at = time.monotonic()
        else:
            self.evaluated |= dict.fromkeys(metrics, step)

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
        main_names = self._main_names(width)
        label = max([LABEL, *(len(each) for each, name in main_names.items() if name in self.history)])
        main = self._curves(main_names, width, label)[: max(room - 1, 0)]
        heading = [_styled((f"{'':{label}}{'start':>{NUMBER}}{'now':>{NUMBER}}", "dim"))] if main else []
        room -= len(heading) + len(main)
        about = [_styled((self.about, "dim"))] if self.about and room > 1 else []
        room -= len(about)
        needed = sum(sample.num_rows(COMPLETION_ROWS) for sample in self.samples) + 1
        shown = self.samples if needed <= room else []
        room -= needed if shown else 0
        more = self._curves(MORE, width, label)[:room]
        rows_each = COMPLETION_ROWS + (room - len(more)) // max(len(shown), 1)
        texts = [line for sample in shown for line in sample.lines(terminal, rows_each)]
        return [self._progress(width), *about, *heading, *main, *more, *below, *[Text("")] * bool(texts), *texts]

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

    def _main_names(self, width: int) -> dict[str, str]:
        most = max(LABEL, int(width * LABEL_SHARE)) - len(HELD_OUT)
        rewards = dict(zip(short(self._reward_names, most), self._reward_names, strict=True))
        trained = {"reward": "reward/mean", **{label: f"reward/{name}" for label, name in rewards.items()}, **MAIN}
        return trained | {HELD_OUT + label: f"eval/{name}" for label, name in rewards.items()}

    def _curves(self, names: Mapping[str, str], width: int, label_width: int) -> list[Text]:
        """A line for each metric that has values: its name, first and newest value, and shape.

        The shape is as long as the part of the run that is done, like the bar above it, and that of a share goes from 0 to 1.
        """
        lines = []
        room = max(width - label_width - 2 * NUMBER - 2, 0)
        for label, name in names.items():
            values = self.history.get(name)
            if values:
                start, now = (f"{number(value):>{NUMBER}}" for value in (values[0], values[-1]))
                at = f"  step {self.evaluated[name]}" if name in self.evaluated else ""
                length = max(room * min(self.step, self.num_steps) // max(self.num_steps, 1), min(len(values), room))
                shape = sparkline(
                    values, min(length, room - len(at)), scale=(0.0, 1.0) if is_share(name, values) else None
                )
                pieces = (
                    (f"{label:{label_width}}", ""),
                    (start, "dim"),
                    (now, "bold"),
                    (f"  {shape}", "cyan"),
                    (at, "dim"),
                )
                lines.append(_styled(*pieces))
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


def contrast(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A right and a wrong completion, of one question if one has both; of what there is none is left out."""
    right = [row for row in rows if is_right(row)]
    wrong = [row for row in rows if is_right(row) is False]
    places = {row["row"]: row for row in reversed(wrong)}
    for row in right:
        if row["row"] in places:
            return [row, places[row["row"]]]
    return [*right[:1], *wrong[:1]]


SHARES = ("group/with_signal", "completion/truncated", "completion/repetition", "supervised/accuracy")
"""Metrics from 0 to 1; rewards are too, as long as none was outside."""


def is_share(name: str, values: Sequence[float]) -> bool:
    """Whether the curve of a metric is to be seen on a scale from 0 to 1."""
    may_be = name.startswith(("reward/", "eval/")) and name != "reward/mean"
    return name in SHARES or (may_be and all(0 <= value <= 1 for value in values if math.isfinite(value)))


def sparkline(values: Sequence[float], width: int, scale: tuple[float, float] | None = None) -> str:
    """`width` characters, each the mean of the values that fall on it, from low to high; a value may take several.

    A place without a finite value is empty.

    Args:
        scale: lowest and highest; None: those of the means.
    """
    size = len(values)
    bins = [values[i * size // width : max((i + 1) * size // width, i * size // width + 1)] for i in range(width)]
    means = [_mean([value for value in part if math.isfinite(value)]) for part in bins]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * width
    low, high = scale or (min(known), max(known))
    span = high - low
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
