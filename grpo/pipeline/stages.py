"""A folder of stages: `stages.yaml`, and the configurations that it names, read and checked before anything runs.

    stages:
      - name: cold_rows          # its files lie in OUT/cold_rows
        kind: reject             # train, sft, reject, evaluate: the command that it is
        config: rows.yaml        # beside stages.yaml
        model: zero              # a stage, a directory, or an id of the hub; left out: the configuration's own
        teacher: zero            # of train
        rows: [a_stage, x.jsonl] # of train and sft: data.name
        set: {run.steps: 10}     # settings; of train, sft, and of reject with a config
        options: {samples: 2}    # of reject and evaluate: their options, with _ for -
    compare:                     # what the page at the end puts side by side
      - {title: ..., stages: [a, b]}

A stage may stand before those that it needs; they run first.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from grpo.config import Config, SupervisedConfig
from grpo.config.load import read_settings, read_text, read_yaml
from grpo.config.shipped import STAGES, folder

KINDS = ("train", "sft", "reject", "evaluate")
TRAINED = ("train", "sft")
"""Kinds whose output is a model."""
KEYS = ("name", "kind", "config", "model", "teacher", "rows", "set", "options")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
OWN_OPTIONS = ("model", "config", "out")
"""Of reject and evaluate, those that the pipeline gives."""
OPTIONS = {
    "reject": [
        "questions",
        "num_questions",
        "samples",
        "seed",
        "step",
        "template",
        "system",
        "temperature",
        "top_p",
        "max_tokens",
        "require",
        "min_thought_words",
        "max_foreign_words",
        "loop_size",
        "loop_times",
        "max_paragraph_words",
        "max_thought_code",
        "per_question",
        "min_language",
        "max_loop",
        "pass_rate",
        "choose",
        "tags",
        "rewrite_with",
        "rewrite_template",
        "rewrite_temperature",
        "rewrite_max_tokens",
        "rewrite_samples",
        "engine",
        "max_sequences",
        "kv_cache_gib",
        "workers",
        "trust_rewards",
        "trust_remote_code",
    ],
    "evaluate": [
        "benchmarks",
        "data",
        "templates",
        "question_template",
        "system_prompt",
        "samples",
        "temperature",
        "top_p",
        "max_tokens",
        "stop",
        "questions",
        "seed",
        "revision",
        "dtype",
        "engine",
        "max_sequences",
        "kv_cache_gib",
        "workers",
        "trust_remote_code",
    ],
}
PATHS = ("questions", "rewrite_template")
"""Options that may be files beside stages.yaml."""


@dataclass(frozen=True)
class Input:
    """Something that a stage reads: a model, rows or questions."""

    label: str  # what it is to the stage: model, teacher, rows, data
    path: str  # a file, a directory, or an id of the hub
    source: str | None = None  # the stage that it comes from


@dataclass(frozen=True)
class Stage:
    """A stage as stages.yaml has it, with its paths resolved."""

    name: str
    kind: str
    config: Path | None = None
    model: str | None = None
    teacher: str | None = None
    rows: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> list[tuple[str, str]]:
        """What it is given, as (key, stage or path)."""
        single = [(key, value) for key in ("model", "teacher") if (value := getattr(self, key)) is not None]
        return single + [("rows", each) for each in self.rows]


@dataclass(frozen=True)
class Plan:
    """The stages of a folder in the order in which they run, and where their files go."""

    folder: Path
    out: Path
    stages: tuple[Stage, ...]
    compare: tuple[tuple[str, tuple[str, str]], ...]

    def stage(self, name: str) -> Stage | None:
        return next((each for each in self.stages if each.name == name), None)

    def directory(self, stage: Stage) -> Path:
        return self.out / stage.name

    def output(self, stage: Stage) -> Path:
        """What other stages read of it: a run's directory, or a file of rows or results."""
        files = {"reject": "rows.jsonl", "evaluate": "results.json"}
        directory = self.directory(stage)
        return directory / files[stage.kind] if stage.kind in files else directory

    def path(self, named: str) -> str:
        """Of what a stage is given: the output of the stage of that name, or itself."""
        stage = self.stage(named)
        return named if stage is None else str(self.output(stage))

    def launch(self, stage: Stage) -> list[str]:
        """The words of its command after `grpo`."""
        if stage.kind in TRAINED:
            return [stage.kind, "--config", str(stage.config), "--set", *self._overrides(stage)]
        given = ["--config", str(stage.config)] if stage.config else []
        given += ["--set", *overrides] if (overrides := _as_overrides(stage.set)) else []
        assert stage.model is not None, "it is checked when the stages are read"
        out = self.output(stage) if stage.kind == "reject" else self.directory(stage)
        return [stage.kind, "--model", self.path(stage.model), *given, *_as_options(stage.options), "--out", str(out)]

    def _overrides(self, stage: Stage) -> list[str]:
        settings: dict[str, Any] = dict(stage.set)
        if stage.model is not None:
            settings["model.name"] = self.path(stage.model)
        if stage.teacher is not None:
            settings["teacher.name"] = self.path(stage.teacher)
        if stage.rows:
            paths = [self.path(each) for each in stage.rows]
            settings["data.name"] = paths[0] if len(paths) == 1 else [{"name": each} for each in paths]
        settings |= {"run.dir": str(self.directory(stage)), "run.resume": "auto"}
        return _as_overrides(settings)

    def settings(self, stage: Stage) -> dict[str, Any]:
        """All that it is told, by `section.name` or option, without where OUT and the folder of stages lie.

        Raises:
            ValueError: a setting is wrong.
        """
        found: dict[str, Any] = {"kind": stage.kind, **stage.options}
        if stage.kind in TRAINED:
            found |= _flat(self.config(stage).model_dump(mode="json"))
        else:
            found |= {"model": self.path(stage.model or "")}
            if stage.config is not None:
                asked = Config.load_questions(stage.config, _as_overrides(stage.set))
                found |= _flat(asked.model_dump(mode="json", exclude={"run"}))
        text = json.dumps(found, default=str)
        for place, name in ((self.out, "OUT"), (self.folder, "STAGES")):
            text = text.replace(f"{json.dumps(str(place))[1:-1]}/", f"{name}/")
        settings: dict[str, Any] = json.loads(text)
        return settings

    def config(self, stage: Stage) -> Config | SupervisedConfig:
        assert stage.config is not None, "it is checked when the stages are read"
        kind = Config if stage.kind == "train" else SupervisedConfig
        return kind.load(stage.config, self._overrides(stage))

    def inputs(self, stage: Stage) -> list[Input]:
        """All that it reads and that has files, or an id of the hub."""
        found = [
            Input(key, self.path(value), None if self.stage(value) is None else value) for key, value in stage.named
        ]
        if "step" in stage.options:  # of the run, not its newest model
            checkpoint = f"checkpoints/step-{stage.options['step']:08d}"
            found = [replace(e, path=f"{e.path}/{checkpoint}") if e.label == "model" else e for e in found]
        if stage.kind in TRAINED:
            config = self.config(stage)
            if stage.model is None:
                found.append(Input("model", config.model.name))
            own = [] if stage.rows else [config.data.name]
            found += [Input("data", path) for path in _files([*own, config.data.eval_name])]
        else:
            given = Config.load_questions(stage.config, _as_overrides(stage.set)).data if stage.config else None
            named = stage.options.get("questions") or (given and given.name)
            found += [Input("data", path) for path in _files([named])]
        return found


