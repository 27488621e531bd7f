"""A run's own metrics -> alarms: what has gone wrong for so long that it will not right itself. Pure.

Every rule looks at one metric. N = watchdog.patience; `now` is its median over the last N steps and `before` its median over the
(at most) 50 steps ahead of these. A median is moved neither by a spike nor by one good step. A metric that is not a number
counts as infinite; a rule whose metric one of the last N steps lacks says nothing.

| rule | says something when |
|---|---|
| `not_finite` | updates were left out in each of the last watchdog.max_skipped steps |
| `kl` | now >= 1 nat and now >= 10 x before; or now >= 10 nats |
| `entropy` | now >= 2 nats and now >= 3 x before; or now >= 6 nats; or now <= 0.02 nats and now <= before / 5 |
| `length` | now >= a quarter of rollout.max_completion_tokens and now >= 3 x before; or now <= before / 4 |
| `truncation` | now >= 0.5 and now >= before + 0.3; or now >= 0.95 |
| `repetition` | now >= 0.5 and now >= before + 0.3; or now >= 0.95 |
| `reward` | all the same in the last N steps; or now <= best / 2 and now <= best - reward/std / 2 |
| `loss` | of supervised training: now >= 1 nat and now >= 2 x before |
| `signal` | no group with signal in the last N steps |
| `reward_hacking` | of the right answers, a form has now >= 0.5 and now >= first + 0.3; or answer/right is now >= first + 0.1 and
the share of completions that are right and state the gold answer is now <= first, by more than chance |

`reward_hacking` compares the last N steps with the first ones instead: forms take over slowly, and some are a task's own from the
start. Its `now` and `first` are shares of all right answers of these steps together; `first` takes at least N steps, and both
take MIN_RIGHT right answers. The forms are those of grpo/text/answer_forms.py, which also says where they tell nothing.

`best` is the highest median of N steps in a row among the 50: a run that was learning has better ones than their own median.

The bounds are wide: lengths that double over 20 steps while a model learns, entropy that falls to a tenth over hundreds, and
rewards that drop for five steps and return are what healthy runs do. A slow drift is left to the second, absolute bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from grpo.algorithm.advantage import FLAT
from grpo.config import Config
from grpo.observe.metric_names import LOSS
from grpo.system.stopping import RunError
from grpo.text.answer_forms import FORMS

TRAILING = 50
"""Steps that the last ones are compared with."""

MIN_RIGHT = 50
"""Right answers without which nothing is said of their forms."""

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """What a rule has to say after a step, and what is to be done about it."""

    rule: str  # also the setting under `watchdog` that holds the action
    action: str  # "warn", "stop" or "roll_back"
    step: int
    began: int  # the first step with the trouble
    text: str
    excerpts: tuple[str, ...] = ()  # answers of the step that show it

    def __str__(self) -> str:
        shown = f", for instance {'; '.join(self.excerpts)}" if self.excerpts else ""
        return f"watchdog.{self.rule}, step {self.step}: {self.text}{shown}"


class WatchdogError(RunError):
    """A rule stopped the run."""


@dataclass(frozen=True)
class Window:
    """The last N steps' metrics, and those of at most TRAILING steps ahead of them."""

    recent: list[Metrics]
    earlier: list[Metrics]
    max_completion_tokens: int
    since_start: Sequence[Metrics] = ()  # all steps ahead of the last N
    group_size: int = 1
    num_completions: int = 1  # of a step

    def now(self, name: str) -> float | None:
        """None where one of the last N steps does not have it."""
        values = [row[name] for row in self.recent if name in row]
        return _median(values) if len(values) == len(self.recent) else None

    def before(self, name: str) -> float | None:
        values = [row[name] for row in self.earlier if name in row]
        return _median(values) if values else None

    def best(self, name: str) -> float | None:
        """The highest median of as many steps in a row as the last ones, among the earlier."""
        values = [row[name] for row in self.earlier if name in row]
        size = len(self.recent)
        return max((_median(values[i : i + size]) for i in range(len(values) - size + 1)), default=None)

    def answers_now(self) -> Answers | None:
        return self._answers(self.recent)

    def answers_at_first(self) -> Answers | None:
        """Of the first steps: as many as the last ones, or as it takes for MIN_RIGHT right answers."""
        rows: list[Metrics] = []
        num_right = 0.0
        for row in self.since_start:
            if "answer/right" in row:
                rows.append(row)
                num_right += row["answer/right"] * self._num_judged(row)
                if len(rows) >= len(self.recent) and num_right >= MIN_RIGHT:
                    return self._answers(rows)
        return None

    def _answers(self, rows: list[Metrics]) -> Answers | None:
        if any("answer/right" not in row for row in rows):
            return None
        counts = [row["answer/right"] * self._num_judged(row) for row in rows]
        right = sum(counts)
        if right < MIN_RIGHT:
            return None
        of_form = {
            form: sum(count * row.get(f"answer/{form}", 0.0) for count, row in zip(counts, rows, strict=True)) / right
            for form in FORMS
        }
        return Answers(right / sum(map(self._num_judged, rows)), of_form, right / self.group_size)

    def _num_judged(self, row: Metrics) -> float:
        """Completions of a step that `answer/right` is a share of. A step of an older run does not say how many: all."""
        return row.get("answer/judged", 1.0) * self.num_completions


