"""The checks take every configuration that a run takes: what they set is never refused beside what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config

from grpo.check import gradients, invariance, memory, steps, templates, variant
from grpo.check.dry_run import at_start, changed
from grpo.check.gradients import EVERYTHING, Work
from grpo.config import Config, shipped
from grpo.config.settings import read_file
from grpo.data.prompts import TEMPLATES
from grpo.system import distributed


class Made(Exception):
    """A trainer would be made, of settings that were not refused."""


def make(*_: Any, **__: Any) -> None:
    raise Made


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "Trainer", make)
    monkeypatch.setattr(memory, "EndlessTrainer", make)
    monkeypatch.setattr(memory, "check_sinks", lambda config: None)
    monkeypatch.setattr(variant, "CountingTrainer", make)
    monkeypatch.setattr(distributed, "start", make)


def refused_by(config: Config, tmp_path: Path) -> dict[str, str]:
    """What each check says of a configuration, by its name, if it refuses it."""

    def through_deepspeed(stage: int) -> None:
        start = changed(at_start(config), algorithm=gradients.COUNTS_ALL)
        work = Work(start, batch=None, made_up=False, device=None, tokenizer=None)  # type: ignore[arg-type]
        gradients._through_deepspeed(work, gradients.replace(EVERYTHING, zero_stage=stage))

    def one_update() -> None:
        file = tmp_path / "variant.yaml"
        file.write_text(invariance._one_plain_step(config).to_yaml())
        variant.run(Config.load(file), tmp_path)

    def preflight() -> None:
        for template in TEMPLATES:
            templates._quiet(at_start(config), template, str(tmp_path))
        raise Made

    checks = {
        "gradients": lambda: gradients.check(config),
        "gradients through ZeRO 0": lambda: through_deepspeed(0),
        "gradients through ZeRO 2": lambda: through_deepspeed(2),
        "invariance": one_update,
        "memory": lambda: memory.check(config),
        "steps": lambda: steps.run(config, make, seed=0, num_steps=1),  # type: ignore[arg-type]
        "preflight": preflight,
    }
    found = {}
    for name, check in checks.items():
        try:
            check()
        except Made:
            continue
        except ValueError as error:
            found[name] = str(error)
        else:
            pytest.fail(f"{name} has made no trainer")
    return found


def shipped_runs() -> Iterator[str]:
    """Names of those that `grpo train` runs."""
    for name in shipped.names():
        settings = read_file(name)
        if "run" in settings and "training" not in settings:
            yield name


@pytest.mark.parametrize("name", [*shipped_runs()])
def test_every_check_takes_every_configuration_that_is_shipped(name: str, tmp_path: Path):
    assert refused_by(Config.load(name), tmp_path) == {}


KL = {"kl_coef": 0.5, "kl_estimator": "k2", "kl_weighted": True, "reference_refresh_steps": 2}


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluation": {"num_questions": 2, "num_samples": 2, "temperature": 1.0}},
        {"run": {"resume": "auto", "accept_changes": True, "push_to_hub": "a/b", "push_at": "checkpoint"}},
        {"optimizer": {"schedule": "wsd", "warmup_steps": 1, "final_rate_share": 0.1, "decay_share": 0.5}},
        {"algorithm": KL, "watchdog": {"kl": "stop", "rate_factor": 0.5}},
        {"algorithm": KL, "schedules": {"algorithm.kl_coef": {"points": {0: 0.0, 2: 0.5}}}},
        {"algorithm": {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1", "normalize_by_std": False}},
        {"algorithm": {"kl_coef": 1.0, "kl_estimator": "k2"}, "teacher": {"name": "a/b", "revision": "c"}},
        {"algorithm": {"clip_cov": 0.1, "clip_cov_low": 0.5, "clip_cov_high": 4.0, "num_minibatches": 2}},
        {"rollout": {"max_oversampling": 3, "signal_from": "accuracy", "stop": ["."], "solved_share": 0.5}},
        {
            "rollout": {"carry_over": True, "max_staleness": 3},
            "algorithm": {"importance": "mask", "importance_high": 2.0},
        },
        {"distributed": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}},
        {"distributed": {"zero_stage": 1, "offload_optimizer": True, "sequence_parallel": 2}},
        {
            "preflight": {"num_questions": 0},
            "checkpoint": {"every_steps": 2, "keep": 9},
            "watchdog": {"signal": "roll_back"},
        },
    ],
    ids=lambda sections: "+".join(sections),
)
def test_what_a_check_sets_is_not_refused_beside_what_the_configuration_sets(sections: dict[str, Any], tmp_path: Path):
    assert refused_by(tiny_config(tmp_path / "run", **sections), tmp_path) == {}
