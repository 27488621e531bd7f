"""A configuration -> the parts of a Trainer, from the bottom up. Whatever is wrong with it is said before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.algorithm.objective import AdvantageRule, Objective
from grpo.algorithm.own_loss import Loss
from grpo.config import Config, RewardConfig, SupervisedConfig
from grpo.config.combinations import check_carried_turns
from grpo.config.settings import Settings
from grpo.data.order import Order, PromptOrder, ranks
from grpo.data.pass_rates import within_pass_rates
from grpo.data.prompts import build_prompts, check_kinds, use_chat_template
from grpo.data.rows import load_rows, missing, prepare_rows
from grpo.data.where import Selection
from grpo.observe import rundir
from grpo.observe.bar import check_rows
from grpo.observe.metric_names import check_reward_names
from grpo.observe.rundir import DirectoryLock, RunLog
from grpo.observe.sinks import check_sinks
from grpo.policy.families import check_family
from grpo.policy.given_model import GivenModel
from grpo.policy.language_model import resolve_dtype
from grpo.policy.lora import check_quantization
from grpo.policy.model_source import with_resolved_name
from grpo.policy.policy import MakeOptimizer, Policy
from grpo.policy.teacher import check_teacher
from grpo.policy.tokenizer import check_context, check_vocabulary, load_tokenizer
from grpo.rollout import ENGINES, check_engine, make_generator
from grpo.run import checkpoint, inputs
from grpo.run.checkpoint import Checkpoints
from grpo.run.held_out import HeldOut
from grpo.run.loop import RunParts
from grpo.run.preflight import Audit, Preflight, audit
from grpo.scoring.binding import reads_answer
from grpo.scoring.deciding import forms_tell, signal_from, who_decides
from grpo.scoring.reward import Reward, resolve_rewards
from grpo.scoring.scorer import Scorer
from grpo.system import distributed
from grpo.system.distributed import TrainingProcesses
from grpo.system.stopping import StopAgreement, StopRequest
from grpo.text.plural import counted
from grpo.training.carry_over import check_carries
from grpo.training.collector import Collector
from grpo.training.learner import Learner
from grpo.training.rollout import Advantage, RolloutMaker
from grpo.turns.environment import Environment, Make, check_unused, own_rows
from grpo.turns.toolbox import Given, Toolbox, with_observations
from grpo.turns.use import Tools
from grpo.types import Generator, Prompt

Rows = Iterable[Mapping[str, Any]]


@dataclass
class Questions:
    """What is asked, and who grades it."""

    order: PromptOrder
    held_out: list[Prompt]
    scorer: Scorer
    audits: list[Audit]


@dataclass(kw_only=True)
class Parts(RunParts):
    """What a Trainer is made of."""

    config: Config
    prompts: PromptOrder
    collector: Collector
    rollouts: RolloutMaker
    preflight: Preflight
    held_out: HeldOut
    toolbox: Toolbox | None


def assemble(
    config: Config,
    *,
    lock: DirectoryLock,
    rewards: Sequence[Callable[..., Any] | Reward | str] | None,
    tools: Sequence[Given] | None = None,
    environment: Make | None = None,
    train_dataset: Rows | None,
    eval_dataset: Rows | None,
    policy_class: type[Policy],
    learner_class: type[Learner],
    optimizer: MakeOptimizer | None = None,
    advantage: Advantage | None = None,
    loss: Loss | None = None,
    order: Order | None = None,
    given_model: GivenModel | None = None,
) -> Parts:
    """The parts of a Trainer; see there.

    Args:
        lock: which is taken of the run's directory.

    Raises:
        ValueError: whatever is wrong with the settings, the data or the rewards; before the model is loaded.
    """
    surroundings = Environment.of(config.environment, environment)
    if surroundings is None:
        check_unused(config.environment)
    functions = reward_functions(config, rewards, [] if surroundings is None else [surroundings.reward])
    check_reward_names(reward.name for reward in functions)
    config = config if given_model is not None else with_resolved_name(config)
    request = StopRequest(config.run.max_hours)
    processes = distributed.start(config, dtype=resolve_dtype(config.model.dtype))
    config.check_world_size(processes.world_size)
    if given_model is not None:
        config = with_given_model(config, given_model, processes)
    for notice in _without_effect(config, optimizer=optimizer, advantage=advantage, loss=loss, order=order):
        processes.say(notice)
    tokenizer = load_tokenizer(config.model)
    use_chat_template(tokenizer, config.data)
    check_context(config)
    check_family(config.model)
    check_teacher(config, tokenizer)
    check_engine(config)
    check_sinks(config)
    check_quantization(config)
    if advantage is None and config.algorithm.normalize_by_mean:
        _check_not_negative(config, functions)
    verdicts, by_signal = signal_from(config, functions)
    forms = forms_tell(config, functions)
    for notice in who_decides(config, functions, verdicts):
        processes.say(notice)
    config, in_use = _with_tools(config, processes, tokenizer, tools, surroundings)
    questions = _questions(config, processes, tokenizer, functions, train_dataset, eval_dataset, order, in_use)
    prompts, held_out, scorer = questions.order, questions.held_out, questions.scorer

    directory = Path(processes.on_main(lambda: str(rundir.claim(config.run, lock))))
    scorer.log_to(directory / "rewards.log")
    if in_use is not None:
        in_use.toolbox.log_to(directory / "tools.log")
    called = [] if in_use is None else in_use.toolbox.runners
    given = processes.on_main(
        lambda: inputs.digests(
            *(prompts.prompts, held_out, functions),
            tools=called,
            environment=surroundings,
            own={"advantage": advantage, "loss": loss, "optimizer": optimizer, "order": order},
        )
    )
    checkpoints = Checkpoints(directory / "checkpoints", config, processes, given=given)
    found = checkpoint.find(checkpoints.directory, config, processes, given=given)
    processes.say(config.summary(num_rows=len(prompts.prompts), world_size=processes.world_size))

    policy = policy_class(config, tokenizer, processes, optimizer=optimizer, samples=not config.samples_on_a_server)
    learner = learner_class(
        policy,
        config.algorithm,
        config.optimizer,
        optimizer_steps=config.optimizer_steps,
        token_budget=config.pass_tokens,
        max_completion_tokens=config.rollout.max_completion_tokens,
        loss=loss,
    )
    stop = StopAgreement(request, processes)
    generator, engine = _generator(config, policy, in_use)
    collector = Collector(generator, scorer, stop, rank=processes.rank)
    preflight = Preflight(
        config.at(0),
        collector,
        processes,
        prompts=prompts.prompts,
        eval_prompts=held_out,
        audits=questions.audits,
        tokenizer=tokenizer,
        end_token_ids=policy.end_token_ids,
    )
    names = [reward.name for reward in scorer.rewards]
    log = RunLog(directory, config, processes, reward_names=names, engine=engine)
    return Parts(
        config=config,
        processes=processes,
        stop=stop,
        prompts=prompts,
        collector=collector,
        learner=learner,
        rollouts=RolloutMaker(
            collector,
            learner,
            prompts,
            verdicts=verdicts,
            signal_from=by_signal,
            words=log.words,
            forms=forms,
            advantage=advantage,
        ),
        preflight=preflight,
        held_out=HeldOut(held_out, config.evaluation, config.eval_sampling, collector, log, processes),
        checkpoints=checkpoints,
        log=log,
        found=found,
        toolbox=None if in_use is None else in_use.toolbox,
    )


def _with_tools(
    config: Config,
    processes: TrainingProcesses,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[Given] | None,
    environment: Environment | None,
) -> tuple[Config, Tools | None]:
    """The configuration whose prompts tell of the tools of the run, and these with its environment; None: it has neither."""
    if given or environment is not None:
        check_carried_turns(config)
    tools = Tools.of(config.tools, config.scoring, tokenizer, config.data, given=given, environment=environment)
    if tools is None:
        return config, None
    for notice in tools.toolbox.notices():
        processes.say(notice)
    return config.model_copy(update={"data": tools.told(config.data)}), tools


def _generator(config: Config, policy: Policy, tools: Tools | None) -> tuple[Generator, str]:
    """What samples, and what a display calls its engine."""
    engine = make_generator(config, policy)
    if config.rollout.carry_over:
        check_carries(engine, policy)
    name = ENGINES[type(engine).__name__]
    if tools is not None:
        engine = tools.around(engine, at_once=not config.run.deterministic)
    return engine, name


def settle(
    kind: type[AnySettings],
    source: AnySettings | str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Mapping[str, Any],
) -> tuple[AnySettings, GivenModel | None]:
    """The configuration that a trainer's first argument means, and the loaded model if it is one.

    Raises:
        ValueError: see Config.of and GivenModel.of.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"settings is a {type(settings).__name__}; it is a dictionary of names and values. Write "
            "settings={'run.steps': 100}; `grpo settings` lists the names."
        )
    if isinstance(source, (kind, str, Path)):
        if tokenizer is not None:
            raise ValueError(
                "tokenizer was given beside a model that is read from files, whose own tokenizer is used. Pass the loaded model "
                "with it, or remove it; data.chat_template sets another template."
            )
        return kind.of(source, settings), None
    given = GivenModel.of(source, tokenizer, settings)
    return kind.of_model(given.name, settings), given


