"""The curve through a run's rewards: right where the data can tell, and silent where it cannot."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_report import a_run, block, html_of

from grpo.cli.report import main
from grpo.report.fit import Curve, _solve, fit, said


def sigmoid(compute: float, start: float, limit: float, middle: float, steep: float) -> float:
    """Equation 1 of arXiv 2510.13786."""
    return start + (limit - start) / (1 + (middle / compute) ** steep) if compute else start


def test_without_noise_it_is_the_curve_itself():
    steps = np.arange(120.0)
    values = np.array([sigmoid(step, 0.1, 0.7, 25, 1.5) for step in steps])
    found = fit(steps, values, end=400, fewest=20, bounds=(0, 1))
    assert isinstance(found, Curve)
    assert found.limits
    assert (found.start, found.limit) == pytest.approx((0.1, 0.7), abs=0.002)
    assert (found.middle, found.steepness) == pytest.approx((25, 1.5), rel=0.02)
    assert found.at_end.value == pytest.approx(sigmoid(400, 0.1, 0.7, 25, 1.5), abs=0.01)
    assert np.abs(found.at(steps) - values).max() < 0.01


@pytest.mark.parametrize(("middle", "steep", "num", "end"), [(20, 1.2, 60, 200), (10, 2.0, 80, 300)])
def test_its_intervals_hold_what_came_to_be(middle: float, steep: float, num: int, end: int):
    rng = np.random.default_rng(0)
    truth = np.array([sigmoid(step, 0.1, 0.7, middle, steep) for step in range(num)])
    held, widths, limits = 0, [], []
    for _ in range(20):
        found = fit(np.arange(float(num)), rng.binomial(512, truth) / 512, end=end, fewest=20, bounds=(0, 1))
        assert isinstance(found, Curve), found
        held += found.at_end.low <= sigmoid(end, 0.1, 0.7, middle, steep) <= found.at_end.high
        widths.append(found.at_end.high - found.at_end.low)
        limits += [] if found.limits is None else [found.limits.low <= 0.7 <= found.limits.high]
    assert held >= 16, "of 20 intervals of 95 % as few as 16 have a chance of 1 in 400"
    assert 0.005 < float(np.median(widths)) < 0.25
    assert sum(limits) >= 0.8 * len(limits) > 0


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (lambda step: 0.3, "not risen by more than its noise"),
        (lambda step: 0.1 + 0.004 * step, "along a straight line"),
        (lambda step: 0.5 - 0.3 * step / (step + 20), "it falls"),
        (lambda step: 0.05 + 0.5 * (step / 80) ** 3, "the middle of its rise lies beyond"),
        (lambda step: sigmoid(step, 0.1, 0.8, 200, 1.2), "straight line|more than it has risen|lies beyond"),
        (
            lambda step: 0.1 + 0.5 * step / (step + 15) if step < 68 else 0.2,
            "below the curve|more than its noise|straight",
        ),
    ],
)
def test_where_the_values_cannot_tell_it_says_why(shape: Callable[[float], float], why: str):
    rng = np.random.default_rng(3)
    truth = np.array([shape(float(step)) for step in range(80)])
    told = [fit(np.arange(80.0), rng.binomial(512, truth) / 512, end=200, fewest=20, bounds=(0, 1)) for _ in range(5)]
    for each in told:
        assert isinstance(each, str), each
        assert any(part in each for part in why.split("|")), each


def test_a_long_run_is_fitted_in_bins_at_once():
    steps = np.arange(20_000.0)
    noisy = np.random.default_rng(2).binomial(64, [sigmoid(step, 0.1, 0.7, 2000, 1.5) for step in steps]) / 64
    started = time.process_time()
    found = fit(steps, noisy, end=40_000, fewest=20, bounds=(0, 1))
    assert time.process_time() - started < 5
    assert isinstance(found, Curve)
    assert found.at_end.low < sigmoid(40_000, 0.1, 0.7, 2000, 1.5) < found.at_end.high
    assert found.at_end.high - found.at_end.low < 0.02


def test_few_values_and_constant_ones_make_no_curve():
    few = fit(np.arange(19.0), np.arange(19.0) / 19, end=40, fewest=20, bounds=None)
    assert few == "19 values are too few for a curve; 20 would do"
    assert fit(np.arange(30.0), np.ones(30), end=40, fewest=20, bounds=(0, 1)) == "it has not changed"


def test_start_and_limit_are_least_squares_within_their_bounds():
    rng = np.random.default_rng(1)
    shapes, values = np.sort(rng.random((40, 30)), 1), rng.normal(0.8, 0.4, 30)
    starts, limits, _ = _solve(shapes, values, None)
    for shape, start, limit in zip(shapes, starts, limits, strict=True):
        expected, *_ = np.linalg.lstsq(np.stack([1 - shape, shape], 1), values, rcond=None)
        assert (start, limit) == pytest.approx(tuple(expected), rel=1e-6)
    starts, limits, _ = _solve(shapes, values, (0.0, 1.0))
    every = np.linspace(0, 1, 51)
    for shape, start, limit in zip(shapes[:4], starts, limits, strict=False):
        least = min(float(((a * (1 - shape) + b * shape - values) ** 2).sum()) for a in every for b in every)
        assert ((start * (1 - shape) + limit * shape - values) ** 2).sum() <= least + 1e-9


def a_run_that_learns(directory: Path, **settings: float) -> Path:
    rng = np.random.default_rng(5)
    metrics = [
        {
            "step": s,
            "reward/mean": 0.5,
            "reward/accuracy": rng.binomial(512, sigmoid(s - 1, 0.1, 0.7, 8, 1.5)) / 512,
            "time/step": 1.0,
        }
        for s in range(1, 41)
    ]
    run = a_run(directory, metrics=metrics)
    written = (run / "config.yaml").read_text().replace("steps: 9\n", "steps: 100\n")
    for name, value in settings.items():
        written = written.replace(f"{name}: 1.0\n", f"{name}: {value}\n")
    (run / "config.yaml").write_text(written)
    return run


def test_the_page_and_the_command_say_where_a_run_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = a_run_that_learns(tmp_path / "run")
    described = block(html_of(run), "head")["runs"][0]
    told, line = described["prediction"], described["metrics"]["values"]["fit/curve"]
    value, low, high = told["at_end"]
    assert (told["name"], told["step"], told["planned"], told["values"]) == ("reward/accuracy", 100, True, 40)
    assert low < sigmoid(99, 0.1, 0.7, 8, 1.5) < high
    assert low < value < high
    assert len(line) == 40
    assert line == sorted(line)
    panel = block(html_of(run), "head")["sections"][0]["panels"][1]
    assert (panel["lines"], panel["alone"]) == (["reward/accuracy"], ["fit/curve"])
    monkeypatch.setattr(sys, "argv", ["grpo report", str(run)])
    main()
    assert (
        f"run: reward/accuracy leads to {value:.3f} ({low:.3f} to {high:.3f}) at step 100; its limit"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("function", ["code", "countdown", "exact_match", "format", "reasoning_gym"])
def test_the_limit_of_a_share_is_none_above_one(tmp_path: Path, function: str):
    rng = np.random.default_rng(0)
    rising = [rng.binomial(512, sigmoid(s, 0.3, 0.97, 15, 1.2)) / 512 for s in range(60)]
    metrics = [
        {"step": s, "reward/mean": value, f"reward/{function}": value, "time/step": 1.0}
        for s, value in enumerate(rising, 1)
    ]
    run = a_run(tmp_path / "run", metrics=metrics)
    config = (run / "config.yaml").read_text()
    assert "function: accuracy" in config
    config = config.replace("function: format", "function: language")
    for function_of_config, is_share in ((function, True), (f"mine.py:{function}", False)):
        first = f"function: {function_of_config}\n  weight: 1.0\n  name: {function}"
        assert "function: accuracy\n  weight: 1.0\n  name: null" in config
        named = config.replace("function: accuracy\n  weight: 1.0\n  name: null", first)
        (run / "config.yaml").write_text(named)
        told = block(html_of(run), "head")["runs"][0]["prediction"]
        assert told["name"] == f"reward/{function}"
        assert told["at_end"][2] <= 1 or not is_share
        assert (told["limit"] is None or told["limit"][2] <= 1) == is_share


def test_a_reward_other_than_a_share_may_pass_what_it_was_so_far(tmp_path: Path):
    rng = np.random.default_rng(0)
    metrics = [
        {"step": s, "reward/mean": 0.1 + 1.7 * (s - 1) / (s + 59) + rng.normal(0, 0.01), "time/step": 1.0}
        for s in range(1, 61)
    ]
    assert max(row["reward/mean"] for row in metrics) < 1
    run = a_run(tmp_path / "run", metrics=metrics)
    written = (run / "config.yaml").read_text().replace("steps: 9\n", "steps: 200\n")
    (run / "config.yaml").write_text(written)
    value, low, high = block(html_of(run), "head")["runs"][0]["prediction"]["at_end"]
    assert low < 0.1 + 1.7 * 199 / 259 < high
    assert value > 1


def test_the_curve_begins_with_what_was_held_out_before_the_first_step(tmp_path: Path):
    run = a_run_that_learns(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.1}\n' + rows)
    with np.errstate(all="raise", under="ignore"):
        line = block(html_of(run), "head")["runs"][0]["metrics"]["values"]["fit/curve"]
    assert line[0] == line[1]
    assert line == sorted(line)


def test_what_is_sampled_of_ever_harder_questions_is_not_what_is_predicted_from(tmp_path: Path):
    told = block(html_of(a_run_that_learns(tmp_path / "run", solved_share=0.1)), "head")["runs"][0]["prediction"]
    assert told is None, "nothing was held out"
    short = block(html_of(a_run(tmp_path / "short")), "head")["runs"][0]
    assert short["prediction"]["reason"] == "4 values are too few for a curve; 20 would do"
    assert "fit/curve" not in short["metrics"]["values"]


def test_a_limit_that_cannot_be_told_is_not_told():
    told = {"name": "eval/accuracy", "step": 1200, "planned": False, "at_end": [0.5, 0.4, 0.6], "limit": None}
    assert said(told) == (
        "eval/accuracy leads to 0.500 (0.400 to 0.600) at step 1,200, twice as far; its limit cannot be told yet"
    )
    assert said({"name": "reward/mean", "reason": "it falls"}) == "no prediction of reward/mean: it falls"
