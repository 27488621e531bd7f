"""The settings of a run: a YAML file and overrides in, one validated, typed tree out.

Sections are two levels deep and go by concern. A default lives here and nowhere else. Whatever is wrong is refused with
a `ValueError` before any model is loaded; its message has the setting as spelled, the value, the rule and the remedy.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Hashable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from grpo.aha import check_lists
from grpo.loss import Objective
from grpo.types import VOTE, Sampling

Fraction = Annotated[float, Field(ge=0, lt=1)]
Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A hub id or a local path, which may begin with `~`."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    name: Location
    """Hub id or local directory of a causal language model in Hugging Face format; the policy starts from it. Or a run's
    directory (its newest checkpoint), a checkpoint, or a LoRA adapter of peft, which is trained further."""
    revision: str = "main"
    """Branch, tag or commit of a hub model. Pin it for a run that others should repeat."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights in the forward pass; the optimizer keeps float32 masters. auto: bfloat16 on CUDA, float32 on CPU."""
    resize_embeddings: bool = False
    """Where the tokenizer has tokens beyond the model's embedding matrix, give it rows for them, near the mean of the others.
    false: prompts with such tokens are refused."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model whose family transformers does not know. Read it first: it can do anything."""


class SourceConfig(Section):
    """One of several sources of questions in `data.name` or `data.eval_name`."""

    name: Location
    """As a single `data.name`, but no reasoning-gym task."""
    subset: str | None = None
    """Configuration name of a hub data set. null here and below: as in `data` (held-out: its `eval_` settings)."""
    split: str | None = None
    """Split of a hub data set or a folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. null: its newest."""
    weight: PositiveFloat | None = None
    """Share of the training questions that come from this source, relative to the weights of the others. All sources have one, or
    none. null: every row of every source once per epoch."""
    question_column: str | None = None
    """Column that holds the question."""
    question_template: str | None = None
    """The question made of columns."""
    answer_column: str | None = None
    """Column that holds the gold answer."""
    answer_regex: str | None = None
    """A regular expression whose first group is the answer."""

    @property
    def label(self) -> str:
        """What tells it from the others; rows have it as their column `data_name`."""
        return ":".join(each for each in (self.name, self.subset, self.split) if each is not None)


SHAPES_OF_SOURCES = ("one name", "a list")
Sources = Annotated[
    Annotated[Location, Tag(SHAPES_OF_SOURCES[0])] | Annotated[list[SourceConfig], Tag(SHAPES_OF_SOURCES[1])],
    Discriminator(lambda value: SHAPES_OF_SOURCES[isinstance(value, list)]),
]
"""Decided by its shape, so that an error is one of that shape alone."""


