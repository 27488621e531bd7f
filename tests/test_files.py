"""What lies in files, folders and tables arrives as it is written, and what cannot be read says where."""

import datetime
import errno
import gzip
import json
import pickle
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from grpo.config import DataConfig
from grpo.data.files import Written, load_table
from grpo.data.rows import load_rows, prepare_rows

BIG = 2**62 + 1


def written(path: Path, text: str | bytes) -> DataConfig:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return DataConfig(name=str(path))


def answers(config: DataConfig) -> list[str]:
    return [row["answer"] for row in load_rows(config)]


AS_WRITTEN = ["1945-05-08", "007", str(BIG), "0.50", "1e400", "-0", "5", "true", str(2**63), "1E5", "12:30"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_an_answer_in_json_is_the_text_that_is_written_there(tmp_path: Path, name: str):
    texts = {"1945-05-08": '"1945-05-08"', "007": '"007"', "12:30": '"12:30"'}
    lines = [f'{{"question": "q", "answer": {texts.get(each, each)}}}' for each in AS_WRITTEN]
    text = f"[{', '.join(lines)}]" if name == "rows.json" else "\n".join(lines)
    config = written(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    assert answers(config) == AS_WRITTEN


def test_a_date_is_text_in_questions_and_other_columns_too(tmp_path: Path):
    (row,) = load_rows(written(tmp_path / "a.jsonl", '{"question": "1945-05-08", "answer": "1", "day": "1945-05-08"}'))
    assert (row["question"], row["day"]) == ("1945-05-08", "1945-05-08")


def test_one_row_does_not_change_the_others(tmp_path: Path):
    lines = [f'{{"question": "q", "answer": {each}}}\n' for each in (72, BIG, 2**63, 0.5, '"x"', "null")]
    config = written(tmp_path / "a.jsonl", "".join(lines))
    assert answers(config) == ["72", str(BIG), str(2**63), "0.5", "x", ""]


def test_a_number_of_a_file_is_a_float_for_everything_but_its_text():
    number = Written("0.50")
    assert (str(number), f"of {number}", number, json.dumps([number])) == ("0.50", "of 0.50", 0.5, "[0.5]")
    assert type(pickle.loads(pickle.dumps(number))) is float


def test_other_columns_of_json_keep_their_types_for_rewards(tmp_path: Path):
    text = '{"question": "q", "answer": "a", "nums": [3, 4.5], "level": 2, "ok": true, "meta": {"n": 1}}'
    (row,) = load_rows(written(tmp_path / "a.jsonl", text))
    assert (row["nums"], row["level"], row["ok"], row["meta"]) == ([3, 4.5], 2, True, {"n": 1})


def test_a_parquet_column_with_a_missing_integer_holds_integers(tmp_path: Path):
    path = tmp_path / "a.parquet"
    for answers_, kind in (([72, None, BIG], pyarrow.int64()), ([72.0, None, 0.5], pyarrow.float64())):
        pyarrow.parquet.write_table(
            pyarrow.table({"question": ["q"] * 3, "answer": pyarrow.array(answers_, kind)}), path
        )
        assert answers(DataConfig(name=str(path)))[:2] == ["72", ""]
    pandas.DataFrame({"question": ["a", "b"], "answer": [72, None]}).to_parquet(path)  # which makes floats of them
    assert answers(DataConfig(name=str(path))) == ["72", ""]


@pytest.mark.parametrize(
    ("cell", "kind", "text"),
    [
        (datetime.date(1945, 5, 8), pyarrow.date32(), "1945-05-08"),
        (datetime.datetime(1945, 5, 8, 12), pyarrow.timestamp("us"), "1945-05-08T12:00:00"),
        (Decimal("1.50"), pyarrow.decimal128(10, 2), "1.50"),
        (Decimal("1E+3"), pyarrow.decimal128(10, 0), "1000"),
        (True, pyarrow.bool_(), "true"),
        (0.1, pyarrow.float32(), "0.1"),
        (3.0, pyarrow.float32(), "3"),
        (1e22, pyarrow.float64(), "1e+22"),
        (2**64 - 1, pyarrow.uint64(), "18446744073709551615"),
        ([[1, 0], [0, 1]], pyarrow.list_(pyarrow.list_(pyarrow.int64())), "[[1, 0], [0, 1]]"),
    ],
)
def test_a_cell_of_a_table_has_the_exact_text_of_its_type(tmp_path: Path, cell: Any, kind: pyarrow.DataType, text: str):
    table = pyarrow.table({"question": ["q"], "answer": pyarrow.array([cell], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert answers(DataConfig(name=str(tmp_path / "a.parquet"))) == [text]
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert answers(DataConfig(name=str(tmp_path / "saved"))) == [text]


def test_the_cells_of_csv_are_text_and_empty_ones_are_missing(tmp_path: Path):
    config = written(tmp_path / "a.csv", '\ufeffquestion,answer,note\r\n"a, b\nc",007,\r\nd,"1,000",x\r\n\r\n')
    assert load_rows(config) == [
        {"question": "a, b\nc", "answer": "007", "note": None},
        {"question": "d", "answer": "1,000", "note": "x"},
    ]
    assert answers(written(tmp_path / "a.tsv.gz", gzip.compress(b"question\tanswer\nq\t1.0\n"))) == ["1.0"]


@pytest.mark.parametrize(
    "text",
    [
        '{"question": ["a", "b"], "answer": [1, 0.50]}',
        '{"question": {"0": "a", "1": "b"}, "answer": {"0": 1, "1": 0.50}}',
    ],
)
def test_json_may_be_an_object_of_columns(tmp_path: Path, text: str):
    config = written(tmp_path / "a.json", text.replace("], ", "],\n ").replace("}, ", "},\n"))
    assert load_rows(config) == [{"question": "a", "answer": "1"}, {"question": "b", "answer": "0.50"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"question": "q", "answer": "1"}\n\n{"question" "q"}\n',
            "line 3, column 13: not JSON: Expecting ':'",
        ),
        ("a.json", b'[{"question": "q"},\n {"question": }]', "line 2, column 15: not JSON"),
        ("a.jsonl", '{"question": "q"}\n{"question": "é"}'.encode("latin-1"), "line 2: the byte 0xe9 is no UTF-8"),
        ("a.json", '{"question": "q"}'.encode("utf-16"), "line 1: the byte 0xff is no UTF-8"),
        ("a.jsonl", b'{"question": "q"}\n["q", "1"]\n', 'line 2: ["q", "1"] is no row'),
        ("a.jsonl", b'{"question": "q"}\n{"answer": 1, "answer": 2}\n', "line 2: the key 'answer' is there twice"),
        ("a.jsonl", b'{"question": "q"}\n{"answer": ' + b"1" * 5000 + b"}", "line 2: Exceeds the limit"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "q"}\n' * 999, mtime=0)[:-20], "cannot be read beyond line"),
        ("a.csv", b"question,answer\nq,1\nq,1,2\n", "line 3: 3 cells under 2 column names"),
        ("a.csv", b"question,answer,answer\n", "line 1: the column 'answer' is there twice"),
        ("a.csv", b'question,answer\n"q"x,1\n', "line 2: not CSV"),
        ("a.parquet", b"question", "cannot be read as parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_line_and_cause(
    tmp_path: Path, name: str, content: bytes, message: str
):
    config = written(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_rows(DataConfig(name=config.name, question_column="question", answer_column="question"))
    assert str(raised.value).startswith(f"data.name is '{config.name}'; {config.name}")
    assert "An error occurred" not in str(raised.value)


def jsonl(path: Path, *questions: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"question": q, "answer": "2024-01-01"}) + "\n" for q in questions))


def questions(**settings: Any) -> list[str]:
    evaluation = settings.pop("evaluation", False)
    return [row["question"] for row in load_rows(DataConfig(**settings), evaluation=evaluation)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_holds_no_rows(tmp_path: Path, name: str, content: bytes):
    with pytest.raises(ValueError, match=r"^data.name holds no rows"):
        load_rows(written(tmp_path / name, content))


def test_a_pattern_names_files_in_the_order_of_their_names(tmp_path: Path):
    jsonl(tmp_path / "part-2.jsonl", "c")
    jsonl(tmp_path / "part-1.jsonl", "a", "b")
    jsonl(tmp_path / "deep" / "part-0.jsonl", "z")
    assert questions(name=f"{tmp_path}/part-*.jsonl") == ["a", "b", "c"]
    assert questions(name=f"{tmp_path}/**/*.jsonl") == ["z", "a", "b", "c"]
    assert questions(name=f"{tmp_path}/part-*.jsonl", split="train[1:]") == ["b", "c"]
    with pytest.raises(ValueError, match=r"no file matches the pattern"):
        questions(name=f"{tmp_path}/*.csv")


def test_a_folder_has_splits_and_its_text_files_are_read_as_they_are_written(tmp_path: Path):
    jsonl(tmp_path / "train.jsonl", "a", "b")
    jsonl(tmp_path / "test.jsonl", "c")
    name = str(tmp_path)
    assert questions(name=name) == ["a", "b"]
    assert questions(name=name, evaluation=True) == ["c"]
    assert questions(name=name, split="train[:1]") == ["a"]
    assert load_rows(DataConfig(name=name))[0]["answer"] == "2024-01-01"
    with pytest.raises(ValueError, match=r"data.split is 'validation'; .* has only train, test. Set data.split"):
        questions(name=name, split="validation")
    with pytest.raises(ValueError, match=r"^data\.split is 'train\[:x\]'; it is no part of 2 rows"):
        questions(name=name, split="train[:x]")
    with pytest.raises(ValueError, match=r"^data\.eval_split is 'test\[:x\]'; it is no part of 1 rows"):
        questions(name=name, eval_split="test[:x]", evaluation=True)


def test_a_saved_data_set_is_read_by_its_splits(tmp_path: Path):
    table = datasets.Dataset.from_list([{"question": "a", "answer": 1}, {"question": "b", "answer": None}])
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "both")
    assert questions(name=str(tmp_path / "both")) == ["a", "b"]
    assert questions(name=str(tmp_path / "both"), evaluation=True) == ["a"]
    assert questions(name=str(tmp_path / "both"), split="train[1:]") == ["b"]
    with pytest.raises(ValueError, match=r"^data\.split is 'train\[:x\]'; it is no part of 2 rows"):
        questions(name=str(tmp_path / "both"), split="train[:x]")
    table.save_to_disk(tmp_path / "one")
    assert questions(name=str(tmp_path / "one"), split="train[1:]") == ["b"]


def test_a_path_may_begin_with_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "a.jsonl", "a")
    assert questions(name="~/a.jsonl") == questions(name="~/*.jsonl") == ["a"]


def test_a_slice_that_is_none_and_a_revision_of_a_file_are_refused(tmp_path: Path):
    jsonl(tmp_path / "a.jsonl", "a")
    with pytest.raises(ValueError, match=r"data.split is 'train\[:x\]'; it is no part of 1 rows"):
        questions(name=f"{tmp_path}/a.jsonl", split="train[:x]")
    with pytest.raises(ValueError, match=r"has no revision 'v1'. Remove the revision."):
        questions(name=f"{tmp_path}/a.jsonl", revision="v1")


def test_a_hub_data_set_may_be_pinned(monkeypatch: pytest.MonkeyPatch):
    asked = []
    rows = [{"question": "q", "answer": "7"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: asked.append((args, options)) or rows)
    load_rows(DataConfig(name="a/b", revision="v1"))
    load_rows(DataConfig(name=[{"name": "c/d", "revision": "v2", "subset": "main", "split": "dev"}]))
    load_rows(DataConfig(name="a/b"))
    assert asked == [
        (("a/b", None), {"split": "train", "revision": "v1"}),
        (("c/d", "main"), {"split": "dev", "revision": "v2"}),
        (("a/b", None), {"split": "train"}),
    ]


def given(rows: Any) -> list[dict[str, Any]]:
    return prepare_rows(rows, DataConfig(), answer_regex=None, setting="train_dataset")


ROWS = [{"question": "a", "answer": 72}, {"question": "b", "answer": None}]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ROWS,
        lambda: iter(ROWS),
        lambda: datasets.Dataset.from_list(ROWS),
        lambda: datasets.Dataset.from_list(ROWS).with_format("pandas"),
        lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: pandas.DataFrame(ROWS),
        lambda: pandas.DataFrame(ROWS).convert_dtypes(),
        lambda: [{"question": "a", "answer": numpy.int64(72)}, {"question": "b", "answer": numpy.nan}],
        lambda: [{"question": "a", "answer": numpy.float32(72)}, {"question": "b", "answer": pandas.NaT}],
    ],
)
def test_a_program_may_hand_over_rows_in_many_forms(make: Callable[[], Any]):
    assert [(row["question"], row["answer"]) for row in given(make())] == [("a", "72"), ("b", "")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
            "is a DatasetDict with the keys train; it takes",
        ),
        (
            {"question": ["a"], "answer": ["1"]},
            "is a dict with the keys question, answer; it takes rows. Pass datasets.",
        ),
        ("train.jsonl", "train_dataset is 'train.jsonl'; it takes rows"),
        (5, "train_dataset is 5; it takes rows"),
        ([*ROWS, "c"], "row 2 of train_dataset is of type str; a row is a dictionary"),
        (datasets.Dataset.from_list(ROWS).data.table, "row 0 of train_dataset is of type ChunkedArray"),
        ([], "train_dataset holds no rows"),
    ],
)
def test_what_is_no_rows_is_refused(rows: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        given(rows)


@pytest.mark.parametrize("name", ["train.parquet", "folder", "nobody/no-such-data-set"])
def test_a_cache_that_cannot_be_written_to_is_not_blamed_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    import datasets

    datasets.Dataset.from_dict({"question": ["1+1?"], "answer": ["2"]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.txt").write_text("1+1?\n")
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/hub")
    if (tmp_path / name).exists():
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/sys/no-cache"))  # nobody makes folders there
    else:
        monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=full))
    local = tmp_path / name
    with pytest.raises(
        ValueError, match=r"^HF_HOME is .* cannot be written to: .*(/sys/no-cache|/cache/hub).*set HF_HOME"
    ):
        list(load_table(str(local) if local.exists() else name, None, "train", "data.name"))


@pytest.mark.parametrize("saved", [False, True])
def test_a_folder_of_another_format_that_cannot_be_read_is_refused_by_its_setting(tmp_path: Path, saved: bool):
    if saved:
        datasets.Dataset.from_dict({"question": ["1+1?"]}).save_to_disk(tmp_path)
    (tmp_path / ("data-00000-of-00001.arrow" if saved else "train.arrow")).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"^data.name is .*; it cannot be read: .*Correct the file"):
        list(load_table(str(tmp_path), None, "train", "data.name"))
