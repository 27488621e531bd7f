"""A model answers questions many times, and the answers that are worth learning from become rows for supervised training.

    OUT.jsonl                 the rows that are kept
    OUT.dropped.jsonl         every other sample, with the rule that dropped it
    OUT.pass_rates.jsonl      each question with its share of right answers: for data.pass_rates
    OUT.json                  what was asked of which model, the thresholds, and how many rows fell to which rule
    OUT.samples/              all samples; another start with the same questions and sampling goes on where this one ended
    OUT.rewrites/             the same of the model that rewrites

Only sampling takes long. Other thresholds are applied to the samples that are there: start it again with them.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from grpo.config import Config, ModelConfig
from grpo.evaluation.asked import Runtime
from grpo.evaluation.sample_file import SAMPLES, writing
from grpo.inference import model as inference
from grpo.policy.tokenizer import load_tokenizer
from grpo.rejection.rewriting import Kept, Rewriter, fall_of, in_tags, prompts_of
from grpo.rejection.rules import OPTIONS, Fall, Required, Rules, falls_of_row, judge, pass_rate
from grpo.rejection.sampling import Row, by_question, claim, sample, seed_of
from grpo.run.inputs import digests
from grpo.scoring.scorer import Scorer
from grpo.system import distributed
from grpo.system.files import replace_text, to_json
from grpo.system.jsonl import iterate_jsonl, replacing_jsonl
from grpo.types import VOTE, Prompt, Sampling


@dataclass(frozen=True)
class Rewriting:
    """Which model rewrites, and how."""

    model: ModelConfig
    template: str
    sampling: Sampling
    num_samples: int = 1  # attempts at a row; the first that passes is taken


@dataclass(frozen=True)
class Asked:
    """What is sampled, and all that the samples depend on."""

    model: ModelConfig
    sampling: Sampling
    num_samples: int
    seed: int = 0
    rewriting: Rewriting | None = None
    tags: bool = False  # kept rows are written in the paper's form: see rewriting.in_tags

    def __post_init__(self) -> None:
        """Raises ValueError: settings that contradict each other."""
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"--samples is {self.num_samples}; at --temperature 0 all samples of a question are the same. Set it to 1, or "
                "raise --temperature."
            )


@dataclass
class Table:
    """How many rows fell to which rule."""

    num_questions: int = 0
    num_questions_kept: int = 0
    num_samples: int = 0
    num_kept: int = 0
    num_tokens: int = 0  # of the completions that are kept
    first: Counter[str] = field(default_factory=Counter)  # by the rule that dropped a row
    any: Counter[str] = field(default_factory=Counter)  # by each rule that it breaks


def reject(
    asked: Asked, prompts: list[Prompt], scorer: Scorer, rules: Rules, out: Path, runtime: Runtime
) -> dict[str, Any]:
    """Sample what is not sampled yet, and write what is kept; returns what OUT.json holds. Every process calls it.

    Args:
        prompts: the questions that can be graded; `row` is the place among all questions.

    Raises:
        ValueError: a required reward is not there, or `out` holds other rows; before a model is loaded.
    """
    names = [reward.name for reward in scorer.rewards if reward.name != VOTE]
    required = rules.required(names, scorer.verdicts)
    processes = distributed.join()
    samples, rewrites = out.with_suffix(".samples"), out.with_suffix(".rewrites")
    given = digests(prompts, [], scorer.rewards)
    source = processes.on_main(
        lambda: {
            "model": asked.model.name,
            "model_files": inference.fingerprint(asked.model.name, asked.model.revision),
            "questions": given.pop("the training questions"),
        }
    )
    if required.by_row:  # as rows have it
        given["scoring.verdict"] = ", ".join(scorer.verdicts)
    wanted = {**source, **given, "--samples": asked.num_samples, "--seed": asked.seed, **_told(asked.sampling)}
    config = _config(asked.model, asked.sampling, prompts, runtime)
    tokenizer = load_tokenizer(config.model)
    with _on_main(processes, lambda: _check_free(out, samples)), _on_main(processes, lambda: claim(samples, wanted)):
        seeded = [replace(prompt, seed=seed_of(asked.seed, prompt.row)) for prompt in prompts]
        sample(
            seeded,
            load=lambda: inference.load(config, tokenizer),
            scorer=scorer,
            sampling=asked.sampling,
            num_samples=asked.num_samples,
            seed=asked.seed,
            directory=samples,
            what="questions",
        )
        table = Table()
        special = special_tokens(tokenizer)
        kept = processes.on_main(
            lambda: _choose(
                prompts,
                samples,
                rules,
                required,
                special,
                table,
                out,
                source,
                tags=asked.tags,
                keeps=asked.rewriting is not None,
            )
        )
        if asked.rewriting is not None:
            _rewrite(asked, kept, scorer, rules, required, rewrites, runtime, table, out, source)
        found = processes.on_main(lambda: _concluded(asked, rules, required, table, source, out))
    return dict(found)


@contextmanager
def _on_main(processes: distributed.Processes, enter: Any) -> Any:
    """A context that the main process alone enters, while the others wait for it to have done so."""
    if not processes.is_main:
        processes.barrier()
        yield
        return
    with enter():
        processes.barrier()
        yield


@contextmanager
def _check_free(out: Path, samples: Path) -> Any:
    """Raises ValueError: the file is there, and was not made from samples beside it."""
    if out.exists() and not samples.exists():
        raise ValueError(
            f"--out is {str(out)!r}; there is such a file, and no {samples.name} that it was made from: it would be overwritten. "
            "Choose another, or move it away."
        )
    if not out.parent.is_dir():
        with writing(out, "--out"):
            out.parent.mkdir(parents=True)
    yield


def _told(sampling: Sampling) -> dict[str, Any]:
    """What a file of samples says of it; its weights are those of the model that stands there."""
    told = asdict(sampling)
    del told["weights"]
    return told


def _config(model: ModelConfig, sampling: Sampling, prompts: Sequence[Prompt], runtime: Runtime) -> Config:
    """What a sampler is loaded with.

    Raises:
        ValueError: the model knows fewer positions than a sequence may have.
    """
    return inference.sampling_config(
        model.name,
        revision=model.revision,
        dtype=model.dtype,
        max_prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        max_completion_tokens=sampling.max_tokens,
        engine=runtime.engine,
        max_sequences=runtime.max_sequences,
        kv_cache_gib=runtime.kv_cache_gib,
        trust_remote_code=runtime.trust_remote_code,
    )


def special_tokens(tokenizer: Any) -> list[str]:
    """Tokens that no text should have."""
    return [str(token) for token in tokenizer.all_special_tokens]


# ---- choosing --------------------------------------------------------------------------------------------------------


def _choose(
    prompts: Sequence[Prompt],
    samples: Path,
    rules: Rules,
    required: Required,
    special: Sequence[str],
    table: Table,
    out: Path,
    source: Row,
    *,
    tags: bool,
    keeps: bool,
) -> list[Kept]:
    """Write the rows that are kept, those that are dropped, and the pass rates.

    Args:
        keeps: returns the kept ones, which are as large as the file; else none.
    """
    by_row = {prompt.row: prompt for prompt in prompts}
    kept: list[Kept] = []
    with (
        replacing_jsonl(out) as keep,
        replacing_jsonl(out.with_suffix(".dropped.jsonl")) as drop,
        replacing_jsonl(out.with_suffix(".pass_rates.jsonl")) as rate_row,
    ):
        for number, rows in by_question(samples / SAMPLES):
            prompt = by_row[number]
            rows = [in_tags(row, prompt) for row in rows] if tags else rows
            rate = pass_rate(rows, required)
            rate_row(_rate_row(prompt, rows, rate))
            table.num_questions += 1
            before = table.num_kept
            for row, falls in zip(
                rows, judge(rows, str(prompt.columns["question"]), rules, required, special), strict=True
            ):
                table.num_samples += 1
                if falls:
                    _drop(drop, table, prompt, row, rate, falls)
                    continue
                table.num_kept += 1
                table.num_tokens += row["num_tokens"]
                if keeps:
                    kept.append(Kept(prompt, {name: row[name] for name in row if name != "completion_ids"}, rate))
                keep(output_row(prompt, row, rate, source))
            table.num_questions_kept += table.num_kept > before
    return kept


def _rate_row(prompt: Prompt, rows: Sequence[Row], rate: float | None) -> Row:
    return {
        "row": prompt.row,
        "question": prompt.columns["question"],
        "answer": prompt.columns["answer"],
        "pass_rate": rate,
        "num_samples": len(rows),
    }


def _drop(drop: Any, table: Table, prompt: Prompt, row: Row, rate: float | None, falls: Sequence[Fall]) -> None:
    table.first[falls[0].rule] += 1
    table.any.update({fall.rule for fall in falls})
    drop(
        {
            "row": row["row"],
            "sample": row["sample"],
            "reason": falls[0].rule,
            "detail": falls[0].detail,
            "breaks": list(dict.fromkeys(fall.rule for fall in falls)),
            "question": prompt.columns["question"],
            "answer": prompt.columns["answer"],
            "completion": row["completion"],
            "finish_reason": row["finish_reason"],
            "num_tokens": row["num_tokens"],
            "rewards": row["rewards"],
            "pass_rate": rate,
        }
    )


def output_row(prompt: Prompt, row: Row, rate: float | None, source: Row) -> Row:
    """A row for supervised training: `prompt` and `completion` are one text, and their ids are what was read and sampled.

    What the prompt ends with and belongs to the answer (`<think>`) is part of `prompt`. The columns of the data are there under
    their names; one of a name that is taken is `data_<name>`.
    """
    own = {
        "prompt": prompt.text,
        "completion": row["completion"].removeprefix(prompt.prefill),
        "prompt_ids": prompt.token_ids,
        "completion_ids": row["completion_ids"],
        "row": row["row"],
        "sample": row["sample"],
        "finish_reason": row["finish_reason"],
        "num_tokens": row["num_tokens"],
        "reward": row["reward"],
        "rewards": row["rewards"],
        "pass_rate": rate,
        "source": source,
    }
    if "original" in row:  # what was sampled is another text
        del own["prompt_ids"], own["completion_ids"]
        own["original"] = row["original"].removeprefix(prompt.prefill)
    columns = {f"data_{name}" if name in own else name: _plain(value) for name, value in prompt.columns.items()}
    return columns | own


def _plain(value: Any) -> Any:
    """As JSON has it: dates and decimals as text."""
    return json.loads(json.dumps(value, default=str))


# ---- rewriting -------------------------------------------------------------------------------------------------------


def _rewrite(
    asked: Asked,
    kept: list[Kept],
    scorer: Scorer,
    rules: Rules,
    required: Required,
    directory: Path,
    runtime: Runtime,
    table: Table,
    out: Path,
    source: Row,
) -> None:
    """Write the kept rows anew, as another model puts them."""
    how = asked.rewriting
    assert how is not None, "called only where rows are to be rewritten"
    processes = distributed.join()
    if not kept:
        processes.say("no row is kept, so there is none to rewrite")
        return
    gc.collect()  # the first model's memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tokenizer = load_tokenizer(how.model)
    prompts = prompts_of(kept, how.template, tokenizer, asked.seed)
    config = _config(how.model, how.sampling, prompts, runtime)
    rows = [(each.prompt.row, each.row["sample"], each.row["completion"]) for each in kept]
    wanted = {
        "model": how.model.name,
        "model_files": processes.on_main(lambda: inference.fingerprint(how.model.name, how.model.revision)),
        "rows": xxhash.xxh3_128(json.dumps(rows).encode()).hexdigest(),
        "--rewrite-template": how.template,
        "--rewrite-samples": how.num_samples,
        "--seed": asked.seed,
        **_told(how.sampling),
    }
    with _on_main(processes, lambda: claim(directory, wanted)):
        sample(
            prompts,
            load=lambda: inference.load(config, tokenizer),
            scorer=scorer,
            sampling=how.sampling,
            num_samples=how.num_samples,
            seed=asked.seed,
            directory=directory,
            what="rows to rewrite",
            wrap=lambda generator: Rewriter(generator, kept),
        )
        special = special_tokens(tokenizer)
        if processes.is_main:
            by = {"model": how.model.name, "model_files": wanted["model_files"]}
            _replace(kept, directory, rules, required, special, table, out, {**source, "rewritten_by": by})
        processes.barrier()


def _replace(
    kept: list[Kept],
    directory: Path,
    rules: Rules,
    required: Required,
    special: Sequence[str],
    table: Table,
    out: Path,
    source: Row,
) -> None:
    """Of each row the first attempt that passes; a row without one is dropped for what the last one broke."""
    dropped = out.with_suffix(".dropped.jsonl")
    table.num_kept = table.num_tokens = 0
    questions = set()
    with replacing_jsonl(out) as keep, replacing_jsonl(dropped) as drop:
        for row in iterate_jsonl(dropped):
            drop(row)
        for number, attempts in by_question(directory / SAMPLES):
            own = kept[number]
            question = str(own.prompt.columns["question"])
            fall: Fall | None = None
            for attempt in attempts:
                fall = fall_of(falls_of_row(attempt, question, rules, required, special))
                if fall is None:
                    table.num_kept += 1
                    table.num_tokens += attempt["num_tokens"]
                    questions.add(own.prompt.row)
                    keep(_rewritten_row(own, attempt, source))
                    break
            if fall is not None:
                last = {**attempts[-1], "row": own.prompt.row, "sample": own.row["sample"]}
                _drop(drop, table, own.prompt, last, own.pass_rate, [fall])
    table.num_questions_kept = len(questions)


def _rewritten_row(own: Kept, attempt: Row, source: Row) -> Row:
    """Without ids: its tokens are another model's."""
    names = {"row": own.prompt.row, "sample": own.row["sample"], "original": own.row["completion"]}
    return output_row(own.prompt, {**own.row, **attempt, **names}, own.pass_rate, source)


