"""Which questions are neither too easy nor too hard, by how often a model has answered them right.

`grpo reject` writes the file: a row for each question with `question`, `answer` and `pass_rate`. A question is found in it by its
text and its gold answer, so the data may be in another order, or have more or fewer rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import DataConfig
from grpo.system.jsonl import iterate_jsonl

UNKNOWN = "not in data.pass_rates"


def within_pass_rates(rows: Sequence[Mapping[str, Any]], config: DataConfig) -> tuple[list[bool], Counter[str]]:
    """Of each row whether `data.pass_rate` lets it through, and how many rows it does not, by reason.

    A question that the file does not know is left out: nobody knows whether it is within the bounds.

    Raises:
        ValueError: the file is not there, has no pass rates, knows none of the questions, or none is within the bounds.
    """
    if config.pass_rates is None:
        return [True] * len(rows), Counter()
    rates = _read(Path(config.pass_rates), config.pass_rates)
    low, high = config.pass_rate
    found = [rates.get(_key(row)) for row in rows]
    if not any(_key(row) in rates for row in rows):
        example = next(iter(rates))[0]
        raise ValueError(
            f"data.pass_rates is {config.pass_rates!r}; it knows not one of the {len(rows):,} questions: it begins with "
            f"{example[:80]!r}, and they with {str(rows[0]['question'])[:80]!r}. Name the file that grpo reject wrote for these "
            "questions, with the same data.question_column or question_template."
        )
    kept = [rate is not None and low <= rate <= high for rate in found]
    if not any(kept):
        known = [rate for rate in found if rate is not None]
        spread = f"from {min(known):g} to {max(known):g}" if known else "unknown"
        raise ValueError(
            f"data.pass_rate is [{low:g}, {high:g}]; not one question lies within: their pass rates are {spread}. Widen it."
        )
    dropped = Counter[str]()
    for row, rate, is_kept in zip(rows, found, kept, strict=True):
        if not is_kept:
            dropped[UNKNOWN if _key(row) not in rates else _reason(rate, low, high)] += 1
    return kept, dropped


def _reason(rate: float | None, low: float, high: float) -> str:
    if rate is None:
        return "its pass rate could not be told"
    return f"pass rate below {low:g}" if rate < low else f"pass rate above {high:g}"


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["question"]), str(row["answer"])


def check_file(path: Path, spelled: str) -> None:
    """Raises ValueError if it is not there."""
    if not path.is_file():
        raise ValueError(
            f"data.pass_rates is {spelled!r}; there is no file {path.resolve()}. Name a *.pass_rates.jsonl of grpo reject."
        )


def _read(path: Path, spelled: str) -> dict[tuple[str, str], float | None]:
    """By question and answer; of a question that is there several times the mean over all of its samples."""
    check_file(path, spelled)
    sums: dict[tuple[str, str], list[float]] = {}
    for row in iterate_jsonl(path, ("question", "answer", "pass_rate")):
        rate, num = row["pass_rate"], row.get("num_samples", 1)
        if rate is not None and not (isinstance(rate, (int, float)) and 0 <= rate <= 1):
            raise ValueError(
                f"data.pass_rates is {spelled!r}; a row has the pass rate {rate!r}, which is no share. Correct it."
            )
        total = sums.setdefault(_key(row), [0.0, 0.0])
        if rate is not None:
            total[0] += rate * num
            total[1] += num
    if not sums:
        raise ValueError(
            f"data.pass_rates is {spelled!r}; no line has question, answer and pass_rate. Name a "
            "*.pass_rates.jsonl of grpo reject."
        )
    return {key: total / num if num else None for key, (total, num) in sums.items()}
