"""OUT/lineage.json: of every stage its launch line, settings, checksums of what it read and wrote; whether they still hold.

    {"stages": {name: {
        "status": "started", "stopped", "failed" or "finished",
        "launch": the line,
        "settings": {section.name or option: value}, "config": their checksum,
        "inputs": [{"label", "path", "source", "checksum"}], "outputs": the same,
        "counts": {what: number}, "seconds": of all starts together, "evaluation": see outcome.py}}}

Checksums are XXH3 of content, blind to intent. A model's is that of all files of its directory; a model of the hub has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from grpo.pipeline.stages import Input, Plan, Stage
from grpo.policy.model_source import model_directory
from grpo.system.files import checksum, replace_text, to_json

FILE = "lineage.json"
FINISHED = "finished"
TRACEBACK = re.compile(r"traceback[\w.-]*\.txt")
"""What a process leaves behind that has failed."""

Entry = dict[str, Any]


class Lineage:
    """What is known of the stages that have begun. Files are read once in each start, since a finished stage's do not change."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.path = plan.out / FILE
        self._checksums: dict[str, str | None] = {}
        self.stages: dict[str, Entry] = {}
        if self.path.is_file():
            try:
                self.stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} cannot be read: {error}. Restore it, or name another --out.") from None

    def is_finished(self, name: str) -> bool:
        return bool(self.stages.get(name, {}).get("status") == FINISHED)

    def write(self) -> None:
        replace_text(self.path, to_json({"stages": self.stages}, indent=1, ensure_ascii=False))

    def begin(self, stage: Stage, launch: str) -> Entry:
        """The entry of a stage that is launched now, which a stopped one goes on with."""
        settings = self.plan.settings(stage)
        before = self.stages.get(stage.name, {})
        self.stages[stage.name] = {
            "kind": stage.kind,
            "status": "started",
            "launch": launch,
            "settings": settings,
            "config": digest(settings),
            "inputs": [self.described(each) for each in self.plan.inputs(stage)],
            "outputs": [],
            "counts": {},
            "seconds": before.get("seconds", 0.0),
            "evaluation": None,
        }
        self.write()
        return self.stages[stage.name]

    def described(self, each: Input) -> dict[str, Any]:
        path = self.resolved(each)
        return {"label": each.label, "path": path, "source": each.source, "checksum": self.checksum(path)}

    def outputs(self, stage: Stage) -> list[dict[str, Any]]:
        label = {"reject": "rows", "evaluate": "results"}.get(stage.kind, "model")
        return [self.described(Input(label, str(self.plan.output(stage)), stage.name))]

    def resolved(self, each: Input) -> str:
        """Of a run, the directory of its newest model."""
        return model_directory(each.path, setting=each.label) if each.label in ("model", "teacher") else each.path

    def checksum(self, path: str) -> str | None:
        """None: there is no such file here, such as of a model of the hub."""
        if path not in self._checksums:
            self._checksums[path] = of_path(Path(path))
        return self._checksums[path]

    # ---- does it still hold? ----

    def check(self) -> None:
        """Forget the stages whose directory is gone, and compare all others with what they were made by.

        Raises:
            ValueError: settings, an input or an output of a stage that has begun changed since.
        """
        for stage in self.plan.stages:
            directory = self.plan.directory(stage)
            if not directory.exists():
                self.stages.pop(stage.name, None)
            elif stage.name not in self.stages:
                raise ValueError(
                    f"stage {stage.name}: {directory} is there, and {self.path} knows nothing of it. Name another --out, or "
                    f"delete the directory."
                )
        for stage in self.plan.stages:
            if stage.name in self.stages and not self._has_made_nothing(stage):
                self._check(stage, self.stages[stage.name])

    def _has_made_nothing(self, stage: Stage) -> bool:
        """Whether a stage ended, as for a wrong setting, before it wrote anything: then it may begin with other settings.

        An empty file, such as a lock, is nothing.
        """
        files = (path for path in self.plan.directory(stage).rglob("*") if path.is_file() and path.stat().st_size)
        return not self.is_finished(stage.name) and all(TRACEBACK.fullmatch(path.name) for path in files)

    def _check(self, stage: Stage, entry: Entry) -> None:
        settings = self.plan.settings(stage)
        if digest(settings) != entry["config"]:
            self._refuse(
                stage, f"its configuration changed since it was made: {_difference(entry['settings'], settings)}"
            )
        before = [(each["label"], each["source"], each["checksum"], each["path"]) for each in entry["inputs"]]
        inputs = self.plan.inputs(stage)
        for each in inputs:
            if each.source is not None and not self.is_finished(each.source):
                self._refuse(stage, f"it was made from {each.source}, which is not there any more ({each.path})")
        if [(label, source) for label, source, *_ in before] != [(each.label, each.source) for each in inputs]:
            self._refuse(stage, f"it was made from other files: {', '.join(path for *_, path in before)}")
        for (label, _, known, _), each in zip(before, inputs, strict=True):
            path = self.resolved(each)
            if self.checksum(path) != known:
                self._refuse(stage, f"its input {label} changed since it was made: {path}")
        if entry["status"] != FINISHED:
            return
        for known, path in self._outputs_now(stage, entry):
            if self.checksum(path) != known:
                self._refuse(stage, f"its output changed since it was made: {path}")

    def _outputs_now(self, stage: Stage, entry: Entry) -> list[tuple[str | None, str]]:
        """Checksum and present path of each output: OUT may have been moved."""
        try:
            now = self.outputs(stage)
        except ValueError as error:  # a run without a model
            self._refuse(stage, f"its output is gone: {error}")
        return [(known["checksum"], each["path"]) for known, each in zip(entry["outputs"], now, strict=True)]

    def _refuse(self, stage: Stage, what: str) -> NoReturn:
        """Raises ValueError, with the directories of the stage and of all that were made from it."""
        names = {stage.name}
        for each in self.plan.stages:
            if names & {value for _, value in each.named}:
                names.add(each.name)
        made = [str(self.plan.directory(each)) for each in self.plan.stages if each.name in names & self.stages.keys()]
        raise ValueError(
            f"stage {stage.name}: {what}.\nName another --out, or make it anew with what follows from it: rm -r {' '.join(made)}"
        )


def digest(settings: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def of_path(path: Path) -> str | None:
    """Checksum of a file, or of all files of a directory with their names; None if there is neither."""
    if path.is_file():
        return str(checksum(path))
    if not path.is_dir():
        return None
    files = sorted(each for each in path.rglob("*") if each.is_file())
    named = [(str(each.relative_to(path)), checksum(each)) for each in files]
    return xxhash.xxh3_128(repr(named).encode()).hexdigest()


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 3) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    said = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names[:most]]
    return "; ".join(said) + f"; and {len(names) - most} more" * (len(names) > most)
