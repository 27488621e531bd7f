"""Where a run's numbers and texts go: metrics.jsonl and completions.jsonl, the console, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

from grpo.writer import replace_text


class Sink(Protocol):
    """Somewhere metrics go. Only the main process has sinks."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl, completions.jsonl: one JSON object a line, written through at once.

    Rows that cannot be written are kept, and tried again with the next.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._waiting: dict[str, list[dict[str, Any]]] = {}  # by the name of their file

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.append("metrics.jsonl", [{"step": step, **metrics}])

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.append("completions.jsonl", rows)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to the file of that name."""
        rows = self._waiting.pop(name, []) + rows
        try:
            append_jsonl(self.directory / name, rows)
        except OSError as error:
            self._waiting[name] = rows
            print(f"warning: {name} cannot be written: {error}; {len(rows)} rows wait in memory.", flush=True)

    def close(self) -> None:
        """What still cannot be written goes to the directory for temporary files.

        Raises:
            OSError: nor there.
        """
        for name in list(self._waiting):
            self.append(name, [])
        for name, rows in self._waiting.items():
            elsewhere = Path(tempfile.mkdtemp(prefix=f"{self.directory.name}-")) / name
            append_jsonl(elsewhere, rows)
            print(f"warning: the last {len(rows)} rows of {name} are in {elsewhere}.", flush=True)


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows through to the disk.

    Raises:
        OSError: not one of them was written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Split at line feeds only: a completion may hold other characters that `str.splitlines` takes for line ends."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.stat().st_size else []


def rewind_jsonl(path: Path, step: int) -> None:
    """Move rows after `step` to `<name>.superseded.jsonl`: a resumed run writes those steps anew, and loses nothing.

    A last line that a kill cut short goes there too.
    """
    if not path.exists():
        return
    kept: list[str] = []
    superseded: list[str] = []
    for line in _lines(path):
        (kept if _step_of(line) <= step else superseded).append(line + "\n")
    if superseded:
        with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(superseded)
    replace_text(path, "".join(kept))  # also to end a whole last line whose line feed is missing


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")


class WandbSink:
    """A Weights & Biases run with the curves, the resolved config and a table of completions.

    Without a login, or when the service cannot be reached, the run is kept on disk (`wandb sync` uploads it later) and a
    line says so; nothing here stops training.
    """

    TABLE_ROWS = 32

    def __init__(self, mode: str, *, project: str, directory: Path, config: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        if mode == "online" and not _has_login(wandb):
            print("wandb: no login found (run `wandb login`); this run is logged offline.", flush=True)
            mode = "offline"
        options: dict[str, Any] = {
            "project": project,
            "name": directory.name,
            "dir": str(directory),
            "config": config,
            "id": _wandb_id(directory),
            "resume": "allow",
        }
        try:
            self._run = wandb.init(mode=mode, **options)  # type: ignore[arg-type]
        except Exception as error:  # whatever goes wrong with a logging service must not cost a run
            print(f"wandb: {error}; this run is logged offline.", flush=True)
            self._run = wandb.init(mode="offline", **options)
        # W&B's own step cannot go back; a run that resumes or rolls back does
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._send(metrics, step)

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        table = self._wandb.Table(columns=list(rows[0]))
        for row in rows[: self.TABLE_ROWS]:
            table.add_data(*(json.dumps(v) if isinstance(v, dict) else v for v in row.values()))
        self._send({"completions": table}, step)

    def _send(self, values: dict[str, Any], step: int) -> None:
        try:
            self._run.log({"step": step, **values})
        except Exception as error:
            print(f"wandb: {error}; step {step} is in the run's own files only.", flush=True)

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            print(f"wandb: {error}", flush=True)


def _has_login(wandb: Any) -> bool:
    try:
        return wandb.login(prompt=False)
    except Exception as error:  # a key that is no key, a service that cannot be reached
        print(f"wandb: {error}", flush=True)
        return False


def _wandb_id(directory: Path) -> str:
    """The run's id, kept beside its results so that a resumed run continues the same curves."""
    path = directory / "wandb_id"
    if not path.exists():
        replace_text(path, os.urandom(4).hex())
    return path.read_text()
