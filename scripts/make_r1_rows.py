"""Make configs/r1-tiny/other.jsonl: rows of another kind than arithmetic, which R1's second supervised stage keeps beside them.

    python scripts/make_r1_rows.py [--out configs/r1-tiny/other.jsonl]

The paper has 200,000 rows of writing, facts and translation there. These are as plain as the tiny model: who has more or fewer,
which thing was named first, which was not named. Words and form are the quickstart's; the answers are words, not numbers, and
are worked out here, not by a model.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from make_tiny_base import GOODS, NAMES, SEED, TAGGED

NUM_ROWS = 480


def compare(rng: random.Random) -> tuple[str, str, str]:
    """Question, thought and answer."""
    (one, other), what = rng.sample(NAMES, 2), rng.choice(GOODS)
    mine, theirs = rng.sample(range(2, 21), 2)
    word, wins = rng.choice((("more", mine > theirs), ("fewer", mine < theirs)))
    relation = "more" if mine > theirs else "fewer"
    question = f"{one} has {mine} {what}. {other} has {theirs} {what}. Who has {word} {what}?"
    return question, f"{mine} is {relation} than {theirs}.\n", one if wins else other


def first(rng: random.Random) -> tuple[str, str, str]:
    things = rng.sample(GOODS, 3)
    named = f"{things[0]}, {things[1]} and {things[2]}"
    return f"{rng.choice(NAMES)} has {named}. Which is first?", f"First {things[0]}.\n", things[0]


def owner(rng: random.Random) -> tuple[str, str, str]:
    (one, other), (mine, theirs) = rng.sample(NAMES, 2), rng.sample(GOODS, 2)
    who, what = rng.choice(((one, mine), (other, theirs)))
    return f"{one} has {mine}. {other} has {theirs}. Who has {what}?", f"{who} has {what}.\n", who


def rows(seed: int, number: int) -> Iterator[dict[str, str]]:
    rng, seen = random.Random(seed), set()
    while len(seen) < number:
        question, thought, answer = rng.choice((compare, first, owner))(rng)
        if question not in seen:
            seen.add(question)
            yield {
                "question": question,
                "answer": answer,
                "completion": TAGGED.format(thought=thought, answer=answer),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("configs/r1-tiny/other.jsonl"))
    args = parser.parse_args()
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows(SEED, NUM_ROWS)))


if __name__ == "__main__":
    main()
