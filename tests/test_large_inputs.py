"""What must not grow with the size of the data more than it has to: calls for each row, memory for each token, work for pairs.

Counts and bytes, not seconds; of regular expressions, whose work cannot be counted, processor time with a wide margin."""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from grpo.rewards import countdown, countdown_search
from helpers import TINY, tiny_config
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo.cli import report as report_command
from grpo.config import DataConfig
from grpo.config.supervised import RowsConfig
from grpo.data import prompts
from grpo.data.contamination import overlaps
from grpo.data.prompts import build_prompts
from grpo.evaluation.compare import _answers
from grpo.observe.rundir import RunLog
from grpo.rejection.reject import Table, _choose, _replace
from grpo.rejection.rewriting import Kept
from grpo.rejection.rules import Required, Rules
from grpo.report import read
from grpo.rollout.stop_criteria import Ending
from grpo.scoring import answers, statistics
from grpo.scoring.scorer import Scoring
from grpo.serving.text import MOST_HELD, Detokenizer
from grpo.sft.rows import read_rows
from grpo.system import jsonl
from grpo.system.distributed import Processes
from grpo.text.thinking import parts
from grpo.types import Prompt

NUM_ROWS = 50


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY / "model")


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first argument of each call of a function from here on."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[0] if arguments else None)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, call)
    return calls


