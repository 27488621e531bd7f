"""The settings of a run: a YAML file and overrides in, one validated, typed tree out.

Sections are two levels deep and go by concern. Whatever is wrong is refused with a `ValueError` before any model is loaded; its
message has the setting as spelled, the value, the rule and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from grpo.config import sections, shipped
from grpo.config.algorithm import AlgorithmConfig
from grpo.config.combinations import check_combinations, check_rewards, check_schedules, check_vllm_sampling, scheduled
from grpo.config.elsewhere import ELSEWHERE
from grpo.config.load import apply_override, put, read_settings, read_text, write_yaml
from grpo.config.optimizer import OptimizerConfig
from grpo.config.sections import (
    SHAPES_OF_SOURCES,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EnvironmentConfig,
    EvaluationConfig,
    LoggingConfig,
    LoRAConfig,
    MemoryConfig,
    ModelConfig,
    PreflightConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ScheduleConfig,
    ScoringConfig,
    Section,
    SourceConfig,
    TeacherConfig,
    ToolConfig,
    ToolsConfig,
    VLLMConfig,
    WatchdogConfig,
)
from grpo.types import Sampling

LOWEST_LORA_RATE = 1e-5
"""At this rate merged bfloat16 weights hold 2 % of a first update and 58 % of the sum of 26 (lora.py); below it, less."""


STEPS_OF_A_MODEL = 200
"""Of a run of which nothing is said but its model: enough to see whether the reward rises."""

NOT_TRAINED = {"dir": "", "steps": 2**30}
"""The section `run` where nothing is trained. No warm-up is longer."""

OF_THE_RATIO = ("ratio", "clip", "clip_low", "clip_high", "clip_dual", "soft_positive", "soft_negative", "kl_weighted")
"""Settings of the algorithm without effect where the ratio is 1; that to the policy that drew a token may be another."""


class Settings(Section):
    """A tree of sections, read from YAML and overrides.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type or out of range, or a
            combination that cannot work.
    """

    def __init__(self, **settings: Any) -> None:
        unknown = list(_unknown_keys(settings, type(self), type(self)))
        of_another_command = [line for line in unknown if "`grpo " in line]
        if unknown:
            raise ValueError("\n".join(of_another_command[:1] or unknown))
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ValueError("\n".join(dict.fromkeys(map(_explain, error.errors())))) from None
        self.check()

    def check(self) -> None:
        """Raises ValueError: what may not be combined is."""

    @classmethod
    def elsewhere(cls) -> dict[str, str]:
        """What other libraries, or another command, call a setting -> what to do."""
        return ELSEWHERE

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file and apply overrides such as `rollout.group_size=8`, in order.

        The value of an override is read as YAML; a list item is addressed by its number: `rewards.0.weight=0.5`. What the file
        names of model and data and is not in the working directory is looked for beside the file.

        Args:
            path: or the name of a configuration that comes with the library, such as `quickstart`.
        """
        return cls(**cls._read(path, overrides))

    @classmethod
    def _read(cls, path: str | Path, overrides: Iterable[str]) -> dict[str, Any]:
        settings = read_file(path)
        for override in overrides:
            apply_override(settings, override)
            _take_back(settings, override, cls)
        return settings

    @classmethod
    def of(cls, source: Self | str | Path, settings: Mapping[str, Any]) -> Self:
        """A configuration with other settings, by their names.

        Args:
            source: a configuration; a YAML file or the name of one that comes with the library, as in `load`; else the model
                to train, with defaults for the rest and `run.dir` named after it.
            settings: such as {"run.steps": 100, "rewards.0.weight": 0.5}; values as they are, not as YAML.
        """
        if isinstance(source, cls) and not settings:
            return source
        if isinstance(source, cls):
            values = source.model_dump(exclude_unset=True)
        elif Path(str(source)).suffix in (".yaml", ".yml") or str(source) in shipped.names():
            values = read_file(str(source))
        else:
            return cls.of_model(str(source), settings)
        for name, value in settings.items():
            put(values, name, value)
        return cls(**values)

    @classmethod
    def of_model(cls, name: str, settings: Mapping[str, Any]) -> Self:
        """A configuration that says nothing but a model's name and `settings`."""
        values: dict[str, Any] = {"model": {"name": name}, "run": cls.run_of(name)}
        for setting, value in settings.items():
            put(values, setting, value)
        return cls(**values)

    @classmethod
    def run_of(cls, model: str) -> dict[str, Any]:
        """The section `run` of a run of which nothing is said but its model."""
        return {"dir": f"runs/{Path(model).name}"}

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump())


