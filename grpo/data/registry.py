"""Which question sets there are to evaluate on, where they lie, and how to read them."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import DataConfig
from grpo.data.cells import text_of
from grpo.data.files import load_table
from grpo.data.probes import PROBES
from grpo.data.rows import MESSAGES, prepare_rows


@dataclass(frozen=True)
class Benchmark:
    """A set of questions on the hub, and the names of its columns."""

    source: str
    split: str
    subset: str | None = None
    question: str = "question"
    answer: str = "answer"  # a list of answers counts as one answer that lists them
    answer_regex: str | None = None  # its first group is the answer, where the column holds more
    context: str | None = None  # text before the question, where a row has one
    level: str | None = None
    subject: str | None = None
    num_samples: int = 16  # per question, by default


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "test", "main", answer_regex=r"####\s*(.+)"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", question="problem", level="level", subject="subject"),
    "aime2024": Benchmark("HuggingFaceH4/aime_2024", "train", question="problem", num_samples=64),
    "amc2023": Benchmark("math-ai/amc23", "test", num_samples=64),
    "minerva": Benchmark("math-ai/minervamath", "test"),
    "olympiad": Benchmark(
        "Hothan/OlympiadBench",
        "train",
        "OE_TO_maths_en_COMP",  # open-ended, text only, mathematics, English, competition
        answer="final_answer",
        context="context",
        subject="subfield",
    ),
}
"""The samples are those of DeepSeek-R1's evaluation where it names them: 64 for AIME, 16 for MATH; 64 for the other small set."""

PROBES_NAME = "probes"
OWN_FILE = Benchmark("", "train", level="level", subject="subject")
"""Columns of a file that the user names; level and subject where it has them."""


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What scripts say of benchmarks."""
    names = ", ".join([*BENCHMARKS, PROBES_NAME])
    parser.add_argument("--benchmarks", required=required, metavar="A,B,...", help=f"of {names}, and those of --data")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="a .jsonl, .json, .jsonl.gz or .parquet file with the columns question and answer, instead of the hub or as a "
        "benchmark of your own; that of a benchmark that is not asked for is passed over",
    )


def named(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Names of the benchmarks, and their files where there are any, from `add_arguments`'s arguments.

    One list of files may serve many evaluations: those of BENCHMARKS that are not asked for are passed over. A file for any other
    name is refused then, since the name may be misspelt.

    Raises:
        ValueError: see `check_names`; or no file is named.
    """
    names, data = [name for name in arguments.benchmarks.split(",") if name], {}
    for text in arguments.data:
        name, equals, path = text.partition("=")
        if not (equals and name and path):
            raise ValueError(f"--data has {text!r}; it reads NAME=FILE, such as math500=math500.jsonl. Correct it.")
        data[name] = os.path.expanduser(path)
    data = {name: path for name, path in data.items() if name in names or name not in {*BENCHMARKS, PROBES_NAME}}
    check_names(names, data)
    return names, data


def check_names(names: list[str], data: Mapping[str, str]) -> None:
    """Raises ValueError: no benchmark, an unknown one, one named twice, or a file for one that is not evaluated on."""
    known = {*BENCHMARKS, PROBES_NAME, *data}
    if not names:
        raise ValueError(
            f"--benchmarks is empty; there is {', '.join(sorted(known))}. Name one or more, with commas between."
        )
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"--benchmarks has {name!r}; there is {', '.join(sorted(known))}"
                + (f"; did you mean {near[0]}?" if near else ".")
                + f" Correct it, or give its questions: --data {name}=questions.jsonl."
            )
        if names.count(name) > 1:
            raise ValueError(f"--benchmarks has {name!r} twice; results are told apart by name. Name it once.")
    for name in data:
        if name not in names:
            raise ValueError(
                f"--data has a file for {name!r}; it is not among --benchmarks ({', '.join(names)}). Add it there, or remove it."
            )


def default_samples(name: str) -> int:
    """Samples per question where the user says nothing."""
    return BENCHMARKS.get(name, OWN_FILE).num_samples


def load(name: str, path: str | None = None, *, every_column: bool = False) -> list[dict[str, Any]]:
    """Rows with `question` and `answer`, and `level` and `subject` where there are any.

    Args:
        path: a local file with columns `question` and `answer` instead of what the hub has.
        every_column: with all others, too.

    Raises:
        ValueError: there is no such data set or file, or a column is missing.
    """
    if path is not None:
        return _read(OWN_FILE, load_table(path, None, "train", f"--data {name}"), f"--data {name}", every_column)
    if name == PROBES_NAME:
        return [probe.row for probe in PROBES]
    known = BENCHMARKS[name]
    setting = f"--benchmarks {name}"
    try:
        table = load_table(known.source, known.subset, known.split, setting)
    except ValueError as error:
        raise ValueError(f"{error} A local copy will do: --data {name}=questions.jsonl.") from error
    return _read(known, table, setting, every_column)


def _read(benchmark: Benchmark, table: Any, setting: str, every_column: bool) -> list[dict[str, Any]]:
    columns = DataConfig(question_column="question", answer_column=benchmark.answer)
    renamed = (_plain(number, row, benchmark, setting) for number, row in enumerate(table))
    rows = prepare_rows(renamed, columns, answer_regex=benchmark.answer_regex, setting=setting)
    names = {"level": benchmark.level, "subject": benchmark.subject}
    return [
        (dict(row) if every_column else {})
        | {name: row[name] for name in ("question", "answer", MESSAGES) if row.get(name) is not None}
        | {name: row[column] for name, column in names.items() if column and row.get(column) is not None}
        for row in rows
    ]


def _plain(number: int, row: Mapping[str, Any], benchmark: Benchmark, setting: str) -> dict[str, Any]:
    """With one text as the question and one as the answer."""
    for column in (benchmark.question, benchmark.answer):
        if column not in row:
            raise ValueError(
                f"{setting}: there is no column {column!r}; the data has {', '.join(row)}. Rename the column, or give a file "
                "with the columns question and answer: --data NAME=FILE."
            )
    if row[benchmark.question] is None:
        raise ValueError(f"{setting}: row {number} has nothing in the column {benchmark.question!r}. Drop the row.")
    context = row[benchmark.context] if benchmark.context else None
    question = f"{context}\n\n{row[benchmark.question]}" if context else row[benchmark.question]
    answer = row[benchmark.answer]
    if isinstance(answer, list):
        parts = [text_of(each) for each in answer]
        known = [part.strip("$ ") for part in parts if part is not None]
        answer = ", ".join(known) if len(known) == len(parts) else answer
    return {**row, "question": question, benchmark.answer: answer}
