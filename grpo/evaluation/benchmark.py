"""A model answers benchmarks as DeepSeek-R1's evaluation does: several samples of each question at temperature 0.6, in whatever
templates are asked for. scripts/evaluate.py is the command.

    OUT/settings.json     what is asked of which model; another start with the same goes on where this one ended
    OUT/samples.jsonl     every sample with its verdict
    OUT/results.json      the numbers with their intervals

A question's samples are a function of the settings and its place in the benchmark alone: an evaluation that was interrupted
ends with the same samples as one that was not, on any number of processes, up to the rounding of the engine.
"""

from __future__ import annotations

import fcntl
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig, ModelConfig
from grpo.data import registry as benchmarks
from grpo.data.prompts import build_prompts
from grpo.inference import model as inference
from grpo.policy.tokenizer import check_vocabulary, load_tokenizer
from grpo.scoring.answers import OF_THE_QUESTION, answer, by_question, columns_of, is_right
from grpo.scoring.reward import Reward, resolve_function
from grpo.scoring.scorer import Scorer
from grpo.scoring.statistics import estimate
from grpo.system import distributed
from grpo.system.distributed import Processes
from grpo.system.jsonl import append_jsonl, iterate_jsonl, json_line, read_jsonl
from grpo.system.out_of_memory import retry_with_fewer_sequences
from grpo.system.terminal import say
from grpo.system.writer import replace_text, to_json
from grpo.types import VOTE, Prompt, Sampling

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Presentation:
    """How a question is put to the model, and where its answer is looked for."""

    template: str  # see grpo/data/prompts.py
    source: str  # see rewards/accuracy.py
    suffix: str = ""  # of the question


PRESENTATIONS = {
    "r1_zero": Presentation("r1_zero", "answer_tag"),
    "r1_zero_think": Presentation("r1_zero_think", "answer_tag"),
    "chat": Presentation("chat", "anywhere"),
    "chat_boxed": Presentation("chat", "anywhere", BOXED),
    "none": Presentation("none", "anywhere"),
    "none_boxed": Presentation("none", "anywhere", BOXED),
}
"""By name. Only the paper's template asks for the tag, so only there it has to be; elsewhere a base is not held to a form."""

SOURCES = {
    "answer_tag": "the last <answer> </answer> only",
    "anywhere": "the last <answer> </answer>, else the last \\boxed{}, else the last number",
}


