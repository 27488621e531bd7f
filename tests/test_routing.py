"""Rewards that are asked about some questions only: `only`, by a column of the data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import QUESTIONS, tiny_config

from grpo import Trainer
from grpo.config import RewardConfig
from grpo.scoring.reward import Reward, resolve_rewards
from grpo.scoring.scorer import Scorer
from grpo.system.jsonl import read_jsonl, read_metrics
from grpo.types import Completion, Group, Prompt


def length(completion: str) -> float:
    return float(len(completion))


def positive(completion: str, answer: str) -> float:
    return float(int(answer) > 0)  # an exception where there is no number


def positive_row(answer: str) -> str | None:
    return None if answer.isdigit() else "no number"


positive.check_row = positive_row


class InProcess:
    """Counts how often it is loaded and called; in a worker the count would be another one."""

    in_process = True

    def __init__(self) -> None:
        self.__name__ = "here"
        self.calls: list[list[str]] = []
        self.num_loads = 0

    def load(self) -> None:
        self.num_loads += 1

    def __call__(self, completions: list[str], log_metric: Any, log_extra: Any) -> list[float | None]:
        self.calls.append(completions)
        log_metric("sum", 3.0)
        log_extra("note", [f"of {text}" for text in completions])
        if completions[0] == "bug":
            raise KeyError("oh")
        return [None if text == "?" else float(len(text)) for text in completions]


def group(row: int, kind: Any, *texts: str, answer: str = "5") -> Group:
    columns = {"question": "q", "answer": answer, "kind": kind}
    return Group(Prompt(row, [1], "q", "", columns), [Completion([2], [0.0], text, "stop") for text in texts])


def scorer(*rewards: Reward, columns: tuple[str, ...] = ("question", "answer", "kind")) -> Scorer:
    return Scorer(
        list(rewards), columns=columns, max_completion_tokens=9, num_workers=1, timeout_seconds=10, memory_gib=4
    )


def lists(values: Any) -> list[list[float | None]]:
    return [[None if math.isnan(each) else each for each in row] for row in values.tolist()]


ROUTED = (
    Reward(positive, only={"kind": ["maths", "1"]}),
    Reward(length, only={"kind": ["chat"]}, weight=0.5),
)


def test_a_reward_is_asked_about_its_questions_only_and_the_others_take_no_harm():
    groups = [
        group(0, "maths", "ab", "c"),
        group(1, "chat", "abcd", "ab", answer="none at all"),
        group(2, 1, "a", "b"),  # a number is compared as JSON has it
        group(3, "other", "a", "b"),
    ]
    with scorer(*ROUTED) as own:
        scores = own.score(groups)
    assert lists(scores.values["positive"]) == [[1, 1], [None, None], [1, 1], [None, None]]
    assert lists(scores.values["length"]) == [[None, None], [4, 2], [None, None], [None, None]]
    assert lists(scores.rewards) == [[1, 1], [2, 1], [1, 1], [None, None]]


def test_a_row_is_checked_by_the_rewards_that_are_asked_about_it():
    rows = [
        {"question": "q", "answer": answer, "kind": kind}
        for answer, kind in (("5", "maths"), ("x", "maths"), ("x", "chat"))
    ]
    with scorer(*ROUTED) as own:
        assert own.check_rows(rows) == [None, "no number", None]
        assert own.check_routes(rows, "questions") == []
        rows.append({**rows[0], "kind": "other"})
        assert own.check_routes(rows, "questions") == [
            "1 of the questions have no reward (rewards.*.only): nothing is learned from them"
        ]
        with pytest.raises(
            ValueError, match=r"^rewards\.1\.only of length is \{'kind': \['chat'\]\}; not one of the 2 questions is so"
        ):
            own.check_routes(rows[:2], "questions")
    with pytest.raises(
        ValueError, match=r"^rewards\.\*\.only of length goes by the column 'kid'; .* did you mean kind\?"
    ):
        scorer(Reward(length, only={"kid": ["chat"]}))
    with scorer(Reward(length, weight=0), Reward(positive, only={"kind": ["maths"]})) as own:
        assert len(own.check_routes([rows[0], rows[3]], "questions")) == 1


def test_a_function_of_the_process_is_called_there_with_what_workers_are_given():
    here = InProcess()
    with scorer(Reward(length, weight=0), Reward(here, only={"kind": ["chat"]})) as own:
        assert here.num_loads == 1  # before a step waits for it
        with own.begin(3) as scoring:
            scoring.add(0, group(0, "chat", "abc", "?"))
            assert here.calls == [["abc", "?"]]
            scoring.add(2, group(2, "maths", "x", "y"))
            scoring.add(1, group(1, "chat", "z", "zz"))
            scores = scoring.result()
            told = dict(scoring.finished())
        assert lists(scores.values["here"]) == [[3, None], [1, 2], [None, None]]
        assert lists(scores.values["length"]) == [[3, 1], [1, 2], [1, 1]]
        assert scores.metrics == {"sum": [3.0, 3.0]}
        assert scores.extras[0] == [{"here": {"note": "of abc"}}, {"here": {"note": "of ?"}}]
        assert {p: lists(each.values["here"]) for p, each in told.items()} == {
            0: [[3, None]],
            1: [[1, 2]],
            2: [[None, None]],
        }
        with pytest.raises(
            Exception, match=r"(?s)Reward here raised an exception.*completions: \['bug'\].*KeyError: 'oh'"
        ):
            own.score([group(0, "chat", "bug")])
    with scorer(Reward(InProcess())) as own:  # none for the workers
        assert lists(own.score([group(0, "chat", "abc")]).rewards) == [[3]]


def test_groups_that_no_reward_is_asked_about_are_told_too():
    with scorer(*ROUTED) as own, own.begin(1) as scoring:
        scoring.add(0, group(0, "other", "a"))
        assert [(p, lists(scores.rewards)) for p, scores in scoring.finished()] == [(0, [[None]])]


def test_a_yaml_may_name_one_value_or_several():
    config = RewardConfig(function="format", only={"kind": "maths", "level": [1, True, "x"]})
    assert config.only == {"kind": ["maths"], "level": ["1", "true", "x"]}
    (reward,) = resolve_rewards([config])
    assert reward.is_asked({"kind": "maths", "level": 1})
    assert reward.is_asked({"kind": "maths", "level": True})
    assert not reward.is_asked({"kind": "maths", "level": 2})
    assert not reward.is_asked({"kind": "maths"})
    assert RewardConfig(function="format").only == {}


def test_a_run_pays_each_kind_with_its_own_reward(tmp_path: Path):
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[:4]]
    rows = [{**row, "kind": "maths"} for row in rows[:2]] + [
        {"question": "Say something.", "answer": None, "kind": "chat"}
    ] * 2
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        tmp_path / "run",
        data={"name": str(data), "kind_column": "kind"},
        rollout={"num_prompts": 4, "group_size": 4, "max_completion_tokens": 32},
        rewards=[
            {"function": "accuracy", "only": {"kind": "maths"}},
            {"function": "format", "only": {"kind": ["chat"]}},
        ],
        run={"steps": 1},
    )
    Trainer(config).train()
    (step,) = (each for each in read_metrics(tmp_path / "run" / "metrics.jsonl") if "time/step" in each)
    assert "kind/maths/accuracy" in step
    assert "kind/chat/format" in step
    assert "kind/chat/accuracy" not in step
    assert "kind/maths/format" not in step
    assert step["reward/unknown"] == 0
    for row in read_jsonl(tmp_path / "run" / "completions.jsonl"):
        own, other = ("accuracy", "format") if row["kind"] == "maths" else ("format", "accuracy")
        assert row["reward"] == row["rewards"][own]
        assert row["rewards"][other] is None


def test_a_reward_of_a_program_takes_only_as_a_file_says_it():
    asked = Reward(length, only={"kind": "maths", "level": 1})
    assert asked.is_asked({"kind": "maths", "level": "1"})
    assert not any(asked.is_asked({"kind": kind, "level": "1"}) for kind in ("math", "a", "th", ""))
    assert Reward(length, only={"level": [1, "2"]}).is_asked({"level": "2"})
    (of_file,) = resolve_rewards([RewardConfig(function="format", only={"level": [1, "2"]})])
    assert of_file.only == Reward(length, only={"level": [1, "2"]}).only


@pytest.mark.parametrize("weight", [math.nan, math.inf, "0.5", None, True])
def test_a_weight_that_is_no_number_is_refused(weight: Any):
    with pytest.raises(ValueError, match=r"reward length has weight=.*; it is a finite number"):
        Reward(length, weight=weight)
