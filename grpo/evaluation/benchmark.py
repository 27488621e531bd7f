"""A model answers benchmarks as DeepSeek-R1's evaluation does: several samples of each question at temperature 0.6, in whatever
templates are asked for. `grpo evaluate` is the command.

    OUT/settings.json     what is asked of which model; another start with the same goes on where this one ended
    OUT/samples.jsonl     every sample with its verdict
    OUT/results.json      the numbers with their intervals

A question's samples are a function of the settings and its place in the benchmark alone: an evaluation that was interrupted
ends with the same samples as one that was not, on any number of processes, up to the rounding of the engine.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import xxhash

from grpo.config import DataConfig, EnvironmentConfig, ModelConfig
from grpo.config.sections import ScoringConfig
from grpo.data import registry as benchmarks
from grpo.data.prompts import build_prompts
from grpo.evaluation.asked import PROMPT_FORMATS, Runtime, Settings, Task
from grpo.evaluation.results import QUESTION_KEYS, as_json, conclude, earlier_results, seconds_of
from grpo.evaluation.sample_file import Book, Samples, claimed, finished
from grpo.inference import model as inference
from grpo.inference.options import run_directory, settings_of
from grpo.inference.resolve_model import num_positions
from grpo.observe.bar import Bar, check_rows
from grpo.policy.tokenizer import check_vocabulary, load_tokenizer
from grpo.run.inputs import of_environment, of_tools, plain
from grpo.scoring.answers import answer_in_parts
from grpo.scoring.reward import Reward, resolve_function
from grpo.scoring.scorer import Scorer
from grpo.system import distributed
from grpo.system.distributed import Processes
from grpo.system.out_of_memory import retry_with_fewer_sequences
from grpo.system.terminal import say
from grpo.turns.environment import Environment, own_rows
from grpo.turns.form import form_of, reply_form
from grpo.turns.generator import TurnGenerator
from grpo.turns.named import named
from grpo.turns.runner import OBSERVATION
from grpo.turns.toolbox import Toolbox
from grpo.types import VOTE, Generator, Prompt


def default_out(model: str) -> Path:
    """A run's own evaluations lie in its directory, those of other models in evaluations/.

    Args:
        model: what `inference.model_directory` returns.
    """
    path = Path(model)
    if path.name == "hf" and path.parent.parent.name == "checkpoints":
        return path.parents[2] / "evaluation" / path.parent.name
    return Path("evaluations") / (path.resolve().name if path.exists() else model.replace("/", "--"))


OPTIONS = {
    "rollout.max_completion_tokens": "--max-tokens",
    "memory.max_sequences": "--max-sequences",
    "memory.kv_cache_gib": "--kv-cache-gib",
    "rollout.engine": "--engine",
    "model.name": "--model",
    "data.template": "--templates",
    "data.max_prompt_tokens": "the longest prompt",
    "Lower one of the two": "Lower --max-tokens",
    ", or raise distributed.zero_stage on more GPUs": "",
    ", or set model.resize_embeddings to true to add untrained rows": "",
    "ame a file with another chat template (data.chat_template)": "ame other --templates",
    " and say it in data.question_template": "",
    "data.system_prompt": "--system-prompt",
    "tools.functions": "--tools",
    "environment.function": "--environment",
    "environment.reply_template": "reply_template of --environment",
    "environment.args": "args of --environment",
    "environment.rows": "rows of --environment",
}
"""What a setting of a run's configuration is called here."""


