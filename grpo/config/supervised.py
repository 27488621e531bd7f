"""The settings of supervised training. Sections that mean the same as in reinforcement learning are the same classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from grpo.config.combinations import TASK_PREFIX, check_hub, check_watchdog
from grpo.config.elsewhere import ELSEWHERE, SUPERVISED
from grpo.config.load import write_yaml
from grpo.config.optimizer import OptimizerConfig
from grpo.config.sections import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    LoRAConfig,
    MemoryConfig,
    ModelConfig,
    PlaceConfig,
    RewardConfig,
    ScoringConfig,
    Section,
    Sources,
    WatchdogConfig,
)
from grpo.config.settings import Config, Settings


class RowsConfig(DataConfig):
    """What `data` is in supervised training: rows, and questions that are asked meanwhile.

    The settings whose names begin with `eval_`, and those of the answer, belong to the questions; the templates to both.
    """

    name: Sources | None = None
    """Rows to learn from, named like the questions of reinforcement learning: a file (.jsonl, .json, .csv, .parquet, ...), a
    pattern, a folder, a data set of the hub, or a list of these, each with a weight if all have one. May be left out only where
    rows are handed to `SupervisedTrainer(train_dataset=...)`."""
    form: Literal["auto", "ids", "messages", "question", "prompt"] = "auto"
    """What a row is. ids: `prompt_ids` and `completion_ids`, as sampled. messages: a conversation. question: a question, put into
    data.template as reinforcement learning does, and a completion. prompt: a text as it stands, or messages, and a completion.
    auto: by the columns of each row; if they allow several, that is an error."""
    completion_column: str = "completion"
    """Column that holds what is learned, in the forms `question` and `prompt`."""
    messages_column: str = "messages"
    """Column that holds the conversation, in the form `messages`: a list of {role, content}."""
    loss_on: Literal["all", "last"] = "all"
    """Of a conversation, train on every turn of the assistant, or on the last."""
    max_tokens: PositiveInt = 4096
    """Longest row, prompt and completion together. No row is ever cut."""
    too_long: Literal["drop", "error"] = "drop"
    """What to do with longer rows. drop: leave them out, and say how many. error: refuse the data."""
    empty_thoughts: Literal["error", "drop", "keep"] = "error"
    """What to do with rows whose completion has a `<think></think>` with nothing in it: they teach not to think. error: refuse
    the data and say how many; drop: leave them out; keep: learn from them."""


class TrainingConfig(Section):
    epochs: PositiveFloat = 2.0
    """Times that the rows are gone through, each time in another order. DeepSeek-R1: 2 to 3."""
    rows_per_update: PositiveInt = 64
    """Rows of an optimizer step, over all processes (DeepSeek-R1: 128; its distillation: 64)."""
    tokens_per_update: PositiveInt | None = None
    """An optimizer step takes fewer rows than that where they would have more than so many tokens together, prompts included.
    null: no limit. Raising it makes steps alike whose rows differ in length."""
    aggregation: Literal["token", "sequence"] = "token"
    """Weight of a token in the loss. token: all trained tokens of the step weigh the same. sequence: all rows do."""


class SupervisedOptimizerConfig(OptimizerConfig):
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of AdamW. DeepSeek-R1: 5e-5; its distillation 1e-4 (1.5B) to 2e-5 (70B)."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """What the learning rate does after warm-up. All but constant end at final_rate_share with the last step; wsd (warm up, stay,
    decay; MiniCPM, arXiv 2404.06395) stays at its peak and falls in a line at the end, over decay_share."""
    final_rate_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak rate at which linear, cosine and wsd end (DeepSeek-R1: a tenth)."""


class SupervisedEvaluationConfig(EvaluationConfig):
    num_rows: NonNegativeInt = 0
    """Rows that are set aside, drawn by run.seed, and whose loss is measured whenever questions are asked: at least so many, and
    all rows of the same prompt with them. 0: none."""
    max_completion_tokens: PositiveInt = 1024
    """Where an answer to a held-out question is cut off."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end such an answer, besides the end-of-sequence tokens."""
    engine: Literal["auto", "native", "hf"] = "auto"
    """What samples the answers, as rollout.engine."""


