"""A run's files -> something to look at: a page for a browser, figures for a paper."""

from grpo.report.figures import plot_curves, save_figures
from grpo.report.page import write_page

__all__ = ["plot_curves", "save_figures", "write_page"]
