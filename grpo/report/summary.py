"""A Run -> the numbers and tables of its page."""

from __future__ import annotations

import math
import re
import shlex
from statistics import fmean
from typing import Any

from pydantic import BaseModel

from grpo.config import Config
from grpo.observe.metric_names import is_bound
from grpo.report.panels import formula
from grpo.report.read import Row, Run, Source
from grpo.scoring.answers import is_right
from grpo.scoring.statistics import wilson
from grpo.system.files import to_json
from grpo.types import VOTE

Interval = tuple[float, float, float]
"""A value and the two ends of its 95 % interval."""


def intervals(run: Run) -> dict[str, dict[int, Interval]]:
    """metric -> step -> value and interval of what was held out: from the answers or, without them, from the standard error."""
    found: dict[str, dict[int, Interval]] = {}
    for row in run.metrics:
        for name in [name for name in row if f"{name}_stderr" in row and is_bound(f"{name}_stderr")]:
            half = 1.96 * row[f"{name}_stderr"]
            found.setdefault(name, {})[row["step"]] = (row[name], row[name] - half, row[name] + half)
        for name in [name for name in row if f"{name}_low" in row and is_bound(f"{name}_low")]:
            found.setdefault(name, {})[row["step"]] = (row[name], row[f"{name}_low"], row[f"{name}_high"])
    for step, rows in _by_step(run.evaluations).items():
        kinds = sorted({row["kind"] for row in rows if "kind" in row})
        parts = {f"kind/{kind}/eval_": [row for row in rows if row.get("kind") == kind] for kind in kinds}
        for prefix, part in {"eval/": rows, **parts}.items():
            for name in part[0]["rewards"].keys() - {VOTE}:  # whose values are names
                interval = _interval(part, name)
                if interval is not None:
                    found.setdefault(f"{prefix}{name}", {})[step] = interval
    return found


VALUE_OF_A_FUNCTION = re.compile(r"reward/(?!mean$|std$)|eval/|kind/.+/(?!length$|reward$)[^/]+$")


def is_share(name: str, runs: list[Run]) -> bool:
    """Whether a metric is told in percent: a share, or a reward function whose values are all between 0 and 1."""
    if formula(name).startswith("share"):
        return True
    values = [row[name] for run in runs for row in run.metrics if name in row]
    return VALUE_OF_A_FUNCTION.match(name) is not None and all(0 <= v <= 1 or not math.isfinite(v) for v in values)


def _by_step(rows: list[Row]) -> dict[int, list[Row]]:
    steps: dict[int, list[Row]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return dict(sorted(steps.items()))


def _interval(rows: list[Row], function: str) -> Interval | None:
    """Of the mean over questions, each of which counts once however often it was answered."""
    questions: dict[int, list[float]] = {}
    for row in rows:
        value = row["rewards"].get(function)
        if value is not None:
            questions.setdefault(row["row"], []).append(value)
    means = [fmean(values) for values in questions.values()]
    if not means or not all(map(math.isfinite, means)):
        return None
    mean = fmean(means)
    if min(means) >= 0 and max(means) <= 1:
        return (mean, *wilson(mean, len(means)))
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in means) / max(len(means) - 1, 1) / len(means))
    return mean, mean - half, mean + half


def held_out(run: Run) -> list[dict[str, Any]]:
    """A row per evaluation within training: functions with intervals, length, share cut off, and which questions are newly
    right or wrong since the first.
    """
    found = intervals(run)
    steps = _by_step(run.evaluations)
    first = _right(next(iter(steps.values()), []))
    table = []
    for step, rows in steps.items():
        now = _right(rows)
        table.append(
            {
                "step": step,
                "questions": len({row["row"] for row in rows}),
                "answers": len(rows),
                "functions": {
                    name: found[f"eval/{name}"].get(step) for name in rows[0]["rewards"] if f"eval/{name}" in found
                },
                "length": fmean(row["num_tokens"] for row in rows),
                "truncated": fmean(row["finish_reason"] == "length" for row in rows),
                "learned": [each for each in now if each in first and now[each] and not first[each]],
                "forgotten": [each for each in now if each in first and first[each] and not now[each]],
            }
        )
    return table


def _right(rows: list[Row]) -> dict[int, bool]:
    """question -> whether it was answered right, by most of its samples; without those whose verdict is unknown."""
    verdicts: dict[int, list[bool]] = {}
    for row in rows:
        verdict = is_right(row)
        if verdict is not None:
            verdicts.setdefault(row["row"], []).append(verdict)
    return {question: fmean(values) > 0.5 for question, values in verdicts.items()}


