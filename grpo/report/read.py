"""A run's directory -> a Run. Reads what is there, also of a run that is still going or has died in the middle of a line."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grpo.config import read_yaml
from grpo.scoring.answers import is_right, metrics_of, verdict_name
from grpo.scoring.reward import likely_name
from grpo.system.jsonl import row_of
from grpo.types import VOTE

Row = dict[str, Any]
MAX_RUNS = 8


@dataclass
class Source:
    """A file of completions, thinned out: whole groups of rows, evenly chosen, the first and the last among them."""

    kind: str  # "training", "held-out" or the name of a folder in evaluation/
    unit: str  # what groups of rows were chosen: "step" or "question"
    rows: list[Row]
    num_rows: int  # in the file
    num_units: int
    num_kept: int  # of the units


@dataclass
class Run:
    """What a run's files say."""

    name: str
    directory: Path
    metrics: list[Row]  # a row per step, in order
    config: dict[str, Any]
    environment: dict[str, Any]
    evaluations: list[Row]  # all answers to the held-out questions, with their step and without texts
    results: list[Row]  # of `grpo evaluate`, each with the `name` of its folder
    roll_backs: list[Row]
    alarms: list[tuple[str, str]]  # of the post-mortems: folder and text
    sources: list[Source]
    notes: list[str] = field(default_factory=list)  # what could not be read, what was left out

    @property
    def verdict(self) -> str:
        """Name of the reward function that says what is right; of several the first."""
        return (self.verdicts or ["accuracy"])[0]

    @property
    def sampled_metric(self) -> str:
        """How much is right of what is sampled in training."""
        return metrics_of(self.verdicts or [self.verdict])[0]

    @property
    def held_out_metric(self) -> str:
        """How much is right of the answers to the held-out questions."""
        return metrics_of(self.verdicts or [self.verdict])[1]

    @property
    def verdicts(self) -> list[str]:
        """Names of those that say what is right, of one question or another; none of a run without rewards."""
        if setting := self.config.get("scoring", {}).get("verdict"):
            return [setting] if isinstance(setting, str) else list(setting)
        seen = {
            name.removeprefix("reward/"): None for row in self.metrics for name in row if name.startswith("reward/")
        }
        answered = dict.fromkeys(name for row in self.evaluations[:1] for name in row["rewards"])  # in the run's order
        listed = [likely_name(each["function"], each.get("name")) for each in self.config.get("rewards", [])]
        in_order = [*answered, *(name for name in listed if name in seen), *seen]
        functions = [name for name in in_order if name not in ("mean", "std", "unknown", VOTE)]
        return [verdict_name(functions)] if functions else []

    @property
    def kind_column(self) -> str | None:
        """What kinds of questions are called."""
        return self.config.get("data", {}).get("kind_column")


def verdicts_of_runs(runs: list[Run]) -> list[str]:
    """Names of the rewards that say what is right in one of them or another."""
    return list(dict.fromkeys(verdict for run in runs for verdict in run.verdicts))


def kind_of_questions(runs: list[Run]) -> str:
    """What all of them call it, if they call it the same."""
    columns = {run.kind_column for run in runs} - {None}
    return str(columns.pop()) if len(columns) == 1 else "kind"


