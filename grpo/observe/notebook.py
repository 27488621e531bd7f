"""What a notebook shows of a run: one output beneath its cell, which is replaced as the run goes on."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from grpo.observe.display import Dashboard
from grpo.system.terminal import silenced

WIDTH, HEIGHT = 104, 34
"""Columns and rows of it, as of a terminal."""

HTML = '<pre style="line-height:1.15;white-space:pre;overflow-x:auto">{code}</pre>'


class NotebookSink:
    """The dashboard beneath the cell that runs. What is printed meanwhile stands in that cell's text.

    It changes when something is measured and not by a clock: an output belongs to the cell whose code makes it, and a thread
    has none. Where another cell goes on with the run, that one gets a display of its own.
    """

    def __init__(self, dashboard: Dashboard) -> None:
        self.dashboard = dashboard
        self._handle: Any = None
        self._cell = -1

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.dashboard.add(step, metrics)
        self._show()

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.dashboard.take_samples(rows)

    def alarm(self, rule: str, text: str) -> None:
        self.dashboard.alarm(rule, text)
        self._show()

    def close(self) -> None:
        """The last state stays."""

    def _show(self) -> None:
        from IPython import get_ipython
        from IPython.display import display

        cell = get_ipython().execution_count
        content = rendered(self.dashboard)
        with silenced():
            if self._handle is None or cell != self._cell:
                self._handle, self._cell = display(content, raw=True, display_id=True), cell
            else:
                self._handle.update(content, raw=True)


def rendered(dashboard: Dashboard) -> dict[str, str]:
    """As HTML, and as the text that stands where a notebook is printed or read by a program."""
    terminal = Console(
        file=io.StringIO(),
        record=True,
        width=WIDTH,
        height=HEIGHT,
        force_terminal=True,
        force_jupyter=False,
        _environ={},
    )
    for line in dashboard.lines(terminal):
        terminal.print(line, soft_wrap=True)
    text = terminal.export_text(clear=False)
    return {"text/plain": text, "text/html": terminal.export_html(inline_styles=True, code_format=HTML)}