def _files(names: Iterable[Any]) -> list[str]:
    """Of the values of data.name, those that are files."""
    found: list[str] = []
    for name in names:
        if isinstance(name, (list, tuple)):
            found += _files(getattr(each, "name", each) for each in name)
        elif isinstance(name, str) and Path(name).is_file():
            found.append(name)
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{section: {name: value}} -> {section.name: value}."""
    found: dict[str, Any] = {}
    for section, values in settings.items():
        inner = values.items() if isinstance(values, dict) else [("", values)]
        found |= {f"{section}.{name}".rstrip("."): value for name, value in inner}
    return found


def _as_yaml(value: Any) -> str:
    """Such that an override is read as this value."""
    try:
        plain = isinstance(value, str) and read_yaml(value) == value
    except Exception:  # of a text that is no YAML
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)


def _as_overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_as_yaml(value)}" for name, value in settings.items()]


def _as_options(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(each) for each in (value if isinstance(value, list) else [value])]
    return words


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_plan(given: str | Path, out: str | Path | None, overrides: Sequence[str] = ()) -> Plan:
    """The stages of a folder, checked as far as that is possible before any has run.

    Args:
        given: the folder, or the name of one that comes with the library, such as `r1-tiny`.
        out: where the stages' files go; None: runs/ and the folder's name.
        overrides: `STAGE:section.setting=value`, or `STAGE:option=value` of reject and evaluate.

    Raises:
        ValueError: see the module; the message names the stage.
    """
    place = _find(given)
    written = read_settings(read_text(place / STAGES, f"{place / STAGES} lists the stages"), str(place / STAGES))
    if unknown := [key for key in written if key not in ("stages", "compare")]:
        raise ValueError(f"{place / STAGES} has {unknown[0]!r}; it holds stages and compare. Remove it.")
    listed = written.get("stages")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{place / STAGES} has no list `stages`. Write one; configs/r1-tiny/{STAGES} is an example.")
    names = [str(each.get("name")) if isinstance(each, dict) else str(each) for each in listed]
    for number, (name, each) in enumerate(zip(names, listed, strict=True)):
        _check_keys(name, each, number)
        if names.count(name) > 1:
            raise ValueError(f"stage {name} is listed twice in {place / STAGES}. Rename one of them.")
    stages = _with_overrides([_stage(each, place, names) for each in listed], overrides)
    stages = _in_order(stages)
    resolved = Path(out) if out is not None else Path("runs") / place.resolve().name
    plan = Plan(place, resolved.absolute(), tuple(stages), _comparisons(written.get("compare") or [], stages, place))
    for stage in plan.stages:
        _check(stage, plan)
    return plan


def _find(given: str | Path) -> Path:
    for place in (Path(given), folder() / given):
        if (place / STAGES).is_file():
            return place.absolute()
    shipped = sorted(str(path.parent.relative_to(folder())) for path in folder().rglob(STAGES))
    raise ValueError(
        f"{str(given)!r} is no folder of stages: there is no {STAGES} in it. Name a folder that has one, or one that comes with "
        f"the library: {', '.join(shipped)}."
    )


def _check_keys(name: str, each: Any, number: int) -> None:
    if not isinstance(each, dict) or not NAME.fullmatch(name):
        raise ValueError(
            f"stage {number + 1} is {each!r}; a stage has a name of letters, digits, _ and -, and a kind. Correct it."
        )
    for key in each:
        if key not in KEYS:
            raise ValueError(f"stage {name} has {key!r}; a stage has {', '.join(KEYS)}.{_nearest(key, KEYS)}")
    if each.get("kind") not in KINDS:
        raise ValueError(
            f"stage {name}: kind is {each.get('kind')!r}; it is one of {', '.join(KINDS)}.{_nearest(each.get('kind'), KINDS)}"
        )


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else " Correct it."


def _stage(each: Mapping[str, Any], place: Path, names: Sequence[str]) -> Stage:
    name, kind = str(each["name"]), str(each["kind"])
    for key, of in (
        ("teacher", ("train",)),
        ("rows", TRAINED),
        ("set", (*TRAINED, "reject")),
        ("options", ("reject", "evaluate")),
    ):
        if each.get(key) is not None and kind not in of:
            raise ValueError(f"stage {name}: {key} has no effect on kind {kind}; it is of {', '.join(of)}. Remove it.")
    if kind in TRAINED and not each.get("config"):
        raise ValueError(f"stage {name}: config is missing; it is a YAML file beside {STAGES}. Name one.")
    if kind not in TRAINED and not each.get("model"):
        raise ValueError(f"stage {name}: model is missing; it is a stage before, a directory or a hub id. Name one.")
    if kind == "evaluate" and each.get("config"):
        raise ValueError(f"stage {name}: config has no effect on kind evaluate; its options say all. Remove it.")
    if kind == "reject" and each.get("set") and not each.get("config"):
        raise ValueError(f"stage {name}: set has no effect on kind reject without a config. Name one, or remove it.")
    config = None
    if each.get("config"):
        config = (place / str(each["config"])).resolve()
        if not config.is_file():
            raise ValueError(
                f"stage {name}: config is {str(each['config'])!r}; there is no such file in {place}. Correct it."
            )
    for key in ("set", "options"):
        if not isinstance(each.get(key) or {}, dict):
            raise ValueError(f"stage {name}: {key} is {each[key]!r}; it is a mapping of names to values. Correct it.")
    rows = each.get("rows") or []
    rows = rows if isinstance(rows, list) else [rows]
    options = {
        key: str(place / value) if key in PATHS and isinstance(value, str) and (place / value).is_file() else value
        for key, value in (each.get("options") or {}).items()
    }
    return Stage(
        name,
        kind,
        config,
        _resolved(name, "model", each.get("model"), place, names),
        _resolved(name, "teacher", each.get("teacher"), place, names),
        tuple(str(_resolved(name, "rows", path, place, names)) for path in rows),
        dict(each.get("set") or {}),
        options,
    )


def _resolved(stage: str, key: str, value: Any, place: Path, names: Sequence[str]) -> str | None:
    """A stage's name as it is, a path beside stages.yaml as a whole one."""
    if value is None or str(value) in names:
        return None if value is None else str(value)
    text = str(value)
    for path in (place / text, Path(text)):
        if path.exists():
            return str(path.resolve())
    if key != "rows" and text.count("/") == 1 and not text.startswith((".", "/")) and Path(text).suffix != ".jsonl":
        return text  # of the hub
    what = "file" if key == "rows" else "directory"
    raise ValueError(
        f"stage {stage}: {key} is {text!r}; there is neither a stage of that name nor such a {what} in {place}."
        f"{_nearest(text, names)}"
    )


