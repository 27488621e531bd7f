"""The countdown reward, and the puzzles that come with the repository."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import countdown

DATA = Path(__file__).parents[1] / "configs" / "countdown"


def answered(text: str) -> str:
    return f"<think> let me try </think> <answer> {text} </answer>"


@pytest.mark.parametrize(
    "text",
    [
        "65 + (45 - 76)",
        "45-76+65",
        "65 + (45 - 76) = 34",
        "$65 + 45 - 76$",
        r"\boxed{65 + 45 - 76 = 34}",
        "65 + [45 − 76]",
        "-76 + 65 + 45",
        "`65 + 45 - 76`",
        "**65 + 45 - 76**",
        "65 + 45 - 76.",
        "65 + 45\n- 76",
        "$65 + 45 - 76 = 34$.",
    ],
)
def test_any_way_to_write_a_right_equation_counts(text: str) -> None:
    assert countdown(answered(text), nums=[65, 45, 76], target=34) == 1.0
    assert countdown(answered(text), nums=["65", "45", "76"], target="34") == 1.0  # as a column of text holds them


@pytest.mark.parametrize(
    ("text", "nums", "target"),
    [
        ("65 + 45 - 75", [65, 45, 76], 34),  # 35, and a number that was not given
        ("34", [65, 45, 76], 34),
        ("65 + 45 - 76 + 0", [65, 45, 76], 34),
        ("65 + 45", [65, 45, 76], 110),  # a number is missing
        ("2 + 2 + 2", [2, 2], 6),  # one more than given
        ("65 + 45 - 76 = 35", [65, 45, 76], 34),
        ("1 + 33 = 34 = 65 + 45 - 76", [65, 45, 76], 34),
        ("2 ** 3", [2, 3], 8),
        ("8 // 3", [8, 3], 2),
        ("8 / (3 - 3)", [8, 3, 3], 8),
        ("(" * 99 + "5 + 3" + ")" * 99, [5, 3], 8),  # longer than any expression has to be
        ("007 + 1", [7, 1], 8),
        ("int(5) + 3", [5, 3], 8),
        ("٥ + 3", [5, 3], 8),
        ("", [5, 3], 8),
    ],
)
def test_nothing_else_counts(text: str, nums: list[int], target: int) -> None:
    assert countdown(answered(text), nums=nums, target=target) == 0.0


def test_division_is_exact() -> None:
    assert countdown(answered("1 / (1 / 3 - 1 / 4)"), nums=[1, 1, 3, 1, 4], target=12) == 1.0  # floats give 11.999...
    assert countdown(answered("7 / 3 * 3"), nums=[7, 3, 3], target=7) == 1.0
    assert countdown(answered("7 / 2 * 2"), nums=[7, 2, 2], target=6) == 0.0  # whole-number division would say so


def test_only_the_last_answer_counts() -> None:
    several = "<answer>5 + 3</answer> or rather <answer>5 - 3</answer>"
    assert countdown(several, nums=[5, 3], target=2) == 1.0
    assert countdown(several, nums=[5, 3], target=8) == 0.0
    assert countdown("5 + 3", nums=[5, 3], target=8) == 0.0


def test_every_puzzle_of_the_repository_has_a_solution_and_none_is_in_both_files() -> None:
    test, train = rows(DATA / "test.jsonl"), rows(DATA / "train.jsonl.gz")
    assert (len(test), len(train)) == (1000, 20_000)
    for row in test + train[::20]:
        assert countdown(answered(row["answer"]), row["nums"], row["target"]) == 1.0, row
    puzzles = [{(*sorted(row["nums"]), row["target"]) for row in each} for each in (test, train)]
    assert not puzzles[0] & puzzles[1]


def rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]