def read_runs(directories: list[Path], *, max_completions: int) -> list[Run]:
    """The runs, each under a name that no other has, with at most about `max_completions` rows of each kind in all.

    Raises:
        ValueError: a directory is not that of a run; is given twice; there are more than MAX_RUNS; max_completions is below 0.
    """
    if max_completions < 0:
        raise ValueError(
            f"--max-completions is {max_completions}; it is a number of completions. Set 0 for a page without, or more."
        )
    if len(directories) > MAX_RUNS:
        raise ValueError(
            f"RUN_DIR is given {len(directories)} times; a page tells at most {MAX_RUNS} runs apart by their colours. Give fewer."
        )
    for directory, times in Counter(path.resolve() for path in directories).items():
        if times > 1:
            raise ValueError(
                f"RUN_DIR {str(directory)!r} is given {times} times; a run is drawn once. Give each directory once."
            )
    for directory in directories:
        if not any((directory / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
            raise ValueError(
                f"RUN_DIR is {str(directory)!r}; neither metrics.jsonl nor config.yaml is there, and a run writes both. "
                "Give the directory that run.dir named and the run printed, such as runs/quickstart."
            )
    limit = max_completions // len(directories)
    names = _names(directories)
    return [_read(path, name, limit) for path, name in zip(directories, names, strict=True)]


def _names(directories: list[Path]) -> list[str]:
    """The last part of each path, and as many of those before it as tell it from the others."""
    parts = [path.resolve().parts for path in directories]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(directory: Path, name: str, limit: int) -> Run:
    notes: list[str] = []
    evaluations = _verdicts(directory / "evaluations.jsonl", notes)
    results, samples = _benchmarks(directory / "evaluation", limit, notes)
    metrics = _by_step(_rows(directory / "metrics.jsonl", notes, {"step"}))
    training = _source("training", directory / "completions.jsonl", "step", limit, notes)
    held_out = _source("held-out", directory / "evaluations.jsonl", "question", limit, [])  # unreadable lines are noted
    for path in sorted(directory.glob("*.superseded.jsonl")):
        notes.append(f"{path.name} holds {_num_lines(path):,} rows of steps that were taken back and done again")
    return Run(
        name,
        directory,
        metrics,
        config=_document(directory / "config.yaml", notes),
        environment=_document(directory / "environment.json", notes),
        evaluations=evaluations,
        results=results,
        roll_backs=_rows(directory / "roll_backs.jsonl", notes, {"step", "to", "rule", "text"}),
        alarms=[
            (p.parent.name, p.read_text(encoding="utf-8", errors="replace"))
            for p in sorted(directory.glob("post_mortem/*/alarm.txt"))
        ],
        sources=[source for source in [training, held_out, *samples] if source.rows],
        notes=notes,
    )


def _benchmarks(folder: Path, limit: int, notes: list[str]) -> tuple[list[Row], list[Source]]:
    results: list[Row] = []
    samples = []
    for path in sorted(folder.glob("*/results.json"), key=_first_base):
        result = _document(path, notes, {"model", "settings", "results"})
        if result:
            results.append({"name": path.parent.name, **result})
        samples.append(_source(path.parent.name, path.with_name("samples.jsonl"), "question", limit, notes))
    return results, samples


def _first_base(path: Path) -> tuple[bool, str]:
    return path.parent.name != "base", path.parent.name


def _by_step(rows: list[Row]) -> list[Row]:
    """Training and evaluation write rows of their own for a step."""
    steps: dict[int, Row] = {}
    for row in rows:
        known = {name: value for name, value in row.items() if value is not None}  # null: no finite number
        steps.setdefault(row["step"], {}).update(known)
    return [steps[step] for step in sorted(steps)]


def _document(path: Path, notes: list[str], keys: AbstractSet[str] = frozenset()) -> Row:
    """A file that is one mapping, in YAML or JSON; empty where there is none, or none that can be read, which is noted."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = read_yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    if isinstance(value, dict) and keys <= value.keys():
        return value
    within = f"{path.parent.name}/" if keys else ""
    notes.append(f"{within}{path.name} cannot be read and is left out")
    return {}


def _rows(path: Path, notes: list[str], keys: AbstractSet[str]) -> list[Row]:
    if not path.is_file():
        return []
    return list(_parsed(path, notes, keys, lambda _: True))


def _verdicts(path: Path, notes: list[str]) -> list[Row]:
    """All rows of a file of answers without their texts, which may be larger than memory."""
    if not path.is_file():
        return []
    rows = _parsed(path, notes, {"step", *ANSWER}, lambda _: True)
    kept = ("step", *VERDICT, "kind")
    return [{"right": is_right(row)} | {name: row[name] for name in kept if name in row} for row in rows]


def _num_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _parsed(path: Path, notes: list[str], keys: AbstractSet[str], wanted: Callable[[bytes], bool]) -> Iterator[Row]:
    """The rows of wanted lines. A last line without its line feed is being written; another that is no row is noted.

    Args:
        keys: a row has these; without one it cannot be read either.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not wanted(line):
                continue
            row = row_of(line, keys)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                notes.append(f"line {number} of {path.name} cannot be read and is left out")


def _source(kind: str, path: Path, unit: str, limit: int, notes: list[str]) -> Source:
    """Read a file of completions, of which only as much is parsed as is kept; rows of one `unit` stay together."""
    pattern = re.compile(
        f'"{UNITS[unit]}": ([0-9]+)'.encode()
    )  # a quotation mark within a text has a backslash before it

    def unit_of(line: bytes) -> Hashable:
        found = pattern.search(line)
        return found and found[1]

    sizes: Counter[Hashable] = Counter()
    if path.is_file() and limit:  # a pipe or a device has no end
        with path.open("rb") as file:
            sizes.update(unit_of(line) for line in file)
    kept = _evenly(sizes, limit)
    keys = {UNITS[unit], *ANSWER}
    rows = list(_parsed(path, notes, keys, lambda line: unit_of(line) in kept)) if kept else []
    return Source(kind, unit, rows, sum(sizes.values()), len(sizes), len(kept))


VERDICT = ("row", "finish_reason", "num_tokens", "rewards")
ANSWER = (*VERDICT, "question", "answer", "completion")
"""What a row of a completion has in every file."""
UNITS = {"step": "step", "question": "row"}
"""What rows are chosen by, and the name of it in a row."""


def _evenly(sizes: Counter[Hashable], limit: int) -> set[Hashable]:
    """Units at equal distances, the first and the last among them, that have about `limit` rows together."""
    units, total = list(sizes), sum(sizes.values())
    if not limit or total <= limit:
        return set(units) if limit else set()
    count = min(len(units), max(2, len(units) * limit // total))
    return {units[round(i * (len(units) - 1) / max(count - 1, 1))] for i in range(count)}