@dataclass(frozen=True)
class Settings:
    """What is asked, and all that the answers depend on."""

    model: str  # a directory or an id of the hub
    benchmarks: list[str]
    templates: list[str]
    data: dict[str, str] = field(default_factory=dict)  # a file for a benchmark
    revision: str = "main"
    num_samples: int | None = None  # None: what each benchmark recommends
    temperature: float = 0.6
    top_p: float = 0.95
    max_completion_tokens: int = 4096
    stop: list[str] = field(default_factory=list)  # texts that end a completion
    num_questions: int | None = None  # the first of each benchmark; None: all
    system_prompt: str | None = None  # of the chat templates; None: what the tokenizer's template says by itself
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError: a name that is not known, or settings that contradict each other."""
        benchmarks.check_names(self.benchmarks, self.data)
        for name in self.templates:
            if name not in PRESENTATIONS or self.templates.count(name) > 1:
                raise ValueError(
                    f"--templates has {name!r}; it is one of {', '.join(PRESENTATIONS)}, each at most once. Correct it."
                )
        if self.system_prompt is not None and not any(
            PRESENTATIONS[name].template == "chat" for name in self.templates
        ):
            raise ValueError(
                f"--system-prompt is {self.system_prompt!r}; only the chat templates have a system message, and --templates is "
                f"{','.join(self.templates)}. Remove it, or add chat or chat_boxed."
            )
        if self.revision != "main" and Path(self.model).is_dir():
            raise ValueError(
                f"--revision is {self.revision!r}; --model is the directory {self.model!r}, which has none, so it has no effect. "
                "Remove it."
            )
        if "" in self.stop:
            raise ValueError(
                '--stop has ""; every completion contains it and would end with its first token. Remove it.'
            )
        if self.temperature == 0 and (self.num_samples or 1) > 1:
            raise ValueError(
                f"--samples is {self.num_samples}; at --temperature 0 all samples of a question are the same. Set it to 1, or "
                "raise --temperature."
            )
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"--top-p is {self.top_p}; at --temperature 0 the likeliest token is taken and it has no effect. Remove it."
            )

    def samples_of(self, benchmark: str) -> int:
        """How often each question is answered."""
        if self.temperature == 0:
            return 1
        return self.num_samples or benchmarks.default_samples(benchmark)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.max_completion_tokens, temperature=self.temperature, top_p=self.top_p, stop=tuple(self.stop)
        )


@dataclass(frozen=True)
class Means:
    """What the answers do not depend on, but the time."""

    engine: str = "auto"
    max_sequences: int = 512
    kv_cache_gib: float | None = None
    num_workers: int = 2
    timeout_seconds: float = 10.0
    trust_remote_code: bool = False  # run the Python code that comes with the model


@dataclass(frozen=True)
class Paper:
    """One benchmark in one template."""

    benchmark: str
    template: str
    num_samples: int
    prompts: list[Prompt]
    num_ungradable: int  # questions left out, because their gold answer cannot be graded

    @property
    def key(self) -> dict[str, str]:
        return {"benchmark": self.benchmark, "template": self.template}

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """Of its questions."""
        return [(self.benchmark, self.template, prompt.row) for prompt in self.prompts]


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
def take(settings: Settings, out: Path, means: Means) -> dict[str, Any]:
    """Answer what is not answered yet, and return what results.json holds. Every process calls it.

    Raises:
        ValueError: whatever is wrong with settings, data or model, before the model is loaded.
    """
    model = ModelConfig(name=settings.model, revision=settings.revision, trust_remote_code=means.trust_remote_code)
    tokenizer = load_tokenizer(model)
    processes = distributed.join()
    rows = processes.on_main(lambda: {name: _rows(settings, name) for name in settings.benchmarks})
    with _scorers(settings, means) as scorers, ExitStack() as held:
        papers = [
            _paper(settings, name, template, rows[name], tokenizer, scorers[PRESENTATIONS[template].source], processes)
            for name in settings.benchmarks
            for template in settings.templates
        ]
        asked = [prompt.token_ids for paper in papers for prompt in paper.prompts]
        check_vocabulary(model, tokenizer, asked)
        longest = max(map(len, asked))
        config = inference.sampling_config(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype,
            max_prompt_tokens=longest,
            max_completion_tokens=settings.max_completion_tokens,
            engine=means.engine,
            max_sequences=means.max_sequences,
            kv_cache_gib=means.kv_cache_gib,
            trust_remote_code=means.trust_remote_code,
        )
        processes.on_main(lambda: held.enter_context(_claimed(out, settings, rows)))
        done = processes.on_main(lambda: _finished(out / "samples.jsonl", papers))
        sampler = inference.load(config, tokenizer)
        results = processes.on_main(lambda: _earlier_results(out))
        for paper in papers:
            started = time.perf_counter()
            _answer(paper, done, sampler, scorers[PRESENTATIONS[paper.template].source], settings, out)
            processes.barrier()
            is_new = done.isdisjoint(paper.keys)
            seconds = time.perf_counter() - started if is_new else _seconds(results, paper)
            # the others wait for it, so that nobody writes the next paper's samples while these are read
            results = processes.on_main(partial(_conclude, paper, results, settings, out, seconds=seconds))
    return _as_json(settings, results)


# ---- the questions ---------------------------------------------------------------------------------------------------


def _rows(settings: Settings, name: str) -> list[dict[str, Any]]:
    return benchmarks.load(name, settings.data.get(name))[: settings.num_questions]


@contextmanager
def _scorers(settings: Settings, means: Means) -> Iterator[dict[str, Scorer]]:
    """By where they look for the answer."""
    sources = {PRESENTATIONS[template].source for template in settings.templates}
    scorers = {source: _scorer(source, settings, means) for source in sorted(sources)}
    try:
        yield scorers
    finally:
        for scorer in scorers.values():
            scorer.close()


def _scorer(source: str, settings: Settings, means: Means) -> Scorer:
    rewards = [
        Reward(resolve_function("accuracy"), args={"source": source}),
        Reward(resolve_function("format"), weight=0),
    ]
    if any(settings.samples_of(name) > 1 for name in settings.benchmarks):
        rewards.append(Reward(resolve_function(VOTE), weight=0, args={"source": source}))
    return Scorer(
        rewards,
        columns=["question", "answer"],
        max_completion_tokens=settings.max_completion_tokens,
        num_workers=means.num_workers,
        timeout_seconds=means.timeout_seconds,
        memory_gib=4.0,
    )


def _paper(
    settings: Settings,
    name: str,
    template: str,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    processes: Processes,
) -> Paper:
    how = PRESENTATIONS[template]
    system_prompt = settings.system_prompt if how.template == "chat" else None
    data = DataConfig(template=how.template, system_prompt=system_prompt, max_prompt_tokens=NO_LIMIT)  # type: ignore[arg-type]
    asked = [{**row, "question": row["question"] + how.suffix} for row in rows]
    prompts, _ = build_prompts(asked, tokenizer, data)
    reasons = processes.on_main(lambda: scorer.check_rows(rows))
    own = [
        replace(
            prompt,
            columns=rows[prompt.row],
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
    return Paper(name, template, settings.samples_of(name), own, len(rows) - len(own))


NO_LIMIT = 2**30
"""Tokens of a prompt: no question is left out for its length; the model's own limit is checked before it is loaded."""


