"""The loop of supervised training: deal rows, pack, update."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from grpo.algorithm.batch import pack, share_prompts
from grpo.assembly import Rows, settle
from grpo.config import SupervisedConfig
from grpo.observe.metrics import (
    Meter,
    Predicted,
    measure_dealt_rows,
    measure_passes,
    measure_tokens,
    supervised_metrics,
)
from grpo.observe.rundir import DirectoryLock
from grpo.policy.policy import Policy
from grpo.run.loop import Loop, at_work
from grpo.scoring.reward import Reward
from grpo.sft.assembly import assemble
from grpo.system.stopping import Interrupted
from grpo.training.arguments import explained
from grpo.training.callback import Callback, check_callbacks
from grpo.training.learner import Learner
from grpo.training.state import Rollout
from grpo.types import Batch, Group, MicroBatch, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_LOSS = "supervised/held_out_loss"


class SupervisedTrainer(Loop):
    """Trains a language model on rows: prompts with completions, conversations, or token ids.

    A step is one update. Its rows are one batch whatever the number of processes: packed without padding, equal prompts once.

    Args:
        config: a SupervisedConfig, a YAML file, the name of a configuration that comes with the library, or a model: its name or
            folder, or a loaded model of transformers.
        train_dataset: rows instead of those of `config.data.name`: a `datasets.Dataset`, a `pandas.DataFrame` or a list of
            dictionaries.
        eval_dataset: held-out questions with answers instead of those of `config.data.eval_name`; see Trainer.
        rewards: reward functions that grade the answers to held-out questions, instead of `config.rewards`.
        settings: over those of `config`, by name: {"training.epochs": 3}.
        callbacks: called after steps, evaluations and checkpoints, and at the end. The rollout that they are given is the rows.
        tokenizer: that of a loaded model; None: the one that lies where the model was loaded from.

    Raises:
        ValueError: whatever is wrong with settings, rows or rewards, or another is at work in run.dir; before a model is loaded.
    """

    config: SupervisedConfig
    _policy_class: type[Policy] = Policy
    _learner_class: type[Learner] = Learner

    @explained
    def __init__(
        self,
        config: SupervisedConfig | str | Path | PreTrainedModel,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        rewards: Sequence[Callable[..., Any] | Reward | str] | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_callbacks(callbacks)
        resolved, given_model = settle(SupervisedConfig, config, tokenizer, settings or {})
        with DirectoryLock() as self._lock:
            parts = assemble(
                resolved,
                lock=self._lock,
                rewards=rewards,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                policy_class=self._policy_class,
                learner_class=self._learner_class,
                given_model=given_model,
            )
            super().__init__(parts, callbacks)
            self.config = parts.config
            self.order, self.aside = parts.order, parts.aside
            self.collector, self.held_out = parts.collector, parts.held_out
            self._evaluates = bool(self.aside) or self.held_out is not None
            self._begin(parts.found, parts.shared, self.collector)

    @property
    def num_steps(self) -> int:
        """See Loop."""
        return self.order.num_updates

    @at_work
    def train_step(self) -> dict[str, float]:
        """One update on the next rows; the step's metrics over all processes. It goes on past run.steps, where that is set.

        Raises:
            Interrupted: on all processes; only within `train`, which handles what asks for it.
            ValueError, RuntimeError: see `train`; or the rows of training.epochs have been learned.
        """
        if self.stop.reason:
            raise Interrupted(self.stop.reason)
        if self.collector is not None:  # which an evaluation has sampled with
            self.collector.generator.release_memory()
        step = self.step
        with self._time("step"), self._time("update"):
            rows = self.order.draw()
            if not rows:
                raise RuntimeError(
                    f"all {self.state.step:,} updates are done; training.epochs is {self.config.training.epochs:g}, and no row "
                    "is left. Make a trainer with more training.epochs, or with run.steps in their place."
                )
            rollout = self._as_rollout(rows)
            passes = self._deal(rows)
            if self.processes.speaks:
                measure_passes(step.meter, passes, pair_cost=self.learner.pair_cost)
                measure_dealt_rows(step.meter, passes)
            self._update(passes, rollout)
        step.rollout, self.state.position = rollout, self.order.position
        self.state.step += 1
        return self._end_step(rollout)

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    def _as_rollout(self, rows: list[Group]) -> Rollout:
        """This process's part of the rows, as what a post-mortem is written from; each has the advantage 1."""
        mine = rows[self.processes.rank :: self.processes.world_size]
        ones = torch.ones(len(mine), 1)
        return Rollout(mine, Scores(ones.double(), {}, 0, 0), ones, torch.zeros(len(mine), dtype=torch.long))

    def _deal(self, rows: list[Group]) -> list[MicroBatch]:
        """This process's passes over rows that every process has drawn."""
        return self.learner.deal_whole(batch_of(rows))

    def _update(self, passes: list[MicroBatch], rollout: Rollout) -> None:
        meter = self.step.meter
        totals = self._or_ask_for_less(lambda: self.learner.accumulate(passes, meter, rollout.passes, self._flags))
        self.learner.update(totals, self.state, meter, rate_factor=self.guard.roll_backs.rate_factor)
        self._act_on(totals.flags)

    def _end_step(self, rollout: Rollout) -> dict[str, float]:
        metrics = supervised_metrics(self.step.meter, self.step.seconds, self.processes) | self.state.metrics()
        metrics["progress/epoch"] = self.order.epoch
        return self._close_step(metrics, rollout)

    # ---- what the run's course asks for ------------------------------------------------------------------------------

    def _evaluate(self) -> list[dict[str, Any]] | None:
        step, held_out = self.state.step, self.held_out
        if self.aside and not self.processes.on_main(lambda: self.log.has_metric(step, HELD_OUT_LOSS)):
            self.log.log(step, self.held_out_loss())
        if held_out is None or held_out.is_evaluated(step):
            return None
        held_out.collector.generator.sync()
        state = SimpleNamespace(global_step=step, max_steps=self.num_steps, epoch=self.order.epoch)
        held_out.collector.follow({}, max_completion_tokens=held_out.sampling.max_tokens, trainer_state=state)
        return held_out.evaluate(step, seed=self._seed("evaluation"))

    def held_out_loss(self) -> dict[str, float]:
        """Loss and accuracy of the rows that were set aside, over all processes."""
        meter = Meter()  # of which all processes of a part have the same
        for micro in self._deal(self.aside):
            there = micro.to(self.processes.device)
            predicted = Predicted(*self.policy.before_update(there))
            measure_tokens(meter, there, predicted, loss=HELD_OUT_LOSS, accuracy="supervised/held_out_accuracy")
        return meter.reduce(self.processes)

    @at_work
    def save(self, *, wait: bool = True) -> Path:
        """See Loop."""
        self.policy.sync()  # sampling, which otherwise needs the whole weights, is rare here
        return super().save(wait=wait)

    def _take_up(self) -> None:
        self.order.position = self.state.position

    def close(self) -> None:
        """End the reward workers and the logs; for a trainer that is stepped by hand."""
        super().close()
        if self.collector is not None:
            self.collector.scorer.close()

    def _seed(self, purpose: str) -> int:
        what = f"{self.config.run.seed} {purpose} {self.state.step} {self.processes.rank}"
        return random.Random(what).getrandbits(62)


def batch_of(rows: list[Group]) -> Batch:
    """Rows as the learner takes them: each with the advantage 1; equal prompts are one."""
    return share_prompts(pack(rows, torch.ones(len(rows), 1)))
