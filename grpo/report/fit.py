"""A curve that saturates, through a run's rewards, and where it leads: "The Art of Scaling RL Compute", arXiv 2510.13786, eq. 1.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C) ^ B)

C is what was trained so far, in steps, each of which samples as many questions: R0 is the reward at the start, A the one that is
never reached, C_mid where half of the way is done, B how steep it is there. (The paper's C is GPU hours; steps of equal size are
in proportion to them as long as answers stay about as long.)

C_mid and B are looked for on a grid. At each of its points R0 and A are a linear least squares, so no optimum is missed.
Intervals are of the likelihood's profile: every curve that explains the values almost as well as the best one counts, also one
whose limit lies far away. Values of neighbouring steps whose errors are alike count for less. Where that leaves open where the
curve leads, `fit` says why instead of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo.report.read import Run

Values = NDArray[np.float64]

FEWEST_STEPS, FEWEST_EVALUATIONS = 20, 8
"""That a curve of four parameters is drawn through."""
OF_ONE, OF_TWO, OF_THREE = 3.84, 5.99, 11.34
"""Chi-squared: 95 % for one and for two parameters, and 99 % for three."""
STEEPNESS = (0.25, 8.0)
GRID, NUM_GRIDS = (48, 24), 3
"""C_mid and B that are tried, and how often a finer grid is laid over the best of them."""
MOST_VALUES = 400
FAR = 30.0
"""How many times as far as the last value C_mid is looked for. If it may be farther, the limit cannot be told."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The best curve, and what all that are about as good have in common."""

    start: float
    limit: float
    middle: float
    steepness: float
    at_end: Estimate
    limits: Estimate | None  # None: they reach as far as was looked

    def at(self, compute: Values) -> Values:
        """Its values."""
        return self.start + (self.limit - self.start) * _risen(compute, self.middle, self.steepness)


def fit(compute: Values, values: Values, *, end: float, fewest: int, bounds: tuple[float, float] | None) -> Curve | str:
    """The curve through `values` and what it comes to at `end`, or why that cannot be told.

    Args:
        compute: (N,) what was trained before each value, 0 or more, ascending.
        values: (N,) finite.
        fewest: values below which nothing is said.
        bounds: the least and the largest value there can be, of a share; None: there are none.
    """
    compute, values = _in_bins(compute), _in_bins(values)
    if len(values) < fewest:
        return f"{len(values)} values are too few for a curve; {fewest} would do"
    if np.ptp(values) == 0:
        return "it has not changed"
    last = max(float(compute.max()), 1.0)
    shapes = _look(compute, values, bounds, last)
    reason = _no_curve(compute, values, shapes, last)
    if reason is not None:
        return reason
    best = shapes.best
    risen = _risen(np.array([end]), shapes.middles[:, None], shapes.steepness[:, None])[:, 0]
    at_end = shapes.interval(risen, bounds)
    rise = float((shapes.limits[best] - shapes.starts[best]) * shapes.risen[best].max())
    if at_end.high - at_end.low > rise:
        return f"its end may lie anywhere from {at_end.low:.3g} to {at_end.high:.3g}, more than it has risen"
    limits = shapes.interval(np.ones_like(risen), bounds)
    reaches = bool(shapes.middles[shapes.as_good].max() >= 0.99 * FAR * last)
    is_open = reaches or (bounds is not None and limits.high >= bounds[1] - 1e-9)
    return Curve(
        float(shapes.starts[best]),
        float(shapes.limits[best]),
        float(shapes.middles[best]),
        float(shapes.steepness[best]),
        at_end,
        None if is_open else limits,
    )


@dataclass(frozen=True)
class _Shapes:
    """Points of the grid, each with the best start and limit; (S,), and `risen` (S, N) at the values."""

    middles: Values
    steepness: Values
    risen: Values
    starts: Values
    limits: Values
    spread: Values  # (S, 2, 2) the inverse of the squares of what start and limit are multiplied by
    errors: Values  # sums of squares
    number: float  # of independent values

    @property
    def best(self) -> int:
        return int(self.errors.argmin())

    def worse(self, errors: Any) -> Any:
        """By how much curves with these sums of squares explain the values worse than the best: chi-squared."""
        least = max(float(self.errors.min()), 1e-300)
        return self.number * np.log(np.maximum(errors, least) / least)

    @property
    def slack(self) -> Values:
        """How much worse each could still be; below 0 it is out."""
        return OF_ONE * self.number / max(self.number - 4, 1.0) - self.worse(
            self.errors
        )  # few values seem better fitted

    @property
    def as_good(self) -> NDArray[np.bool_]:
        return self.slack >= 0

    def interval(self, risen: Values, bounds: tuple[float, float] | None) -> Estimate:
        """Where curves that are about as good are when they have `risen` (S,), as far as start and limit may move there too."""
        values = self.starts + (self.limits - self.starts) * risen
        direction = np.stack([1 - risen, risen], 1)
        variance = np.einsum("si,sij,sj->s", direction, self.spread, direction)
        sigma = (float(self.errors.min()) / self.number) ** 0.5
        half = sigma * np.sqrt(np.maximum(self.slack, 0) * np.maximum(variance, 0))
        low, high = float((values - half)[self.as_good].min()), float((values + half)[self.as_good].max())
        if bounds is not None:
            low, high = max(low, bounds[0]), min(high, bounds[1])
        return Estimate(float(values[self.best]), low, high)