# ---- the answers -----------------------------------------------------------------------------------------------------


def _answer(
    paper: Paper,
    done: set[tuple[str, str, int]],
    sampler: inference.Sampler,
    scorer: Scorer,
    settings: Settings,
    out: Path,
) -> None:
    """Answer this process's share of what is not done, and write it down as it comes."""
    processes = sampler.processes
    left = [each for each, key in zip(paper.prompts, paper.keys, strict=True) if key not in done]
    mine = left[processes.rank :: processes.world_size]
    if not left:
        return
    if processes.is_main:
        again = f", {len(paper.prompts) - len(left):,} of them before" * (len(left) < len(paper.prompts))
        say(f"{paper.benchmark}, {paper.template}: {len(paper.prompts):,} questions x {paper.num_samples}{again}")
    book = _Book(out / "samples.jsonl", paper, total=len(mine), speaks=processes.is_main)

    def sample() -> None:
        answer(
            [prompt for prompt in mine if prompt.row not in book.written],
            generator=sampler.generator,
            scorer=scorer,
            sampling=settings.sampling,
            num_samples=paper.num_samples,
            seed=settings.seed,
            on_rows=book.add,
        )

    try:
        retry_with_fewer_sequences(sample, sampler.generator, rank=processes.rank)
    finally:
        book.flush()


class _Book:
    """Samples on their way into the file that all processes write to, the samples of a question at once."""

    WRITE_EVERY = 2.0  # seconds; writing waits for the disk
    SAY_EVERY = 60.0

    def __init__(self, path: Path, paper: Paper, *, total: int, speaks: bool) -> None:
        self.path, self.paper, self.total, self.speaks = path, paper, total, speaks
        self.written: set[int] = set()
        self._waiting: list[dict[str, Any]] = []
        self._last_write = self._last_word = time.monotonic()

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._waiting += [{**self.paper.key, **row} for row in rows]
        self.written.add(rows[0]["row"])
        now = time.monotonic()
        if now - self._last_write > self.WRITE_EVERY:
            self.flush()
        if self.speaks and now - self._last_word > self.SAY_EVERY:
            self._last_word = now
            say(f"  {len(self.written):,} of {self.total:,} questions of this process are answered")

    def flush(self) -> None:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            append_jsonl(self.path, self._waiting)
        self._waiting = []
        self._last_write = time.monotonic()