class Config(Settings):
    """Everything that defines a run of reinforcement learning; raises as Settings."""

    model: ModelConfig
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    vllm: VLLMConfig = Field(default_factory=VLLMConfig)
    rewards: list[RewardConfig] = Field(
        default_factory=lambda: [RewardConfig(function="accuracy"), RewardConfig(function="format")]
    )
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    schedules: dict[str, ScheduleConfig] = Field(default_factory=dict)
    """Settings that change over the run, by name. The setting itself is the largest value of its schedule, for which memory is
    planned and checked, and which evaluations use; leave it out or set it to that."""
    run: RunConfig

    def __init__(self, **settings: Any) -> None:  # for type checkers, which would want the sections as objects
        super().__init__(**settings)

    @classmethod
    def load_questions(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """As `load`, where a model is only asked: what has no default in the section `run` may be missing."""
        settings = cls._read(path, overrides)
        given = settings.get("run", {})
        return cls(**settings | {"run": NOT_TRAINED | given if isinstance(given, dict) else given})

    @classmethod
    def elsewhere(cls) -> dict[str, str]:
        """See Settings."""
        return ELSEWHERE | {"training": "It is a section of supervised training: `grpo sft --config ...`."}

    def check(self) -> None:
        """See Settings."""
        check_schedules(self)
        check_combinations(self)
        for stage in self._stages():
            check_rewards(stage)
            if self.rollout.engine == "vllm":
                check_vllm_sampling(stage)

    @classmethod
    def run_of(cls, model: str) -> dict[str, Any]:
        """See Settings."""
        return {**super().run_of(model), "steps": STEPS_OF_A_MODEL}

    def at(self, optimizer_step: int) -> Config:
        """The settings of the training step whose first update is this one."""
        config = self.model_copy(deep=True) if self.schedules else self
        for setting, schedule in self.schedules.items():
            section, name, is_whole = scheduled(config, setting)
            value = schedule.at(optimizer_step)
            setattr(section, name, round(value) if is_whole else value)
        return config

    def _stages(self) -> list[Config]:
        """The settings where a schedule changes; without any, those of the whole run."""
        return [self.at(step) for step in sorted({0}.union(*(schedule.points for schedule in self.schedules.values())))]

    @property
    def completion_limits(self) -> list[int]:
        """Every rollout.max_completion_tokens of the run, or both ends where it changes gradually."""
        return [stage.rollout.max_completion_tokens for stage in self._stages()]

    def scheduled_values(self) -> dict[str, float]:
        """Of the settings that follow a schedule, what they are in this configuration."""
        places = {setting: scheduled(self, setting) for setting in self.schedules}
        return {setting: getattr(section, name) for setting, (section, name, _) in places.items()}

    @property
    def scheduled_weights(self) -> dict[int, float]:
        """Of the rewards whose weight follows a schedule, by their number."""
        return {
            number: reward.weight
            for number, reward in enumerate(self.rewards)
            if f"rewards.{number}.weight" in self.schedules
        }

    # What follows from the settings, each worked out here and nowhere else.

    @property
    def teacher_model(self) -> ModelConfig | None:
        """The model that takes the reference's place, in the policy's precision."""
        if self.teacher.name is None:
            return None
        own = {"name": self.teacher.name, "revision": self.teacher.revision, "resize_embeddings": False}
        return self.model.model_copy(update=own)

    @property
    def has_weighted_reward(self) -> bool:
        """Whether any reward counts for something."""
        of_environment = self.environment.weight if self.environment.function is not None else 0.0
        return bool(of_environment) or any(reward.weight for reward in self.rewards)

    @property
    def sampling(self) -> Sampling:
        """Of the training rollouts."""
        rollout = self.rollout
        return Sampling(
            max_tokens=rollout.max_completion_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            stop=tuple(rollout.stop),
            weights=rollout.weights,
        )

    @property
    def eval_sampling(self) -> Sampling:
        """Of the held-out evaluation: ends where training rollouts end."""
        evaluation = self.evaluation
        return Sampling(
            max_tokens=self.rollout.max_completion_tokens,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            stop=tuple(self.rollout.stop),
        )

    @property
    def samplings(self) -> dict[str, Sampling]:
        """All that happen in the run, by the section that sets them."""
        held_out = {"evaluation": self.eval_sampling} if self.evaluation.num_questions else {}
        return {"rollout": self.sampling, **held_out}

    @property
    def vllm_logprobs_mode(self) -> str:
        """How a vLLM engine must report log-probabilities so that they are those of Completion.

        vLLM's processed_logprobs come after temperature, min-p, top-k and top-p: right at any temperature, but renormalised over
        the tokens that were left. Its raw_logprobs come before all of them: right at temperature 1 only, whatever is left out.
        """
        return "raw_logprobs" if any(each.truncated for each in self.samplings.values()) else "processed_logprobs"

    @property
    def samples_on_a_server(self) -> bool:
        """And not in the processes that train."""
        return self.rollout.engine == "vllm" and self.vllm.mode == "server"

    @property
    def completions_per_step(self) -> int:
        return self.rollout.num_prompts * self.rollout.group_size

    @property
    def max_questions_per_step(self) -> int:
        return int(self.rollout.num_prompts * self.rollout.max_oversampling)

    @property
    def prompts_per_minibatch(self) -> int:
        return self.rollout.num_prompts // self.algorithm.num_minibatches

    @property
    def optimizer_steps(self) -> int:
        return self.run.steps * self.algorithm.updates_per_rollout

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_completion_tokens

    @property
    def pass_tokens(self) -> int:
        """Most tokens of a pass, over the processes that run it together."""
        return self.memory.micro_batch_tokens * self.distributed.sequence_parallel

    def summary(self, *, num_rows: int, world_size: int) -> str:
        """The numbers people ask for first, for a data set of `num_rows` questions on `world_size` processes."""
        rollout, steps = self.rollout, self.run.steps
        questions, most = steps * rollout.num_prompts, steps * self.max_questions_per_step
        dynamic = [f"dynamic sampling       up to {self.max_questions_per_step} questions per step, {most:,} in all"]
        refresh = self.algorithm.reference_refresh_steps
        refreshes = (
            [f"reference refreshes    {self.optimizer_steps // refresh}, every {refresh} optimizer steps"]
            if refresh
            else []
        )
        rate, rank = self.optimizer.learning_rate, self.lora.rank
        low_rate = (
            [
                f"learning rate          {rate:g}, low for adapters (lora.rank {rank}): in bfloat16 most of such updates are "
                f"rounded away; set optimizer.learning_rate >= {LOWEST_LORA_RATE:g}"
            ]
            if rank and rate < LOWEST_LORA_RATE
            else []
        )
        return "\n".join(
            [
                f"questions per step     {rollout.num_prompts} over {world_size} process{'es' * (world_size > 1)}",
                f"completions per step   {self.completions_per_step} ({rollout.num_prompts} x {rollout.group_size}), "
                f"at most {self.completions_per_step * rollout.max_completion_tokens:,} tokens",
                f"optimizer steps        {self.optimizer_steps:,} ({self.algorithm.updates_per_rollout} per rollout, "
                f"{self.prompts_per_minibatch * rollout.group_size} completions each)",
                *refreshes,
                *self._without_ratio(),
                *self._without_restraint(),
                *self._never_reached(),
                *low_rate,
                *(dynamic if most > questions else []),
                *self._passed_over(),
                f"questions in all       {questions:,} = {questions / num_rows:.2f} epochs of {num_rows:,}",
            ]
        )

    def _never_reached(self) -> list[str]:
        """Of schedules, what comes after the last rollout, as it does in a trial of a few steps."""
        last = self.optimizer_steps - self.algorithm.updates_per_rollout
        late = {name: [step for step in each.points if step > last] for name, each in self.schedules.items()}
        return [
            f"schedule               {name}: optimizer step {min(steps)} comes after the last rollout, which begins at {last}"
            for name, steps in late.items()
            if steps
        ]

    def _passed_over(self) -> list[str]:
        rollout = self.rollout
        least = "all" if rollout.solved_from == 1 else f"{rollout.solved_from:g} of the"
        solved = (
            f"solved questions       of {least} last answers right: asked at {rollout.solved_share:g} of their turns"
        )
        hopeless = f"hopeless questions     of no last answer right: asked at {rollout.hopeless_share:g} of their turns"
        return [*[solved] * (rollout.solved_share < 1), *[hopeless] * (rollout.hopeless_share < 1)]

    def _without_ratio(self) -> list[str]:
        """That the ratio is 1 in every update, for whoever has set what becomes of it."""
        default = AlgorithmConfig.model_fields
        names = [
            name
            for name in OF_THE_RATIO
            if getattr(self.algorithm, name) != default[name].default or f"algorithm.{name}" in self.schedules
        ]
        if self.algorithm.updates_per_rollout > 1 or self.algorithm.clip == "divergence" or not names:
            return []
        settings = ", ".join(f"algorithm.{name}" for name in names)
        return [f"strictly on-policy     the ratio is 1 in the only update of a rollout; no effect: {settings}"]

    def _without_restraint(self) -> list[str]:
        if not self.algorithm.kl_in_loss or self.algorithm.kl_estimator != "k1":
            return []
        return [
            "k1 in the loss         measures the KL and restrains nothing: its expected gradient is 0; see algorithm.kl_in"
        ]

    def check_world_size(self, world_size: int) -> None:
        if self.rollout.num_prompts < world_size:
            raise ValueError(
                f"rollout.num_prompts is {self.rollout.num_prompts}; each of the {world_size} processes needs at least "
                f"one question per step. Set rollout.num_prompts >= {world_size} or launch fewer processes."
            )
        if self.rollout.carry_over and self.rollout.num_prompts % world_size:
            raise ValueError(
                f"rollout.num_prompts is {self.rollout.num_prompts}; with rollout.carry_over each of the {world_size} processes "
                "has as many questions of a step as the others, so that what is begun stays where it is. Set rollout.num_prompts "
                f"to a multiple of {world_size}, or launch another number of processes."
            )


LISTED_SECTIONS: dict[str, type[BaseModel]] = {
    "rewards": RewardConfig,
    "data.name": SourceConfig,
    "data.eval_name": SourceConfig,
    "tools.functions": ToolConfig,
}
"""What an entry of a list is, where the entries of the list have settings."""


def _unknown_keys(
    settings: dict[str, Any], section: type[BaseModel], root: type[Settings], prefix: str = ""
) -> Iterator[str]:
    """What is wrong with each name that is no setting."""
    for key, value in settings.items():
        spelled = f"{prefix}{key}"
        if key not in section.model_fields:
            theirs = list(_of_other_libraries(value, spelled, root)) if isinstance(value, dict) else []
            yield from theirs or [_unknown_key(spelled, key, section, root, prefix)]
            continue
        inner = section.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _unknown_keys(value, inner, root, f"{spelled}.")
        if key == "schedules" and isinstance(value, dict):
            yield from _nested_schedules(value, root)
        listed = LISTED_SECTIONS.get(spelled)
        if listed is not None and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _unknown_keys(item, listed, root, f"{spelled}.{i}.")


def _of_other_libraries(settings: dict[str, Any], prefix: str, root: type[Settings]) -> Iterator[str]:
    """What the settings of a section that another library has are called here, such as verl's actor_rollout_ref.rollout.n."""
    for key, value in settings.items():
        if key in root.elsewhere():
            yield f"{prefix}.{key} is not a setting here. {root.elsewhere()[key]}"
        elif isinstance(value, dict):
            yield from _of_other_libraries(value, f"{prefix}.{key}", root)


def _nested_schedules(schedules: dict[str, Any], root: type[Settings]) -> Iterator[str]:
    for section, inner in schedules.items():
        if section in root.model_fields:
            name = f"{section}.{next(iter(inner), 'setting')}" if isinstance(inner, dict) else f"{section}.setting"
            yield (
                f"schedules.{section} is {inner!r}; a schedule stands under the whole name of its setting. Write "
                f"{{{name}: {{points: {{0: ..., 100: ...}}}}}}."
            )


def _unknown_key(spelled: str, key: str, section: type[BaseModel], root: type[Settings], prefix: str) -> str:
    """The nearest name within the section; else where in the whole tree a setting of that name lives."""
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(str(key), section.model_fields, n=1)]
    near = near or [name for name in setting_names(root) if name.split(".")[-1] == key]
    elsewhere = root.elsewhere()
    if str(key) in elsewhere:
        return f"{spelled} is not a setting here. {elsewhere[key]}"
    hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(section.model_fields)}."
    return f"{spelled} is not a setting. {hint}"


