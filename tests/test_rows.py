"""Cells, conversations, sources: what becomes question and answer, and what is refused by name."""

import json
import pickle
import re
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, tiny_config
from test_sft import sft_config
from transformers import AutoTokenizer

from grpo import SupervisedTrainer, Trainer
from grpo.config import Config, DataConfig
from grpo.data.order import PromptOrder
from grpo.data.prompts import build_prompts
from grpo.data.rows import MESSAGES, canonical, complete, load_rows, prepare_rows
from grpo.text.plural import counted
from grpo.types import Prompt

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


def prepared(*rows: dict[str, Any], reads_answer: bool = True, **settings: Any) -> list[dict[str, Any]]:
    config = DataConfig(**settings)
    regex = config.answer_regex
    return prepare_rows(rows, config, answer_regex=regex, setting="data.name", reads_answer=reads_answer)


def test_what_lies_deeper_in_a_cell_is_named_with_dots():
    row = {"prompt": [USER], "reward_model": {"ground_truth": 7, "style": "rule"}, "tags": ["a", "b"]}
    own = {"question_template": "{tags.1}: {prompt.0.content}", "answer_column": "reward_model.ground_truth"}
    (found,) = prepared(row, **own)
    assert (found["question"], found["answer"]) == ("b: 1+1?", "7")
    (dotted,) = prepared({"question": "q", "a.b": "1", "a": {"b": "2"}}, answer_column="a.b")
    assert dotted["answer"] == "1"  # a column of the very name
    (missing,) = prepared({"question": "q", "a": None}, answer_column="a.b")
    assert missing["answer"] == ""


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"question": "q", "answer": {"value": "3", "kind": "int"}},
            {},
            "data.answer_column is 'answer'; answer of row 0 of data.name is a dictionary with value, kind, not a text. Name "
            "what is inside, such as answer.value, in data.answer_column",
        ),
        (
            {"question": ["a", "b"], "answer": "1"},
            {},
            "question of row 0 of data.name is a list of 2 (str), not a text. Name what",
        ),
        (
            {"question": "q", "answer": [ASSISTANT]},
            {},
            "is a conversation of 1 messages, not a text. Name what is inside, such as answer.0.content",
        ),
        (
            {"question": "q", "answer": b"2"},
            {},
            "answer of row 0 of data.name is bytes data, not a text. Name another column",
        ),
        ({"question": "q", "answer": []}, {}, "is an empty list, not a text"),
        (
            {"nums": [USER], "answer": "1"},
            {"question_template": "of {nums}"},
            "data.question_template is 'of {nums}'; nums of row 0",
        ),
        (
            {"question": "q", "a": {"b": 1}},
            {"answer_column": "a.c"},
            "a of row 0 of data.name has b. Name one of them.",
        ),
        (
            {"question": "q", "a": [1]},
            {"answer_column": "a.1"},
            "a of row 0 of data.name is a list of 1. Name one by its number",
        ),
        (
            {"question": "q", "a": "x"},
            {"answer_column": "a.b"},
            "a of row 0 of data.name is str data, and there is nothing in it",
        ),
        (
            {"question": "\ud83d", "answer": "1"},
            {},
            "question of row 0 of data.name holds '\\ud83d', half of a character",
        ),
        ({"question": float("nan"), "answer": "1"}, {}, "row 0 of data.name has no question. Drop the row."),
    ],
)
def test_a_cell_without_a_text_is_refused_by_name(row: dict[str, Any], settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepared(row, **settings)


def test_a_structured_answer_that_no_reward_reads_stays():
    row = {"question": "q", "tests": ["assert f(2) == 4"]}
    (found,) = prepared(row, answer_column="tests", reads_answer=False)
    assert (found["tests"], found["answer"]) == (["assert f(2) == 4"], '["assert f(2) == 4"]')


def test_a_conversation_goes_through_the_chat_template_with_its_system_message(tokenizer):
    turns = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And 2+2?", "tool_calls": None}]
    rows = prepared({"prompt": turns, "answer": "4"}, question_column="prompt")
    (prompt,), _ = build_prompts(rows, tokenizer, DataConfig(template="chat"))
    expected = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And 2+2?"}]
    assert prompt.text == tokenizer.apply_chat_template(expected, tokenize=False, add_generation_prompt=True)
    assert (rows[0]["question"], rows[0][MESSAGES]) == ("And 2+2?", expected)


def test_the_last_turn_may_be_the_gold_answer(tokenizer):
    rows = prepared({"messages": [USER, ASSISTANT]}, question_column="messages", answer_column="messages.-1.content")
    (prompt,), _ = build_prompts(rows, tokenizer, DataConfig(template="chat"))
    assert prompt.text == tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert rows[0]["answer"] == "2"


def test_a_conversation_of_one_message_fits_into_any_template(tokenizer):
    rows = prepared({"prompt": [USER], "answer": "2"}, question_column="prompt")
    (prompt,), _ = build_prompts(rows, tokenizer, DataConfig(template="none"))
    assert prompt.text == "1+1?"


@pytest.mark.parametrize(
    ("turns", "settings", "message"),
    [
        (
            [USER, ASSISTANT],
            {"template": "chat"},
            "ends with a message of the assistant, and the assistant is to answer",
        ),
        ([SYSTEM], {"template": "chat"}, "ends with a message of the system"),
        (
            [SYSTEM, USER],
            {"template": "r1_zero"},
            "data.template is 'r1_zero'; the question '1+1?' is a conversation of 2",
        ),
        (
            [SYSTEM, USER],
            {"template": "chat", "system_prompt": "x"},
            "has a system message of its own. Remove data.system_prompt",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {"template": "chat"},
            "the content of message 0 in row 0 of data.name is a list of 1 (dict), not a text",
        ),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(tokenizer, turns: Any, settings: Any, message: str):
    def build() -> None:
        rows = prepared({"prompt": turns, "answer": "2"}, question_column="prompt")
        build_prompts(rows, tokenizer, DataConfig(**settings))

    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_column_that_some_rows_lack_is_missing_there():
    assert complete([{"a": 1}, {"b": 2}]) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_rows_have_the_same_bytes_for_the_same_contents_only():
    row, other = prepared(
        {"question": "q", "answer": 1, "x": [1, {"y": 2.5, 3: date(1945, 5, 8)}]},
        {"question": "r", "x": b"1", "answer": 2},
    )
    assert canonical(row) == canonical(pickle.loads(pickle.dumps(row)))
    different = [{**row, "answer": "2"}, {**row, "x": [1, {"y": "2.5"}]}, other, {**other, "x": b"2"}]
    assert len({canonical(each) for each in [row, *different]}) == 5


# ---- several sources -------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    for name, number in (("a", 6), ("b", 2)):
        rows = [{"question": f"{name}{n}", "answer": f"#### {n}", name: n} for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.csv").write_text("problem,gold\nc0,x\n")
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.csv")]
    c = {"name": names[2], "question_column": "problem", "answer_column": "gold", "answer_regex": "(.*)"}
    return [{"name": names[0]}, {"name": names[1], "split": "train[:1]"}, c]


def test_sources_are_joined_and_each_may_have_its_own_columns(sources: list[dict[str, Any]]):
    rows = load_rows(DataConfig(name=sources, answer_regex="#### (.*)"))
    assert [row["question"] for row in rows] == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "c0"]
    assert (rows[7]["answer"], rows[6]["answer"], rows[6]["a"], rows[5]["b"]) == ("x", "0", None, None)
    assert rows[6]["data_name"] == sources[1]["name"] + ":train[:1]"
    held_out = DataConfig(name="unused", eval_name=sources[:1], eval_answer_regex="#### (.*)")
    assert len(load_rows(held_out, evaluation=True)) == 6
    with pytest.raises(ValueError, match=r"data.eval_name is missing"):
        load_rows(DataConfig(name=sources), evaluation=True)


def test_a_source_is_blamed_by_its_number(sources: list[dict[str, Any]]):
    broken = [sources[0], {**sources[2], "answer_column": "nothing"}]
    with pytest.raises(
        ValueError, match=r"data.name.1.answer_column is 'nothing'; row 0 of data.name.1.name has the columns"
    ):
        load_rows(DataConfig(name=broken))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": []}, "data.name is []"),
        ({"name": ["a", "a"]}, "Name 'a' once"),
        ({"name": [{"name": "a", "weight": 1}, "b"]}, "data.name has a weight for 1 of its 2 sources"),
        ({"name": ["a"], "revision": "v1"}, "data.revision is 'v1'; data.name lists several sources"),
        ({"name": "a", "eval_name": [{"name": "a", "weight": 1}]}, "data.eval_name has a weight"),
        (
            {"name": ["a", {"name": "b", "wieght": 1}]},
            "data.name.1.wieght is not a setting. Did you mean data.name.1.weight?",
        ),
        ({"name": ["a", {"name": "b", "weight": 0}]}, "data.name.1.weight is 0; input should be greater than 0"),
        ({"name": ["reasoning_gym:chain_sum"]}, "stand alone"),
        ({"name": [{"name": "a", "answer_regex": "x"}]}, "data.name.0.answer_regex is 'x'; its first group"),
        ({"name": 5}, "data.name is 5; input should be a valid string. Correct data.name."),
    ],
)
def test_a_wrong_list_of_sources_is_refused(data: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(model={"name": "m"}, run={"dir": "d", "steps": 1}, data=data)


def of_two_sources(weights: dict[str, float], world_size: int = 1, rank: int = 0) -> PromptOrder:
    names = ["large"] * 8 + ["small"] * 2
    prompts = [Prompt(n, [n], "", "", {"data_name": name}) for n, name in enumerate(names)]
    return PromptOrder(prompts, seed=0, rank=rank, world_size=world_size, weights=weights)


def test_weights_share_out_each_epoch_and_no_question_comes_again_before_all_of_its_source():
    order = of_two_sources({"large": 1, "small": 1})
    dealt = [prompt.row for prompt in order.draw(40)]
    for epoch in range(4):
        assert sum(row >= 8 for row in dealt[10 * epoch :][:10]) == 5
    # 20 of the large source's 8 prompts: in any two rounds of it each comes twice, in the next at most once more
    large = Counter(row for row in dealt if row < 8)
    assert set(large.values()) == {2, 3}
    assert Counter(row for row in dealt if row >= 8) == {8: 10, 9: 10}


def test_a_weighted_order_depends_only_on_seed_and_position_whatever_the_processes():
    whole = [prompt.row for prompt in of_two_sources({"large": 1, "small": 3}).draw(32)]
    resumed = of_two_sources({"large": 1, "small": 3})
    resumed.position = 12
    assert [prompt.row for prompt in resumed.draw(20)] == whole[12:]
    parts = [of_two_sources({"large": 1, "small": 3}, 2, rank).draw(32) for rank in (0, 1)]
    assert [prompt.row for pair in zip(*parts, strict=True) for prompt in pair] == whole


def test_without_weights_the_order_is_that_of_one_source():
    prompts = of_two_sources({"large": 1, "small": 1}).prompts
    plain = PromptOrder(prompts, seed=0, rank=0, world_size=1)
    assert sorted(prompt.row for prompt in plain.draw(10)) == list(range(10))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"large": 1, "small": 0.001}, "the weight 0.001 for small; that is not one of 10 questions"),
        ({"large": 1, "small": 1, "gone": 1}, "the weight 1 for gone; not one question of it is left"),
    ],
)
def test_a_weight_without_effect_is_refused(weights: dict[str, float], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        of_two_sources(weights)


def is_said(completion: str, answer: str) -> float:
    return float(answer in completion)


def test_held_out_rows_that_are_given_are_read_as_those_they_stand_in_for(tmp_path: Path):
    ours = [{"question": "1+1?", "answer": "two #### 2"}]
    theirs = [{"problem": "1+2?", "gold": "three (3)"}]

    def held_out(given: list[dict[str, Any]], **data: Any) -> tuple[str, str]:
        settings = {"answer_regex": "#### (.*)", **data}
        config = tiny_config(
            tmp_path / "run", data=settings, evaluation={"num_questions": 1}, rollout={"num_prompts": 1}
        )
        run = Trainer(config, rewards=[is_said], train_dataset=ours, eval_dataset=given)
        (prompt,) = run.held_out.prompts
        run.close()
        return prompt.columns["question"], prompt.columns["answer"]

    named = {"eval_name": "unused", "eval_question_template": "Say {problem}", "eval_answer_column": "gold"}
    assert held_out(theirs, **named, eval_answer_regex=r"\((.*)\)") == ("Say 1+2?", "3")
    assert held_out(theirs, **named) == ("Say 1+2?", "three (3)"), "null: the column is the bare answer"
    assert held_out(ours) == ("1+1?", "2"), "without a name the training rows say it"
    with pytest.raises(
        ValueError, match=r"^data\.eval_answer_regex is .*it finds no group in the answer of row 0 of eval"
    ):
        held_out(theirs, **named, eval_answer_regex="#### (.*)")


# ---- what rewards ask for --------------------------------------------------------------------------------------------


def by_level(completion: str, level: int | None) -> float:
    return float(level or 0)


def trainer(tmp_path: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None) -> Trainer:
    questions = len(held_out or [])
    config = tiny_config(tmp_path / "run", evaluation={"num_questions": questions}, rollout={"num_prompts": 1})
    return Trainer(config, rewards=[by_level], train_dataset=rows, eval_dataset=held_out)


def test_a_single_question_or_row_is_counted_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(tmp_path, [WITH], [WITH]).close()
    lines = capsys.readouterr().out.splitlines()
    assert {"1 training question", "1 held-out question"} <= set(lines)
    trainer(tmp_path, [WITH, WITHOUT], [WITH, WITHOUT]).close()
    lines = capsys.readouterr().out.splitlines()
    assert {"2 training questions", "2 held-out questions"} <= set(lines)
    config = sft_config(tmp_path / "rows", evaluation={"num_rows": 0}, training={"rows_per_update": 1})
    for number, said in ((1, "1 row"), (2, "2 rows")):
        rows = [{"prompt": f"{n}?", "completion": "2"} for n in range(number)]
        SupervisedTrainer(config, train_dataset=rows).close()
        assert said in capsys.readouterr().out.splitlines()
    assert [counted(number, "rows") for number in (0, 1, 1000)] == ["0 rows", "1 row", "1,000 rows"]


WITH = {"question": "1+1?", "answer": "2", "level": 3}
WITHOUT = {"question": "1+2?", "answer": "3"}


@pytest.mark.parametrize("rows", [[WITH, WITHOUT], [WITHOUT, WITH]])
def test_a_row_without_a_column_that_a_reward_asks_for_is_said_and_given_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]]
):
    run = trainer(tmp_path, rows, rows)
    gap = rows.index(WITHOUT)
    said = f"reward by_level asks for 'level'; 1 of 2 training questions have none (the first: row {gap})"
    printed = capsys.readouterr().out
    assert said in printed
    assert f"1 of 2 held-out questions have none (the first: row {gap})" in printed
    assert {run.train_step()["reward/by_level"] for _ in range(2)} == {0.0, 3.0}
    run.close()


@pytest.mark.parametrize(
    ("rows", "held_out", "message"),
    [
        ([WITH], [WITHOUT], "reward by_level asks for 'level'; only the training questions have a column of that name"),
        ([WITHOUT], [WITH], "reward by_level asks for 'level'; only the held-out questions have a column of that name"),
        ([WITHOUT], None, "reward by_level asks for 'level'; there is"),
    ],
)
def test_a_column_that_is_nowhere_or_only_in_a_part_is_refused_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Any, held_out: Any, message: str
):
    monkeypatch.setattr("grpo.trainer.Policy", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, rows, held_out)


def test_a_run_draws_from_its_sources_by_their_weights(tmp_path: Path, sources: list[dict[str, Any]]):
    data = {"name": [{**sources[0], "weight": 1}, {**sources[1], "weight": 3}], "answer_regex": "#### (.*)"}
    run = Trainer(tiny_config(tmp_path / "run", data=data))
    drawn = Counter(prompt.columns["data_name"] for prompt in run.prompts.draw(7))
    assert drawn == {sources[0]["name"]: 2, sources[1]["name"] + ":train[:1]": 5}
    run.close()
