"""How many completions a second one reward worker grades: whole numbers, LaTeX, programs.

    python benchmarks/grading.py

Every completion is another text, so no cache helps more than in a run, where the eight or sixteen completions of a group share
their gold answer and some of their wrong ones. Times include sending completions to the worker and verdicts back.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo.rewards import accuracy, code, sandbox

from grpo.scoring.reward import Reward
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt

THOUGHT = "<think> " + "so we add the next one and carry on, " * 30 + "</think> "  # about 1,200 characters


def integers(rng: random.Random) -> tuple[str, str]:
    gold = rng.randint(0, 9999)
    return rng.choice([str(gold), f"The answer is ${gold:,}.", f"\\boxed{{{gold + rng.randint(0, 3)}}}"]), str(gold)


def latex(rng: random.Random) -> tuple[str, str]:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.choice([2, 3, 5, 7])
    candidates = [
        f"\\frac{{{a}\\sqrt{{{c}}}}}{{{b}}}",
        f"\\frac{{{a + 1}\\sqrt{{{c}}}}}{{{b}}}",
        f"({a}, {b} + \\sqrt{{{c}}})",
    ]
    return f"\\boxed{{{rng.choice(candidates)}}}", f"\\frac{{{a}}}{{{b}}} \\sqrt{{{c}}}"


def programs(rng: random.Random) -> tuple[str, Any]:
    number = rng.randint(0, 99)
    return f"\n```python\nprint(int(input()) + {number})\n```\n", [
        {"input": str(i), "output": str(i + number)} for i in range(5)
    ]


def throughput(
    reward: Callable[..., Any], column: str, make: Callable[[random.Random], tuple[str, Any]], num: int
) -> float:
    """Completions per second of one worker, in groups of 8 under one gold answer."""
    rng = random.Random(0)
    groups = []
    for row in range(max(num // 8, 1)):
        drawn = [make(rng) for _ in range(8)]
        completions = [Completion([0], [0.0], f"{THOUGHT}<answer>{text}</answer>", "stop") for text, _ in drawn]
        groups.append(Group(Prompt(row, [0], "", "", {column: drawn[0][1]}), completions))
    with Scorer(
        [Reward(reward, args={"as_root": True} if reward is code else {})],  # its own programs, which harm nothing
        columns=[column],
        max_completion_tokens=1,
        num_workers=1,
        timeout_seconds=30.0,
        memory_gib=4.0,
    ) as scorer:
        scorer.score(groups[:1])
        started = time.perf_counter()
        scores = scorer.score(groups)
        seconds = time.perf_counter() - started
    assert not scores.rewards.isnan().any(), "a completion was not graded"
    return len(groups) * 8 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="this many times as many completions")
    scale = parser.parse_args().scale
    print("completions per second and worker (one core)")
    print(f"  whole numbers              {throughput(accuracy, 'answer', integers, int(16_000 * scale)):9,.0f}")
    print(f"  LaTeX                      {throughput(accuracy, 'answer', latex, int(800 * scale)):9,.0f}")
    print(f"  programs, 5 tests each     {throughput(code, 'tests', programs, int(80 * scale)):9.1f}", end="")
    print(f"  (sandbox: {', '.join(sorted(sandbox.working_layers()))})")


if __name__ == "__main__":
    main()
