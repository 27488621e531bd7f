"""data.where compares the text of cells, and the value of what JSON takes for a number, in every format."""

from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from test_where import LEVELS, ROWS, taken

from grpo.config import DataConfig
from grpo.data.files import Written
from grpo.data.rows import load_rows
from grpo.data.where import Selection


@pytest.mark.parametrize(
    ("cell", "value", "is_kept"),
    [
        (3, "3", True),
        ("3", 3, True),
        (3.0, 3, True),
        (Written("3.0"), 3, True),
        ("3.0", 3, True),
        ("-3.0", -3, True),
        (13, 3, False),
        (3.5, 3, False),
        (Written("0.50"), "0.50", True),
        (0.5, 0.5, True),
        ("Level 3", 3, False),
        ("Level 3", "Level 3", True),
        ("level 3", "Level 3", False),
        ("v1.0", "v1", False),
        (True, True, True),
        (True, "true", True),
        (True, 1, False),
        ("True", True, True),
        (False, "False", True),
        ("TRUE", True, False),
        ([3, 4], "[3, 4]", True),
        (Written("0.50"), 0.5, True),
        (Written("1e0"), 1, True),
        ("5E-1", 0.5, True),
        (Decimal("3.00"), 3, True),
        (Decimal("0.10"), 0.1, True),
        (Written("-0.0"), 0, True),
        (Written("1e3"), 1000, True),
        (1e22, 10**22, True),
        (numpy.float32(0.1), 0.1, True),
        ("007", 7, False),
        ("1_000", 1000, False),
        ("+3", 3, False),
        (" 3", 3, False),
        ("3.", 3, False),
        ("٣", 3, False),
        ("nan", "NaN", False),
        (Written("9007199254740993"), Written("9007199254740992"), False),
        ("0." + "1" * 60, "0." + "1" * 59 + "2", False),
        ("1" * 2000, "1" * 1999 + "2", False),
        ("1" * 2000, "1" * 2000, True),
        (Written("1e400"), Written("1e401"), False),
        (Written("10e399"), Written("1e400"), True),
        ("1e999999999", "10e999999998", False),
    ],
)
def test_cells_and_values_are_compared_by_their_text(cell: Any, value: Any, is_kept: bool):
    other = {"cell": value}  # so that there is always a row left, and one that has the value
    left_out = Counter[str]()
    found = [number for number, _ in Selection({"cell": value}, "w", left_out).kept([{"cell": cell}, other], "rows")]
    assert found == ([0, 1] if is_kept else [1])
    assert left_out == ({} if is_kept else {"cell has none of the values of w": 1})


def test_the_spellings_of_a_number_in_json_lines_are_one(tmp_path: Path):
    spelled = ["0.50", "0.5", "5e-1", '"0.5"', "1e0", "1", "1.0", '"1"', "0.51"]
    lines = [f'{{"question": "q", "answer": "{2 * n}", "p": {p}}}' for n, p in enumerate(spelled)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for value, numbers in ((0.5, [0, 1, 2, 3]), (1, [4, 5, 6, 7])):
        assert taken(load_rows(DataConfig(name=str(tmp_path / "rows.jsonl"), where={"p": value}))) == numbers


def test_truth_values_as_pandas_writes_them_to_csv_are_found(tmp_path: Path):
    frame = pandas.DataFrame(ROWS[:3]).assign(ok=[True, False, True])
    frame.to_csv(tmp_path / "rows.csv")
    assert taken(load_rows(DataConfig(name=str(tmp_path / "rows.csv"), where={"ok": True}))) == [0, 2]


@pytest.mark.parametrize("empty", [[], (), numpy.array([])])
def test_an_empty_list_is_missing(empty: Any):
    left_out = Counter[str]()
    rows = [{"cell": empty}, {"cell": [3]}]
    assert [number for number, _ in Selection({"cell": "[3]"}, "w", left_out).kept(rows, "rows")] == [1]
    assert left_out == {"cell is missing, which w asks for": 1}


def _as_csv(path: Path) -> str:
    lines = [f"{row['question']},{row['answer']},{row['level'] or ''}" for row in ROWS]
    path.with_suffix(".csv").write_text("\n".join(["question,answer,level", *lines]))
    return str(path.with_suffix(".csv"))


def _as_parquet(kind: pyarrow.DataType) -> Callable[[Path], str]:
    def write(path: Path) -> str:
        columns = {name: [row[name] for row in ROWS] for name in ("question", "answer")}
        levels = pyarrow.array(LEVELS, kind)
        parquet.write_table(pyarrow.table({**columns, "level": levels}), path.with_suffix(".parquet"))
        return str(path.with_suffix(".parquet"))

    return write


def _as_pandas_writes_it(path: Path) -> str:
    pandas.DataFrame(ROWS).to_json(path, orient="records", lines=True)
    assert '"level":3.0' in path.read_text()
    return str(path)


@pytest.mark.parametrize(
    "write",
    [
        _as_csv,
        _as_parquet(pyarrow.int64()),
        _as_parquet(pyarrow.float32()),
        _as_parquet(pyarrow.decimal128(5, 2)),
        _as_pandas_writes_it,
    ],
    ids=["csv", "integers", "floats", "decimals", "pandas"],
)
def test_an_integer_finds_its_rows_in_every_format(tmp_path: Path, write: Callable[[Path], str]):
    left_out = Counter[str]()
    name = write(tmp_path / "rows.jsonl")
    assert taken(load_rows(DataConfig(name=name, where={"level": [3, 5]}), left_out=left_out)) == [2, 3, 4]
    assert left_out == {
        "level has none of the values of data.where": 2,
        "level is missing, which data.where asks for": 1,
    }
