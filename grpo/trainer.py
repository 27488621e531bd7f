"""The loop: sample, score, centre, update."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grpo import checkpoint, distributed, rundir
from grpo.advantage import group_advantages
from grpo.batch import join, micro_batch, minibatch_bounds, pack, plan_passes, spare, take
from grpo.checkpoint import RunState
from grpo.config import Config
from grpo.console import show_samples
from grpo.evaluate import completion_rows, evaluate
from grpo.loss import grpo_loss, token_weights
from grpo.metrics import Meter, measure_micro_batch, measure_passes, measure_rollout, step_metrics
from grpo.policy import Policy, check_attention, check_context, load_tokenizer, resolve_dtype
from grpo.prompts import PromptOrder, build_prompts, load_rows, prepare_rows
from grpo.report import plot_curves
from grpo.rollout import check_engine, make_generator
from grpo.rundir import RunLog
from grpo.schedule import learning_rate
from grpo.scoring import Reward, Scorer, resolve_function
from grpo.types import Batch, MicroBatch, Prompt

Rows = Iterable[Mapping[str, Any]]


class Trainer:
    """Trains a language model with GRPO on rule-based rewards.

    Args:
        config: see grpo/config.py.
        rewards: reward functions (or `Reward`s, which add a weight, a name and arguments) instead of `config.rewards`.
        train_dataset: rows instead of those of `config.data.name`: a `datasets.Dataset` or a list of dictionaries.
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
        self.config = config
        functions = _reward_functions(config, rewards)
        self.processes = distributed.start(config, dtype=resolve_dtype(config.model.dtype))
        config.check_world_size(self.processes.world_size)
        tokenizer = load_tokenizer(config.model)
        check_context(config)
        check_attention(config.model)
        check_engine(config)
        with self.processes.accelerator.main_process_first():
            rows = _rows(config, train_dataset, evaluation=False)
            eval_rows = _rows(config, eval_dataset, evaluation=True) if config.evaluation.num_questions else []
        self.scorer = Scorer(
            functions,
            columns=[name for name in rows[0] if not eval_rows or name in eval_rows[0]],
            max_completion_tokens=config.rollout.max_completion_tokens,
            conversational=config.data.template == "chat",
            num_workers=config.scoring.num_workers,
            timeout_seconds=config.scoring.timeout_seconds,
            memory_gib=config.scoring.memory_gib,
        )
        for notice in self.scorer.notices():
            self.say(notice)
        prompts = self._gradable_prompts(rows, tokenizer, "training questions")
        wanted = eval_rows[: config.evaluation.num_questions]
        self.eval_prompts = self._gradable_prompts(wanted, tokenizer, "held-out questions") if wanted else []
        self.prompts = PromptOrder(
            prompts,
            num_prompts=config.rollout.num_prompts,
            seed=config.run.seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        self.directory = Path(self.processes.on_main(lambda: str(rundir.claim(config.run))))
        self.scorer.log_to(self.directory / "rewards.log")
        found = checkpoint.find(self.directory, config, self.processes)
        self.say(config.summary(num_rows=len(prompts), world_size=self.processes.world_size))
        self.policy = self._load_policy(tokenizer)
        self.generator = make_generator(config, self.policy)
        self.state = RunState() if found is None else self._restore(found)
        self.log = RunLog(
            self.directory, config, self.processes, reward_names=[reward.name for reward in self.scorer.rewards]
        )
        self.log.open(resumed_step=None if found is None else self.state.step)
        self.learning_rate = 0.0  # of the last optimizer step
        self.meter = Meter()  # of the step under way, as are the seconds
        self.seconds: dict[str, float] = {}
        self.phase = ""  # of the step: the last one that began

    def _load_policy(self, tokenizer: PreTrainedTokenizerBase) -> Policy:
        return Policy(self.config, tokenizer, self.processes)

    def train(self) -> Path:
        """Run all steps that are left, with the evaluations and checkpoints that are due.

        Returns:
            The last checkpoint; its `hf/` is a directory that `AutoModelForCausalLM.from_pretrained` loads.
        """
        self._evaluate_if_due()
        while self.state.step < self.config.run.steps:
            self.train_step()
            if self._is_last() or _due(self.state.step, self.config.checkpoint.every_steps):
                self.save()
            self._evaluate_if_due()
        self.log.close()
        return self._finish()

    def train_step(self) -> dict[str, float]:
        """Sample a rollout, score it, and update the policy on it; the step's metrics over all processes."""
        config, self.meter, self.seconds = self.config, Meter(), {}
        prompts, steps_before = self.prompts.next_batch(), self.state.optimizer_steps
        with self._clock("step"):
            with self._clock("rollout"):
                groups = self.generator.sample(
                    prompts,
                    config.sampling,
                    num_completions=config.rollout.group_size,
                    seed=self._seed("rollout"),
                )
            with self._clock("scoring"):
                scores = self.scorer.score(groups)
            advantages = group_advantages(scores.rewards, normalize_by_std=config.algorithm.normalize_by_std)
            with self._clock("logprobs"):
                minibatches = [self._deal(pack(groups[part], advantages[part])) for part in self._minibatch_bounds()]
                for micro in (micro for minibatch in minibatches for micro in minibatch):
                    self._fix_logprobs(micro)
            with self._clock("update"):
                for minibatch in minibatches:
                    self._optimizer_step(minibatch)
            self.generator.sync()
            self._refresh_reference_if_due(steps_before)
        measure_rollout(self.meter, groups, scores, advantages)
        for name, value in self.generator.metrics().items():
            self.meter.mean(name, torch.tensor(value))
        self.state.step += 1
        self.state.position = self.prompts.position
        if _due(self.state.step, config.logging.completions_every):
            self._log_completions(completion_rows(groups, scores), advantages)
        return self._log_metrics()

    def _deal(self, mine: Batch) -> list[MicroBatch]:
        """This process's passes over a minibatch of which it sampled a part.

        All sequences are dealt anew, so that no process waits for one whose completions happen to be longer. The weights follow
        from the whole minibatch; it is empty if not one completion has a known reward, on any process.
        """
        whole = join(self.processes.gather(mine)) if self.processes.world_size > 1 else mine
        plan = plan_passes(
            whole, token_budget=self.config.memory.micro_batch_tokens, num_processes=self.processes.world_size
        )
        passes = [self._pass(whole, sequences) for sequences in plan[self.processes.rank]]
        measure_passes(self.meter, passes)
        return passes

    def _pass(self, whole: Batch, sequences: list[int]) -> MicroBatch:
        if not sequences:
            return spare()
        part = take(whole, sequences)
        weights = token_weights(
            self.config.algorithm.aggregation,
            part.completion_lens,
            num_completions=whole.num_sequences,
            num_tokens=int(whole.completion_lens.sum()),
            max_completion_tokens=self.config.rollout.max_completion_tokens,
        )
        return micro_batch(part, weights)

    def _fix_logprobs(self, micro: MicroBatch) -> None:
        """Add the log-probabilities that stay fixed during the updates, where the algorithm needs them."""
        there = micro.to(self.processes.device)
        if self.config.algorithm.num_minibatches > 1:
            micro.old_logprobs = self.policy.old_logprobs(there)
        if self.policy.reference is not None:
            micro.ref_logprobs = self.policy.ref_logprobs(there)

    def _optimizer_step(self, minibatch: list[MicroBatch]) -> None:
        """One update on this process's passes over a minibatch; the other processes run as many at the same time."""
        if not minibatch:
            return
        algorithm = self.config.algorithm
        total = torch.zeros((), device=self.processes.device)
        for number, micro in enumerate(micro.to(self.processes.device) for micro in minibatch):
            logprobs, entropy = self.policy.logprobs(micro)
            result = grpo_loss(
                logprobs,
                micro.advantages,
                micro.weights,
                old_logprobs=micro.old_logprobs,
                ref_logprobs=micro.ref_logprobs,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                kl_coef=algorithm.kl_coef,
                kl_estimator=algorithm.kl_estimator,
            )
            total += result.loss.detach()
            self.policy.backward(result.loss, last=number == len(minibatch) - 1)
            measure_micro_batch(self.meter, micro, logprobs.detach(), entropy, result)
        rate = learning_rate(
            self.config.optimizer, step=self.state.optimizer_steps, num_steps=self.config.optimizer_steps
        )
        (loss,) = self.processes.sum(float(total))
        self._refuse_if_not_finite("loss", loss)
        norm = self.policy.optimizer_step(rate)
        self._refuse_if_not_finite("gradient's norm", norm)
        self.state.optimizer_steps += 1
        self.learning_rate = rate
        self.meter.mean("optimizer/grad_norm", torch.tensor(norm))
        self.meter.mean("optimizer/loss", torch.tensor(loss))

    def _refresh_reference_if_due(self, steps_before: int) -> None:
        """Where this rollout's updates passed a multiple; one without a known reward has fewer, so they may not end on it."""
        every, steps = self.config.algorithm.reference_refresh_steps, self.state.optimizer_steps
        if every and steps // every > steps_before // every:
            self.policy.refresh_reference()
            self.say(f"the reference is the policy after optimizer step {steps} from here on")

    def _refuse_if_not_finite(self, what: str, value: float) -> None:
        """Stop before a broken update reaches a checkpoint."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} of step {self.state.step + 1} is {value}; the weights are lost from here on, the last checkpoint "
                "is not. Lower optimizer.learning_rate or optimizer.max_grad_norm, and start from it with model.name=.../hf."
            )

    def _minibatch_bounds(self) -> list[slice]:
        return minibatch_bounds(
            num_prompts=self.config.rollout.num_prompts,
            num_minibatches=self.config.algorithm.num_minibatches,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )

    def save(self) -> Path:
        """Write a checkpoint of the current state; every process calls it."""
        return checkpoint.save(
            self.directory / "checkpoints",
            self.state,
            policy=self.policy,
            config=self.config,
            processes=self.processes,
            keep=self.config.checkpoint.keep,
        )

    def close(self) -> None:
        """End the reward workers and the logs; for a trainer that is stepped by hand."""
        self.log.close()
        self.scorer.close()

    def _restore(self, found: Path) -> RunState:
        state = checkpoint.restore(found, policy=self.policy, processes=self.processes)
        self.generator.sync()
        self.prompts.position = state.position
        self.say(f"resumed after step {state.step} from {found}")
        return state

    def _evaluate_if_due(self) -> None:
        """Before the first step, after the last, and as configured between; not again for a step that a run resumes at."""
        step = self.state.step
        due = step == 0 or self._is_last() or _due(step, self.config.evaluation.every_steps)
        if not self.eval_prompts or not due or self.processes.on_main(lambda: bool(self.log.evaluation(step))):
            return
        rows = evaluate(
            self.eval_prompts,
            generator=self.generator,
            scorer=self.scorer,
            processes=self.processes,
            sampling=self.config.eval_sampling,
            seed=self._seed("evaluation"),
        )
        self.log.log_evaluation(step, rows)

    def _is_last(self) -> bool:
        return self.state.step == self.config.run.steps

    def _log_completions(self, rows: list[dict[str, Any]], advantages: Tensor) -> None:
        known = advantages.nan_to_num().flatten().tolist()
        mine = [
            {"step": self.state.step, **row, "advantage": advantage} for row, advantage in zip(rows, known, strict=True)
        ]
        self.log.log_completions(self.state.step, [row for part in self.processes.gather(mine) for row in part])

    def _log_metrics(self) -> dict[str, float]:
        metrics = step_metrics(self.meter, self.seconds, self.processes)
        metrics["optimizer/learning_rate"] = self.learning_rate
        metrics["optimizer/steps"] = self.state.optimizer_steps
        metrics["progress/epoch"] = self.state.position / len(self.prompts.prompts)
        self.log.log(self.state.step, metrics)
        self._check_sampling_gap(metrics.get("policy/sampling_gap", 0.0))
        return metrics

    def _check_sampling_gap(self, gap: float) -> None:
        limit = self.config.algorithm.max_sampling_gap
        if not gap <= limit:
            raise RuntimeError(
                f"policy/sampling_gap is {gap:.3g} nats in step {self.state.step}, above algorithm.max_sampling_gap {limit}: "
                "the log-probabilities that tokens were sampled with are not those of the trained policy. Likely causes, "
                "in this order: the rollout engine has stale weights, another temperature, or another numerical precision."
            )

    def _finish(self) -> Path:
        """Draw the curves, show samples, and say where everything lies."""
        self.scorer.close()
        last = self.directory / "checkpoints" / checkpoint.name_of(self.state.step)
        if self.processes.is_main:
            before, after = self.log.evaluation(0), self.log.evaluation(self.state.step)
            if before and after:  # a trainer that was first stepped by hand has not seen the base model's answers
                show_samples(before, after, self.config.logging.num_samples)
            self.say(f"\nmetrics    {self.directory / 'metrics.jsonl'}")
            self.say(f"curves     {plot_curves(self.directory)}")
            self.say(f"model      {last / 'hf'}")
        return last

    def _seed(self, purpose: str) -> int:
        """Of this process's random numbers in this step; a function of run.seed, so nothing has to be saved."""
        return random.Random(f"{self.config.run.seed} {purpose} {self.state.step} {self.processes.rank}").getrandbits(
            62
        )

    def say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Record the seconds and the peak memory of a phase; the step's peak is the largest of its phases."""
        self.phase = name
        self.processes.reset_peak_memory()
        started = time.perf_counter()
        yield
        self.processes.synchronize()
        self.seconds[name] = time.perf_counter() - started
        peak = self.processes.peak_memory_gib()
        if peak is not None:
            for each in (name, "step"):
                self.meter.max(f"memory/{each}", torch.tensor(peak))

    def _gradable_prompts(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, what: str
    ) -> list[Prompt]:
        """Prompts of the rows that fit and whose answer every reward function can grade; says what was dropped."""
        # asked once: a time limit that strikes on one process only would leave them with different questions
        reasons = self.processes.on_main(lambda: self.scorer.check_rows(rows))
        gradable = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        if not gradable:
            raise ValueError(
                f"data.answer_column is {self.config.data.answer_column!r}; not one of the {len(rows)} {what} has an answer "
                f"that can be graded; the first: {reasons[0]}. Correct data.answer_column or data.answer_regex."
            )
        prompts, dropped = build_prompts(gradable, tokenizer, self.config.data)
        if len(gradable) < len(rows):
            dropped[f"answer cannot be graded, e.g. {next(filter(None, reasons))}"] += len(rows) - len(gradable)
        self.say(f"{len(prompts):,} {what}" + "".join(f"; {n:,} dropped: {why}" for why, n in dropped.items()))
        return prompts


def _reward_functions(config: Config, rewards: Sequence[Callable[..., Any] | Reward] | None) -> list[Reward]:
    if rewards is None:
        return [
            Reward(resolve_function(r.function), weight=r.weight, name=r.name or "", args=r.args)
            for r in config.rewards
        ]
    return [reward if isinstance(reward, Reward) else Reward(reward) for reward in rewards]


def _rows(config: Config, given: Rows | None, *, evaluation: bool) -> list[dict[str, Any]]:
    if given is None:
        return load_rows(config.data, evaluation=evaluation)
    setting = "eval_dataset" if evaluation else "train_dataset"
    return prepare_rows(given, config.data, answer_regex=config.data.answer_regex, setting=setting)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
