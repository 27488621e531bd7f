"""A trainer for checks: it steps like any other, with rewards drawn at random, and leaves nothing behind."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from grpo.config import Config
from grpo.policy.policy import Policy
from grpo.scoring.scorer import Scorer, Scoring
from grpo.trainer import Trainer
from grpo.types import Group, Scores

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def rehearse(config: Config, trainer_class: type[AnyTrainer], **changes: dict[str, Any]) -> AnyTrainer:
    """A trainer of `config` with its data and its rewards checked, that writes no files and calls no reward function.

    Args:
        changes: settings to set, by section.

    Raises:
        ValueError: as Trainer.
    """
    quiet = {"logging": {"wandb": "disabled", "completions_every": 0, "tensorboard": False}}
    with TemporaryDirectory(prefix="grpo-check-") as directory:
        run = {**ANEW, **changes.pop("run", {}), "dir": str(Path(directory) / "run")}
        trainer = trainer_class(changed(config, **quiet, **changes, run=run))
        trainer.log.close()  # before its directory goes
    trainer.collector.scorer.close()
    trainer.collector.scorer = RandomRewards()
    trainer.rollouts.verdicts = trainer.rollouts.signal_from = ["random"]
    trainer.collector.retries = False  # a shortage of memory is what a check is to find
    return trainer


def policy_that(*, samples: bool) -> type[Policy]:
    """A Policy as in processes that sample, or that do not, whatever else is said of them: to check and to measure."""

    class Fixed(Policy):
        def __init__(self, *parts: Any, **options: Any) -> None:
            super().__init__(*parts, **{**options, "samples": samples})

    return Fixed


def changed(config: Config, **changes: dict[str, Any]) -> Config:
    """`config` with other settings, by section, and without schedules, whose largest values the settings have."""
    settings = config.model_dump(exclude={"schedules"})
    for section, values in changes.items():
        settings[section] |= values
    return Config(**settings)


ANEW = {"resume": "never", "accept_changes": False}
"""Changes to the section `run` with which nothing is resumed."""

NOTHING_HELD_OUT = {"num_questions": 0, "num_samples": 1}
"""Changes to the section `evaluation` with which there is none."""


def at_start(config: Config) -> Config:
    """The settings of the first step, with the largest `algorithm.kl_coef`: beside 0, what else is said of the KL is refused."""
    return changed(config.at(0), algorithm={"kl_coef": config.algorithm.kl_coef})


def passes_alone(config: Config) -> dict[str, dict[str, Any]]:
    """Changes with which each process runs its passes by itself, as large as they were."""
    return {"memory": {"micro_batch_tokens": config.pass_tokens}, "distributed": {"sequence_parallel": 1}}


class RandomRewards(Scorer):
    """Gives every completion a reward of its own, so that each group moves the policy; the same in every process and run."""

    def __init__(self) -> None:
        self.rewards = []

    def begin(self, num_groups: int) -> RandomScoring:
        """See Scorer."""
        return RandomScoring(num_groups)

    def parts(self, scores: Scores) -> list[tuple[float, torch.Tensor]]:
        """See Scorer."""
        return [(1.0, scores.rewards)]

    def close(self) -> None:
        """There are no workers."""


class RandomScoring(Scoring):
    """See Scoring; without workers there is nothing to wait for."""

    def __init__(self, num_groups: int) -> None:
        self.rewards: list[list[float]] = [[]] * num_groups

    def add(self, p: int, group: Group) -> None:
        """See Scoring."""
        numbers = range(len(group.completions))
        self.rewards[p] = [random.Random(f"{group.prompt.row} {number}").random() for number in numbers]

    def result(self) -> Scores:
        """See Scoring."""
        rewards = torch.tensor(self.rewards)
        return Scores(rewards, {"random": rewards}, num_timeouts=0, num_crashes=0)

    def __exit__(self, *exception: object) -> None:
        """Nothing is under way."""