@contextmanager
def _options_named() -> Iterator[None]:
    """Let what is wrong with a setting be said of the option that was typed."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for setting, option in OPTIONS.items():
            text = text.replace(setting, option)
        if text == str(error):
            raise
        raise ValueError(text) from error


@_options_named()
def evaluate(settings: Settings, out: Path, runtime: Runtime, hosted: Asks | None = None) -> dict[str, Any]:
    """Answer what is not answered yet, and return what results.json holds. Every process calls it.

    Args:
        hosted: asks a model that is hosted elsewhere; None: the model is loaded here.

    Raises:
        ValueError: whatever is wrong with settings, data or model, before the model is loaded.
    """
    asks: Asks = OwnModel(settings, runtime) if hosted is None else hosted
    processes = distributed.join()
    played = asks.environment
    rows = processes.on_main(lambda: _every_row(settings, played))
    with _scorers(settings, runtime, played) as scorers, ExitStack() as held:
        tasks = [
            _task(settings, name, template, rows[name], asks, scorers[PROMPT_FORMATS[template].source], processes)
            for name in rows
            for template in settings.templates
        ]
        settings = asks.prepared(settings, [prompt for task in tasks for prompt in task.prompts])
        for scorer in scorers.values():
            scorer.max_completion_tokens = settings.sampling.max_tokens
        processes.on_main(lambda: held.enter_context(_claimed(out, settings, rows, asks)))
        wanted = {key: task.num_samples for task in tasks for key in task.keys}
        done = processes.on_main(lambda: finished(out / "samples.jsonl", QUESTION_KEYS, wanted))
        results = processes.on_main(lambda: earlier_results(out))
        generator = asks.start(out)
        samples = Samples(out / "samples.jsonl", list(tasks[0].key))
        for task in tasks:
            started = time.perf_counter()
            answering = asks.around(generator, task.template)
            _answer(task, done, answering, scorers[PROMPT_FORMATS[task.template].source], settings, out, processes)
            processes.barrier()
            is_new = done.isdisjoint(task.keys)
            seconds = time.perf_counter() - started if is_new else seconds_of(results, task)
            # the others wait for it, so that nobody writes the next task's samples while these are read
            concluded = partial(conclude, task, results, settings, out, samples=samples, seconds=seconds)
            results = processes.on_main(concluded)
    return as_json(settings, results)


class Asks(Protocol):
    """Who asks a model: one that is loaded here, or one that is hosted elsewhere."""

    environment: Environment | None  # that answers its turns

    def prompts(self, rows: list[dict[str, Any]], data: DataConfig, put: Callable[[str], str]) -> list[Prompt]:
        """Of the rows of a benchmark, in their order.

        Args:
            put: a question as it is asked.
        """
        ...

    def prepared(self, settings: Settings, prompts: list[Prompt]) -> Settings:
        """With the most tokens of a completion, once all prompts are known. Raises ValueError if they do not fit."""
        ...

    def files(self) -> str:
        """What tells the model from others of its name."""
        ...

    def tool_sources(self) -> dict[str, str]:
        """A digest of the source of each tool, and of the environment."""
        ...

    def start(self, out: Path) -> Generator:
        """What answers."""
        ...

    def around(self, generator: Generator, template: str) -> Generator:
        """The same with tools and the environment, for prompts of that template."""
        ...


class OwnModel:
    """A model that is loaded here."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.runtime = runtime
        self.model = ModelConfig(
            name=settings.model, revision=settings.revision, trust_remote_code=runtime.trust_remote_code
        )
        self.tokenizer = load_tokenizer(self.model)
        self.tools = named(settings.tools)
        answers = EnvironmentConfig(**(settings.environment or {}))
        self.environment = Environment.of(answers)
        scoring = ScoringConfig(num_workers=runtime.num_workers)
        formats = dict.fromkeys(PROMPT_FORMATS[name].template for name in settings.templates)
        self.forms = {
            template: form_of(self.tokenizer, DataConfig(template=template))  # type: ignore[arg-type]
            for template in (formats if settings.tools else ())
        }
        self.reply_forms = {
            template: reply_form(
                self.tokenizer,
                DataConfig(template=template),  # type: ignore[arg-type]
                answers.reply_template,
            )
            for template in (formats if self.environment is not None else ())
        }
        self.toolbox = Toolbox.of(self.tools, scoring, environment=self.environment)
        if self.toolbox is not None and os.environ.get("RANK", "0") == "0":
            for notice in self.toolbox.notices():
                say(notice)

    def prompts(self, rows: list[dict[str, Any]], data: DataConfig, put: Callable[[str], str]) -> list[Prompt]:
        told = data if self.toolbox is None else data.with_tools(self.toolbox.schemas)
        observed = rows if self.toolbox is None else self.toolbox.observed(rows, data)
        asked = [{**row, "question": put(row["question"])} for row in observed]
        return build_prompts(asked, self.tokenizer, told)[0]

    def prepared(self, settings: Settings, prompts: list[Prompt]) -> Settings:
        asked = [prompt.token_ids for prompt in prompts]
        check_vocabulary(self.model, self.tokenizer, asked)
        longest = max(map(len, asked))
        if settings.max_completion_tokens is None:
            settings = replace(settings, max_completion_tokens=default_max_tokens(self.model, longest))
        self.config = inference.sampling_config(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            max_prompt_tokens=longest,
            max_completion_tokens=settings.sampling.max_tokens,
            engine=self.runtime.engine,
            max_sequences=self.runtime.max_sequences,
            kv_cache_gib=self.runtime.kv_cache_gib,
            trust_remote_code=self.runtime.trust_remote_code,
        )
        return settings

    def files(self) -> str:
        return inference.fingerprint(self.model.name, self.model.revision)

    def tool_sources(self) -> dict[str, str]:
        return {} if self.toolbox is None else of_tools(self.toolbox.runners) | of_environment(self.environment)

    def start(self, out: Path) -> Generator:
        return inference.load(self.config, self.tokenizer).generator

    def around(self, generator: Generator, template: str) -> Generator:
        if self.toolbox is None:
            return generator
        kind = PROMPT_FORMATS[template].template
        forms = self.forms.get(kind), self.reply_forms.get(kind)
        return TurnGenerator(generator, self.toolbox, forms[0], self.tokenizer, self.tools, forms[1])


