"""A run's files -> something to look at: a page for a browser, figures for a paper."""

from __future__ import annotations

from pathlib import Path

from grpo.report.figures import plot_curves, save_figures
from grpo.report.page import write_page

__all__ = ["at_the_end", "plot_curves", "save_figures", "write_page"]

COMPLETIONS_AT_THE_END = 4_000
"""Of each kind, so that a run does not wait for its page; scripts/report.py writes one with more."""


def at_the_end(run_dir: Path) -> list[str]:
    """Draw a run's curves and write its page; lines that say where they are. A picture must never cost a run its end."""
    lines = []
    try:
        lines.append(f"curves     {plot_curves(run_dir)}")
        page = run_dir / "report.html"
        write_page([run_dir], page, max_completions=COMPLETIONS_AT_THE_END)
        lines.append(f"report     {page}")
    except Exception as error:
        lines.append(f"warning: {error!r} while drawing the run; `python scripts/report.py {run_dir}` tries again.")
    return lines
