"""How far a long piece of work is, and how long it will still take: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from grpo.observe.console import console
from grpo.system import progress
from grpo.system.terminal import Region, can_repaint, say

if TYPE_CHECKING:
    from grpo.scoring.scorer import Scorer

FIRST_LINE, EVERY = 5.0, 60.0
"""Seconds to the first line where there is no terminal, and between the others."""

SHORT = 2.0
"""Seconds. A start has checks that mostly take less, and whose bars would only be in the way."""

WIDTH = 24
"""Characters of the bar."""


class Bar:
    """Shows how many of `total` questions are answered, or of what else the work is, from its first second on.

    Until the first is answered, only the tokens that are drawn tell how fast it goes, and each completion may be as long as its
    limit: the time left is then the most it can be. After that it follows from what the answered questions took.

    Args:
        name: of the work, such as "gsm8k, r1_zero".
        most_tokens: of all completions together, at their limit.
        unit: of `total`, in the plural; bytes are shown as MB.
        shown: False on other processes than the main one.
        after: seconds that work takes before it is shown at all, at the next `add`.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        most_tokens: int,
        shown: bool = True,
        unit: str = "questions",
        after: float = 0.0,
    ) -> None:
        self.name, self.total, self.most_tokens, self.shown, self.unit = name, total, most_tokens, shown, unit
        self.after = after
        self.done = 0
        self._done_at = 0.0  # seconds from the start to when `done` last grew
        self._start = time.monotonic()
        self._tokens_before = progress.num_tokens_drawn
        self._region: Region | None = None
        self._over = threading.Event()
        self._lines = threading.Thread(target=self._say_lines, daemon=True)

    def __enter__(self) -> Bar:
        if not self.shown:
            return self
        if not can_repaint(sys.stdout, os.environ):
            self._lines.start()
        elif not self.after:
            self._paint()
        return self

    def _paint(self) -> None:
        self._region = Region(console(), lambda terminal: [self._line(terminal)])
        self._region.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._region is not None:
            self._region.stop()
        self._over.set()

    def add(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        self._done_at = time.monotonic() - self._start
        if self._region is not None:
            self._region.refresh()
        elif self.shown and not self._lines.is_alive() and self._done_at > self.after:
            self._paint()

    def _say_lines(self) -> None:
        """In a thread: the one that works may be in one call for minutes."""
        wait = FIRST_LINE
        while not self._over.wait(wait):
            say(f"  {self.words()}")
            wait = EVERY

    def words(self) -> str:
        """Such as "96 of 256 questions, 9,800 tokens/s, 00:00:12 left"."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        rate = (progress.num_tokens_drawn - self._tokens_before) / seconds
        speed = f", {rate:,.0f} tokens/s" if rate >= 1 else ""
        return f"{self._count()}{speed}{self._left(seconds)}"

    def _count(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def _left(self, seconds: float) -> str:
        if self.done:
            left = self._done_at / self.done * (self.total - self.done) - (seconds - self._done_at)
            return f", {clock(max(left, 0.0))} left"
        tokens = progress.num_tokens_drawn - self._tokens_before
        if not tokens:
            return ""
        return f", at most {clock(max(self.most_tokens - tokens, 0) * seconds / tokens)} left"

    def _line(self, terminal: Console) -> Text:
        filled = round(WIDTH * self.done / max(self.total, 1))
        bar = ("━" * filled, "green"), ("━" * (WIDTH - filled), "dim")
        return Text.assemble((f"{self.name}  ", "bold"), *bar, f"  {self.words()}")


def check_rows(scorer: Scorer, rows: Sequence[dict[str, Any]]) -> list[str | None]:
    """`scorer.check_rows`, shown."""
    with Bar("can the answers be graded?", total=len(rows), most_tokens=0, unit="answers checked", after=SHORT) as bar:
        return scorer.check_rows(rows, add=bar.add)


def clock(seconds: float) -> str:
    """00:01:40; with days in front where there are any."""
    days, rest = divmod(int(seconds), 86400)
    return (f"{days} d " if days else "") + time.strftime("%H:%M:%S", time.gmtime(rest))
