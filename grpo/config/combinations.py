"""What may not be combined: settings that contradict each other, or have no effect beside another.

Every check raises a `ValueError` with the setting as spelled, the value, the rule and the remedy.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import ValidationError

from grpo.config.algorithm import check_objective
from grpo.config.optimizer import check_rate
from grpo.config.sections import (
    VLLM_SETTINGS,
    DataConfig,
    DistributedConfig,
    LoRAConfig,
    PlaceConfig,
    Section,
    SourceConfig,
    TeacherConfig,
    VLLMConfig,
    WatchdogConfig,
)
from grpo.config.where import check_where
from grpo.text.aha import check_lists
from grpo.types import VOTE

if TYPE_CHECKING:
    from grpo.config.settings import Config

SCHEDULABLE = (
    "rollout.max_completion_tokens",
    "rollout.temperature",
    "algorithm.kl_coef",
    "algorithm.clip_low",
    "algorithm.clip_high",
)
"""Settings that may change over a run, besides `rewards.<number>.weight`."""


def scheduled(config: Config, setting: str) -> tuple[Section, str, bool]:
    """Where a setting that may change lives, its name there, and whether it is a whole number.

    Raises:
        ValueError: it may not change, or there is no such reward.
    """
    section, _, name = setting.rpartition(".")
    number = re.fullmatch(r"rewards\.(\d+)\.weight", setting)
    if number and int(number[1]) < len(config.rewards):
        return config.rewards[int(number[1])], name, False
    if setting not in SCHEDULABLE:
        weights = [f"rewards.{i}.weight" for i in range(len(config.rewards))]
        raise ValueError(
            f"schedules holds {setting!r}; it cannot change during a run. Those that can: {', '.join([*SCHEDULABLE, *weights])}."
        )
    return getattr(config, section), name, setting == "rollout.max_completion_tokens"


def check_schedules(config: Config) -> None:
    """Every value that a setting will take is one that it may have; the setting itself becomes the largest."""
    for setting, schedule in config.schedules.items():
        section, name, is_whole = scheduled(config, setting)
        steps = sorted(schedule.points)
        if len(steps) < 2 or steps[0] != 0:
            raise ValueError(
                f"schedules.{setting}.points is {schedule.points}; it says what holds from step 0 on and where it changes. "
                "Give a value for 0 and at least one more."
            )
        for step, value in schedule.points.items():
            try:
                type(section)(**{**section.model_dump(), name: int(value) if is_whole and value % 1 == 0 else value})
            except ValidationError as error:
                rule = error.errors()[0]["msg"].lower()
                raise ValueError(
                    f"schedules.{setting}.points.{step} is {value:g}; of {setting}, {rule}. Correct it."
                ) from None
        largest = max(schedule.points.values())
        if name in section.model_fields_set and getattr(section, name) != largest:
            raise ValueError(
                f"{setting} is {getattr(section, name)}; schedules.{setting} says what it is, at most {largest:g}. Remove one "
                "of the two."
            )
        setattr(section, name, int(largest) if is_whole else largest)


def check_hub(run: PlaceConfig) -> None:
    """Raises ValueError if what is said of the hub is no name there, or has no effect."""
    if run.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", run.push_to_hub):
        raise ValueError(
            f"run.push_to_hub is {run.push_to_hub!r}; it is the name of a model on the hub, user/name. Correct it."
        )
    for name in ("push_at", "hub_private"):
        if (
            run.push_to_hub is None
            and name in run.model_fields_set
            and getattr(run, name) != PlaceConfig.model_fields[name].default
        ):
            raise ValueError(
                f"run.{name} is {getattr(run, name)!r}; it has no effect while run.push_to_hub is null. Set it, or remove this."
            )


def check_combinations(config: Config) -> None:
    rollout = config.rollout
    if rollout.group_size < 2:
        raise ValueError(
            f"rollout.group_size is {rollout.group_size}; group-relative advantages need at least 2 completions per "
            "prompt. Set rollout.group_size >= 2."
        )
    most = rollout.group_size - (config.algorithm.baseline == "mean")
    if config.algorithm.pass_at > most:
        raise ValueError(
            f"algorithm.pass_at is {config.algorithm.pass_at}; a group has {rollout.group_size} completions "
            f"(rollout.group_size), too few to compare the best of so many with others. Set algorithm.pass_at to at most {most}."
        )
    if rollout.max_oversampling > 1 and config.max_questions_per_step == rollout.num_prompts:
        raise ValueError(
            f"rollout.max_oversampling is {rollout.max_oversampling:g}; it allows not one question more than the "
            f"{rollout.num_prompts} of a step (rollout.num_prompts). Set it to 1, or to 2 or more."
        )
    if rollout.signal_from is not None and rollout.max_oversampling == 1 and not rollout.passes_over:
        raise ValueError(
            f"rollout.signal_from is {rollout.signal_from!r}; it has no effect while rollout.max_oversampling, "
            "rollout.solved_share and hopeless_share are 1. Remove it, or set one of these."
        )
    if rollout.solved_from != type(rollout).model_fields["solved_from"].default and rollout.solved_share == 1:
        raise ValueError(
            f"rollout.solved_from is {rollout.solved_from:g}; it has no effect while rollout.solved_share is 1. Set that to "
            "less, such as 0.1, or remove it."
        )
    _check_carry_over(config)
    _check_fp8(config)
    _check_updates(config)
    check_objective(config.algorithm)
    _check_offload(config.distributed)
    if config.model.float32_head and config.model.dtype == "float32":
        raise ValueError(
            "model.float32_head is true; with model.dtype float32 the logits are in float32 anyway. Remove one of the two."
        )
    _check_lora(config)
    check_watchdog(config)
    check_rate(config.optimizer)
    _check_teacher(config)
    if config.watchdog.loss != "warn":
        raise ValueError(
            f"watchdog.loss is {config.watchdog.loss!r}; it watches the loss of rows, and there are none here. Remove it."
        )
    if "" in rollout.stop:
        raise ValueError(
            'rollout.stop holds ""; every completion contains it and would end with its first token. Remove it.'
        )
    if config.evaluation.temperature == 0 and config.evaluation.top_p < 1:
        raise ValueError(
            f"evaluation.top_p is {config.evaluation.top_p}; at evaluation.temperature 0 the likeliest token is taken and "
            "top_p has no effect. Remove it, or set evaluation.temperature."
        )
    if config.evaluation.num_samples > 1 and config.evaluation.num_questions == 0:
        raise ValueError(
            f"evaluation.num_samples is {config.evaluation.num_samples}; it has no effect while evaluation.num_questions is 0. "
            "Remove it, or set evaluation.num_questions."
        )
    if config.evaluation.temperature == 0 and config.evaluation.num_samples > 1:
        raise ValueError(
            f"evaluation.num_samples is {config.evaluation.num_samples}; at evaluation.temperature 0 all answers to a "
            "question are the same. Set it to 1, or set evaluation.temperature (the paper: 0.6, with evaluation.top_p 0.95)."
        )
    if config.preflight.num_questions == 0 and config.preflight.on_failure == "warn":
        raise ValueError(
            "preflight.on_failure is 'warn'; it has no effect while preflight.num_questions is 0. Remove one of the two."
        )
    if config.run.accept_changes and config.run.resume == "never":
        raise ValueError(
            "run.accept_changes is true; it has no effect while run.resume is 'never'. Set run.resume to auto, or remove it."
        )
    check_hub(config.run)
    check_lists("logging.reflection_words", config.logging.reflection_words)
    for name in ("answer_regex", "eval_answer_regex"):
        _check_regex(f"data.{name}", getattr(config.data, name))
    without_name = [name for name in OF_EVAL_NAME if config.data.eval_name is None and getattr(config.data, name)]
    if without_name:
        raise ValueError(
            f"data.{without_name[0]} is {getattr(config.data, without_name[0])!r}; it belongs to data.eval_name, which is "
            "missing, and has no effect without. Set data.eval_name, or remove it."
        )
    _check_task(config.data)
    _check_sources(config.data)
    _check_order(config.data)
    check_where(config.data)
    low, high = config.data.pass_rate
    if low > high:
        raise ValueError(
            f"data.pass_rate is [{low:g}, {high:g}]; the smaller bound comes first. Set it to [{high:g}, {low:g}]."
        )
    if config.data.pass_rates is None and config.data.pass_rate != (0.0, 1.0):
        raise ValueError(
            f"data.pass_rate is [{low:g}, {high:g}]; without data.pass_rates nobody knows the pass rates, so it has no effect. "
            "Name the file in data.pass_rates, or remove it."
        )
    for name in ("question_template", "eval_question_template"):
        if getattr(config.data, name) is not None:
            _check_question_template(config.data, name)
    for name, what in OF_CHAT.items():
        if getattr(config.data, name) and config.data.template != "chat":
            raise ValueError(
                f"data.{name} is {getattr(config.data, name)!r}; only the chat template {what}, and data.template is "
                f"{config.data.template!r}. Remove data.{name} or set data.template to chat."
            )
    _check_engine_settings(config)


OF_CHAT = {
    "system_prompt": "has a system message",
    "chat_template": "is read from a file",
    "chat_template_kwargs": "takes arguments",
}
"""Settings of the data that only data.template chat reads, and what for."""

TASK_PREFIX = "reasoning_gym:"
"""How the name of a reasoning-gym task begins."""

OF_EVAL_NAME = ("eval_subset", "eval_question_template", "eval_answer_column", "eval_answer_regex")

COLUMN_IN_BRACES = re.compile(r'\{([^{}"\n]+)\}')
"""A column's place in data.question_template; braces with nothing between them, as in \\boxed{}, or with a quotation mark or a
line break, as in JSON, are text."""


def _check_sources(data: DataConfig) -> None:
    """Lists of sources in data.name and data.eval_name."""
    if isinstance(data.name, list) and data.revision is not None:
        raise ValueError(
            f"data.revision is {data.revision!r}; data.name lists several sources. Give each its own, and remove it."
        )
    for setting, listed in (("data.name", data.name), ("data.eval_name", data.eval_name)):
        if not isinstance(listed, list):
            continue
        labels = [source.label for source in listed]
        twice = [label for label in labels if labels.count(label) > 1]
        weights = [source.weight for source in listed if source.weight is not None]
        if not listed or twice:
            raise ValueError(
                f"{setting} is {labels}; it lists sources, each once. "
                + (f"Name {twice[0]!r} once, with a weight." if twice else "Name at least one.")
            )
        if weights and (setting == "data.eval_name" or len(weights) < len(listed)):
            raise ValueError(
                f"{setting} has a weight for {len(weights)} of its {len(listed)} sources; weights share out training questions; "
                "all sources of data.name have one, or none. "
                + ("Remove them." if setting == "data.eval_name" else "Give the others one, or remove it.")
            )
        for number, source in enumerate(listed):
            _check_source(f"{setting}.{number}", source)


def _check_source(setting: str, source: SourceConfig) -> None:
    if source.name.startswith(TASK_PREFIX):
        raise ValueError(
            f"{setting}.name is {source.name!r}; a task's questions stand alone. Set data.name to it, without a list."
        )
    _check_regex(f"{setting}.answer_regex", source.answer_regex)
    if source.question_template is not None:
        if source.question_column is not None:
            raise ValueError(
                f"{setting}.question_column is {source.question_column!r}; it has no effect beside question_template. "
                "Remove one of the two."
            )
        if not COLUMN_IN_BRACES.search(source.question_template):
            raise ValueError(
                f"{setting}.question_template is {source.question_template!r}; it names no column in braces. Name "
                "one, such as {question}."
            )


def _check_order(data: DataConfig) -> None:
    if data.order_by is None and data.order_epochs != DataConfig.model_fields["order_epochs"].default:
        raise ValueError(
            f"data.order_epochs is {data.order_epochs}; it has no effect while data.order_by is null. Name a column there, or "
            "remove it."
        )
    if data.order_by is not None and data.weights is not None:
        raise ValueError(
            f"data.order_by is {data.order_by!r} and data.name has weights; each of the two says which question is next. Remove "
            "one of them."
        )


def _is_task(name: str | list[SourceConfig] | None) -> bool:
    return isinstance(name, str) and name.startswith(TASK_PREFIX)


def _check_task(data: DataConfig) -> None:
    if data.args and not _is_task(data.name):
        raise ValueError(
            f"data.args is {data.args}; only tasks of reasoning-gym take any, and data.name is {data.name!r}. Remove it, or "
            f"name a task: {TASK_PREFIX}chain_sum."
        )
    if _is_task(data.eval_name):
        raise ValueError(
            f"data.eval_name is {data.eval_name!r}; a task's held-out questions are those that would come next. Remove "
            "data.eval_name and name the task as data.name."
        )
    if _is_task(data.name):
        _check_task_settings(data)


def _check_task_settings(data: DataConfig) -> None:
    ignored = ["subset", "split", "revision"] + ["eval_split"] * (data.eval_name is None)
    for name in ignored:
        if getattr(data, name) != DataConfig.model_fields[name].default:
            raise ValueError(
                f"data.{name} is {getattr(data, name)!r}; it has no effect on {data.name}, whose questions are made. Remove it."
            )
    for name, least in (("size", 1), ("seed", 0)):
        value = data.args.get(name, least)
        if type(value) is not int or value < least:
            raise ValueError(f"data.args.{name} is {value!r}; it is a whole number of at least {least}. Correct it.")


def _check_question_template(data: DataConfig, name: str) -> None:
    template = getattr(data, name)
    if not COLUMN_IN_BRACES.search(template):
        raise ValueError(
            f"data.{name} is {template!r}; it names no column in braces, so all questions would be the "
            "same. Name one, such as {question}."
        )
    if name == "question_template" and data.question_column != DataConfig.model_fields["question_column"].default:
        raise ValueError(
            f"data.question_column is {data.question_column!r}; it has no effect beside data.question_template, which names its "
            f"columns itself. Write {{{data.question_column}}} there, and remove data.question_column."
        )


def check_rewards(config: Config) -> None:
    if any(reward.function == VOTE and reward.weight for reward in config.rewards):
        raise ValueError(
            f"rewards has {VOTE!r} with a weight; its values are names of answers and no rewards. Give it weight 0."
        )
    if not (config.has_weighted_reward or (config.rewards and config.teacher.name)):
        raise ValueError(
            f"rewards is {[reward.function for reward in config.rewards]} without any weight; at least one reward must "
            "count for something, throughout the run. Give one of them a weight other than 0; or, where those of the run are "
            "handed to Trainer (rewards=[], environment=Game), leave `rewards` out of the configuration."
        )


def check_carried_turns(config: Config) -> None:
    """For a run with tools or an environment, which may be handed to Trainer.

    Raises:
        ValueError: it carries completions over, whose limit changes.
    """
    setting = "rollout.max_completion_tokens"
    if config.rollout.carry_over and setting in config.schedules:
        raise ValueError(
            f"rollout.carry_over is true, and schedules has {setting}; what a tool or an environment answered under one limit "
            "cannot be carried to another. Remove the schedule, or rollout.carry_over."
        )


def _check_carry_over(config: Config) -> None:
    rollout, default = config.rollout, type(config.rollout).model_fields["max_staleness"].default
    if not rollout.carry_over:
        if rollout.max_staleness != default:
            raise ValueError(
                f"rollout.max_staleness is {rollout.max_staleness}; it has no effect while rollout.carry_over is false. Set "
                "rollout.carry_over=true, or remove it."
            )
        return
    if rollout.engine in ("hf", "vllm"):
        raise ValueError(
            f"rollout.carry_over is true; rollout.engine {rollout.engine} cannot go on with completions that were begun in an "
            "earlier step. Set rollout.engine to native, or remove rollout.carry_over."
        )
    if config.tools.functions or config.environment.function is not None:
        check_carried_turns(config)
    _check_weighed(config, "rollout.carry_over is true", "part of the tokens are then drawn by older weights")


def _check_fp8(config: Config) -> None:
    rollout = config.rollout
    if rollout.weights != "fp8":
        return
    if rollout.engine in ("hf", "vllm"):
        raise ValueError(
            f"rollout.weights is fp8; the native engine makes them, and rollout.engine is {rollout.engine}. Set rollout.engine "
            "to native, or remove rollout.weights."
        )
    if not rollout.fused_layers:
        raise ValueError(
            "rollout.weights is fp8 and rollout.fused_layers false; the model's own layers multiply in the model's precision. "
            "Remove one of the two."
        )
    _check_weighed(config, "rollout.weights is fp8", "tokens are then drawn by weights that are rounded")


def _check_weighed(config: Config, setting: str, effect: str) -> None:
    """What a setting asks for by which tokens are not drawn by the policy's own weights."""
    if config.algorithm.importance == "none" and config.algorithm.clip != "divergence":
        raise ValueError(
            f"{setting}; {effect}, and algorithm.importance none would train on them as if they were not. Set "
            "algorithm.importance=truncate and algorithm.importance_high=2."
        )
    if config.teacher.name is not None:
        raise ValueError(
            f"{setting}; the divergence from the teacher ({config.teacher.name}) has a gradient only on tokens that the "
            f"policy's present weights drew. Remove {setting.split()[0]}."
        )


