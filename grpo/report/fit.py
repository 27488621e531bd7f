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
STEEPNESS = np.geomspace(0.25, 8, 36)
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
    if len(values) < fewest:
        return f"{len(values)} values are too few for a curve; {fewest} would do"
    if np.ptp(values) == 0:
        return "it has not changed"
    last = float(compute.max())
    middles = np.geomspace(max(last, 1.0) / 100, FAR * max(last, 1.0), 72)
    grid = [(middle, steep) for middle in middles for steep in STEEPNESS]
    shapes = np.stack([_risen(compute, *each) for each in grid])  # (cells, N)
    starts, limits, spread = _solve(shapes, values, bounds)
    errors = ((starts[:, None] + (limits - starts)[:, None] * shapes - values) ** 2).sum(1)
    best = int(errors.argmin())
    residuals = values - (starts[best] + (limits[best] - starts[best]) * shapes[best])
    number = _independent(residuals)
    least = max(float(errors[best]), 1e-12 * float(np.sum(values**2)) + 1e-300)

    def worse(other: float) -> float:
        return number * float(np.log(max(other, least) / least))

    if worse(float(np.sum((values - values.mean()) ** 2))) < OF_THREE:
        return "it has not risen by more than its noise"
    if limits[best] < starts[best]:
        return "it falls"
    sigma = (least / max(number - 4, 1.0)) ** 0.5 * (number / len(values)) ** 0.5
    few = max(len(values) // 5, 3)
    off = float(residuals[-few:].mean())
    if abs(off) > 3 * sigma * (len(values) / number / few) ** 0.5:
        return f"its last {few} values lie {abs(off):.2g} {'above' if off > 0 else 'below'} the curve through all"
    line = np.polynomial.Polynomial.fit(compute, values, 1)
    if worse(float(np.sum((values - line(compute)) ** 2))) < OF_TWO:
        return "it rises along a straight line as yet, and nothing says where it ends"
    if grid[best][0] > last:
        return "the middle of its rise lies beyond the last value, and nothing says where it ends"
    allowed = OF_ONE * number / max(number - 4, 1.0)  # of few values the errors are underestimated
    slack = allowed - number * np.log(np.maximum(errors, least) / least)
    inside = slack >= 0
    at_end = np.array([_risen(np.array([end]), *each)[0] for each in grid])
    found = _interval(starts + (limits - starts) * at_end, at_end, spread, slack, inside, sigma, best, bounds)
    rise = float((limits[best] - starts[best]) * shapes[best].max())
    if found.high - found.low > max(rise, 0.0):
        return f"its end may lie anywhere from {found.low:.3g} to {found.high:.3g}, more than it has risen"
    edge = middles[-1] * 0.999
    open_ended = any(grid[i][0] > edge for i in np.flatnonzero(inside))
    reach = _interval(limits, np.ones(len(grid)), spread, slack, inside, sigma, best, bounds)
    touches = bounds is not None and reach.high >= bounds[1] - 1e-9
    middle, steep = grid[best]
    known = None if open_ended or touches else reach
    return Curve(float(starts[best]), float(limits[best]), float(middle), float(steep), found, known)


def _risen(compute: Values, middle: float, steepness: float) -> Values:
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


def _interval(
    values: Values,
    risen: Values,
    spread: Values,
    slack: Values,
    inside: NDArray[np.bool_],
    sigma: float,
    best: int,
    bounds: tuple[float, float] | None,
) -> Estimate:
    """What a number is over all curves that are about as good: at each shape, as far as start and limit may move there too."""
    direction = np.stack([1 - risen, risen], 1)
    variance = np.einsum("ci,cij,cj->c", direction, spread, direction)
    half = np.sqrt(np.maximum(slack, 0) * np.maximum(variance, 0)) * sigma
    low, high = float((values - half)[inside].min()), float((values + half)[inside].max())
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(float(values[best]), low, high)


def _independent(residuals: Values) -> float:
    """How many independent values would say as much: fewer where the errors of neighbours are alike."""
    total = float(np.sum(residuals**2))
    alike = float(np.sum(residuals[1:] * residuals[:-1])) / total if total else 0.0
    return len(residuals) * (1 - max(alike, 0.0)) / (1 + max(alike, 0.0))


# ---- of a run --------------------------------------------------------------------------------------------------------


def prediction(run: Run) -> dict[str, Any] | None:
    """What the curve through a run's values says, or why it says nothing.

    Returns:
        name of the metric, number of values and whether they are held out; `reason`, or `step`, `at_end`, `limit` (null where it
        cannot be told) and `curve`, its value at each of the run's steps. None: the run has no rewards.
    """
    held_out = _values(run, f"eval/{run.verdict}")
    sampled = _values(run, f"reward/{run.verdict}") or _values(run, "reward/mean")
    # where questions become harder what is sampled is no measure of the policy
    rollout, data = run.config.get("rollout", {}), run.config.get("data", {})
    harder = rollout.get("solved_share", 1) < 1 or data.get("order_by") is not None
    is_held_out = len(held_out) >= FEWEST_EVALUATIONS or harder
    chosen = held_out if is_held_out else sampled
    name = f"eval/{run.verdict}" if is_held_out else f"reward/{run.verdict}"
    name = name if is_held_out or _values(run, name) else "reward/mean"
    if not chosen:
        return None
    about = {"name": name, "values": len(chosen), "held_out": is_held_out}
    lag = 0 if is_held_out else 1  # a step's answers are sampled before it is trained on
    values = np.array([value for _, value in chosen])
    compute = np.array([step - lag for step, _ in chosen], dtype=np.float64)
    steps, planned = run.metrics[-1]["step"], run.config.get("run", {}).get("steps") or 0
    end = planned if planned > steps else 2 * steps
    is_share = bool(values.min() >= 0 and values.max() <= 1)
    fewest = FEWEST_EVALUATIONS if is_held_out else FEWEST_STEPS
    found = fit(compute, values, end=end - lag, fewest=fewest, bounds=(0.0, 1.0) if is_share else None)
    if isinstance(found, str):
        return {**about, "reason": found}
    at_steps = np.array([row["step"] - lag for row in run.metrics], dtype=np.float64)
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