def count_special_tokens(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> list[None]:
    """An entry for each time that the special tokens are collected, which they are anew each time."""
    calls: list[None] = []
    original = PreTrainedTokenizerBase.all_special_tokens.fget
    assert original is not None

    def get(self: PreTrainedTokenizerBase) -> list[str]:
        calls.append(None)
        return original(self)

    monkeypatch.setattr(type(tokenizer), "all_special_tokens", property(get))
    return calls


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def num_lines(work: Callable[[], object]) -> int:
    """Lines of Python that are run."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# ---- rows and prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "r1_zero"])
def test_prompts_are_tokenized_a_thousand_at_a_time(
    tokenizer: PreTrainedTokenizerBase, template: str, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(NUM_ROWS)]
    config = DataConfig(name="x", template=template)
    whole = [prompt.token_ids for prompt in build_prompts(rows, tokenizer, config)[0]]
    monkeypatch.setattr(prompts, "TOKENIZED_AT_ONCE", 7)
    given: list[int] = []
    original = type(tokenizer)._encode_plus

    def encode(self: Any, text: Any, *arguments: Any, **named: Any) -> Any:
        given.append(len(text) if isinstance(text, list) else 1)
        return original(self, text, *arguments, **named)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", encode)
    assert [prompt.token_ids for prompt in build_prompts(rows, tokenizer, config)[0]] == whole
    assert max(given) == 7


def test_the_special_tokens_are_collected_once_for_all_prompts(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    calls = count_special_tokens(monkeypatch, tokenizer)
    rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(NUM_ROWS)]
    build_prompts(rows, tokenizer, DataConfig(name="x", template="chat"))
    assert 0 < len(calls) < NUM_ROWS


@pytest.mark.parametrize("form", ["question", "messages", "prompt"])
def test_supervised_rows_ask_of_the_tokenizer_once_for_all(
    tokenizer: PreTrainedTokenizerBase, form: str, monkeypatch: pytest.MonkeyPatch
):
    said = "<think> 1 </think> 2"
    row = {
        "question": {"question": "1+1?", "completion": said},
        "messages": {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": said}]},
        "prompt": {"prompt": "1+1?", "completion": said},
    }[form]
    special = count_special_tokens(monkeypatch, tokenizer)
    arguments = counted(monkeypatch, prompts, "_arguments")
    timers = counted(monkeypatch, threading, "Timer")
    tokenizer.chat_template = "{% if thinks %}{% endif %}" + str(tokenizer.chat_template)
    config = RowsConfig(template="chat", chat_template_kwargs={"thinks": True})
    assert len(read_rows(config, tokenizer, given=[row] * NUM_ROWS, model="tiny").groups) == NUM_ROWS
    assert max(len(special), len(arguments), len(timers)) < NUM_ROWS / 5


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        lambda: parts("<answer>4</answer>" * 20_000),
        lambda: countdown("<answer>" + "\\[ a " * 20_000 + "</answer>", [1, 2, 3], 6),
        lambda: countdown_search("<think>" + "1" * 100_000 + "</think>", [1, 2, 3], 6),
    ],
    ids=["tags", "formulas", "digits"],
)
def test_a_long_text_takes_no_longer_than_its_length(work: Callable[[], object]):
    assert processor_seconds(work) < 1.5  # some hundredths; read again from each place they take ten seconds and more


def test_questions_in_the_same_words_are_compared_once_with_the_test_questions():
    words = "Using these numbers make an equation that equals the target in as few steps"
    train, test = [f"{words} {n}" for n in range(200)], [f"{words} {n}" for n in range(1000, 1040)]
    few = num_lines(lambda: overlaps(train[:50], test))
    assert num_lines(lambda: overlaps(train, test)) < few + 150 * 100  # a pair takes 18 lines, of 40 a question
    assert [each.train for each in overlaps(train, test)] == [0] * 40


def test_bytes_that_never_become_a_character_are_not_read_again_with_each_token(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    ending = Ending(tokenizer, [])
    half = next(token for token in range(len(tokenizer)) if ending.text([token]) == "\ufffd")
    sizes: list[int] = []
    original = Ending.text

    def text(self: Ending, token_ids: list[int]) -> str:
        sizes.append(len(token_ids))
        return original(self, token_ids)

    monkeypatch.setattr(Ending, "text", text)
    reader = Detokenizer(ending)
    shown = "".join(reader.feed([half]) for _ in range(3000)) + reader.close()
    assert shown == "\ufffd" * 3000
    assert max(sizes[:-1]) <= 2 * MOST_HELD + 2  # the last is close


# ---- evaluations, reports, rejection ---------------------------------------------------------------------------------


def test_intervals_of_many_questions_take_a_bounded_memory_and_are_the_same(monkeypatch: pytest.MonkeyPatch):
    columns = {"pass@1": np.random.default_rng(0).random(1000)}
    whole = statistics.estimate(columns)["pass@1"]
    monkeypatch.setattr(statistics, "COUNTS_AT_ONCE", 2**14)
    assert peak_bytes(lambda: statistics.estimate(columns)) < 2**22
    part = statistics.estimate(columns)["pass@1"]
    assert (part.value, part.low, part.high) == pytest.approx((whole.value, whole.low, whole.high), abs=1e-12)


LONG = "a long thought " * 2000


def answer(step: int, number: int) -> dict[str, Any]:
    return {
        "step": step,
        "row": number,
        "question": "1+1?",
        "answer": "2",
        "completion": LONG,
        "finish_reason": "stop",
        "num_tokens": 6000,
        "rewards": {"accuracy": 1.0},
    }


def a_run(directory: Path, num_evaluations: int) -> Path:
    directory.mkdir()
    rows = [answer(step, number) for step in range(num_evaluations) for number in range(20)]
    (directory / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"step": step, "reward/mean": 0.5} for step in range(1, num_evaluations)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return directory


def test_a_report_holds_the_texts_of_those_answers_only_that_it_shows(tmp_path: Path):
    run = a_run(tmp_path / "run", 10)
    assert (run / "evaluations.jsonl").stat().st_size > 5_000_000
    assert peak_bytes(lambda: read.read_runs([run], max_completions=10)) < 1_500_000
    (found,) = read.read_runs([run], max_completions=10)
    assert len(found.evaluations) == 200
    assert "completion" not in found.evaluations[0]
    assert found.sources[0].rows
    assert all(row["completion"] == LONG for row in found.sources[0].rows)


def test_a_report_reads_a_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = a_run(tmp_path / "run", 3)
    calls = counted(monkeypatch, read, "_read")
    monkeypatch.setattr(sys, "argv", ["grpo report", str(run)])
    report_command.main()
    assert calls == [run]
    assert (run / "report.html").exists()


def test_whether_a_step_has_a_metric_is_read_from_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = RunLog(tmp_path, tiny_config(tmp_path), Processes(0, 1, torch.device("cpu")), reward_names=[])
    rows = [{"step": step, "supervised/held_out_loss": 1.0} for step in range(2000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = counted(monkeypatch, jsonl, "row_of")
    assert log.has_metric(1999, "supervised/held_out_loss")
    assert not log.has_metric(1999, "eval/length_mean")
    assert not log.has_metric(2000, "supervised/held_out_loss")
    assert len(lines) < 20


def test_the_answers_of_one_evaluation_are_read_without_the_others(tmp_path: Path):
    run: Any = type("Run", (), {"directory": a_run(tmp_path / "run", 10)})
    assert peak_bytes(lambda: _answers(run, 0)) < 1_500_000
    assert [row["step"] for row in _answers(run, 9)] == [9] * 20


def test_answers_that_are_written_down_are_sampled_in_parts(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    rows: list[Any] = []
    monkeypatch.setattr(answers, "ANSWERED_AT_ONCE", 40)
    monkeypatch.setattr(answers, "answer", lambda given, *, on_rows, **_: sizes.append(len(given)) or on_rows(given))
    answers.answer_in_parts([PROMPT] * 25, num_samples=4, on_rows=rows.extend, generator=None)
    assert sizes == [10, 10, 5]
    assert rows == [PROMPT] * 25


def test_a_group_is_handed_to_the_rewards_without_looking_at_those_before():
    class Errand:
        def add(self, calls: list[Any]) -> None:
            pass

    reward = SimpleNamespace(bound=SimpleNamespace(in_process=False), call=None)
    scoring = Scoring(SimpleNamespace(tasks=lambda p, group: [reward] * 8), Errand(), 300)  # type: ignore[arg-type]
    group: Any = SimpleNamespace(completions=[None] * 8)
    scoring.add(0, group)
    first = num_lines(lambda: scoring.add(1, group))
    for p in range(2, 299):
        scoring.add(p, group)
    assert num_lines(lambda: scoring.add(299, group)) <= first + 2


def sampled(number: int, text: str) -> dict[str, Any]:
    kept = {"row": 0, "sample": number, "completion": text, "finish_reason": "stop", "num_tokens": 9, "reward": 1.0}
    return {**kept, "rewards": {"accuracy": 1.0}, "completion_ids": [1, 2]}


PROMPT = Prompt(0, [1], "1+1?", "", {"question": "1+1?", "answer": "2"})


def test_rejection_keeps_rows_in_memory_only_to_rewrite_them(tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sampled(n, f"It is {n}.")) + "\n" for n in range(3)))

    def choose(keeps: bool) -> list[Kept]:
        out = tmp_path / "rows.jsonl"
        return _choose(
            [PROMPT], tmp_path, Rules(), Required({"accuracy": 1.0}), [], Table(), out, {}, tags=False, keeps=keeps
        )

    assert len(choose(keeps=True)) == 3
    assert choose(keeps=False) == []
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_dropped_rows_are_not_read_into_memory_to_add_some(tmp_path: Path):
    out, dropped = tmp_path / "rows.jsonl", tmp_path / "rows.dropped.jsonl"
    dropped.write_text("".join(json.dumps(answer(0, n)) + "\n" for n in range(200)))
    (tmp_path / "samples.jsonl").write_text(json.dumps(sampled(0, "It is 2.")) + "\n")
    kept = [Kept(PROMPT, {**sampled(0, "It is 2.")}, 1.0)]

    def rewrite() -> None:
        _replace(kept, tmp_path, Rules(), Required({"accuracy": 1.0}), [], Table(), out, {})

    assert peak_bytes(rewrite) < 1_500_000
    assert len(dropped.read_text().splitlines()) == 200