def _check_updates(config: Config) -> None:
    """How a rollout is split into optimizer steps, and what follows them."""
    rollout, algorithm, memory = config.rollout, config.algorithm, config.memory
    if rollout.num_prompts % algorithm.num_minibatches:
        raise ValueError(
            f"algorithm.num_minibatches is {algorithm.num_minibatches}; the {rollout.num_prompts} questions of a step "
            "(rollout.num_prompts) must divide evenly into minibatches. Set it to a divisor of rollout.num_prompts."
        )
    if algorithm.reference_refresh_steps % algorithm.updates_per_rollout:
        raise ValueError(
            f"algorithm.reference_refresh_steps is {algorithm.reference_refresh_steps}; the reference changes between rollouts "
            f"only, each of which has {algorithm.updates_per_rollout} optimizer steps (algorithm.num_minibatches * num_epochs). "
            "Set it to a multiple of them."
        )
    if algorithm.reference_refresh_steps and algorithm.kl_coef == 0:
        raise ValueError(
            f"algorithm.reference_refresh_steps is {algorithm.reference_refresh_steps}; there is no reference, because "
            "algorithm.kl_coef is 0. Remove it, or set algorithm.kl_coef > 0."
        )
    at_once = config.distributed.sequence_parallel
    if config.pass_tokens < config.max_sequence_tokens:
        times = f", times {at_once} (distributed.sequence_parallel)" * (at_once > 1)
        raise ValueError(
            f"memory.micro_batch_tokens is {memory.micro_batch_tokens}{times}; one sequence may have "
            f"{config.max_sequence_tokens} tokens (data.max_prompt_tokens + rollout.max_completion_tokens) and is never "
            f"split. Set memory.micro_batch_tokens >= {-(-config.max_sequence_tokens // at_once)}."
        )
    every, forever = config.checkpoint.every_steps, config.checkpoint.keep_every
    if forever and (every == 0 or forever % every):
        raise ValueError(
            f"checkpoint.keep_every is {forever}; checkpoint.every_steps is {every}, so not all of those would be "
            "written. Set it to a multiple of checkpoint.every_steps."
        )
    if config.optimizer.warmup_steps > config.optimizer_steps:
        raise ValueError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}; the run has {config.optimizer_steps} optimizer "
            "steps (run.steps * algorithm.num_minibatches * num_epochs) and would end before its peak rate. Lower the warm-up."
        )


