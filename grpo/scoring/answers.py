"""How well the policy answers held-out questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo.scoring.reward import nearest
from grpo.scoring.statistics import Values, estimate, majority, pass_at_k, powers_of_two
from grpo.types import VOTE, Completion, Generator, Group, Prompt, Sampling, Scores

if TYPE_CHECKING:  # a report reads verdicts, and need not wait for torch
    from torch import Tensor

    from grpo.scoring.scorer import Scorer

OnRows = Callable[[list[dict[str, Any]]], None]
"""Called with the rows of a question, when all of its samples are scored."""

RowsOf = Callable[[list[Group], Scores], list[dict[str, Any]]]
"""Makes rows of groups and their scores, one for each completion."""


def answer(
    prompts: list[Prompt],
    *,
    generator: Generator,
    scorer: Scorer,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    on_rows: OnRows | None = None,
    rows_of: RowsOf | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt `num_samples` times; a row per answer, in the order of the prompts.

    Args:
        rows_of: makes the rows; None: evaluation_rows.
    """
    rows_of = rows_of or evaluation_rows
    groups: dict[int, Group] = {}
    rows: dict[int, list[dict[str, Any]]] = {}
    with scorer.begin(len(prompts)) as scoring:

        def take_in() -> None:
            for p, scores in scoring.finished():
                rows[p] = rows_of([groups.pop(p)], scores)
                if on_rows is not None:
                    on_rows(rows[p])

        def on_group(p: int, group: Group) -> None:
            groups[p] = group
            scoring.add(p, group)
            take_in()

        generator.sample(prompts, sampling, num_completions=num_samples, seed=seed, on_group=on_group)
        scoring.result()
        take_in()
    return [row for p in range(len(prompts)) for row in rows[p]]


ANSWERED_AT_ONCE = 16_384
"""Completions of one call of a generator. All of them are in memory until it ends, with their tokens and log-probabilities."""


