"""What counts as right, and evaluation within a run: its numbers, and that it leaves the training alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, tiny_config

from grpo import Trainer, rewards
from grpo.scoring.answers import MANNERS, evaluation_rows, is_right, summarize, verdict_name
from grpo.system.jsonl import read_jsonl
from grpo.types import Completion, Group, Prompt, Scores


def test_the_verdict_is_that_of_accuracy_wherever_it_stands_and_else_of_the_first_reward():
    assert verdict_name(["format", "accuracy"]) == "accuracy"
    assert verdict_name(iter(["code", "format"])) == "code"
    assert verdict_name(["format", "countdown_search", "countdown"]) == "countdown"
    assert verdict_name(["format", "language"]) == "format"
    assert set(rewards.__all__) >= MANNERS


@pytest.mark.parametrize(
    ("value", "right"),
    [(1.0, True), (sum([0.1] * 10), True), (0.999, False), (0.0, False), (-1.0, False), (2.0, True), (None, None)],
)
def test_right_is_a_verdict_of_one_and_an_unknown_one_is_neither(value: float | None, right: bool | None):
    assert is_right({"rewards": {"format": 0.0, "accuracy": value}}) is right
    assert is_right({"rewards": {"number_in_text": value, "format": 0.0}}) is right


def rows_of(verdicts: list[list[float | None]]) -> list[dict[str, Any]]:
    """Rows of questions 0, 1, ... with these verdicts on their samples."""
    return [
        {"row": q, "sample": g, "rewards": {"accuracy": value}, "num_tokens": 10 * (q + 1), "finish_reason": "stop"}
        for q, values in enumerate(verdicts)
        for g, value in enumerate(values)
    ]


def test_metrics_of_several_samples_are_worked_out_per_question():
    metrics = summarize(rows_of([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    assert metrics["eval/accuracy"] == metrics["eval/pass@1"] == 0.5
    assert metrics["eval/pass@2"] == pytest.approx(2 / 3)
    # samples of a question are not independent: the means of questions, 0.5, 0 and 1, have the variance 0.25
    assert metrics["eval/accuracy_stderr"] == pytest.approx((0.25 / 3) ** 0.5)
    assert metrics["eval/pass@1_low"] < 0.5 < metrics["eval/pass@1_high"]
    assert metrics["eval/length_mean"] == 20


def test_the_error_of_one_sample_each_is_that_of_the_samples():
    metrics = summarize(rows_of([[1.0], [0.0], [0.0], [0.0]]))
    assert metrics["eval/accuracy_stderr"] == pytest.approx((0.25 * 0.75 * 4 / 3 / 4) ** 0.5)
    assert "eval/pass@2" not in metrics


def test_an_unknown_verdict_is_left_out_of_the_metrics():
    metrics = summarize(rows_of([[1.0, None], [0.0, 0.0], [0.0, None]]))
    assert metrics["eval/pass@1"] == pytest.approx(1 / 3)
    assert metrics["eval/pass@2"] == 0.5  # of the first two questions; nobody knows of the third
    assert "eval/pass@1" not in summarize(rows_of([[None]]))


EVALUATED = {
    "rewards": [{"function": "accuracy"}, {"function": "format"}],
    "data": {"eval_name": str(TINY / "test.jsonl")},
    "rollout": {"num_prompts": 4, "group_size": 4, "max_completion_tokens": 40},
    "run": {"steps": 3},
}
DRAWN = {"num_questions": 6, "num_samples": 4, "temperature": 0.6, "top_p": 0.95, "every_steps": 1}


def trained(directory: Path, **evaluation: Any) -> Trainer:
    sections = {**EVALUATED, "evaluation": evaluation, "run": {**EVALUATED["run"], "dir": str(directory)}}
    trainer = Trainer(tiny_config(directory, **sections))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trained(tmp_path_factory.mktemp("evaluate") / "run", **DRAWN)


def test_evaluating_after_every_step_changes_no_bit_of_the_training(evaluated: Trainer, tmp_path: Path):
    never = trained(tmp_path / "never", num_questions=0)
    for name, weight in never.policy.lm.state_dict().items():
        assert torch.equal(weight, evaluated.policy.lm.state_dict()[name]), name

    def training(trainer: Trainer) -> list[dict[str, Any]]:
        rows = [row for row in trainer.log.metrics() if "reward/mean" in row]
        told = ("time/", "throughput/", "memory/")
        return [{name: value for name, value in row.items() if not name.startswith(told)} for row in rows]

    assert len(training(never)) == 3
    assert training(evaluated) == training(never)
    texts = [[row["completion"] for row in read_jsonl(t.directory / "completions.jsonl")] for t in (evaluated, never)]
    assert texts[0] == texts[1]


def test_held_out_questions_are_answered_several_times_before_during_and_after(evaluated: Trainer):
    rows = read_jsonl(evaluated.directory / "evaluations.jsonl")
    places = [(row["step"], row["row"], row["sample"]) for row in rows]
    assert places == [(step, q, g) for step in range(4) for q in range(6) for g in range(4)]
    for step in range(4):
        (metrics,) = [row for row in evaluated.log.metrics() if row["step"] == step and "eval/pass@1" in row]
        right = [row["rewards"]["accuracy"] for row in rows if row["step"] == step]
        assert metrics["eval/pass@1"] == metrics["eval/accuracy"] == pytest.approx(sum(right) / 24)
        assert metrics["eval/pass@4"] == pytest.approx(sum(max(right[4 * q : 4 * q + 4]) for q in range(6)) / 6)
    assert len({row["completion"] for row in rows if row["step"] == 0 and row["row"] == 0}) > 1


def test_rows_of_an_evaluation_have_level_and_subject_where_the_data_has_them():
    completion = Completion([1, 2], [-0.1, -0.1], "x", "stop")
    columns = [{"question": "q", "answer": "1", "level": 3, "subject": "Algebra"}, {"question": "r", "answer": "2"}]
    groups = [Group(Prompt(i, [1], "", "", each), [completion] * 2) for i, each in enumerate(columns)]
    values = torch.tensor([[1.0, 0.0], [0.0, math.nan]])
    first, second, third, fourth = evaluation_rows(groups, Scores(values, {"accuracy": values}, 0, 0))
    assert (first["level"], first["subject"], first["sample"], second["sample"]) == (3, "Algebra", 0, 1)
    assert not {"level", "subject"} & (third.keys() | fourth.keys())
    assert fourth["rewards"] == {"accuracy": None}


def test_more_samples_than_greedy_decoding_has_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"^evaluation\.num_samples is 4; at evaluation\.temperature 0 .* Set it to 1, or"
    ):
        tiny_config(tmp_path, evaluation={"num_questions": 8, "num_samples": 4})


def test_samples_without_questions_and_votes_that_are_paid_for_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^evaluation\.num_samples is 4; it has no effect while .*num_questions is 0"):
        tiny_config(tmp_path, evaluation={"num_samples": 4, "temperature": 1.0})
    rewards = [{"function": "accuracy"}, {"function": "vote"}]
    with pytest.raises(ValueError, match=r"^rewards has 'vote' with a weight; .* Give it weight 0"):
        tiny_config(tmp_path, rewards=rewards)
    rewards[1]["weight"] = 0
    tiny_config(tmp_path, rewards=rewards)