def _with_overrides(stages: list[Stage], overrides: Sequence[str]) -> list[Stage]:
    found = {stage.name: stage for stage in stages}
    for override in overrides:
        name, colon, rest = override.partition(":")
        key, equals, text = rest.partition("=")
        if not (colon and equals and key):
            raise ValueError(f"--set {override!r}: it reads STAGE:section.setting=value, such as zero:run.steps=10.")
        if name not in found:
            raise ValueError(
                f"--set {override!r}: there is no stage {name!r}, but {', '.join(found)}.{_nearest(name, found)}"
            )
        stage = found[name]
        value = {key: text if text.lstrip().startswith("#") else read_yaml(text)}
        if stage.kind in TRAINED or (stage.config is not None and "." in key):
            found[name] = replace(stage, set={**stage.set, **value})
        else:
            found[name] = replace(stage, options={**stage.options, **value})
    return list(found.values())


def _in_order(stages: list[Stage]) -> list[Stage]:
    """As listed, but each after those that it needs."""
    names = [stage.name for stage in stages]
    sorter = TopologicalSorter({stage.name: [value for _, value in stage.named if value in names] for stage in stages})
    try:
        sorter.prepare()
    except CycleError as error:
        raise ValueError(
            f"stages need each other in a circle: {' <- '.join(error.args[1])}. Take one of these inputs out."
        ) from None
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=names.index)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return sorted(stages, key=lambda stage: order.index(stage.name))