MOST_TOKENS = 4096
"""Of a completion, by default, where neither the run nor the model allows fewer."""


def default_max_tokens(model: ModelConfig, longest_prompt: int) -> int:
    """The run's own limit if the model comes from one, else MOST_TOKENS; less where the model knows too few positions for it.

    Raises:
        ValueError: the longest prompt leaves no room for a completion.
    """
    run = run_directory(model.name)
    usual = MOST_TOKENS if run is None else settings_of(run / "config.yaml").sampling.max_tokens
    positions = num_positions(model)
    if positions is None:
        return usual
    if positions <= longest_prompt:
        raise ValueError(
            f"--model is {model.name!r}, which knows {positions} positions; the longest prompt has {longest_prompt} tokens, "
            "which leaves none for an answer. Leave long questions out of the data, or take another model."
        )
    return min(usual, positions - longest_prompt)


# ---- the questions ---------------------------------------------------------------------------------------------------


def _every_row(settings: Settings, environment: Environment | None) -> dict[str, list[dict[str, Any]]]:
    """By the name of a benchmark, or of an environment whose own questions are asked: the held-out ones."""
    if settings.benchmarks or environment is None:
        return {name: _rows(settings, name, every_column=environment is not None) for name in settings.benchmarks}
    own = own_rows(environment, DataConfig(), evaluation=True, reads_answer=False)
    if own is None:
        raise ValueError(
            f"--environment is {environment.runner.name!r}, which brings no questions of its own. Name some to play it on: "
            "--benchmarks gsm8k, or --benchmarks mine --data mine=questions.jsonl."
        )
    return {environment.runner.name: own[: settings.num_questions]}


def _rows(settings: Settings, name: str, *, every_column: bool) -> list[dict[str, Any]]:
    return benchmarks.load(name, settings.data.get(name), every_column=every_column)[: settings.num_questions]


@contextmanager
def _scorers(settings: Settings, runtime: Runtime, environment: Environment | None) -> Iterator[dict[str, Scorer]]:
    """By where they look for the answer."""
    sources = {PROMPT_FORMATS[template].source for template in settings.templates}
    scorers = {
        source: _scorer(_verdicts(source, settings) if environment is None else [environment.reward], settings, runtime)
        for source in sorted(sources)
    }
    try:
        yield scorers
    finally:
        for scorer in scorers.values():
            scorer.close()


def _verdicts(source: str, settings: Settings) -> list[Reward]:
    rewards = [
        Reward(resolve_function("accuracy"), args={"source": source}),
        Reward(resolve_function("format"), weight=0),
    ]
    if any(settings.samples_of(name) > 1 for name in settings.benchmarks):
        rewards.append(Reward(resolve_function(VOTE), weight=0, args={"source": source}))
    return rewards


def _scorer(rewards: list[Reward], settings: Settings, runtime: Runtime) -> Scorer:
    return Scorer(
        rewards,
        columns=["question", "answer"],
        max_completion_tokens=settings.max_completion_tokens or MOST_TOKENS,  # to be set once the prompts are known
        num_workers=runtime.num_workers,
        timeout_seconds=runtime.timeout_seconds,
        memory_gib=4.0,
    )


