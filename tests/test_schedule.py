import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TINY, FixedGenerator, number_in_text, read_json, tiny_settings
from test_trainer import steps_of

from grpo import Trainer
from grpo.config import Config, OptimizerConfig
from grpo.config.schedule import learning_rate
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import Stopped


def rates(num_steps: int, **settings) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate(config, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_warm_up_rises_linearly_to_the_peak_and_stays():
    assert rates(5, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_from_the_peak_towards_zero():
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_wsd_stays_at_its_peak_and_falls_in_a_line_at_the_end():
    assert rates(10, schedule="wsd") == pytest.approx([1.0] * 9 + [0.5])
    assert rates(6, schedule="wsd", decay_share=0.5, warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 0.5])
    assert rates(4, schedule="wsd", decay_share=1.0) == rates(4, schedule="linear")
    ending = rates(8, schedule="wsd", decay_share=0.5, final_rate_share=0.5)
    assert ending == pytest.approx([1, 1, 1, 1, 1, 0.875, 0.75, 0.625])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_rate_never_falls_below_zero_nor_rises_again(schedule: str):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule)
    assert learning_rate(config, step=9, num_steps=4) == pytest.approx(0.0)


def test_decay_starts_after_warm_up():
    assert rates(6, schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


MIDWAY = {
    "rollout.max_completion_tokens": {"points": {0: 8, 4: 24}},
    "rollout.temperature": {"points": {0: 1.2, 4: 0.8}, "interpolation": "linear"},
    "algorithm.kl_coef": {"points": {0: 0.1, 2: 0.0}},
    "algorithm.clip_high": {"points": {0: 0.2, 6: 0.5}, "interpolation": "linear"},
    "rewards.1.weight": {"points": {0: 1.0, 2: 0.25}},
}
"""Over four training steps of two updates each."""


def scheduled(run: Path, **sections: Any) -> Config:
    settings = tiny_settings(
        run, algorithm={"num_minibatches": 2}, run={"steps": 4, "resume": "auto"}, schedules=MIDWAY
    )
    del settings["rollout"]["max_completion_tokens"], settings["algorithm"]["kl_coef"]
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return Config(**settings)


def test_a_value_holds_until_the_next_or_lies_on_the_line_between(tmp_path: Path):
    config = scheduled(tmp_path)
    values = [config.at(step).scheduled_values() for step in (0, 2, 3, 4, 7)]
    assert [each["rollout.max_completion_tokens"] for each in values] == [8, 8, 8, 24, 24]
    assert [each["rollout.temperature"] for each in values] == pytest.approx([1.2, 1.0, 0.9, 0.8, 0.8])
    assert [each["algorithm.kl_coef"] for each in values] == [0.1, 0, 0, 0, 0]
    assert [each["algorithm.clip_high"] for each in values] == pytest.approx([0.2, 0.3, 0.35, 0.4, 0.5])
    assert [each["rewards.1.weight"] for each in values] == [1, 0.25, 0.25, 0.25, 0.25]


def test_the_setting_itself_is_the_largest_value_and_what_is_planned_for(tmp_path: Path):
    config = scheduled(tmp_path)
    assert (config.rollout.max_completion_tokens, config.rollout.temperature, config.algorithm.kl_coef) == (
        24,
        1.2,
        0.1,
    )
    assert config.max_sequence_tokens == 96 + 24
    assert config.eval_sampling.max_tokens == 24
    assert Config(**yaml.safe_load(config.to_yaml())) == config
    with pytest.raises(ValueError, match=r"memory.micro_batch_tokens is 100; one sequence may have 120"):
        scheduled(tmp_path, memory={"micro_batch_tokens": 100})


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        (
            {"rollout.group_size": {"points": {0: 2, 1: 4}}},
            r"cannot change during a run. Those that can: rollout.max_comp",
        ),
        ({"rewards.2.weight": {"points": {0: 2, 1: 4}}}, r"rewards.2.weight'.*rewards.0.weight, rewards.1.weight"),
        ({"algorithm.clip_low": {"points": {1: 0.1}}}, r"Give a value for 0 and at least one more"),
        (
            {"rewards.0.weight": {"points": {0: 0, 2: 1}}, "rewards.1.weight": {"points": {0: 0, 2: 1}}},
            r"without any weight",
        ),
        (
            {"rollout.temperature": {"points": {0: 1, 4: 0}}},
            r"points.4 is 0; of rollout.temperature, .* greater than 0",
        ),
        ({"rollout.max_completion_tokens": {"points": {0: 8, 4: 8.5}}}, r"points.4 is 8.5; .* valid integer"),
        ({"algorithm.num_minibatch": {"points": {0: 1}}}, r"cannot change during a run"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(tmp_path: Path, schedules: dict[str, Any], message: str):
    settings = tiny_settings(tmp_path, algorithm={"num_minibatches": 2}, run={"steps": 4}, schedules=schedules)
    if "rollout.max_completion_tokens" in schedules:
        settings["rollout"].pop("max_completion_tokens")
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_what_lies_beyond_the_end_of_a_short_run_is_said(tmp_path: Path):
    settings = scheduled(tmp_path).model_dump()
    settings["run"]["steps"] = 2
    text = Config(**settings).summary(num_rows=10, world_size=1)
    late = [line for line in text.splitlines() if "comes after the last rollout" in line]
    assert [line.split()[1] for line in late] == [
        "rollout.max_completion_tokens:",
        "rollout.temperature:",
        "algorithm.clip_high:",
    ]


def test_a_reward_that_cannot_work_with_a_later_limit_is_refused_at_the_start(tmp_path: Path):
    overlong = {"function": "overlong", "weight": 1.0, "args": {"buffer": 10}}
    settings = scheduled(tmp_path).model_dump() | {"rewards": [{"function": "accuracy"}, overlong]}
    with pytest.raises(
        ValueError, match=r"overlong's buffer is 10; it must be between 1 and max_completion_tokens \(8\)"
    ):
        Trainer(Config(**settings))


def test_preflight_looks_at_what_the_first_step_will_sample(tmp_path: Path):
    Trainer(scheduled(tmp_path, preflight={"num_questions": 4, "on_failure": "warn"})).train()
    assert 0 < read_json(tmp_path / "preflight.json")["templates"][0]["length_mean"] <= 8


def test_a_setting_that_contradicts_its_schedule_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"rollout.max_completion_tokens is 64; .* at most 24. Remove one"):
        scheduled(tmp_path, rollout={"max_completion_tokens": 64})


def test_a_run_follows_its_schedules_and_goes_on_with_them_after_a_resume_in_the_middle_of_a_step(tmp_path: Path):
    Trainer(scheduled(tmp_path / "whole")).train()
    rows = steps_of(tmp_path / "whole")
    assert [row["schedule/rollout.max_completion_tokens"] for row in rows] == [8, 8, 24, 24]
    assert [row["completion/length_max"] for row in rows[:2]] == [8, 8]
    assert min(row["completion/length_max"] for row in rows[2:]) > 8
    assert [row["schedule/rollout.temperature"] for row in rows] == pytest.approx([1.2, 1.0, 0.8, 0.8])
    assert max(row["policy/sampling_gap"] for row in rows) < 1e-5  # the update's temperature is the sampling's
    for row in rows:
        expected = row["reward/accuracy"] + row["schedule/rewards.1.weight"] * row["reward/format"]
        assert row["reward/mean"] == pytest.approx(expected)
    trainer = Trainer(scheduled(tmp_path / "stopped"))
    own = trainer._optimizer_step

    def stop_in_the_fifth(minibatch: Any) -> None:
        if trainer.state.optimizer_steps == 4:  # it ends before the second update of the step, in which values change
            os.kill(os.getpid(), signal.SIGTERM)
        own(minibatch)

    trainer._optimizer_step = stop_in_the_fifth
    with pytest.raises(Stopped):
        trainer.train()
    resumed = Trainer(scheduled(tmp_path / "stopped"))
    assert (resumed.state.step, resumed.state.optimizer_steps) == (2, 5)
    resumed.train()
    assert steps_of(tmp_path / "stopped") == rows


@pytest.mark.parametrize("kl", [{}, {"kl_in": "reward", "kl_estimator": "k1", "normalize_by_std": False}])
def test_a_scheduled_step_is_that_of_a_run_with_its_values(tmp_path: Path, kl: dict[str, Any]):
    """The second step, at a learning rate that moves nothing, beside a run that has its values from the start."""
    values = {"rollout.max_completion_tokens": 21, "rollout.temperature": 0.8, "algorithm.kl_coef": 0.2}
    first = {"rollout.max_completion_tokens": 24, "rollout.temperature": 1.2, "algorithm.kl_coef": 0.5}
    schedules = {name: {"points": {0: first[name], 1: values[name]}} for name in values}
    metrics = []
    for name, own in (("scheduled", schedules), ("fixed", {})):
        settings = tiny_settings(
            tmp_path / name,
            algorithm={"aggregation": "constant", "max_sampling_gap": 100, **kl},
            optimizer={"learning_rate": 1e-30},
            run={"steps": 2},
            schedules=own,
        )
        for setting, value in values.items():
            section, last = setting.split(".")
            settings[section].pop(last, None)
            if not own:
                settings[section][last] = value
        trainer = Trainer(Config(**settings), rewards=[number_in_text])
        trainer.collector.generator = FixedGenerator()
        for weight in trainer.policy.reference.parameters():
            weight.data.mul_(1.1)
        metrics.append([trainer.train_step(), trainer.train_step()])
        trainer.close()
    (one, two), (other, expected) = metrics
    for name in ("optimizer/loss", "optimizer/grad_norm", "policy/kl", "policy/kl_penalty", "policy/entropy"):
        assert two.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-5), name
    assert one["optimizer/loss"] != pytest.approx(other["optimizer/loss"], rel=0.01)


def test_an_evaluation_weighs_rewards_as_the_step_that_comes_next(tmp_path: Path):
    """Also right after a resume, before any step has set the weights."""
    held_out = {"eval_name": str(TINY / "test.jsonl")}
    trainer = Trainer(scheduled(tmp_path, data=held_out, evaluation={"num_questions": 8}))
    trainer.state.optimizer_steps = 4
    trainer._evaluate_if_due()
    trainer.close()
    rows = read_jsonl(tmp_path / "evaluations.jsonl")
    assert any(row["rewards"]["format"] for row in rows)
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards"]["accuracy"] + 0.25 * row["rewards"]["format"])
