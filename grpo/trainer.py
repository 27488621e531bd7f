"""The loop: sample, score, centre, update."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo import report
from grpo.algorithm.advantage import group_advantages, has_signal
from grpo.algorithm.batch import join, micro_batch, pack, plan_passes, spare, split, take
from grpo.algorithm.dynamic_sampling import Draws
from grpo.algorithm.loss import entropy_threshold, grpo_loss, token_weights
from grpo.config import Config, as_override
from grpo.config.schedule import learning_rate
from grpo.data.prompts import PromptOrder, build_prompts, use_chat_template
from grpo.data.rows import load_rows, missing, prepare_rows
from grpo.observe import rundir
from grpo.observe.console import show_samples
from grpo.observe.metrics import (
    check_reward_names,
    measure_batch,
    measure_micro_batch,
    measure_passes,
    measure_rollout,
    measure_texts,
    step_metrics,
)
from grpo.observe.rundir import RunLog
from grpo.observe.sinks import check_sinks
from grpo.policy.families import check_family
from grpo.policy.model_source import with_resolved_name
from grpo.policy.policy import Policy, check_context, check_vocabulary, load_tokenizer, resolve_dtype
from grpo.rollout import check_engine, make_generator
from grpo.run import checkpoint, inputs, post_mortem, preflight, tripwire
from grpo.run.checkpoint import CheckpointError, Checkpoints, RunState, numbers_of
from grpo.run.post_mortem import Evidence
from grpo.run.step_state import StepUnderWay
from grpo.run.watchdog import Alarm, RollBacks, Watchdog, WatchdogError, unless_finite
from grpo.scoring.answers import answer, completion_rows, in_order, is_right, training_rows, verdict_name
from grpo.scoring.scorer import Reward, Scorer, join_scores, reads_answer, resolve_rewards
from grpo.system import distributed, progress
from grpo.system.out_of_memory import free, is_out_of_memory, or_fewer_at_once
from grpo.system.stopping import EXIT_STOPPED, Stopped, StopRequest
from grpo.system.terminal import say
from grpo.text.answer_forms import excerpts
from grpo.types import Batch, Group, MicroBatch, Prompt, Scores

NUM_EXCERPTS = 3
"""Answers that an alarm shows."""

Rows = Iterable[Mapping[str, Any]]
T = TypeVar("T")


class Interrupted(Exception):
    """All processes agree to stop, between two updates or before a rollout."""

    def __init__(self, reason: str, settings: tuple[str, ...] = ()) -> None:
        """Args: settings: what to set when the run goes on."""
        super().__init__(reason)
        self.settings = settings


class Trainer:
    """Trains a language model with GRPO on rule-based rewards.

    Args:
        config: see grpo/config/settings.py.
        rewards: reward functions (or `Reward`s, which add a weight, a name and arguments) instead of `config.rewards`.
        train_dataset: rows instead of those of `config.data.name`: a `datasets.Dataset`, a `pandas.DataFrame` or a list of
            dictionaries.
        eval_dataset: rows instead of those of `config.data.eval_name`.

    Raises:
        ValueError: whatever is wrong with the settings, the data or the rewards; before the model is loaded.
    """

    def __init__(
        self,
        config: Config,
        *,
        rewards: Sequence[Callable[..., Any] | Reward] | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
    ) -> None:
        functions = _reward_functions(config, rewards)
        check_reward_names(reward.name for reward in functions)
        self.config = config = with_resolved_name(config)
        self.makes_do = True  # with less memory than configured, if it has to
        self.stopping = StopRequest(config.run.max_hours)
        self.interruption = ""  # why all processes are about to stop, once they agree
        self.processes = distributed.start(config, dtype=resolve_dtype(config.model.dtype))
        config.check_world_size(self.processes.world_size)
        tokenizer = load_tokenizer(config.model)
        use_chat_template(tokenizer, config.data)
        check_context(config)
        check_family(config.model)
        check_engine(config)
        check_sinks(config)
        with self.processes.accelerator.main_process_first():
            rows = _rows(config, train_dataset, functions, evaluation=False)
            eval_rows = (
                _rows(config, eval_dataset, functions, evaluation=True) if config.evaluation.num_questions else []
            )
        self.scorer = Scorer(
            functions,
            **_columns(rows, eval_rows),
            max_completion_tokens=config.rollout.max_completion_tokens,
            num_workers=config.scoring.num_workers,
            timeout_seconds=config.scoring.timeout_seconds,
            memory_gib=config.scoring.memory_gib,
            environment=config.scoring.environment,
        )
        self.signal_from = _signal_from(config, functions)
        self.audits: list[preflight.Audit] = []
        self.scorer.check_limits(config.completion_limits)
        wanted = eval_rows[: config.evaluation.num_questions]
        named = self.scorer.named_columns()
        gaps = [*_gaps(named, rows, "training questions"), *_gaps(named, wanted, "held-out questions")]
        for notice in [*self.scorer.notices(), *gaps]:
            self.say(notice)
        prompts = self._gradable_prompts(rows, tokenizer, "training questions")
        self.eval_prompts = self._gradable_prompts(wanted, tokenizer, "held-out questions") if wanted else []
        check_vocabulary(config.model, tokenizer, [prompt.token_ids for prompt in [*prompts, *self.eval_prompts]])
        self.prompts = PromptOrder(
            prompts,
            seed=config.run.seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            weights=config.data.weights if train_dataset is None else None,
        )
        self.directory = Path(self.processes.on_main(lambda: str(rundir.claim(config.run))))
        self.scorer.log_to(self.directory / "rewards.log")
        given = self.processes.on_main(lambda: inputs.digests(prompts, self.eval_prompts, functions))
        self.checkpoints = Checkpoints(self.directory / "checkpoints", config, self.processes, given=given)
        found = checkpoint.find(self.checkpoints.directory, config, self.processes, given=given)
        self.say(config.summary(num_rows=len(prompts), world_size=self.processes.world_size))
        self.policy = self._load_policy(tokenizer)
        self.generator = make_generator(config, self.policy)
        self.state = RunState()
        self.under_way = StepUnderWay()
        if found is not None:
            self._restore(found)
        self.log = RunLog(
            self.directory, config, self.processes, reward_names=[reward.name for reward in self.scorer.rewards]
        )
        self.log.open(resumed_step=None if found is None else self.state.step)
        self.watchdog = Watchdog(config, self.processes.on_main(self.log.metrics))
        self.roll_backs = RollBacks(self.processes.on_main(self.log.roll_backs))
        self.rounding: float | None = None  # nats, see tripwire.measure_rounding
        self.phase = ""  # of the step: the last one that began

    def _load_policy(self, tokenizer: PreTrainedTokenizerBase) -> Policy:
        return Policy(self.config, tokenizer, self.processes)

    def train(self) -> Path:
        """Run all steps that are left, with the evaluations and checkpoints that are due.

        Returns:
            The last checkpoint; its `hf/` is a directory that `AutoModelForCausalLM.from_pretrained` loads.

        Raises:
            Stopped: SIGTERM, SIGINT or the end of `run.max_hours` came, or a single process was short of memory in an update;
                where the run stands is saved. After a shortage, `settings` are what to go on with.
        """
        with self.stopping, progress.phase("training"):
            try:
                self._follow_schedules()
                if self.state == RunState() and self.under_way.rollout is None:  # not on resume
                    preflight.before_training(self)
                self._evaluate_if_due()
                while not self._is_last():
                    self.train_step()
                    if self._is_last() or _due(self.state.step, self.config.checkpoint.every_steps):
                        self._try(self.save)  # a run does not end because its disk is full for a while
                    self._evaluate_if_due()
                self.save(wait=True)
            except Interrupted as interrupted:
                self._leave(interrupted)
            finally:
                self.log.close()
        return self._finish()

    def train_step(self) -> dict[str, float]:
        """Sample a rollout, score it, and update the policy on it; the step's metrics over all processes.

        Raises:
            Interrupted: on all processes; only within `train`, which handles what asks for it.
        """
        step = self.under_way
        self._follow_schedules()
        if step.rollout is None:
            step.rollout = self._begin_step(step)
        self.processes.check_same("numbers of passes", [len(passes) for passes in step.minibatches])
        with self._clock("step"):
            with self._clock("update"):
                while step.minibatches and not self.interruption:
                    self._optimizer_step(step.minibatches[0])
                    step.minibatches.pop(0)
            if not step.minibatches:
                self.generator.sync()
                self._refresh_reference_if_due(step.first_update)
        if step.minibatches:
            raise Interrupted(self.interruption)
        self.state.step += 1
        if _due(self.state.step, self.config.logging.completions_every):
            rollout = step.rollout
            in_batch = rollout.minibatch >= 0
            rows = training_rows(self.state.step, rollout.groups, rollout.scores, rollout.advantages, in_batch=in_batch)
            self._log_completions(rows)
        metrics = self._log_metrics()
        self.under_way = StepUnderWay()
        return metrics

    @property
    def now(self) -> Config:
        """The settings of the step under way, of which some may follow a schedule."""
        under_way = self.under_way
        return self.config.at(self.state.optimizer_steps if under_way.rollout is None else under_way.first_update)

    def _follow_schedules(self) -> None:
        """Hand on to the parts that hold a setting what it is in the step under way."""
        now = self.now
        self.policy.use_temperature(now.rollout.temperature)
        self.scorer.max_completion_tokens = now.rollout.max_completion_tokens
        self.scorer.trainer_state = SimpleNamespace(
            global_step=self.state.optimizer_steps,
            max_steps=self.config.optimizer_steps,
            epoch=self.state.position / len(self.prompts.prompts),
        )
        for setting, value in now.scheduled_values().items():
            if setting.startswith("rewards."):
                number = int(setting.split(".")[1])
                self.scorer.rewards[number] = replace(self.scorer.rewards[number], weight=value)

    def _begin_step(self, step: StepUnderWay) -> Evidence:
        """Sample and score a rollout, and make ready the passes of its updates."""
        draws = Draws(
            num_prompts=self.config.rollout.num_prompts,
            limit=self.config.max_questions_per_step,
            world_size=self.processes.world_size,
            seen=self.state.groups_seen,
            with_signal=self.state.groups_with_signal,
        )
        with self._clock("step"):
            groups, scores, minibatch = self._fill(draws)
            with self._clock("logprobs"):
                advantages, step.minibatches = self._or_smaller_passes(
                    lambda: self._make_ready(groups, scores.rewards, minibatch)
                )
        step.first_update, self.state.position = self.state.optimizer_steps, self.prompts.position
        self.state.groups_seen, self.state.groups_with_signal = draws.remembered()
        measure_rollout(step.meter, groups, scores)
        measure_texts(step.meter, completion_rows(groups, scores), self.log.words)
        if draws.limit > draws.num_prompts:
            measure_batch(step.meter, groups, scores, signal=self._signal(scores), in_batch=minibatch >= 0)
            step.meter.mean("rollout/draws", torch.tensor(float(len(draws.sizes))))
        return Evidence(groups, scores, advantages, minibatch)

    def _fill(self, draws: Draws) -> tuple[list[Group], Scores, Tensor]:
        """Draw questions, sample and score, until the batch is full or no more may be drawn; the minibatch of each group."""
        groups: list[Group] = []
        scores: list[Scores] = []
        while size := draws.next_size():
            sampled = self._draw(size, number=len(scores))
            draws.add(self.agree_to_go_on([] if sampled is None else self._signal(sampled[1]).tolist()))
            assert sampled is not None, "only a request to stop breaks off the sampling"
            groups += sampled[0]
            scores.append(sampled[1])
            for name, value in self.generator.metrics().items():
                self.under_way.meter.mean(name, torch.tensor(value))
        num_minibatches = self.config.algorithm.num_minibatches
        minibatch = draws.minibatch_of(rank=self.processes.rank, num_minibatches=num_minibatches)
        return groups, join_scores(scores), minibatch

    def _signal(self, scores: Scores) -> Tensor:
        """(P,) which groups are worth a place in the batch, by the one reward that decides it."""
        return has_signal(scores.values[self.signal_from].masked_fill(scores.rewards.isnan(), math.nan))

    def _draw(self, size: int, *, number: int) -> tuple[list[Group], Scores] | None:
        """Sample and score this process's share of the next questions; None if a request to stop broke it off."""
        prompts, seed = self.prompts.draw(size), self._seed("rollout" + f" {number}" * (number > 0))
        return self.stopping.abortable(lambda: self.making_do(lambda: self._sample(prompts, seed)))

    def _make_ready(
        self, groups: list[Group], rewards: Tensor, minibatch: Tensor
    ) -> tuple[Tensor, list[list[MicroBatch]]]:
        """The advantages, and this process's passes over each minibatch of each epoch, with what stays fixed in the updates."""
        algorithm, meter = self.now.algorithm, self.under_way.meter
        if algorithm.kl_in == "reward":
            trained = (minibatch >= 0).nonzero().flatten()
            penalties = algorithm.kl_coef * self._divergences([groups[place] for place in trained.tolist()])
            meter.mean("policy/kl_penalty", penalties)
            rewards = rewards.index_add(0, trained, penalties.to(rewards.dtype), alpha=-1)
        advantages = group_advantages(
            rewards, normalize_by_std=algorithm.normalize_by_std, baseline=algorithm.baseline
        ).float()
        parts = [
            (minibatch == number).nonzero().flatten().tolist()
            for number in range(self.config.algorithm.num_minibatches)
        ]
        minibatches = [
            self._deal(pack([groups[p] for p in part], advantages[part], without_truncated=algorithm.filter_truncated))
            for part in parts
        ]
        for passes in minibatches:
            self._fix(passes)
        for passes in algorithm.num_epochs * minibatches:
            measure_passes(meter, passes)
        return advantages, algorithm.num_epochs * minibatches

    def _divergences(self, groups: list[Group]) -> Tensor:
        """(P, G) sums over each completion's tokens of log pi - log pi_ref, before the update; a process may have no groups."""
        rows = pack(groups, torch.zeros(len(groups), self.config.rollout.group_size))
        plan = plan_passes(rows, token_budget=self.config.memory.micro_batch_tokens, num_processes=1)[0]
        sums = torch.zeros(rows.num_sequences)
        for sequences in [*plan, *[[]] * (max(self.processes.gather(len(plan))) - len(plan))]:
            micro = self._pass(rows, sequences).to(self.processes.device)
            kl = (self.policy.old_logprobs(micro) - self.policy.ref_logprobs(micro)).cpu()
            if sequences:
                sums[sequences] = torch.stack([part.sum() for part in kl.split(micro.completion_lens.tolist())])
                self.under_way.meter.mean("policy/kl", kl)
        return sums.view(len(groups), self.config.rollout.group_size)

    def _sample(self, prompts: list[Prompt], seed: int) -> tuple[list[Group], Scores]:
        """Groups are scored while others are still being sampled."""
        with self.scorer.begin(len(prompts)) as scoring:
            with self._clock("rollout"):
                groups = self.generator.sample(
                    prompts,
                    self.now.sampling,
                    num_completions=self.config.rollout.group_size,
                    seed=seed,
                    on_group=scoring.add,
                )
            with self._clock("scoring"):
                return groups, scoring.result()

    def making_do(self, sample: Callable[[], T]) -> T:
        """What `sample` returns; out of memory, it is called again with half as many completions at once, and again."""
        if not self.makes_do:
            return sample()
        return or_fewer_at_once(sample, self.generator, rank=self.processes.rank)

    def agree_to_go_on(self, mine: Any = None) -> list[Any]:
        """After work that each process did for itself, which a request to stop may have broken off; `mine` of every process."""
        everyones = self._agree_on_interruption(mine)
        if self.interruption:
            if self.under_way.rollout is None:
                self.under_way = StepUnderWay()  # to be sampled again
            self.prompts.position = self.state.position
            raise Interrupted(self.interruption)
        return everyones

    def _agree_on_interruption(self, mine: Any = None) -> list[Any]:
        told = self.processes.gather((self.stopping.reason, mine))
        self.interruption = next((reason for reason, _ in told if reason is not None), "")
        return [each for _, each in told]

    def _deal(self, mine: Batch) -> list[MicroBatch]:
        """This process's passes over a minibatch of which it sampled a part.

        All sequences are dealt anew, so that no process waits for one whose completions happen to be longer. The weights follow
        from the whole minibatch; it is empty if not one completion has a known reward, on any process. Where an advantage of 0
        makes no gradient, such completions count, but need no pass. If there are no others all of them get one, so that the
        sampling gap is still measured, which may be why nothing is rewarded.
        """
        whole = join(self.processes.gather(mine)) if self.processes.world_size > 1 else mine
        needed = list(range(whole.num_sequences))
        if not self.config.every_token_counts:
            needed = whole.advantages.nonzero().flatten().tolist() or needed
        plan = plan_passes(
            take(whole, needed),
            token_budget=self.config.memory.micro_batch_tokens,
            num_processes=self.processes.world_size,
        )
        return [self._pass(whole, [needed[i] for i in part]) for part in plan[self.processes.rank]]

    def _pass(self, whole: Batch, sequences: list[int]) -> MicroBatch:
        if not sequences:
            return spare()
        part = take(whole, sequences)
        weights = token_weights(
            self.config.algorithm.aggregation,
            part.completion_lens,
            num_completions=whole.num_sequences,
            num_tokens=int(whole.completion_lens.sum()),
            max_completion_tokens=self.now.rollout.max_completion_tokens,
        )
        return micro_batch(part, weights)

    def _fix(self, minibatch: list[MicroBatch]) -> None:
        """Add what stays fixed during the updates, where the algorithm needs it: log-probabilities, and which tokens count."""
        algorithm, entropies = self.config.algorithm, []
        for micro in minibatch:
            there = micro.to(self.processes.device)
            if self.config.updates_per_rollout > 1 or algorithm.top_entropy < 1:
                micro.old_logprobs, entropy = self.policy.before_update(there)
                entropies.append(entropy[: 0 if micro.is_spare else None].cpu())
            if self.config.kl_in_loss:
                micro.ref_logprobs = self.policy.ref_logprobs(there)
        if minibatch and algorithm.top_entropy < 1:
            threshold = entropy_threshold(torch.cat(self.processes.gather(torch.cat(entropies))), algorithm.top_entropy)
            for micro, entropy in zip(minibatch, entropies, strict=True):
                micro.selected = None if micro.is_spare else entropy >= threshold

    def _optimizer_step(self, minibatch: list[MicroBatch]) -> None:
        """One update on this process's passes over a minibatch; the other processes run as many at the same time."""
        if not minibatch:
            return
        tally = self._or_smaller_passes(lambda: self._accumulate(minibatch))
        loss, gaps, num_tokens, interrupted, written = tally.tolist()
        self._check_sampling_gap(loss, gaps, num_tokens)
        step, settings, meter = self.state.optimizer_steps, self.config.optimizer, self.under_way.meter
        rate = learning_rate(settings, step=step, num_steps=self.config.optimizer_steps) * self.roll_backs.rate_factor
        norm = self.policy.optimizer_step(rate)
        skipped = not math.isfinite(norm)
        meter.total("optimizer/skipped", float(skipped and self.processes.is_main))  # all processes skip together
        if skipped:
            self.say(
                f"warning: the loss ({loss}) or its gradient is not finite; an update of step {self.state.step + 1} is left out"
            )
        else:
            self.state.optimizer_steps += 1
            self.state.learning_rate = rate
            meter.mean("optimizer/grad_norm", torch.tensor(norm))
            meter.mean("optimizer/loss", torch.tensor(loss))
        if interrupted:
            self._agree_on_interruption()
        if written == self.processes.world_size:
            self._try(self.checkpoints.finish)

    def _accumulate(self, minibatch: list[MicroBatch]) -> Tensor:
        """The gradient of this process's passes; what all processes have to know of the others before they step; (5,)."""
        objective, rollout = self.now.objective, self.under_way.rollout
        assert rollout is not None, "a step is sampled before it is trained on"
        total = torch.zeros((), device=self.processes.device)
        for number, micro in enumerate(micro.to(self.processes.device) for micro in minibatch):
            logprobs, entropy = self.policy.logprobs(micro)
            result = grpo_loss(
                logprobs,
                micro.advantages,
                micro.weights,
                objective,
                completion_lens=micro.completion_lens,
                entropy=entropy,
                old_logprobs=micro.old_logprobs,
                ref_logprobs=micro.ref_logprobs,
                sampling_logprobs=micro.sampling_logprobs,
                selected=micro.selected,
            )
            total += result.loss.detach()
            measure_micro_batch(self.under_way.meter, micro, objective, logprobs.detach(), entropy.detach(), result)
            rollout.passes.append((micro, logprobs.detach()))
            if number < len(minibatch) - 1:
                self.policy.backward(result.loss, last=False)
            else:
                flags = (self.stopping.reason is not None, self.checkpoints.is_written)
                tally = self.processes.add_up(tripwire.tally(total, self.under_way.meter, *flags))
                self.policy.backward(unless_finite(result.loss, tally[0]), last=True)
        return tally

    def _refresh_reference_if_due(self, steps_before: int) -> None:
        """Where this rollout's updates passed a multiple; one without a known reward has fewer, so they may not end on it."""
        every, steps = self.config.algorithm.reference_refresh_steps, self.state.optimizer_steps
        if every and steps // every > steps_before // every:
            self.policy.refresh_reference()
            self.say(f"the reference is the policy after optimizer step {steps} from here on")

    @progress.phase("saving")
    def save(self, *, wait: bool = False) -> Path:
        """Write a checkpoint of the current state; every process calls it.

        Args:
            wait: also with `checkpoint.background`, until it is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        self._try(self.checkpoints.finish)  # what became of the one before must not cost this one
        under_way, updates = None, None
        if self.under_way.rollout is not None:
            under_way = replace(self.under_way, rollout=replace(self.under_way.rollout, passes=[]))
            updates = self.state.optimizer_steps - self.under_way.first_update
        saved = self.checkpoints.save(self.state, policy=self.policy, under_way=under_way, updates=updates)
        if wait:
            self.checkpoints.finish()
        return saved

    def _try(self, write: Callable[[], object]) -> None:
        try:
            write()
        except CheckpointError as error:
            self.say(f"warning: {error} Training goes on, and the next checkpoint is tried when it is due.")

    def _or_smaller_passes(self, work: Callable[[], T]) -> T:
        """What `work` returns; out of memory, leave with a checkpoint of the step under way, to go on with smaller passes.

        What DeepSpeed has of half a gradient dies with the process. Others would wait for one that leaves, so alone only.
        """
        longest, tokens = self.config.max_sequence_tokens, self.config.memory.micro_batch_tokens
        before = self.under_way.meter.copy()
        try:
            return work()
        except RuntimeError as error:
            may_leave = (
                self.makes_do and self.stopping.is_handled and self.processes.world_size == 1 and tokens > longest
            )
            if not (may_leave and is_out_of_memory(error)):
                raise
            shortage = str(error).splitlines()[0]
        # only now nothing holds on to the pass that failed, and there is room for saving
        self.under_way.meter = before  # what it has of these passes will be measured again
        if self.under_way.rollout is not None:
            self.under_way.rollout.passes.clear()
        free()
        setting = f"memory.micro_batch_tokens={max(tokens // 2, longest)}"
        raise Interrupted(f"out of memory in phase {self.phase} of step {self.state.step + 1}: {shortage}", (setting,))

    def _leave(self, interrupted: Interrupted) -> None:
        saved = self.save(wait=True)
        settings = ("run.resume=auto", f"run.dir={as_override(str(self.directory))}", *interrupted.settings)
        self.close()  # first: the last words stand beneath the display
        self.say(
            f"stopped: {interrupted}. Saved to {saved}; {' '.join(settings)} goes on from there. Exit code {EXIT_STOPPED}."
        )
        goes_on = interrupted.settings and self.stopping.reason is None
        raise Stopped(str(interrupted), (*settings, *self.stopping.settings) if goes_on else ())

    def close(self) -> None:
        """End the reward workers and the logs; for a trainer that is stepped by hand."""
        self.log.close()
        self.scorer.close()

    def _restore(self, found: Path) -> None:
        self.state, self.under_way = checkpoint.restore(found, policy=self.policy, processes=self.processes)
        self._split_passes()
        self.generator.sync()
        self.prompts.position = self.state.position
        done = self.state.optimizer_steps - self.under_way.first_update if self.under_way.rollout else 0
        self.say(f"resumed after step {self.state.step}{f' and {done} updates of the next' * (done > 0)} from {found}")

    def _split_passes(self) -> None:
        """Of a step under way, those that `memory.micro_batch_tokens` no longer allows; equally many on all processes."""
        minibatches = self.under_way.minibatches
        for number, passes in enumerate(minibatches):
            smaller = [part for micro in passes for part in split(micro, self.config.memory.micro_batch_tokens)]
            most = max(self.processes.gather(len(smaller)))
            minibatches[number] = [*smaller, *(spare() for _ in range(most - len(smaller)))]

    @progress.phase("evaluation")
    def _evaluate_if_due(self) -> None:
        """Before the first step, after the last, and as configured between; not again for a step that a run resumes at."""
        step = self.state.step
        due = step == 0 or self._is_last() or _due(step, self.config.evaluation.every_steps)
        if not self.eval_prompts or not due or self.processes.on_main(lambda: bool(self.log.evaluation(step))):
            return
        self._follow_schedules()
        mine = self.stopping.abortable(lambda: self.making_do(self._answer_held_out))
        self.agree_to_go_on()
        self.log.log_evaluation(step, in_order(self.processes.gather(mine), self.eval_prompts))

    def _answer_held_out(self) -> list[dict[str, Any]]:
        self.scorer.max_completion_tokens = self.config.eval_sampling.max_tokens
        return answer(
            self.eval_prompts[self.processes.rank :: self.processes.world_size],
            generator=self.generator,
            scorer=self.scorer,
            sampling=self.config.eval_sampling,
            num_samples=self.config.evaluation.num_samples,
            seed=self._seed("evaluation"),
        )

    def _is_last(self) -> bool:
        return self.state.step >= self.config.run.steps

    def _log_completions(self, mine: list[dict[str, Any]]) -> None:
        self.log.log_completions(self.state.step, [row for part in self.processes.gather(mine) for row in part])

    def _log_metrics(self) -> dict[str, float]:
        metrics = step_metrics(self.under_way.meter, self.under_way.seconds, self.processes)
        metrics["optimizer/learning_rate"] = self.state.learning_rate
        metrics["optimizer/steps"] = self.state.optimizer_steps
        metrics |= {f"schedule/{name}": float(value) for name, value in self.now.scheduled_values().items()}
        metrics["progress/epoch"] = self.state.position / len(self.prompts.prompts)
        alarms = [self._with_excerpts(alarm) for alarm in self.watchdog.observe(self.state.step, metrics)]
        metrics["watchdog/alarms"] = len(alarms)
        self.log.log(self.state.step, metrics)
        self._act_on(alarms)
        return metrics

    def _check_sampling_gap(self, loss: float, gaps: float, num_tokens: float) -> None:
        """Before an update; a loss that is not finite is another fault."""
        if not math.isfinite(loss) or gaps <= self._gap_limit() * num_tokens:
            return
        limit = self._gap_limit(anew=True)  # logits have grown since it was measured, and their rounding with them
        if gaps <= limit * num_tokens:
            return
        rollout = self.under_way.rollout
        assert rollout is not None, "a step is sampled before it is trained on"
        assert self.rounding is not None, "the limit was made of it"
        causes = tripwire.diagnose(
            self.policy,
            self.generator,
            rollout.groups,
            self.now,
            earlier_gap=self.watchdog.median("policy/sampling_gap"),
            rounding=self.rounding,
        )
        step = self.state.step + 1
        text = tripwire.explanation(gaps / num_tokens, limit, step, causes)
        self._try(self.checkpoints.finish)
        raise tripwire.SamplingGapError(f"{text}\n{self._post_mortem(step, text)}")

    def _gap_limit(self, *, anew: bool = False) -> float:
        """The largest sampling gap; what it follows from is measured on the first rollout of a process, and anew if wanted."""
        rollout = self.under_way.rollout
        assert rollout is not None, "a step is sampled before it is trained on"
        if self.rounding is None or anew:
            self.rounding = tripwire.measure_rounding(self.policy, rollout.groups)
        return tripwire.gap_limit(self.now, self.policy.dtype, self.rounding)

    def _with_excerpts(self, alarm: Alarm) -> Alarm:
        """The alarm about the forms of right answers shows some of them; every process calls it."""
        if alarm.rule != "reward_hacking":
            return alarm
        rollout = self.under_way.rollout
        assert rollout is not None, "the step whose metrics are judged was sampled"
        rows = completion_rows(rollout.groups, rollout.scores)
        found = self.processes.gather(excerpts(rows, [is_right(row) for row in rows], num=NUM_EXCERPTS))
        return replace(alarm, excerpts=tuple(each for part in found for each in part)[:NUM_EXCERPTS])

    def _act_on(self, alarms: list[Alarm]) -> None:
        """Warn, and stop or roll back if one of them asks for it."""
        for alarm in alarms:
            self.say(f"warning: {alarm}")
            self.log.log_alarm(alarm.rule, str(alarm))
        serious = sorted(
            (alarm for alarm in alarms if alarm.action != "warn"), key=lambda alarm: alarm.action != "stop"
        )
        if not serious:
            return
        self._try(self.checkpoints.finish)
        alarm, remains = serious[0], self._post_mortem(self.state.step, "\n".join(map(str, alarms)))
        if alarm.action == "stop":
            raise WatchdogError(f"{alarm}. {remains}")
        if len(self.roll_backs.rows) == self.config.watchdog.max_roll_backs:
            raise WatchdogError(f"{alarm}, after {len(self.roll_backs.rows)} roll-backs. {remains}")
        good = self.checkpoints.last_before(alarm.began, self.policy)
        if good is None:
            raise WatchdogError(f"{alarm}. There is no checkpoint from before step {alarm.began}. {remains}")
        self._roll_back(alarm, good)

    def _roll_back(self, alarm: Alarm, good: Path) -> None:
        self.checkpoints.remove_after(good)  # first, so that a run that is killed here comes to the same alarm again
        self.roll_backs.add(alarm, to=numbers_of(good)[0], factor=self.config.watchdog.rate_factor)
        self.log.log_roll_back(self.roll_backs.rows[-1])
        self._restore(good)
        self.log.close()
        self.log.open(resumed_step=self.state.step)
        self.watchdog.rewind(self.state.step)
        self.say(f"from here on at {self.roll_backs.rate_factor:g} times the learning rate, with other random numbers")

    def _post_mortem(self, step: int, text: str) -> str:
        assert self.under_way.rollout is not None, "the step that is looked into was sampled"
        written = post_mortem.write(self.directory, step, text, self.under_way.rollout, self.processes)
        return (
            "No post-mortem could be written."
            if written is None
            else f"The batch and the last metrics lie in {written}"
        )

    def _finish(self) -> Path:
        """Draw the curves, show samples, and say where everything lies."""
        self.scorer.close()
        last = self.checkpoints.directory / checkpoint.name_of(self.state.step)
        if self.processes.is_main:
            before, after = self.log.evaluation(0), self.log.evaluation(self.state.step)
            if before and after:  # a trainer that was first stepped by hand has not seen the base model's answers
                show_samples(before, after, self.config.logging.num_samples)
            self.say(f"\nmetrics    {self.directory / 'metrics.jsonl'}")
            self.say("\n".join(report.at_the_end(self.directory)))
            self.say(f"model      {last / 'hf'}")
        return last

    def _seed(self, purpose: str) -> int:
        """Of this process's random numbers in this step; a function of run.seed and the roll-backs: nothing to save."""
        what = f"{self.config.run.seed} {purpose} {self.state.step} {self.processes.rank}{self.roll_backs.seed_suffix}"
        return random.Random(what).getrandbits(62)

    def say(self, text: str) -> None:
        if self.processes.is_main:
            say(text)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Add up the seconds of a phase, and record its peak memory; the step's peak is the largest of its phases."""
        self.phase, seconds = name, self.under_way.seconds
        self.processes.reset_peak_memory()
        started = time.perf_counter()
        with progress.phase(name):
            yield
            self.processes.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        peak = self.processes.peak_memory_gib()
        if peak is not None:
            for each in (name, "step"):
                self.under_way.meter.max(f"memory/{each}", torch.tensor(peak))

    def _gradable_prompts(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, what: str
    ) -> list[Prompt]:
        """Prompts of the rows that fit and whose answer every reward function can grade; says what was dropped."""
        # asked once: a time limit that strikes on one process only would leave them with different questions
        reasons = self.processes.on_main(lambda: self.scorer.check_rows(rows, say=self.say))
        gradable = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        if not gradable:
            raise ValueError(
                f"data.answer_column is {self.config.data.answer_column!r}; not one of the {len(rows)} {what} has an answer "
                f"that can be graded; the first: {reasons[0]}. Correct data.answer_column or data.answer_regex."
            )
        prompts, dropped = build_prompts(gradable, tokenizer, self.config.data)
        self.audits.append(preflight.audit(what, rows, reasons, num_prompts=len(prompts)))
        if len(gradable) < len(rows):
            dropped[f"answer cannot be graded, e.g. {next(filter(None, reasons))}"] += len(rows) - len(gradable)
        self.say(f"{len(prompts):,} {what}" + "".join(f"; {n:,} dropped: {why}" for why, n in dropped.items()))
        return prompts


