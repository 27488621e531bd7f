"""Numbers of an evaluation from the verdicts on its samples: pass@k, majority vote, and intervals. Pure.

Q  questions          n  samples per question
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RESAMPLES = 2000
COUNTS_AT_ONCE = 2**22
"""Of resamples times questions, as many as are in memory at a time: 64 MiB."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its interval."""

    value: float
    low: float
    high: float


def pass_at_k(verdicts: Sequence[bool | None], k: int) -> float:
    """Probability that at least one of k samples is right, unbiased, from n >= k samples of which c are right.

    1 - C(n - c, k) / C(n, k): of all ways to take k of the n samples, the share with a right one (Chen et al. 2021, arXiv
    2107.03374, equation 1). For k = 1 it is c / n.

    Args:
        verdicts: of one question; None: unknown, which counts neither in n nor in c.

    Returns:
        With fewer than k known verdicts, what all samples give if it is the same whatever the unknown ones are; else NaN.
    """
    n, c = sum(verdict is not None for verdict in verdicts), sum(verdict is True for verdict in verdicts)
    if n >= k:
        return _at_least_one(n, c, k)
    worst, best = (_at_least_one(len(verdicts), right, k) for right in (c, c + len(verdicts) - n))
    return worst if worst == best else math.nan


def _at_least_one(n: int, c: int, k: int) -> float:
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[float | None], verdicts: Sequence[bool | None]) -> float:
    """Whether the most frequent answer of a question is right (cons@n).

    Several answers with equally many votes share the question: with one of two right it is 1/2, the mean over fair coins.

    Args:
        votes: a number for each sample, the same for equivalent answers; negative: it has no answer; None: unknown.
        verdicts: of the samples; an answer is right as often as its samples are.

    Returns:
        0 if no sample has an answer; NaN if a vote is unknown, or the verdict on an answer that won.
    """
    if any(vote is None for vote in votes):
        return math.nan
    counts = Counter(vote for vote in votes if vote is not None and vote >= 0)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    return float(np.mean([_share_right(winner, votes, verdicts) for winner in winners])) if winners else 0.0


def _share_right(answer: float, votes: Sequence[float | None], verdicts: Sequence[bool | None]) -> float:
    known = [verdict for vote, verdict in zip(votes, verdicts, strict=True) if vote == answer and verdict is not None]
    return sum(known) / len(known) if known else math.nan


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; with more, the last one is a little too wide."""


def mean_of_few(values: Sequence[float]) -> Estimate:
    """The mean of a few independent values, with its 95 % interval by Student's t: mean -+ t(n - 1) * s / sqrt(n).

    Of two values the interval is 12.7 / sqrt(2) = 9 times as wide as their standard deviation: two say little.

    Args:
        values: two or more.
    """
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def estimate(columns: Mapping[str, Values], *, seed: int = 0) -> dict[str, Estimate]:
    """The mean of each column over questions, with the bounds of its 95 % interval.

    The interval is the percentile bootstrap (Efron 1979) over questions: each resample draws Q of the Q questions with
    replacement, with all that was measured on them, and the bounds are the 2.5 and 97.5 % quantiles of its mean. So it tells how
    much the number may move with other questions and other samples of the same model; not with another training run. All columns
    are measured on the same resamples. Where all questions have the same value no resample differs, though other questions might:
    of a share the interval is then Wilson's, of anything else it is the value.

    Args:
        columns: (Q,) a value for each question, NaN where there is none.

    Returns:
        A column without any value is left out.
    """
    known = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    if not known:
        return {}
    table = np.stack(list(known.values()), axis=1)  # (Q, columns)
    there = ~np.isnan(table)
    table = np.where(there, table, 0.0)
    num_questions = len(table)
    generator, shares = np.random.default_rng(seed), np.full(num_questions, 1 / num_questions)
    at_once = max(COUNTS_AT_ONCE // num_questions, 1)
    parts = []
    for start in range(0, RESAMPLES, at_once):
        draws = generator.multinomial(num_questions, shares, size=min(at_once, RESAMPLES - start))
        counts = draws.astype(np.float64)  # (., Q) how often each question is drawn; a product of floats is fast
        with np.errstate(invalid="ignore"):  # a resample may hold no question that has a value
            parts.append((counts @ table) / (counts @ there.astype(np.float64)))
    means = np.concatenate(parts)  # (RESAMPLES, columns)
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    values, num_known = table.sum(0) / there.sum(0), there.sum(0)
    found = {}
    for i, name in enumerate(known):
        value, ends = float(values[i]), (low[i], high[i])
        if name not in NO_SHARES and 0 <= value <= 1 and np.ptp(table[there[:, i], i]) == 0:
            ends = wilson(value, int(num_known[i]))
        found[name] = Estimate(value, float(min(ends[0], value)), float(max(ends[1], value)))
    return found


NO_SHARES = ("length", "reward", "turns", "difference")
"""Of what is told of a benchmark (answers.columns_of), and of two arms, the columns that are no share of answers."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share seen in `count` independent trials (Wilson, 1927).

    Of several samples per question, `share` is the mean over questions and `count` the number of questions: values between 0 and
    1 vary at most as much as verdicts do, so the interval is no narrower than it should be.
    """
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