class DataConfig(Section):
    name: Sources | None = None
    """Training questions: a hub data set id; a local file (.json, .jsonl, .csv, .tsv, also with .gz; .parquet); several as a
    pattern, `data/*.jsonl`; a folder of such files with the splits that `datasets` finds, or one that `save_to_disk` wrote. Or a
    list of these, where an entry may be a mapping with settings of its own, SourceConfig: `[a.jsonl, {name: b.json, weight: 2}]`.
    Or `reasoning_gym:<task>`, such as `reasoning_gym:chain_sum`, an optional extra; held-out questions are then those of the task
    that would come next. May be left out only where rows are handed to `Trainer(train_dataset=...)`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Of a reasoning_gym task: size, seed, and its own settings, such as {size: 5000, seed: 0, max_terms: 3}."""
    subset: str | None = None
    """Configuration name of a hub data set, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a hub data set or a folder to train on. It may be a slice, `train[:1000]`, also of files."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set `name`. Pin it for a run that others should repeat. null: its newest."""
    eval_name: Sources | None = None
    """Held-out questions, named like `name`, without weights. null: `eval_split` of the hub data set or folder `name`."""
    eval_subset: str | None = None
    """Configuration name of the hub data set `eval_name`; without `eval_name` that of `name` holds."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""
    question_column: str = "question"
    """Column that holds the question: a text, or a list of chat messages, which data.template `chat` renders. What lies deeper is
    named with dots: `extra_info.question`, `messages.0.content`. grpo/rows.py has the text of each kind of cell."""
    question_template: str | None = None
    """The question made of columns, each named in braces: `Using the numbers {nums}, make {target}.` Other text stays as it is.
    null: the question is `question_column`. Of `eval_name` too."""
    eval_question_template: str | None = None
    """The same for `eval_name`, where its columns have other names. null: as for `name`."""
    answer_column: str = "answer"
    """Column that holds the gold answer, named like `question_column`: `reward_model.ground_truth`."""
    eval_answer_column: str | None = None
    """The same for `eval_name`. null: as for `name`."""
    answer_regex: str | None = None
    """Where the answer column holds more than the answer: a regular expression whose first group is the answer."""
    eval_answer_regex: str | None = None
    """The same for `eval_name`; without `eval_name` that of `name` holds."""
    template: Literal["r1_zero", "r1_zero_think", "chat", "none"] = "r1_zero"
    """How a question becomes a prompt; see grpo/prompts.py. `chat` is the tokenizer's own chat template."""
    system_prompt: str | None = None
    """System message of the `chat` template."""
    chat_template: Location | None = None
    """File with the Jinja text of a chat template that takes the place of the tokenizer's; checkpoints hold it. `chat` only."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides messages, such as {enable_thinking: false}. `chat` only."""
    max_prompt_tokens: PositiveInt = 512
    """Rows whose prompt is longer are dropped, and counted."""

    @field_validator("name", "eval_name", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """An entry of a list may be a bare name."""
        return (
            [{"name": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value
        )

    @property
    def weights(self) -> dict[str, float] | None:
        """The weight of each source of `name` by its label; None: there are no weights."""
        sources = self.name if isinstance(self.name, list) else []
        return {each.label: each.weight for each in sources if each.weight is not None} or None


class RolloutConfig(Section):
    num_prompts: PositiveInt = 32
    """Questions sampled per step, over all processes. With group_size it sets the completions per step."""
    group_size: PositiveInt = 16
    """Completions per question (G in the paper). Raising it sharpens the baseline and costs rollout time."""
    max_oversampling: Annotated[float, Field(ge=1)] = 1.0
    """Dynamic sampling (DAPO): further questions are sampled until num_prompts groups are neither all right nor all wrong, or
    this multiple of num_prompts questions was sampled in the step; see grpo/dynamic_sampling.py. 1: num_prompts questions,
    whatever their rewards. Raising it fills more batches with signal and costs rollout time."""
    signal_from: str | None = None
    """Name of the reward whose values must differ in a group that dynamic sampling takes. null: `accuracy`, or else the first, of
    those with a weight. Choosing by a reward for length or form fills batches with groups that teach only that."""
    max_completion_tokens: PositiveInt = 1024
    """Where sampling is cut off; such a completion has finish_reason "length"."""
    temperature: PositiveFloat = 1.0
    """Of sampling, and of every log-probability in the loss. Raising it explores more."""
    top_k: NonNegativeInt = 0
    """Draw from the k likeliest tokens only. 0: from all. The loss keeps the log-probabilities of the whole vocabulary, so this
    and the two below make training off-policy; they are for rollouts that would otherwise derail."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest likeliest tokens that have this probability together. 1: from all."""
    min_p: Fraction = 0.0
    """Draw from tokens at least this share as likely as the likeliest. 0: from all."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion, such as `</answer>`, besides the end-of-sequence tokens. They stay part of it."""
    engine: Literal["auto", "native", "hf", "vllm"] = "auto"
    """What samples; see grpo/rollout. native: grpo's own, on the policy's weights. hf: transformers' `generate`, slow. vllm: an
    optional extra. auto: native on CUDA if it supports the model, else hf."""
    fused_layers: bool = True
    """Let the native engine run its fused kernels for the families it has them for. false: the model's own layers."""


class VLLMConfig(Section):
    mode: Literal["colocated", "server"] = "colocated"
    """colocated: an engine in every training process, on its GPU, asleep while the policy trains. server: a `vllm serve` that
    you started elsewhere; docs/vllm.md has the command."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of a GPU's memory that a colocated engine takes while it samples, its copy of the weights included. Raising it makes
    room for more completions at once; the policy, its gradients and optimizer stay where they are."""
    url: str | None = None
    """Where the server listens, such as http://127.0.0.1:8000."""
    sync_dir: Location | None = None
    """Directory that the trainer and the server see under this path. New weights pass through it after every step: it needs room
    for one copy, and /dev/shm serves if both run on one machine."""
    timeout_seconds: PositiveFloat = 300.0
    """Longest wait for one answer of the server: a completion with its time in the queue, or taking over weights. Raise it for
    long completions; the other processes wait for at most ten minutes."""


VLLM_SETTINGS = {"colocated": {"gpu_memory_utilization"}, "server": {"url", "sync_dir", "timeout_seconds"}}
"""What each mode reads besides `mode`."""


class RewardConfig(Section):
    function: Location
    """A name in rewards/, `module:function`, or `path/to/file.py:function`; or a class whose objects can be called. What lies
    beside a file can be imported there."""
    weight: float = 1.0
    """Factor in the sum. 0: only logged."""
    name: str | None = None
    """Name in the metrics, reward/<name> and eval/<name>, which are not those of another metric; null: the function's own."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments handed to the function; of a class, those that it is made with, and those that its objects are called
    with."""
    form: Literal["completion", "texts", "messages"] | None = None
    """How it is called. completion: once for each, as text. texts, messages: once for a group, with lists of texts, or of
    messages as TRL has them in conversations. null: as its parameters and their annotations say; see grpo/scoring.py."""


class ScoringConfig(Section):
    num_workers: PositiveInt = 2
    """Reward worker processes per training process."""
    timeout_seconds: PositiveFloat = 10.0
    """Wall-clock limit for one completion and one function; then the worker is killed and the verdict is "can't tell"."""
    memory_gib: PositiveFloat = 4.0
    """Address space that reward calls may take in a worker, on top of what importing the functions took."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that rewards need, such as [JUDGE_API_KEY]. Workers are given these, and paths, languages
    and caches (INHERITED in grpo/reward_worker.py), and nothing else of the environment."""


class AlgorithmConfig(Section):
    """docs/algorithms.md has the settings of each published algorithm; grpo/loss.py the expression that they go into."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: its group's mean (GRPO), or the mean of the group's others (RLOO)."""
    normalize_by_std: bool = True
    """Divide centred rewards by the group's standard deviation (GRPO). false: Dr. GRPO."""
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """Weight of a token in the loss: 1/length (GRPO), 1/all tokens (DAPO), 1/max_completion_tokens (Dr. GRPO)."""
    filter_truncated: bool = False
    """Do not train on completions that were cut off, though they stay in their group's baseline (DAPO's overlong filtering)."""
    top_entropy: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each minibatch's tokens, those of highest entropy, whose surrogate counts (arXiv 2506.01939: 0.2). Below 1 it
    takes a forward pass before the update, also where every update is on-policy."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether a token's ratio pi / pi_old is its own (GRPO), or the geometric mean of its completion's (GSPO)."""
    clip: Literal["surrogate", "weight"] = "surrogate"
    """What the bounds below do. surrogate: a token beyond has no gradient (PPO, GRPO). weight: the ratio within its bounds
    weights the token's log-probability, which always has one (CISPO)."""
    clip_low: PositiveFloat | None = 0.2
    """The ratio is clipped below at 1 - clip_low. null: it has no bound below."""
    clip_high: PositiveFloat | None = 0.2
    """The ratio is clipped above at 1 + clip_high. DAPO raises it to 0.28; DeepSeek-R1's first stage used 10. null: no bound."""
    importance: Literal["none", "truncate", "mask"] = "none"
    """Weight each token's surrogate with pi_old / pi_rollout, where what samples is not quite what is trained: truncated to the
    bounds below (TIS), or 0 beyond them (IcePop)."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether that weight is the token's own, or the product over its completion: unbiased, and far from 1 for long ones."""
    importance_low: PositiveFloat | None = None
    """Lower bound of the importance weight (TIS: none; IcePop: 0.5)."""
    importance_high: PositiveFloat | None = None
    """Upper bound of the importance weight (TIS: 2; IcePop: 5)."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL penalty to the reference model (beta). 0: no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator; see grpo/loss.py. The paper's is k3."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term of its own for every token. reward: each completion's sum of k1 is subtracted from its reward, before the
    advantage."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of a bonus for the entropy of the next-token distribution, of every token. Raising it keeps the policy exploring;
    too much of it makes noise of the completions."""
    reference_refresh_steps: NonNegativeInt = 0
    """After every so many optimizer steps the reference becomes the current policy (the paper: 400). 0: it stays the starting
    model. Lowering it lets the policy move further from its start."""
    max_sampling_gap: PositiveFloat | None = None
    """Stop when sampled tokens' log-probabilities and the trainer's own of the same tokens differ by more than this, in nats on
    average: one of them is wrong. null: 0.001 in float32, and in bfloat16 0.04, or three times what rounding makes of this model
    if that is more, measured on the first rollout; divided by a temperature below 1. Raise it for an engine whose rounding is
    known to be coarser."""
    num_minibatches: PositiveInt = 1
    """Parts of a rollout that have an optimizer step each (the paper: 16). With 1 of them and of num_epochs every update is
    strictly on-policy."""
    num_epochs: PositiveInt = 1
    """Times that the minibatches of a rollout are trained on, in the same order (mu in DeepSeekMath's algorithm 1). Raising it
    makes more of a rollout, ever further off-policy."""


class LoRAConfig(Section):
    rank: NonNegativeInt = 0
    """Train low-rank adapters of this rank and leave the model's weights as they are; see grpo/lora.py. 0: train all weights.
    Adapters need a higher optimizer.learning_rate, ten times that of all weights or more: in bfloat16 the smallest updates
    have no effect until they add up."""
    alpha: PositiveFloat = 32.0
    """What adapters add is multiplied by alpha / rank. Raising it acts like a higher learning rate."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters, such as [q_proj, v_proj]. all-linear: all but the output layer."""


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW's decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up; linear and cosine end at 0 with the last step."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this global L2 norm."""


class MemoryConfig(Section):
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass of one process, a prompt counted once for all its completions. Results do not depend
    on it; passes below 32,768 tokens leave a fast GPU waiting for the host on small models."""
    logprob_chunk_tokens: PositiveInt = 4096
    """Completion tokens whose logits over the vocabulary exist at once, in the model's precision. Results do not depend on it."""
    activation_checkpointing: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the layers whose activations are computed again in the backward pass instead of kept. 1: all, least memory; 0:
    none, a sixth faster; docs/performance.md has the cost of both. Results do not depend on it."""
    max_sequences: PositiveInt = 256
    """Completions that one process samples at once. Raising it uses the GPU better, and takes memory for keys and values."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory of one process for the native engine's keys and values, kept through the run. With less than max_sequences
    completions need, fewer run at once. null: what they need, or half of what is free once the policy is loaded."""


class DistributedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimizer over the GPUs, 2 also the gradients, 3 also the weights."""
    offload_optimizer: bool = False
    """Keep the optimizer's float32 weights and moments in the machine's memory and update them there, under ZeRO 1 to 3. Frees 12
    bytes of GPU memory per trained weight, divided by the processes; each update then takes the CPU's time."""
    offload_parameters: bool = False
    """Keep the weights' shards in the machine's memory too, under ZeRO-3 only; they pass through the GPU layer by layer."""


class EvaluationConfig(Section):
    num_questions: NonNegativeInt = 0
    """Held-out questions, from the start of the evaluation set. 0: no evaluation."""
    every_steps: NonNegativeInt = 0
    """Evaluate after every so many steps, besides before the first and after the last. 0: only those two."""
    num_samples: PositiveInt = 1
    """Answers per held-out question (the paper: 16 or 64). Raising it makes pass@1 surer, gives pass@k, and costs time."""
    temperature: NonNegativeFloat = 0.0
    """Of the evaluation's sampling; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The evaluation draws from the fewest likeliest tokens that have this probability together (the paper: 0.95, at 0.6)."""


class PreflightConfig(Section):
    num_questions: NonNegativeInt = 32
    """Training questions that the untrained model answers before the first step, rollout.group_size times each, to see whether
    there is anything to learn from; see grpo/preflight.py. A run that has made a step does not repeat it. Raising it makes the
    verdict surer and the start slower. 0: no preflight."""
    on_failure: Literal["stop", "warn"] = "stop"
    """What to do if there is nothing to learn from. warn: say so and train all the same."""


class CheckpointConfig(Section):
    every_steps: NonNegativeInt = 50
    """Save after every so many steps, besides after the last. 0: only after the last."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: NonNegativeInt = 0
    """Besides them, those after every so many steps stay for good. 0: none."""
    background: bool = False
    """Write while training goes on, from a copy in the machine's memory: 16 bytes per weight over all processes of the run."""


Action = Literal["warn", "stop", "roll_back"]


class WatchdogConfig(Section):
    """What to do when a rule of grpo/watchdog.py, where their formulas are, has something to say. warn: print it. stop: end the
    run. roll_back: go on from the last checkpoint before the trouble, at a lower learning rate. The latter two leave a
    post-mortem. A run that nobody watches may want more than warnings. Where a schedule changes a setting by more than a quarter
    from one step to the next, what came before is no longer compared with."""

    not_finite: Action = "stop"
    """The loss or the gradient was not finite in max_skipped steps in a row. The updates themselves are always left out."""
    kl: Action = "warn"
    """The KL to the reference runs away."""
    entropy: Action = "warn"
    """The entropy collapses or explodes."""
    length: Action = "warn"
    """Completions run away or collapse in length. Completions that grow slowly are none of this."""
    truncation: Action = "warn"
    """Far more completions are cut off than before, or nearly all of them."""
    repetition: Action = "warn"
    """Far more of the completions is repetition than before, or nearly all of it."""
    reward: Action = "warn"
    """The mean reward is 0 or another constant, or has fallen to half and stays there."""
    signal: Action = "warn"
    """No group has rewards that differ, so the steps are for nothing."""
    patience: PositiveInt = 10
    """Steps over which a rule looks before it speaks. Raise it for small, noisy rollouts; lower it where a step is dear."""
    max_skipped: PositiveInt = 3
    """Steps in a row with left-out updates before `not_finite` acts. Raise it where single batches are known to be bad."""
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Every roll-back multiplies the learning rate by this. Lower it if the trouble comes back."""
    max_roll_backs: PositiveInt = 2
    """After so many roll-backs the run stops instead."""


class LoggingConfig(Section):
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases. Without a login `online` says so and goes on as `offline`."""
    wandb_project: str | None = None
    """Project of the W&B run. null: what WANDB_PROJECT says, else grpo. WANDB_ENTITY, WANDB_NAME and WANDB_RUN_ID hold too."""
    completions_every: NonNegativeInt = 1
    """Write all completions of every so many steps to completions.jsonl (and a sample to W&B). 0: never."""
    num_samples: NonNegativeInt = 2
    """Held-out questions whose answers before and after training are printed at the end."""
    tensorboard: bool = False
    """Also write curves, charts and some texts to `tensorboard/` in the run's directory; `pip install 'grpo[tensorboard]'`."""
    reflection_words: dict[str, list[str]] = Field(default_factory=dict)
    """Further lists of words to count in completions, as aha/<list> and so on: {planning: [the plan, my plan*]}. One named like a
    list of grpo/aha.py takes its place. What a word matches is said there."""


class RunConfig(Section):
    dir: Location
    """Where everything the run produces goes."""
    steps: PositiveInt
    """Training steps; one is a rollout of num_prompts questions and all its updates."""
    seed: NonNegativeInt = 0
    """Of the prompt order and the sampling."""
    deterministic: bool = True
    """Repeat and resume a run to the bit on the same GPUs. false: the backward pass of attention adds in whatever order."""
    max_hours: PositiveFloat | None = None
    """Save, stop and exit with 75 after so much time, as on SIGTERM; a start with `resume: auto` goes on. null: no limit."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest complete checkpoint in `dir`, or start there. never: a used `dir` is left alone and
    the next free of dir-2, dir-3, ... is taken."""
    accept_changes: bool = False
    """Resume although the questions or the source of the rewards are not those that the checkpoint was written with."""


class ScheduleConfig(Section):
    """Values of a setting over the run. They count in optimizer steps, as the paper does, and hold for a whole rollout: that of a
    training step is the one at the first of its updates."""

    points: dict[NonNegativeInt, float]
    """Value from an optimizer step on, for each step where it changes; one of them is 0. {0: 32768, 8200: 65536}"""
    interpolation: Literal["step", "linear"] = "step"
    """step: a value holds until the next. linear: a straight line from each point to the next; whole numbers are rounded."""

    def at(self, optimizer_step: int) -> float:
        """The value of the training step whose first update is this one, counted from 0."""
        before = max(step for step in self.points if step <= optimizer_step)
        after = min((step for step in self.points if step > optimizer_step), default=before)
        share = (
            (optimizer_step - before) / (after - before) if self.interpolation == "linear" and after > before else 0.0
        )
        return self.points[before] + share * (self.points[after] - self.points[before])


SCHEDULABLE = (
    "rollout.max_completion_tokens",
    "rollout.temperature",
    "algorithm.kl_coef",
    "algorithm.clip_low",
    "algorithm.clip_high",
)
"""Settings that may change over a run, besides `rewards.<number>.weight`."""

LOWEST_LORA_RATE = 1e-5
"""At this rate merged bfloat16 weights hold 2 % of a first update and 58 % of the sum of 26 (grpo/lora.py); below it, less."""


OF_THE_RATIO = ("ratio", "clip", "clip_low", "clip_high")
"""Settings of the algorithm without effect where the ratio is 1."""


class Config(Section):
    """Everything that defines a run.

    Raises:
        ValueError: an unknown key (with the nearest known one), a value of the wrong type or out of range, or a
            combination that cannot work.
    """

    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    vllm: VLLMConfig = Field(default_factory=VLLMConfig)
    rewards: list[RewardConfig] = Field(
        default_factory=lambda: [RewardConfig(function="accuracy"), RewardConfig(function="format")]
    )
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

    def __init__(self, **settings: Any) -> None:
        _refuse_unknown_keys(settings, type(self))
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(detail) for detail in error.errors())) from None
        _check_schedules(self)
        _check_combinations(self)
        for stage in self._stages():
            _check_rewards(stage)
            if self.rollout.engine == "vllm":
                _check_vllm_sampling(stage)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a YAML file and apply overrides such as `rollout.group_size=8`, in order.

        The value of an override is read as YAML; a list item is addressed by its number: `rewards.0.weight=0.5`.
        """
        if not Path(path).is_file():
            raise ValueError(f"--config is {str(path)!r}; there is no such file. Name one of the files in configs/.")
        settings = _load_yaml(read_text(Path(path), f"--config is {str(path)!r}"), str(path))
        for override in overrides:
            _apply_override(settings, override)
        return cls(**settings)

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump())

    def at(self, optimizer_step: int) -> Config:
        """The settings of the training step whose first update is this one."""
        config = self.model_copy(deep=True) if self.schedules else self
        for setting, schedule in self.schedules.items():
            section, name, is_whole = _scheduled(config, setting)
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
        places = {setting: _scheduled(self, setting) for setting in self.schedules}
        return {setting: getattr(section, name) for setting, (section, name, _) in places.items()}

    # What follows from the settings, each worked out here and nowhere else.

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
    def completions_per_step(self) -> int:
        return self.rollout.num_prompts * self.rollout.group_size

    @property
    def max_questions_per_step(self) -> int:
        return int(self.rollout.num_prompts * self.rollout.max_oversampling)

    @property
    def prompts_per_minibatch(self) -> int:
        return self.rollout.num_prompts // self.algorithm.num_minibatches

    @property
    def updates_per_rollout(self) -> int:
        return self.algorithm.num_minibatches * self.algorithm.num_epochs

    @property
    def optimizer_steps(self) -> int:
        return self.run.steps * self.updates_per_rollout

    @property
    def objective(self) -> Objective:
        """What the loss is made of."""
        return Objective(**{field.name: getattr(self.algorithm, field.name) for field in fields(Objective)})

    @property
    def kl_in_loss(self) -> bool:
        return self.algorithm.kl_coef > 0 and self.algorithm.kl_in == "loss"

    @property
    def every_token_counts(self) -> bool:
        """Whether the update has a use for completions whose advantage is 0: a gradient, or their place among the entropies."""
        return self.kl_in_loss or self.algorithm.entropy_coef > 0 or self.algorithm.top_entropy < 1

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_completion_tokens

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
                f"optimizer steps        {self.optimizer_steps:,} ({self.updates_per_rollout} per rollout, "
                f"{self.prompts_per_minibatch * rollout.group_size} completions each)",
                *refreshes,
                *self._without_ratio(),
                *self._without_restraint(),
                *self._never_reached(),
                *low_rate,
                *(dynamic if most > questions else []),
                f"questions in all       {questions:,} = {questions / num_rows:.2f} epochs of {num_rows:,}",
            ]
        )

    def _never_reached(self) -> list[str]:
        """Of schedules, what comes after the last rollout, as it does in a trial of a few steps."""
        last = self.optimizer_steps - self.updates_per_rollout
        late = {name: [step for step in each.points if step > last] for name, each in self.schedules.items()}
        return [
            f"schedule               {name}: optimizer step {min(steps)} comes after the last rollout, which begins at {last}"
            for name, steps in late.items()
            if steps
        ]

    def _without_ratio(self) -> list[str]:
        """That the ratio is 1 in every update, for whoever has set what becomes of it."""
        default = AlgorithmConfig.model_fields
        names = [
            name
            for name in OF_THE_RATIO
            if getattr(self.algorithm, name) != default[name].default or f"algorithm.{name}" in self.schedules
        ]
        if self.updates_per_rollout > 1 or not names:
            return []
        settings = ", ".join(f"algorithm.{name}" for name in names)
        return [f"strictly on-policy     the ratio is 1 in the only update of a rollout; no effect: {settings}"]

    def _without_restraint(self) -> list[str]:
        if not self.kl_in_loss or self.algorithm.kl_estimator != "k1":
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


def _scheduled(config: Config, setting: str) -> tuple[Section, str, bool]:
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


def _check_schedules(config: Config) -> None:
    """Every value that a setting will take is one that it may have; the setting itself becomes the largest."""
    for setting, schedule in config.schedules.items():
        section, name, is_whole = _scheduled(config, setting)
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


def _check_combinations(config: Config) -> None:
    rollout = config.rollout
    if rollout.group_size < 2:
        raise ValueError(
            f"rollout.group_size is {rollout.group_size}; group-relative advantages need at least 2 completions per "
            "prompt. Set rollout.group_size >= 2."
        )
    if rollout.max_oversampling > 1 and config.max_questions_per_step == rollout.num_prompts:
        raise ValueError(
            f"rollout.max_oversampling is {rollout.max_oversampling:g}; it allows not one question more than the "
            f"{rollout.num_prompts} of a step (rollout.num_prompts). Set it to 1, or to 2 or more."
        )
    if rollout.signal_from is not None and rollout.max_oversampling == 1:
        raise ValueError(
            f"rollout.signal_from is {rollout.signal_from!r}; it has no effect while rollout.max_oversampling is 1. Remove it, "
            "or set rollout.max_oversampling."
        )
    _check_updates(config)
    _check_objective(config.algorithm)
    _check_offload(config.distributed)
    _check_lora(config.lora)
    _check_watchdog(config)
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

COLUMN_IN_BRACES = re.compile(r"\{([^{}]+)\}")
"""A column's place in data.question_template; braces without anything between them, as in \\boxed{}, are text."""


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


def _check_rewards(config: Config) -> None:
    if any(reward.function == VOTE and reward.weight for reward in config.rewards):
        raise ValueError(
            f"rewards has {VOTE!r} with a weight; its values are names of answers and no rewards. Give it weight 0."
        )
    if not any(reward.weight for reward in config.rewards):
        raise ValueError(
            f"rewards is {[reward.function for reward in config.rewards]} without any weight; at least one reward must "
            "count for something, throughout the run. Give one of them a weight other than 0."
        )


def _check_updates(config: Config) -> None:
    """How a rollout is split into optimizer steps, and what follows them."""
    rollout, algorithm, memory = config.rollout, config.algorithm, config.memory
    if rollout.num_prompts % algorithm.num_minibatches:
        raise ValueError(
            f"algorithm.num_minibatches is {algorithm.num_minibatches}; the {rollout.num_prompts} questions of a step "
            "(rollout.num_prompts) must divide evenly into minibatches. Set it to a divisor of rollout.num_prompts."
        )
    if algorithm.reference_refresh_steps % config.updates_per_rollout:
        raise ValueError(
            f"algorithm.reference_refresh_steps is {algorithm.reference_refresh_steps}; the reference changes between rollouts "
            f"only, each of which has {config.updates_per_rollout} optimizer steps (algorithm.num_minibatches * num_epochs). Set "
            "it to a multiple of them."
        )
    if algorithm.reference_refresh_steps and algorithm.kl_coef == 0:
        raise ValueError(
            f"algorithm.reference_refresh_steps is {algorithm.reference_refresh_steps}; there is no reference, because "
            "algorithm.kl_coef is 0. Remove it, or set algorithm.kl_coef > 0."
        )
    if memory.micro_batch_tokens < config.max_sequence_tokens:
        raise ValueError(
            f"memory.micro_batch_tokens is {memory.micro_batch_tokens}; one sequence may have "
            f"{config.max_sequence_tokens} tokens (data.max_prompt_tokens + rollout.max_completion_tokens) and is never "
            f"split. Set memory.micro_batch_tokens >= {config.max_sequence_tokens}."
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


def _check_objective(algorithm: AlgorithmConfig) -> None:
    """Nothing in it contradicts the rest, or has no effect."""
    default = AlgorithmConfig.model_fields
    if algorithm.baseline == "leave_one_out" and algorithm.normalize_by_std:
        raise ValueError(
            "algorithm.baseline is 'leave_one_out'; divided by the standard deviation it would be GRPO's advantage again, "
            "times a constant. Set algorithm.normalize_by_std to false."
        )
    if algorithm.clip == "weight" and algorithm.clip_low is None and algorithm.clip_high is None:
        raise ValueError(
            "algorithm.clip is 'weight'; without clip_low and clip_high there is no bound, and surrogate has the same gradient. "
            "Set algorithm.clip_high, or remove algorithm.clip."
        )
    for name in ("kl_in", "kl_estimator"):
        if algorithm.kl_coef == 0 and getattr(algorithm, name) != default[name].default:
            raise ValueError(
                f"algorithm.{name} is {getattr(algorithm, name)!r}; there is no KL, because algorithm.kl_coef is 0. Remove it, "
                "or set algorithm.kl_coef > 0."
            )
    if algorithm.kl_in == "reward" and algorithm.normalize_by_std:
        raise ValueError(
            "algorithm.kl_in is 'reward'; divided by the standard deviation the KL would be as large as any reward in every "
            "group that is all right or all wrong, however small kl_coef is. Set algorithm.normalize_by_std to false."
        )
    if algorithm.kl_in == "reward" and algorithm.kl_estimator != "k1":
        raise ValueError(
            f"algorithm.kl_estimator is {algorithm.kl_estimator!r}; in the reward only k1 has the gradient of the KL. Set "
            "algorithm.kl_estimator to k1, or algorithm.kl_in to loss."
        )
    for name in ("importance_level", "importance_low", "importance_high"):
        if algorithm.importance == "none" and getattr(algorithm, name) != default[name].default:
            raise ValueError(
                f"algorithm.{name} is {getattr(algorithm, name)!r}; it has no effect while algorithm.importance is none. Set "
                "that to truncate or mask, or remove it."
            )
    low, high = algorithm.importance_low or 0.0, algorithm.importance_high
    if algorithm.importance != "none" and (high is None or not low < 1 < high):
        raise ValueError(
            f"algorithm.importance_high is {high} and importance_low {low:g}; with algorithm.importance {algorithm.importance} "
            "they are bounds of a weight that is 1 where nothing is wrong, so 1 must lie between them. Set them, such as to 2 "
            "and null (TIS), or 5 and 0.5 (IcePop)."
        )


def _check_offload(distributed: DistributedConfig) -> None:
    for name, lowest in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(distributed, name) and distributed.zero_stage < lowest:
            raise ValueError(
                f"distributed.{name} is true; DeepSpeed can do so from ZeRO stage {lowest} on, and distributed.zero_stage is "
                f"{distributed.zero_stage}. Set distributed.zero_stage to {lowest}{' or higher' * (lowest < 3)}, or remove it."
            )


def _check_lora(lora: LoRAConfig) -> None:
    for name, field in LoRAConfig.model_fields.items():
        if lora.rank == 0 and getattr(lora, name) != field.default:
            raise ValueError(
                f"lora.{name} is {getattr(lora, name)!r}; it has no effect while lora.rank is 0. Set lora.rank, or remove it."
            )
    if not lora.target_modules:
        raise ValueError("lora.target_modules is []; nothing would be trained. Name layers, or set it to all-linear.")


def _check_watchdog(config: Config) -> None:
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
    native = {"memory.kv_cache_gib": config.memory.kv_cache_gib, "rollout.fused_layers": config.rollout.fused_layers}
    for setting, value in native.items():
        if engine in ("hf", "vllm") and value is not None and value is not True:
            raise ValueError(
                f"{setting} is {value}; only the native engine reads it, and rollout.engine is {engine}. Remove it."
            )


def _check_vllm_sampling(config: Config) -> None:
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


FLOAT = re.compile(
    r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
INT = re.compile(r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
FIRST_OF_NUMBER = list("-+.0123456789")
_NUMBERS = {"tag:yaml.org,2002:int": INT, "tag:yaml.org,2002:float": FLOAT}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this one refuses them.

    And PyYAML reads numbers as YAML 1.1 does: 1e-3 is a text, 010 is 8, and 1:30 is 90. Here they are what YAML 1.2 says, and
    what one means by them: a thousandth, ten, and a text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in PyYAML)
        first: [each for each in found if each[0] not in _NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"{node.start_mark}: key {sorted(twice)[0]!r} is given twice. Keep one of them.")
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 10 if text.lstrip("+-").isdecimal() else 0)


class _StrictDumper(yaml.SafeDumper):
    """Quotes texts that the loader would take for numbers."""


for _tag, _pattern in _NUMBERS.items():
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern.pattern})$"), FIRST_OF_NUMBER)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_text(path: Path, setting: str) -> str:
    """A file that a person wrote.

    Args:
        setting: what names the file, and what it is, for the error.

    Raises:
        ValueError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}; the file cannot be read: {error}. Save it as UTF-8.") from error


def read_yaml(text: str) -> Any:
    """As a configuration is read. Raises ValueError for a key that is given twice, and yaml.YAMLError."""
    return yaml.load(text, _StrictLoader)


def write_yaml(value: Any, **options: Any) -> str:
    """So that `read_yaml` gives the value again."""
    return str(yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, **options))


def _load_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        settings = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{where} holds {settings!r}; a configuration is a mapping of sections. See configs/.")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"--set {override!r}: an override reads section.setting=value, such as run.steps=10.")
    node: Any = settings
    *parents, last = path.strip().split(".")
    for name in parents:
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        node = node[_child_key(node, name, path)]
    node[_child_key(node, last, path)] = _read_value(value, override)


def _read_value(text: str, override: str) -> Any:
    """The text as YAML; as it stands where YAML would take it for a comment, such as the pattern `####\\s*(.+)`."""
    if text.lstrip().startswith("#"):
        return text
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override!r}: {text!r} is not valid YAML: {error}. Quote it.") from None


def _child_key(node: Any, name: str, path: str) -> str | int:
    if isinstance(node, dict):
        return name
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return int(name)
    raise ValueError(f"--set {path}: there is no {name!r} to set in {node!r}.")


LISTED_SECTIONS: dict[str, type[BaseModel]] = {
    "rewards": RewardConfig,
    "data.name": SourceConfig,
    "data.eval_name": SourceConfig,
}
"""What an entry of a list is, where the entries of the list have settings."""


def _refuse_unknown_keys(settings: dict[str, Any], section: type[BaseModel], prefix: str = "") -> None:
    for key, value in settings.items():
        if key not in section.model_fields:
            raise ValueError(_unknown_key(f"{prefix}{key}", key, section, prefix))
        inner = section.model_fields[key].annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            _refuse_unknown_keys(value, inner, f"{prefix}{key}.")
        listed = LISTED_SECTIONS.get(f"{prefix}{key}")
        if listed is not None and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown_keys(item, listed, f"{prefix}{key}.{i}.")


def _unknown_key(spelled: str, key: str, section: type[BaseModel], prefix: str) -> str:
    """The nearest name within the section; else where in the whole tree a setting of that name lives."""
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(str(key), section.model_fields, n=1)]
    near = near or [name for name in setting_names() if name.split(".")[-1] == key]
    hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(section.model_fields)}."
    return f"{spelled} is not a setting. {hint}"


def as_override(text: str) -> str:
    """A text as the value of an override that reads it back: as it stands, unless YAML would take it for something else."""
    return text if _read_value(text, "") == text else json.dumps(text)


def setting_names() -> list[str]:
    """Every setting as `section.name`."""
    names = []
    for section, field in Config.model_fields.items():
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
    rule = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{spelled} is {detail['input']!r}; {rule}. Correct {spelled}."