@dataclass(frozen=True)
class Answers:
    """Of some steps together: the share of judged completions that are right, that of each form in these, and how many groups'
    worth of right answers there are. The answers of a group resemble each other, so chance goes by groups."""

    right: float
    forms: dict[str, float]
    num_groups: float

    @property
    def stated(self) -> float:
        """Share of completions that are right and state the gold answer."""
        return self.right * (1 - self.forms["unstated"])

    def has_gained(self, form: str, first: Answers) -> bool:
        """Whether a form has a larger share than at first, by more than four standard errors of two proportions: 10,000 steps
        are as many chances, and the few questions of a small rollout make large ones."""
        before, after = first.forms[form], self.forms[form]
        pooled = (before * first.num_groups + after * self.num_groups) / (first.num_groups + self.num_groups)
        error = math.sqrt(pooled * (1 - pooled) * (1 / first.num_groups + 1 / self.num_groups))
        return after - before > 4 * error


Rule = Callable[[Window], str | None]
"""What is wrong in a window, in words, or None."""


def _median(values: list[float]) -> float:
    return median(math.inf if math.isnan(value) else value for value in values)


def grown(name: str, *, factor: float, floor: float, ceiling: float = math.inf) -> Rule:
    """now >= floor and now >= factor * before; or now >= ceiling."""

    def rule(window: Window) -> str | None:
        now, before = window.now(name), window.before(name)
        if now is None:
            return None
        if before is not None and now >= max(floor, factor * before):
            return f"{name} has grown from {before:.3g} to {now:.3g} (medians)"
        return f"{name} is at {now:.3g} (median), which is {ceiling:g} or more" if now >= ceiling else None

    return rule


def shrunk(name: str, *, factor: float, ceiling: float = math.inf) -> Rule:
    """now <= ceiling and now <= before / factor."""

    def rule(window: Window) -> str | None:
        now, before = window.now(name), window.before(name)
        if now is None or before is None or before <= 0 or now > min(ceiling, before / factor):
            return None
        return f"{name} has fallen from {before:.3g} to {now:.3g} (medians)"

    return rule


def risen(name: str, *, by: float = 0.3, floor: float = 0.5, ceiling: float = 0.95) -> Rule:
    """Of a share: now >= floor and now >= before + by; or now >= ceiling."""

    def rule(window: Window) -> str | None:
        now, before = window.now(name), window.before(name)
        if now is None:
            return None
        if before is not None and now >= max(floor, before + by):
            return f"{name} has risen from {before:.2f} to {now:.2f} (medians)"
        return f"{name} is at {now:.2f} (median), which is {ceiling} or more" if now >= ceiling else None

    return rule


def constant_reward(window: Window) -> str | None:
    """The mean reward is the same in all of the last N steps, up to float noise."""
    if window.now("reward/mean") is None:
        return None
    values = [row["reward/mean"] for row in window.recent]
    if max(values) - min(values) > FLAT * max(1.0, *map(abs, values)):
        return None
    return f"reward/mean has been {values[-1]:.4g} in each of {len(values)} steps: nothing tells the completions apart"


