"""data.where: which rows are taken, how many are left out, and what is refused. test_where_cells.py has what is compared."""

import json
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import pytest
from helpers import ROOT, TINY, tiny_config
from test_sft import sft_config
from transformers import AutoTokenizer

from grpo import Trainer
from grpo.check.at_once import check_config
from grpo.cli import reject as reject_command
from grpo.cli import sample as sample_command
from grpo.cli import scale as scale_command
from grpo.config import Config, DataConfig, EnvironmentConfig, SupervisedConfig
from grpo.config.supervised import RowsConfig
from grpo.data.rows import DATA_NAME, load_rows, written_rows
from grpo.data.where import Selection
from grpo.inference.inspect import chosen_rows
from grpo.sft.rows import read_rows
from grpo.sft.trainer import SupervisedTrainer
from grpo.turns.environment import Environment, own_rows

LEVELS = [1, 2, 3, 3, 5, None]
SUBJECTS = ["Algebra", "Geometry", "Algebra", "Geometry", "Algebra", "Algebra"]
ROWS: list[dict[str, Any]] = [
    {
        "question": f"What is {n}+{n}?",
        "answer": str(2 * n),
        "level": level,
        "subject": subject,
        "deep": {"level": level},
    }
    for n, (level, subject) in enumerate(zip(LEVELS, SUBJECTS, strict=True))
]


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return written(tmp_path / "questions.jsonl")


def taken(rows: list[dict[str, Any]]) -> list[int]:
    """The numbers of ROWS."""
    return [int(row["answer"]) // 2 for row in rows]


# ---- what is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"level": 3}, [2, 3]),
        ({"level": "3"}, [2, 3]),
        ({"level": 3.0}, [2, 3]),
        ({"level": [5, "1"]}, [0, 4]),
        ({"subject": "Geometry"}, [1, 3]),
        ({"deep.level": [2]}, [1]),
        ({"level": [1, 3], "subject": "Algebra"}, [0, 2]),
    ],
)
def test_rows_are_kept_in_their_order_that_have_one_of_the_values_in_each_column(
    questions: str, where: dict[str, Any], numbers: list[int]
):
    assert taken(load_rows(DataConfig(name=questions, where=where))) == numbers


def test_a_row_is_counted_for_the_first_column_that_leaves_it_out(questions: str):
    left_out = Counter[str]()
    load_rows(DataConfig(name=questions, where={"subject": "Algebra", "deep.level": [1, 3]}), left_out=left_out)
    assert left_out == {
        "subject has none of the values of data.where": 2,
        "deep.level has none of the values of data.where": 1,
        "deep.level is missing, which data.where asks for": 1,
    }


def test_a_column_with_nothing_in_it_is_no_reason_after_another():
    rows = [{"subject": "Geometry", "level": None}, {"subject": "Algebra", "level": 3}]
    left_out = Counter[str]()
    assert len(list(Selection({"subject": "Algebra", "level": 3}, "w", left_out).kept(rows, "rows"))) == 1
    assert left_out == {"subject has none of the values of w": 1}


def test_a_column_that_some_rows_lack_is_missing_there(tmp_path: Path):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2", "level": 3}]
    left_out = Counter[str]()
    (row,) = load_rows(DataConfig(name=written(tmp_path / "a.jsonl", rows), where={"level": 3}), left_out=left_out)
    assert (row["question"], left_out) == ("b", {"level is missing, which data.where asks for": 1})


def test_rows_that_are_left_out_need_no_question_and_errors_count_rows_of_the_file(tmp_path: Path):
    rows = [{"question": None, "answer": "1", "level": 1}, *ROWS[2:4]]
    name = written(tmp_path / "a.jsonl", rows)
    assert taken(load_rows(DataConfig(name=name, where={"level": 3}))) == [2, 3]
    rows[2] = {**rows[2], "question": None}
    with pytest.raises(ValueError, match=r"row 2 of data\.name has no question"):
        load_rows(DataConfig(name=written(tmp_path / "a.jsonl", rows), where={"level": 3}))