def _task(
    settings: Settings,
    name: str,
    template: str,
    rows: list[dict[str, Any]],
    asks: Asks,
    scorer: Scorer,
    processes: Processes,
) -> Task:
    how = PROMPT_FORMATS[template]
    system_prompt = settings.system_prompt if how.template == "chat" else None
    data = DataConfig(template=how.template, system_prompt=system_prompt, max_prompt_tokens=NO_LIMIT)  # type: ignore[arg-type]
    prompts = asks.prompts(rows, data, lambda question: settings.put(question, how))
    reasons = processes.on_main(lambda: check_rows(scorer, rows))
    own = [
        replace(
            prompt,
            columns=rows[prompt.row]
            | {name: said for name, said in prompt.columns.items() if name == OBSERVATION},  # of a `reset`
            seed=random.Random(f"{settings.seed} {name} {template} {prompt.row}").getrandbits(62),
        )
        for prompt in prompts
        if reasons[prompt.row] is None
    ]
    if not own:
        raise ValueError(
            f"--benchmarks {name}: not one of the {len(rows)} questions has an answer that can be graded; the first: "
            f"{reasons[0]}. Correct the column answer of the data."
        )
    return Task(name, template, settings.samples_of(name), own, len(rows) - len(own))


NO_LIMIT = 2**30
"""Tokens of a prompt: no question is left out for its length; the model's own limit is checked before it is loaded."""


# ---- the answers -----------------------------------------------------------------------------------------------------


def _answer(
    task: Task,
    done: set[tuple[str, str, int]],
    generator: Generator,
    scorer: Scorer,
    settings: Settings,
    out: Path,
    processes: Processes,
) -> None:
    """Answer this process's share of what is not done, and write it down as it comes."""
    left = [each for each, key in zip(task.prompts, task.keys, strict=True) if key not in done]
    mine = left[processes.rank :: processes.world_size]
    if not left:
        return
    if processes.is_main:
        again = f", {len(task.prompts) - len(left):,} of them before" * (len(left) < len(task.prompts))
        say(f"{task.benchmark}, {task.template}: {len(task.prompts):,} questions x {task.num_samples}{again}")
    most_tokens = len(mine) * task.num_samples * settings.sampling.max_tokens
    name = f"{task.benchmark}, {task.template}"
    bar = Bar(name, total=len(mine), most_tokens=most_tokens, shown=processes.is_main)
    book = Book(out / "samples.jsonl", task.key, bar)

    def sample() -> None:
        answer_in_parts(
            [prompt for prompt in mine if prompt.row not in book.written],
            generator=generator,
            scorer=scorer,
            sampling=settings.sampling,
            num_samples=task.num_samples,
            seed=settings.seed,
            on_rows=book.add,
        )

    try:
        with bar:
            retry_with_fewer_sequences(sample, generator, rank=processes.rank)
    finally:
        book.flush()


def _claimed(
    out: Path, settings: Settings, rows: dict[str, list[dict[str, Any]]], asks: Asks
) -> AbstractContextManager[None]:
    wanted = {
        **asdict(settings),
        "model_files": asks.files(),
        **({"tool_sources": sources} if (sources := asks.tool_sources()) else {}),
        "questions": {
            name: xxhash.xxh3_128(json.dumps(own, default=plain).encode()).hexdigest() for name, own in rows.items()
        },
    }
    return claimed(out, wanted, option="--out", difference=_difference, results=["results.json"])


def _difference(name: str, before: Any, now: Any) -> str:
    if name in CONTENTS:
        return f"{CONTENTS[name]} since the evaluation there began"
    return f"the evaluation there has {_option(name)} {before!r}, and this one {now!r}"


CONTENTS = {
    "model_files": "the files of --model have changed",
    "questions": "the questions of --benchmarks, --data or --environment have changed",
    "tool_sources": "the source of a tool of --tools or of the --environment has changed",
}


def _option(name: str) -> str:
    """How `grpo evaluate` spells a field of Settings."""
    own = {"num_samples": "--samples", "num_questions": "--questions", "max_completion_tokens": "--max-tokens"}
    return own.get(name) or "--" + name.replace("_", "-")