def _check_teacher(config: Config) -> None:
    teacher, algorithm, default = config.teacher, config.algorithm, TeacherConfig.model_fields
    if teacher.name is None:
        if teacher.revision != default["revision"].default:
            raise ValueError(
                f"teacher.revision is {teacher.revision!r}; there is no teacher. Set teacher.name, or remove it."
            )
        return
    said = f"teacher.name is {teacher.name!r}"
    if algorithm.kl_coef == 0:
        raise ValueError(
            f"{said}; nothing is learned from it, because algorithm.kl_coef is 0. Set that to 1, or remove the teacher."
        )
    if algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        raise ValueError(
            f"{said}; algorithm.kl_estimator k1 in the loss has no gradient on average: nothing would be learned. Set it to k2."
        )
    if algorithm.reference_refresh_steps:
        raise ValueError(
            f"{said}; algorithm.reference_refresh_steps is {algorithm.reference_refresh_steps}, and a policy that becomes the "
            "reference would take the teacher's place. Remove one of the two."
        )
    if not config.has_weighted_reward and config.preflight.num_questions:
        raise ValueError(
            f"{said} and no reward has a weight; the preflight asks whether rewards tell answers apart. Set "
            "preflight.num_questions to 0."
        )


def _check_offload(distributed: DistributedConfig) -> None:
    for name, lowest in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(distributed, name) and distributed.zero_stage < lowest:
            raise ValueError(
                f"distributed.{name} is true; DeepSpeed can do so from ZeRO stage {lowest} on, and distributed.zero_stage is "
                f"{distributed.zero_stage}. Set distributed.zero_stage to {lowest}{' or higher' * (lowest < 3)}, or remove it."
            )