def _take_back(settings: dict[str, Any], override: str, root: type[Settings]) -> None:
    """`section.setting=null`, where a setting cannot be null, undoes what the file says of it."""
    name, _, value = override.partition("=")
    section, _, key = name.strip().partition(".")
    field = root.model_fields.get(section)
    inner = None if field is None else getattr(field.annotation, "model_fields", {}).get(key)
    if inner is None or value.strip() not in ("null", "~"):
        return
    try:
        TypeAdapter(inner.annotation).validate_python(None)
    except ValidationError:
        del settings[section][key]


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file, or of the configuration of that name that comes with the library; see Config.load."""
    file = shipped.find(path)
    settings = read_settings(read_text(file, f"--config is {str(path)!r}"), str(file))
    shipped.look_beside(file, settings)
    return settings


def setting_names(of: type[Settings] = Config) -> list[str]:
    """Every setting as `section.name`."""
    names = []
    for section, field in of.model_fields.items():
        listed: dict[str, Any] = {"rewards": RewardConfig, "schedules": ScheduleConfig}
        inner = listed.get(section, field.annotation)
        assert isinstance(inner, type), f"section {section} is not a model"
        assert issubclass(inner, BaseModel), f"section {section} is not a model"
        names += [f"{section}.{name}" for name in inner.model_fields]
    return names


def _explain(detail: ErrorDetails) -> str:
    spelled = ".".join(str(part) for part in detail["loc"] if part not in SHAPES_OF_SOURCES)
    if detail["type"] == "missing":
        return f"{spelled} is missing; it has no default. Set {spelled}."
    if detail["type"] == "model_type":
        names = list(vars(sections)[detail["ctx"]["class_name"]].model_fields)
        some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        example = f"{{{names[0]}: {detail['input']}}}" if isinstance(detail["input"], str) else f"{{{names[0]}: ...}}"
        return f"{spelled} is {detail['input']!r}; it is a mapping with {some}. Write {example}."
    rule = detail["msg"][0].lower() + detail["msg"][1:]
    one_or_more = re.search(r"\.(str|list\[str\])(\.\d+)?\Z", spelled)
    if one_or_more is not None:  # and for each of these two
        spelled, rule = spelled[: one_or_more.start()] + (one_or_more[2] or ""), "it is a name, or a list of names"
    kind = re.search(r"\.(bool|literal\['(\w+)'\])\Z", spelled)
    if kind is not None:  # a setting that is true, false or a word: pydantic has an error for each of the two
        spelled, rule = spelled[: kind.start()], f"it may be {kind[2] or 'true or false'}"
    return f"{spelled} is {detail['input']!r}; {rule}. Correct {spelled}."