class SupervisedRunConfig(PlaceConfig):
    steps: PositiveInt | None = None
    """Optimizer steps, in place of training.epochs. null: as many as the epochs take."""


OF_SAMPLING = ("kl", "length", "truncation", "repetition", "reward", "signal", "reward_hacking")
"""Rules of the watchdog that look at what was sampled."""


SAMPLED_WITH = ("max_completion_tokens", "stop", "engine")
"""Settings of the evaluation that `parts` has as those of rollouts."""
NAMED = re.compile(rf"(?<![^\s(])rollout\.(?=(?:{'|'.join(SAMPLED_WITH)})(?![\w/'\"]))")
"""The section in front of such a setting, and not within a path or a text in quotation marks."""


@contextmanager
def as_spelled_here() -> Iterator[None]:
    """Errors about what `parts` says of rollouts name the setting of the evaluation that it comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(NAMED.sub("evaluation.", str(error))) from None


class SupervisedConfig(Settings):
    """Everything that defines a run of supervised training; raises as Settings."""

    model: ModelConfig
    data: RowsConfig = Field(default_factory=RowsConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    optimizer: SupervisedOptimizerConfig = Field(default_factory=SupervisedOptimizerConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    evaluation: SupervisedEvaluationConfig = Field(default_factory=SupervisedEvaluationConfig)
    rewards: list[RewardConfig] = Field(
        default_factory=lambda: [RewardConfig(function="accuracy"), RewardConfig(function="format")]
    )
    """Functions that grade the answers to held-out questions; nothing is trained on what they say."""
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    run: SupervisedRunConfig

    def __init__(self, **settings: Any) -> None:  # for type checkers, which would want the sections as objects
        super().__init__(**settings)

    def check(self) -> None:
        """See Settings."""
        data, training, evaluation = self.data, self.training, self.evaluation
        check_hub(self.run)
        names = data.name if isinstance(data.name, list) else [data]
        if any(str(each.name).startswith(TASK_PREFIX) for each in names):
            raise ValueError(
                f"data.name is {data.name!r}; a task makes questions, and supervised training needs rows with completions. Name "
                "a file of rows, or train on the task with `grpo train`."
            )
        if training.tokens_per_update is not None and training.tokens_per_update < data.max_tokens:
            raise ValueError(
                f"training.tokens_per_update is {training.tokens_per_update}; one row may have {data.max_tokens} tokens "
                f"(data.max_tokens) and is never cut. Set training.tokens_per_update >= {data.max_tokens}, or lower the latter."
            )
        at_once = self.distributed.sequence_parallel
        if self.pass_tokens < data.max_tokens:
            times = f", times {at_once} (distributed.sequence_parallel)" * (at_once > 1)
            raise ValueError(
                f"memory.micro_batch_tokens is {self.memory.micro_batch_tokens}{times}; one row may have {data.max_tokens} "
                f"tokens (data.max_tokens) and is never split. Set memory.micro_batch_tokens >= "
                f"{-(-data.max_tokens // at_once)}, or lower the latter."
            )
        if self.run.steps is not None and "epochs" in training.model_fields_set:
            raise ValueError(
                f"run.steps is {self.run.steps} and training.epochs {training.epochs:g}; each says how long to train. Remove one "
                "of the two: training.epochs=null takes back what the file says."
            )
        if self.run.steps is not None and self.optimizer.warmup_steps > self.run.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; the run has {self.run.steps} steps (run.steps) and "
                "would end before its peak rate. Lower the warm-up."
            )
        if evaluation.every_steps and not evaluation.num_rows and not evaluation.num_questions:
            raise ValueError(
                f"evaluation.every_steps is {evaluation.every_steps}; there is nothing to evaluate. Set evaluation.num_rows or "
                "evaluation.num_questions, or remove it."
            )
        self._check_questions()
        for rule in OF_SAMPLING:
            if getattr(self.watchdog, rule) != "warn":
                raise ValueError(
                    f"watchdog.{rule} is {getattr(self.watchdog, rule)!r}; it looks at what was sampled, and supervised training "
                    "samples nothing to train on. Remove it."
                )
        self.parts  # noqa: B018  the checks of what is the same in both

    def _check_questions(self) -> None:
        """What belongs to held-out questions is set with them only."""
        evaluation, default = self.evaluation, SupervisedEvaluationConfig.model_fields
        if evaluation.num_questions:
            return
        for name in ("max_completion_tokens", "stop", "engine", "temperature", "top_p"):
            value = getattr(evaluation, name)
            if name in evaluation.model_fields_set and value != default[name].get_default(call_default_factory=True):
                raise ValueError(
                    f"evaluation.{name} is {value!r}; it has no effect while evaluation.num_questions is 0. Remove it, or set "
                    "evaluation.num_questions."
                )
        if self.memory.release_kv_cache:
            raise ValueError(
                "memory.release_kv_cache is true; it has no effect while evaluation.num_questions is 0, as nothing is sampled. "
                "Remove it, or set evaluation.num_questions."
            )

    def to_yaml(self) -> str:
        """Without training.epochs where run.steps is set: the file would say twice how long to train, and be refused."""
        values = self.model_dump()
        if self.run.steps is not None:
            del values["training"]["epochs"]
        return write_yaml(values)

    @property
    def max_sequence_tokens(self) -> int:
        """Of the longest row that there may be."""
        return self.data.max_tokens

    @property
    def pass_tokens(self) -> int:
        """Most tokens of a pass, over the processes that run it together."""
        return self.memory.micro_batch_tokens * self.distributed.sequence_parallel

    def check_held_out(self) -> None:
        """Raises ValueError if held-out questions are to be asked and are not named."""
        if self.evaluation.num_questions > 0 and self.data.eval_name is None:
            raise ValueError(
                f"evaluation.num_questions is {self.evaluation.num_questions}; data.eval_name is missing, and rows are no "
                "questions. Set data.eval_name, pass eval_dataset, or set evaluation.num_questions to 0."
            )

    @property
    def parts(self) -> Config:
        """The same model, memory, held-out questions and so on as settings of reinforcement learning, for parts that both have.

        What it says of rollouts is what the evaluation samples.
        """
        evaluation = self.evaluation
        data = self.data.model_dump(include=set(DataConfig.model_fields), exclude_unset=True)
        longest = self.data.max_prompt_tokens + evaluation.max_completion_tokens
        memory = self.memory.model_dump() | {"micro_batch_tokens": max(self.memory.micro_batch_tokens, longest)}
        with as_spelled_here():
            parts = Config(
                model=self.model.model_dump(),
                data=data,
                rollout=evaluation.model_dump(include=set(SAMPLED_WITH)),
                rewards=[reward.model_dump() for reward in self.rewards],
                scoring=self.scoring.model_dump(),
                algorithm={"kl_coef": 0.0},
                lora=self.lora.model_dump(),
                optimizer=self.optimizer.model_dump(),
                memory=memory,
                distributed=self.distributed.model_dump(),
                evaluation=evaluation.model_dump(include=set(EvaluationConfig.model_fields)),
                checkpoint=self.checkpoint.model_dump(),
                logging=self.logging.model_dump(),
                run={**self.run.model_dump(), "steps": self.run.steps or max(self.optimizer.warmup_steps, 1)},
            ).model_copy(update={"watchdog": self.watchdog})
        check_watchdog(parts)
        return parts

    @classmethod
    def elsewhere(cls) -> dict[str, str]:
        """See Settings."""
        of_the_other = [name for name in Config.model_fields if name not in cls.model_fields]
        text = "`grpo train` reads it, and supervised training has no use for it. Remove it."
        return ELSEWHERE | SUPERVISED | dict.fromkeys(of_the_other, text)

    @classmethod
    def run_of(cls, model: str) -> dict[str, Any]:
        """See Settings."""
        return {"dir": f"runs/{Path(model).name}-sft"}