@contextmanager
def _claimed(out: Path, settings: Settings, rows: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Make the directory, or see that it holds the same evaluation, and keep other starts out of it."""
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    if "settings.json" not in found and found - {"lock"}:
        raise ValueError(f"--out is {str(out)!r}; the directory holds something else. Choose another, or empty it.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out is {str(out)!r}; another process is at work there, and both would answer the same questions. Wait until "
                "it has ended, or choose another --out."
            ) from None
        wanted = {
            **asdict(settings),
            "model_files": inference.fingerprint(settings.model, settings.revision),
            "questions": {name: xxhash.xxh3_128(json.dumps(own).encode()).hexdigest() for name, own in rows.items()},
        }
        if any((out / name).exists() for name in ("samples.jsonl", "results.json")):
            _check_same(out, wanted)
        replace_text(out / "settings.json", json.dumps(wanted, indent=1))
        yield


def _check_same(out: Path, wanted: dict[str, Any]) -> None:
    before = json.loads((out / "settings.json").read_text())
    for name, value in wanted.items():
        if before.get(name) == value:
            continue
        if name in CONTENTS:
            difference = f"{CONTENTS[name]} since the evaluation there began"
        else:
            difference = f"the evaluation there has {_option(name)} {before.get(name)!r}, and this one {value!r}"
        raise ValueError(
            f"--out is {str(out)!r}; {difference}: their samples must not be mixed. Choose another --out, or the same settings "
            "to go on."
        )


CONTENTS = {
    "model_files": "the files of --model have changed",
    "questions": "the questions of --benchmarks or --data have changed",
}


def _option(name: str) -> str:
    """How scripts/evaluate.py spells a field of Settings."""
    own = {"num_samples": "--samples", "num_questions": "--questions", "max_completion_tokens": "--max-tokens"}
    return own.get(name) or "--" + name.replace("_", "-")


def _finished(path: Path, papers: list[Paper]) -> set[tuple[str, str, int]]:
    """The questions all of whose samples are in the file. Others, which a kill cut short, are taken out: they come again."""
    if not path.exists():
        return set()
    rows = read_jsonl(path, SAMPLE_KEYS)
    keys = [(row["benchmark"], row["template"], row["row"]) for row in rows]
    wanted = {key: paper.num_samples for paper in papers for key in paper.keys}
    done = {key for key, count in Counter(keys).items() if count == wanted.get(key)}
    replace_text(path, "".join(json_line(row) + "\n" for row, key in zip(rows, keys, strict=True) if key in done))
    return done


SAMPLE_KEYS = ("benchmark", "template", "row", "sample")
"""What a row of samples.jsonl has at least."""


def read_samples(path: Path, **key: str) -> list[dict[str, Any]]:
    """Rows of a samples.jsonl, such as those of a benchmark and a template, by question and sample."""
    rows = [row for row in iterate_jsonl(path, SAMPLE_KEYS) if all(row[name] == value for name, value in key.items())]
    return sorted(rows, key=lambda row: (row["row"], row["sample"]))


# ---- the numbers -----------------------------------------------------------------------------------------------------


def _conclude(
    paper: Paper, results: list[dict[str, Any]], settings: Settings, out: Path, *, seconds: float | None
) -> list[dict[str, Any]]:
    """All results so far, with that of a paper whose samples are all there."""
    found = _result(paper, settings, out, seconds=seconds)
    results = [*(each for each in results if not _is_of(each, paper)), found]
    replace_text(out / "results.json", to_json(_as_json(settings, results), indent=1))
    say(f"{paper.benchmark}, {paper.template}: {_in_words(found)}")
    return results


def _result(paper: Paper, settings: Settings, out: Path, *, seconds: float | None) -> dict[str, Any]:
    questions = by_question(read_samples(out / "samples.jsonl", **paper.key))
    found = {rows[0]["row"]: [row["sample"] for row in rows] for rows in questions}
    assert found == {prompt.row: list(range(paper.num_samples)) for prompt in paper.prompts}, (
        "samples.jsonl does not hold each sample of each question once"
    )
    return {
        **paper.key,
        "num_questions": len(questions),
        "num_ungradable": paper.num_ungradable,
        "num_samples": paper.num_samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_completion_tokens": settings.max_completion_tokens,
        "answer_from": SOURCES[PRESENTATIONS[paper.template].source],
        "seconds": seconds,
        "metrics": _metrics(questions),
        "by": {name: parts for name in OF_THE_QUESTION if (parts := _parts(questions, name))},
    }


def _metrics(questions: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in estimate(columns_of(questions)).items()}


def _parts(questions: list[list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """The questions of each level, or of each subject."""
    values = sorted({str(rows[0][name]) for rows in questions if name in rows[0]})
    parts = {value: [rows for rows in questions if str(rows[0].get(name)) == value] for value in values}
    return {value: {"num_questions": len(part), "metrics": _metrics(part)} for value, part in parts.items()}


def _is_of(result: dict[str, Any], paper: Paper) -> bool:
    return all(result[name] == value for name, value in paper.key.items())


def _seconds(results: Iterable[dict[str, Any]], paper: Paper) -> float | None:
    """What an earlier start has measured; None if it was interrupted, and with it the measuring."""
    return next((each["seconds"] for each in results if _is_of(each, paper)), None)


def _earlier_results(out: Path) -> list[dict[str, Any]]:
    path = out / "results.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def _as_json(settings: Settings, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"model": settings.model, "settings": asdict(settings), "results": results}


# ---- in words --------------------------------------------------------------------------------------------------------


def _in_words(result: dict[str, Any]) -> str:
    found = result["metrics"].get("pass@1")
    right = "no verdict is known" if found is None else f"pass@1 {_interval(found)}"
    return right if result["seconds"] is None else f"{right} ({result['seconds']:.1f} s)"


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:6.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def report(results: list[dict[str, Any]]) -> str:
    """A table of the results, the best template of each benchmark marked, and that one by level and subject."""
    header = (
        "benchmark",
        "template",
        "answers",
        "pass@1 [95 %]",
        "pass@k",
        "cons@n",
        "format",
        "cut off",
        "unknown",
        "tokens",
    )
    best = _best_templates(results)
    several = len(results) > len(best)
    rows = [header, *(_cells(result, marked=several and best[result["benchmark"]] is result) for result in results)]
    for result in best.values():
        for name, parts in result["by"].items():
            rows += [_part_cells(result, name, value, part) for value, part in parts.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{name}: the answer is {text}" for name, text in _sources(results).items()]
    marked = ["* the best template of its benchmark"] if several else []
    return "\n".join([*lines, "", *marked, *notes, *_left_out(results)])


def _best_templates(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for result in results:
        before = best.setdefault(result["benchmark"], result)
        if _pass_at_1(result) > _pass_at_1(before):
            best[result["benchmark"]] = result
    return best


def _pass_at_1(result: dict[str, Any]) -> float:
    return result["metrics"].get("pass@1", {"value": -1.0})["value"]


def _cells(result: dict[str, Any], *, marked: bool) -> tuple[str, ...]:
    asked = f"{result['num_questions']:,} x {result['num_samples']}"
    return (result["benchmark"], result["template"] + " *" * marked, asked, *_measured(result["metrics"]))


def _part_cells(result: dict[str, Any], name: str, value: str, part: dict[str, Any]) -> tuple[str, ...]:
    asked = f"{part['num_questions']:,} x {result['num_samples']}"
    return (f"  {result['benchmark']} {name} {value}", result["template"], asked, *_measured(part["metrics"]))


def _measured(metrics: dict[str, Any]) -> tuple[str, ...]:
    largest = max((name for name in metrics if name.startswith("pass@")), key=lambda name: int(name[5:]), default="")
    agreed = next((name for name in metrics if name.startswith("cons@")), "")
    at_most = "-" if largest in ("", "pass@1") else f"{metrics[largest]['value']:.1%} @{largest[5:]}"
    return (
        _interval(metrics["pass@1"]) if "pass@1" in metrics else "-",
        at_most,
        f"{metrics[agreed]['value']:.1%} @{agreed[5:]}" if agreed else "-",
        *(f"{metrics[name]['value']:.1%}" if name in metrics else "-" for name in ("format", "truncated", "unknown")),
        f"{metrics['length']['value']:,.0f}",
    )


def _sources(results: list[dict[str, Any]]) -> dict[str, str]:
    return {result["template"]: result["answer_from"] for result in results}


def _left_out(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"{name}: {number} questions are left out, because their gold answer cannot be graded"
        for name, number in {result["benchmark"]: result["num_ungradable"] for result in results}.items()
        if number
    ]


def transcript(rows: list[dict[str, Any]]) -> str:
    """Each question with the first answer to it in each template; for a benchmark of a few questions."""
    parts = []
    for own in by_question(rows):
        parts.append(f"\n{own[0]['question']}\n  gold answer: {own[0]['answer']}")
        for template in dict.fromkeys(row["template"] for row in own):
            samples = [row for row in own if row["template"] == template]
            num_right = sum(is_right(row) is True for row in samples)
            parts.append(f"  {template}: right {num_right} of {len(samples)} times; the first answer:")
            parts += [f"    | {line}" for line in samples[0]["completion"].strip().split("\n")]
    return "\n".join(parts)
