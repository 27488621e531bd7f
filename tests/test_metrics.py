"""Metrics over processes, by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.algorithm.batch import empty_micro_batch, micro_batch, pack
from grpo.observe.metric_names import check_reward_names
from grpo.observe.metrics import Meter, measure_passes, measure_rollout, step_metrics
from grpo.observe.sinks import JsonlSink
from grpo.policy.attention import packed_inputs
from grpo.system.jsonl import read_metrics
from grpo.types import Completion, Group, MicroBatch, Prompt, Scores


def one_group(prompt_len: int, *completion_lens: int) -> MicroBatch:
    completions = [Completion([7] * n, [-1.0] * n, "", "stop") for n in completion_lens]
    batch = pack([Group(Prompt(0, [5] * prompt_len, "", "", {}), completions)], torch.ones(1, len(completions)))
    return micro_batch(batch, torch.ones(sum(completion_lens)))


def over_two_processes(mine: Meter, other: Meter) -> Any:
    other.reduce(
        SimpleNamespace(gather=lambda meter: [meter])
    )  # brings its values to the host, as on a process of its own
    return SimpleNamespace(gather=lambda meter: [meter, other])


def test_dealing_is_measured_over_passes_and_processes():
    mine, other = Meter(), Meter()
    measure_passes(mine, [one_group(10, 20, 30), one_group(10, 10)])  # 60 and 20 places
    measure_passes(other, [one_group(10, 30), empty_micro_batch()])  # 40 places, and none that count
    for meter in (mine, other):
        meter.mean("reward/mean", torch.zeros(1))
        meter.total("throughput/rollout", 0.0)
    metrics = step_metrics(mine, {"rollout": 1.0, "update": 2.0}, over_two_processes(mine, other))
    # together 120 places; passes in step wait for the fuller one: 2 * (60 + 20) = 160 could have been read
    assert metrics["batch/imbalance"] == pytest.approx(1 - 120 / 160)

    assert metrics["batch/padding"] == 1 / 4
    # sequences of 30, 40, 20 and 40 tokens, of which one prompt of 10 was read once instead of twice
    assert metrics["throughput/update"] == pytest.approx(130 / 2)
    assert metrics["batch/shared"] == pytest.approx(1 - 120 / 130)


def test_attention_counts_in_what_processes_wait():
    mine, other = Meter(), Meter()
    measure_passes(mine, [one_group(2, 3)], pair_cost=0.5)  # 5 places, 1 + 2 + 3 + 4 + 5 pairs: 12.5
    measure_passes(other, [one_group(1, 1)], pair_cost=0.5)  # 2 places, 1 + 2 pairs: 3.5
    for meter in (mine, other):
        meter.mean("reward/mean", torch.zeros(1))
        meter.total("throughput/rollout", 0.0)
    metrics = step_metrics(mine, {"rollout": 1.0, "update": 2.0}, over_two_processes(mine, other))
    assert metrics["batch/imbalance"] == pytest.approx(1 - (12.5 + 3.5) / (2 * 12.5))


def test_a_mean_is_over_all_values_and_a_maximum_shows_what_is_not_a_number():
    mine, other = Meter(), Meter()
    mine.mean("policy/entropy", torch.tensor([1.0, 2.0, 3.0]))
    other.mean("policy/entropy", torch.tensor([10.0]))
    mine.max("policy/ratio_max", torch.tensor([1.0]))
    mine.max("policy/ratio_max", torch.tensor([2.0]))
    other.max("policy/ratio_max", torch.tensor([float("nan")]))
    reduced = mine.reduce(over_two_processes(mine, other))
    assert reduced["policy/entropy"] == 4.0
    assert reduced["policy/ratio_max"] != reduced["policy/ratio_max"]


def test_a_pass_reads_what_is_measured():
    assert packed_inputs(one_group(10, 20, 30))["input_ids"].shape == (1, 60)


def test_names_of_answers_are_no_reward_to_average():
    prompt = Prompt(0, [1], "1", "", {"question": "q", "answer": "1"})
    group = Group(prompt, [Completion([1] * 9, [0.0] * 9, "x", "stop")] * 2)
    right, votes = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    meter = Meter()
    measure_rollout(meter, [group], Scores(right, {"accuracy": right, "vote": votes}, 0, 0))
    assert "reward/accuracy" in meter.sums
    assert "reward/vote" not in meter.sums


@pytest.mark.parametrize(
    "name", ["mean", "std", "unknown", "length_mean", "pass@4", "pass@8_low", "cons@16", "accuracy_stderr", " a", "a\n"]
)
def test_a_reward_may_not_have_the_name_of_another_metric(name: str):
    with pytest.raises(ValueError, match=r"rewards.\*.name is"):
        check_reward_names(["accuracy", name])


def test_other_names_are_a_users_to_choose():
    check_reward_names(["accuracy", "format", "a[/b]", "mean length", "my/own", "<lambda>", "pass@"])


def test_what_is_no_finite_number_is_null_in_every_file(tmp_path: Path):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    row = {"step": 1, "a": math.inf, "b": -math.inf, "c": math.nan, "d": 1e300, "e": {"f": [math.inf, 2, (math.nan,)]}}
    sink = JsonlSink(tmp_path)
    sink.log(1, row)
    sink.log_completions(1, [row])
    for name in ("metrics.jsonl", "completions.jsonl"):
        (line,) = (tmp_path / name).read_text().splitlines()
        read = json.loads(line, parse_constant=refuse)
        assert read == {"step": 1, "a": None, "b": None, "c": None, "d": 1e300, "e": {"f": [None, 2, [None]]}}
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["a"])
    assert read["d"] == 1e300
