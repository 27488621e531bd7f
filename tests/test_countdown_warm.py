"""configs/countdown-warm: what its rows show, that they belong to no other puzzles, and that both stages ask alike."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from grpo.rewards import countdown, countdown_search, countdown_trials, format
from grpo.rewards.countdown_search import trials
from helpers import ROOT, TINY
from transformers import AutoTokenizer

from grpo.check import memory, supervised
from grpo.config import Config, SupervisedConfig
from grpo.data.prompts import build_prompts
from grpo.data.rows import load_rows, prepare_rows
from grpo.pipeline.stages import read_plan
from grpo.sft.rows import read_rows

FOLDER = ROOT / "configs" / "countdown-warm"
PUZZLES = ROOT / "configs" / "countdown"


def lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    return [json.loads(each) for each in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()]


ROWS = lines(FOLDER / "rows.jsonl.gz")
SHORT = lines(ROOT / "configs/countdown-short/rows.jsonl.gz")


def puzzle(row: dict[str, Any]) -> tuple[int, ...]:
    return (*sorted(row["nums"]), int(row["target"]))


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_countdown_rows

    yield make_countdown_rows
    sys.modules.pop("make_countdown_rows", None)


# ---- rows --------------------------------------------------------------------------------------------------------------


def test_every_row_is_right_and_the_rewards_read_the_trials_that_the_script_told():
    for row in ROWS:
        completion, nums, target = row["completion"], row["nums"], row["target"]
        assert countdown(completion, nums, target) == 1.0, completion
        assert format(f"<think>{completion}") == 1.0, completion
        assert countdown_trials(completion, nums) == row["trials"], completion
        assert countdown_search(completion, nums, target) == float(row["trials"] > 1), completion
        read = trials(completion, nums)
        assert all(trial.value == trial.claimed for trial in read), completion
        assert [trial.value == target for trial in read] == [False] * (row["trials"] - 1) + [True], completion


def test_searches_that_give_up_are_short_mostly_wrong_and_answer_with_the_nearest_trial():
    right = [bool(countdown(row["completion"], row["nums"], row["target"])) for row in SHORT]
    assert 0.3 < sum(right) / len(SHORT) < 0.4
    assert 1.5 < sum(row["trials"] for row in SHORT) / len(SHORT) < 1.7
    for row, is_right in zip(SHORT, right, strict=True):
        read = trials(row["completion"], row["nums"])
        assert len(read) == row["trials"], row
        assert format(f"<think>{row['completion']}") == 1.0, row
        answer = row["completion"].partition("<answer> ")[2].removesuffix(" </answer>")
        nearest = min(read, key=lambda trial: abs(trial.value - row["target"]))
        assert trials(answer, row["nums"])[0].value == nearest.value, row
        assert (nearest.value == row["target"]) == is_right, row
        assert ("nearest" in row["completion"]) != is_right, row


def test_the_verdict_of_each_trial_is_true():
    for row in (*ROWS, *SHORT):
        thought = row["completion"].partition(" </think>")[0].splitlines()
        for line, trial in zip(thought[1:-1], trials(row["completion"], row["nums"]), strict=True):
            is_right = trial.value == row["target"]
            assert is_right == line.endswith(("That is it.", "That is the target.", "Yes.")), line
            assert "too high." not in line.lower() or trial.value > row["target"], line
            assert "too low." not in line.lower() or trial.value < row["target"], line
            assert "Not " not in line or line.endswith(f"Not {row['target']}."), line


def test_searches_are_short_and_half_of_them_are_of_three_numbers():
    assert Counter(len(row["nums"]) for row in ROWS) == {3: 1000, 4: 1000}
    told = Counter(row["trials"] for row in ROWS)
    assert sorted(told) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert 3 < sum(number * count for number, count in told.items()) / len(ROWS) < 4
    assert told[1] < 0.3 * len(ROWS)  # the others give trials up


def test_no_row_is_of_a_puzzle_that_is_trained_on_or_asked_later():
    rl = Config.load(FOLDER / "rl.yaml").data
    trained, held_out = load_rows(rl), load_rows(rl, evaluation=True)
    assert (len(trained), len(held_out)) == (8000, 1000)
    for rows in (ROWS, SHORT):
        shown = {puzzle(row) for row in rows}
        assert len(shown) == len(rows)
        assert not shown & {puzzle(row) for row in [*trained, *held_out, *lines(PUZZLES / "test.jsonl")]}
        assert shown <= {puzzle(row) for row in lines(PUZZLES / "train.jsonl.gz")[8000:]}


@pytest.mark.parametrize(("give_up", "shipped"), [(0.0, ROWS), (0.5, SHORT)])
def test_the_script_makes_the_rows_that_are_shipped(maker, give_up: float, shipped: list[dict[str, Any]]):
    puzzles = lines(PUZZLES / "train.jsonl.gz")
    made = maker.rows(puzzles, number=2000, max_trials=8, seed=0, unsolved=Counter(), give_up=give_up)
    assert [*islice(made, 300)] == shipped[:300]  # the others follow from the same draws


def test_the_script_writes_as_many_rows_as_are_asked_for_and_no_more_than_there_are(
    maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given, out = tmp_path / "puzzles.jsonl.gz", tmp_path / "rows.jsonl.gz"
    some = lines(PUZZLES / "train.jsonl.gz")[-40:]
    given.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in some).encode()))
    words = ["make_countdown_rows.py", "--puzzles", str(given), "--out", str(out), "--max-trials", "4", "--rows"]
    monkeypatch.setattr(sys, "argv", [*words, "9"])
    maker.main()
    rows = lines(out)
    assert Counter(len(row["nums"]) for row in rows) == {3: 4, 4: 5}
    assert max(row["trials"] for row in rows) <= 4
    assert "3 numbers: 4 rows, " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "80"])
    with pytest.raises(SystemExit, match=r"--rows is 80; the puzzles give \d+\. Lower it\."):
        maker.main()


@pytest.mark.parametrize("wrong", ["--give-up 50", "--give-up -1", "--rows 0", "--max-trials 0"])
def test_a_wrong_option_of_the_script_is_refused(
    maker, wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["make_countdown_rows.py", *wrong.split()])
    with pytest.raises(SystemExit):
        maker.main()
    assert f"{wrong.split()[0]} is {wrong.split()[1]}; it " in capsys.readouterr().err


def test_a_trial_that_would_be_read_otherwise_is_not_told(maker):
    one, two, three, four = (maker.Term(number, str(number)) for number in (46, 41, 87, 97))
    made = maker.join(one, "+", two, 87)
    late = maker.join(maker.join(four, "-", made, 10), "+", three, 97)  # its 97-87 is taken for the 87 that was given
    assert maker.read_as(late, [46, 41, 87, 97]) is None
    assert maker.read_as(maker.join(three, "-", one, 41), [46, 87]) == "(Sub 87 46)"


# ---- stages ------------------------------------------------------------------------------------------------------------


def test_both_stages_ask_with_the_same_tokens_and_the_row_goes_on_from_there():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    start, rl = SupervisedConfig.load(FOLDER / "start.yaml").data, Config.load(FOLDER / "rl.yaml").data
    groups = read_rows(start, tokenizer, given=ROWS[:50], model="tiny").groups
    asked = prepare_rows(ROWS[:50], rl, answer_regex=None, setting="data.name")
    prompts, dropped = build_prompts(asked, tokenizer, rl)
    assert not dropped
    assert [group.prompt.token_ids for group in groups] == [prompt.token_ids for prompt in prompts]
    assert str(ROWS[0]["nums"]) in prompts[0].text
    assert all(prompt.text.endswith(" Assistant: <think>") and prompt.prefill == "<think>" for prompt in prompts)
    for row, group in zip(ROWS, groups, strict=False):
        learned = group.completions[0].token_ids
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]) == row["completion"]


def test_both_stages_are_asked_the_same_held_out_puzzles_and_graded_alike():
    start, rl = SupervisedConfig.load(FOLDER / "start.yaml"), Config.load(FOLDER / "rl.yaml")
    assert start.rewards == rl.rewards
    assert start.parts.evaluation.num_questions == rl.evaluation.num_questions
    assert start.parts.eval_sampling == rl.eval_sampling
    assert load_rows(start.parts.data, evaluation=True) == load_rows(rl.data, evaluation=True)


def test_the_path_hands_the_model_of_the_start_to_reinforcement_learning(tmp_path: Path):
    plan = read_plan("countdown-warm", tmp_path, ["start:model.name=a_model", "rl:run.steps=50"])
    assert [stage.name for stage in plan.stages] == ["start", "rl"]
    start, rl = (plan.config(stage) for stage in plan.stages)
    assert (start.model.name, rl.model.name) == ("a_model", str(tmp_path / "start"))
    assert rl.run.steps == 50


def test_both_stages_rehearse(tmp_path: Path):
    """With the tiny model, few rows and short answers; the settings are else those of the files."""
    short = [f"model.name={TINY / 'model'}", "evaluation.num_questions=2", "data.max_prompt_tokens=480"]
    of_start = [
        *("data.split=train[:32]", "training.rows_per_update=4", "evaluation.max_completion_tokens=16"),
        f"run.dir={tmp_path / 'start'}",
    ]
    assert supervised.check(SupervisedConfig.load(FOLDER / "start.yaml", [*short, *of_start])) == 0
    of_rl = [
        *("rollout.num_prompts=2", "rollout.group_size=2", "rollout.max_completion_tokens=16"),
        *("data.split=train[:32]", "preflight.num_questions=0", f"run.dir={tmp_path / 'rl'}"),
    ]
    assert memory.check(Config.load(FOLDER / "rl.yaml", [*short, *of_rl])) == 0