def _comparisons(listed: Any, stages: Sequence[Stage], place: Path) -> tuple[tuple[str, tuple[str, str]], ...]:
    trained = [stage.name for stage in stages if stage.kind in TRAINED]
    found = []
    for each in listed:
        pair = each.get("stages") if isinstance(each, dict) else None
        if not isinstance(pair, list) or len(pair) != 2 or any(name not in trained for name in pair):
            raise ValueError(
                f"compare in {place / STAGES} has {each!r}; it is a title and two stages of {', '.join(trained)}. Correct it."
            )
        found.append((str(each.get("title", " and ".join(pair))), (pair[0], pair[1])))
    return tuple(found)


def _check(stage: Stage, plan: Plan) -> None:
    """Raises ValueError: an input is of the wrong kind, an option is none, or a setting is wrong."""
    wanted: dict[str, Callable[[Stage], bool]] = {
        "model": lambda source: source.kind in TRAINED,
        "teacher": lambda source: source.kind in TRAINED,
        "rows": lambda source: source.kind == "reject",
    }
    for key, value in stage.named:
        source = plan.stage(value)
        if source is not None and not wanted[key](source):
            kinds = "reject" if key == "rows" else " or ".join(TRAINED)
            raise ValueError(
                f"stage {stage.name}: {key} is {value}, a stage of kind {source.kind}; it must be one of kind {kinds}. "
                "Name another."
            )
        if (
            key == "model"
            and stage.kind == "reject"
            and stage.config is None
            and (source is None or source.kind == "sft")
        ):
            raise ValueError(
                f"stage {stage.name}: config is missing; the model {value} is no run of kind train, which would have a template, "
                "rewards and questions. Name a YAML of reinforcement learning."
            )
    for name in stage.options:
        if name in OWN_OPTIONS or name not in OPTIONS[stage.kind]:
            raise ValueError(
                f"stage {stage.name}: options has {name!r}, which is no option of grpo {stage.kind} that a stage may set."
                f"{_nearest(name, OPTIONS[stage.kind])}"
            )
    step = stage.options.get("step")
    if step is not None and not isinstance(step, int):
        raise ValueError(f"stage {stage.name}: step is {step!r}; it is the number of a step. Correct it.")
    for name in ("model.name", "teacher.name", "data.name", "run.dir", "run.resume"):
        if name in stage.set and (
            name.startswith("run.") or getattr(stage, "rows" if name == "data.name" else name[:-5])
        ):
            raise ValueError(f"stage {stage.name}: set has {name}, which the path itself sets. Remove it.")
    try:
        plan.settings(stage)
    except ValueError as error:
        raise ValueError(f"stage {stage.name}: {error}") from None