AnySettings = TypeVar("AnySettings", bound=Settings)
AnyNamed = TypeVar("AnyNamed", Config, SupervisedConfig)


def with_given_model(config: AnyNamed, given: GivenModel, processes: TrainingProcesses) -> AnyNamed:
    """The configuration with the directory that the model was written to as `model.name`; every process calls it."""
    folder = Path(config.run.dir).parent / "models"
    directory = processes.on_main(lambda: str(given.write_below(folder)))
    processes.say(f"the model that was given is written to {directory}, from where the run reads it")
    return config.model_copy(update={"model": config.model.model_copy(update={"name": directory})})


OF_THE_LOSS = [field.name for field in fields(Objective) if field.name != "kl_coef"]
REPLACED: dict[str, tuple[str, list[str]]] = {
    "optimizer": ("optimizer", ["beta1", "beta2", "weight_decay"]),
    "advantage": ("algorithm", [field.name for field in fields(AdvantageRule)]),
    "loss": ("algorithm", [*OF_THE_LOSS, "top_entropy", "clip_cov", "entropy_target"]),
}
"""Argument of Trainer -> the section and the settings that have no effect beside it."""


def _without_effect(config: Config, **given: Callable[..., Any] | None) -> Iterator[str]:
    """Says which settings other than their defaults a function given to Trainer stands in for, or have no effect here."""
    if config.model.float32_head and str(resolve_dtype(config.model.dtype)) == "torch.float32":
        yield "model.float32_head is true, without effect: the model is in float32 here"
    elif config.model.float32_head and config.rollout.engine in ("hf", "vllm"):
        yield f"model.float32_head is true, for the update alone: rollout.engine {config.rollout.engine} samples as without it"
    for argument, (section, names) in REPLACED.items():
        values = getattr(config, section)
        for name in names:
            value = getattr(values, name)
            if given[argument] is not None and value != type(values).model_fields[name].default:
                yield f"{section}.{name} is {value}, without effect: {argument} was given to Trainer"
    yield from unread_questions(config)
    if given["loss"] is not None and config.rollout.carry_over:
        yield "rollout.carry_over is true, and loss was given to Trainer: it must weigh old tokens itself, by sampling_logprobs"
    if given["loss"] is not None and config.rollout.weights == "fp8":
        yield "rollout.weights is fp8, and loss was given to Trainer: it must weigh all tokens itself, by sampling_logprobs"
    if given["order"] is not None and config.data.order_by is not None:
        yield f"data.order_by is {config.data.order_by!r}, without effect: order was given to Trainer"
    if given["order"] is not None and config.data.weights is not None:
        yield "the weights in data.name are without effect: order was given to Trainer"
    elif config.rollout.passes_over and config.data.weights is not None:
        yield (
            f"rollout.solved_share is {config.rollout.solved_share:g} and hopeless_share {config.rollout.hopeless_share:g}: the "
            "weights in data.name share out turns, and a source with more such questions is passed over more often"
        )


