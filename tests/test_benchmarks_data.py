"""Benchmarks are read as their sources have them; the probes' answers are right; shared words are found."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import accuracy
from helpers import ROOT, TINY, clean_environment

from grpo.data import registry as benchmarks
from grpo.data.contamination import Overlap, overlaps
from grpo.data.probes import PROBES
from grpo.data.registry import BENCHMARKS, load

AS_ON_THE_HUB = {
    "gsm8k": (
        {"question": "How many?", "answer": "She has <<1+2=3>>3.\n#### 1,003"},
        {"question": "How many?", "answer": "1,003"},
    ),
    "math500": (
        {
            "problem": "Find x.",
            "solution": "...",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "a",
        },
        {"question": "Find x.", "answer": r"\frac{1}{2}", "level": 2, "subject": "Algebra"},
    ),
    "aime2024": (
        {"id": 60, "problem": "Find n.", "solution": "...", "answer": "204", "url": "", "year": "2024"},
        {"question": "Find n.", "answer": "204"},
    ),
    "amc2023": (
        {"id": 0, "question": "Find n.", "answer": "27.0", "url": ""},
        {"question": "Find n.", "answer": "27.0"},
    ),
    "minerva": ({"question": "Find v.", "answer": "4.5e33"}, {"question": "Find v.", "answer": "4.5e33"}),
    "olympiad": (
        {
            "context": "Let $n>1$.",
            "question": "Find n.",
            "final_answer": ["$2$", "$3$"],
            "subfield": "Algebra",
            "answer": None,
        },
        {"question": "Let $n>1$.\n\nFind n.", "answer": "2, 3", "subject": "Algebra"},
    ),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_the_hub_become_questions_with_one_answer(name: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    given, expected = AS_ON_THE_HUB[name]
    monkeypatch.setattr(benchmarks, "load_table", lambda *arguments: asked.append(arguments) or [given])
    assert load(name) == [expected]
    known = BENCHMARKS[name]
    assert asked == [(known.source, known.subset, known.split, f"--benchmarks {name}")]


def test_a_local_file_takes_the_place_of_the_hub(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    rows = [{"question": "a", "answer": "1", "level": 3}, {"question": "b", "answer": 2}]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert load("math500", str(path)) == [
        {"question": "a", "answer": "1", "level": 3},
        {"question": "b", "answer": "2"},
    ]
    assert load("mine", str(path)) == load("math500", str(path))


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^--data mine is '/nowhere\.jsonl'; there is no such file\. Correct"):
        load("mine", "/nowhere.jsonl")
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a"\n')
    with pytest.raises(ValueError, match=r"^--data mine is '.*'; .*a\.jsonl, line 1, column 17: not JSON: .* Correct"):
        load("mine", str(path))
    path.write_text('{"problem": "a", "answer": "1"}\n')
    with pytest.raises(
        ValueError, match=r"^--data mine: there is no column 'question'; the data has problem, answer\. Rename"
    ):
        load("mine", str(path))
    path.write_text('{"question": "a", "gold": "1"}\n')
    with pytest.raises(
        ValueError, match=r"^--data mine: there is no column 'answer'; the data has question, gold\. Rename"
    ):
        load("mine", str(path))
    path.write_text('{"question": "a", "answer": "1"}\n{"question": null, "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"^--data mine: row 1 has nothing in the column 'question'\. Drop the row\.$"):
        load("mine", str(path))


def test_the_answers_of_the_probes_are_right():
    golds = [probe.answer for probe in PROBES]
    assert golds[:3] == [
        str("strawberry".count("r")),
        str("Mississippi".count("s")),
        str(sum(letter in "aeiou" for letter in "airborne")),
    ]
    assert golds[3] == str(2485 * 8919)
    assert Fraction(golds[4]) == round(Fraction(23929, 5783), 8)
    assert Fraction(golds[5]) * 3 / 67 == 27
    left_of = {11: 12, 12: 13, 13: 14, 14: 15}  # who stands to the left of whom
    left_of[15] = (set(range(11, 16)) - set(left_of.values())).pop()  # the circle closes
    assert golds[7] == str(next(number for number, left in left_of.items() if left == 11))
    assert (golds[6], golds[8]) == ("1", "0")
    assert len(PROBES) == 9


def test_the_probes_are_graded_by_the_number_and_nothing_else():
    assert load("probes") == [probe.row for probe in PROBES]
    for probe in PROBES:
        assert accuracy(f"<answer>{probe.answer}</answer>", probe.answer) == 1
        assert accuracy(f"It is \\boxed{{{probe.answer}}}.", probe.answer, source="anywhere") == 1
        assert accuracy("<answer>2</answer>", probe.answer) == 0
    assert accuracy("<answer>22,163,715</answer>", "22163715") == 1
    assert accuracy("<answer>4.13781</answer>", "4.13781774") == 0


TRAIN = [
    "Anna has 3 apples and she gives two of them to her brother Ben.",
    "What is 3 + 4?",
    "one two three four five six seven eight nine ten eleven",
]


def test_ten_words_in_a_row_are_shared_and_nine_are_not():
    ten = "so two, THREE four-five six seven eight nine ten eleven twelve"
    nine = "three four five six seven eight nine ten eleven twelve thirteen"
    (found,) = overlaps(TRAIN, [nine, ten])
    assert found == Overlap(1, 2, 10 / 12, "two three four five six seven eight nine ten eleven")
    assert [each.test for each in overlaps(TRAIN, [nine, ten], num_words=9)] == [0, 1]


def test_a_short_question_is_shared_only_whole_with_its_signs():
    assert overlaps(TRAIN, ["what  is 3 + 4?", "What is 3 - 4?", "What is 3"]) == [Overlap(0, 1, 1.0, "what is 3 + 4?")]


def test_chinese_characters_are_words():
    question = "小明有五个苹果，他吃了两个，还剩几个苹果？"
    (found,) = overlaps([question + "请回答"], [question])
    assert found.share > 0.9


def test_each_test_question_is_reported_once_with_the_one_that_shares_most():
    half = "Anna has 3 apples and she gives two of them away, and Carl eats none of the others at all."
    (found,) = overlaps(["x", half, TRAIN[0], TRAIN[0] + " And then?"], [TRAIN[0]])
    assert (found.test, found.train, found.share) == (0, 2, 1.0)
    (found,) = overlaps([half], [TRAIN[0]])
    assert found.share == 10 / 14  # "Anna ... them"


def test_thirteen_thousand_questions_are_searched_in_seconds():
    rng = random.Random(0)
    words = [f"w{n}" for n in range(5000)]
    train = [" ".join(rng.choices(words, k=60)) for _ in range(13_000)]
    test = [" ".join(rng.choices(words, k=60)) for _ in range(999)] + [train[-1][:200]]
    started = time.perf_counter()
    assert [each.test for each in overlaps(train, test)] == [999]
    assert time.perf_counter() - started < 10  # 1 s on a quiet core


def test_the_script_tells_by_its_exit_code_whether_words_are_shared():
    command = [sys.executable, "scripts/contamination.py", "--train", str(TINY / "test.jsonl"), "--benchmarks", "mine"]

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--data", f"mine={path}"], cwd=ROOT, capture_output=True, text=True, env=clean_environment()
        )

    same = run(TINY / "test.jsonl")
    assert same.returncode == 1, same.stderr
    assert "(100.0%) share 10 words in a row with one of 256 training questions; 256 share half" in same.stdout
    assert run(Path("/nowhere.jsonl")).returncode == 2