def answer_in_parts(prompts: list[Prompt], *, num_samples: int, on_rows: OnRows, **same: Any) -> None:
    """As `answer`, of any number of prompts: rows go to `on_rows` alone, and no more than those of a part are in memory.

    Args:
        prompts: each with a `seed` of its own, so that it is answered alike in any part.
    """
    size = max(ANSWERED_AT_ONCE // num_samples, 1)
    for start in range(0, len(prompts), size):
        answer(prompts[start : start + size], num_samples=num_samples, on_rows=on_rows, **same)


def in_order(parts: list[list[dict[str, Any]]], prompts: list[Prompt]) -> list[dict[str, Any]]:
    """The rows of all processes, in the order of the prompts that they shared."""
    place = {prompt.row: i for i, prompt in enumerate(prompts)}
    return sorted((row for part in parts for row in part), key=lambda row: place[row["row"]])


def completion_rows(groups: list[Group], scores: Scores) -> list[dict[str, Any]]:
    """One JSON-ready row per completion; an unknown reward is null, and so is `right` where nobody can tell. `extra` has, by
    reward, what they gave to log_extra, and `turns` what tools answered between what the model wrote, which alone is its
    `completion`.
    """
    rows = []
    verdicts = scores.verdicts or verdicts_of(None, scores.values)
    right = judged(scores, verdicts) if scores.values else scores.rewards * math.nan
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            extra = scores.extras[p][g] if scores.extras else {}
            rows.append(
                {
                    "row": group.prompt.row,
                    "question": group.prompt.columns["question"],
                    "answer": group.prompt.columns["answer"],
                    "completion": completion.text,
                    "finish_reason": completion.finish_reason,
                    "num_tokens": len(completion.own_ids),
                    "reward": _null_if_nan(float(scores.rewards[p, g])),
                    "rewards": {name: _null_if_nan(float(values[p, g])) for name, values in scores.values.items()},
                    "right": _means_right(_null_if_nan(float(right[p, g]))),
                    **({"turns": completion.messages} if len(completion.turns or []) > 1 else {}),
                    **({"extra": extra} if extra else {}),
                    **({} if group.prompt.kind is None else {"kind": group.prompt.kind}),
                }
            )
    return rows


ENVIRONMENT = "environment"
"""The name of an environment's reward among those of the reward functions."""

OF_THE_QUESTION = ("level", "subject")
"""Columns of the data that evaluations are told apart by."""


def evaluation_rows(groups: list[Group], scores: Scores) -> list[dict[str, Any]]:
    """The same of an evaluation, with the number of the sample, level and subject where the data has them, and with an
    environment how many turns it answered and whether it ended the episode."""
    rows = completion_rows(groups, scores)
    samples = [(group.prompt.columns, *each) for group in groups for each in enumerate(group.completions)]
    return [
        {**row, "sample": number, **_played(completion)}
        | {name: columns[name] for name in OF_THE_QUESTION if columns.get(name) is not None}
        for row, (columns, number, completion) in zip(rows, samples, strict=True)
    ]


def _played(completion: Completion) -> dict[str, Any]:
    episode = completion.episode
    return {} if episode is None else {"episode": {"turns": episode.num_turns, "ended": episode.ended}}


def training_rows(
    step: int, groups: list[Group], scores: Scores, advantages: Tensor, *, in_batch: Tensor
) -> list[dict[str, Any]]:
    """The same of a training step, with the step, the advantages (P, G), of which that of an unknown reward is 0, and whether the
    group is in the batch (P,); of one that dynamic sampling left out, the advantage is None."""
    known = advantages.nan_to_num().flatten().tolist()
    used = in_batch.repeat_interleave(advantages.shape[1]).tolist()
    rows = zip(completion_rows(groups, scores), known, used, strict=True)
    return [
        {"step": step, **row, "advantage": advantage if each else None, "in_batch": each}
        for row, advantage, each in rows
    ]


def verdict_name(names: Iterable[str]) -> str:
    """Of a run's reward functions, the one whose verdict says what is right: `accuracy` if it is there, else that of an
    environment, else the first that is not one of MANNERS, else the first."""
    names = list(names)
    first = [name for name in ("accuracy", ENVIRONMENT) if name in names]
    return [*first, *can_say_right(names), *names][0]


def can_say_right(names: Iterable[str]) -> list[str]:
    """Those that are not about manners, and whose values are not names."""
    return [name for name in names if name not in MANNERS and name != VOTE]


MANNERS = frozenset({"format", "overlong", "repetition", "language", "countdown_search", "countdown_trials"})
"""Rewards of the library that say how an answer is written, and never whether it is right."""


def verdicts_of(setting: str | Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """Of a run's reward functions, those that say what is right, as scoring.verdict has it; without functions none.

    Raises:
        ValueError: it names none, or one that is not there.
    """
    names = list(names)
    if not names:
        return []
    if setting is None:
        return [verdict_name(names)]
    wanted = [setting] if isinstance(setting, str) else list(setting)
    can_tell = [name for name in names if name != VOTE]  # whose values are names
    for name in wanted or [""]:
        if name not in can_tell:
            wrong = f"{name} is no reward that can say what is right here" if name else "it names no reward"
            raise ValueError(
                f"scoring.verdict is {setting!r}; {wrong}: {nearest(name, can_tell)} Name one of them, or remove it."
            )
        if wanted.count(name) > 1:
            raise ValueError(f"scoring.verdict is {setting!r}, with {name} twice. Name it once.")
    return wanted


RIGHT_OF_ALL_KINDS = "verdict/right"
"""The training metric of several verdicts, in the place of `reward/<function>`."""


def metrics_of(verdicts: Sequence[str]) -> tuple[str, str]:
    """Names of the metrics that say how much is right: in training, and of what is held out."""
    if len(verdicts) > 1:
        return RIGHT_OF_ALL_KINDS, "eval/pass@1"
    return f"reward/{verdicts[0]}", f"eval/{verdicts[0]}"


def judged(scores: Scores, names: Sequence[str]) -> Tensor:
    """(P, G) of each group the values of the first of these functions that applies to it; NaN where it cannot tell.

    A function applies if its verdict is due, or if it can tell of any completion of the group.
    """
    first, *others = names
    found, is_open = scores.values[first], ~_applies(scores, first)
    for name in others:
        found = found.where(~is_open[:, None], scores.values[name])
        is_open = is_open & ~_applies(scores, name)
    return found


def _applies(scores: Scores, name: str) -> Tensor:
    """(P,)"""
    return ~scores.values[name].isnan().all(1) | (scores.is_due or {}).get(name, False)


def is_right(row: Mapping[str, Any]) -> bool | None:
    """Whether a row of `completion_rows` is right; None if its verdict is unknown, which is neither right nor wrong."""
    if "right" in row:
        return row["right"]
    return _means_right(row["rewards"][verdict_name(row["rewards"])])  # a row of an older run


def _means_right(verdict: float | None) -> bool | None:
    return None if verdict is None else verdict >= RIGHT


RIGHT = 1 - 1e-9
"""Least value of a verdict that means right; a function may add up parts of 1 in floating point."""


TRIALS = "countdown_trials"
"""The reward that says how many different trials a completion states."""

OUTCOMES = ("right", "right_first", "right_later", "wrong", "truncated", "unknown")


def outcome(row: Mapping[str, Any]) -> str:
    """Which of OUTCOMES a row of `completion_rows` is.

    One that was cut off is "truncated", whatever its verdict: it is neither right nor wrong, as in grpo/text/aha.py. One that is
    right is "right_first" or "right_later" where TRIALS gives it a number: at the first trial, or after several.
    """
    if row["finish_reason"] == "length":
        return "truncated"
    verdict, trials = is_right(row), row["rewards"].get(TRIALS)
    if not verdict:
        return "unknown" if verdict is None else "wrong"
    return "right" if trials is None else "right_later" if trials > 1 else "right_first"


def count_outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of each outcome's share of the rows; they add up over processes."""
    counts = Counter(map(outcome, rows))
    by_trials = any(TRIALS in row["rewards"] for row in rows)
    names = [name for name in OUTCOMES if by_trials or not name.startswith("right_")]
    return {f"outcome/{name}": (counts[name], len(rows)) for name in names}


def is_solved(verdicts: Tensor, *, at_least: float) -> list[bool | None]:
    """Of each group's verdicts (P, G), whether at least that share is right; None: the unknown ones decide it."""
    right = (verdicts >= RIGHT).double()
    surely, perhaps = right.mean(1), (right + verdicts.isnan()).mean(1)
    return [
        True if low >= at_least else None if high >= at_least else False
        for low, high in zip(surely.tolist(), perhaps.tolist(), strict=True)
    ]


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The eval/ metrics of `answer`'s rows."""
    metrics: dict[str, float] = {}
    questions = by_question(rows)
    for name in rows[0]["rewards"]:
        values = _known(row["rewards"][name] for row in rows)
        if values and name != VOTE:  # whose values are names
            metrics[f"eval/{name}"] = sum(values) / len(values)
            metrics[f"eval/{name}_stderr"] = _standard_error(_means(questions, partial(_reward, name)))
        metrics |= {
            f"kind/{kind}/eval_{name}": sum(known) / len(known)
            for kind in sorted({row["kind"] for row in rows if "kind" in row})
            if name != VOTE and (known := _known(row["rewards"][name] for row in rows if row.get("kind") == kind))
        }
    for name, found in estimate(verdict_columns(questions)).items():
        metrics[f"eval/{name}"] = found.value
        if name.startswith("pass@"):
            metrics |= {f"eval/{name}_low": found.low, f"eval/{name}_high": found.high}
    metrics["eval/length_mean"] = sum(row["num_tokens"] for row in rows) / len(rows)
    metrics["eval/truncated"] = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    return metrics


def by_question(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each question, in the order in which questions come up."""
    questions: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        questions.setdefault(row["row"], []).append(row)
    return list(questions.values())


def verdict_columns(questions: list[list[dict[str, Any]]]) -> dict[str, Values]:
    """pass@k for k = 1, 2, 4, ... and, where there are votes, cons@n: (Q,) each, NaN where it is unknown."""
    verdicts = [[is_right(row) for row in rows] for rows in questions]
    num_samples = max(len(rows) for rows in questions)
    columns = {f"pass@{k}": [pass_at_k(each, k) for each in verdicts] for k in powers_of_two(num_samples)}
    if num_samples > 1 and VOTE in questions[0][0]["rewards"]:
        votes = [[row["rewards"][VOTE] for row in rows] for rows in questions]
        columns[f"cons@{num_samples}"] = [majority(*each) for each in zip(votes, verdicts, strict=True)]
    return {name: np.array(values) for name, values in columns.items()}


def columns_of(questions: list[list[dict[str, Any]]]) -> dict[str, Values]:
    """All that is told of a benchmark, (Q,) each: verdicts; shares of well-formed, cut off and unknown answers; tokens.

    With an environment also its reward, the turns, and the shares of episodes that it ended and that were out of turns.
    """
    columns = verdict_columns(questions)
    if "episode" in questions[0][0]:
        columns["reward"] = _means(questions, lambda row: row["rewards"][ENVIRONMENT])
        columns["turns"] = _means(questions, lambda row: float(row["episode"]["turns"]))
        columns["ended"] = _means(questions, lambda row: float(row["episode"]["ended"]))
        columns["out_of_turns"] = _means(questions, lambda row: float(row["finish_reason"] == "turns"))
    if "format" in questions[0][0]["rewards"]:
        columns["format"] = _means(questions, partial(_reward, "format"))
    columns["truncated"] = _means(questions, lambda row: float(row["finish_reason"] == "length"))
    columns["unknown"] = _means(questions, lambda row: float(is_right(row) is None))
    columns["length"] = _means(questions, lambda row: float(row["num_tokens"]))
    return columns


def _reward(name: str, row: dict[str, Any]) -> float | None:
    return row["rewards"][name]


def _means(questions: list[list[dict[str, Any]]], value: Callable[[dict[str, Any]], float | None]) -> Values:
    """(Q,) the mean of each question's known values; NaN if there are none."""
    known = [_known(map(value, rows)) for rows in questions]
    return np.array([sum(values) / len(values) if values else math.nan for values in known])


def _standard_error(values: Values) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=int(len(known) > 1)) / math.sqrt(len(known)))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