def _look(compute: Values, values: Values, bounds: tuple[float, float] | None, last: float) -> _Shapes:
    """The grid over all curves, then finer ones over those that are about as good as the best."""
    middles, steepness = (last / 100, FAR * last), STEEPNESS
    for _ in range(NUM_GRIDS):
        every = np.geomspace(*middles, GRID[0]), np.geomspace(*steepness, GRID[1])
        across, along = np.meshgrid(*every, indexing="ij")
        shapes = _shapes(across.ravel(), along.ravel(), compute, values, bounds)
        steps = [each[1] / each[0] for each in every]
        good = shapes.middles[shapes.as_good], shapes.steepness[shapes.as_good]
        (middles, steepness) = (
            (max(each.min() / step, all_of[0]), min(each.max() * step, all_of[1]))
            for each, step, all_of in zip(good, steps, (middles, steepness), strict=True)
        )
    return shapes


def _shapes(
    middles: Values, steepness: Values, compute: Values, values: Values, bounds: tuple[float, float] | None
) -> _Shapes:
    risen = _risen(compute, middles[:, None], steepness[:, None])
    starts, limits, spread = _solve(risen, values, bounds)
    residuals = starts[:, None] + (limits - starts)[:, None] * risen - values
    errors = np.maximum((residuals**2).sum(1), 1e-12 * float(np.sum(values**2)))
    number = _independent(residuals[errors.argmin()])
    return _Shapes(middles, steepness, risen, starts, limits, spread, errors, number)