def unread_questions(config: Config) -> Iterator[str]:
    """Says what is set of held-out questions where none are asked."""
    for name in ("eval_name", "eval_where"):
        if getattr(config.data, name) is not None and config.evaluation.num_questions == 0:
            yield f"data.{name} is {getattr(config.data, name)!r}, without effect: evaluation.num_questions is 0"


def _questions(
    config: Config,
    processes: TrainingProcesses,
    tokenizer: PreTrainedTokenizerBase,
    functions: list[Reward],
    train_dataset: Rows | None,
    eval_dataset: Rows | None,
    own_order: Order | None,
    tools: Tools | None,
) -> Questions:
    environment = None if tools is None else tools.toolbox.environment
    with processes.accelerator.main_process_first():
        left_out, left_out_held_out = Counter[str](), Counter[str]()
        rows = _rows(config, train_dataset, functions, environment, left_out, evaluation=False)
        kept, by_pass_rate = within_pass_rates(rows, config.data)
        left_out.update(by_pass_rate)
        rows = [row for row, is_kept in zip(rows, kept, strict=True) if is_kept]
        check_kinds(rows, config.data)
        wanted = config.evaluation.num_questions
        eval_rows = (
            _rows(config, eval_dataset, functions, environment, left_out_held_out, evaluation=True) if wanted else []
        )
    eval_rows = eval_rows[:wanted]
    if tools is not None:
        toolbox = tools.toolbox
        said = processes.on_main(lambda: (toolbox.observations(rows), toolbox.observations(eval_rows)))
        rows, eval_rows = (
            with_observations(own, texts, config.data) for own, texts in zip((rows, eval_rows), said, strict=True)
        )
    scorer = _scorer(config, functions, rows, eval_rows)
    scorer.check_limits(config.completion_limits)
    gaps = [*_gaps(scorer, rows, "training questions"), *_gaps(scorer, eval_rows, "held-out questions")]
    for notice in [
        *_left_out(left_out, "training questions"),
        *_left_out(left_out_held_out, "held-out questions"),
        *scorer.notices(),
        *scorer.check_routes(rows, "training questions"),
        *gaps,
    ]:
        processes.say(notice)
    prompts, first = _gradable(rows, "training questions", config, processes, tokenizer, scorer)
    held_out: list[Prompt] = []
    audits = [first]
    if eval_rows:
        held_out, second = _gradable(eval_rows, "held-out questions", config, processes, tokenizer, scorer)
        audits.append(second)
    check_vocabulary(config.model, tokenizer, [prompt.token_ids for prompt in [*prompts, *held_out]])
    order = PromptOrder(
        prompts,
        seed=config.run.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        weights=config.data.weights if train_dataset is None and own_order is None else None,
        own=own_order,
        solved_share=config.rollout.solved_share,
        hopeless_share=config.rollout.hopeless_share,
        ranks=ranks(prompts, config.data) if own_order is None else None,
        ranked_epochs=config.data.order_epochs,
    )
    return Questions(order, held_out, scorer, audits)