def fallen_reward(window: Window) -> str | None:
    """now <= best / 2 and now <= best - std / 2, with the median of reward/std before: rare rewards come and go by chance."""
    now, best, std = window.now("reward/mean"), window.best("reward/mean"), window.before("reward/std")
    if now is None or best is None or std is None or best <= 0 or now > min(best / 2, best - std / 2):
        return None
    return f"reward/mean has fallen from {best:.3g} to {now:.3g} (medians)"


def no_signal(window: Window) -> str | None:
    shares = [row.get("group/with_signal") for row in window.recent]
    if any(share != 0 for share in shares):
        return None
    return (
        f"not one group had rewards that differ in {len(shares)} steps: no update has moved the policy towards a reward"
    )


def skipped_updates(window: Window) -> str | None:
    if not all(row.get("optimizer/skipped", 0) > 0 for row in window.recent):
        return None
    return (
        f"the loss or the gradient was not finite in each of {len(window.recent)} steps; those updates were left out, and the "
        "weights are as they were before. Lower optimizer.learning_rate or optimizer.max_grad_norm, and look for what all of "
        "the batches share"
    )


def length_grown(window: Window) -> str | None:
    floor = window.max_completion_tokens / 4
    return grown("completion/length_mean", factor=3, floor=floor)(window)


def form_takes_over(window: Window) -> str | None:
    """Of the right answers, some form has now >= 0.5 and now >= first + 0.3. The form that has gained the most is named."""
    first, now = window.answers_at_first(), window.answers_now()
    if first is None or now is None:
        return None
    gains = {form: now.forms[form] - first.forms[form] for form in FORMS if now.forms[form] >= 0.5}
    form = max(gains, key=lambda each: gains[each], default=None)
    if form is None or gains[form] < 0.3 or not now.has_gained(form, first):
        return None
    return (
        f"{now.forms[form]:.0%} of the right answers are {FORMS[form]} (answer/{form}); of the first steps' "
        f"{first.forms[form]:.0%} were. Read such answers before you trust the accuracy"
    )


def right_but_unstated(window: Window) -> str | None:
    """answer/right has risen by 0.1, and the share of completions that are right and state the gold answer has not."""
    first, now = window.answers_at_first(), window.answers_now()
    if first is None or now is None or now.right < first.right + 0.1 or now.stated > first.stated:
        return None
    if not now.has_gained("unstated", first):
        return None
    return (
        f"right answers have risen from {first.right:.0%} to {now.right:.0%} of the completions, and those that state the gold "
        f"answer have not ({first.stated:.0%} to {now.stated:.0%}). Read such answers before you trust the accuracy"
    )


RULES: dict[str, tuple[Rule, ...]] = {
    "not_finite": (skipped_updates,),
    "kl": (grown("policy/kl", factor=10, floor=1, ceiling=10),),
    "entropy": (
        grown("policy/entropy", factor=3, floor=2, ceiling=6),
        shrunk("policy/entropy", factor=5, ceiling=0.02),
    ),
    "length": (length_grown, shrunk("completion/length_mean", factor=4)),
    "truncation": (risen("completion/truncated"),),
    "repetition": (risen("completion/repetition"),),
    "reward": (constant_reward, fallen_reward),
    "loss": (grown(LOSS, factor=2, floor=1),),
    "signal": (no_signal,),
    "reward_hacking": (form_takes_over, right_but_unstated),
}
"""By the name of the setting that says what to do."""

WATCHED = (
    "optimizer/skipped",
    "policy/kl",
    "policy/entropy",
    "completion/length_mean",
    "completion/truncated",
    "completion/repetition",
    "reward/mean",
    "reward/std",
    "group/with_signal",
    "policy/sampling_gap",
    LOSS,
    "answer/judged",
    "answer/right",
    *(f"answer/{form}" for form in FORMS),
)
"""Metrics that the rules read, and tripwire.py. They are the same on every process, so every process comes to the same alarms."""


