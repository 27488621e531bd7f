"""Make rows of searches in Countdown, written out, from which a model learns to search: configs/countdown-warm/rows.jsonl.gz.

    python scripts/make_countdown_rows.py [--puzzles FILE] [--out FILE] [--rows 2000] [--max-trials 8] [--seed 0]
    python scripts/make_countdown_rows.py --give-up 0.5 --out configs/countdown-short/rows.jsonl.gz

After Stream of Search (arXiv 2404.03683) and Gandhi et al. (arXiv 2503.01307): a model that has seen wrong trials given up can
make more of them in reinforcement learning. A thought states the task, makes trials until one is right, and checks that one.

How it searches. It does not know the answer. A trial joins two of the numbers by an operation, both drawn at random, until one
number is left; each step makes a whole number from 1 to 1,000. Of DRAWS such trials, those told already left out, it tells the
one nearest to the target. So the right one comes when it is drawn.

Which searches are kept. Puzzles are taken from the end of the file, whose beginning is for reinforcement learning, until half of
the rows have three numbers and half have four. A puzzle that is not solved within --max-trials is left out, so the rows favour
puzzles with several solutions, and searches are shorter than the same draws would need for all puzzles. That leaves room for
reinforcement learning to search longer. The script prints how many were left out.

With --give-up a search ends after each wrong trial with that chance, and after --max-trials; its answer is then the nearest
trial, which is wrong. So hardly a puzzle is left out, and a model learns that one may stop: whether going on pays is for
reinforcement learning to find out.

Each row is read back by the rewards: its answer is right (or wrong, where it gave up), and the trials that `countdown_trials`
finds are those that were told.
"""

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grpo.rewards import countdown, countdown_search
from grpo.rewards.countdown_search import trials

PUZZLES, OUT = Path("configs/countdown/train.jsonl.gz"), Path("configs/countdown-warm/rows.jsonl.gz")
LEVELS = (3, 4)
DRAWS = 2
LARGEST = 1000
PATIENCE = 200  # draws without a new trial after which there may be none

STATEMENTS = (
    "The numbers are {nums}, the target is {target}.",
    "I have {nums} and want {target}.",
    "Make {target} from {nums}.",
)
OPENINGS = ("", "", "Try ", "Or ")
MISSES = ("Not {target}.", "Too {side}.", "No, too {side}.")
HITS = ("That is it.", "That is the target.", "Yes.")
STOPS = ("I stop here. The nearest is {text}.", "That takes too long. {text} comes nearest.")
CHECKS = (
    "Check: {text} = {target}, and {nums} are each used once.",
    "To verify: {text} = {target}, with {nums} used once each.",
)


class Term(NamedTuple):
    """A number, given or made."""

    value: int
    text: str
    steps: tuple[str, ...] = ()


def join(left: Term, sign: str, right: Term, value: int) -> Term:
    sides = [f"({side.text})" if side.steps else side.text for side in (left, right)]
    step = f"{left.value}{sign}{right.value}={value}"
    return Term(value, f"{sides[0]} {sign} {sides[1]}", (*left.steps, *right.steps, step))


