"""The last words of a run: where everything lies, or how to go on."""

from __future__ import annotations

from pathlib import Path

from grpo import report
from grpo.config import as_override
from grpo.system.distributed import Processes
from grpo.system.stopping import EXIT_STOPPED, Interrupted, Stopped, StopRequest


def say_where_all_lies(directory: Path, model: Path, processes: Processes) -> None:
    """Draw the curves and write the page of a run that is done, and name its files."""
    pictures = report.at_the_end(directory) if processes.is_main else []
    processes.say("\n".join([f"\nmetrics    {directory / 'metrics.jsonl'}", *pictures, f"model      {model}"]))


def say_how_to_go_on(
    interrupted: Interrupted, directory: Path, saved: Path, request: StopRequest, processes: Processes
) -> Stopped:
    """The end of a run that was stopped and is saved; with the settings to go on with, where it can do so by itself."""
    settings = ("run.resume=auto", f"run.dir={as_override(str(directory))}", *interrupted.settings)
    processes.say(
        f"stopped: {interrupted}. Saved to {saved}; {' '.join(settings)} goes on from there. Exit code {EXIT_STOPPED}."
    )
    goes_on = interrupted.settings and request.reason is None
    return Stopped(str(interrupted), (*settings, *request.settings) if goes_on else ())