def test_the_split_says_what_is_read_and_where_chooses_from_it(questions: str):
    assert taken(load_rows(DataConfig(name=questions, split="train[:3]", where={"level": [1, 3]}))) == [0, 2]
    with pytest.raises(ValueError, match=r"no row has '5' in level"):
        load_rows(DataConfig(name=questions, split="train[:3]", where={"level": [3, 5]}))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            {"level": [3, 4, 7]},
            "data.where is {'level': [3, 4, 7]}; no row has '4', '7' in level. Its values are '1', '2', '3', '5'. "
            "Correct them, or remove the values.",
        ),
        (
            {"level": "Level 3"},
            "data.where is {'level': 'Level 3'}; none of the 6 rows of data.name has one of these values in level. Its values "
            "are '1', '2', '3', '5'. Correct it.",
        ),
        (
            {"levle": 3},
            "data.where is {'levle': 3}; none of the 6 rows of data.name has anything in levle; the first has question, answer, "
            "level, subject, deep. Name another column.",
        ),
        (
            {"deep.levle": 3},
            "data.where is {'deep.levle': 3}; none of the 6 rows of data.name has anything in deep.levle; the first has level in "
            "deep. Name another column.",
        ),
        (
            {"level": 5, "subject": "Geometry"},
            "data.where is {'level': 5, 'subject': 'Geometry'}; a row has to be so in all of these columns, and none of the 6 "
            "rows of data.name is: 1 by level, 2 by subject. Name more values, or fewer columns.",
        ),
        (
            {"deep": 3},
            "data.where is {'deep': 3}; deep of row 0 of data.name is a dictionary with level, not a text. Name what is inside, "
            "such as deep.level, in data.where, or convert the column to text.",
        ),
    ],
)
def test_what_leaves_nothing_or_names_what_is_not_there_is_refused(questions: str, where: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        load_rows(DataConfig(name=questions, where=where))
    config = tiny_config(Path("unused"), data={"name": questions, "where": where})
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):  # before torch is imported
        check_config(config)


def test_of_many_values_the_nearest_and_the_most_frequent_are_named():
    rows = [{"subject": name} for name in [*"abcdefghij", "Algebra", "z", "z", "y" * 99, "y" * 99, "y" * 99]]
    with pytest.raises(ValueError, match=r"values are .*, and 5 others\. Correct") as error:
        list(Selection({"subject": "algebra"}, "data.where", Counter()).kept(rows, "data.name"))
    named = re.findall(r"'(\w+)'", str(error.value).partition("values are ")[2])
    assert len(named) == 8
    assert {"Algebra", "z", "y" * 40} < set(named)
    assert named == sorted(named)


def test_what_is_named_in_an_error_is_cut_as_the_values_are():
    values = [*range(20), "y" * 99]
    with pytest.raises(ValueError, match=r"^data\.where is ") as error:
        list(Selection({"level": values, "a": 1}, "data.where", Counter()).kept([{"level": 3, "a": 1}], "data.name"))
    assert str(error.value) == (
        "data.where is {'level': [0, 1, 2, 3, 4, 5, 6, 7, ...], 'a': 1}; no row has '0', '1', '2', '4', '5', '6', '7', '8', and "
        "12 others in level. Its values are '3'. Correct them, or remove the values."
    )
    with pytest.raises(ValueError, match=r"^data\.where is {'level': 'y{17,20}\.\.\.y+'}; no.* in level"):
        list(Selection({"level": "y" * 99}, "data.where", Counter()).kept([{"level": 3}], "data.name"))
    with pytest.raises(ValueError, match=r"no row has 'y{40}' in level"):
        list(Selection({"level": [3, "y" * 99]}, "data.where", Counter()).kept([{"level": 3}], "data.name"))