def headline(run: Run) -> dict[str, Any]:
    """The few numbers on top; a number that the run does not have is null."""
    steps = _by_step(run.evaluations)
    whole = max(map(len, steps.values()), default=0)  # one of fewer rows is being written, or was when the run died
    verdicts = {
        step: interval
        for step, interval in intervals(run).get(run.held_out_metric, {}).items()
        if len(steps.get(step, [])) == whole
    }
    trained = [row for row in run.metrics if "time/step" in row]
    tokens = [row["throughput/rollout"] * row["time/rollout"] for row in trained if "throughput/rollout" in row]
    memory = [row["memory/step"] for row in trained if "memory/step" in row]
    return {
        "verdict": " or ".join(run.verdicts) or run.verdict,
        "before": verdicts.get(min(verdicts)) if verdicts else None,
        "after": verdicts.get(max(verdicts)) if len(verdicts) > 1 else None,
        "evaluated": [min(verdicts), max(verdicts)] if verdicts else None,
        "questions": len({row["row"] for row in steps[min(verdicts)] if row["right"] is not None})
        if verdicts and steps
        else 0,
        "reward": _ends(run, "reward/mean"),
        "accuracy": _ends(run, run.sampled_metric),
        "length": _ends(run, "completion/length_mean"),
        "steps": run.metrics[-1]["step"] if run.metrics else 0,
        "planned": run.config.get("run", {}).get("steps"),
        "seconds": sum(row["time/step"] for row in trained) if trained else None,
        "tokens": round(sum(tokens)) if tokens else None,
        "memory": max(memory) if memory else None,
        "device": run.environment.get("device"),
        "processes": run.environment.get("processes"),
        "model": run.config.get("model", {}).get("name"),
        "data": run.config.get("data", {}).get("name"),
        "template": run.config.get("data", {}).get("template"),
    }


FEW = 5
"""Steps at an end whose mean a headline shows, at most; a tenth of a short run's."""


def _ends(run: Run, name: str) -> tuple[float, float] | None:
    """The means over the first and the last steps."""
    values = [row[name] for row in run.metrics if name in row and math.isfinite(row[name])]
    few = max(1, min(FEW, len(values) // 10))
    return (fmean(values[:few]), fmean(values[-few:])) if values else None


def settings(config: dict[str, Any]) -> dict[str, str]:
    """`section.setting` -> its value as one writes it; of rewards a line each."""
    flat = {}
    for section, values in config.items():
        if section == "rewards":
            flat.update({f"rewards.{item['name'] or item['function']}": _reward(item) for item in values})
        elif isinstance(values, dict):
            flat.update({f"{section}.{key}": _written(value) for key, value in values.items()})
        else:
            flat[section] = shlex.join(values) if section == "command" else _written(values)
    return flat


def _reward(item: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key} {_written(value)}" for key, value in item["args"].items())
    function = f"{item['function']}, " if item["name"] else ""
    wanted = " and ".join(f"{column} is {' or '.join(values)}" for column, values in item.get("only", {}).items())
    only = f", only where {wanted}" if wanted else ""
    return f"{function}weight {item['weight']:g}" + (f", {arguments}" if arguments else "") + only


def _written(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value, ensure_ascii=False)


def defaults() -> dict[str, str]:
    """The same of settings that nobody has to write."""
    sections = {name: item.annotation for name, item in Config.model_fields.items()}
    return settings(
        {
            name: {
                key: value.get_default(call_default_factory=True)
                for key, value in section.model_fields.items()
                if not value.is_required()
            }
            for name, section in sections.items()
            if isinstance(section, type) and issubclass(section, BaseModel)
        }
    )


def index(source: Source) -> dict[str, list[Any]]:
    """What the browser of completions filters by, a list per column. Texts are not needed for that."""
    rows = source.rows
    return {
        "step": [row.get("step") for row in rows],
        "group": [_group(row) for row in rows],
        "sample": [row.get("sample") for row in rows],
        "reward": [_number(row.get("reward")) for row in rows],
        "advantage": [_number(row.get("advantage")) for row in rows],
        "tokens": [row["num_tokens"] for row in rows],
        "right": [_verdict(row) for row in rows],
        "cut": [int(row["finish_reason"] == "length") for row in rows],
    }


def _group(row: Row) -> str:
    """Rows of a group answer the same question of the same set under the same template."""
    return " ".join(str(row[key]) for key in ("benchmark", "template", "row") if key in row)


def _verdict(row: Row) -> int | None:
    verdict = is_right(row)
    return None if verdict is None else int(verdict)


def _number(value: float | None) -> float | None:
    """With the digits that one reads; null where it is unknown or not finite, which JSON cannot say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def columns(run: Run) -> dict[str, Any]:
    """The metrics as a list per name, null where a step lacks it; the mean of the last; the steps at which it was not finite."""
    names = list(dict.fromkeys(name for row in run.metrics for name in row if name != "step"))
    return {
        "steps": [row["step"] for row in run.metrics],
        "values": {name: [_number(row.get(name)) for row in run.metrics] for name in names},
        "last": {name: _number(ends[1]) for name in names if (ends := _ends(run, name))},
        "not_finite": {
            name: steps
            for name in names
            if (steps := [row["step"] for row in run.metrics if not math.isfinite(row.get(name, 0.0))])
        },
    }


def plain(value: Any) -> Any:
    """A tree of JSON values with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
