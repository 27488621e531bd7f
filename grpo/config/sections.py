"""The sections of a configuration: every setting with its type, default, unit and meaning.

A default lives here and nowhere else. What may not be combined is in combinations.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Tag,
    field_validator,
)

from grpo.config.section import Section

Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Location = Annotated[str, AfterValidator(os.path.expanduser)]
"""A hub id or a local path, which may begin with `~`."""


class ModelConfig(Section):
    name: Location
    """Hub id or local directory of a causal language model in Hugging Face format; the policy starts from it. Or a run's
    directory (its newest checkpoint), a checkpoint, or a LoRA adapter of peft, which is trained further."""
    revision: str = "main"
    """Branch, tag or commit of a hub model. Pin it for a run that others should repeat."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights in the forward pass; the optimizer keeps float32 masters. auto: bfloat16 on CUDA, float32 on CPU."""
    float32_head: bool = False
    """Keep the logits of a bfloat16 model in float32, in the update and the native engine; else they are rounded to 8 bits, which
    is much of what the two differ by (MiniMax-M1, arXiv 2506.13585, section 3.2; ScaleRL, arXiv 2510.13786). Takes twice the
    memory for logits, of which memory.logprob_chunk_tokens exist at once."""
    resize_embeddings: bool = False
    """Where the tokenizer has tokens beyond the model's embedding matrix, give it rows for them, near the mean of the others.
    false: prompts with such tokens are refused."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model whose family transformers does not know. Read it first: it can do anything."""


