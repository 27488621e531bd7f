"""Runs -> figures for a paper or a README. The page draws the same panels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo.report import summary
from grpo.report.panels import Panel, sections
from grpo.report.read import Run, kind_of_questions, read_runs, verdicts_of_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVERVIEW = ("Length", "Groups with signal", "KL to reference", "Entropy")  # after the reward and its verdict
COLORS = (
    "#0068a8",
    "#bd4b00",
    "#00805c",
    "#a8518a",
    "#a87400",
    "#2a8fc4",
    "#3b3936",
    "#85817a",
)  # as page.css has them
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)))
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#85817a",
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e2dd",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text that an editor can select, as journals ask for
}


def plot_curves(run_dir: Path, path: Path | None = None) -> Path:
    """Draw the six curves that say most, by default as `curves.png` in the run's directory, and return the file's path."""
    runs = read_runs([run_dir], max_completions=0)
    path = path or run_dir / "curves.png"
    _save_grid(_overview(runs), path, columns=3, rows=2, heading=run_dir.name)
    return path


def save_picture(run_dirs: list[Path], path: Path, titles: Sequence[str] = ()) -> None:
    """Draw some panels of the runs as one picture, three in a row at most; a PNG, PDF or SVG as the file's name says.

    Args:
        titles: of panels, as the page has them; none: those of `plot_curves`.

    Raises:
        ValueError: a directory is not that of a run; the runs have no such panel, or none at all.
    """
    runs = read_runs(run_dirs, max_completions=0)
    if not _panels(runs):
        raise ValueError(f"--picture is {str(path)!r}; the runs have no metrics yet. Draw it after a step.")
    drawings = _of_titles(runs, titles) if titles else _overview(runs)
    columns = 2 if len(drawings) == 4 else min(3, len(drawings))
    _save_grid(drawings, path, columns=columns, rows=math.ceil(len(drawings) / max(columns, 1)))


Drawing = tuple[Panel, list[Run]]
"""A panel, and the runs that are in it."""


def _overview(runs: list[Run]) -> list[Drawing]:
    """The panels that say most of the runs."""
    panels = {panel.title: panel for panel in _panels(runs)}
    verdict = next((panel.title for panel in panels.values() if runs[0].sampled_metric in panel.lines), "")
    return [(panels[title], runs) for title in ("Reward", verdict, *OVERVIEW) if title in panels]


def _of_titles(runs: list[Run], titles: Sequence[str]) -> list[Drawing]:
    panels: dict[str, list[Drawing]] = {}
    for panel in _panels(runs):
        panels.setdefault(panel.title, []).extend(_drawings(panel, runs))
    for title in titles:
        if title not in panels:
            near = "".join(f" Did you mean {each!r}?" for each in get_close_matches(title, panels, n=1))
            raise ValueError(
                f"--panels has {title!r}; the runs have no panel of this title.{near} There are: {', '.join(panels)}."
            )
    return [drawing for title in titles for drawing in panels[title]]


def _drawings(panel: Panel, runs: list[Run]) -> list[Drawing]:
    """A panel once, or once for each run that has something in it."""
    if not panel.by_run or len(runs) == 1:
        return [(panel, runs)]
    wanted = {*panel.lines, *panel.points}
    having = [run for run in runs if any(not wanted.isdisjoint(row) for row in run.metrics)]
    return [(replace(panel, title=f"{panel.title}: {run.name}"), [run]) for run in having]


def _save_grid(drawings: list[Drawing], path: Path, *, columns: int, rows: int, heading: str = "") -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10 / 3 * columns, 2.5 * rows), layout="constrained")  # pyplot's backend is the user's
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, (panel, runs) in zip(axes.flat, drawings, strict=False):
            _draw(axis, panel, runs)
        for axis in axes.flat[len(drawings) :]:
            axis.set_axis_off()
        if heading:
            figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, dpi=140)


def save_figures(run_dirs: list[Path], directory: Path, *, suffix: str) -> list[Path]:
    """Draw every curve of the runs, laid over each other, as a file of its own, one column of a page wide.

    Args:
        suffix: "png" (300 dots per inch) or "pdf".

    Raises:
        ValueError: a directory is not that of a run.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs = read_runs(run_dirs, max_completions=0)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        for panel, drawn in chain.from_iterable(_drawings(panel, runs) for panel in _panels(runs)):
            figure = Figure(figsize=(3.4, 2.3), layout="constrained")
            axis = figure.subplots()
            _draw(axis, panel, drawn)
            path = directory / f"{_file_name(panel)}.{suffix}"
            figure.savefig(path, dpi=300)
            paths.append(path)
    return paths


