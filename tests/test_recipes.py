"""The shipped recipes are what was published: their numbers follow from the loaded files."""

from pathlib import Path

import pytest
from helpers import ROOT, tiny_config

from grpo import Trainer
from grpo.config import Config
from grpo.types import Group

PAPER = ROOT / "configs" / "r1_zero_paper.yaml"


def test_the_papers_numbers_follow_from_its_configuration():
    config = Config.load(PAPER)
    algorithm, rollout = config.algorithm, config.rollout
    assert config.prompts_per_minibatch == 32  # questions per update
    assert config.prompts_per_minibatch * rollout.group_size == 512  # completions per update
    assert config.completions_per_step == 8192 == 512 * 16  # per rollout: 16 updates, each completion in one of them
    assert algorithm.num_minibatches == 16
    assert config.optimizer_steps == 10_400 == 650 * 16
    assert algorithm.reference_refresh_steps / algorithm.num_minibatches == 25  # rollouts
    assert config.optimizer_steps // algorithm.reference_refresh_steps == 26  # references
    assert config.completions_per_step * config.run.steps == 5_324_800
    assert (config.optimizer.learning_rate, algorithm.kl_coef, rollout.temperature) == (3e-6, 0.001, 1.0)
    assert rollout.max_completion_tokens == 32_768


def test_the_papers_longer_half_is_the_same_run_with_twice_the_tokens():
    """The two commands at the top of the file: 512 rollouts are 8,192 updates, the paper's "8.2k"."""
    commands = [line for line in PAPER.read_text().splitlines() if "accelerate launch" in line]
    first, second = (Config.load(PAPER, command.split("--set ")[1].split()) for command in commands)
    assert first.optimizer_steps == 8192
    assert second.rollout.max_completion_tokens == 65_536 == 2 * first.rollout.max_completion_tokens
    assert second.optimizer_steps == 10_400
    assert second.run.dir == first.run.dir


def sampled(trainer: Trainer) -> list[Group]:
    return trainer.generator.sample(trainer.prompts.next_batch(), trainer.config.sampling, num_completions=8, seed=0)


def test_a_resumed_run_may_sample_longer_completions_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = {"evaluation": {"num_questions": 0}, "checkpoint": {"every_steps": 0}}
    Trainer(tiny_config(tmp_path / "run", **common, run={"steps": 1, "resume": "auto"})).train()
    longer = tiny_config(
        tmp_path / "run", **common, rollout={"max_completion_tokens": 32}, run={"steps": 2, "resume": "auto"}
    )
    trainer = Trainer(longer)
    assert trainer.state.step == 1
    assert "rollout.max_completion_tokens is 32 from here on; it was 24 up to step-00000001" in capsys.readouterr().out
    lengths = [len(each.token_ids) for group in sampled(trainer) for each in group.completions]
    assert 24 < max(lengths) <= 32
