"""Which metrics are drawn, together with what and in which order: as a reader asks. The page and the figures share it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from grpo.observe.metric_names import LOSS, METRICS, is_bound
from grpo.scoring.answers import RIGHT_OF_ALL_KINDS, verdict_name
from grpo.text.answer_forms import FORMS

FIT = "fit/curve"
"""A line of the page that no run has logged: what grpo/report/fit.py makes of its values."""
NOT_A_FUNCTION = {"reward/mean", "reward/std", "reward/unknown"}
SAME = "eval/pass@1"  # the mean of the verdict, which is drawn beside that of training
HEALTH, COST = "Is it healthy?", "What does it cost?"

OUTCOMES = {
    "outcome/right": ("right", 0),
    "outcome/right_first": ("right at the first trial", 5),
    "outcome/right_later": ("right after several", 0),
    "outcome/wrong": ("wrong", 1),
    "outcome/truncated": ("cut off", 7),
    "outcome/unknown": ("unknown", 3),
}
"""What becomes of a completion, from the bottom up; name and colour of each."""


@dataclass
class Panel:
    """One small chart. Names are those of metrics.jsonl."""

    title: str
    lines: list[str]
    unit: str = ""
    points: list[str] = field(default_factory=list)  # held-out values: dots, with their intervals where there are any
    base: bool = False  # draw the value at step 1, which the untrained model sampled, as a line
    family: str = ""  # panels of one family are one chart of the page, with a switch between their measures
    measure: str = ""  # what the switch calls this one
    by_run: bool = False  # a chart of its own for each run
    stacked: bool = False  # areas on top of each other, without those that are always 0
    legend: dict[str, tuple[str, int]] = field(
        default_factory=dict
    )  # what a line or a dot is called, and which colour it has; else both follow from its name
    alone: list[str] = field(
        default_factory=list
    )  # further lines where no other run is drawn, without their single values

    @property
    def caption(self) -> str:
        """The title with the unit."""
        return self.title + (f" ({self.unit})" if self.unit else "")

    @property
    def metrics(self) -> list[str]:
        """All that is drawn."""
        return [*self.lines, *self.points, *self.alone]


@dataclass
class Section:
    """What a reader asks, and the panels that answer."""

    title: str
    panels: list[Panel]


def sections(names: Iterable[str], *, verdicts: Sequence[str] = (), kind: str = "kind") -> list[Section]:
    """The panels of runs that have metrics of these names; each metric is in one of them, what nobody asked for at the end.

    Args:
        verdicts: names of the rewards that say what is right; none: as the rule says.
        kind: what kinds of questions are called: the column of data.kind_column.
    """
    names = list(names)
    not_drawn = {"step", *([] if RIGHT_OF_ALL_KINDS in names else [SAME])}
    left = {name: None for name in names if not is_bound(name) and name not in not_drawn}
    asked = [Section(title, _present(panels, left)) for title, panels in _questions(list(left), verdicts, kind).items()]
    rest = [Panel(name, [name]) for name in left]
    return [section for section in [*asked, Section("Everything else", rest)] if section.panels]


def functions_of(names: Iterable[str]) -> list[str]:
    """The reward functions of runs that have metrics of these names; those that grade held-out questions alone come last."""
    names = list(names)
    rewards = [name for name in names if name.startswith("reward/") and name not in NOT_A_FUNCTION]
    held_out = [name for name in names if name.startswith("eval/") and formula(name) == METRICS["eval/<function>"]]
    return [*dict.fromkeys(name.partition("/")[2] for name in [*rewards, *held_out])]


def _questions(names: list[str], verdicts: Sequence[str], kind: str) -> dict[str, list[Panel]]:
    functions = functions_of(names)
    verdicts = verdicts or [verdict_name(functions) if functions else "accuracy"]
    kinds = _kinds(names, functions)
    other = [name for name in functions if name not in (*verdicts, "format")]
    right = [Panel("Right of all kinds", [RIGHT_OF_ALL_KINDS], points=[SAME])] if RIGHT_OF_ALL_KINDS in names else []
    right += map(_function, verdicts)
    return {
        "Is it learning?": [
            Panel("Reward", ["reward/mean"]),
            Panel("Loss of rows", [LOSS], "nats", points=["supervised/held_out_loss"]),
            Panel("Next tokens", ["supervised/accuracy"], points=["supervised/held_out_accuracy"]),
            *(replace(panel, alone=[FIT] if i == 0 else []) for i, panel in enumerate(right)),
            Panel("Solved and hopeless questions", ["progress/solved", "progress/hopeless"]),
            *map(_function, other),
            *(
                Panel(name.removeprefix("eval/"), [], points=[name])
                for name in names
                if re.fullmatch(r"eval/(pass|cons)@\d+", name) and name != SAME
            ),
            Panel("Groups with signal", ["group/with_signal"]),
            Panel("Signal in the batch", ["batch/with_signal"]),
            Panel("Reward of the batch", ["batch/reward_mean"]),
            Panel("Spread of rewards", ["reward/std"]),
        ],
        "How does it write?": [
            _function("format"),
            Panel("Length", ["completion/length_mean"], "tokens", points=["eval/length_mean"], base=True),
            Panel("Length by verdict", ["completion/length_right", "completion/length_wrong"], "tokens", base=True),
            Panel("What becomes of a completion", list(OUTCOMES), by_run=True, stacked=True, legend=OUTCOMES),
            Panel("Longest", ["completion/length_max"], "tokens"),
            Panel("Cut off", ["completion/truncated"], points=["eval/truncated"]),
            Panel("Repetition", ["completion/repetition"]),
            Panel("Right", ["answer/right"]),
            Panel("Right answers by form", [f"answer/{name}" for name in FORMS], base=True),
        ],
        "In which language does it think?": [
            Panel(
                "Words in the question's language",
                ["language/consistency"],
                points=["language/eval_consistency"],
                base=True,
            ),
            Panel("Answers with other scripts", ["language/mixed"], points=["language/eval_mixed"], base=True),
            *(
                Panel(
                    f"{title}: {each}", [f"language/{name}/{each}"], points=[f"language/eval_{name}/{each}"], base=True
                )
                for name, title in (("consistency", "Question's language"), ("mixed", "Other scripts"))
                for each in kinds
            ),
            Panel("Other script", ["completion/other_script"], base=True),
        ],
        "What of each kind of question?": [
            panel for name in ("reward", *functions, "length") for panel in _by_kind(name, kinds, kind)
        ],
        "Does it reflect?": _reflection(names),
        HEALTH: [
            Panel("Entropy", ["policy/entropy"], "nats"),
            Panel("Weight of the entropy", ["policy/entropy_coef"]),
            Panel("KL to reference", ["policy/kl"], "nats"),
            Panel("Gradient norm", ["optimizer/grad_norm"]),
            Panel("Clipped tokens", ["policy/clip_fraction", "policy/clip_fraction_low", "policy/clip_fraction_high"]),
            Panel("Sampling gap", ["policy/sampling_gap"], "nats"),
            Panel("Largest gap", ["policy/sampling_gap_max"], "nats"),
            Panel("Loss", ["optimizer/loss"]),
            Panel("Learning rate", ["optimizer/learning_rate"]),
            Panel("Mean ratio", ["policy/ratio_mean"]),
            Panel("Largest ratio", ["policy/ratio_max"]),
            Panel("Importance weights", ["policy/importance_mean"]),
            Panel("Bounded weights", ["policy/importance_bounded"]),
            Panel("Unknown rewards", ["reward/unknown"]),
            Panel("Updates left out", ["optimizer/skipped"]),
            Panel("Alarms", ["watchdog/alarms"]),
        ],
        "What was scheduled?": [
            Panel(name.removeprefix("schedule/"), [name]) for name in names if name.startswith("schedule/")
        ],
        COST: [
            Panel(
                "Step time by phase",
                ["time/rollout", "time/scoring", "time/logprobs", "time/update"],
                "seconds",
                by_run=True,
                stacked=True,
            ),
            Panel("Step time", ["time/step"], "seconds"),
            Panel("Waiting for checkpoints", ["time/checkpoint"], "seconds"),
            Panel("Sampling", ["throughput/rollout"], "tokens/s"),
            Panel("Updating", ["throughput/update"], "tokens/s"),
            Panel("Scoring", ["throughput/scoring"], "completions/s"),
            Panel(
                "GPU memory",
                ["memory/step"],
                "GiB",
                alone=["memory/rollout", "memory/scoring", "memory/logprobs", "memory/update"],
            ),
            Panel("Groups sampled", ["group/sampled", "group/replaced", "group/surplus"]),
            Panel("Draws of a step", ["rollout/draws"]),
            Panel("Turns passed over", ["group/passed_over"]),
            Panel("Tokens of dropped groups", ["completion/dropped_tokens"], "tokens"),
            Panel("Places in use", ["rollout/occupancy"]),
        ],
    }


def _kinds(names: list[str], functions: list[str]) -> list[str]:
    """The kinds of questions, of which some may only be held out."""
    measures = "|".join(map(re.escape, ["length", *(f"eval_{name}" for name in functions)]))
    found = {match[1] for name in names if (match := re.fullmatch(f"kind/(.+)/(?:{measures})", name))}
    return sorted(found, key=natural)


def natural(name: str) -> list[str | int]:
    """So that 2 comes before 16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _by_kind(name: str, kinds: list[str], kind: str) -> list[Panel]:
    """A measure of all kinds in training, and of the held-out questions; a kind has the same colour in all of them."""
    sampled = {f"kind/{each}/{name}": (each, i) for i, each in enumerate(kinds)}
    held_out = {f"kind/{each}/eval_{name}": (each, i) for i, each in enumerate(kinds)}
    unit = "tokens" if name == "length" else ""
    return [
        Panel(f"{_words(name)} by {kind}", list(sampled), unit, by_run=True, legend=sampled),
        Panel(f"Held-out {name.replace('_', ' ')} by {kind}", [], points=list(held_out), by_run=True, legend=held_out),
    ]


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _function(name: str) -> Panel:
    return Panel(_words(name), [f"reward/{name}"], points=[f"eval/{name}"])


