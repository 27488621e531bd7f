"""What is right: the reward that says it, of a run with several, and of questions of several kinds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FixedGenerator, number_in_text, tiny_config
from test_report import a_run
from test_scoring import make_group, make_scorer

from grpo import Trainer
from grpo.evaluation.arms import verdicts_in
from grpo.inference.inspect import of_those_left
from grpo.rejection.rules import Rules, falls_of_row, pass_rate
from grpo.report.panels import sections
from grpo.report.read import read_runs
from grpo.report.summary import headline
from grpo.scoring.answers import completion_rows, judged, summarize, verdicts_of
from grpo.scoring.reward import Reward
from grpo.system.jsonl import read_jsonl
from grpo.types import Scores

nan = math.nan


def short(completion: str) -> float:
    """Shaping: paid in full for one character."""
    return 1 / len(completion)


def checked(completion: str, answer: str) -> float | None:
    return None if completion == "?" else float(completion == answer)


def run_code(completion: str) -> float | None:
    return None if completion == "?" else float(completion == "code")


def right_of(*groups: Any, rewards: list[Reward], **options: Any) -> list[bool | None]:
    with make_scorer(*rewards, columns=["question", "answer", "kind"], **options) as scorer:
        return [row["right"] for row in completion_rows(list(groups), scorer.score(list(groups)))]


def test_the_reward_that_is_named_says_what_is_right_and_else_the_first():
    group, rewards = make_group(["1", "18", "?"], kind="maths"), [Reward(short), Reward(checked)]
    assert right_of(group, rewards=rewards) == [True, False, True]
    assert right_of(group, rewards=rewards, verdict="checked") == [False, True, None]


def test_of_several_names_the_first_that_can_tell_of_a_question_is_its_verdict():
    groups = [make_group(["18", "code", "?"], kind="maths"), make_group(["18", "code", "?"], row=1, kind="code")]
    rewards = [Reward(checked, only={"kind": ["maths"]}), Reward(run_code, only={"kind": ["code"]})]
    unknown = [None] * 3
    assert right_of(*groups, rewards=rewards) == [True, False, None, *unknown]
    assert right_of(*groups, rewards=rewards, verdict="run_code") == [*unknown, False, True, None]
    for names in (["checked", "run_code"], ["run_code", "checked"]):
        assert right_of(*groups, rewards=rewards, verdict=names) == [True, False, None, False, True, None]


def test_an_answer_that_the_verdict_of_its_question_cannot_judge_is_not_judged_by_another():
    values = {"a": torch.tensor([[1.0, nan], [nan, nan]]), "b": torch.tensor([[0.0, 0.0], [1.0, nan]])}
    torch.testing.assert_close(judged(values, ["a", "b"]), torch.tensor([[1.0, nan], [1.0, nan]]), equal_nan=True)
    torch.testing.assert_close(judged(values, ["b", "a"]), values["b"], equal_nan=True)
    assert judged({"a": torch.zeros(0, 4), "b": torch.zeros(0, 4)}, ["a", "b"]).shape == (0, 4)


def test_without_rewards_nobody_can_tell_and_of_no_groups_there_are_no_rows():
    for rows in (2, 0):
        groups, scores = [make_group(["a", "b"])] * rows, Scores(torch.ones(rows, 2, dtype=torch.float64), {}, 0, 0)
        assert [row["right"] for row in completion_rows(groups, scores)] == [None] * 2 * rows


def test_a_verdict_is_one_of_the_rewards():
    assert verdicts_of(None, []) == verdicts_of("accuracy", []) == []  # supervised training that grades nothing
    assert verdicts_of(None, ["format", "mine"]) == ["mine"]
    for wrong in ("cheked", ["checked", "cheked"], []):
        with pytest.raises(
            ValueError, match=r"^scoring\.verdict is .*; the rewards of this run are short, checked\. Name"
        ):
            make_scorer(short, checked, verdict=wrong)


@pytest.mark.parametrize("verdict", ["number", ["number", "nomber"]])
def test_a_run_whose_verdict_is_missing_is_refused_before_the_model_is_loaded(tmp_path: Path, verdict: Any):
    config = tiny_config(tmp_path / "run", scoring={"verdict": verdict}, model={"name": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match=r"^scoring\.verdict is .*; the rewards of this run are number_in_text\. Name"):
        Trainer(config, rewards=[number_in_text])


# ---- who goes by it --------------------------------------------------------------------------------------------------

FIXED = {"algorithm": {"kl_coef": 0.0, "max_sampling_gap": 100}}


def half(completion: str) -> float:
    """Of FixedGenerator's numbers."""
    return float(float(completion) > 0.5)


