"""The course of a run: steps until the last, evaluations and checkpoints between them, stopped and resumed at any point."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from grpo import report
from grpo.config import AnyConfig, Config
from grpo.observe.rundir import DirectoryLock, RunLog
from grpo.run.checkpoint import CheckpointError, Checkpoints
from grpo.run.ending import say_how_to_go_on, say_where_all_lies
from grpo.run.guard import Guard
from grpo.run.hub import PushToHub
from grpo.run.restore import restore
from grpo.system import progress
from grpo.system.distributed import TrainingProcesses
from grpo.system.out_of_memory import or_ask_for_less
from grpo.system.stopping import Interrupted, StopAgreement
from grpo.training.callback import Callback
from grpo.training.collector import Collector
from grpo.training.learner import Learner
from grpo.training.state import Rollout, RunState, StepClock, StepState

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(kw_only=True)
class RunParts:
    """What every run is made of, in reinforcement learning and in supervised training."""

    processes: TrainingProcesses
    stop: StopAgreement
    learner: Learner
    checkpoints: Checkpoints
    log: RunLog  # not open yet
    found: Path | None  # the checkpoint to resume


Ran = TypeVar("Ran")
Given = ParamSpec("Given")
AnyLoop = TypeVar("AnyLoop", bound="Loop")


def at_work(method: Callable[Concatenate[AnyLoop, Given], Ran]) -> Callable[Concatenate[AnyLoop, Given], Ran]:
    """A method of a trainer that has not ended, within which it has the run's directory to itself. One that fails lets others in,
    since a notebook keeps it and its traceback. Called again, it takes the directory back, unless another has been there.

    The outermost call alone asks, so that the steps within `train` have no collective more."""

    @wraps(method)
    def call(self: AnyLoop, *arguments: Given.args, **options: Given.kwargs) -> Ran:
        self._check_open()
        if self._calls_at_work == 0:
            self._keep_others_out()
        self._calls_at_work += 1
        try:
            return method(self, *arguments, **options)
        except BaseException:
            if self._calls_at_work == 1:  # the outermost: `train` saves after a step was interrupted
                self._let_others_in()
            raise
        finally:
            self._calls_at_work -= 1

    return call


class Loop:
    """What a trainer does around its steps. Every process has one, and all call the same methods at the same time."""

    config: AnyConfig
    guard: Guard
    _evaluates: bool
    """Whether there is anything to evaluate; the same on all processes."""
    _lock: DirectoryLock
    _calls_at_work = 0
    _after_roll_back = ""
    """What else differs from the steps that were rolled back."""

    def __init__(self, parts: RunParts, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self.processes, self.stop = parts.processes, parts.stop
        self.learner, self.policy = parts.learner, parts.learner.policy
        self.checkpoints, self.log = parts.checkpoints, parts.log
        self.directory = parts.log.directory  # of the run
        self.clock = StepClock(parts.processes)
        self.state, self.step = RunState(), StepState()
        self._has_ended = False
        self._place = self.directory.resolve()
        self._told_of: Path | None = None  # the checkpoint

    def _begin(self, found: Path | None, config: Config, collector: Collector | None) -> None:
        """Take up the checkpoint that was found, and open the log; the guard reads what the run has written so far."""
        if found is not None:
            self._restore(found)
        if self.processes.is_main:
            self._lock.begin()
        self.log.open(resumed_step=None if found is None else self.state.step)
        self.guard = Guard(config, self.policy, collector, self.checkpoints, self.log, self.processes)
        if self.step.rollout is None and self.guard.roll_backs.last_to == self.state.step:  # killed after going back
            self.step.drafts = {}

    # ---- what a trainer fills in -------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One training step; its metrics over all processes. Called by hand it goes on past run.steps, at the learning rate that
        optimizer.schedule ends with."""
        raise NotImplementedError

    def _before_first_step(self) -> None:
        """What a new run begins with, and a resumed one does not."""

    def _evaluate(self) -> list[dict[str, Any]] | None:
        """The held-out answers of all processes after the last step; None: there are no questions, or it was done before."""
        raise NotImplementedError

    def _take_up(self) -> None:
        """Bring the trainer's own parts to where the restored state stands."""
        raise NotImplementedError

    def close(self) -> None:
        """End the reward workers and the logs, and let others into the run's directory; for a trainer that is stepped by hand."""
        self._has_ended = True
        try:
            self.log.close()
        finally:
            self._let_others_in()

    def _keep_others_out(self) -> None:
        """On the main process; what it raises, all raise, who would wait for it in a collective otherwise. It asks for that in
        each case, and not only after a failure: what failed may have been a callback of the main process alone."""

        def problem() -> Exception | None:
            try:
                self._lock.take(self._place)
            except (ValueError, RuntimeError, OSError) as error:
                return error
            return None

        refused = self.processes.on_main(problem)
        if refused is not None:
            raise refused

    def _let_others_in(self) -> None:
        """Once what this process writes of a checkpoint in the background is on disk; alone, it has then completed it."""
        try:
            self.checkpoints.wait()
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self._has_ended:
            raise RuntimeError(
                f"this trainer has ended: its workers and logs are closed. To go on from {self.directory}, make a new one with "
                "run.resume=auto."
            )

    # ---- the course --------------------------------------------------------------------------------------------------

    @at_work
    def train(self) -> Path:
        """Run all steps that are left, with the evaluations and checkpoints that are due. Where `train_step` has been called by
        hand, the preflight and the evaluation ahead of the first step are no longer due.

        Returns:
            The last checkpoint; its `hf/` is a directory that `AutoModelForCausalLM.from_pretrained` loads.

        Raises:
            Stopped: SIGTERM, SIGINT or the end of `run.max_hours` came, or a single process was short of memory in an update;
                where the run stands is saved. After a shortage, `settings` are what to go on with.
            StoppedInNotebook: the same in a notebook.
            PreflightRefused: there is nothing to learn from.
            ValueError: the trainer failed before, and another is at work in its directory.
            RuntimeError: the trainer has ended before; or it failed, and its directory is gone, or another has been at work there
                since.
        """
        self._check_place()
        if self.log.is_closed:  # a callback or a reward ended an earlier call
            self.log.open(resumed_step=self.state.step)
        if self.config.run.push_to_hub is not None and not any(isinstance(each, PushToHub) for each in self.callbacks):
            push = PushToHub(self.config, self.directory, self.processes, stop_reason=lambda: self.stop.request.reason)
            self.callbacks = [*self.callbacks, push]
        with self.stop.request, progress.phase("training"):
            try:
                self.checkpoints.check_room(self.policy, step=self.state.step, num_steps=self.num_steps)
                if self.state == RunState() and self.step.rollout is None:  # not on resume
                    self._before_first_step()
                self._evaluate_if_due()
                if self._is_last():
                    self.processes.say(f"all {self.state.step:,} steps are done; raise run.steps to go on")
                while not self._is_last():
                    self.train_step()
                    if self._is_last() or _due(self.state.step, self.config.checkpoint.every_steps):
                        nothing_follows = self._is_last() and not self._evaluates  # beside which it could be written
                        self.checkpoints.try_to(partial(self.save, wait=nothing_follows))
                    self._evaluate_if_due()
                last = self._save_last()
                self._call_back(lambda callback: callback.on_end(last))
            except Interrupted as interrupted:
                raise self._leave(interrupted) from interrupted
            finally:
                self.log.close()
        self.close()
        self.log.show_samples(self.state.step)
        say_where_all_lies(self.directory, last / "hf", self.processes)
        return last

    @property
    def num_steps(self) -> int:
        """Training steps of the whole run."""
        assert self.config.run.steps is not None, "a trainer whose settings do not say it fills this in"
        return self.config.run.steps

    def _save_last(self) -> Path:
        """Raises CheckpointError, with the remedy: training is over, and no other checkpoint is due."""
        try:
            return self.save()
        except CheckpointError as error:
            raise CheckpointError(f"{error} Free some space, and start it again with run.resume=auto.") from error

    def _is_last(self) -> bool:
        return self.state.step >= self.num_steps

    @progress.phase("evaluation")
    def _evaluate_if_due(self) -> None:
        """Before the first step, after the last, and as configured between; not again for a step that a run resumes at."""
        step = self.state.step
        due = step == 0 or self._is_last() or _due(step, self.config.evaluation.every_steps)
        if due and (rows := self._evaluate()) is not None:
            self._call_back(lambda callback: callback.on_evaluation(step, rows))

    @property
    def _flags(self) -> tuple[bool, bool]:
        """What a process lets the others know with the sums of an update."""
        return self.stop.request.reason is not None, self.checkpoints.is_written

    def _act_on(self, flags: tuple[float, ...]) -> None:
        """Of `flags`, what they come to over all processes."""
        interrupted, written = flags
        if interrupted:
            self.stop.agree()
        if written == self.processes.world_size:
            self.checkpoints.try_to(self.checkpoints.finish)

    def _close_step(self, metrics: dict[str, float], rollout: Rollout) -> dict[str, float]:
        """Log what the step gave, act on what that gives alarm of, and make room for the next step."""
        alarms = self.guard.observe(self.state.step, metrics, rollout)
        metrics["watchdog/alarms"] = len(alarms)
        self.log.log(self.state.step, metrics)
        good = self.guard.act_on(alarms, self.step, number=self.state.step)
        self.step = StepState(drafts=self.step.drafts)  # before a callback saves, which is between two steps
        self._call_back(lambda callback: callback.on_step(self.state.step, metrics, rollout))
        if good is not None:
            self._roll_back(good)
        return metrics

    @at_work
    @progress.phase("saving")
    def save(self, *, wait: bool = True) -> Path:
        """Write a checkpoint of the current state; every process calls it. See Checkpoints.save.

        Args:
            wait: until it is complete. False: in the background, if `checkpoint.background` comes to that; it is complete with an
                update of a later step, or the next checkpoint. `train` saves so between steps.

        Raises:
            CheckpointError: it could not be written.
            ValueError, RuntimeError: see `train`.
        """
        started = time.perf_counter()
        saved = self.checkpoints.save(self.state, self.step, policy=self.policy, wait=wait)
        waited = self.step.seconds.get("checkpoint", 0.0) + time.perf_counter() - started
        self.step.seconds["checkpoint"] = waited  # a row of metrics.jsonl is written before what it has led to is saved
        if saved != self._told_of:  # the last one is asked for twice
            self._told_of = saved
            self._call_back(lambda callback: callback.on_save(self.state.step, saved))
        return saved

    def _call_back(self, what: Callable[[Callback], None]) -> None:
        """Call a method of each callback; a KeyboardInterrupt asks to stop before the next update, as Ctrl-C does."""
        for callback in self.callbacks:
            try:
                what(callback)
            except KeyboardInterrupt:
                if not self.stop.request.is_handled:  # stepped by hand
                    raise
                self.stop.request.ask(f"{type(callback).__name__} raised KeyboardInterrupt")

    def _check_place(self) -> None:
        """Raises RuntimeError: what is written from here on would be elsewhere than what is there."""
        if self.directory.resolve() != self._place:
            raise RuntimeError(
                f"run.dir is {str(self.directory)!r}; the working directory is now {Path.cwd()}, and the run is in "
                f"{self._place}. Go back to where the trainer was made, or make it with an absolute run.dir."
            )

    def _restore(self, found: Path) -> None:
        self.state, self.step = restore(
            found,
            policy=self.policy,
            processes=self.processes,
            given=self.checkpoints.given,
            max_completion_tokens=self.config.rollout.max_completion_tokens
            if isinstance(self.config, Config)
            else None,
        )
        self._take_up()

    def _roll_back(self, good: Path) -> None:
        self._restore(good)
        self.step.drafts = {}  # with the random numbers from before, what went wrong would partly come again
        self._told_of = None  # what is made anew has the names of what was rolled back
        self.log.close()
        self.log.open(resumed_step=self.state.step)
        self.guard.rewind(self.state.step)
        factor = self.guard.roll_backs.rate_factor
        self.processes.say(f"from here on at {factor:g} times the learning rate{self._after_roll_back}")

    def _or_ask_for_less(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; out of memory, ask to leave with a checkpoint of the step, to go on with smaller passes."""
        return or_ask_for_less(
            work,
            longest=self.config.max_sequence_tokens,
            tokens=self.config.memory.micro_batch_tokens,
            may_leave=self.stop.request.is_handled and self.processes.world_size == 1,
            where=f"phase {self.clock.phase} of step {self.state.step + 1}",
            undo=self.step.undo(),
        )

    def _leave(self, interrupted: Interrupted) -> BaseException:
        if self.step.rollout is None:
            self.step = StepState(drafts=self.step.drafts)  # to be done again
        saved = self.save()
        for callback in self.callbacks:
            if isinstance(callback, PushToHub):
                callback.on_stop()
        if self.processes.is_main:
            report.at_the_end(self.directory)
        self.close()  # first: the last words stand beneath the display
        return say_how_to_go_on(interrupted, self.directory, saved, self.stop.request, self.processes)

    def metrics(self) -> DataFrame:
        """What has been logged so far, a row for each step with its evaluation; empty on other processes than the main one."""
        import pandas

        rows = pandas.DataFrame(self.log.metrics() if self.processes.is_main else [])
        return rows if rows.empty else rows.groupby("step", as_index=False).first()  # of each metric what there is

    def _time(self, phase: str) -> AbstractContextManager[None]:
        return self.clock.phase_of(self.step, phase)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
