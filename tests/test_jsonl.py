"""Rows survive a kill at any byte, and a file is rewound from its end."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from grpo.observe.rundir import RunLog
from grpo.system.distributed import Processes
from grpo.system.jsonl import append_jsonl, iterate_backwards, json_line, read_jsonl, rewind_jsonl

TEXT = "答案是 42 🧮, caf\u00e9\u2028 \x1b[31m \x9b2J \u202e \x7f \ud800"


def rows_of(*steps: int) -> list[dict[str, object]]:
    return [{"step": step, "completion": TEXT} for step in steps]


def superseded(path: Path) -> bytes:
    aside = path.with_suffix(".superseded.jsonl")
    return aside.read_bytes() if aside.exists() else b""


def test_a_row_reads_back_exactly_and_holds_nothing_that_a_terminal_would_obey(tmp_path: Path):
    (row,) = rows_of(1)
    line = json_line(row)
    assert json.loads(line) == row
    assert line.isprintable()
    assert "答案是 42 🧮" in line
    assert len(line.splitlines()) == 1
    append_jsonl(tmp_path / "rows.jsonl", [row])
    assert read_jsonl(tmp_path / "rows.jsonl") == [row]


def test_a_kill_at_any_byte_of_a_row_costs_that_row_and_loses_no_byte(tmp_path: Path):
    for cut in range(1, len(json_line(rows_of(3)[0]).encode()) + 1):
        path = tmp_path / f"cut-{cut}.jsonl"
        append_jsonl(path, rows_of(1, 2, 3))
        os.truncate(path, path.stat().st_size - cut)
        whole = path.read_bytes()
        rewind_jsonl(path, 2)
        assert path.read_bytes() + superseded(path) == whole
        append_jsonl(path, rows_of(3))
        assert read_jsonl(path) == rows_of(1, 2, 3)


NO_ROWS = [
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'"step"',
    b"\x00" * 40,
    b"\xe7\xad",
    b'{"step": 2, "',
    b'{"step": null}',
    b"[" * 10**5,
]


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_stops_neither_a_resume_nor_a_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, rows_of(1))
    with path.open("ab") as file:
        file.write(line + b"\n")
    append_jsonl(path, rows_of(2))
    assert read_jsonl(path, ["step"]) == rows_of(1, 2)
    assert "1 lines are no rows and are left out; the first is line 2" in capsys.readouterr().out
    rewind_jsonl(path, 1)
    assert path.read_bytes() == (json_line(rows_of(1)[0]) + "\n").encode()
    assert superseded(path) == line + b"\n" + (json_line(rows_of(2)[0]) + "\n").encode()


def test_a_row_after_one_that_was_cut_short_has_a_line_of_its_own(tmp_path: Path):
    path = tmp_path / "roll_backs.jsonl"
    append_jsonl(path, rows_of(1))
    with path.open("ab") as file:
        file.write(b'{"step": 2, "rule": "k')
    append_jsonl(path, rows_of(3))
    assert read_jsonl(path) == rows_of(1, 3)


def test_a_whole_last_row_without_its_line_feed_stays(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, rows_of(1, 2))
    os.truncate(path, path.stat().st_size - 1)
    rewind_jsonl(path, 2)
    append_jsonl(path, rows_of(3))
    assert read_jsonl(path) == rows_of(1, 2, 3)
    assert superseded(path) == b""


def test_rewinding_twice_keeps_both_tails_in_order(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, rows_of(1, 2, 3))
    rewind_jsonl(path, 2)
    append_jsonl(path, rows_of(3, 4))
    rewind_jsonl(path, -1)
    assert read_jsonl(path) == []
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.superseded.jsonl")] == [3, 1, 2, 3, 4]


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_rows_come_backwards_whatever_the_blocks_they_are_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
):
    monkeypatch.setattr("grpo.system.jsonl.BLOCK_BYTES", block)
    path = tmp_path / "completions.jsonl"
    assert list(iterate_backwards(path)) == []
    for end in (b"", b'{"step": 4, "tor'):
        path.write_bytes(b"")
        append_jsonl(path, rows_of(1, 2, 3))
        path.write_bytes(path.read_bytes() + end)
        assert list(iterate_backwards(path)) == rows_of(3, 2, 1)
        rewind_jsonl(path, 1)
        assert read_jsonl(path) == rows_of(1)


def test_a_rewind_reads_the_end_of_a_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parsed = []
    monkeypatch.setattr(
        "grpo.system.jsonl.row_of", lambda line, keys: parsed.append(line) or json.loads(line or b"null")
    )
    path = tmp_path / "completions.jsonl"
    append_jsonl(path, rows_of(*range(1000)))
    rewind_jsonl(path, 997)
    assert len(parsed) == 4, "the empty end, two rows that go, and one that stays"


def test_a_tail_that_finds_no_room_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, rows_of(1, 2))
    (tmp_path / "metrics.superseded.jsonl").symlink_to("/dev/full")
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        rewind_jsonl(path, 1)
    assert path.read_bytes() == before


def test_the_first_and_the_last_evaluation_are_found_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "evaluations.jsonl"
    append_jsonl(path, [{"step": step, "sample": n} for step in range(0, 100, 10) for n in (0, 1)])
    log = RunLog(tmp_path, tiny_config(tmp_path), Processes(0, 1, torch.device("cpu")), reward_names=[])
    parsed = []
    monkeypatch.setattr(
        "grpo.system.jsonl.row_of", lambda line, keys: parsed.append(line) or json.loads(line or b"null")
    )
    for step in (0, 90):
        assert log.evaluation(step) == [{"step": step, "sample": 0}, {"step": step, "sample": 1}]
    assert len(parsed) == 3 + 4
    assert log.evaluation(95) == []
