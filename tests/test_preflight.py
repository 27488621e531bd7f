"""Preflight: what it measures, what it says, and that a run does not notice it."""

from __future__ import annotations

import json
import math
import random
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import ROOT, TINY, FixedGenerator, launch, number_in_text, read_json, tiny_config

from grpo import Config, Trainer
from grpo.check import templates
from grpo.run.preflight import (
    Audit,
    Function,
    GroupStats,
    Preflight,
    PreflightRefused,
    Result,
    Skipped,
    TemplateReport,
    better,
    diagnose,
    diagnose_data,
    group_stats,
    in_both,
    is_refused,
    largest_share,
    measure,
    report,
)
from grpo.system import distributed
from grpo.system.jsonl import read_jsonl
from grpo.types import Completion, Group, Prompt, Scores

nan = math.nan

# ---- numbers ---------------------------------------------------------------------------------------------------------


def a_group(rewards: list[float], endings: str = "", **changes: Any) -> GroupStats:
    """A letter of `endings` per completion: e for an end token, s for a stop text, c for cut off."""
    names: dict[str, Any] = {"e": "end token", "s": "stop text", "c": "cut off"}
    kinds = [names[letter] for letter in endings or "e" * len(rewards)]
    seen = GroupStats(kinds, [False] * len(rewards), [10] * len(rewards), rewards, {"it": rewards}, "text")
    return replace(seen, **changes)


def test_the_numbers_of_a_template_by_hand() -> None:
    groups = [
        a_group([1.0, 0.0, nan], "ecs", lens=[2, 4, 6], empty=[True, False, False], values={"it": [1.0, 0.0, nan]}),
        a_group([1.0, 1.0, 1.0], "eec", lens=[2, 2, 2], values={"it": [0.0, nan, 1.0]}),
        a_group([0.0, 0.0, 0.0], "eee", lens=[2, 2, 8], values={"it": [nan, nan, nan]}),
        a_group([nan, nan, nan], "eee", lens=[2, 2, 2], values={"it": [0.5, 0.5, 0.5]}),
    ]
    trial = measure("chat", groups, {"it": 1.0}, num_too_long=3)
    assert (trial.num_groups, trial.group_size, trial.num_with_signal, trial.num_too_long) == (4, 3, 1, 3)
    assert trial.reward_mean == pytest.approx(4 / 8)  # the known ones: 1, 0, three times 1, three times 0
    assert trial.reward_range == (0, 1)
    assert trial.num_always_best == 1  # the second group
    shares = [trial.ended, trial.stopped, trial.truncated, trial.empty, trial.unknown]
    assert [share * 12 for share in shares] == pytest.approx([9, 1, 2, 1, 4])
    assert trial.length_mean == pytest.approx((2 + 4 + 6 + 6 + 12 + 6) / 12)
    # of seven verdicts: 1, 0, 0, 1, 0.5 three times; they differ in the first two groups
    assert trial.functions == {"it": Function(1.0, pytest.approx(3.5 / 7), pytest.approx(2 / 4))}


def test_endings_and_emptiness_of_completions() -> None:
    prompt = Prompt(0, [1], "Q<think>", "<think>", {"question": "Q"})
    completions = [
        Completion([5, 2], [0, 0], "<think>a", "stop"),
        Completion([5, 7], [0, 0], "<think>b", "stop"),
        Completion([5, 6], [0, 0], "<think>c", "length"),
        Completion([2], [0], "<think> \n", "stop"),
    ]
    scores = Scores(torch.tensor([[9.0] * 4, [1.0, 2.0, 3.0, 4.0]]), {"f": torch.zeros(2, 4)}, 0, 0)
    seen = group_stats(Group(prompt, completions), scores, 1, end_token_ids=[2, 3])
    assert seen.endings == ["end token", "stop text", "cut off", "end token"]
    assert seen.empty == [False, False, False, True]
    assert seen.lens == [2, 2, 2, 1]
    assert seen.rewards == [1, 2, 3, 4]


def test_the_bound_is_that_share_under_which_no_signal_has_a_chance_of_five_percent() -> None:
    assert largest_share(32) == pytest.approx(0.0894, abs=1e-4)
    rng = random.Random(0)
    share = largest_share(10)
    none = sum(not any(rng.random() < share for _ in range(10)) for _ in range(20_000)) / 20_000
    assert none == pytest.approx(0.05, abs=0.005)  # three standard errors


