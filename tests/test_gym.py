"""Tasks of reasoning-gym: rows, verdicts, and that nothing a model wrote is run."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import reasoning_gym
from helpers import tiny_config

from grpo import Trainer
from grpo.config import DataConfig
from grpo.data.gym import make_rows
from grpo.data.rows import load_rows

installed = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
SUM = {"size": 6, "seed": 3, "min_terms": 2, "max_terms": 2, "max_digits": 1}


def verdict(row: dict[str, Any], answer: str) -> float:
    return reasoning_gym(f"<answer>{answer}</answer>", row["task"], row["task_args"], row["entry"])


def test_without_the_package_a_task_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.data.gym.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("reasoning-gym is not installed")):
        load_rows(DataConfig(name="reasoning_gym:chain_sum"))


@installed
def test_rows_are_the_same_for_a_seed_and_held_out_ones_are_those_that_come_next():
    config = DataConfig(name="reasoning_gym:chain_sum", args=SUM)
    rows = load_rows(config)
    assert [row["question"] for row in rows] == [row["question"] for row in load_rows(config)]
    held_out = load_rows(config, evaluation=True)
    twice_as_many = make_rows("reasoning_gym:chain_sum", {**SUM, "size": 12})
    assert [row["question"] for row in rows + held_out] == [row["question"] for row in twice_as_many]
    assert len(rows) == len(held_out) == 6
    assert all(verdict(row, row["answer"]) == 1.0 for row in rows)
    assert all(verdict(row, str(int(row["answer"]) + 1)) == 0.0 for row in rows)
    assert reasoning_gym(rows[0]["answer"], rows[0]["task"], SUM, rows[0]["entry"]) == 0.0  # without a tag


@installed
def test_an_answer_that_the_verifier_trips_over_is_wrong():
    (row,) = make_rows("reasoning_gym:prime_factorization", {"size": 1})
    assert verdict(row, row["answer"]) == 1.0
    assert verdict(row, "two") == 0.0  # a ValueError there


@installed
@pytest.mark.parametrize("task", ["countdown", "puzzle24"])
def test_an_arithmetic_answer_is_verified_and_code_never_reaches_the_verifier(task: str, tmp_path: Path):
    (row,) = make_rows(f"reasoning_gym:{task}", {"size": 1, "seed": 1})
    assert verdict(row, row["answer"]) == 1.0
    trace = tmp_path / "trace"
    for answer in (f"open({str(trace)!r}, 'w')", f"__import__('pathlib').Path({str(trace)!r}).touch()"):
        assert verdict(row, answer) == 0.0
    assert not trace.exists()
    assert verdict(row, "9**9**9**9") == 0.0  # would take for ever
    assert verdict(row, row["answer"] + "+ 0" * 100) == 0.0


@installed
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("reasoning_gym:chain_sun", {}, "reasoning-gym has no such task. Did you mean chain_sum? It has "),
        (
            "reasoning_gym:chain_sum",
            {"nonsense": 3},
            "data.args.nonsense is 3; the task chain_sum has no such setting. It has min_terms, max_terms, ",
        ),
        ("reasoning_gym:chain_sum", {"min_terms": 9, "max_terms": 3}, "max_terms must be >= min_terms"),
        ("reasoning_gym:n_queens", {}, "runs the answer as Python code"),
        ("reasoning_gym:polynomial_multiplication", {}, "runs the answer as Python code"),
        ("reasoning_gym:game_of_life_halting", {"size": 8}, "gives the answer '0' full marks where it is wrong"),
        ("reasoning_gym:complex_arithmetic", {"size": 8}, "gives the answer 'nan' full marks where it is wrong"),
        ("reasoning_gym:coin_flip", {"size": 8}, "gives the answer '0' full marks where it is wrong"),
    ],
)
def test_what_is_no_task_or_would_run_answers_is_refused(name: str, args: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_rows(name, args)


@installed
def test_a_run_trains_on_a_task_with_its_verifier(tmp_path: Path):
    config = tiny_config(
        tmp_path,
        data={"name": "reasoning_gym:chain_sum", "args": SUM},
        evaluation={"num_questions": 2},
        rewards=[{"function": "reasoning_gym"}, {"function": "format"}],
        scoring={"timeout_seconds": 60},
        run={"steps": 1},
    )
    trainer = Trainer(config)
    metrics = trainer.train_step()
    assert 0 <= metrics["reward/reasoning_gym"] <= 1
    assert metrics["scoring/timeouts"] == 0
