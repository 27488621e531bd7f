r"""Throw random completions at the accuracy reward, in the worker processes of a run: does one earn what it should not?

    python scripts/fuzz_verifier.py --cases 10000 --seed 0

Every case is one completion and the gold answers that it is scored against. Of some the value is known that the completion
commits to, and no other may be paid; of others only that two different golds may never both be paid:

    typed      an answer of any kind that the verifier reads (scripts/fuzz_answers.py: units, bases, sets, intervals, choices),
               in a right spelling, which has to be paid, or a wrong one
    value      an expression from a grammar, whose exact value is computed alongside, in honest spellings
    list       several candidates with something between them, in boxes, tags, brackets, sets
    mutate     an honest completion with characters deleted, doubled, swapped, replaced or inserted
    unicode    random characters of many scripts, with digits that are not ASCII
    nesting    brackets, fractions, roots and boxes thousands deep
    huge       towers of powers and factorials, and integers of thousands of digits

Exit code 1 if there was a false reward, a right spelling that is refused, a call over its time, or a crash.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cloudpickle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo.rewards.accuracy import Source, accuracy

from grpo.scoring.worker import Call, Outcome
from grpo.scoring.worker_pool import WorkerPool
from scripts.fuzz_answers import KINDS

SECONDS = 10.0  # of one call, as in a run
MEMORY_GIB = 1.0


def _table(text: str) -> list[str]:
    return text.split("¦")


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(before, after) for before, _, after in (entry.partition("…") for entry in _table(text))]


SEPARATORS = _table(
    ", ¦,¦ or ¦ and ¦; ¦/¦|¦ ¦\n¦¦=¦ = ¦+¦-¦\\pm ¦\\cup ¦\\lor ¦\\quad ¦\\,¦\\;¦~¦\\\\¦&¦...¦..¦–¦、¦，¦ \\text{ or } "
    "¦\\text{, }¦:¦<¦\\le ¦\\to ¦^¦_¦\\approx ¦\\neq ¦\\equiv ¦%¦$¦$ $¦}{¦} \\boxed{¦}, \\boxed{¦} or \\boxed{¦\x00¦\u200b"
)
BRACKETS = _pairs(
    "…¦{…}¦[…]¦(…)¦\\{…\\}¦\\left(…\\right)¦|…|¦\\text{…}¦\\boxed{…}¦$…$¦\\(…\\)¦\\[…\\]¦\\begin{pmatrix}…\\end{pmatrix}"
    "¦\\max(…)¦x=…¦It is ….¦\\frac{…}{1}¦\\sqrt{…}¦**…**¦x \\in \\{…\\}"
)
TOWERS = _pairs("…^{2}¦(…)!¦\\exp(…)¦\\sqrt{…}¦\\sin(…)¦\\log(…)¦\\prod_{k=1}^{…} k¦10**10**…¦|…|¦-(…)¦1/…")
ALPHABET = (
    "0123456789+-*/^_=<>(){}[]|\\.,;:!%$&~ \n\tabcdefinorstxyπ√∞°±×÷·−½²³①１２３١٢٣۱۲۳१२३𝟏𝟐𝟑"
    "\u200b\u202e\u2066\ufeff\x00\x1bаеохΑВΕ一二三"
)
FRAGMENTS = _table(
    "\\frac¦\\sqrt¦\\boxed{¦\\text{¦\\pm¦\\cdot¦\\times¦\\left¦\\right¦<answer>¦</answer>¦10^¦\\begin{pmatrix}¦\\end{pmatrix}"
    "¦e^¦\\log¦\\sin¦\\infty¦\\approx¦ or ¦\\{¦\\}¦\\%¦\\circ¦!"
)


NO_GOLD = "no gold"


@dataclass(frozen=True)
class Case:
    """A completion, the golds it is scored against, and the value it commits to, where that is known."""

    strategy: str
    completion: str
    golds: list[Fraction] | list[str]
    value: Fraction | str | None = None  # paid at most under this one; NO_GOLD: under none
    source: Source = "answer_tag"
    must_be_paid: bool = False  # under `value`


def cases(num: int, seed: int) -> Iterator[Case]:
    """The same `num` cases for the same seed."""
    rng = random.Random(seed)
    for i in range(num):
        yield STRATEGIES[i % len(STRATEGIES)](rng)


def typed(rng: random.Random) -> Case:
    """One kind of answer: a spelling of the first gold, which is paid under it alone, or one that is paid under none."""
    draw = rng.choice(KINDS)
    answer = draw(rng)
    golds = [answer.right[0], *answer.others]
    is_wrong = bool(answer.wrong) and rng.random() < 0.3
    text = rng.choice(answer.wrong if is_wrong else answer.right)
    in_box = rng.random() < 0.4 or "\\boxed" in text
    content = text if "\\boxed" in text else f"\\boxed{{{text}}}"
    completion = f"So {content}" if in_box else f"<think> Let me see. </think> <answer>{text}</answer>"
    return Case(
        f"typed {draw.__name__}",
        completion,
        golds,
        NO_GOLD if is_wrong else golds[0],
        "boxed" if in_box else "answer_tag",
        must_be_paid=not is_wrong,
    )


def value(rng: random.Random) -> Case:
    """An honest answer and golds that differ from it: by one, by sign, inverted, a hundredfold, by a digit."""
    text, exact = _expression(rng, depth=rng.randint(0, 3))
    golds = {
        exact,
        exact + 1,
        -exact,
        exact * 100,
        exact / 100,
        exact + Fraction(1, 10),
        Fraction(rng.randint(-99, 99)),
    }
    golds |= {1 / exact} if exact else set()
    return _case(rng, "value", _honest(rng, text), golds, exact)


def list_of_candidates(rng: random.Random) -> Case:
    numbers = rng.sample(range(-20, 100), rng.randint(2, 12))
    joined = rng.choice(SEPARATORS).join(map(str, numbers))
    if rng.random() < 0.3:
        joined = "".join(f"{number}{rng.choice(SEPARATORS)}" for number in numbers)
    for _ in range(rng.randint(0, 2)):
        before, after = rng.choice(BRACKETS)
        joined = before + joined + after
    return _case(rng, "list", joined, {Fraction(number) for number in numbers})


def mutate(rng: random.Random) -> Case:
    text, exact = _expression(rng, depth=rng.randint(0, 2))
    characters = list(f"<think> {text} </think> <answer>{_honest(rng, text)}</answer>")
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(characters))
        characters[at : at + rng.randint(0, 2)] = rng.choice(
            [
                [],
                [characters[at]] * 2,
                [rng.choice(ALPHABET)],
                [rng.choice(FRAGMENTS)],
                [characters[at - 1]],
                ["<answer>"],
            ]
        )
    return Case("mutate", "".join(characters), _golds(rng, "".join(characters), {exact}))


def unicode(rng: random.Random) -> Case:
    pieces = [rng.choice(ALPHABET) if rng.random() < 0.8 else rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 60))]
    if rng.random() < 0.3:
        pieces = [chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x1D7CE, 0x1D800)])) for _ in pieces]
    return _case(rng, "unicode", "".join(pieces), set())


def nesting(rng: random.Random) -> Case:
    depth = rng.choice([5, 7, 20, 1000, 20_000])
    before, after = rng.choice(
        [*BRACKETS, ("\\frac{1}{", "}"), ("x^{", "}"), ("\\sqrt[3]{", "}"), ("\\frac{", "}{2}"), ("-(", ")")]
    )
    number = rng.randint(2, 99)
    text = before * depth + str(number) + after * (depth - rng.choice([0, 0, 1, depth]))
    return _case(rng, "nesting", text, {Fraction(number)})


def huge(rng: random.Random) -> Case:
    if rng.random() < 0.2:
        return _case(rng, "huge", "".join(rng.choices("0123456789", k=rng.randint(50, 5000))), set())
    atoms = ["0", "1", "2", "9", "99", "10", str(10**6), str(rng.randrange(10**50)), "x", "e", "\\pi"]
    text = rng.choice(atoms)
    for _ in range(rng.randint(1, 5)):
        before, after = rng.choice(TOWERS)
        other = rng.choice(atoms)
        power = [f"{other}^{{{text}}}", f"({text})^{{{other}}}", f"\\binom{{{text}}}{{{other}}}", f"{text} - {text}"]
        text = rng.choice(
            [*power, f"\\frac{{{text}}}{{{other}}}", f"{text} \\cdot {other}", *[before + text + after] * 4]
        )
    return _case(rng, "huge", text, set())


STRATEGIES: list[Callable[[random.Random], Case]] = [
    typed,
    typed,
    typed,
    value,
    list_of_candidates,
    mutate,
    unicode,
    nesting,
    huge,
]


def _case(rng: random.Random, strategy: str, content: str, golds: set[Fraction], exact: Fraction | None = None) -> Case:
    """The content where an answer is looked for: in a tag, sometimes in a box alone."""
    golds_listed = _golds(rng, content, golds)
    if rng.random() < 0.25:
        return Case(strategy, f"So \\boxed{{{content}}}", golds_listed, exact, "boxed")
    return Case(strategy, f"<think> Let me see. </think> <answer>{content}</answer>", golds_listed, exact)


def _golds(rng: random.Random, content: str, golds: set[Fraction]) -> list[Fraction]:
    """At most eight golds: those given, whatever numbers the content shows, and what it may be mistaken for."""
    shown = "".join(c if c in "0123456789" else " " for c in content[:300]).split()
    found = {Fraction(int(digits[:12])) for digits in shown[:4] + shown[-4:]}
    extra = [Fraction(n) for n in (0, 1, rng.randint(-9, 99))]
    return list(dict.fromkeys([*sorted(golds), *sorted(found - golds), *extra]))[:8]


def _expression(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """LaTeX and its exact value."""
    if depth == 0:
        number = rng.choice([rng.randint(0, 20), rng.randint(0, 9999), Fraction(rng.randint(1, 999), 100)])
        return (str(number), Fraction(number)) if isinstance(number, int) else (f"{float(number):.2f}", number)
    (a, x), (b, y) = _expression(rng, depth - 1), _expression(rng, rng.randint(0, depth - 1))
    options = [
        (f"({a}) + ({b})", x + y),
        (f"({a}) - ({b})", x - y),
        (f"({a}) \\cdot ({b})", x * y),
        (f"({a}) \\times ({b})", x * y),
        (f"-({a})", -x),
        (f"({a})^2", x * x),
        (f"\\left({a}\\right)", x),
        (f"\\sqrt{{({a})^2}}", abs(x)),
    ]
    if y:
        options += [(f"\\frac{{{a}}}{{{b}}}", x / y), (f"({a}) / ({b})", x / y), (f"\\dfrac{{{a}}}{{{b}}}", x / y)]
    return rng.choice(options)


def _honest(rng: random.Random, text: str) -> str:
    return rng.choice(
        ["{}", " {} ", "${}$", "\\boxed{{{}}}", "x = {}", "\\({}\\)", "{}.", "$$ {} $$", "\\boxed{{x = {}}}"]
    ).format(text)


def graded(completion: str, answer: str, source: Source) -> tuple[bool | str, float]:
    """Runs in the worker: whether it is paid, or the exception there was, and the seconds that took."""
    started = time.perf_counter()
    try:
        paid: bool | str = accuracy(completion, answer, source=source) == 1.0
    except Exception as error:
        paid = repr(error)
    return paid, time.perf_counter() - started


def is_refused(case: Case, paid: list[Fraction] | list[str]) -> bool:
    """Whether a right spelling was not paid."""
    return case.must_be_paid and case.value not in paid


def false_reward(case: Case, paid: list[Fraction] | list[str]) -> bool:
    """Whether these golds should not all have been paid."""
    return len(paid) > 1 or (case.value is not None and any(gold != case.value for gold in paid))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    tried = list(cases(options.cases, options.seed))
    pool = WorkerPool([cloudpickle.dumps(graded)], files=[], num_workers=options.workers, memory_gib=MEMORY_GIB)
    calls = [
        Call(0, {"completion": case.completion, "answer": str(gold), "source": case.source}, SECONDS)
        for case in tried
        for gold in case.golds
    ]
    started = time.perf_counter()
    outcomes = iter(pool.run(calls))
    seconds = time.perf_counter() - started
    pool.close()
    return report(tried, [[next(outcomes) for _ in case.golds] for case in tried], len(calls), seconds)


def report(tried: list[Case], outcomes: list[list[Outcome]], num_calls: int, seconds: float) -> int:
    """Print what came of it; 1 if anything was wrong."""
    counts: Counter[str] = Counter()
    slowest: list[tuple[float, str]] = []
    for case, results in zip(tried, outcomes, strict=True):
        values = {
            gold: result.value for gold, result in zip(case.golds, results, strict=True) if result.kind == "value"
        }
        paid = [gold for gold, (verdict, _) in values.items() if verdict is True]
        faults = {result.kind for result in results} - {"value"}
        faults |= {"false reward"} if false_reward(case, paid) else set()
        faults |= {"refused"} if is_refused(case, paid) and not faults else set()
        faults |= {"crash" for verdict, _ in values.values() if isinstance(verdict, str)}
        for fault in faults:
            under = ", ".join(map(str, paid)) or "none"
            text = repr(case.completion[:300])
            print(f"{fault}: {case.strategy}, {case.source}, paid under {under}, committed to {case.value}: {text}")
        counts.update(faults)
        counts.update({f"{case.strategy} paid": bool(paid), case.strategy: 1})
        slowest += [(taken, f"{case.completion[:120]!r} against {gold}") for gold, (_, taken) in values.items()]
    print(f"{len(tried):,} completions, {num_calls:,} gradings in {seconds:.0f} s")
    print(f"false rewards {counts['false reward']}, hangs {counts['timeout']}, crashes {counts['crash']}")
    print(f"right spellings refused {counts['refused']}")
    for strategy in dict.fromkeys(case.strategy for case in tried):
        print(f"  {strategy}: {counts[strategy]:,} tried, {counts[strategy + ' paid']:,} paid under one gold")
    for taken, what in sorted(slowest, reverse=True)[:5]:
        print(f"  slow: {taken:.2f} s: {what}")
    return int(any(counts[fault] for fault in ("false reward", "refused", "timeout", "crash")))


if __name__ == "__main__":
    sys.exit(main())