class TeacherConfig(Section):
    """On-policy distillation: the policy samples, and learns from what another model makes of each of its tokens."""

    name: Location | None = None
    """A model, named as in `model.name`, that takes the place of the reference: algorithm.kl_coef weighs the KL to it. With
    algorithm.kl_estimator k2 the gradient is that of a policy whose advantage is, for every token, log pi_teacher - log pi. Its
    vocabulary must be the policy's. null: the reference is the starting model."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""


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
    where: dict[str, Any] | None = None
    """Which of its rows are taken, in place of `data.where`; `{}`: all of them."""
    data_name: str | None = None
    """What its rows have in the column `data_name`, by which rewards (`only`) and metrics (`data.kind_column`) tell them apart.
    null: name, subset, split and where, as far as they are set here, with colons between them."""

    @property
    def label(self) -> str:
        """What tells it from the others; rows have it as their column `data_name`."""
        if self.data_name is not None:
            return self.data_name
        rows = [f"{column}={values}" for column, values in (self.where or {}).items()]
        return ":".join(each for each in (self.name, self.subset, self.split, *rows) if each is not None)


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
    where: dict[str, Any] | None = None
    """Take only rows that have one of these values in each of these columns, which are named like `question_column`:
    `{level: [3, 4, 5], subject: Algebra}`. Compared is the text of the cell, and the value of a number, so 3, 3.0 and "3" are the
    same; a row that has nothing there is not taken. How many are left out is said at the start. null: all rows."""
    eval_where: dict[str, Any] | None = None
    """The same for held-out questions, with `eval_name` or without. null: all of them, whatever `where` says."""
    question_column: str = "question"
    """Column that holds the question: a text, or a list of chat messages, which data.template `chat` renders. What lies deeper is
    named with dots: `extra_info.question`, `messages.0.content`. grpo/data/cells.py has the text of each kind of cell."""
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
    """How a question becomes a prompt; see grpo/data/prompts.py. `chat` is the tokenizer's own chat template."""
    system_prompt: str | None = None
    """System message of the `chat` template."""
    chat_template: Location | None = None
    """File with the Jinja text of a chat template that takes the place of the tokenizer's; checkpoints hold it. `chat` only."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides messages, such as {enable_thinking: false}. `chat` only."""
    kind_column: str | None = None
    """Column that says what kind of question a row is, such as `kind` or, of several sources, `data_name`. Rewards, held-out
    answers and language consistency then have metrics of each kind besides those of all. null: of all only."""
    order_by: str | None = None
    """Column by which the questions of the first order_epochs epochs are dealt, the smallest value first: a curriculum, such as
    by `level`. `-level`: the largest first. It holds numbers, or texts as an alphabet has them, for every question; those of
    equal value come in a seeded order. null: all do."""
    order_epochs: PositiveInt = 1
    """Epochs in the order of order_by; those after them have a seeded one."""
    max_prompt_tokens: PositiveInt = 512
    """Rows whose prompt is longer are dropped, and counted."""
    pass_rates: Location | None = None
    """File with how often a model has answered each training question right, as `grpo reject` writes it (*.pass_rates.jsonl).
    Questions are found in it by text and gold answer; those it does not know are left out, and counted. null: all questions."""
    pass_rate: tuple[Share, Share] = (0.0, 1.0)
    """Of `pass_rates`, the least and the largest share of right answers of a question to train on, both included: [0.1, 0.9]
    leaves out what is too hard or too easy to learn from."""

    @field_validator("name", "eval_name", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """An entry of a list may be a bare name."""
        return (
            [{"name": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value
        )

    _tools: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools that prompts tell of."""
        return self._tools

    def with_tools(self, schemas: list[dict[str, Any]]) -> DataConfig:
        """The same for prompts that tell the model of tools."""
        data = self.model_copy()
        data._tools = schemas
        return data

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
    this multiple of num_prompts questions was sampled in the step; see dynamic_sampling.py. 1: num_prompts questions,
    whatever their rewards. Raising it fills more batches with signal and costs rollout time."""
    signal_from: str | None = None
    """Name of the reward whose values must differ in a group that dynamic sampling takes, and which says which questions are
    solved. null: what says what is right (scoring.verdict); for dynamic sampling only what has a weight, and where that knows
    nothing of a question, as of another kind, the next reward that is not about manners. Choosing by a reward for length or form
    fills batches with groups that teach only that."""
    solved_share: Share = 1.0
    """Share of their turns at which solved questions are asked; at the others the next question is, and group/passed_over counts.
    A question is solved as long as solved_from of the answers that it had last are right. 1: all questions are alike. 0: what is
    solved is not asked again, unless too few others are left (ScaleRL, arXiv 2510.13786). Lowering it spends less on groups that
    teach nothing, and notices later what is forgotten."""
    solved_from: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of right answers, those of value 1, from which on a question is solved (ScaleRL: 0.9). Where unknown ones decide it,
    it stays what it was."""
    hopeless_share: Share = 1.0
    """The same for hopeless questions, of which not one of the answers that they had last was right: asked at this share of their
    turns. Lowering it spends less on groups that teach nothing, and notices later what has come within reach; 0 never does."""
    carry_over: bool = False
    """Give places that fall free while the last completions of a batch run to those of later questions, which go on from there in
    their own step: no place waits for the longest answer. The batch is the next questions in dealt order as ever. Its tokens are
    then partly older weights', which algorithm.importance weighs; see training/carry_over.py. Needs the native engine."""
    max_staleness: PositiveInt = 2
    """How many steps ahead carry_over may begin with a question, so that no token is older. Raising it keeps the GPU busier where
    few answers are much longer than the rest, and trains on older tokens."""
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
    optional extra. auto: native if it supports the model, else hf."""
    fused_layers: bool = True
    """Let the native engine run its fused kernels for the families it has them for. false: the model's own layers."""
    weights: Literal["policy", "fp8"] = "policy"
    """What training rollouts are sampled with. policy: its weights as they are. fp8: a copy of the layers' weights in 8 bits,
    made anew for every rollout, which algorithm.importance weighs. Faster for models of some billion weights, on GPUs from Ada
    and Hopper on; see rollout/fp8.py. Evaluation samples with the policy's own."""

    @property
    def passes_over(self) -> bool:
        """Whether some questions are not asked at each of their turns."""
        return min(self.solved_share, self.hopeless_share) < 1


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
    only: dict[str, list[str]] = Field(default_factory=dict)
    """Which questions it is asked about, by columns of the data: `{kind: math}`, or several values, `{kind: [chat, writing]}`.
    Others it has no part in: their reward is the sum over the functions that are asked. Empty: all questions."""
    form: Literal["completion", "texts", "messages"] | None = None
    """How it is called. completion: once for each, as text. texts, messages: once for a group, with lists of texts, or of
    messages as TRL has them in conversations. null: as its parameters and their annotations say; see scoring/binding.py."""

    @field_validator("only", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """A single value needs no list, and a number or `true` is what it is as text in JSON."""
        if not isinstance(value, dict):
            return value
        listed = {name: each if isinstance(each, list) else [each] for name, each in value.items()}
        return {name: [as_text(item) for item in each] for name, each in listed.items()}


def as_text(value: Any) -> Any:
    """A plain value of a column as it is compared: true and 1 as JSON has them."""
    return json.dumps(value) if isinstance(value, (bool, int, float)) else value


class ToolConfig(Section):
    function: Location
    """A name in tools/, `module:function`, or `path/to/file.py:function`; or a class. What lies beside a file can be imported
    there."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the function that are not the model's to choose; of a class, those that its objects are made with."""


class ToolsConfig(Section):
    """What the model can call; docs/tools.md says how. Tools run in processes like rewards, with scoring.num_workers of them,
    scoring.memory_gib and scoring.environment."""

    functions: list[ToolConfig] = Field(default_factory=list)
    """Tools: `[calculator, my_tools.py:lookup]`, where an entry may be a mapping, ToolConfig: `{function: python, args: {seconds:
    2}}`. Empty: none."""
    max_calls: PositiveInt = 8
    """Calls of a completion. One that asks for more ends there, with finish_reason "calls"."""
    max_result_tokens: PositiveInt = 256
    """Of a call's result; the rest is cut off. Results count towards rollout.max_completion_tokens."""
    timeout_seconds: PositiveFloat = 5.0
    """Wall-clock limit of a call; then its process is ended, and the result says so."""

    @field_validator("functions", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """An entry may be a bare name."""
        return (
            [{"function": each} if isinstance(each, str) else each for each in value]
            if isinstance(value, list)
            else value
        )


class EnvironmentConfig(Section):
    """What answers the model's turns; docs/environments.md says how. It runs in processes as tools do."""

    function: Location | None = None
    """A name in tools/environments/, `module:Class`, or `path/to/file.py:Class`. null: a completion is one turn."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What its objects are made with."""
    rows: dict[str, Any] = Field(default_factory=dict)
    """Questions of its own, where data.name is null: what its `rows` is given, such as {size: 1000, seed: 0}."""
    max_turns: PositiveInt = 8
    """Turns of the model in a completion. One whose environment would go on then ends with finish_reason "turns"."""
    max_reply_tokens: PositiveInt = 256
    """Of what it says to a turn; the rest is cut off. It counts towards rollout.max_completion_tokens."""
    reply_template: str | None = None
    """How what it says is put to the model, `{text}` in it. null: as data.template has it; data.template none needs it."""
    timeout_seconds: PositiveFloat = 5.0
    """Wall-clock limit of a step; then its process is ended, and so is the completion, with an unknown reward."""
    weight: float = 1.0
    """Factor of its reward in the sum, beside `rewards`. 0: only logged."""


class ScoringConfig(Section):
    verdict: str | list[str] | None = None
    """Name of the reward that says what is right, which a value of 1 or more means. Questions of several kinds have one each:
    [accuracy, code]; a question is judged by the first of them that knows something of it. Pass rates, lengths of right answers,
    reports, rejection and the choice of questions (rollout.signal_from) go by it. null: `accuracy`, or else that of an
    environment, or else the first that is not about manners (docs/rewards.md)."""
    num_workers: PositiveInt = 2
    """Reward worker processes per training process."""
    timeout_seconds: PositiveFloat = 10.0
    """Wall-clock limit for one completion and one function; then the worker is killed and the verdict is "can't tell"."""
    memory_gib: PositiveFloat = 4.0
    """Address space that reward calls may take in a worker, on top of what importing the functions took."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that rewards need, such as [JUDGE_API_KEY]. Workers are given these, and paths, languages
    and caches (INHERITED in grpo/scoring/worker_pool.py), and nothing else of the environment."""


class LoRAConfig(Section):
    rank: NonNegativeInt = 0
    """Train low-rank adapters of this rank and leave the model's weights as they are; see lora.py. 0: train all weights.
    Adapters need a higher optimizer.learning_rate, ten times that of all weights or more: in bfloat16 the smallest updates
    have no effect until they add up."""
    alpha: PositiveFloat = 32.0
    """What adapters add is multiplied by alpha / rank. Raising it acts like a higher learning rate."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get adapters, such as [q_proj, v_proj]. all-linear: all but the output layer."""
    quantization: Literal["nf4"] | None = None
    """nf4: the update and the reference read the weights of adapted layers in 4 bits (QLoRA), a quarter of what they took.
    Sampling keeps its copy in the model's precision, of what these stand for. Needs `pip install 'bitsandbytes>=0.50'`."""


class MemoryConfig(Section):
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass of one process, a prompt counted once for all its completions; processes that run it
    together (distributed.sequence_parallel) have as many each. Results do not depend on it; passes below 32,768 tokens leave a
    fast GPU waiting for the host on small models."""
    logprob_chunk_tokens: PositiveInt = 4096
    """Completion tokens whose logits over the vocabulary exist at once, in the model's precision. Results do not depend on it."""
    activation_checkpointing: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the layers whose activations are computed again in the backward pass instead of kept. 1: all, least memory; 0:
    none, a sixth faster; docs/performance.md has the cost of both. Results do not depend on it."""
    max_sequences: PositiveInt = 256
    """Completions that one process samples at once. Raising it uses the GPU better, and takes memory for keys and values."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory of one process for the native engine's keys and values, kept through the run if release_kv_cache is false. With less
    than max_sequences completions need, fewer run at once. null: what they need, or half of what is free once the policy is
    loaded."""
    release_kv_cache: bool = False
    """true: that memory goes back to the GPU after each rollout and is taken again for the next, so that the reference and the
    update have it. The peak is then the largest phase, and not the largest with keys and values besides: kv_cache_gib may be
    larger than by default, or the passes may. Takes some time in each step. Samples do not depend on it. Needs a GPU."""


class DistributedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimizer over the GPUs, 2 also the gradients, 3 also the weights."""
    offload_optimizer: bool = False
    """Keep the optimizer's float32 weights and moments in the machine's memory and update them there, under ZeRO 1 to 3. Frees 12
    bytes of GPU memory per trained weight, divided by the processes; each update then takes the CPU's time."""
    offload_parameters: bool = False
    """Keep the weights' shards in the machine's memory too, under ZeRO-3 only; they pass through the GPU layer by layer."""
    sequence_parallel: PositiveInt = 1
    """Processes that run each pass of the update together, each with its share of the tokens and, in attention, of the heads
    (DeepSpeed-Ulysses): for sequences whose activations are too large for one GPU. A pass has up to memory.micro_batch_tokens for
    each of them. It divides the number of processes and of the model's attention heads. Sampling does not change."""


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
    there is anything to learn from; see preflight.py. A run that has made a step does not repeat it. Raising it makes the
    verdict surer and the start slower. 0: no preflight."""
    on_failure: Literal["stop", "warn"] = "stop"
    """What to do if there is nothing to learn from. warn: say so and train all the same."""


class CheckpointConfig(Section):
    every_steps: NonNegativeInt = 50
    """Save after every so many steps, besides after the last. 0: only after the last."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk; fewer where it is full, and the newest always."""
    keep_every: NonNegativeInt = 0
    """Besides them, those after every so many steps stay for good. 0: none."""
    background: Literal["auto"] | bool = "auto"
    """Write while training goes on, from a copy in the machine's memory: 16 bytes per weight over all processes of the run. auto:
    on GPUs, if each machine's part of the copy takes at most a third of its available memory when the checkpoint is due. What
    the run waits for, such as a save after a signal, is written at once."""


Action = Literal["warn", "stop", "roll_back"]


class WatchdogConfig(Section):
    """What to do when a rule of watchdog.py, where their formulas are, has something to say. warn: print it. stop: end the
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
    loss: Action = "warn"
    """Of supervised training (`grpo sft`): the loss of the rows runs away."""
    signal: Action = "warn"
    """No group has rewards that differ, so the steps are for nothing."""
    reward_hacking: Action = "warn"
    """One odd form of answer_forms.py takes over the right answers (sums that are not worked out, lists, empty thoughts), or the
    right answers increase while those that state the gold answer do not. Some such answers are printed: read them. Nothing is
    said where `code`, `countdown` or `reasoning_gym` decide what is right, whose answers are whatever does the task."""
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
    """Also write curves, charts and some texts to `tensorboard/` in the run's directory; it needs
    `pip install 'tensorboard>=2.20'`."""
    reflection_words: dict[str, list[str]] = Field(default_factory=dict)
    """Further lists of words to count in completions, as aha/<list> and so on: {planning: [the plan, my plan*]}. One named like a
    list of grpo/text/aha.py takes its place. What a word matches is said there."""


class PlaceConfig(Section):
    """Where a run goes, and how it goes on."""

    dir: Location
    """Where everything the run produces goes."""
    seed: NonNegativeInt = 0
    """Of the order of questions or rows, and of the sampling."""
    deterministic: bool = True
    """Repeat and resume a run to the bit on the same GPUs. false: the backward pass of attention adds in whatever order, and a
    completion goes on as soon as its tool calls are answered, whatever is sampled beside it."""
    max_hours: PositiveFloat | None = None
    """Save, stop and exit with 75 after so much time, as on SIGTERM; a start with `resume: auto` goes on. null: no limit."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest complete checkpoint in `dir`, or start there. never: a used `dir` is left alone and
    the next free of dir-2, dir-3, ... is taken."""
    accept_changes: bool = False
    """Resume although the questions, or the source of the rewards or of another function, are not those that the checkpoint was
    written with."""
    push_to_hub: str | None = None
    """A model of the hub, such as `user/name`, to push the result to, with a card; its completions become the data set
    `user/name-completions`. Without a login or a network a line says so, and the run goes on."""
    push_at: Literal["end", "checkpoint"] = "end"
    """checkpoint: push every checkpoint too, in the background. Each is a revision: the tag `step-N`."""
    hub_private: bool = True
    """Make repositories that are not there yet visible to their owner alone."""

    def check_dir(self) -> None:
        """Raises ValueError if a file lies where the run's directory, or a folder above it, is to be."""
        for path in (place := Path(self.dir), *place.parents):
            if path.exists() and not path.is_dir():
                where = "it is" if path == place else f"{str(path)!r} is"
                raise ValueError(
                    f"run.dir is {self.dir!r}; {where} a file, and everything that a run produces goes into a directory. Name "
                    "another."
                )


class RunConfig(PlaceConfig):
    steps: PositiveInt
    """Training steps; one is a rollout of num_prompts questions and all its updates."""


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
