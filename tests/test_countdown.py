"""The countdown reward, and the puzzles that come with the repository."""

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import countdown, countdown_search, countdown_trials
from helpers import tiny_settings

from grpo import Config, Trainer
from grpo.system.jsonl import read_jsonl

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


# --- what it tries ----------------------------------------------------------------------------------------------------------

NUMS, TARGET = [65, 45, 76], 34


@pytest.mark.parametrize(
    ("thought", "trials", "searches"),
    [
        ("basic arithmetic process here", 0, 0),
        ("I add the first two and take off the third.", 0, 0),
        ("Wait, let me check. However, I made a mistake. Let me verify.", 0, 0),  # words alone
        ("65 + 45 - 76 = 34", 1, 0),
        ("65 + 45 - 76 = 34. Check: 45 + 65 - 76 = 34.", 1, 0),  # the same in another order
        ("65 + 45 = 110, and 110 - 76 = 34", 1, 0),  # in two steps
        ("76 - 65 = 11, then 11 + 45 = 56. That is too much. 65 + 45 = 110. 110 - 76 = 34.", 2, 1),
        ("76 - 65 + 45 = 56, too much.\n76 - (65 - 45) = 56.\n65 - 76 + 45 = 34, yes.", 3, 1),
        ("1) 76 - 65 + 45 = 56\n2) 65 + 45 - 76 = 34", 2, 1),
        ("- 76 + 65 - 45\n- 65 + 45 - 76", 2, 1),
        ("(76 - 65) \\times 45 = 495 is far off; $65 + 45 - 76$", 2, 1),
        ("65 + 45 - 76 = 34, or else 65 - 76 + 45", 2, 0),  # the first was right
        ("76 - 65 + 45 = 34. Or 65 + 45 - 76 = 34.", 2, 0),  # it says so, though wrongly
        ("65 + 45 = 110, 65 - 45 = 20, 76 - 20 = 56", 1, 0),  # parts of it are no trials
        ("65 + 45 + 45 - 76", 0, 0),  # a number twice
        ("65 + 45 - 75", 0, 0),  # a number that was not given
        ("65 / (45 - 45) + 76", 0, 0),
        ("65 / 45 = 1.4 and 76 / 1.4", 0, 0),
        ("(" * 300 + "65 + 45 - 76" + ")" * 300, 0, 0),
    ],
)
def test_trials_are_read_from_arithmetic(thought: str, trials: int, searches: int) -> None:
    assert countdown_trials(thought, NUMS) == trials
    assert countdown_search(thought, NUMS, TARGET) == searches


def test_the_answer_is_a_trial_and_halves_are_exact() -> None:
    wrong = answered("76 - 65 + 45")
    assert countdown_trials(wrong, NUMS) == 1
    assert countdown_search(wrong, NUMS, TARGET) == 0  # nothing follows it
    tried = "<think> 76 - 65 + 45 is 56. </think> <answer> 65 + 45 - 76 </answer>"
    assert countdown_search(tried, [str(number) for number in NUMS], str(TARGET)) == 1
    assert countdown_trials("7 / 2 = 3.5. 3.5 * 4 = 14", [7, 2, 4]) == 1
    assert countdown_trials("7 / 2 = 3.5. 3 * 4 = 12", [7, 2, 4]) == 0


def test_whatever_a_model_writes_is_read_without_an_error_and_soon() -> None:
    rng = random.Random(0)
    pieces = [
        "65",
        "45",
        "76",
        "+",
        "-",
        "*",
        "/",
        "(",
        ")",
        "=",
        " ",
        "\n",
        ".",
        ",",
        "007",
        "1e9",
        "\\div",
        "x",
        "34",
        "99999",
    ]
    start = time.perf_counter()
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=400))
        assert countdown_search(text, NUMS, TARGET) in (0.0, 1.0)
    assert countdown_trials("65 + 45 - 76 = 34\n" * 20_000, NUMS) == 1
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("verdict", ["countdown", "accuracy"])
def test_a_run_on_puzzles_tells_no_forms_of_its_answers(verdict: str, tmp_path: Path):
    """All right ones are arithmetic."""
    settings = tiny_settings(tmp_path / "run", data={"name": str(DATA / "train.jsonl.gz"), "split": "train[:8]"})
    settings["data"] |= {"answer_column": "target", "max_prompt_tokens": 256}
    settings["memory"]["micro_batch_tokens"] = 512
    trainer = Trainer(Config(**settings, rewards=[{"function": verdict}]))
    trainer.train_step()
    trainer.close()
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert ("answer/right" in row) == (verdict == "accuracy")
    assert f"reward/{verdict}" in row
