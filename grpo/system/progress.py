"""Whether this process makes progress, and what it is doing: its phase, its place in the code, and the call it waits in.

Processes that train together can wait for each other for ever: one is in a collective that another never joins, because it is in
a different one. Neither has failed and both are alive, so only the lack of progress tells. A process makes progress if it calls
`tick`, as work does wherever a part of it is done, or if its thread is found at another place than before. `heartbeat` samples
this with each beat and exchanges it, and `stalled` judges: only if no process at all has made progress do they wait for each
other. One that waits for another that works, however long, is never taken for stuck.

Not judged is a process in `busy`, where a single call may take long, and one whose thread is not inside this package: a script
that steps a Trainer by hand may do what it likes between two steps. Nothing here imports the rest of the package or torch.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

STALL_SECONDS = 200.0
"""Without progress on any process for so long, they wait for each other."""

STOP_SECONDS = 18.0
"""The same after a signal has asked for a stop: torchrun kills its processes 30 s after it."""

BUSY_SECONDS = 3600.0
"""How long one call in `busy` may take, unless it says otherwise: writing or reading a large file over a slow network."""

STALLED = "all processes wait for each other"
"""How the reason that `stalled` gives begins."""

WATCHERS = ("heartbeat", "signals")
"""Names of threads that only watch."""

PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"

last_checkpoint: Path | None = None
"""What remains if the process ends now."""

_ticks = 0
_phase = "starting"
_busy: tuple[str, float] | None = None  # with what, and for how many seconds at most
_stop_signal = ""
_worker = threading.main_thread().ident or 0


def tick() -> None:
    """A part of the work is done: a token is drawn, a pass has run, a file is written."""
    global _ticks
    _ticks += 1


num_tokens_drawn = 0
"""By this process since it started; where completions share passes, those behind the end of one are counted too."""


def drew(number: int) -> None:
    """So many tokens are drawn."""
    global num_tokens_drawn
    num_tokens_drawn += number
    tick()


def watch_this_thread() -> None:
    """Of this process, the thread that calls this is the one that works."""
    global _worker
    _worker = threading.get_ident()


def stop_was_asked_by(signal: str) -> None:
    """From here on a group that waits for each other has no more than STOP_SECONDS; "" takes it back."""
    global _stop_signal
    _stop_signal = signal


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within it, the process is said to be in this phase: rollout, update, saving, ..."""
    global _phase
    before, _phase = _phase, name
    try:
        yield
    finally:
        _phase = before


@contextmanager
def busy(what: str, seconds: float = BUSY_SECONDS) -> Iterator[None]:
    """Within it, a single call may take so long. In another thread than the one that works it has no effect."""
    global _busy
    if threading.get_ident() != _worker:
        yield
        return
    before, _busy = _busy, (what, seconds)
    tick()
    try:
        yield
    finally:
        _busy = before
        tick()


class Pulse(NamedTuple):
    """What a process says of itself with each beat. Times are in seconds, counted in its own beats."""

    beats: int
    quiet: float  # since it was last seen to make progress
    allowed: float  # how long it may be quiet for what it does now, besides the limit for all
    since_signal: float  # since a signal asked it to stop; 0 if none has

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def of(cls, text: str) -> Pulse:
        """What `str` wrote; a name or another word of a process that does not beat (yet) is one that is not quiet."""
        try:
            beats, *seconds = text.split()
            return cls(int(beats), *map(float, seconds))
        except (ValueError, TypeError):
            return cls(0, 0.0, 0.0, 0.0)


class Observer:
    """Looks at this process once a beat."""

    def __init__(self, beat_seconds: float) -> None:
        self._beat_seconds = beat_seconds
        self._beats = self._quiet = self._since_signal = 0  # beats
        self._before: object = None

    def beat(self) -> Pulse:
        frames = list(_frames())
        now = _ticks, *((id(frame.f_code), frame.f_lasti) for frame in frames)
        self._beats += 1
        self._quiet = self._quiet + 1 if now == self._before else 0
        self._since_signal = self._since_signal + 1 if _stop_signal else 0
        self._before = now
        quiet, since_signal = (beats * self._beat_seconds for beats in (self._quiet, self._since_signal))
        return Pulse(self._beats, quiet, _allowed(frames), since_signal)


def _allowed(frames: list[FrameType]) -> float:
    if not any(map(_is_ours, frames)):
        return math.inf
    return 0.0 if _busy is None else _busy[1]


def stalled(pulses: list[Pulse], *, stall_seconds: float, stop_seconds: float) -> str | None:
    """Why a group with these pulses will never go on; None if it may."""
    asked = max((pulse.since_signal for pulse in pulses), default=0.0) > stop_seconds
    limit = stop_seconds if asked else stall_seconds
    if not all(pulse.quiet > max(limit, pulse.allowed) for pulse in pulses):
        return None
    why = f"{STALLED}: none has made progress for {limit:g} s"
    return f"{why}, so the stop that a signal asked for cannot be carried out" if asked else why


def describe() -> str:
    """Phase, place, call: "update, at grpo/batch.py:9 (backward), in torch/ops.py:9 (all_reduce), waiting in: work.wait()"."""
    frames = list(_frames())
    what = _phase if _busy is None else f"{_phase} ({_busy[0]})"
    ours = next((frame for frame in frames if _is_ours(frame)), None)
    if not frames or ours is None:
        return f"{what}, outside of grpo"
    line = linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno or 0).strip()  # None between two lines
    deeper = "" if frames[0] is ours else f", in {_place(frames[0])}"
    return f"{what}, at {_place(ours)}{deeper}, waiting in: {line or frames[0].f_code.co_name}"


def what_remains() -> str:
    """Which checkpoint a run that ends now resumes from."""
    return "no checkpoint was written yet" if last_checkpoint is None else f"the last checkpoint is {last_checkpoint}"


def stacks() -> str:
    """Where this process's threads are, the one that works first; the last lines are the innermost calls."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    threads = sorted(sys._current_frames().items(), key=lambda item: item[0] != _worker)
    shown = [(names.get(ident, "of a library, as torch's for backward passes"), frame) for ident, frame in threads]
    return "".join(
        f"thread {name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in shown if name not in WATCHERS
    )


def _frames() -> Iterator[FrameType]:
    """Of the thread that works, the innermost first."""
    frame = sys._current_frames().get(_worker)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


def _place(frame: FrameType) -> str:
    """File, line and function, the file from its package on."""
    path = Path(frame.f_code.co_filename)
    parts = path.parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else max(len(parts) - 3, 0)
    short = path.relative_to(Path(PACKAGE).parent) if _is_ours(frame) else Path(*parts[start:])
    return f"{short}:{frame.f_lineno} ({frame.f_code.co_name})"