def joined(one: Term, other: Term) -> list[Term]:
    """What an operation can make of two: the difference and the quotient are of the larger one by the smaller."""
    small, large = sorted((one, other), key=lambda term: term.value)
    results = [(one, "+", other, one.value + other.value), (one, "*", other, one.value * other.value)]
    results.append((large, "-", small, large.value - small.value))
    if large.value % small.value == 0:
        results.append((large, "/", small, large.value // small.value))
    return [join(*result) for result in results if 1 <= result[-1] <= LARGEST]


def draw(rng: random.Random, nums: list[int]) -> Term:
    """A random trial: an expression that has each number once."""
    terms = [Term(number, str(number)) for number in nums]
    while len(terms) > 1:
        rng.shuffle(terms)
        terms.append(rng.choice(joined(terms.pop(), terms.pop())))
    return terms[0]


def read_as(trial: Term, nums: list[int]) -> str | None:
    """How the reward reads it, in steps and as an expression; None: not in the same way.

    It reads `46+41=87, 97-87=10` otherwise where 87 was given too.
    """
    in_steps = trials(", ".join(trial.steps), nums)
    readings = {each.expression for each in (*in_steps, *trials(trial.text, nums))}
    return readings.pop() if in_steps and len(readings) == 1 else None


def draw_another(rng: random.Random, nums: list[int], told: Container[str]) -> tuple[str, Term] | None:
    """A trial that was not told yet, and how it is read; None: there seems to be none."""
    for _ in range(PATIENCE):
        trial = draw(rng, nums)
        reading = read_as(trial, nums)
        if reading is not None and reading not in told:
            return reading, trial
    return None


def search(
    rng: random.Random, nums: list[int], target: int, max_trials: int, give_up: float = 0.0
) -> list[Term] | None:
    """The trials up to the right one, or to where the search gave up; None: it was not found."""
    told: dict[str, Term] = {}
    while len(told) < max_trials:
        drawn = [another for _ in range(DRAWS) if (another := draw_another(rng, nums, told)) is not None]
        if not drawn:
            return None
        reading, trial = min(drawn, key=lambda another: abs(another[1].value - target))
        told[reading] = trial
        if trial.value == target or (give_up and (len(told) == max_trials or rng.random() < give_up)):
            return [*told.values()]
    return None


def write(rng: random.Random, nums: list[int], target: int, told: list[Term]) -> str:
    """The completion: it goes on after the prompt's `<think>`."""
    listed = ", ".join(map(str, nums[:-1])) + f" and {nums[-1]}"
    lines = [rng.choice(STATEMENTS).format(nums=listed, target=target)]
    for trial in told:
        said = rng.choice(HITS if trial.value == target else MISSES)
        verdict = said.format(target=target, side="high" if trial.value > target else "low")
        opening = rng.choice(OPENINGS) if len(lines) > 1 else ""
        lines.append(f"{opening}{', '.join(trial.steps)}. {verdict}")
    answer = min(told, key=lambda trial: abs(trial.value - target))
    last = CHECKS if answer.value == target else STOPS
    lines.append(rng.choice(last).format(text=answer.text, target=target, nums=listed))
    thought = "\n".join(lines)
    return f" {thought} </think> <answer> {answer.text} </answer>"


def check(completion: str, nums: list[int], target: int, told: list[Term]) -> None:
    read = trials(completion, nums)
    assert countdown(completion, nums, target) == float(told[-1].value == target), f"another verdict: {completion}"
    assert [trial.value for trial in read] == [trial.value for trial in told], f"other trials are read: {completion}"
    assert all(trial.claimed == trial.value for trial in read), f"wrong arithmetic: {completion}"
    assert countdown_search(completion, nums, target) == float(len(told) > 1), f"it reads otherwise: {completion}"


def rows(
    puzzles: list[dict[str, Any]],
    *,
    number: int,
    max_trials: int,
    seed: int,
    unsolved: Counter[int],
    give_up: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Rows of searches, from the last puzzle on; counts in `unsolved` those left out, by how many numbers they have."""
    rng = random.Random(seed)
    missing = {level: (number + place) // len(LEVELS) for place, level in enumerate(LEVELS)}
    for puzzle in reversed(puzzles):
        nums, target = puzzle["nums"], puzzle["target"]
        if not missing.get(len(nums)):
            continue
        told = search(rng, nums, target, max_trials, give_up)
        if told is None:
            unsolved[len(nums)] += 1
            continue
        completion = write(rng, nums, target, told)
        check(completion, nums, target, told)
        missing[len(nums)] -= 1
        yield {"nums": nums, "target": target, "trials": len(told), "completion": completion}
    if any(missing.values()):
        raise SystemExit(f"--rows is {number}; the puzzles give {number - sum(missing.values())}. Lower it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=Path, default=PUZZLES)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--max-trials", type=int, default=8)
    parser.add_argument("--give-up", type=float, default=0.0, metavar="CHANCE", help="after each wrong trial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.give_up <= 1:
        parser.error(f"--give-up is {args.give_up:g}; it is a chance, from 0 to 1")
    for name in ("rows", "max_trials"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    puzzles = [json.loads(line) for line in gzip.decompress(args.puzzles.read_bytes()).splitlines()]
    unsolved: Counter[int] = Counter()
    how = {"max_trials": args.max_trials, "give_up": args.give_up, "seed": args.seed}
    made = [*rows(puzzles, number=args.rows, unsolved=unsolved, **how)]
    text = "".join(json.dumps(row) + "\n" for row in made)
    args.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    for level in LEVELS:
        counts = Counter(row["trials"] for row in made if len(row["nums"]) == level)
        mean = sum(trials * count for trials, count in counts.items()) / max(counts.total(), 1)
        by_trials = ", ".join(f"{trials}: {counts[trials]}" for trials in sorted(counts))
        right = sum(
            countdown(row["completion"], row["nums"], row["target"]) for row in made if len(row["nums"]) == level
        )
        said = f"{counts.total()} rows, {right:.0f} of them right, {unsolved[level]} puzzles left out"
        print(f"{level} numbers: {said}, {mean:.2f} trials ({by_trials})")


if __name__ == "__main__":
    main()