def _no_curve(compute: Values, values: Values, shapes: _Shapes, last: float) -> str | None:
    """Why the best curve says nothing; None: it does."""
    best, num = shapes.best, len(values)
    if shapes.worse(float(np.sum((values - values.mean()) ** 2))) < OF_THREE:
        return "it has not risen by more than its noise"
    if shapes.limits[best] < shapes.starts[best]:
        return "it falls"
    few = max(num // 5, 3)
    curve = shapes.starts[best] + (shapes.limits[best] - shapes.starts[best]) * shapes.risen[best]
    off = float((values - curve)[-few:].mean())
    noise = (
        float(shapes.errors[best]) / max(shapes.number - 4, 1.0) / few
    ) ** 0.5  # of their mean, if neighbours err alike too
    if abs(off) > 3 * noise:
        return f"its last {few} values lie {abs(off):.2g} {'above' if off > 0 else 'below'} the curve through all"
    line = np.polynomial.Polynomial.fit(compute, values, 1)
    if shapes.worse(float(np.sum((values - line(compute)) ** 2))) < OF_TWO:
        return "it rises along a straight line as yet, and nothing says where it ends"
    if shapes.middles[best] > last:
        return "the middle of its rise lies beyond the last value, and nothing says where it ends"
    return None


def _in_bins(values: Values) -> Values:
    """Means of neighbours where there are more than MOST_VALUES: all shapes of the grid at all values take memory."""
    if len(values) <= MOST_VALUES:
        return values
    return np.array([part.mean() for part in np.array_split(values, MOST_VALUES)])


def _risen(compute: Values, middle: Any, steepness: Any) -> Values:
    """The share of the way from start to limit that is done."""
    with np.errstate(divide="ignore", over="ignore"):  # at 0 the logarithm is minus infinity, and nothing is done
        return 1 / (1 + np.exp(steepness * (np.log(middle) - np.log(compute))))


def _solve(shapes: Values, values: Values, bounds: tuple[float, float] | None) -> tuple[Values, Values, Values]:
    """For each shape (cells, N) start and limit by least squares, within bounds, and the inverse (cells, 2, 2) of the squares."""
    of_start = 1 - shapes
    aa, ab, bb = (of_start**2).sum(1), (of_start * shapes).sum(1), (shapes**2).sum(1)
    ya, yb = of_start @ values, shapes @ values
    determinant = np.maximum(aa * bb - ab**2, 1e-12)
    starts, limits = (bb * ya - ab * yb) / determinant, (aa * yb - ab * ya) / determinant
    if bounds is not None:
        for _ in range(2):  # where one is at a bound the other is what is best beside it
            limits = np.clip(limits, *bounds)
            starts = np.clip(np.where(aa > 0, (ya - ab * limits) / np.maximum(aa, 1e-12), starts), *bounds)
            limits = np.where(bb > 1e-12, np.clip((yb - ab * starts) / np.maximum(bb, 1e-12), *bounds), limits)
    spread = np.stack([bb, -ab, -ab, aa], 1).reshape(-1, 2, 2) / determinant[:, None, None]
    return starts, limits, spread


def _independent(residuals: Values) -> float:
    """How many independent values would say as much: fewer where the errors of neighbours are alike."""
    total = float(np.sum(residuals**2))
    alike = float(np.sum(residuals[1:] * residuals[:-1])) / total if total else 0.0
    return len(residuals) * (1 - max(alike, 0.0)) / (1 + max(alike, 0.0))


# ---- of a run --------------------------------------------------------------------------------------------------------

SHARES = ("accuracy", "code", "countdown", "exact_match", "format", "reasoning_gym")
"""Rewards of which none is below 0 or above 1. Another may pass what it was so far."""


def _shares(run: Run) -> set[str]:
    """Names under which the run has such rewards; `accuracy` also where functions were given to the trainer."""
    return {"accuracy"} | {
        each.get("name") or each["function"] for each in run.config.get("rewards", []) if each["function"] in SHARES
    }


def prediction(run: Run) -> dict[str, Any] | None:
    """What the curve through a run's values says, or why it says nothing.

    Returns:
        name of the metric, number of values and whether they are held out; `reason`, or `step`, `at_end`, `limit` (null where it
        cannot be told) and `curve`, its value at each of the run's steps. None: the run has no rewards.
    """
    held_out = _values(run, run.held_out_metric)
    sampled = _values(run, run.sampled_metric) or _values(run, "reward/mean")
    # where other questions come to be asked what is sampled is no measure of the policy
    rollout, data = run.config.get("rollout", {}), run.config.get("data", {})
    passes_over = min(rollout.get("solved_share", 1), rollout.get("hopeless_share", 1)) < 1
    is_held_out = len(held_out) >= FEWEST_EVALUATIONS or passes_over or data.get("order_by") is not None
    chosen = held_out if is_held_out else sampled
    name = run.held_out_metric if is_held_out else run.sampled_metric
    name = name if is_held_out or _values(run, name) else "reward/mean"
    if not chosen:
        return None
    about = {"name": name, "values": len(chosen), "held_out": is_held_out}
    lag = 0 if is_held_out else 1  # a step's answers are sampled before it is trained on
    values = np.array([value for _, value in chosen])
    compute = np.array([step - lag for step, _ in chosen], dtype=np.float64)
    steps, planned = run.metrics[-1]["step"], run.config.get("run", {}).get("steps") or 0
    end = planned if planned > steps else 2 * steps
    is_share = name.partition("/")[2] in _shares(run) or (len(run.verdicts) > 1 and name != "reward/mean")
    fewest = FEWEST_EVALUATIONS if is_held_out else FEWEST_STEPS
    found = fit(compute, values, end=end - lag, fewest=fewest, bounds=(0.0, 1.0) if is_share else None)
    if isinstance(found, str):
        return {**about, "reason": found}
    at_steps = np.array(
        [max(row["step"] - lag, 0) for row in run.metrics], dtype=np.float64
    )  # 0: held out at the start
    limit = found.limits
    return {
        **about,
        "step": end,
        "planned": planned > steps,
        "at_end": [found.at_end.value, found.at_end.low, found.at_end.high],
        "limit": None if limit is None else [limit.value, limit.low, limit.high],
        "curve": [round(float(value), 6) for value in found.at(at_steps)],
    }


def said(told: dict[str, Any]) -> str:
    """A line for a terminal."""
    if "reason" in told:
        return f"no prediction of {told['name']}: {told['reason']}"

    def written(numbers: list[float]) -> str:
        return f"{numbers[0]:.3f} ({numbers[1]:.3f} to {numbers[2]:.3f})"

    limit = f"its limit is {written(told['limit'])}" if told["limit"] else "its limit cannot be told yet"
    more = "" if told["planned"] else ", twice as far"
    return f"{told['name']} leads to {written(told['at_end'])} at step {told['step']:,}{more}; {limit}"


def _values(run: Run, name: str) -> list[tuple[int, float]]:
    """Of the steps that have one: the step and the value."""
    return [(row["step"], row[name]) for row in run.metrics if name in row and np.isfinite(row[name])]
