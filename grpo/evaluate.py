"""How well the policy answers held-out questions."""

from __future__ import annotations

import math
from typing import Any

from grpo.distributed import Processes
from grpo.rollout import Generator
from grpo.scoring import Scorer
from grpo.types import Group, Prompt, Sampling, Scores


def evaluate(
    prompts: list[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    processes: Processes,
    sampling: Sampling,
    seed: int,
) -> list[dict[str, Any]]:
    """Answer each prompt once, the prompts shared out over the processes; a row per answer, in the order of `prompts`.

    Every process gets all rows.
    """
    mine = prompts[processes.rank :: processes.world_size]
    with scorer.begin(len(mine)) as scoring:
        groups = generator.sample(mine, sampling, num_completions=1, seed=seed, on_group=scoring.add)
        scores = scoring.result()
    rows = [row for part in processes.gather(completion_rows(groups, scores)) for row in part]
    place = {prompt.row: i for i, prompt in enumerate(prompts)}
    return sorted(rows, key=lambda row: place[row["row"]])


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
