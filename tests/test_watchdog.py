"""The rules of the watchdog on series written by hand and on real ones, and what a run does on an alarm."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from helpers import FixedGenerator, launch, number_in_text, read_json, tiny_config, troubled

from grpo import Trainer
from grpo.observe.metrics import RUN, repeats
from grpo.run import checkpoint
from grpo.run.watchdog import Watchdog, WatchdogError
from grpo.system.jsonl import append_jsonl, read_jsonl
from grpo.training.learner import unless_finite

HEALTHY = {
    "optimizer/skipped": 0.0,
    "policy/kl": 0.05,
    "policy/entropy": 0.4,
    "completion/length_mean": 200.0,
    "completion/truncated": 0.1,
    "completion/repetition": 0.1,
    "reward/mean": 0.5,
    "reward/std": 0.5,
    "group/with_signal": 0.6,
}


def noisy(step: int, **changes: float) -> dict[str, float]:
    """Healthy metrics with ten per cent of noise; `changes` with / written as __."""
    rng = random.Random(step)
    row = {name: value * rng.uniform(0.9, 1.1) for name, value in HEALTHY.items()}
    return row | {name.replace("__", "/"): value for name, value in changes.items()}


def alarms_of(tmp_path: Path, rows: list[dict[str, float]], **settings: object) -> list[tuple[int, str, int]]:
    """Step, rule and beginning of each alarm of a run with these metrics."""
    dog = Watchdog(tiny_config(tmp_path, algorithm={"kl_coef": 0.1}, watchdog=settings), [])
    found = [alarm for step, row in enumerate(rows, 1) for alarm in dog.observe(step, row)]
    return [(alarm.step, alarm.rule, alarm.began) for alarm in found]


def after(num_steps: int, *rows: dict[str, float]) -> list[dict[str, float]]:
    return [noisy(step) for step in range(1, num_steps + 1)] + list(rows)


def test_a_healthy_run_with_noise_gives_no_alarm(tmp_path: Path):
    assert alarms_of(tmp_path, after(200)) == []


# tiny_config cuts completions off at 24 tokens
TROUBLE = {
    "kl": {"policy__kl": 2.0},
    "kl, not a number": {"policy__kl": math.nan},
    "entropy, exploded": {"policy__entropy": 2.5},
    "entropy, collapsed": {"policy__entropy": 0.01},
    "length, run away": {"completion__length_mean": 700.0},
    "length, collapsed": {"completion__length_mean": 30.0},
    "truncation": {"completion__truncated": 0.7},
    "repetition": {"completion__repetition": 0.7},
    "reward, zero": {"reward__mean": 0.0},
    "reward, constant": {"reward__mean": 0.75},
    "reward, fallen": {"reward__mean": 0.1},
    "signal": {"group__with_signal": 0.0},
}


@pytest.mark.parametrize("case", TROUBLE)
def test_each_rule_speaks_when_most_of_the_last_steps_are_bad_and_says_when_it_began(tmp_path: Path, case: str):
    bad = [noisy(40 + i, **TROUBLE[case]) for i in range(10)]
    if case == "reward, fallen":  # and not constant
        bad = [row | {"reward/mean": 0.1 + i / 1000} for i, row in enumerate(bad)]
    found = alarms_of(tmp_path, after(30, *bad))
    assert {rule for _, rule, _ in found} == {case.split(",")[0]}
    step, _, began = found[0]
    # a median turns with the fifth bad step of ten; the window's first step is then taken for the beginning, to be safe
    assert 35 <= step <= 40
    assert began == step - 9
    assert began <= 31


@pytest.mark.parametrize("case", TROUBLE)
def test_three_bad_steps_and_a_recovery_give_no_alarm(tmp_path: Path, case: str):
    bad = [noisy(30 + i, **TROUBLE[case]) for i in range(3)]
    assert alarms_of(tmp_path, [*after(30, *bad), *after(30)]) == []


def test_what_a_schedule_changes_at_a_stroke_is_no_trouble_and_what_comes_after_it_is(tmp_path: Path):
    config = tiny_config(tmp_path, run={"steps": 60}, schedules={"rewards.1.weight": {"points": {0: 1, 30: 0}}})
    rows = [row | {"schedule/rewards.1.weight": float(step < 30)} for step, row in enumerate(after(60))]
    for step in range(30, 60):
        rows[step]["reward/mean"] = rows[step]["reward/mean"] / 4 if step < 50 else 0.0
    dog = Watchdog(config, [])
    steps = [(step, alarm.rule) for step, row in enumerate(rows, 1) for alarm in dog.observe(step, row)]
    assert steps
    assert min(steps) > (50, "")
    unscheduled = Watchdog(tiny_config(tmp_path), [])
    assert min(step for step, row in enumerate(rows, 1) if unscheduled.observe(step, row)) < 50


def test_what_needs_no_comparison_is_told_however_often_a_schedule_jumps(tmp_path: Path):
    points = {step: 1.0 + step % 2 for step in range(30)}
    config = tiny_config(tmp_path, run={"steps": 30}, schedules={"rewards.1.weight": {"points": points}})
    dog = Watchdog(config, [])
    rows = [noisy(step, group__with_signal=0.0) | {"schedule/rewards.1.weight": points[step]} for step in range(30)]
    told = {alarm.rule for step, row in enumerate(rows, 1) for alarm in dog.observe(step, row)}
    assert told == {"signal"}


def test_slow_growth_is_no_alarm_and_neither_is_learning(tmp_path: Path):
    rows = [
        noisy(
            step,
            completion__length_mean=200 * 1.01**step,  # tenfold in 230 steps, as in R1-Zero
            policy__entropy=0.8 * 0.98**step + 0.03,
            policy__kl=0.002 * step,
            reward__mean=min(0.05 + step / 100, 1.0) + 0.001 * (step % 3),
            group__with_signal=max(0.9 - step / 200, 0.1),
        )
        for step in range(240)
    ]
    assert alarms_of(tmp_path, rows) == []


def test_bounds_hold_without_a_history_to_compare_with(tmp_path: Path):
    rows = [noisy(i, policy__kl=50.0, policy__entropy=9.0, completion__truncated=1.0) for i in range(10)]
    assert {rule for _, rule, _ in alarms_of(tmp_path, rows)} == {"kl", "entropy", "truncation"}


def test_rare_rewards_that_stay_away_for_a_while_are_not_a_fall(tmp_path: Path):
    rare = [noisy(i, reward__mean=0.02 + 0.001 * (i % 2), reward__std=0.14) for i in range(30)]
    gone = [noisy(i, reward__mean=0.004 * (i % 2), reward__std=0.03) for i in range(10)]
    assert alarms_of(tmp_path, [*rare, *gone]) == []


def test_skipped_updates_count_steps_in_a_row(tmp_path: Path):
    rows = after(5, *(noisy(i, optimizer__skipped=1.0) for i in range(2)), noisy(8))
    assert alarms_of(tmp_path, rows) == []
    found = alarms_of(tmp_path, after(5, *(noisy(i, optimizer__skipped=1.0) for i in range(3))))
    assert found == [(8, "not_finite", 6)]


def test_trouble_that_goes_on_is_told_again_after_each_patience(tmp_path: Path):
    rows = after(20, *(noisy(i, group__with_signal=0.0) for i in range(25)))
    assert alarms_of(tmp_path, rows) == [(30, "signal", 21), (40, "signal", 21)]
    assert alarms_of(tmp_path, rows, patience=20) == [(40, "signal", 21)]


def test_a_resumed_watchdog_says_what_an_uninterrupted_one_says(tmp_path: Path):
    rows = after(20, *(noisy(i, group__with_signal=0.0) for i in range(25)))
    whole = alarms_of(tmp_path, rows)
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": i, "time/step": 1.0, **row} for i, row in enumerate(rows[:33], 1)])
    append_jsonl(path, [{"step": 33, "eval/accuracy": 0.5}])
    dog = Watchdog(tiny_config(tmp_path, algorithm={"kl_coef": 0.1}), read_jsonl(path))
    assert dog.history[:33] == [{name: row[name] for name in HEALTHY} for row in rows[:33]]
    found = [alarm for step, row in enumerate(rows[33:], 34) for alarm in dog.observe(step, row)]
    assert [(a.step, a.rule, a.began) for a in found] == whole[1:] == [(40, "signal", 21)]


# reward, length and share of groups with signal of each step of real runs of the tiny model, 16 x 8 completions
LEARNING = """
0.38/21/1.00 0.43/20/1.00 0.43/18/0.88 0.50/20/0.94 0.61/21/0.88 0.58/21/0.94 0.55/22/0.94 0.62/23/0.81 0.64/23/1.00
0.67/24/0.88 0.75/25/1.00 0.74/30/0.94 0.80/28/0.88 0.79/28/0.88 0.86/29/0.94 0.96/28/0.94 1.02/30/0.94 0.99/29/0.94
1.03/31/0.94 0.98/33/0.88 1.19/32/0.88 1.24/34/0.88 1.25/36/0.88 1.22/36/0.81 1.32/38/0.75 1.34/33/0.81 1.41/37/0.62
1.41/39/0.56 1.38/37/0.69 1.38/36/0.44 1.37/39/0.56 1.41/35/0.31 1.30/39/0.62 1.38/38/0.50 1.38/37/0.56 1.46/38/0.25
1.33/36/0.38 1.44/34/0.19 1.44/39/0.38 1.41/36/0.38 1.42/39/0.44 1.42/38/0.19 1.39/36/0.31 1.37/39/0.44 1.42/38/0.38
1.48/34/0.19 1.38/40/0.25 1.44/37/0.38 1.43/40/0.31 1.46/38/0.31 1.30/41/0.25 1.38/38/0.50 1.34/41/0.25 1.42/36/0.38
1.40/39/0.50 1.43/35/0.31 1.40/38/0.38 1.45/32/0.12 1.37/37/0.25 1.42/38/0.31
"""
UNSTABLE = """
0.38/21/1.00 0.50/22/0.94 0.54/20/0.94 0.57/24/0.69 0.66/25/0.81 0.68/27/0.81 0.67/30/0.62 0.70/30/0.81 0.85/31/0.88
0.99/32/0.88 1.11/33/0.75 1.12/39/0.88 1.20/39/0.69 1.15/38/0.69 0.96/39/0.50 1.07/36/0.50 0.62/48/0.62 0.82/42/0.62
0.89/37/0.50 0.80/38/0.25 1.23/36/0.38 1.05/36/0.44 1.28/36/0.44 1.22/35/0.56 1.27/37/0.44 1.24/34/0.50 1.23/36/0.44
1.20/38/0.44 1.20/38/0.81 1.35/38/0.19
"""


def rows_of(series: str) -> list[dict[str, float]]:
    steps = [[float(value) for value in step.split("/")] for step in series.split()]
    return [
        {"reward/mean": reward, "reward/std": 0.5, "completion/length_mean": length, "group/with_signal": signal}
        for reward, length, signal in steps
    ]


def test_real_runs_that_learn_give_no_alarm_and_neither_does_one_that_stumbles_and_recovers(tmp_path: Path):
    assert alarms_of(tmp_path, rows_of(LEARNING)) == []
    # at three times the rate the reward loses half within three steps, and has it back five steps later
    assert alarms_of(tmp_path, rows_of(UNSTABLE)) == []


def test_a_reward_that_does_not_recover_is_an_alarm(tmp_path: Path):
    steps = rows_of(UNSTABLE)
    low = [row | {"reward/mean": row["reward/mean"] / 2} for row in steps[16:20]]  # its worst steps, and worse
    assert {rule for _, rule, _ in alarms_of(tmp_path, [*steps[:16], *low, *low])} == {"reward"}


def test_repetition_counts_runs_that_the_same_sequence_had_before():
    loop, distinct = [7, 8] * 10, list(range(20))
    flags = repeats([loop, distinct, distinct, [1] * (RUN - 1)])
    # 20 tokens have 13 runs of 8. The loop has two different ones; sequences are not compared; 7 tokens have no run
    assert len(flags) == 3 * 13
    assert flags.sum() == 11
    assert len(repeats([[1, 2], [3]])) == 0
    assert repeats([list(range(RUN)) * 2]).sum() == 1


def test_repetition_equals_a_count_in_plain_python():
    rng = random.Random(0)
    sequences = [[rng.choice([1, 150_000]) for _ in range(rng.randrange(200))] for _ in range(30)]
    expected = number = 0
    for ids in sequences:
        runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
        number += len(runs)
        expected += len(runs) - len(set(runs))
    flags = repeats(sequences)
    assert len(flags) == number
    assert flags.sum() == expected > 100


def test_a_finite_loss_is_left_as_it_is_and_another_processes_loss_poisons_it():
    loss = torch.tensor(0.1, requires_grad=True)
    assert torch.equal(unless_finite(loss, torch.tensor(3.0, dtype=torch.float64)), loss)
    for total in (math.nan, math.inf, -math.inf):
        assert unless_finite(loss, torch.tensor(total, dtype=torch.float64)).isnan()


SKIPPED = {
    "restored": True,
    "kept": True,
    "skipped": 1.0,
    "has_loss": False,
    "counted": 0,
    "moved": True,
    "as_without": True,
}


def test_an_update_that_is_not_finite_on_one_process_is_skipped_on_all_and_leaves_no_trace(tmp_path: Path):
    cases = ("0:float32", "2:bfloat16", "3:float32")
    launch("worker_skip.py", str(tmp_path), *cases, processes=2)
    for rank in range(2):
        assert read_json(tmp_path / f"rank-{rank}.json") == dict.fromkeys(cases, SKIPPED)


def test_a_loss_that_is_not_finite_skips_the_update_even_if_its_gradient_is(tmp_path: Path):
    settings = {
        "kl_coef": 0.1,
        "kl_estimator": "k1",
        "max_sampling_gap": 100,
    }  # k1's gradient does not see the reference
    trainer = Trainer(tiny_config(tmp_path / "run", algorithm=settings), rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()
    trainer.policy.ref_logprobs = lambda micro: torch.full_like(micro.sampling_logprobs, -math.inf)
    before = [weight.detach().clone() for weight in trainer.policy.lm.parameters()]
    metrics = trainer.train_step()
    trainer.close()
    assert metrics["optimizer/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.lm.parameters(), strict=True))


def test_a_roll_back_goes_on_from_before_the_trouble_at_a_lower_rate_with_other_samples(tmp_path: Path):
    run = tmp_path / "run"
    troubled(run, first_bad=5, times=1).train()
    (row,) = read_jsonl(run / "roll_backs.jsonl")
    # no signal in steps 5 and 6; the weights of step 4 are those that it began with, so step 3 it is
    assert (row["step"], row["to"], row["rule"], row["rate_factor"]) == (6, 3, "signal", 0.25)
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["optimizer/learning_rate"] for row in rows] == pytest.approx([1e-3] * 3 + [2.5e-4] * 5)
    assert [row["step"] for row in read_jsonl(run / "metrics.superseded.jsonl")] == [4, 5, 6]
    first, again = (
        [row for row in read_jsonl(run / name) if row["step"] == 4]
        for name in ("completions.superseded.jsonl", "completions.jsonl")
    )
    assert [row["question"] for row in first] == [row["question"] for row in again]
    assert [row["completion"] for row in first] != [row["completion"] for row in again]
    left = run / "post_mortem/step-00000006"
    assert "watchdog.signal, step 6: not one group" in (left / "alarm.txt").read_text()
    assert [row["step"] for row in read_jsonl(left / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len(checkpoint.complete_checkpoints(run / "checkpoints")) == 4


def test_a_roll_back_survives_a_resume_from_a_checkpoint_that_is_older(tmp_path: Path):
    for name in ("whole", "halves"):
        trainer = troubled(tmp_path / name, first_bad=5, times=1)
        while not trainer.guard.roll_backs.rows:
            trainer.train_step()
            trainer.save()
        if name == "halves":  # killed right after the roll-back, with nothing saved since
            trainer.close()
            trainer = troubled(tmp_path / name, first_bad=5, times=1)
            assert trainer.state.step == 3
            assert trainer.guard.roll_backs.rate_factor == 0.25
        trainer.train()
    drop = ("time/", "throughput/")
    whole, halves = (
        [{k: v for k, v in row.items() if not k.startswith(drop)} for row in read_jsonl(tmp_path / n / "metrics.jsonl")]
        for n in ("whole", "halves")
    )
    assert whole == halves


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("rolled_back") / "run"
    troubled(run, first_bad=5, times=1).train()
    return run


@pytest.mark.parametrize("place", ["checkpoints.remove_after", "log.log_roll_back", "_restore"])
def test_a_kill_in_the_middle_of_a_roll_back_is_as_if_it_had_not_been(tmp_path: Path, rolled_back: Path, place: str):
    trainer = troubled(tmp_path / "run", first_bad=5, times=1)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    *owner, method = place.split(".")
    setattr(getattr(trainer, owner[0]) if owner else trainer, method, killed)
    with pytest.raises(Killed):
        trainer.train()
    trainer.close()
    troubled(tmp_path / "run", first_bad=5, times=1).train()
    drop = ("time/", "throughput/")
    whole, ours = (
        [{k: v for k, v in row.items() if not k.startswith(drop)} for row in read_jsonl(run / "metrics.jsonl")]
        for run in (rolled_back, tmp_path / "run")
    )
    assert ours == whole


def test_the_run_stops_after_so_many_roll_backs(tmp_path: Path):
    trainer = troubled(tmp_path / "run", first_bad=5, times=2)
    with pytest.raises(WatchdogError, match=r"watchdog.signal, step 6: .* after 1 roll-backs. .*step-00000006-2"):
        trainer.train()
    trainer.close()


def test_a_run_without_a_checkpoint_from_before_the_trouble_stops_and_says_so(tmp_path: Path):
    trainer = troubled(tmp_path / "run", first_bad=2, times=1)
    with pytest.raises(WatchdogError, match=r"watchdog.signal, step 3: .* no checkpoint from before step 2"):
        trainer.train()
    trainer.close()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"watchdog": {"rate_factor": 0.1}}, "watchdog.rate_factor is 0.1; it has no effect"),
        ({"watchdog": {"kl": "stop"}}, "watchdog.kl is 'stop'; there is no KL to watch"),
        (
            {"watchdog": {"reward": "roll_back"}, "checkpoint": {"every_steps": 5, "keep": 2}},
            "watchdog.reward is 'roll_back'; trouble shows after 10 steps",
        ),
        ({"watchdog": {"reward": "halt"}}, "watchdog.reward is 'halt'"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, sections: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(tmp_path, **sections)
