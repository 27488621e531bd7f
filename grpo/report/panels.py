"""Which metrics are drawn, together with what and in which order: as a reader asks. The page and the figures share it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from grpo.evaluate import verdict_name
from grpo.metrics import METRICS

NOT_A_FUNCTION = {"reward/mean", "reward/std", "reward/unknown"}


@dataclass
class Panel:
    """One small chart. Names are those of metrics.jsonl."""

    title: str
    lines: list[str]
    unit: str = ""
    points: str = ""  # held-out values, drawn as dots with the interval of <points>_stderr where there is one
    base: bool = False  # draw the value at step 1, the untrained model's, as a line
    stacked: bool = False  # areas on top of each other; for one run only
    alone: list[str] = field(default_factory=list)  # further lines where no other run is drawn


@dataclass
class Section:
    """What a reader asks, and the panels that answer."""

    title: str
    panels: list[Panel]


def sections(names: Iterable[str]) -> list[Section]:
    """The panels of runs that have metrics of these names; each metric is in one of them, what nobody asked for at the end."""
    left = dict.fromkeys(names)
    functions = [name.removeprefix("reward/") for name in left if _is_function(name)]
    asked = [Section(title, _present(panels, left)) for title, panels in _questions(functions).items()]
    rest = [Panel(name, [name]) for name in left if name != "step" and not name.endswith("_stderr")]
    return [section for section in [*asked, Section("Everything else", rest)] if section.panels]


def _is_function(name: str) -> bool:
    return name.startswith("reward/") and name not in NOT_A_FUNCTION


def _questions(functions: list[str]) -> dict[str, list[Panel]]:
    verdict = verdict_name(functions) if functions else "accuracy"
    other = [name for name in functions if name not in (verdict, "format")]
    return {
        "Is it learning?": [
            Panel("Reward", ["reward/mean"]),
            _function(verdict),
            *map(_function, other),
            Panel("Groups with signal", ["group/with_signal"]),
            Panel("Spread of rewards", ["reward/std"]),
        ],
        "How does it write?": [
            _function("format"),
            Panel("Length", ["completion/length_mean"], "tokens", points="eval/length_mean", base=True),
            Panel("Cut off", ["completion/truncated"], points="eval/truncated"),
            Panel("Longest completion", ["completion/length_max"], "tokens"),
            Panel("", ["aha/*"], base=True),
            Panel("", ["language/*"], base=True),
            Panel("Repetition", ["completion/repetition"]),
        ],
        "Is it healthy?": [
            Panel("Entropy", ["policy/entropy"], "nats"),
            Panel("KL to the reference", ["policy/kl"], "nats"),
            Panel("Gradient norm", ["optimizer/grad_norm"]),
            Panel("Clipped tokens", ["policy/clip_fraction"]),
            Panel("Sampling gap", ["policy/sampling_gap"], "nats"),
            Panel("Largest sampling gap", ["policy/sampling_gap_max"], "nats"),
            Panel("Loss", ["optimizer/loss"]),
            Panel("Learning rate", ["optimizer/learning_rate"]),
            Panel("Mean ratio", ["policy/ratio_mean"]),
            Panel("Largest ratio", ["policy/ratio_max"]),
            Panel("Unknown rewards", ["reward/unknown"]),
            Panel("Updates left out", ["optimizer/skipped"]),
            Panel("Alarms", ["watchdog/alarms"]),
        ],
        "What does it cost?": [
            Panel(
                "Time of a step, by phase",
                ["time/rollout", "time/scoring", "time/logprobs", "time/update"],
                "seconds",
                stacked=True,
            ),
            Panel("Time of a step", ["time/step"], "seconds"),
            Panel("Sampling", ["throughput/rollout"], "tokens/s"),
            Panel("Updating", ["throughput/update"], "tokens/s"),
            Panel("Scoring", ["throughput/scoring"], "completions/s"),
            Panel(
                "GPU memory",
                ["memory/step"],
                "GiB",
                alone=["memory/rollout", "memory/scoring", "memory/logprobs", "memory/update"],
            ),
            Panel("Decoded places in use", ["rollout/occupancy"]),
        ],
    }


def _function(name: str) -> Panel:
    return Panel(name.replace("_", " ").capitalize(), [f"reward/{name}"], points=f"eval/{name}")


def _present(panels: list[Panel], left: dict[str, None]) -> list[Panel]:
    """The panels of which there is something to draw; takes what they draw out of `left`."""
    found = []
    for panel in panels:
        for each in _of_pattern(panel, left) if panel.lines[0].endswith("*") else [panel]:
            lines = _take(each.lines, left)
            points = "".join(_take([each.points], left))
            if lines or points:
                found.append(Panel(each.title, lines, each.unit, points, each.base, each.stacked, _take(each.alone, left)))
    return found


def _take(wanted: list[str], left: dict[str, None]) -> list[str]:
    there = [name for name in wanted if name in left]
    for name in there:
        del left[name]
    return there


def _of_pattern(panel: Panel, left: dict[str, None]) -> list[Panel]:
    """A panel per metric of a group; those of right and of wrong completions share the one of all."""
    prefix = panel.lines[0].removesuffix("*")
    names = [name for name in left if name.startswith(prefix)]
    stems = dict.fromkeys(re.sub(r"_(right|wrong)$", "", name) for name in names)
    return [
        Panel(
            stem.removeprefix(prefix).replace("_", " ").capitalize(),
            [name for name in (stem, f"{stem}_right", f"{stem}_wrong") if name in names],
            points=f"eval/{stem}",
            base=panel.base,
        )
        for stem in stems
    ]


def formula(name: str) -> str:
    """What METRICS says of a metric, whose name may stand for several there; empty for one it does not know."""
    for pattern, text in METRICS.items():
        if re.fullmatch(re.sub(r"<\w+>", ".+", pattern.replace(".", r"\.")), name):
            return text
    return ""