def _check_lora(config: Config) -> None:
    lora = config.lora
    for name, field in LoRAConfig.model_fields.items():
        if lora.rank == 0 and getattr(lora, name) != field.default:
            raise ValueError(
                f"lora.{name} is {getattr(lora, name)!r}; it has no effect while lora.rank is 0. Set lora.rank, or remove it."
            )
    if not lora.target_modules:
        raise ValueError("lora.target_modules is []; nothing would be trained. Name layers, or set it to all-linear.")
    if lora.quantization is not None and config.distributed.zero_stage == 3:
        raise ValueError(
            f"lora.quantization is {lora.quantization} with distributed.zero_stage 3; weights in 4 bits are whole on every "
            "process. Set distributed.zero_stage to 2 or less, or remove lora.quantization."
        )


def check_watchdog(config: Config) -> None:
    settings, checkpoint = config.watchdog, config.checkpoint
    rolls_back = [name for name, value in settings if value == "roll_back"]
    if config.algorithm.kl_coef == 0 and settings.kl != "warn":
        raise ValueError(
            f"watchdog.kl is {settings.kl!r}; there is no KL to watch, because algorithm.kl_coef is 0. Remove it, or set "
            "algorithm.kl_coef > 0."
        )
    for name in ("rate_factor", "max_roll_backs"):
        if not rolls_back and getattr(settings, name) != WatchdogConfig.model_fields[name].default:
            raise ValueError(
                f"watchdog.{name} is {getattr(settings, name)}; it has no effect while no rule's action is roll_back. Set one, "
                "or remove it."
            )
    patience = max(settings.patience, settings.max_skipped)
    if rolls_back and (checkpoint.keep - 1) * checkpoint.every_steps < patience:
        raise ValueError(
            f"watchdog.{rolls_back[0]} is 'roll_back'; trouble shows after {patience} steps, and checkpoints from before it are "
            f"gone by then: checkpoint.keep is {checkpoint.keep} and checkpoint.every_steps {checkpoint.every_steps}. Make "
            "(keep - 1) * every_steps as large as watchdog.patience and watchdog.max_skipped."
        )


