"""What a stage came to, read from its files: counts, and its answers to held-out questions before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from grpo.pipeline.stages import TRAINED, Plan, Stage
from grpo.scoring.answers import by_question, is_right
from grpo.scoring.statistics import Estimate, Values, estimate
from grpo.system.jsonl import iterate_jsonl, read_metrics
from grpo.text.language import consistency
from grpo.text.readable import foreign_words, language_share

Row = dict[str, Any]

MEASURES = ("right", "mixed", "consistency", "length")
"""Of answers to held-out questions: share that is right; share with words of another script, of those that have words; share of
the thought's words in the question's language; tokens."""
SHARES = MEASURES[:3]


def counts(plan: Plan, stage: Stage) -> dict[str, int]:
    """How much a finished stage has done."""
    if stage.kind == "reject":
        found = json.loads(plan.output(stage).with_suffix(".json").read_text(encoding="utf-8"))
        dropped = {f"dropped: {rule}": number for rule, number in found["first"].items()}
        return {"samples": found["num_samples"], "rows": found["num_kept"], **dropped}
    if stage.kind == "evaluate":
        return {"results": len(json.loads(plan.output(stage).read_text(encoding="utf-8"))["results"])}
    metrics = read_metrics(plan.directory(stage) / "metrics.jsonl")
    steps = max((row["step"] for row in metrics), default=0)
    rows = int(sum(row.get("supervised/rows", 0) for row in metrics))
    if stage.kind == "sft":
        return {"updates": steps, "rows learned": rows}
    rollout = plan.settings(stage)
    return {"steps": steps, "completions": steps * rollout["rollout.num_prompts"] * rollout["rollout.group_size"]}


def answers(directory: Path) -> dict[str, list[Row]]:
    """A run's answers to held-out questions, `before` its first step and `after` its last; empty if it asked none."""
    path = directory / "evaluations.jsonl"
    if not path.is_file():
        return {}
    first: list[Row] = []
    last: list[Row] = []
    for row in iterate_jsonl(path, ("step",)):
        if row["step"] == 0:
            first.append(row)
        if last and last[0]["step"] != row["step"]:
            last = []
        last.append(row)
    return {name: rows for name, rows in (("before", first), ("after", last)) if rows}


def evaluation(plan: Plan, stage: Stage) -> dict[str, Any] | None:
    """{before, after: {questions, samples, measure: {value, low, high}}} of a stage that makes a model."""
    if stage.kind not in TRAINED:
        return None
    found = {when: measured(rows) for when, rows in answers(plan.directory(stage)).items()}
    return found or None


def measured(rows: Sequence[Row]) -> dict[str, Any]:
    """The measures of some answers with their 95 % intervals over questions; see statistics.estimate."""
    questions = by_question(rows)
    found = estimate(columns(questions))
    return {
        "questions": len(questions),
        "samples": max(map(len, questions)),
        **{name: asdict(value) for name, value in found.items()},
    }


def columns(questions: Sequence[Sequence[Row]]) -> dict[str, Values]:
    """(Q,) the mean of each measure over a question's answers, NaN where none has it."""
    found = {name: [[_measure(name, row) for row in rows] for rows in questions] for name in MEASURES}
    return {name: np.array([_mean(values) for values in lists]) for name, lists in found.items()}


def _measure(name: str, row: Row) -> float | None:
    text, question = row["completion"], row["question"]
    if name == "right":
        right = is_right(row)
        return None if right is None else float(right)
    if name == "mixed":
        return None if language_share(text, question) is None else float(is_mixed(row))
    return consistency(text, question) if name == "consistency" else float(row["num_tokens"])


def is_mixed(row: Row) -> bool:
    """Whether an answer has words of a script that its question does not have."""
    return bool(foreign_words(row["completion"], row["question"]))


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def difference(left: Sequence[Row], right: Sequence[Row]) -> dict[str, Estimate]:
    """left - right of each measure, over the questions that both answered, which are drawn together.

    Returns:
        Empty if they share no question.
    """
    mine, theirs = ({rows[0]["question"]: rows for rows in by_question(each)} for each in (left, right))
    shared = [question for question in mine if question in theirs]
    if not shared:
        return {}
    one, other = (columns([each[question] for question in shared]) for each in (mine, theirs))
    # a difference is no share: the interval of equal ones would be Wilson's under the names of statistics.NO_SHARES' complement
    deltas = {name: one[name] - other[name] for name in MEASURES}
    found = estimate(deltas)
    for name, values in deltas.items():
        if name in found and np.ptp(values[~np.isnan(values)]) == 0:
            found[name] = Estimate(found[name].value, found[name].value, found[name].value)
    return found
