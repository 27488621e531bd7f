"""Which of the ways to show a run is the one for this process: a display, a notebook's output, or lines."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from grpo.observe.console import OF_ROLLOUTS, LineSink
from grpo.observe.display import Dashboard, DisplaySink
from grpo.observe.notebook import NotebookSink
from grpo.system.terminal import ConsoleHandler, can_repaint, in_notebook, logger

Screen = DisplaySink | NotebookSink | LineSink


def console_sink(
    *,
    title: str,
    num_steps: int,
    first_step: int,
    reward_names: list[str],
    rows: list[dict[str, Any]],
    columns: Mapping[str, str] = OF_ROLLOUTS,
    about: str = "",
) -> Screen:
    """A display on a terminal or in a notebook, else lines; those also where the logger's are not to go to the terminal."""
    routed = not (
        logger.isEnabledFor(logging.INFO) and any(isinstance(each, ConsoleHandler) for each in logger.handlers)
    )
    is_notebook = in_notebook()
    if routed or not (is_notebook or can_repaint(sys.stdout, os.environ)):
        return LineSink(num_steps=num_steps, reward_names=reward_names, columns=columns)
    board = Dashboard(
        title=title, num_steps=num_steps, first_step=first_step, reward_names=reward_names, rows=rows, about=about
    )
    return NotebookSink(board) if is_notebook else DisplaySink(board)