def _check_engine_settings(config: Config) -> None:
    """What the chosen engine needs is there, and nothing that it does not read."""
    if config.model.resize_embeddings and config.rollout.engine == "vllm":
        raise ValueError(
            "model.resize_embeddings is true with rollout.engine vllm, which loads the model's files as they are. Set "
            "rollout.engine to auto, or save a model with the larger matrix and name that."
        )
    vllm, used = config.vllm, config.rollout.engine == "vllm"
    where = f"vllm.mode {vllm.mode}" if used else f"rollout.engine {config.rollout.engine}"
    for name, field in VLLMConfig.model_fields.items():
        value = getattr(vllm, name)
        if value != field.default and not (used and name in {"mode", *VLLM_SETTINGS[vllm.mode]}):
            raise ValueError(f"vllm.{name} is {value!r}; it has no effect with {where}. Remove it.")
        if value is None and used and name in VLLM_SETTINGS[vllm.mode]:
            raise ValueError(f"vllm.{name} is missing; {where} needs it. Set vllm.{name} as docs/vllm.md says.")
    if vllm.url is not None and not re.match(r"https?://[^/]+", vllm.url):
        raise ValueError(
            f"vllm.url is {vllm.url!r}; it is not an address like http://127.0.0.1:8000. Set it to where the server listens."
        )
    engine = config.rollout.engine
    native = ("memory", "kv_cache_gib"), ("memory", "release_kv_cache"), ("rollout", "fused_layers")
    for section, name in native if engine in ("hf", "vllm") else ():
        of, value = getattr(config, section), getattr(getattr(config, section), name)
        if value != type(of).model_fields[name].default:
            raise ValueError(
                f"{section}.{name} is {value}; only the native engine reads it, and rollout.engine is {engine}. Remove it."
            )


