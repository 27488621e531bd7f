"""A run's curves as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo.sinks import read_jsonl


def plot_curves(run_dir: Path) -> Path:
    """Draw `metrics.jsonl` as `curves.png` in the run's directory and return its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(run_dir / "metrics.jsonl")
    functions = [name.removeprefix("eval/") for name in _names(rows) if f"{name}_stderr" in _names(rows)]
    rewards = [name for name in _names(rows) if name.startswith("reward/") and name not in NOT_A_FUNCTION]
    panels: list[tuple[str, list[str], list[str]]] = [
        ("reward", ["reward/mean"], []),
        ("reward functions (o held out)", rewards, [f"eval/{name}" for name in functions]),
        ("completion length, tokens (o held out)", ["completion/length_mean"], ["eval/length_mean"]),
        ("share of groups with signal, of completions cut off", ["group/with_signal", "completion/truncated"], []),
        ("KL to the reference, nats", ["policy/kl"], []),
        ("entropy, nats", ["policy/entropy"], []),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout="constrained")
    for axis, (title, curves, points) in zip(axes.flat, panels, strict=True):
        colors: dict[str, Any] = {}
        for name in curves:
            (line,) = axis.plot(*_series(rows, name), label=_label(name))
            colors[_label(name)] = line.get_color()
        for name in points:
            axis.plot(*_series(rows, name), "o", color=colors.get(_label(name)), mec="black", zorder=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


NOT_A_FUNCTION = {"reward/mean", "reward/std", "reward/unknown"}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _label(name: str) -> str:
    return name.split("/", 1)[1]