# ---- what it came to -------------------------------------------------------------------------------------------------


def _concluded(asked: Asked, rules: Rules, required: Required, table: Table, source: Row, out: Path) -> dict[str, Any]:
    found = {
        "source": source,
        "samples": asked.num_samples,
        "seed": asked.seed,
        "sampling": _told(asked.sampling),
        "rules": {**asdict(rules), "require": dict(required.least), "pass_rate": list(rules.pass_rate)},
        "tags": asked.tags,
        "rewritten_by": None if asked.rewriting is None else asked.rewriting.model.name,
        **{name: dict(value) if isinstance(value, Counter) else value for name, value in vars(table).items()},
        "rows": _checksum(out),
    }
    replace_text(out.with_suffix(".json"), to_json(found, indent=1))
    return found


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def table_of(found: Mapping[str, Any]) -> str:
    """How many rows fell to which rule, and how many are kept."""
    total = max(found["num_samples"], 1)
    lines = [("rule", "dropped", "", "breaks it", "option")]
    lines += [
        (
            rule,
            f"{found['first'].get(rule, 0):,}",
            f"{found['first'].get(rule, 0) / total:.1%}",
            f"{found['any'][rule]:,}",
            option,
        )
        for rule, option in OPTIONS.items()
        if found["any"].get(rule)
    ]
    kept = found["num_kept"]
    lines.append(("kept", f"{kept:,}", f"{kept / total:.1%}", "", f"of {found['num_samples']:,} samples"))
    widths = [max(len(line[n]) for line in lines) for n in range(5)]
    rows = [
        f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}  {line[4]}".rstrip()
        for line in lines
    ]
    said = f"{found['num_questions_kept']:,} of {found['num_questions']:,} questions have a row; {found['num_tokens']:,} tokens"
    return "\n".join([*rows, said])