# ---- verdicts --------------------------------------------------------------------------------------------------------

HEALTHY = TemplateReport(
    template="chat",
    num_groups=32,
    group_size=8,
    num_with_signal=20,
    functions={"accuracy": Function(1.0, 0.2, 0.5), "format": Function(0.5, 0.4, 0.6)},
    reward_mean=0.4,
    reward_range=(0.0, 1.5),
    num_always_best=2,
    ended=0.95,
    stopped=0.0,
    truncated=0.05,
    empty=0.0,
    unknown=0.0,
    length_mean=100.0,
    example="'text'",
)


def functions(**means_and_signals: tuple[float | None, float]) -> dict[str, Function]:
    return {name: Function(1.0, *each) for name, each in means_and_signals.items()}


def constant(reward: float, **means: float) -> dict[str, Any]:
    flat = functions(**{name: (mean, 0.0) for name, mean in means.items()})
    return {"num_with_signal": 0, "reward_range": (reward, reward), "functions": flat}


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        (
            constant(0, accuracy=0),
            "refuse",
            "in 0 of 32 groups of 8 do rewards differ; the true share is below 9% at 95%",
        ),
        (constant(0, accuracy=0), "refuse", "Every completion has the reward 0 (accuracy 0). Take easier questions"),
        (
            constant(2, accuracy=1, format=1),
            "refuse",
            "solved already: every completion has accuracy 1, format 1. Take",
        ),
        (constant(1, accuracy=0, format=1), "refuse", "Every completion has the reward 1 (accuracy 0, format 1)."),
        ({"num_with_signal": 0}, "refuse", "Some questions always have a reward of 1.5, others always of 0."),
        ({"reward_range": None, "num_with_signal": 0}, "refuse", "not one of 256 completions has a known reward"),
        (
            {"num_with_signal": 3, "num_always_best": 25},
            "warn",
            "3 of 32 groups have signal; of the others, 25 have the highest reward throughout (too easy) and 4 do not",
        ),
        (
            {"functions": functions(accuracy=(0.0, 0.0), format=(0.3, 0.5))},
            "warn",
            "accuracy is the same in all completions of every question (accuracy 0): all there is to learn is format.",
        ),
        (
            {"truncated": 1.0, "ended": 0.0},
            "refuse",
            "100% of the completions are cut off at rollout.max_completion_tokens, 0% end with an end-of-sequence token",
        ),
        ({"truncated": 0.6, "ended": 0.4}, "warn", "ends badly: 60% of the completions are cut off"),
        (
            {"empty": 1.0, "length_mean": 1.0},
            "refuse",
            "100% of the completions are nothing but white space, 1.0 token",
        ),
        ({"empty": 0.3}, "warn", "ends badly: 30% of the completions are nothing"),
        ({"unknown": 0.25}, "warn", "the reward of 25% of the completions is unknown"),
    ],
)
def test_what_is_said_of_a_template(changes: dict[str, Any], level: str, said: str) -> None:
    trial = replace(HEALTHY, **changes)
    problems = diagnose(trial)
    assert [(each.level, said in each.text) for each in problems] == [(level, True)]
    assert is_refused(trial) == (level == "refuse")


def test_nothing_is_said_of_a_template_that_is_fine() -> None:
    assert diagnose(HEALTHY) == []
    assert diagnose(replace(HEALTHY, functions=HEALTHY.functions | {"watched": Function(0.0, 0.0, 0.0)})) == []


def test_the_better_template_has_signal_from_more_functions_or_clearly_more_signal() -> None:
    poor = replace(HEALTHY, template="r1_zero", num_with_signal=12)  # 12/32 and 20/32: 0.25 apart, two errors are 0.24
    assert better(poor, [HEALTHY]) == HEALTHY
    assert better(replace(poor, num_with_signal=13), [HEALTHY]) is None
    assert better(HEALTHY, [poor]) is None
    assert better(replace(poor, num_with_signal=0), [replace(poor, num_with_signal=2), HEALTHY]) == HEALTHY
    assert better(Skipped("r1_zero", "too long"), [poor]) == poor
    format_only = replace(HEALTHY, functions=functions(accuracy=(0.0, 0.0), format=(0.3, 0.9)), num_with_signal=29)
    assert better(format_only, [poor]) == poor
    endless = replace(HEALTHY, num_with_signal=32, truncated=1.0)
    assert better(poor, [endless]) is None
    assert better(replace(poor, num_with_signal=0), [endless]) is None


