"""The loop: sample, score, centre, update."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from grpo.algorithm.own_loss import Loss
from grpo.assembly import Rows, assemble, settle
from grpo.config import Config
from grpo.data.order import Order
from grpo.observe.metrics import step_metrics
from grpo.observe.rundir import DirectoryLock
from grpo.policy.policy import MakeOptimizer, Policy
from grpo.run.loop import Loop, at_work
from grpo.run.preflight import PreflightRefused
from grpo.scoring.reward import Reward
from grpo.system.stopping import Interrupted
from grpo.training.arguments import explained
from grpo.training.callback import Callback, check_callbacks
from grpo.training.learner import Learner
from grpo.training.rollout import Advantage
from grpo.training.state import Rollout
from grpo.turns.environment import Make
from grpo.turns.toolbox import Given
from grpo.types import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trainer(Loop):
    """Trains a language model with GRPO on rule-based rewards.

        def brief(completion: str) -> float:
            return 1.0 if len(completion) < 60 else 0.0

        rows = [{"question": "What is 1+1?", "answer": "2"}, ...]
        trainer = Trainer("Qwen/Qwen2.5-0.5B", rewards=[brief], train_dataset=rows, settings={"run.steps": 100})
        checkpoint = trainer.train()  # checkpoint / "hf" is the trained model
        trainer.metrics()             # a data frame

    `trainer.directory` is the run's, with metrics, completions, a report and checkpoints; `trainer.policy.lm` the model of
    transformers that is trained; `trainer.state.step` how many steps it has made. A loaded model that is given stays as it is.

    Args:
        config: a Config (`grpo settings` tells every setting), a YAML file, the name of a configuration that comes with the
            library, or a model: its name or folder, or a loaded model of transformers.
        rewards: reward functions (or `Reward`s, which add a weight, a name and arguments) instead of `config.rewards`.
        tools: functions with types and docstrings that the model can call, or classes of which each completion has an object of
            its own, instead of `config.tools.functions`; docs/tools.md.
        environment: a class, or another function that makes objects, whose `step(text)` answers the model's turns, instead of
            `config.environment.function`; docs/environments.md.
        train_dataset: rows instead of those of `config.data.name`: a `datasets.Dataset`, a `pandas.DataFrame` or a list of
            dictionaries.
        eval_dataset: rows instead of those of `config.data.eval_name`, read by the `eval_` settings where that is set.
        settings: over those of `config`, by name: {"run.steps": 100, "rollout.group_size": 8}.
        callbacks: called after steps, evaluations and checkpoints, and at the end.
        optimizer: a function from the list of trained parameters to their torch optimizer, instead of AdamW. The learning rate
            remains that of `optimizer.learning_rate` and its schedule.
        advantage: a function from rewards (questions, completions), NaN where unknown, to advantages of the same shape, instead
            of what `algorithm.baseline`, `algorithm.normalize_by_std` and their like say.
        loss: a function from `LossInputs`, the tokens of a pass, to the loss of each, with all its terms, instead of the usual.
        order: a function from the epoch (0, 1, ...) and the rows to the row numbers as they are asked, instead of a seeded order.
        tokenizer: that of a loaded model; None: the one that lies where the model was loaded from.

    Raises:
        ValueError: whatever is wrong with settings, data or rewards, or another is at work in run.dir; before a model is loaded.
    """

    config: Config
    _after_roll_back = ", with other random numbers"
    _policy_class: type[Policy] = Policy
    _learner_class: type[Learner] = Learner

    @explained
    def __init__(
        self,
        config: Config | str | Path | PreTrainedModel,
        *,
        rewards: Sequence[Callable[..., Any] | Reward | str] | None = None,
        tools: Sequence[Given] | None = None,
        environment: Make | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        optimizer: MakeOptimizer | None = None,
        advantage: Advantage | None = None,
        loss: Loss | None = None,
        order: Order | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_callbacks(callbacks)
        resolved, given_model = settle(Config, config, tokenizer, settings or {})
        with DirectoryLock() as self._lock:
            parts = assemble(
                resolved,
                lock=self._lock,
                rewards=rewards,
                tools=tools,
                environment=environment,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                policy_class=self._policy_class,
                learner_class=self._learner_class,
                optimizer=optimizer,
                advantage=advantage,
                loss=loss,
                order=order,
                given_model=given_model,
            )
            super().__init__(parts, callbacks)
            self.config = parts.config
            self.prompts, self.rollouts, self.collector = parts.prompts, parts.rollouts, parts.collector
            self.preflight, self.held_out, self.toolbox = parts.preflight, parts.held_out, parts.toolbox
            self._evaluates = bool(self.held_out.prompts)
            self._begin(parts.found, self.config, self.collector)

    @at_work
    def train_step(self) -> dict[str, float]:
        """Sample a rollout, score it, and update the policy on it, also past run.steps; the step's metrics over all processes.

        Raises:
            Interrupted: on all processes; only within `train`, which handles what asks for it.
            ValueError, RuntimeError: see `train`.
        """
        self._follow_schedules()
        step = self.step
        if step.rollout is None:
            self._sample()
        self.collector.generator.release_memory()  # a run resumes within a step, maybe with an evaluation before it
        self.processes.check_same("numbers of passes", [len(passes) for passes in step.minibatches])
        with self._time("step"):
            with self._time("update"):
                while step.minibatches and not self.stop.reason:
                    self._optimizer_step(step.minibatches[0])
                    step.minibatches.pop(0)
            if not step.minibatches:
                self.collector.generator.sync()
                self.learner.refresh_reference_if_due(before=step.first_update, after=self.state.optimizer_steps)
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
        objective = replace(now.algorithm.objective, entropy_coef=self._entropy_coef)
        self.learner.follow(objective, temperature=now.rollout.temperature, max_completion_tokens=limit)
        progress_of_run = SimpleNamespace(
            global_step=self.state.optimizer_steps,
            max_steps=self.config.optimizer_steps,
            epoch=self.state.position / len(self.prompts.prompts),
        )
        self.collector.follow(now.scheduled_weights, max_completion_tokens=limit, trainer_state=progress_of_run)

    @property
    def _entropy_coef(self) -> float:
        """The weight of the entropy bonus in the step under way."""
        algorithm, state = self.config.algorithm, self.state
        control = algorithm.entropy_control
        coef = algorithm.entropy_coef if state.entropy_coef is None else state.entropy_coef
        return algorithm.entropy_coef if control is None else control.in_use(coef, state.entropy)

    def _follow_entropy(self, metrics: dict[str, float]) -> None:
        """Change that weight for the next step, by the entropy of this one."""
        algorithm, state = self.config.algorithm, self.state
        control = algorithm.entropy_control
        if control is None:
            return
        metrics["policy/entropy_coef"] = self._entropy_coef
        if "policy/entropy" in metrics:
            coef = algorithm.entropy_coef if state.entropy_coef is None else state.entropy_coef
            state.entropy_coef = control.next(coef, metrics["policy/entropy"])
            state.entropy = metrics["policy/entropy"]

    def _sample(self) -> None:
        self.rollouts.make(
            self.step,
            self.state,
            self.now,
            seed=self._seed,
            question_seed=self._question_seed,
            clock=self._time,
            retry=self._or_ask_for_less,
        )

    def _optimizer_step(self, minibatch: list[MicroBatch]) -> None:
        """One update on this process's passes over a minibatch; the other processes run as many at the same time."""
        if not minibatch:
            return
        meter, rollout = self.step.meter, self.step.sampled
        totals = self._or_ask_for_less(lambda: self.learner.accumulate(minibatch, meter, rollout.passes, self._flags))
        self.guard.before_update(totals, rollout, step=self.state.step + 1, now=self.now)
        self.learner.update(totals, self.state, meter, rate_factor=self.guard.roll_backs.rate_factor)
        self._act_on(totals.flags)

    def _end_step(self, rollout: Rollout) -> dict[str, float]:
        self.log.log_completions_if_due(
            self.state.step, rollout.groups, rollout.scores, rollout.advantages, in_batch=rollout.minibatch >= 0
        )
        metrics = step_metrics(self.step.meter, self.step.seconds, self.processes) | self.state.metrics()
        metrics |= {f"schedule/{name}": float(value) for name, value in self.now.scheduled_values().items()}
        metrics["progress/epoch"] = self.state.position / len(self.prompts.prompts)
        self._follow_entropy(metrics)
        if self.prompts.passes_over:
            for name, rows in (("solved", self.state.solved), ("hopeless", self.state.hopeless)):
                metrics[f"progress/{name}"] = len(rows) / len(self.prompts.prompts)
        return self._close_step(metrics, rollout)

    # ---- what the run's course asks for ------------------------------------------------------------------------------

    def _before_first_step(self) -> None:
        self._follow_schedules()
        try:
            self.preflight.before_training(self.directory)
        except PreflightRefused:
            self.close()
            raise

    def _evaluate(self) -> list[dict[str, Any]] | None:
        if not self._evaluates or self.held_out.is_evaluated(self.state.step):
            return None
        self._follow_schedules()
        return self.held_out.evaluate(self.state.step, seed=self._seed("evaluation"))

    def _take_up(self) -> None:
        self.step.minibatches = self.learner.split(self.step.minibatches)
        self.collector.generator.sync()

    def close(self) -> None:
        """End the workers of rewards and tools, and the logs; for a trainer that is stepped by hand."""
        super().close()
        self.collector.scorer.close()
        if self.toolbox is not None:
            self.toolbox.close()

    def _seed(self, purpose: str) -> int:
        """Of this process's random numbers in this step; a function of run.seed and the roll-backs: nothing to save."""
        return self._seed_of(f"{purpose} {self.state.step} {self.processes.rank}")

    def _question_seed(self, place: int) -> int:
        """Of the completions of the question at a place in dealt order, whenever and wherever they are sampled."""
        return self._seed_of(f"question {place}")

    def _seed_of(self, what: str) -> int:
        return random.Random(f"{self.config.run.seed} {what}{self.guard.roll_backs.seed_suffix}").getrandbits(62)
