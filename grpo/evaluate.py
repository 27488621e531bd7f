"""How well the policy answers held-out questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from grpo.rollout import Generator
from grpo.scoring import Scorer
from grpo.types import Group, Prompt, Sampling, Scores


def answer(
    prompts: list[Prompt], *, generator: Generator, scorer: Scorer, sampling: Sampling, seed: int
) -> list[dict[str, Any]]:
    """Answer each prompt once; a row per answer."""
    with scorer.begin(len(prompts)) as scoring:
        groups = generator.sample(prompts, sampling, num_completions=1, seed=seed, on_group=scoring.add)
        return completion_rows(groups, scoring.result())


def in_order(parts: list[list[dict[str, Any]]], prompts: list[Prompt]) -> list[dict[str, Any]]:
    """The rows of all processes, in the order of the prompts that they shared."""
    place = {prompt.row: i for i, prompt in enumerate(prompts)}
    return sorted((row for part in parts for row in part), key=lambda row: place[row["row"]])


def completion_rows(groups: list[Group], scores: Scores) -> list[dict[str, Any]]:
    """One JSON-ready row per completion; an unknown reward is null."""
    rows = []
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            rows.append(
                {
                    "row": group.prompt.row,
                    "question": group.prompt.columns["question"],
                    "answer": group.prompt.columns["answer"],
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": len(completion.token_ids),
                    "reward": _null_if_nan(float(scores.rewards[p, g])),
                    "rewards": {name: _null_if_nan(float(values[p, g])) for name, values in scores.values.items()},
                }
            )
    return rows


def training_rows(step: int, groups: list[Group], scores: Scores, advantages: Tensor) -> list[dict[str, Any]]:
    """The same of a training step, with the step and the advantages (P, G); that of an unknown reward is 0."""
    known = advantages.nan_to_num().flatten().tolist()
    rows = completion_rows(groups, scores)
    return [{"step": step, **row, "advantage": advantage} for row, advantage in zip(rows, known, strict=True)]


def verdict_name(names: Iterable[str]) -> str:
    """Of a run's reward functions, the one whose verdict says what is right: `accuracy` if it is there, else the first."""
    names = list(names)
    return "accuracy" if "accuracy" in names else names[0]


def is_right(row: Mapping[str, Any]) -> bool | None:
    """Whether a row of `completion_rows` has the verdict 1; None if the verdict is unknown, which is neither right nor wrong."""
    value = row["rewards"][verdict_name(row["rewards"])]
    return None if value is None else value >= RIGHT


RIGHT = 1 - 1e-9
"""Least value of a verdict that means right; a function may add up parts of 1 in floating point."""


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The eval/ metrics of `evaluate`'s rows."""
    metrics = {}
    for name in rows[0]["rewards"]:
        values = [row["rewards"][name] for row in rows if row["rewards"][name] is not None]
        if values:
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
            metrics[f"eval/{name}"] = mean
            metrics[f"eval/{name}_stderr"] = math.sqrt(variance / len(values))
    metrics["eval/length_mean"] = sum(row["num_tokens"] for row in rows) / len(rows)
    metrics["eval/truncated"] = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    return metrics


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