def test_the_data_are_judged_by_what_is_dropped_and_by_what_leaks() -> None:
    prompts = [Prompt(i, [1], "", "", {"question": q}) for i, q in enumerate(["What is  1+1?", "Why?", "Who?"])]
    assert in_both(prompts[:2], [prompts[2], replace(prompts[0], columns={"question": "what is 1+1?\n"})]) == [
        "what is 1+1?\n"
    ]
    audits = [Audit("training questions", 100, 10, ["row 3"], 0), Audit("held-out questions", 50, 0, [], 4)]
    dropped, leaked = diagnose_data(audits, ["Why?"], num_held_out=46)
    assert dropped.text.startswith("10 of 100 training questions have an answer that cannot be graded and are dropped.")
    assert leaked.text.startswith("1 of 46 held-out questions are training questions too, e.g. 'Why?'")
    assert diagnose_data([Audit("training questions", 100, 9, [], 9)], [], num_held_out=0) == []


def test_the_report_shows_numbers_reasons_and_the_better_template() -> None:
    refused = replace(HEALTHY, template="none", **constant(0, accuracy=0, format=0), example="'User: User:'")
    audits = [Audit("training questions", 100, 2, ["row 3 ('Why?'): it is empty"], 1)]
    text = report(Result([refused, HEALTHY, Skipped("r1_zero", "too long")], audits, [], 0, seconds=1.0))
    header, row = (line.split() for line in text.splitlines()[2:4])
    assert header == [
        "template",
        "answers",
        "signal",
        "accuracy",
        "format",
        "ended",
        "cut",
        "off",
        "empty",
        "unknown",
        "length",
    ]
    assert row == ["none", "32", "x", "8", "0/32", "0.000", "0.000", "0.950", "0.050", "0.000", "0.000", "100.0"]
    assert "r1_zero: not tried: too long" in text
    assert "97 of 100 training questions are used; 2 cannot be graded, 1 are too long\n      row 3 ('Why?'): it" in text
    assert "REFUSED: nothing to learn" in text
    assert "a completion of it: 'User: User:'" in text
    assert "BETTER: data.template=chat: 20 of 32 groups have signal, accuracy 0.200, format 0.400, 5% cut off" in text
    fine = report(Result([HEALTHY], audits, [], 0, seconds=1.0))
    assert "fine: 20 of 32 groups have signal" in fine
    assert "BETTER" not in fine


# ---- in a run --------------------------------------------------------------------------------------------------------


def one_in_two(completion: str) -> float:
    return float(len(completion) % 2)


def with_preflight(directory: Path, **sections: Any) -> Config:
    settings = {"preflight": {"num_questions": 4}, "rollout": {"max_completion_tokens": 48}}
    return tiny_config(directory, **{**settings, **sections})


def logged(run: Path) -> list[list[dict[str, Any]]]:
    """Metrics without what a clock measured, and completions."""
    metrics = [
        {name: value for name, value in row.items() if not name.startswith(("time/", "throughput/"))}
        for row in read_jsonl(run / "metrics.jsonl")
    ]
    return [metrics, read_jsonl(run / "completions.jsonl")]


@pytest.mark.parametrize("engine", ["hf", "native"])
def test_a_run_is_the_same_with_preflight_and_without_and_a_resumed_one_has_none(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_states = []
    check = Preflight.before_training

    def watched(own: Preflight, directory: Path) -> None:
        states = [(torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))]
        check(own, directory)
        states.append((torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())))
        random_states.append(states)

    monkeypatch.setattr(Preflight, "before_training", watched)
    rollout = {"engine": engine, "max_completion_tokens": 48}
    config = with_preflight(tmp_path / "with", rollout=rollout, run={"steps": 2, "resume": "auto"})
    Trainer(config, rewards=[one_in_two]).train()
    Trainer(tiny_config(tmp_path / "without", rollout=rollout), rewards=[one_in_two]).train()
    assert logged(tmp_path / "with") == logged(tmp_path / "without")
    assert len(random_states) == 2
    assert all(before == after for before, after in random_states)
    assert not (tmp_path / "without/preflight.json").exists()
    found = read_json(tmp_path / "with/preflight.json")
    assert (found["verdict"], found["template"], found["better_template"]) == ("fine", "chat", None)
    assert (found["templates"][0]["num_groups"], found["templates"][0]["group_size"]) == (4, 4)
    assert found["data"][0]["num_rows"] == 200
    (tmp_path / "with/preflight.json").unlink()
    Trainer(config, rewards=[one_in_two]).train()
    assert not (tmp_path / "with/preflight.json").exists()