def plot_arms(arms: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Draw over training what tells algorithms apart: the mean over each arm's runs, and the runs pale beneath it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs = {arm: [*chain(*(read_runs([each], max_completions=0) for each in own))] for arm, own in arms.items()}
    first = next(iter(runs.values()))[0]
    names = {first.sampled_metric: f"{' or '.join(first.verdicts)}, sampled", **OF_ARMS}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), layout="constrained")  # without pyplot, whose backend is the user's
        axes = figure.subplots(2, 3)
        for axis, (name, title) in zip(axes.flat, names.items(), strict=True):
            for (arm, own), color in zip(runs.items(), cycle(COLORS)):
                series = [_series(run, name) for run in own]
                for steps, values in series if len(own) > 1 else []:
                    axis.plot(steps, values, color=color, alpha=0.15, linewidth=0.6)
                steps, values = _mean(series)
                axis.plot(steps, smooth(steps, values, sigma=max(1.0, len(steps) / 50)), color=color, label=arm)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.locator_params(axis="x", integer=True)
            axis.margins(x=0.01)
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
        figure.savefig(path, dpi=140)
    return path


OF_ARMS = {
    "completion/length_right": "Tokens of right completions",
    "completion/length_wrong": "Tokens of wrong completions",
    "policy/entropy": "Entropy (nats)",
    "group/with_signal": "Groups with signal",
    "time/step": "Seconds per step",
}
"""What is drawn beside the verdict, and its title."""