def held_out_questions(
    config: Config,
    processes: TrainingProcesses,
    tokenizer: PreTrainedTokenizerBase,
    functions: list[Reward],
    eval_dataset: Rows | None,
) -> tuple[list[Prompt], Scorer]:
    """The questions of the evaluation alone, and who grades their answers.

    Raises:
        ValueError: see assemble.
    """
    with processes.accelerator.main_process_first():
        left_out = Counter[str]()
        rows = _rows(config, eval_dataset, functions, None, left_out, evaluation=True)
        rows = rows[: config.evaluation.num_questions]
    scorer = _scorer(config, functions, rows, rows)
    what = "held-out questions"
    for notice in [*_left_out(left_out, what), *scorer.notices(), *_gaps(scorer, rows, what)]:
        processes.say(notice)
    prompts, _ = _gradable(rows, what, config, processes, tokenizer, scorer)
    return prompts, scorer


def _left_out(counts: Counter[str], what: str) -> Iterator[str]:
    for why, num in counts.items():
        yield f"{counted(num, what)} left out: {why}"


def _scorer(
    config: Config, functions: list[Reward], rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]
) -> Scorer:
    return Scorer(
        functions,
        **_columns(rows, eval_rows),
        max_completion_tokens=config.rollout.max_completion_tokens,
        num_workers=config.scoring.num_workers,
        timeout_seconds=config.scoring.timeout_seconds,
        memory_gib=config.scoring.memory_gib,
        environment=config.scoring.environment,
        verdict=config.scoring.verdict,
    )


