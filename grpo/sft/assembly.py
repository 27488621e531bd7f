"""A configuration -> the parts of a SupervisedTrainer. Whatever is wrong with it is said before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.assembly import Rows, held_out_questions, reward_functions, unread_questions, with_given_model
from grpo.config import AlgorithmConfig, Config, SupervisedConfig
from grpo.config.supervised import as_spelled_here
from grpo.data.prompts import use_chat_template
from grpo.observe import rundir
from grpo.observe.console import OF_ROWS
from grpo.observe.metrics import measure_rows
from grpo.observe.rundir import DirectoryLock, RunLog
from grpo.observe.sinks import check_sinks
from grpo.policy.families import check_family
from grpo.policy.given_model import GivenModel
from grpo.policy.language_model import resolve_dtype
from grpo.policy.lora import check_quantization
from grpo.policy.model_source import with_resolved_name
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import check_context, check_positions, check_vocabulary, load_tokenizer
from grpo.rollout import check_engine, make_generator
from grpo.run import checkpoint, inputs
from grpo.run.checkpoint import Checkpoints
from grpo.run.held_out import HeldOut
from grpo.run.loop import RunParts
from grpo.scoring.reward import Reward
from grpo.scoring.scorer import Scorer
from grpo.sft.order import RowOrder, set_aside
from grpo.sft.rows import read_rows
from grpo.system import distributed
from grpo.system.distributed import TrainingProcesses
from grpo.system.stopping import StopAgreement, StopRequest
from grpo.text.plural import counted
from grpo.training.collector import Collector
from grpo.training.learner import Learner
from grpo.types import Group, Prompt


def cross_entropy(aggregation: str) -> AlgorithmConfig:
    """The values of the loss that make it cross-entropy.

    With clip `weight`, no bounds and the policy itself as pi_old, S_t = A_t log pi(t); a row's advantage is 1. So the loss of
    loss.py is - sum_t w_t log pi(t), in value and in gradient, where w_t is 1 / (trained tokens of the update) with aggregation
    `token`, and 1 / (rows * trained tokens of the row) with `sequence`.
    """
    values = {"clip": "weight", "clip_low": None, "clip_high": None, "kl_coef": 0.0, "aggregation": aggregation}
    return AlgorithmConfig.model_validate(values)


@dataclass(kw_only=True)
class Parts(RunParts):
    """What a SupervisedTrainer is made of."""

    config: SupervisedConfig
    shared: Config  # config.parts
    order: RowOrder
    aside: list[Group]  # rows whose loss is measured
    collector: Collector | None  # None: no question is asked
    held_out: HeldOut | None


def assemble(
    config: SupervisedConfig,
    *,
    lock: DirectoryLock,
    rewards: Sequence[Callable[..., Any] | Reward | str] | None,
    train_dataset: Rows | None,
    eval_dataset: Rows | None,
    policy_class: type[Policy],
    learner_class: type[Learner],
    given_model: GivenModel | None = None,
) -> Parts:
    """The parts of a SupervisedTrainer; see there.

    Args:
        lock: which is taken of the run's directory.

    Raises:
        ValueError: whatever is wrong with the settings, the rows or the rewards; before the model is loaded.
    """
    asks = config.evaluation.num_questions > 0
    if eval_dataset is None:
        config.check_held_out()
    shared = config.parts if given_model is not None else with_resolved_name(config.parts)
    functions = reward_functions(shared, rewards) if asks else []
    request = StopRequest(config.run.max_hours)
    processes = distributed.start(shared, dtype=resolve_dtype(config.model.dtype))
    if given_model is not None:
        shared = with_given_model(shared, given_model, processes)
    config = config.model_copy(update={"model": shared.model})
    for notice in unread_questions(shared):
        processes.say(notice)
    tokenizer = load_tokenizer(config.model)
    use_chat_template(tokenizer, config.data)
    check_positions(
        config.model, config.data.max_tokens, said=f"data.max_tokens is {config.data.max_tokens}; a row may have"
    )
    if asks:
        with as_spelled_here():
            check_context(shared)
            check_engine(shared)
    check_family(config.model)
    check_sinks(config)
    check_quantization(config)
    learned, aside = _rows(config, tokenizer, processes, train_dataset)
    prompts: list[Prompt] = []
    scorer: Scorer | None = None
    if asks:
        prompts, scorer = held_out_questions(shared, processes, tokenizer, functions, eval_dataset)
    _check_vocabulary(config, tokenizer, [*learned, *aside], prompts)
    order = RowOrder(
        learned,
        config.training,
        seed=config.run.seed,
        num_updates=config.run.steps,
        weights=config.data.weights if train_dataset is None else None,
    )

    directory = Path(processes.on_main(lambda: str(rundir.claim(config.run, lock))))
    if scorer is not None:
        scorer.log_to(directory / "rewards.log")
    rows = [group.prompt for group in learned]
    given = processes.on_main(lambda: inputs.digests(rows, prompts, functions, what="the rows"))
    checkpoints = Checkpoints(directory / "checkpoints", config, processes, given=given)
    found = checkpoint.find(checkpoints.directory, config, processes, given=given)
    processes.say(summary(config, order, aside, world_size=processes.world_size))

    policy = policy_class(shared, tokenizer, processes, samples=scorer is not None)
    learner = learner_class(
        policy,
        cross_entropy(config.training.aggregation),
        config.optimizer,
        optimizer_steps=order.num_updates,
        token_budget=config.pass_tokens,
        max_completion_tokens=config.data.max_tokens,
        measure=measure_rows,
    )
    stop = StopAgreement(request, processes)
    log = RunLog(
        directory,
        config,
        processes,
        reward_names=[reward.name for reward in functions],
        num_steps=order.num_updates,
        columns=OF_ROWS,
    )
    collector = None
    if scorer is not None:
        with as_spelled_here():
            generator = make_generator(shared, policy, setting="evaluation.engine")
        collector = Collector(generator, scorer, stop, rank=processes.rank)
    return Parts(
        config=config,
        shared=shared,
        processes=processes,
        stop=stop,
        order=order,
        aside=aside,
        learner=learner,
        collector=collector,
        held_out=None
        if collector is None
        else HeldOut(prompts, shared.evaluation, shared.eval_sampling, collector, log, processes),
        checkpoints=checkpoints,
        log=log,
        found=found,
    )


def _rows(
    config: SupervisedConfig,
    tokenizer: PreTrainedTokenizerBase,
    processes: TrainingProcesses,
    given: Rows | None,
) -> tuple[list[Group], list[Group]]:
    """Rows to learn from and rows set aside; says how many, and what was dropped."""
    with processes.accelerator.main_process_first():
        rows = read_rows(config.data, tokenizer, given=given, model=config.model.name)
    learned, aside = set_aside(rows.groups, config.evaluation.num_rows, seed=config.run.seed)
    dropped = "".join(f"; {count:,} dropped: {why}" for why, count in rows.dropped.items())
    processes.say("\n".join([f"{counted(len(rows.groups), 'rows')}{dropped}", *rows.notes]))
    return learned, aside


def _check_vocabulary(
    config: SupervisedConfig, tokenizer: PreTrainedTokenizerBase, groups: list[Group], prompts: list[Prompt]
) -> None:
    of_rows = [ids for group in groups for ids in (group.prompt.token_ids, group.completions[0].token_ids)]
    check_vocabulary(config.model, tokenizer, [*of_rows, *(prompt.token_ids for prompt in prompts)])


def summary(config: SupervisedConfig, order: RowOrder, aside: list[Group], *, world_size: int) -> str:
    """The numbers people ask for first."""
    tokens = sum(order.sizes)
    trained = sum(
        len(c.token_ids) if c.trained is None else sum(c.trained) for group in order.groups for c in group.completions
    )
    limit = "" if order.max_tokens is None else f", and no more than {order.max_tokens:,} tokens"
    dealt = order.last or order.num_updates * order.max_rows
    return "\n".join(
        [
            f"rows                   {len(order.groups):,} with {tokens:,} tokens, {trained:,} of them trained on; "
            f"{len(aside):,} set aside",
            f"rows per update        up to {order.max_rows}{limit}, over {world_size} process{'es' * (world_size > 1)}",
            f"updates                {order.num_updates:,} = {dealt / len(order.groups):.2f} epochs"
            + (" at most" if order.last is None and order.max_tokens is not None else ""),
            f"longest row            {max(order.sizes):,} tokens (data.max_tokens {config.data.max_tokens:,})",
        ]
    )