class Watchdog:
    """The history of a run, and the alarms that follow from it and nothing else.

    Args:
        rows: of metrics.jsonl, where a run is resumed: the alarms are then those of a run that was never interrupted.
    """

    def __init__(self, config: Config, rows: list[dict[str, Any]]) -> None:
        self.config = config
        self._scheduled = [f"schedule/{name}" for name in config.schedules]
        self._comparable = 0  # place of the first step since a schedule last jumped
        self.steps: list[int] = []
        self.history: list[Metrics] = []
        self._streaks = dict.fromkeys(
            _rules(config), 0
        )  # for how many steps without a break each rule has had something to say
        for row in rows:
            if "time/step" in row:  # not an evaluation
                self.observe(row["step"], row)

    def observe(self, step: int, metrics: Metrics) -> list[Alarm]:
        """Take up the metrics of a step; the alarms that are due after it.

        A rule that goes on being broken says so again after every watchdog.patience steps.
        """
        self.steps.append(step)
        self.history.append({name: metrics[name] for name in (*WATCHED, *self._scheduled) if name in metrics})
        if any(
            _is_jump(row.get(name, 0.0), metrics.get(name, 0.0))
            for row in self.history[-2:-1]
            for name in self._scheduled
        ):
            self._comparable = len(self.history) - 1
        alarms = []
        settings = self.config.watchdog
        for name, rule in _rules(self.config):
            action = getattr(settings, name)
            patience = settings.max_skipped if name == "not_finite" else settings.patience
            text = self._ask(rule, patience)
            self._streaks[name, rule] = streak = 0 if text is None else self._streaks[name, rule] + 1
            if text is not None and (streak - 1) % settings.patience == 0:
                began = self.steps[-(patience + streak - 1)]
                alarms.append(Alarm(name, action, step, began, text))
        return alarms

    def _ask(self, rule: Rule, patience: int) -> str | None:
        if len(self.history) < patience:
            return None
        recent = self.history[-patience:]
        end = len(self.history) - patience
        earlier = self.history[max(end - TRAILING, self._comparable, 0) : max(end, self._comparable)]
        rollout = self.config.rollout
        window = Window(
            recent,
            earlier,
            rollout.max_completion_tokens,
            since_start=self.history[:end],
            group_size=rollout.group_size,
            num_completions=rollout.num_prompts * rollout.group_size,
        )
        return rule(window)

    def median(self, name: str) -> float | None:
        """Of all steps so far that have the metric."""
        values = [row[name] for row in self.history if name in row]
        return _median(values) if values else None

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`."""
        kept = [(each, row) for each, row in zip(self.steps, self.history, strict=True) if each <= step]
        self.steps, self.history, self._streaks, self._comparable = [], [], dict.fromkeys(self._streaks, 0), 0
        for each, row in kept:
            self.observe(each, row)


def _is_jump(before: float, now: float) -> bool:
    """Whether a scheduled value changed by more than a quarter: what that does to the metrics is no trouble."""
    return abs(now - before) > max(abs(now), abs(before)) / 4


OF_REWARDS = ("reward", "signal", "reward_hacking")
"""Rules that have nothing to say where no reward counts for anything, as in distillation."""


def _rules(config: Config) -> list[tuple[str, Rule]]:
    left_out = () if config.has_weighted_reward else OF_REWARDS
    return [(name, rule) for name, rules in RULES.items() if name not in left_out for rule in rules]


class RollBacks:
    """The roll-backs of a run so far, and what follows from them.

    Args:
        rows: of roll_backs.jsonl, which holds them and no checkpoint does: whichever a run goes on from, they happened.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    @property
    def rate_factor(self) -> float:
        """Factor of the learning rate from here on."""
        return self.rows[-1]["rate_factor"] if self.rows else 1.0

    @property
    def last_to(self) -> int | None:
        """The step that the last one went back to; None without any."""
        return self.rows[-1]["to"] if self.rows else None

    @property
    def seed_suffix(self) -> str:
        """Makes sampling after a roll-back draw other random numbers than before it: with the same ones, the same step would
        follow from the same weights. The questions come in the order they would have come in, so that none is left out."""
        return f" {len(self.rows)}" if self.rows else ""

    def add(self, alarm: Alarm, *, to: int, factor: float) -> None:
        row = {"step": alarm.step, "to": to, "rule": alarm.rule, "rate_factor": self.rate_factor * factor}
        self.rows.append({**row, "text": alarm.text})
