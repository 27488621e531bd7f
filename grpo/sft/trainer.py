"""The loop of supervised training: deal rows, pack, update."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from grpo import report
from grpo.algorithm.batch import pack, share_prompts
from grpo.assembly import Rows
from grpo.config import SupervisedConfig, as_override
from grpo.observe.metrics import (
    Meter,
    Predicted,
    measure_dealt_rows,
    measure_passes,
    measure_tokens,
    supervised_metrics,
)
from grpo.policy.policy import Policy
from grpo.run import checkpoint
from grpo.run.guard import Guard
from grpo.scoring.reward import Reward
from grpo.sft.assembly import assemble
from grpo.system import progress
from grpo.system.out_of_memory import or_ask_for_less
from grpo.system.stopping import EXIT_STOPPED, Interrupted, Stopped
from grpo.training.callback import Callback
from grpo.training.learner import Learner
from grpo.training.state import Rollout, RunState, StepClock, StepState
from grpo.types import Batch, Group, MicroBatch, Scores

if TYPE_CHECKING:
    from pandas import DataFrame


class SupervisedTrainer:
    """Trains a language model on rows: prompts with completions, conversations, or token ids.

    A step is one update. Its rows are one batch whatever the number of processes: packed without padding, equal prompts once.

    Args:
        config: a SupervisedConfig, a YAML file, the name of a configuration that comes with the library, or a model; see
            SupervisedConfig.of.
        train_dataset: rows instead of those of `config.data.name`: a `datasets.Dataset`, a `pandas.DataFrame` or a list of
            dictionaries.
        eval_dataset: held-out questions with answers instead of those of `config.data.eval_name`.
        rewards: reward functions that grade the answers to held-out questions, instead of `config.rewards`.
        settings: over those of `config`, by name: {"training.epochs": 3}.
        callbacks: called after steps, evaluations and checkpoints, and at the end. The rollout that they are given is the rows.

    Raises:
        ValueError: whatever is wrong with the settings, the rows or the rewards; before the model is loaded.
    """

    policy_class: type[Policy] = Policy
    learner_class: type[Learner] = Learner

    def __init__(
        self,
        config: SupervisedConfig | str | Path,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        rewards: Sequence[Callable[..., Any] | Reward] | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = callbacks
        parts = assemble(
            SupervisedConfig.of(config, settings or {}),
            rewards=rewards,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            policy_class=self.policy_class,
            learner_class=self.learner_class,
        )
        self.config, self.processes, self.stop = parts.config, parts.processes, parts.stop
        self.order, self.aside = parts.order, parts.aside
        self.learner, self.policy = parts.learner, parts.learner.policy
        self.collector, self.held_out = parts.collector, parts.held_out
        self.checkpoints, self.log = parts.checkpoints, parts.log
        self.directory = parts.log.directory  # of the run
        self.clock = StepClock(parts.processes)
        self.state, self.step = RunState(), StepState()
        if parts.found is not None:
            self._restore(parts.found)
        self.log.open(resumed_step=None if parts.found is None else self.state.step)
        self.guard = Guard(parts.shared, self.policy, parts.collector, self.checkpoints, self.log, self.processes)

    @property
    def num_steps(self) -> int:
        """Updates of the whole run."""
        return self.order.num_updates

    def train(self) -> Path:
        """Run all steps that are left, with the evaluations and checkpoints that are due.

        Returns:
            The last checkpoint; its `hf/` is a directory that `AutoModelForCausalLM.from_pretrained` loads.

        Raises:
            Stopped: SIGTERM, SIGINT or the end of `run.max_hours` came, or a single process was short of memory; where the run
                stands is saved. After a shortage, `settings` are what to go on with.
        """
        with self.stop.request, progress.phase("training"):
            try:
                self._evaluate_if_due()
                while not self._is_last():
                    self.train_step()
                    if self._is_last() or _due(self.state.step, self.config.checkpoint.every_steps):
                        self.checkpoints.try_to(self.save)
                    self._evaluate_if_due()
                    if self.stop.reason:
                        raise Interrupted(self.stop.reason)
                last = self.save(wait=True)
                for callback in self.callbacks:
                    callback.on_end(last)
            except Interrupted as interrupted:
                self._leave(interrupted)
            finally:
                self.log.close()
        return self._finish()

    def train_step(self) -> dict[str, float]:
        """One update on the next rows; the step's metrics over all processes.

        Raises:
            Interrupted: out of memory; only within `train`, which handles it.
        """
        self.step = StepState()
        step, position = self.step, self.order.position
        with self._time("step"), self._time("update"):
            rows = self.order.draw()
            step.rollout = rollout = self._as_rollout(rows)
            passes = self._deal(rows)
            measure_passes(step.meter, passes)
            measure_dealt_rows(step.meter, passes)
            try:
                self._update(passes, rollout)
            except Interrupted:
                self.order.position = position
                raise
        self.state.position = self.order.position
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
        meter, number = self.step.meter, self.state.step + 1
        flags = (self.stop.request.reason is not None, self.checkpoints.is_written)
        totals = or_ask_for_less(
            lambda: self.learner.accumulate(passes, meter, rollout.passes, flags),
            longest=self.config.data.max_tokens,
            tokens=self.config.memory.micro_batch_tokens,
            may_leave=self.stop.request.is_handled and self.processes.world_size == 1,
            where=f"step {number}",
            undo=self.step.undo(),
        )
        rate = self.learner.rate(self.state.optimizer_steps) * self.guard.roll_backs.rate_factor
        norm = self.learner.step(rate)
        meter.total("optimizer/skipped", float(norm is None and self.processes.is_main))  # all processes skip together
        if norm is None:
            self.processes.say(
                f"warning: the loss ({totals.loss}) or its gradient is not finite; the update of step {number} is left out"
            )
        else:
            meter.mean("optimizer/grad_norm", torch.tensor(norm))
            meter.mean("optimizer/loss", torch.tensor(totals.loss))
        self.state.optimizer_steps += 1  # the learning rate follows the rows, also past an update that was left out
        self.state.learning_rate = rate
        interrupted, written = totals.flags
        if interrupted:
            self.stop.agree()
        if written == self.processes.world_size:
            self.checkpoints.try_to(self.checkpoints.finish)

    def _end_step(self, rollout: Rollout) -> dict[str, float]:
        """Log what the step gave, and act on what that gives alarm of."""
        metrics = supervised_metrics(self.step.meter, self.step.seconds, self.processes)
        metrics["optimizer/learning_rate"] = self.state.learning_rate
        metrics["optimizer/steps"] = self.state.optimizer_steps
        metrics["progress/epoch"] = self.order.epoch
        alarms = self.guard.observe(self.state.step, metrics, rollout)
        metrics["watchdog/alarms"] = len(alarms)
        self.log.log(self.state.step, metrics)
        good = self.guard.act_on(alarms, self.step, number=self.state.step)
        for callback in self.callbacks:
            callback.on_step(self.state.step, metrics, rollout)
        self.step = StepState()
        if good is not None:
            self._roll_back(good)
        return metrics

    # ---- between steps -----------------------------------------------------------------------------------------------

    @progress.phase("evaluation")
    def _evaluate_if_due(self) -> None:
        """Before the first step, after the last, and as configured between; not again for a step that a run resumes at."""
        step = self.state.step
        if not (step == 0 or self._is_last() or _due(step, self.config.evaluation.every_steps)):
            return
        if self.aside and not self.processes.on_main(lambda: self._is_measured(step)):
            self.log.log(step, self.held_out_loss())
        if self.held_out is not None and not self.held_out.is_evaluated(step):
            collector = self.held_out.collector
            collector.generator.sync()
            state = SimpleNamespace(global_step=step, max_steps=self.num_steps, epoch=self.order.epoch)
            collector.follow({}, max_completion_tokens=self.held_out.sampling.max_tokens, trainer_state=state)
            rows = self.held_out.evaluate(step, seed=self._seed("evaluation"))
            for callback in self.callbacks:
                callback.on_evaluation(step, rows)

    def held_out_loss(self) -> dict[str, float]:
        """Loss and accuracy of the rows that were set aside, over all processes."""
        meter = Meter()
        for micro in self._deal(self.aside):
            there = micro.to(self.processes.device)
            predicted = Predicted(*self.policy.before_update(there))
            measure_tokens(
                meter, there, predicted, loss="supervised/held_out_loss", accuracy="supervised/held_out_accuracy"
            )
        return meter.reduce(self.processes)

    def _is_measured(self, step: int) -> bool:
        return any(row["step"] == step and "supervised/held_out_loss" in row for row in self.log.metrics())

    def _is_last(self) -> bool:
        return self.state.step >= self.num_steps

    @progress.phase("saving")
    def save(self, *, wait: bool = False) -> Path:
        """Write a checkpoint of the current state; every process calls it. See Checkpoints.save."""
        self.policy.sync()
        saved = self.checkpoints.save(self.state, StepState(), policy=self.policy, wait=wait)
        for callback in self.callbacks:
            callback.on_save(self.state.step, saved)
        return saved

    def _restore(self, found: Path) -> None:
        self.state, _ = checkpoint.restore(found, policy=self.policy, processes=self.processes)
        self.order.position = self.state.position

    def _roll_back(self, good: Path) -> None:
        self._restore(good)
        self.log.close()
        self.log.open(resumed_step=self.state.step)
        self.guard.rewind(self.state.step)
        factor = self.guard.roll_backs.rate_factor
        self.processes.say(f"from here on at {factor:g} times the learning rate")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _leave(self, interrupted: Interrupted) -> None:
        saved = self.save(wait=True)
        if self.processes.is_main:
            report.at_the_end(self.directory)
        settings = ("run.resume=auto", f"run.dir={as_override(str(self.directory))}", *interrupted.settings)
        self.close()  # first: the last words stand beneath the display
        self.processes.say(
            f"stopped: {interrupted}. Saved to {saved}; {' '.join(settings)} goes on from there. Exit code {EXIT_STOPPED}."
        )
        request = self.stop.request
        goes_on = interrupted.settings and request.reason is None
        raise Stopped(str(interrupted), (*settings, *request.settings) if goes_on else ())

    def _finish(self) -> Path:
        """Draw the curves, show samples, and say where everything lies."""
        self.close()
        directory, last = self.directory, self.checkpoints.directory / checkpoint.name_of(self.state.step)
        self.log.show_samples(self.state.step)
        pictures = report.at_the_end(directory) if self.processes.is_main else []
        self.processes.say(
            "\n".join([f"\nmetrics    {directory / 'metrics.jsonl'}", *pictures, f"model      {last / 'hf'}"])
        )
        return last

    def metrics(self) -> DataFrame:
        """What has been logged so far, a row for each step and each evaluation; empty on other processes than the main one."""
        import pandas

        return pandas.DataFrame(self.log.metrics() if self.processes.is_main else [])

    def close(self) -> None:
        """End the reward workers and the logs; for a trainer that is stepped by hand."""
        self.log.close()
        if self.collector is not None:
            self.collector.scorer.close()

    def _seed(self, purpose: str) -> int:
        what = f"{self.config.run.seed} {purpose} {self.state.step} {self.processes.rank}"
        return random.Random(what).getrandbits(62)

    def _time(self, phase: str) -> AbstractContextManager[None]:
        return self.clock.phase_of(self.step, phase)


def batch_of(rows: list[Group]) -> Batch:
    """Rows as the learner takes them: each with the advantage 1; equal prompts are one."""
    return share_prompts(pack(rows, torch.ones(len(rows), 1)))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
