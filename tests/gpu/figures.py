"""Measured figures beside the documented ones, and the table that `make gpu` ends with.

Two hosts differ by tens of per cent. So a figure may name a yardstick, another figure of the same run: the card's matrix rate or
bandwidth, or a peer's speed. A regression is a figure that has become slower than its yardstick has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpu.jobs import ROOT, Result

DOCUMENTED = ROOT / "docs/performance.json"
"""By name: `value` and `unit`, and where it stands in docs/performance.md: a line with both `row` and `text`."""

SLOWER_IS_MORE = ("s", "ms", "GiB", "nats")
"""Units of which less is better."""


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str
    yardstick: str = ""
    """The figure that it is expected to go with."""


@dataclass(frozen=True)
class Outcome:
    """What has become of a check."""

    check: str
    verdict: str
    """passed, failed or skipped."""
    why: str
    seconds: float
    """Of its jobs together; several run at once."""
    figures: Sequence[Figure]
    results: Sequence[Result]


@cache
def documented() -> dict[str, dict[str, Any]]:
    return json.loads(DOCUMENTED.read_text())


def speed(value: float, unit: str) -> float:
    """More is better."""
    return 1 / value if unit in SLOWER_IS_MORE and value else value


def gain(figure: Figure) -> float | None:
    """How many times as good as documented; None if nothing is documented."""
    known = documented().get(figure.name)
    if known is None:
        return None
    return speed(figure.value, figure.unit) / speed(known["value"], known["unit"])


def at_equal_yardstick(figure: Figure, figures: Mapping[str, Figure]) -> float | None:
    """The gain of a figure divided by that of its yardstick: what is left when the machine's own difference is taken out."""
    ours, yardstick = gain(figure), figures.get(figure.yardstick)
    theirs = gain(yardstick) if yardstick is not None else None
    return ours / theirs if ours is not None and theirs else None


def table(outcomes: Sequence[Outcome], machine: str) -> str:
    """Everything in Markdown."""
    lines = [machine, "", "| check | | jobs | seconds | |", "|---|---|---|---|---|"]
    for each in outcomes:
        lines.append(f"| {each.check} | {each.verdict} | {len(each.results)} | {each.seconds:.0f} | {each.why} |")
    figures = {figure.name: figure for each in outcomes for figure in each.figures}
    if figures:
        lines += [
            "",
            "| figure | here | documented | ratio | yardstick | at equal yardstick |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(figure, figures) for figure in figures.values()]
        lines += [
            "",
            "Ratio: how many times as good as documented. At equal yardstick: that, divided by the yardstick's own ratio.",
        ]
    return "\n".join(lines)


def _row(figure: Figure, figures: Mapping[str, Figure]) -> str:
    known, ratio, left = documented().get(figure.name), gain(figure), at_equal_yardstick(figure, figures)
    cells = [
        figure.name,
        f"{figure.value:,.4g} {figure.unit}",
        "" if known is None else f"{known['value']:,.4g} {known['unit']}",
        *("" if each is None else f"{each:.2f}" for each in (ratio,)),
        figure.yardstick,
        "" if left is None else f"{left:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def as_json(outcomes: Sequence[Outcome], machine: str) -> dict[str, Any]:
    figures = {figure.name: figure for each in outcomes for figure in each.figures}
    return {
        "machine": machine,
        "checks": [
            {
                "name": each.check, "verdict": each.verdict, "why": each.why, "seconds": each.seconds,
                "jobs": [
                    {"name": r.job.name, "command": r.job.command, "seconds": r.seconds, "problem": r.problem, "skip": r.job.skip}
                    for r in each.results
                ],
            }
            for each in outcomes
        ],
        "figures": [
            asdict(figure)
            | {
                "documented": documented().get(figure.name), "ratio": gain(figure),
                "at_equal_yardstick": at_equal_yardstick(figure, figures),
            }
            for figure in figures.values()
        ],
    }  # fmt: skip


def write(outcomes: Sequence[Outcome], machine: str, out: Path) -> None:
    (out / "table.md").write_text(table(outcomes, machine) + "\n")
    (out / "table.json").write_text(json.dumps(as_json(outcomes, machine), indent=1) + "\n")