def a_mixed_run(tmp_path: Path, **sections: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """After a step, over questions of two kinds with a reward each, and what it wrote of each completion."""
    rows = [{"question": f"{number}?", "answer": "1", "kind": "ab"[number % 2]} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        tmp_path / "run", **FIXED, data={"name": str(tmp_path / "rows.jsonl"), "kind_column": "kind"}, **sections
    )
    rewards = [Reward(half, name=f"of_{kind}", only={"kind": [kind]}) for kind in "ab"]
    trainer = Trainer(config, rewards=rewards)
    trainer.collector.generator = FixedGenerator()
    trainer.train_step()
    trainer.close()
    return trainer, read_jsonl(tmp_path / "run/completions.jsonl")


DYNAMIC = {"num_prompts": 8, "group_size": 4, "max_completion_tokens": 24, "max_oversampling": 4}


def test_dynamic_sampling_takes_questions_of_every_kind(tmp_path: Path):
    """By the one reward that says what is right questions of the other kind had never signal, and were never trained on."""
    _, rows = a_mixed_run(tmp_path, rollout=DYNAMIC)
    used = [row for row in rows if row["in_batch"]]
    assert {row["kind"] for row in used} == {"a", "b"}
    groups = [used[i : i + 4] for i in range(0, len(used), 4)]
    assert len(groups) == 8
    assert all(len({row["reward"] for row in group}) > 1 for group in groups)
    assert {row["right"] for row in rows if row["kind"] == "a"} == {True, False}
    assert {row["right"] for row in rows if row["kind"] == "b"} == {None}  # nobody named its reward a verdict


def test_questions_of_every_kind_count_as_solved_by_their_verdict(tmp_path: Path):
    rollout = {
        "num_prompts": 16,
        "group_size": 4,
        "max_completion_tokens": 24,
        "solved_share": 0.5,
        "solved_from": 0.75,
    }
    trainer, rows = a_mixed_run(tmp_path, rollout=rollout, scoring={"verdict": ["of_a", "of_b"]})
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    solved = {group[0]["row"] for group in groups if sum(row["right"] for row in group) >= 3}
    assert set(trainer.state.solved) == solved
    assert {row["kind"] for row in rows if row["row"] in solved} == {"a", "b"}


def judged_row(number: int, kind: str, right: bool | None) -> dict[str, Any]:
    value = None if right is None else float(right)
    rewards = {"shaping": 1.0, "of_a": value if kind == "a" else None, "of_b": value if kind == "b" else None}
    asked = {"row": number, "sample": 0, "question": "How many?", "answer": "3"}
    written = {
        "completion": "<think> two words </think> <answer> 3 </answer>",
        "num_tokens": 8,
        "finish_reason": "stop",
    }
    return asked | written | {"rewards": rewards, "right": right}


ANSWERS = [judged_row(0, "a", True), judged_row(1, "b", True), judged_row(2, "b", False), judged_row(3, "a", None)]


def test_pass_rates_count_every_kind():
    assert summarize(ANSWERS)["eval/pass@1"] == pytest.approx(2 / 3)


def test_a_report_names_the_verdicts_and_shows_the_share_of_both(tmp_path: Path):
    evaluations = [row | {"step": step, "right": row["right"] or step == 2} for step in (0, 2) for row in ANSWERS[:3]]
    metrics = [{"step": step} | summarize([row for row in evaluations if row["step"] == step]) for step in (0, 2)]
    metrics += [{"step": step, "outcome/right": step / 4} for step in range(1, 5)]
    directory = a_run(tmp_path / "run", metrics=metrics, evaluations=evaluations)
    config = tiny_config(tmp_path / "run", scoring={"verdict": ["of_a", "of_b"]})
    (directory / "config.yaml").write_text(config.to_yaml())
    (run,) = read_runs([directory], max_completions=9)
    assert (run.verdict, run.verdicts) == ("of_a", ["of_a", "of_b"])
    found = headline(run)
    assert found["verdict"] == "of_a or of_b"
    assert [found["before"][0], found["after"][0]] == pytest.approx([2 / 3, 1])
    assert found["accuracy"][0] < 0.5 < found["accuracy"][1]
    names = [name for row in metrics for name in row]
    for verdicts, is_drawn in ((run.verdicts, True), (["of_a"], False)):
        panels = [panel for section in sections(names, verdicts=verdicts) for panel in section.panels]
        assert any("eval/pass@1" in panel.points for panel in panels) == is_drawn


def test_a_row_of_an_older_run_is_judged_by_the_rule(tmp_path: Path):
    old = [{name: value for name, value in row.items() if name != "right"} | {"step": 0} for row in ANSWERS]
    (run,) = read_runs([a_run(tmp_path / "run", evaluations=old)], max_completions=9)
    assert [row["right"] for row in run.evaluations] == [True] * 4  # `shaping` is the first that is not about manners


def test_rejection_keeps_what_is_right_of_every_kind():
    required = Rules().required(["shaping", "of_a", "of_b"], ["of_a", "of_b"])
    found = [
        [(fall.rule, fall.detail) for fall in falls_of_row(row, "How many?", Rules(), required)] for row in ANSWERS
    ]
    assert found == [[], [], [("wrong", "of_b 0")], [("unknown", "of_a, of_b")]]
    assert pass_rate(ANSWERS, required) == pytest.approx(2 / 3)


def test_two_arms_are_judged_by_the_verdict_that_each_configuration_names(tmp_path: Path):
    named = [{"function": "format"}, {"function": "accuracy"}]
    config = tiny_config(tmp_path, rewards=named, scoring={"verdict": "format"})
    assert verdicts_in(config) == ["format"]
    assert verdicts_in(tiny_config(tmp_path, rewards=named)) == ["accuracy"]


def test_a_question_of_ones_own_is_judged_without_the_verdicts_that_cannot_be_asked(tmp_path: Path):
    scoring = tiny_config(tmp_path, scoring={"verdict": ["accuracy", "code"]}).scoring
    assert of_those_left(scoring, {"code": ["tests"]}).verdict == ["accuracy"]
    assert of_those_left(scoring, {"code": ["tests"], "accuracy": ["answer"]}).verdict is None
    assert of_those_left(scoring, {}).verdict == ["accuracy", "code"]
