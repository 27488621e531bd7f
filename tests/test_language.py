"""Language consistency as a measure: by hand, beside the reward, of each kind of question, in a run and in its report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import language as reward
from helpers import QUESTIONS, tiny_config

from grpo import Trainer
from grpo.observe.metric_names import METRICS
from grpo.report.panels import formula, sections
from grpo.system.jsonl import read_jsonl, read_metrics
from grpo.text.language import consistency, evaluation_metrics, tally

ENGLISH = "How many coins are left?"
CHINESE = "还剩多少枚硬币？"


def row(completion: str, question: str = ENGLISH, kind: str | None = None) -> dict[str, Any]:
    return {"completion": completion, "question": question, **({} if kind is None else {"kind": kind})}


ROWS = [
    row("<think>Wait, check. 检查</think> 九", kind="math"),  # 2 of 4 words; mixed
    row("<think>Nine are left.</think> 9 对", kind="math"),  # all of the thought, but mixed
    row("<think>9 + 5 = 14</think> 14", kind="math"),  # no words: nobody can tell
    row("还剩九枚", CHINESE, kind="chat"),
    row("剩 nine", CHINESE),  # 1 of 2, and a single Latin word in Chinese is a term
]


def test_shares_by_hand_of_all_and_of_each_kind():
    assert tally(ROWS) == {
        "language/consistency": (0.5 + 1 + 1 + 0.5, 4),
        "language/consistency/math": (0.5 + 1, 2),
        "language/consistency/chat": (1, 1),
        "language/mixed": (2, 4),
        "language/mixed/math": (2, 2),
        "language/mixed/chat": (0, 1),
    }
    assert evaluation_metrics(ROWS)["language/eval_consistency/math"] == 0.75
    assert evaluation_metrics(ROWS)["language/eval_mixed"] == 0.5
    assert tally([row("14")]) == {}


def test_the_measure_is_the_reward_where_there_are_words():
    rng = random.Random(0)
    pieces = [
        "Wait",
        "检查",
        "и так",
        "$x_{九}$",
        "```\nx = 九\n```",
        " 14 ",
        "</think>",
        "<think>",
        "x",
        "\\frac",
        ". ",
        "π",
    ]
    seen = set()
    for _ in range(400):
        text = " ".join(rng.choices(pieces, k=rng.randint(1, 6)))
        question = rng.choice([ENGLISH, CHINESE, "14?"])
        measured = consistency(text, question)
        assert reward(text, question) == pytest.approx(0.0 if measured is None else measured)
        seen.add(measured)
    assert {None, 0.0, 1.0} < seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on questions of two kinds, and one that has none."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[:9]]
    kinds = ["sum", "story"] * 4 + [None]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({**each, "sort": kind}) + "\n" for each, kind in zip(rows, kinds, strict=True)))
    config = tiny_config(
        folder / "run",
        data={"name": str(data), "eval_name": str(data), "kind_column": "sort"},
        rollout={"num_prompts": 9, "group_size": 2, "max_completion_tokens": 48},
        evaluation={"num_questions": 9, "every_steps": 1, "temperature": 1.0},
    )
    Trainer(config).train()
    return folder / "run"


def test_a_run_has_metrics_of_each_kind_and_they_add_up(run: Path):
    steps = [each for each in read_metrics(run / "metrics.jsonl") if "time/step" in each]
    completions = read_jsonl(run / "completions.jsonl")
    assert {each.get("kind") for each in completions} == {"sum", "story", None}
    for metrics in steps:
        own = [each for each in completions if each["step"] == metrics["step"]]
        for kind in ("sum", "story"):
            of_kind = [each for each in own if each.get("kind") == kind]
            assert len(of_kind) == 8
            mean = sum(each["rewards"]["format"] for each in of_kind) / 8
            assert metrics[f"kind/{kind}/format"] == pytest.approx(mean)
            assert metrics[f"kind/{kind}/length"] == pytest.approx(sum(each["num_tokens"] for each in of_kind) / 8)
            assert metrics[f"kind/{kind}/reward"] == pytest.approx(sum(each["reward"] for each in of_kind) / 8)
        for name, (total, size) in tally(own).items():
            assert metrics[name] == pytest.approx(total / size)
        assert "language/consistency" in metrics  # no reward pays for it
    held_out = read_jsonl(run / "evaluations.jsonl")
    last = [each for each in read_metrics(run / "metrics.jsonl") if "eval/accuracy" in each][-1]
    own = [each["rewards"]["format"] for each in held_out if each["step"] == last["step"] and each.get("kind") == "sum"]
    assert last["kind/sum/eval_format"] == pytest.approx(sum(own) / len(own))
    assert "language/eval_consistency" in last


def test_the_report_draws_them_and_every_one_has_its_formula(run: Path):
    names = {name for each in read_metrics(run / "metrics.jsonl") for name in each}
    panels = {section.title: section.panels for section in sections(names)}
    drawn = {name for panel in panels["In which language does it think?"] for name in [*panel.lines, *panel.points]}
    assert {"language/consistency", "language/eval_consistency", "language/mixed"} <= drawn
    assert any(name.startswith("language/consistency/") for name in drawn)
    by_kind = {panel.title for panel in panels["What of each kind of question?"]}
    assert {"Reward by kind", "Accuracy by kind", "Held-out accuracy by kind", "Length by kind"} <= by_kind
    assert not [name for name in names if name.startswith(("kind/", "language/")) and not formula(name)]
    assert formula("kind/sum/length") == METRICS["kind/<question_kind>/length"]
    assert formula("language/eval_mixed/story") == METRICS["language/eval_mixed/<question_kind>"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "sort",
            ["a", "b"],
            r"^data\.kind_column is 'sort'; not one training question has something in it\. .* question, answer, kind",
        ),
        (
            "kind",
            list(map(str, range(40))),
            r"^data\.kind_column is 'kind'; the questions are of 40 kinds, such as '0', and",
        ),
        (
            "kind",
            [" a", "b"],
            r"^data\.kind_column is 'kind'; a question is of the kind ' a', which cannot be part of a",
        ),
    ],
)
def test_a_column_that_does_not_tell_kinds_is_refused(tmp_path: Path, column: str, values: list[str], message: str):
    data = tmp_path / "data.jsonl"
    lines = [{"question": f"What is {n}+1?", "answer": str(n + 1), "kind": kind} for n, kind in enumerate(values)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_config(tmp_path / "run", data={"name": str(data), "kind_column": column}))
