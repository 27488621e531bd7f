"""The last words of a run: where everything lies, or how to go on."""

from __future__ import annotations

from pathlib import Path

from grpo import report
from grpo.config import as_override
from grpo.system.distributed import Processes
from grpo.system.stopping import EXIT_STOPPED, Interrupted, Stopped, StoppedInNotebook, StopRequest
from grpo.system.terminal import in_notebook


def say_where_all_lies(directory: Path, model: Path, processes: Processes) -> None:
    """Draw the curves and write the page of a run that is done, and name its files."""
    pictures = report.at_the_end(directory) if processes.is_main else []
    next_commands = [f"look       grpo report {directory}", f"ask        grpo chat --model {directory}"]
    processes.say(
        "\n".join([f"\nmetrics    {directory / 'metrics.jsonl'}", *pictures, f"model      {model}", *next_commands])
    )


def say_how_to_go_on(
    interrupted: Interrupted, directory: Path, saved: Path, request: StopRequest, processes: Processes
) -> Stopped | StoppedInNotebook:
    """The end of a run that was stopped and is saved; with the settings to go on with, where it can do so by itself."""
    if in_notebook():
        way = {"run.resume": "auto", "run.dir": str(directory)}
        processes.say(f"saved to {saved}; a new trainer with settings={way} goes on from there")
        return StoppedInNotebook(str(interrupted))
    settings = ("run.resume=auto", f"run.dir={as_override(str(directory))}", *interrupted.settings)
    processes.say(
        f"stopped: {interrupted}. Saved to {saved}; {' '.join(settings)} goes on from there. Exit code {EXIT_STOPPED}."
    )
    goes_on = interrupted.settings and request.reason is None
    return Stopped(str(interrupted), (*settings, *request.settings) if goes_on else ())
