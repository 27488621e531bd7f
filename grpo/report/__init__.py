"""A run's files -> something to look at: a page for a browser, figures for a paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grpo.report.figures import plot_arms, plot_curves, save_figures, save_picture
from grpo.report.fit import prediction, said
from grpo.report.page import write_page, write_page_of
from grpo.report.read import Run, read_runs

__all__ = [
    "at_the_end",
    "check_places",
    "plot_arms",
    "plot_curves",
    "read_runs",
    "remarks",
    "save_figures",
    "save_picture",
    "write_page",
    "write_page_of",
]

COMPLETIONS_AT_THE_END = 4_000
"""Of each kind, so that a run does not wait for its page; `grpo report` writes one with more."""


PICTURES = (".png", ".pdf", ".svg")


def check_places(file: Path | None, *directories: Path | None, picture: Path | None = None) -> None:
    """See that what will be written can be, before the runs are read.

    Raises:
        ValueError: `file` or `picture` is a directory or would lie where there is none; a directory is, or lies in, something
            else; the name of the picture does not say what it is.
    """
    for option, place, example in (("--out", file, "compare.html"), ("--picture", picture, "curves.png")):
        if place is not None and (place.is_dir() or not place.parent.is_dir()):
            raise ValueError(
                f"{option} is {str(place)!r}; it is a file in a directory that exists. Give a name such as {example}, or make "
                f"{str(place.parent)!r} first."
            )
    if picture is not None and picture.suffix not in PICTURES:
        raise ValueError(
            f"--picture is {str(picture)!r}; a picture's name ends in {', '.join(PICTURES)}. Give one such as curves.png."
        )
    for directory in directories:
        if directory is not None and not next(p for p in (directory, *directory.parents) if p.exists()).is_dir():
            raise ValueError(
                f"--png or --pdf is {str(directory)!r}; figures go into a directory, and a file is in its way. Give another name."
            )


def remarks(runs: list[Run]) -> list[str]:
    """Of each run, what could not be read of it, and where its rewards lead."""
    lines = []
    for run in runs:
        lines += [f"{run.name}: {note}" for note in run.notes]
        if (leads_to := prediction(run)) is not None:
            lines.append(f"{run.name}: {said(leads_to)}")
    return lines


def at_the_end(run_dir: Path) -> list[str]:
    """Draw a run's curves and write its page; lines that say where they are. A picture must never cost a run its end."""
    page = run_dir / "report.html"
    again = f"grpo report {run_dir}"
    pictures: list[tuple[str, Path, Callable[[], object], str]] = [
        ("curves", run_dir / "curves.png", lambda: plot_curves(run_dir), f"{again} --png {run_dir / 'figures'}"),
        ("report", page, lambda: write_page([run_dir], page, max_completions=COMPLETIONS_AT_THE_END), again),
    ]
    return [_attempt(*picture) for picture in pictures]


def _attempt(name: str, path: Path, draw: Callable[[], object], again: str) -> str:
    try:
        draw()
    except Exception as error:
        return f"warning: {error!r} while drawing {path}; `{again}` tries again."
    return f"{name:<11}{path}"