def _mean(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean of the values, over those runs that have one."""
    values: dict[float, list[float]] = {}
    for steps, each in series:
        for step, value in zip(steps, each, strict=True):
            values.setdefault(step, []).append(value)
    return np.array(sorted(values)), np.array([np.mean(values[step]) for step in sorted(values)])


def _panels(runs: list[Run]) -> list[Panel]:
    names = dict.fromkeys(name for run in runs for row in run.metrics for name in row)
    asked = sections(names, verdicts=verdicts_of_runs(runs), kind=kind_of_questions(runs))
    return [panel for section in asked for panel in section.panels]


def _file_name(panel: Panel) -> str:
    """Of the metric that is drawn first; where a run has a figure of its own, of its title."""
    return re.sub(r"[^\w-]+", "-", panel.title.lower() if panel.by_run else (panel.lines or panel.points)[0])


def _draw(axis: Axes, panel: Panel, runs: list[Run]) -> None:
    from matplotlib.ticker import FuncFormatter
    from matplotlib.transforms import ScaledTranslation

    several = len(runs) > 1
    sure = [summary.intervals(run) if panel.points else {} for run in runs]
    names = [] if panel.stacked else panel.lines if several else panel.lines + panel.alone
    for r, run in enumerate(runs):
        if panel.stacked:
            _areas(axis, panel, run)
        for i, name in enumerate(names):
            color = COLORS[r % 8] if several else _color(name, i, panel)
            dash = DASHES[i % 4] if several else _dash(name, panel)
            label = " ".join(([run.name] if several else []) + ([_called(name, panel)] if len(names) > 1 else []))
            pale = name not in panel.alone  # single values of few completions would hide the other lines
            _line(axis, run, name, color=color, dash=dash, label=_plain(label), pale=pale)
            if panel.base and not i:
                _base(axis, run, name, color, label="" if r else "step 1, untrained")
        for name in panel.points:
            color = COLORS[r % 8] if several else _color(names[0] if names else name, 0, panel)
            label = _called(name, panel) if len(panel.points) > 1 else "" if r else HELD_OUT
            joined = "" if names else _dash(name, panel)
            _points(axis, run, name, color, label=_plain(label), joined=joined, known=sure[r].get(name, {}))
    if all(summary.is_share(name, runs) for name in [*panel.lines, *panel.points]):
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    if panel.stacked and summary.is_share(panel.lines[0], runs):
        axis.set_ylim(0, 1)
    axis.set_title(_plain(panel.caption))
    axis.set_xlabel("step")
    axis.margins(x=0.01)
    if axis.get_ylim()[0] < 0.6 * axis.get_ylim()[1] and axis.dataLim.y0 >= 0:
        axis.set_ylim(bottom=0)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            bbox_transform=axis.transAxes + ScaledTranslation(0, -BELOW_LABELS / 72, axis.figure.dpi_scale_trans),
            ncols=6 if max(map(len, labels)) < 4 else 4 if max(map(len, labels)) < 12 else 2,
            title=SURE if len(panel.points) > 1 and sure[0].keys() & {*panel.points} else None,
            title_fontsize=7,
        )


SURE = "95 % interval"
BELOW_LABELS = 27
"""Points from an axis down to its legend, past the numbers and the label of the axis, whatever the height of the figure."""


def _last(name: str) -> str:
    """What tells a line from those beside it in its panel."""
    side = re.search(r"_(right|wrong|truncated)$", name)
    if side:
        return "cut off" if side[1] == "truncated" else side[1]
    return "all" if name.startswith("aha/") else name.split("/")[-1].replace("_", " ")


def _plain(text: str) -> str:
    """As it is written: matplotlib reads formulas between dollars, and leaves out of a legend what begins with a line below."""
    return re.sub("^_", " _", text.replace("$", r"\$"))


def _called(name: str, panel: Panel) -> str:
    label, _ = panel.legend.get(name, (_last(name), 0))
    return label


def _dash(name: str, panel: Panel) -> Any:
    """Of a metric of one run: colours come again after eight."""
    _, number = panel.legend.get(name, ("", 0))
    return DASHES[number // 8 % 4]


def _color(name: str, index: int, panel: Panel) -> str:
    """Of a metric of one run: all in ink beside right, wrong and cut off; else in order."""
    if name in panel.legend:
        return COLORS[panel.legend[name][1] % 8]
    sides = {"right": COLORS[0], "wrong": COLORS[1], "cut off": COLORS[7]}
    in_ink = len(panel.lines) > 1 and panel.lines[0].startswith("aha/")
    return sides.get(_last(name), COLORS[6] if in_ink else COLORS[index % 8])


def _series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the run has a finite one."""
    points = [(row["step"], row[name]) for row in run.metrics if math.isfinite(row.get(name, math.nan))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _line(axis: Axes, run: Run, name: str, *, color: str, dash: Any, label: str, pale: bool) -> None:
    """The values pale if asked, and over them what a Gaussian makes of them; a run of few steps as it is."""
    steps, values = _series(run, name)
    if len(steps) >= FEW_STEPS:
        if pale:
            axis.plot(steps, values, color=color, alpha=0.28, linewidth=0.7)
        values = smooth(steps, values, sigma=max(1.0, len(steps) / 50))
    marker = "o" if len(steps) == 1 else ""
    axis.plot(
        steps, values, color=color, linestyle=dash, linewidth=1.5, marker=marker, markersize=3, label=label or None
    )


FEW_STEPS = 10
"""Fewer are not smoothed."""


def smooth(steps: np.ndarray, values: np.ndarray, *, sigma: float) -> np.ndarray:
    """Means of the values within 3 sigma, weighted by a Gaussian of the distance in steps. All (N,).

    Unlike a running average it does not lag behind; at the ends it looks to one side only.
    """
    smoothed = np.empty_like(values)
    starts, ends = np.searchsorted(steps, steps - 3 * sigma), np.searchsorted(steps, steps + 3 * sigma, side="right")
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        weights = np.exp(-0.5 * ((steps[start:end] - steps[i]) / sigma) ** 2)
        smoothed[i] = weights @ values[start:end] / weights.sum()
    return smoothed


def _base(axis: Axes, run: Run, name: str, color: str, *, label: str) -> None:
    """The value in training of the untrained model, which sampled step 1."""
    for row in run.metrics:
        if row["step"] == 1 and name in row:
            axis.axhline(row[name], color=color, linewidth=0.8, linestyle=(0, (1, 2)), label=label or None)


def _points(
    axis: Axes, run: Run, name: str, color: str, *, label: str, joined: Any, known: Mapping[int, summary.Interval]
) -> None:
    """Held-out values.

    Args:
        joined: the style of the line through them; empty for none.
        known: their intervals, by step.
    """
    steps, values = _series(run, name)
    ends = [known.get(int(step), (value, value, value))[1:] for step, value in zip(steps, values, strict=True)]
    if ends:
        sure = f", {SURE}" if label == HELD_OUT and known else ""
        below, above = np.array(ends).T
        error = np.maximum(0, [values - below, above - values])
        axis.errorbar(
            steps,
            values,
            yerr=error,
            marker="o",
            linestyle=joined,
            linewidth=0.8,
            color=color,
            markersize=4,
            mec="white",
            mew=0.8,
            elinewidth=1,
            zorder=3,
            label=label + sure or None,
        )


HELD_OUT = "held out"


def _areas(axis: Axes, panel: Panel, run: Run) -> None:
    names = [name for name in panel.lines if any(row.get(name) for row in run.metrics)]
    rows = [row for row in run.metrics if all(name in row for name in names)] if names else []
    steps = [row["step"] for row in rows]
    axis.stackplot(
        steps,
        [[row[name] for row in rows] for name in names],
        labels=[_called(name, panel) for name in names],
        colors=[_color(name, i, panel) for i, name in enumerate(names)],
        alpha=0.85,
    )