def test_a_reward_that_is_the_same_for_all_is_refused_or_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(with_preflight(tmp_path / "stop"), rewards=[lambda completion: 1.0])
    with pytest.raises(PreflightRefused, match=r"0 of 4 groups of 4 .* below 53% at 95% .* solved already"):
        trainer.train()
    assert not (tmp_path / "stop/metrics.jsonl").exists()
    assert read_json(tmp_path / "stop/preflight.json")["verdict"] == "refuse"
    config = with_preflight(tmp_path / "warn", preflight={"num_questions": 4, "on_failure": "warn"}, run={"steps": 1})
    capsys.readouterr()
    Trainer(config, rewards=[lambda completion: 1.0]).train()
    said = capsys.readouterr().out
    assert "REFUSED: nothing to learn" in said
    assert re.search("none +4 x 4", said)  # the other templates were tried, since the configured one failed
    assert len(read_jsonl(tmp_path / "warn/metrics.jsonl")) == 1


def test_processes_share_the_questions_and_agree(tmp_path: Path) -> None:
    launch("worker_preflight.py", str(tmp_path / "two"), processes=2)
    trainer = Trainer(tiny_config(tmp_path / "one"), rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()
    expected = json.loads(trainer.preflight.examine(num_questions=5).to_json())
    trainer.close()
    found = read_json(tmp_path / "two/preflight.json")
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


# ---- the script ------------------------------------------------------------------------------------------------------


def quickstart(*overrides: str) -> Config:
    return Config.load(ROOT / "configs/quickstart.yaml", [f"model.name={TINY / 'model'}", *overrides])


def test_on_the_tiny_model_the_papers_template_fails_and_chat_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    wide = quickstart("data.template=r1_zero", "data.max_prompt_tokens=300", "rewards=[{function: accuracy}]")
    assert templates.check(wide, templates=["chat"], num_questions=4) == 1
    said = capsys.readouterr().out
    assert "REFUSED: nothing to learn: in 0 of 4 groups of 8" in said
    assert "REFUSED: ends badly: 100% of the completions are cut off" in said  # it never ends there
    assert "BETTER: data.template=chat: 2 of 4 groups have signal" in said
    assert re.search("template .* format", said)  # watched, though not rewarded


def exit_code(script: str, *arguments: str) -> int:
    """Of a script, run in this process to save the time of importing everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, "--config", "configs/quickstart.yaml", *arguments])
        patch.setattr(distributed, "stop", lambda: None)  # DeepSpeed does not start a second time in a process
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert isinstance(ended.value.code, int), ended.value
    return ended.value.code


def test_the_script_exits_with_0_1_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--templates", "chat", "--questions", "8", "--set"]
    assert exit_code("preflight.py", *options, "run.seed=0") == 0
    assert "fine: " in capsys.readouterr().out
    assert exit_code("preflight.py", *options, "data.template=r1_zero") == 1  # longer than data.max_prompt_tokens
    said = capsys.readouterr().out
    assert "r1_zero: not tried: data.max_prompt_tokens is 96; the shortest of 4000 prompts has 244 tokens" in said
    assert "REFUSED: there are no prompts for data.template r1_zero" in said
    assert "BETTER: data.template=chat" in said
    assert exit_code("preflight.py", *options, "data.name=nowhere.jsonl") == 2
    assert "error: data.name is 'nowhere.jsonl'; there is no such file" in capsys.readouterr().err


def test_training_that_preflight_refuses_exits_with_1_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["rollout.max_completion_tokens=4", "preflight.num_questions=2", f"run.dir={tmp_path / 'run'}"]
    assert exit_code("train_zero.py", "--set", *overrides) == 1
    assert "REFUSED: ends badly" in capsys.readouterr().out
