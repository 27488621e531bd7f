"""Samples -> the results of an evaluation: numbers with their intervals, a table, a transcript."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo.evaluation.asked import PROMPT_FORMATS, SOURCES, Settings, Task
from grpo.evaluation.sample_file import Samples
from grpo.scoring.answers import OF_THE_QUESTION, by_question, columns_of, is_right
from grpo.scoring.statistics import estimate
from grpo.system.files import replace_text, to_json
from grpo.system.terminal import say
from grpo.text.plural import counted

QUESTION_KEYS = ("benchmark", "template", "row")
"""What tells the questions of a samples.jsonl apart."""


# ---- the numbers -----------------------------------------------------------------------------------------------------


def conclude(
    task: Task, results: list[dict[str, Any]], settings: Settings, out: Path, *, samples: Samples, seconds: float | None
) -> list[dict[str, Any]]:
    """All results so far, with that of a task whose samples are all there."""
    found = _result(task, settings, samples, seconds=seconds)
    results = [*(each for each in results if not _is_of(each, task)), found]
    replace_text(out / "results.json", to_json(as_json(settings, results), indent=1))
    say(f"{task.benchmark}, {task.template}: {_in_words(found)}")
    return results


def _result(task: Task, settings: Settings, samples: Samples, *, seconds: float | None) -> dict[str, Any]:
    questions = by_question(samples.of(task.key))
    found = {rows[0]["row"]: [row["sample"] for row in rows] for rows in questions}
    assert found == {prompt.row: list(range(task.num_samples)) for prompt in task.prompts}, (
        "samples.jsonl does not hold each sample of each question once"
    )
    return {
        **task.key,
        "num_questions": len(questions),
        "num_ungradable": task.num_ungradable,
        "num_samples": task.num_samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_completion_tokens": settings.max_completion_tokens,
        "answer_from": None if settings.environment else SOURCES[PROMPT_FORMATS[task.template].source],
        "seconds": seconds,
        "metrics": _metrics(questions),
        "by": {name: parts for name in OF_THE_QUESTION if (parts := _parts(questions, name))},
    }


def _metrics(questions: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in estimate(columns_of(questions)).items()}


def _parts(questions: list[list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """The questions of each level, or of each subject."""
    values = sorted({str(rows[0][name]) for rows in questions if name in rows[0]})
    parts = {value: [rows for rows in questions if str(rows[0].get(name)) == value] for value in values}
    return {value: {"num_questions": len(part), "metrics": _metrics(part)} for value, part in parts.items()}


def _is_of(result: dict[str, Any], task: Task) -> bool:
    return all(result[name] == value for name, value in task.key.items())


def seconds_of(results: Iterable[dict[str, Any]], task: Task) -> float | None:
    """What an earlier start has measured; None if it was interrupted, and with it the measuring."""
    return next((each["seconds"] for each in results if _is_of(each, task)), None)


def earlier_results(out: Path) -> list[dict[str, Any]]:
    """Raises ValueError if they cannot be read."""
    path = out / "results.json"
    if not path.exists():
        return []
    try:
        results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--out is {str(out)!r}; {path.name} there cannot be read ({error}). Restore it, or remove it: its numbers come "
            "again from the samples, but for the seconds."
        ) from None
    return results


def as_json(settings: Settings, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"model": settings.model, "settings": asdict(settings), "results": results}


# ---- in words --------------------------------------------------------------------------------------------------------


def _in_words(result: dict[str, Any]) -> str:
    found, name = result["metrics"].get(_main(result)), _main(result)
    right = "no verdict is known" if found is None else f"{name} {_interval(found, name)}"
    return right if result["seconds"] is None else f"{right} ({result['seconds']:.1f} s)"


def _main(result: dict[str, Any]) -> str:
    """The metric by which templates are compared."""
    return "reward" if _is_played(result) else "pass@1"


def _is_played(result: dict[str, Any]) -> bool:
    """Whether an environment has answered."""
    return "turns" in result["metrics"]


def _interval(found: dict[str, float], name: str = "pass@1") -> str:
    if name == "reward":
        return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:6.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def report(results: list[dict[str, Any]]) -> str:
    """A table of the results, the best template of each benchmark marked, and that one by level and subject."""
    header = PLAYED if any(map(_is_played, results)) else ASKED
    best = _best_templates(results)
    several = len(results) > len(best)
    rows = [header, *(_cells(result, marked=several and best[result["benchmark"]] is result) for result in results)]
    for result in best.values():
        for name, parts in result["by"].items():
            rows += [_part_cells(result, name, value, part) for value, part in parts.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{name}: the answer is {text}" for name, text in _sources(results).items()]
    marked = ["* the best template of its benchmark"] if several else []
    return "\n".join([*lines, "", *marked, *notes, *_left_out(results)])


ASKED = (
    *("benchmark", "template", "answers", "pass@1 [95 %]", "pass@k", "cons@n", "format", "cut off", "unknown"),
    "tokens",
)
PLAYED = (
    *("environment", "template", "episodes", "reward [95 %]", "reward 1", "turns", "ended", "out of turns", "cut off"),
    *("unknown", "tokens"),
)
"""With an environment. Reward 1: the share of episodes that have at least that."""


def _best_templates(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        before = best.setdefault(result["benchmark"], result)
        if _value(result) > _value(before):
            best[result["benchmark"]] = result
    return best


def _value(result: dict[str, Any]) -> float:
    return result["metrics"].get(_main(result), {"value": -math.inf})["value"]


def _cells(result: dict[str, Any], *, marked: bool) -> tuple[str, ...]:
    asked = f"{result['num_questions']:,} x {result['num_samples']}"
    return (result["benchmark"], result["template"] + " *" * marked, asked, *_measured(result["metrics"]))


def _part_cells(result: dict[str, Any], name: str, value: str, part: dict[str, Any]) -> tuple[str, ...]:
    asked = f"{part['num_questions']:,} x {result['num_samples']}"
    return (f"  {result['benchmark']} {name} {value}", result["template"], asked, *_measured(part["metrics"]))


def _measured(metrics: dict[str, Any]) -> tuple[str, ...]:
    if "turns" in metrics:
        return (
            _interval(metrics["reward"], "reward") if "reward" in metrics else "-",
            f"{metrics['pass@1']['value']:.1%}" if "pass@1" in metrics else "-",
            f"{metrics['turns']['value']:.2f}",
            *(f"{metrics[name]['value']:.1%}" for name in ("ended", "out_of_turns", "truncated", "unknown")),
            f"{metrics['length']['value']:,.0f}",
        )
    largest = max((name for name in metrics if name.startswith("pass@")), key=lambda name: int(name[5:]), default="")
    agreed = next((name for name in metrics if name.startswith("cons@")), "")
    at_most = "-" if largest in ("", "pass@1") else f"{metrics[largest]['value']:.1%} @{largest[5:]}"
    return (
        _interval(metrics["pass@1"]) if "pass@1" in metrics else "-",
        at_most,
        f"{metrics[agreed]['value']:.1%} @{agreed[5:]}" if agreed else "-",
        *(f"{metrics[name]['value']:.1%}" if name in metrics else "-" for name in ("format", "truncated", "unknown")),
        f"{metrics['length']['value']:,.0f}",
    )


def _sources(results: list[dict[str, Any]]) -> dict[str, str]:
    return {result["template"]: result["answer_from"] for result in results if result["answer_from"] is not None}


def _left_out(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {counted(number, 'questions')} left out, because the gold answer cannot be graded"
        for name, number in {result["benchmark"]: result["num_ungradable"] for result in results}.items()
        if number
    ]


def transcript(rows: list[dict[str, Any]]) -> str:
    """Each question with the first answer to it in each template; for a benchmark of a few questions."""
    parts = []
    for own in by_question(rows):
        parts.append(f"\n{own[0]['question']}\n  gold answer: {own[0]['answer']}")
        for template in dict.fromkeys(row["template"] for row in own):
            samples = [row for row in own if row["template"] == template]
            num_right = sum(is_right(row) is True for row in samples)
            parts.append(f"  {template}: right {num_right} of {len(samples)} times; the first answer:")
            parts += _written(samples[0])
    return "\n".join(parts)


def _written(row: dict[str, Any]) -> list[str]:
    """An answer, and between its lines what tools and an environment said."""
    turns = row.get("turns") or [{"role": "assistant", "content": row["completion"]}]
    return [
        f"    {'|' if turn['role'] == 'assistant' else '<'} {line}"
        for turn in turns
        for line in turn["content"].strip().split("\n")
    ]