def _present(panels: list[Panel], left: dict[str, None]) -> list[Panel]:
    """The panels of which there is something to draw; takes what they draw out of `left`."""
    found = []
    for panel in panels:
        lines, points, alone = _take(panel.lines, left), _take(panel.points, left), _take(panel.alone, left)
        if lines or points:
            found.append(replace(panel, lines=lines, points=points, alone=alone))
    return found


def _take(wanted: list[str], left: dict[str, None]) -> list[str]:
    there = [name for name in wanted if name in left]
    for name in there:
        del left[name]
    return there


def _reflection(names: list[str]) -> list[Panel]:
    """Of each list of words the rate, the share of completions with any, and their number; right and wrong ones beside all."""
    lists = dict.fromkeys(found[1] for name in names if (found := re.fullmatch(r"aha/([a-z0-9]+)", name)))
    return [
        Panel(
            title.format(each).capitalize(),
            [f"aha/{each}{measure}", f"aha/{each}{measure}_right", f"aha/{each}{measure}_wrong"],
            unit,
            points=[f"aha/eval_{each}{measure}"] if measure else [],
            base=True,
            alone=[f"aha/{each}{measure}_truncated"],
            family=each,
            measure=called,
        )
        for measure, title, unit, called in (
            ("_per_1k", "{}", "per 1k tokens", "per 1k tokens"),
            ("_share", "any {}", "", "share of answers"),
            ("", "{}", "words", "words"),
        )
        for each in lists
    ]


def formula(name: str) -> str:
    """What METRICS says of a metric, by its name or by the closest pattern that stands for it; empty if it knows neither."""
    if name in METRICS:
        return METRICS[name]
    patterns = {pattern: re.sub(r"<\w+>", ".+", pattern.replace(".", r"\.")) for pattern in METRICS}
    known = [pattern for pattern, expression in patterns.items() if re.fullmatch(expression, name)]
    return METRICS[max(known, key=lambda pattern: len(re.sub(r"<\w+>", "", pattern)))] if known else ""