def test_of_no_rows_it_is_said_that_there_are_none(tmp_path: Path):
    selection = Selection({"level": 3}, "data.where", Counter())
    assert list(selection.kept([], "data.name")) == []
    with pytest.raises(ValueError, match=r"^train_dataset holds no rows"):
        Trainer(tiny_config(tmp_path / "run", data={"where": {"level": 3}}), train_dataset=[])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"where": {"level": []}},
            "data.where is {'level': []}; level has no values, and no row would be left. Name those",
        ),
        (
            {"where": {"level": [3, None]}},
            "data.where is {'level': [3, None]}; None is of type NoneType, and level has a text, a number, true or false, or",
        ),
        (
            {"eval_where": {"level": {"least": 3}}},
            "data.eval_where is {'level': {'least': 3}}; {'least': 3} is of type dict",
        ),
        (
            {"name": ["a", {"name": "b", "where": {"c": [[1]]}}]},
            "data.name.1.where is {'c': [[1]]}; [1] is of type list",
        ),
        (
            {"eval_name": [{"name": "b", "where": {"c": None}}]},
            "data.eval_name.0.where is {'c': None}; None is of type",
        ),
        ({"where": 3}, "data.where is 3; input should be a valid dictionary. Correct data.where."),
        (
            {"name": [{"name": "a", "where": {}}, {"name": "b", "where": {"c": 1}}], "where": {"c": 2}},
            "data.where is {'c': 2}; all sources of data.name have a where of their own, which takes its place, and it has no",
        ),
        (
            {"eval_name": [{"name": "a", "where": {}}], "eval_where": {"c": 2}},
            "data.eval_where is {'c': 2}; all sources of data.eval_name have a where of their own",
        ),
    ],
)
def test_a_where_that_cannot_be_meant_is_refused_with_the_configuration(data: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        Config(model={"name": "m"}, run={"dir": "d", "steps": 1}, data={"name": "x"} | data)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        SupervisedConfig(model={"name": "m"}, run={"dir": "d"}, data={"name": "x"} | data)


def test_a_date_of_yaml_is_refused_and_overrides_are_read(tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("model: {name: m}\nrun: {dir: d, steps: 1}\ndata: {name: x, where: {day: 2020-01-01}}\n")
    with pytest.raises(ValueError, match=r"is of type date, and day has .* a date stands in quotation marks"):
        Config.load(file)
    config = Config.load(file, ["data.where={level: [3, Level 3], ok: true}"])
    assert config.data.where == {"level": [3, "Level 3"], "ok": True}
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "again.yaml") == config
    assert Config.load(file, ["data.where.day='2020-01-01'"]).data.where == {"day": "2020-01-01"}
    assert Config.load(file, ["data.where=null"]).data.where is None


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Levels 1 to 3, 3 to 5, and none."""
    rows = [{"question": f"q{n}", "answer": str(n), "level": n} for n in range(1, 6)]
    plain = [{"question": f"p{n}", "answer": str(n)} for n in range(2)]
    return [
        written(tmp_path / f"{name}.jsonl", found)
        for name, found in (("a", rows[:3]), ("b", rows[2:]), ("plain", plain))
    ]


def asked(**data: Any) -> list[str]:
    return [row["question"] for row in load_rows(DataConfig(**data))]


def test_an_entry_of_a_list_has_the_where_of_data_or_its_own_in_place_of_it(sources: list[str]):
    a, b, plain = sources
    own = [a, {"name": b, "where": {"answer": 5}}, {"name": plain, "where": {}}]
    assert asked(name=own, where={"level": [2, 3]}) == ["q2", "q3", "q5", "p0", "p1"]
    left_out = Counter[str]()
    load_rows(DataConfig(name=own, where={"level": [2, 3]}), left_out=left_out)
    assert left_out == {
        "level has none of the values of data.where": 1,
        "answer has none of the values of data.name.1.where": 2,
    }
    with pytest.raises(
        ValueError, match=r"^data\.name\.0\.where is {'level': 4}; none of the 3 rows of data\.name\.0\.n"
    ):
        asked(name=[{"name": a, "where": {"level": 4}}, b])
    with pytest.raises(ValueError, match=r"^data\.name\.0\.where is {'level': \[3, 4\]}; no row has '4' in level"):
        asked(name=[{"name": a, "where": {"level": [3, 4]}}, b])


def test_a_value_may_be_in_any_of_the_sources_that_share_it_but_each_has_a_row_left(sources: list[str]):
    a, b, plain = sources
    assert asked(name=[a, b], where={"level": [3, 5]}) == ["q3", "q3", "q5"]
    with pytest.raises(
        ValueError, match=r"^data\.where is {'level': \[3, 7\]}; no row has '7' in level\. Its values are '1'"
    ):
        asked(name=[a, b], where={"level": [3, 7]})
    with pytest.raises(
        ValueError,
        match=r"none of the 2 rows of data\.name\.1\.name has anything in level; the first has question, answer\. Name another "
        r"column\. Or give the source a where of its own; {} keeps all of its rows\.$",
    ):
        asked(name=[a, plain], where={"level": 3})
    with pytest.raises(
        ValueError, match=r"rows of data\.name\.0\.name has one of these values .* Or give the source a where"
    ):
        asked(name=[a, b], where={"level": [4, 5]})


def test_one_file_can_be_several_sources_with_weights(tmp_path: Path, questions: str):
    listed = [
        {"name": questions, "where": {"level": [1, 2]}, "weight": 1},
        {"name": questions, "where": {"level": 3}, "weight": 3},
    ]
    run = Trainer(tiny_config(tmp_path / "run", data={"name": listed}))
    drawn = Counter(prompt.columns["level"] in (1, 2) for prompt in run.prompts.draw(4))
    assert drawn == {True: 1, False: 3}
    assert {prompt.columns[DATA_NAME] for prompt in run.prompts.prompts} == {
        f"{questions}:level=[1, 2]",
        f"{questions}:level=3",
    }
    run.close()


# ---- held out --------------------------------------------------------------------------------------------------------


def test_held_out_questions_have_a_where_of_their_own_and_are_all_asked_without(tmp_path: Path, questions: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "train.jsonl")
    written(folder / "test.jsonl")
    for data in (DataConfig(name=questions, eval_name=questions), DataConfig(name=str(folder))):
        both = data.model_copy(update={"where": {"level": 3}, "eval_where": {"level": [1, 2]}})
        alone = data.model_copy(update={"where": {"level": 3}})
        left_out = Counter[str]()
        assert taken(load_rows(alone)) == taken(load_rows(both)) == [2, 3]
        assert taken(load_rows(both, evaluation=True, left_out=left_out)) == [0, 1]
        assert left_out["level has none of the values of data.eval_where"] == 3
        assert taken(load_rows(alone, evaluation=True)) == [0, 1, 2, 3, 4, 5]
    listed = DataConfig(eval_name=[{"name": questions, "where": {"level": 5}}], eval_where=None, where={"level": 1})
    assert taken(load_rows(listed, evaluation=True)) == [4]
    with pytest.raises(
        ValueError, match=r"^data\.eval_where is {'level': 9}; none of the 6 rows of data\.eval_name has one"
    ):
        load_rows(DataConfig(eval_name=questions, eval_where={"level": 9}), evaluation=True)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_trainer_takes_only_such_of_the_rows_it_is_given_and_says_how_many_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rates = [{"question": row["question"], "answer": row["answer"], "pass_rate": 0.1 * n} for n, row in enumerate(ROWS)]
    data = {
        "name": None,
        "where": {"subject": "Algebra", "level": [1, 3, 5]},
        "eval_where": {"level": [2, 5]},
        "pass_rates": written(tmp_path / "rates.jsonl", rates),
        "pass_rate": [0.15, 1.0],
        "order_by": "-level",
    }
    config = tiny_config(tmp_path / "run", data=data, evaluation={"num_questions": 2}, rollout={"num_prompts": 1})
    run = Trainer(config, train_dataset=pandas.DataFrame(ROWS), eval_dataset=ROWS)
    assert [prompt.columns["level"] for prompt in run.prompts.draw(2)] == [5, 3]
    assert len(run.prompts.prompts) == 2
    shown = capsys.readouterr().out
    for said in (
        "2 training questions left out: subject has none of the values of data.where",
        "1 training question left out: level is missing, which data.where asks for",
        "1 training question left out: pass rate below 0.15",
        "3 held-out questions left out: level has none of the values of data.eval_where",
        "1 held-out question left out: level is missing, which data.eval_where asks for",
        "2 training questions\n",
        "2 held-out questions\n",
    ):
        assert said in shown
    run.close()


def test_rows_that_are_given_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.trainer.Policy", None)
    with pytest.raises(
        ValueError, match=r"^data\.where is {'level': 9}; none of the 6 rows of train_dataset has one of"
    ):
        Trainer(tiny_config(tmp_path / "run", data={"where": {"level": 9}}), train_dataset=ROWS)
    held_out = tiny_config(tmp_path / "run", data={"eval_where": {"hard": True}}, evaluation={"num_questions": 2})
    with pytest.raises(
        ValueError, match=r"^data\.eval_where is .*; none of the 6 rows of eval_dataset has anything in hard"
    ):
        Trainer(held_out, train_dataset=ROWS, eval_dataset=ROWS)


def test_a_where_of_questions_that_are_not_asked_is_said(
    tmp_path: Path, questions: str, capsys: pytest.CaptureFixture[str]
):
    unread = {"eval_where": {"level": 3}, "eval_name": questions}
    Trainer(tiny_config(tmp_path / "run", data={"name": questions, **unread})).close()
    without = [
        f"data.{name} is {value!r}, without effect: evaluation.num_questions is 0" for name, value in unread.items()
    ]
    shown = capsys.readouterr().out
    assert all(said in shown for said in without)
    rows = [{"question": "1+1?", "completion": " 2"}]
    SupervisedTrainer(sft_config(tmp_path / "sft", data=unread), train_dataset=rows).close()
    shown = capsys.readouterr().out
    assert all(said in shown for said in without)


def test_supervised_training_says_which_held_out_questions_it_does_not_ask(
    tmp_path: Path, questions: str, capsys: pytest.CaptureFixture[str]
):
    data = {"eval_name": questions, "eval_where": {"level": [3, 5]}}
    config = sft_config(tmp_path / "sft", data=data, evaluation={"num_questions": 2, "max_completion_tokens": 8})
    rows = [{"question": "1+1?", "completion": " 2"}]
    SupervisedTrainer(config, train_dataset=rows).close()
    shown = capsys.readouterr().out
    assert "2 held-out questions left out: level has none of the values of data.eval_where" in shown
    assert "1 held-out question left out: level is missing, which data.eval_where asks for" in shown


def test_a_run_does_not_resume_with_another_where(tmp_path: Path, questions: str):
    def run(where: dict[str, Any], **settings: Any) -> Trainer:
        data = {"name": questions, "where": where}
        return Trainer(tiny_config(tmp_path / "run", data=data, run={"steps": 1, "resume": "auto", **settings}))

    run({"level": 3}).train()
    run({"level": 3}, steps=2).close()
    with pytest.raises(ValueError, match=r"^data\.where is {'level': 5}; .* was written with {'level': 3}"):
        run({"level": 5}, steps=2)


# ---- elsewhere -------------------------------------------------------------------------------------------------------


def test_supervised_training_takes_only_such_rows_and_counts_the_others(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    rows = [{**row, "completion": " two"} for row in ROWS]
    data = RowsConfig(template="chat", where={"level": [3, 5], "subject": "Algebra"})
    found = read_rows(data, tokenizer, given=rows, model="tiny")
    assert [int(group.prompt.columns["answer"]) // 2 for group in found.groups] == [2, 4]
    assert found.dropped == {
        "level has none of the values of data.where": 2,
        "level is missing, which data.where asks for": 1,
        "subject has none of the values of data.where": 1,
    }
    with pytest.raises(ValueError, match=r"^data\.where is {'level': \[3, 9\]}; no row has '9' in level"):
        read_rows(RowsConfig(where={"level": [3, 9]}), tokenizer, given=rows, model="tiny")

    a, b = written(tmp_path / "a.jsonl", rows[:3]), written(tmp_path / "b.jsonl", rows[3:])
    listed: dict[str, Any] = {"name": [a, {"name": b, "where": {"subject": "Algebra"}}], "where": {"level": [1, 3]}}
    found = read_rows(RowsConfig(template="chat", **listed), tokenizer, model="tiny")
    assert [int(group.prompt.columns["answer"]) // 2 for group in found.groups] == [0, 2, 4, 5]
    listed["where"] = {"level": [1, 5]}  # the first file has the one and the second the other
    found = read_rows(RowsConfig(template="chat", **{**listed, "name": [a, b]}), tokenizer, model="tiny")
    assert [int(group.prompt.columns["answer"]) // 2 for group in found.groups] == [0, 4]
    listed["where"] = {"level": [1, 9]}
    with pytest.raises(ValueError, match=r"^data\.where is {'level': \[1, 9\]}; no row has '9' in level"):
        check_config(sft_config(tmp_path / "run", data={"name": a, "where": {"level": [1, 9]}}))
    with pytest.raises(ValueError, match=r"^data\.where is {'level': \[1, 9\]}; no row has '9' in level"):
        read_rows(RowsConfig(template="chat", **listed), tokenizer, model="tiny")


def test_a_row_is_of_the_source_that_lists_its_file_whatever_a_column_of_the_file_says(tmp_path: Path):
    a = written(tmp_path / "a.jsonl", [{**row, "completion": " two", DATA_NAME: "its own"} for row in ROWS[:2]])
    found = written_rows(RowsConfig(name=[a]), None)
    assert [row[DATA_NAME] for row, _, _ in found] == [a, a]
    assert [row[DATA_NAME] for row in load_rows(DataConfig(name=[a]))] == [a, a]


def test_a_source_says_what_its_rows_are_called(tmp_path: Path):
    a = written(tmp_path / "a.jsonl", ROWS[:2])
    sources = [{"name": a, "data_name": "sums", "weight": 2}, {"name": a, "where": {"level": 1}, "weight": 1}]
    config = DataConfig(name=sources, eval_name=[{"name": a, "data_name": "sums"}])
    assert {row[DATA_NAME] for row in load_rows(config)} == {"sums", f"{a}:level=1"}
    assert config.weights == {"sums": 2, f"{a}:level=1": 1}
    assert {row[DATA_NAME] for row in load_rows(config, evaluation=True)} == {"sums"}
    with pytest.raises(ValueError, match=r"it lists sources, each once\. Name 'sums' once"):
        tiny_config(tmp_path, data={"name": [sources[0], {"name": a, "data_name": "sums", "weight": 1}]})


SETTINGS = ["--model", str(TINY / "model"), "--config", str(ROOT / "configs" / "quickstart.yaml")]
FEW = ["--samples", "2", "--max-tokens", "8", "--workers", "1", "--require", "format=0"]


def test_rejection_asks_such_questions_of_the_run_and_all_of_those_it_is_given(
    tmp_path: Path, questions: str, capsys: pytest.CaptureFixture[str]
):
    def run(*words: str) -> dict[str, Any]:
        parser = reject_command._parser()
        return reject_command.run(parser.parse_args([*SETTINGS, *FEW, *words]))

    chosen = [f"data.name={questions}", "data.where={level: [3, 5]}"]
    found = run("--out", str(tmp_path / "a.jsonl"), "--num-questions", "2", "--set", *chosen)
    assert found["num_questions"] == 2
    asked = [json.loads(line) for line in (tmp_path / "a.pass_rates.jsonl").read_text().splitlines()]
    assert taken(asked) == [2, 3]
    shown = capsys.readouterr().out
    assert "without 2 of the questions: level has none of the values of data.where" in shown
    assert "without 1 of the questions: level is missing, which data.where asks for" in shown

    rates = [{**row, "pass_rate": 0.1 * n} for n, row in enumerate(ROWS)]
    by_rate = [f"data.pass_rates={written(tmp_path / 'rates.jsonl', rates)}", "data.pass_rate=[0.25, 1.0]"]
    assert run("--out", str(tmp_path / "c.jsonl"), "--set", *chosen, *by_rate)["num_questions"] == 2
    assert "without 1 of the questions: pass rate below 0.25" in capsys.readouterr().out

    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model": {"name": "m"}, "data": {"name": "x", "where": {"level": 3}}}))
    words = ["--config", str(config), "--questions", questions]
    assert run("--out", str(tmp_path / "b.jsonl"), *words)["num_questions"] == 6


@pytest.mark.parametrize("given", ["data.where={level: 3}", "data.where.level=3"])
def test_rejection_refuses_a_where_for_questions_of_a_file(
    questions: str, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = [*SETTINGS, "--out", "a.jsonl", "--questions", questions, "--set", given]
    monkeypatch.setattr(sys, "argv", ["grpo reject", *words])
    with pytest.raises(SystemExit):
        reject_command.main()
    assert "--set data.where chooses among the run's own questions" in capsys.readouterr().err


def test_a_row_of_a_run_is_counted_among_those_that_are_taken(questions: str):
    data = DataConfig(name=questions, where={"level": 3})
    assert taken(chosen_rows(data, [1], held_out=False)) == [3]


def test_a_file_that_is_sampled_from_is_taken_as_it_is(
    tmp_path: Path, questions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model": {"name": "m"}, "data": {"name": "x", "where": {"level": 3}}}))
    words = ["--config", str(config), "--data", questions, "--row", "1", "--group", "1", "--max-tokens", "4", "--json"]
    monkeypatch.setattr(sys, "argv", ["grpo sample", "--model", str(TINY / "model"), *words])
    sample_command.main()
    assert json.loads(capsys.readouterr().out)["question"] == "What is 1+1?"


class Puzzle:
    """An environment that brings questions."""

    @staticmethod
    def rows(size: int, seed: int) -> list[dict[str, Any]]:
        return [{"question": f"{n}", "answer": str(2 * n), "level": n % 3} for n in range(seed, seed + size)]

    def step(self, text: str) -> None:
        pass


def test_the_questions_of_an_environment_are_chosen_from_too():
    surroundings = Environment.of(EnvironmentConfig(rows={"size": 6}), Puzzle)
    assert surroundings is not None
    data = DataConfig(where={"level": 1}, eval_where={"level": [0, 2]})
    left_out = Counter[str]()
    options: dict[str, Any] = {"reads_answer": True, "left_out": left_out}
    assert taken(own_rows(surroundings, data, evaluation=False, **options) or []) == [1, 4]
    assert left_out == {"level has none of the values of data.where": 4}
    assert taken(own_rows(surroundings, data, evaluation=True, **options) or []) == [6, 8, 9, 11]


@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_the_questions_of_a_task_are_chosen_from_too():
    data = DataConfig(name="reasoning_gym:chain_sum", args={"size": 20, "seed": 1, "min_terms": 2, "max_terms": 4})
    every = load_rows(data)
    column = "entry.metadata.num_terms"
    wanted = [row["question"] for row in every if row["entry"]["metadata"]["num_terms"] == 3]
    assert 0 < len(wanted) < 20
    assert [row["question"] for row in load_rows(data.model_copy(update={"where": {column: 3}}))] == wanted
    assert len(load_rows(data.model_copy(update={"where": {column: 3}}), evaluation=True)) == 20


def test_epochs_of_a_scaled_recipe_are_counted_in_the_rows_that_are_taken(
    questions: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    seen: list[int | None] = []
    monkeypatch.setattr("grpo.check.scale.as_yaml", lambda *given, num_questions, **named: seen.append(num_questions))
    monkeypatch.setattr("grpo.check.scale.scale_down", lambda *given, **named: None)
    monkeypatch.setattr("grpo.check.scale.shape_of", lambda *given: None)
    config = tiny_config(tmp_path / "run", data={"name": questions, "where": {"level": [3, 5]}})
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    options = {"config": str(tmp_path / "recipe.yaml"), "model": "m", "out": tmp_path / "o.yaml", "hours": 1.0}
    hardware = {"gpus": 1, "gpu_memory": 80, "gpu": "h100", "max_tokens": 64}
    scale_command.reinforcement(type("Options", (), options | hardware)())
    assert seen == [3]