def _reward_functions(config: Config, rewards: Sequence[Callable[..., Any] | Reward] | None) -> list[Reward]:
    if rewards is None:
        return resolve_rewards(config.rewards)
    for setting in config.schedules:
        if setting.startswith("rewards."):
            raise ValueError(
                f"schedules holds {setting!r}; the rewards of this run are those given to Trainer, not those of `rewards`. List "
                "them there, or remove the schedule."
            )
    given = [reward if isinstance(reward, Reward) else Reward(reward) for reward in rewards]
    if not any(reward.weight for reward in given):
        raise ValueError(
            f"rewards is {[reward.name for reward in given]} without any weight; at least one reward must count for something. "
            "Give one of them a weight other than 0."
        )
    return given


def _signal_from(config: Config, rewards: list[Reward]) -> str:
    """Name of the reward by which dynamic sampling chooses groups."""
    wanted, names = config.rollout.signal_from, [reward.name for reward in rewards]
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"rollout.signal_from is {wanted!r}; the rewards of this run are {', '.join(names)}. Name one of them."
        )
    return wanted or verdict_name(reward.name for reward in rewards if reward.weight)


def _rows(config: Config, given: Rows | None, rewards: list[Reward], *, evaluation: bool) -> list[dict[str, Any]]:
    if given is None:
        return load_rows(config.data, evaluation=evaluation, reads_answer=reads_answer(rewards))
    return prepare_rows(
        given,
        config.data,
        answer_regex=config.data.answer_regex,
        setting="eval_dataset" if evaluation else "train_dataset",
        reads_answer=reads_answer(rewards),
    )


def _columns(rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of all questions, and of those that only some have, which have it: what Scorer wants to know."""
    training, held_out = list(rows[0]), list(eval_rows[0]) if eval_rows else list(rows[0])
    elsewhere = {name: "training questions" for name in training if name not in held_out}
    elsewhere |= {name: "held-out questions" for name in held_out if name not in training}
    return {"columns": [name for name in training if name in held_out], "elsewhere": elsewhere}


def _gaps(named: dict[str, list[str]], rows: list[dict[str, Any]], what: str) -> Iterator[str]:
    """Which rewards ask for a column that some rows have nothing in."""
    for reward, names in named.items():
        for name in names:
            gaps = missing(rows, name) if rows and name in rows[0] else []
            if gaps:
                yield (
                    f"reward {reward} asks for {name!r}; {len(gaps):,} of {len(rows):,} {what} have none (the first: "
                    f"row {gaps[0]}), and it is given None for them"
                )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