def _gradable(
    rows: list[dict[str, Any]],
    what: str,
    config: Config,
    processes: TrainingProcesses,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> tuple[list[Prompt], Audit]:
    """Prompts of the rows that fit and whose answer every reward function can grade; says what was dropped."""
    # asked once: a time limit that strikes on one process only would leave them with different questions
    reasons = processes.on_main(lambda: check_rows(scorer, rows))
    gradable = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    if not gradable:
        raise ValueError(
            f"data.answer_column is {config.data.answer_column!r}; not one of the {len(rows)} {what} has an answer "
            f"that can be graded; the first: {reasons[0]}. Correct data.answer_column or data.answer_regex."
        )
    prompts, dropped = build_prompts(gradable, tokenizer, config.data)
    if len(gradable) < len(rows):
        dropped[f"answer cannot be graded, e.g. {next(filter(None, reasons))}"] += len(rows) - len(gradable)
    processes.say(counted(len(prompts), what) + "".join(f"; {n:,} dropped: {why}" for why, n in dropped.items()))
    return prompts, audit(what, rows, reasons, num_prompts=len(prompts))


def reward_functions(
    config: Config,
    rewards: Sequence[Callable[..., Any] | Reward | str] | None,
    of_environment: Sequence[Reward] = (),
) -> list[Reward]:
    """Those of the configuration, or those that are given instead; and then what the environment gives."""
    if rewards is None:
        return [*resolve_rewards(config.rewards), *of_environment]
    for setting in config.schedules:
        if setting.startswith("rewards."):
            raise ValueError(
                f"schedules holds {setting!r}; the rewards of this run are those given to Trainer, not those of `rewards`. List "
                "them there, or remove the schedule."
            )
    given = [*_given_rewards(rewards), *of_environment]
    if not given or not (any(reward.weight for reward in given) or config.teacher.name):
        raise ValueError(
            f"rewards is {[reward.name for reward in given]} without any weight; at least one reward must count for something. "
            "Give one of them a weight other than 0."
        )
    return given


def _given_rewards(rewards: Sequence[Callable[..., Any] | Reward | str]) -> list[Reward]:
    """Names, as a configuration has them, are those of the library's rewards and of files."""
    if isinstance(rewards, (str, Reward)) or callable(rewards):
        raise ValueError(f"rewards is {rewards!r}; it is a list of functions. Put it into brackets.")
    made = []
    for reward in rewards:
        if isinstance(reward, str):
            made += resolve_rewards([RewardConfig(function=reward)])
        elif isinstance(reward, Reward) or callable(reward):
            made.append(reward if isinstance(reward, Reward) else Reward(reward))
        else:
            raise ValueError(
                f"rewards holds {reward!r}; each is a function, its name such as 'accuracy', or a Reward. Correct it."
            )
    return made


def _check_not_negative(config: Config, rewards: list[Reward]) -> None:
    """Raises ValueError if a reward has a weight below 0 at some time of the run."""
    for number, reward in enumerate(rewards):
        schedule = config.schedules.get(f"rewards.{number}.weight")
        lowest = reward.weight if schedule is None else min(schedule.points.values())
        if lowest < 0:
            raise ValueError(
                f"algorithm.normalize_by_mean is true; the reward {reward.name} has the weight {lowest:g}, and a mean below 0 "
                "would turn their signs. Give it a weight of 0 or more, or set algorithm.normalize_by_mean to false."
            )


def _rows(
    config: Config,
    given: Rows | None,
    rewards: list[Reward],
    environment: Environment | None,
    left_out: Counter[str],
    *,
    evaluation: bool,
) -> list[dict[str, Any]]:
    """Counts in `left_out` the rows that are not taken."""
    reads = reads_answer(rewards)
    if given is None and environment is not None:
        own = own_rows(environment, config.data, evaluation=evaluation, reads_answer=reads, left_out=left_out)
        if own is not None:
            return own
    if given is None:
        return load_rows(config.data, evaluation=evaluation, reads_answer=reads, left_out=left_out)
    data, stands_in = config.data, evaluation and config.data.eval_name is not None
    return prepare_rows(
        given,
        data,
        answer_regex=data.eval_answer_regex if stands_in else data.answer_regex,
        setting="eval_dataset" if evaluation else "train_dataset",
        held_out=stands_in,
        reads_answer=reads,
        selection=Selection.of(data, held_out=evaluation, left_out=left_out),
    )


def _columns(rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of all questions, and of those that only some have, which have it: what Scorer wants to know."""
    training, held_out = list(rows[0]), list(eval_rows[0]) if eval_rows else list(rows[0])
    elsewhere = {name: "training questions" for name in training if name not in held_out}
    elsewhere |= {name: "held-out questions" for name in held_out if name not in training}
    return {"columns": [name for name in training if name in held_out], "elsewhere": elsewhere}


def _gaps(scorer: Scorer, rows: list[dict[str, Any]], what: str) -> Iterator[str]:
    """Which rewards ask for a column that some of the rows they are asked about have nothing in."""
    named = scorer.named_columns()
    for reward in scorer.rewards:
        asked = [row for row in rows if reward.is_asked(row)]
        for name in named[reward.name]:
            gaps = missing(asked, name) if asked and name in asked[0] else []
            if gaps:
                yield (
                    f"reward {reward.name} asks for {name!r}; {len(gaps):,} of {len(asked):,} {what} have none (the first: "
                    f"row {gaps[0]}), and it is given None for them"
                )
