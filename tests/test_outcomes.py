"""What becomes of completions: by hand, and in runs on one process and two against their completions.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import launch, tiny_config

from grpo import Trainer
from grpo.observe.metric_names import METRICS
from grpo.observe.metrics import Meter, measure_texts
from grpo.scoring.answers import OUTCOMES, count_outcomes, outcome
from grpo.system.jsonl import read_jsonl
from grpo.text import aha


def row(verdict: float | None, *, end: str = "stop", **rewards: float | None) -> dict[str, Any]:
    values = {"format": 1.0, "countdown": verdict, **rewards}
    return {"completion": "x", "question": "q", "finish_reason": end, "num_tokens": 2, "rewards": values}


@pytest.mark.parametrize(
    ("completion", "is_so"),
    [
        (row(1.0), "right"),
        (row(0.5), "wrong"),
        (row(0.0, end="calls"), "wrong"),  # it wanted more tool calls, and was not cut off
        (row(None), "unknown"),
        (row(1.0, end="length"), "truncated"),  # neither right nor wrong
        (row(None, end="length"), "truncated"),
        (row(1.0, countdown_trials=0.0), "right_first"),  # the answer has it in a form that no trial has
        (row(1.0, countdown_trials=1.0), "right_first"),
        (row(1.0, countdown_trials=2.0), "right_later"),
        (row(1.0, countdown_trials=None), "right"),
        (row(0.0, countdown_trials=5.0), "wrong"),
        (row(1.0, end="length", countdown_trials=2.0), "truncated"),
    ],
)
def test_what_becomes_of_a_completion(completion: dict[str, Any], is_so: str):
    assert outcome(completion) == is_so


def test_shares_add_up_over_processes_also_where_one_has_no_completion_of_a_sort():
    rows = [
        *[row(1.0, countdown_trials=trials) for trials in (1.0, 3.0, 3.0)],
        *[row(0.0, countdown_trials=1.0)] * 2,
        row(1.0, end="length", countdown_trials=9.0),
        row(None, countdown_trials=None),
        row(1.0, countdown_trials=2.0),
    ]
    meters = [Meter(), Meter(), Meter()]
    for meter, part in zip(
        meters, (rows[:3], rows[3:], []), strict=True
    ):  # one has no wrong ones, the last has nothing
        measure_texts(meter, part, aha.Words(aha.WORD_LISTS), forms=False)
    metrics = meters[0].reduce(SimpleNamespace(gather=lambda _: meters))  # type: ignore[arg-type]
    eighths = {"right": 0, "right_first": 1, "right_later": 3, "wrong": 2, "truncated": 1, "unknown": 1}
    assert {name: value for name, value in metrics.items() if name.startswith("outcome/")} == {
        f"outcome/{name}": value / 8 for name, value in eighths.items()
    }


def test_without_trials_right_is_one_share_and_every_share_has_its_formula():
    assert list(count_outcomes([row(1.0)])) == [
        f"outcome/{name}" for name in ("right", "wrong", "truncated", "unknown")
    ]
    assert [name for name in METRICS if name.startswith("outcome/")] == [f"outcome/{name}" for name in OUTCOMES]


def by_length(completion: str) -> float | None:
    """A verdict that has all values."""
    return (1.0, 0.0, None)[len(completion) % 3]


def countdown_trials(completion: str) -> float:
    return float(len(completion) % 4)


def trainer_of(run: Path) -> Trainer:
    rollout = {"num_prompts": 8, "group_size": 8, "max_completion_tokens": 24}
    return Trainer(tiny_config(run, rollout=rollout), rewards=[by_length, countdown_trials])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_has_the_shares_of_its_completions(tmp_path: Path, processes: int):
    if processes == 1:
        trainer_of(tmp_path / "run").train()
    else:
        launch("worker_outcomes.py", str(tmp_path / "run"), processes=processes)
    steps = {each["step"]: each for each in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())}
    completions = read_jsonl(tmp_path / "run/completions.jsonl")
    told = set()
    for step in (1, 2):
        counts: Counter[str] = Counter()
        own = [each for each in completions if each["step"] == step]
        for each in own:
            length = len(each["completion"])
            if each["finish_reason"] == "length":
                counts["truncated"] += 1
            elif length % 3:
                counts[("wrong", "unknown")[length % 3 - 1]] += 1
            else:
                counts["right_later" if length % 4 > 1 else "right_first"] += 1
        assert len(own) == 64
        assert {name: steps[step][f"outcome/{name}"] for name in OUTCOMES} == {
            name: counts[name] / 64 for name in OUTCOMES
        }
        told |= counts.keys()
    assert told == {*OUTCOMES} - {"right"}