def check_vllm_sampling(config: Config) -> None:
    """vLLM can sample like this, and tell the log-probabilities that Completion promises; see Config.vllm_logprobs_mode."""
    for section, sampling in config.samplings.items():
        if 0 < sampling.temperature < VLLM_LOWEST_TEMPERATURE:
            raise ValueError(
                f"{section}.temperature is {sampling.temperature}; vLLM would sample at {VLLM_LOWEST_TEMPERATURE} instead, "
                f"the lowest that it knows above 0. Set {section}.temperature >= {VLLM_LOWEST_TEMPERATURE}."
            )
        if sampling.min_p > 0 and sampling.top_p < 1:
            raise ValueError(
                f"{section}.min_p is {sampling.min_p} and {section}.top_p {sampling.top_p}; vLLM takes top_p of what min_p "
                "left, and the rule is the other way round. Remove one of the two, or take another rollout.engine."
            )
        if config.vllm_logprobs_mode == "raw_logprobs" and sampling.temperature not in (0, 1):
            cut = {name for name, each in config.samplings.items() if each.truncated}
            raise ValueError(
                f"{section}.temperature is {sampling.temperature}; where top_k, top_p or min_p leave tokens out, as in "
                f"{' and '.join(sorted(cut))}, vLLM tells log-probabilities of the whole vocabulary at temperature 1 only. "
                f"Set {section}.temperature to 1, sample from all tokens, or take another rollout.engine."
            )


VLLM_LOWEST_TEMPERATURE = 0.01
"""A lower one is raised to this in silence (vllm/sampling_params.py, _MAX_TEMP)."""


def _check_regex(setting: str, pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{setting} is {pattern!r}; it is not a regular expression: {error}. Correct it.") from None
    if groups < 1:
        raise ValueError(f"{setting} is {pattern!r}; its first group is the answer, and it has none. Add parentheses.")
