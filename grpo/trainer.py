"""The loop: sample, score, centre, update."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo import report
from grpo.algorithm.advantage import group_advantages, has_signal
from grpo.algorithm.batch import pack
from grpo.algorithm.dynamic_sampling import DynamicSampler
from grpo.assembly import Rows, assemble
from grpo.config import Config, as_override
from grpo.observe.metrics import measure_texts, step_metrics
from grpo.policy.policy import Policy
from grpo.run import checkpoint
from grpo.run.guard import Guard
from grpo.run.preflight import PreflightRefused
from grpo.scoring.answers import completion_rows
from grpo.scoring.reward import Reward
from grpo.system import progress
from grpo.system.out_of_memory import or_ask_for_less
from grpo.system.stopping import EXIT_STOPPED, Interrupted, Stopped
from grpo.training.callback import Callback
from grpo.training.collector import SamplingPlan
from grpo.training.learner import Learner
from grpo.training.state import Rollout, RunState, StepClock, StepState
from grpo.types import Group, MicroBatch, Scores

if TYPE_CHECKING:
    from pandas import DataFrame


class Trainer:
    """Trains a language model with GRPO on rule-based rewards.

    Args:
        config: a Config (`grpo settings` tells every setting), a YAML file, the name of a configuration that comes with the
            library, or a model; see Config.of.
        rewards: reward functions (or `Reward`s, which add a weight, a name and arguments) instead of `config.rewards`.
        train_dataset: rows instead of those of `config.data.name`: a `datasets.Dataset`, a `pandas.DataFrame` or a list of
            dictionaries.
        eval_dataset: rows instead of those of `config.data.eval_name`.
        settings: over those of `config`, by name: {"run.steps": 100, "rollout.group_size": 8}.
        callbacks: called after steps, evaluations and checkpoints, and at the end.

    Raises:
        ValueError: whatever is wrong with the settings, the data or the rewards; before the model is loaded.
    """

    policy_class: type[Policy] = Policy
    learner_class: type[Learner] = Learner

    def __init__(
        self,
        config: Config | str | Path,
        *,
        rewards: Sequence[Callable[..., Any] | Reward] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.callbacks = callbacks
        parts = assemble(
            Config.of(config, settings or {}),
            rewards=rewards,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            policy_class=self.policy_class,
            learner_class=self.learner_class,
        )
        self.config, self.processes, self.stop = parts.config, parts.processes, parts.stop
        self.prompts, self.signal_from = parts.prompts, parts.signal_from
        self.collector, self.learner, self.policy = parts.collector, parts.learner, parts.learner.policy
        self.preflight, self.held_out = parts.preflight, parts.held_out
        self.checkpoints, self.log = parts.checkpoints, parts.log
        self.directory = parts.log.directory  # of the run
        self.clock = StepClock(parts.processes)
        self.state, self.step = RunState(), StepState()
        if parts.found is not None:
            self._restore(parts.found)
        self.log.open(resumed_step=None if parts.found is None else self.state.step)
        self.guard = Guard(
            self.config, self.policy, self.collector, self.checkpoints, self.log, self.processes
        )  # once the log is open: it reads what the run has written so far

    def train(self) -> Path:
        """Run all steps that are left, with the evaluations and checkpoints that are due.

        Returns:
            The last checkpoint; its `hf/` is a directory that `AutoModelForCausalLM.from_pretrained` loads.

        Raises:
            Stopped: SIGTERM, SIGINT or the end of `run.max_hours` came, or a single process was short of memory in an update;
                where the run stands is saved. After a shortage, `settings` are what to go on with.
            PreflightRefused: there is nothing to learn from.
        """
        with self.stop.request, progress.phase("training"):
            try:
                self._follow_schedules()
                if self.state == RunState() and self.step.rollout is None:  # not on resume
                    self.preflight.before_training(self.directory)
                self._evaluate_if_due()
                while not self._is_last():
                    self.train_step()
                    if self._is_last() or _due(self.state.step, self.config.checkpoint.every_steps):
                        self.checkpoints.try_to(self.save)
                    self._evaluate_if_due()
                last = self.save(wait=True)
                for callback in self.callbacks:
                    callback.on_end(last)
            except Interrupted as interrupted:
                self._leave(interrupted)
            except PreflightRefused:
                self.close()
                raise
            finally:
                self.log.close()
        return self._finish()

    def train_step(self) -> dict[str, float]:
        """Sample a rollout, score it, and update the policy on it; the step's metrics over all processes.

        Raises:
            Interrupted: on all processes; only within `train`, which handles what asks for it.
        """
        self._follow_schedules()
        step = self.step
        if step.rollout is None:
            self._sample()
        self.processes.check_same("numbers of passes", [len(passes) for passes in step.minibatches])
        with self._time("step"):
            with self._time("update"):
                while step.minibatches and not self.stop.reason:
                    self._optimizer_step(step.minibatches[0])
                    step.minibatches.pop(0)
            if not step.minibatches:
                self.collector.generator.sync()
                self._refresh_reference_if_due()
        if step.minibatches:
            raise Interrupted(self.stop.reason)
        self.state.step += 1
        return self._end_step(step.sampled)

    # ---- the parts of a step -----------------------------------------------------------------------------------------

    @property
    def now(self) -> Config:
        """The settings of the step under way, of which some may follow a schedule."""
        return self.config.at(self.state.optimizer_steps if self.step.rollout is None else self.step.first_update)

    def _follow_schedules(self) -> None:
        """Hand on to the parts that hold a setting what it is in the step under way."""
        now, limit = self.now, self.now.rollout.max_completion_tokens
        self.learner.follow(now.algorithm.objective, temperature=now.rollout.temperature, max_completion_tokens=limit)
        progress_of_run = SimpleNamespace(
            global_step=self.state.optimizer_steps,
            max_steps=self.config.optimizer_steps,
            epoch=self.state.position / len(self.prompts.prompts),
        )
        self.collector.follow(now.scheduled_weights, max_completion_tokens=limit, trainer_state=progress_of_run)

    def _sample(self) -> None:
        """Sample and score a rollout, and make ready the passes of its updates."""
        step, rollout, meter = self.step, self.config.rollout, self.step.meter
        sampler = DynamicSampler(
            num_prompts=rollout.num_prompts,
            limit=self.config.max_questions_per_step,
            world_size=self.processes.world_size,
            seen=self.state.groups_seen,
            with_signal=self.state.groups_with_signal,
        )
        plan = SamplingPlan(self.now.sampling, rollout.group_size, seed=self._seed_of_draw)
        with self._time("step"):
            groups, scores = self.collector.fill(
                sampler, self.prompts.draw, plan, signal=self._signal, meter=meter, clock=self._time
            )
            minibatch = sampler.minibatch_of(
                rank=self.processes.rank, num_minibatches=self.config.algorithm.num_minibatches
            )
            with self._time("logprobs"):
                advantages, step.minibatches = self._or_ask_for_less(
                    lambda: self._prepare(groups, scores.rewards, minibatch)
                )
        measure_texts(meter, completion_rows(groups, scores), self.log.words)
        step.first_update, self.state.position = self.state.optimizer_steps, self.prompts.position
        self.state.groups_seen, self.state.groups_with_signal = sampler.remembered()
        step.rollout = Rollout(groups, scores, advantages, minibatch)

    def _signal(self, scores: Scores) -> Tensor:
        """(P,) which groups are worth a place in the batch, by the one reward that decides it."""
        return has_signal(scores.values[self.signal_from].masked_fill(scores.rewards.isnan(), math.nan))

    def _prepare(
        self, groups: list[Group], rewards: Tensor, minibatch: Tensor
    ) -> tuple[Tensor, list[list[MicroBatch]]]:
        """The advantages (P, G), and this process's passes over each minibatch of each epoch."""
        algorithm, meter = self.now.algorithm, self.step.meter
        if algorithm.kl_in == "reward":
            trained = (minibatch >= 0).nonzero().flatten()
            every = pack([groups[place] for place in trained.tolist()], torch.zeros(len(trained), rewards.shape[1]))
            penalties = algorithm.kl_coef * self.learner.divergences(every, meter).view(len(trained), rewards.shape[1])
            meter.mean("policy/kl_penalty", penalties)
            rewards = rewards.index_add(0, trained, penalties.to(rewards.dtype), alpha=-1)
        advantages = group_advantages(
            rewards, normalize_by_std=algorithm.normalize_by_std, baseline=algorithm.baseline
        ).float()
        parts = [(minibatch == number).nonzero().flatten().tolist() for number in range(algorithm.num_minibatches)]
        without = algorithm.filter_truncated
        batches = [pack([groups[p] for p in part], advantages[part], without_truncated=without) for part in parts]
        return advantages, self.learner.prepare(batches, meter)

    def _optimizer_step(self, minibatch: list[MicroBatch]) -> None:
        """One update on this process's passes over a minibatch; the other processes run as many at the same time."""
        if not minibatch:
            return
        meter, rollout, number = self.step.meter, self.step.sampled, self.state.step + 1
        flags = (self.stop.request.reason is not None, self.checkpoints.is_written)
        totals = self._or_ask_for_less(lambda: self.learner.accumulate(minibatch, meter, rollout.passes, flags))
        self.guard.before_update(totals, rollout, step=number, now=self.now)
        rate = self.learner.rate(self.state.optimizer_steps) * self.guard.roll_backs.rate_factor
        norm = self.learner.step(rate)
        meter.total("optimizer/skipped", float(norm is None and self.processes.is_main))  # all processes skip together
        if norm is None:
            self.processes.say(
                f"warning: the loss ({totals.loss}) or its gradient is not finite; an update of step {number} is left out"
            )
        else:
            self.state.optimizer_steps += 1
            self.state.learning_rate = rate
            meter.mean("optimizer/grad_norm", torch.tensor(norm))
            meter.mean("optimizer/loss", torch.tensor(totals.loss))
        interrupted, written = totals.flags
        if interrupted:
            self.stop.agree()
        if written == self.processes.world_size:
            self.checkpoints.try_to(self.checkpoints.finish)

    def _refresh_reference_if_due(self) -> None:
        after = self.state.optimizer_steps
        if self.learner.refresh_reference_if_due(before=self.step.first_update, after=after):
            self.processes.say(f"the reference is the policy after optimizer step {after} from here on")

    def _end_step(self, rollout: Rollout) -> dict[str, float]:
        """Log what the step gave, act on what that gives alarm of, and make room for the next step."""
        self.log.log_completions_if_due(
            self.state.step, rollout.groups, rollout.scores, rollout.advantages, in_batch=rollout.minibatch >= 0
        )
        metrics = step_metrics(self.step.meter, self.step.seconds, self.processes)
        metrics["optimizer/learning_rate"] = self.state.learning_rate
        metrics["optimizer/steps"] = self.state.optimizer_steps
        metrics |= {f"schedule/{name}": float(value) for name, value in self.now.scheduled_values().items()}
        metrics["progress/epoch"] = self.state.position / len(self.prompts.prompts)
        alarms = self.guard.observe(self.state.step, metrics, rollout)
        metrics["watchdog/alarms"] = len(alarms)
        self.log.log(self.state.step, metrics)
        good = self.guard.act_on(alarms, self.step, number=self.state.step)
        for callback in self.callbacks:
            callback.on_step(self.state.step, metrics, rollout)
        if good is not None:
            self._roll_back(good)
        self.step = StepState()
        return metrics

    # ---- between steps -----------------------------------------------------------------------------------------------

    @progress.phase("evaluation")
    def _evaluate_if_due(self) -> None:
        """Before the first step, after the last, and as configured between; not again for a step that a run resumes at."""
        step = self.state.step
        due = step == 0 or self._is_last() or _due(step, self.config.evaluation.every_steps)
        if self.held_out.prompts and due and not self.held_out.is_evaluated(step):
            self._follow_schedules()
            rows = self.held_out.evaluate(step, seed=self._seed("evaluation"))
            for callback in self.callbacks:
                callback.on_evaluation(step, rows)

    def _is_last(self) -> bool:
        return self.state.step >= self.config.run.steps

    @progress.phase("saving")
    def save(self, *, wait: bool = False) -> Path:
        """Write a checkpoint of the current state; every process calls it. See Checkpoints.save."""
        saved = self.checkpoints.save(self.state, self.step, policy=self.policy, wait=wait)
        for callback in self.callbacks:
            callback.on_save(self.state.step, saved)
        return saved

    def _restore(self, found: Path) -> None:
        self.state, self.step = checkpoint.restore(found, policy=self.policy, processes=self.processes)
        self.step.minibatches = self.learner.split(self.step.minibatches)
        self.collector.generator.sync()
        self.prompts.position = self.state.position

    def _roll_back(self, good: Path) -> None:
        self._restore(good)
        self.log.close()
        self.log.open(resumed_step=self.state.step)
        self.guard.rewind(self.state.step)
        factor = self.guard.roll_backs.rate_factor
        self.processes.say(f"from here on at {factor:g} times the learning rate, with other random numbers")

    def _or_ask_for_less(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; out of memory, ask to leave with a checkpoint of the step, to go on with smaller passes."""
        return or_ask_for_less(
            work,
            longest=self.config.max_sequence_tokens,
            tokens=self.config.memory.micro_batch_tokens,
            may_leave=self.collector.retries and self.stop.request.is_handled and self.processes.world_size == 1,
            where=f"phase {self.clock.phase} of step {self.state.step + 1}",
            undo=self.step.undo(),
        )

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _leave(self, interrupted: Interrupted) -> None:
        if self.step.rollout is None:
            self.step = StepState()  # to be sampled again
        self.prompts.position = self.state.position
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
        self.collector.scorer.close()
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
        self.collector.scorer.close()

    def _seed(self, purpose: str) -> int:
        """Of this process's random numbers in this step; a function of run.seed and the roll-backs: nothing to save."""
        suffix = self.guard.roll_backs.seed_suffix
        what = f"{self.config.run.seed} {purpose} {self.state.step} {self.processes.rank}{suffix}"
        return random.Random(what).getrandbits(62)

    def _seed_of_draw(self, number: int) -> int:
        return self._seed(f"rollout {number}" if number else "rollout")

    def _time(self, phase: str) -> AbstractContextManager[None]:
        return self.clock.phase_of(self.step, phase)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
