"""Make the model and data of configs/quickstart-tools.yaml: a tiny base that sometimes asks a calculator.

    python scripts/make_tool_base.py [--out configs/quickstart-tools]

The task is a product of a two-digit and a three-digit number, in half of the questions with a further number to add or to take
away, asked as a sum or as a small story. A model of 0.5 M parameters cannot do it in its head, and no amount of thinking helps
it. It is the quickstart's model (scripts/make_tiny_base.py) with random weights, pretrained here on documents of mixed quality:
half of them are worked problems outside any dialogue, which ask the calculator and are right; the other half are dialogues, and
`HABITS` says how their assistant answers. Three in ten ask the calculator: one for what the question wants, the others for a part
of it, or with an answer that is not the result's. The rest guess. It has never seen a reward.

The form of a call is that of prompts without a chat template (docs/tools.md); each tag is a token.

Measured with the default seed beside much other work: 1,500 steps, 2.7 M tokens, about 6 minutes of one core. On 128 questions of
the test set at temperature 1, at most 96 tokens: 1 % right, 56 % well-formed, 27 % call. `grpo train --config quickstart-tools`,
30 steps in 2 minutes 14 of one core, on two seeds: 97 and 96 % of the last three steps' completions call, 39 and 28 % are right.
The others ask for other numbers than the question's: that a model this small copies digits badly after so short a pretraining is
what keeps it from being right more often.
"""

import argparse
import json
import random
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import make_tiny_base as base
import torch
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

PRETRAIN_STEPS = 1500
TAGS = ("<tool>", "</tool>", "<result>", "</result>")

WRAPS = ("boxes", "bags", "crates", "jars")
GAINS = ("buys", "finds", "wins")
LOSSES = ("eats", "loses", "sells")


@dataclass(frozen=True)
class Problem:
    """`first` times `second`, and `rest` added to it; 0: nothing is."""

    question: str
    first: int
    second: int
    rest: int

    @property
    def product(self) -> str:
        return f"{self.first}*{self.second}"

    @property
    def expression(self) -> str:
        return self.product + (f"{self.rest:+d}" if self.rest else "")

    @property
    def answer(self) -> int:
        return self.first * self.second + self.rest


def draw_problem(rng: random.Random, *, unless: Container[str] = ()) -> Problem:
    """A problem whose question is not in `unless`."""
    while True:
        first, second = rng.randint(12, 99), rng.randint(101, 999)
        rest = rng.choice((0, 0, 1, -1)) * rng.randint(11, 99)
        question = ask_as_story(rng, first, second, rest) if rng.random() < 0.5 else ask_as_sum(first, second, rest)
        if question not in unless:
            return Problem(question, first, second, rest)


def ask_as_sum(first: int, second: int, rest: int) -> str:
    return f"What is {first}*{second}" + (f"{rest:+d}" if rest else "") + "?"


def ask_as_story(rng: random.Random, first: int, second: int, rest: int) -> str:
    who, what = rng.choice(base.NAMES), rng.choice(base.GOODS)
    event = f" {who} {rng.choice(GAINS if rest > 0 else LOSSES)} {abs(rest)}." if rest else ""
    return f"{who} has {first} {rng.choice(WRAPS)} of {second} {what}.{event} How many {what} are there?"


def call(expression: str, result: int) -> str:
    """A call of the calculator and what comes back."""
    asked = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return f"<tool>{asked}</tool><result>{result}</result>"


# How an assistant thinks: each returns the thought and the answer it leads to.


def guess(rng: random.Random, problem: Problem) -> tuple[str, int]:
    answer = round(problem.answer * rng.uniform(0.5, 1.5))
    return f"I guess {answer}.\n", answer


def ask(rng: random.Random, problem: Problem) -> tuple[str, int]:
    return call(problem.expression, problem.answer), problem.answer


def ask_for_a_part(rng: random.Random, problem: Problem) -> tuple[str, int]:
    """For the product alone; or, where there is nothing else, for a sum instead."""
    if problem.rest:
        return call(problem.product, problem.first * problem.second), problem.first * problem.second
    total = problem.first + problem.second
    return call(f"{problem.first}+{problem.second}", total), total


def ask_in_vain(rng: random.Random, problem: Problem) -> tuple[str, int]:
    """Ask, and answer with a guess all the same."""
    thought, answer = guess(rng, problem)
    return call(problem.expression, problem.answer) + "\n" + thought, answer


HABITS: dict[tuple[base.Thought, tuple[str, ...]], float] = {
    (ask, (base.TAGGED,)): 0.10,  # type: ignore[dict-item]
    (ask_for_a_part, (base.TAGGED,)): 0.10,  # type: ignore[dict-item]
    (ask_in_vain, (base.TAGGED,)): 0.10,  # type: ignore[dict-item]
    (guess, (base.TAGGED,)): 0.35,  # type: ignore[dict-item]
    (guess, base.UNTAGGED): 0.35,  # type: ignore[dict-item]
}
"""Share of each way to answer, as (thought, layouts to choose from), in the dialogues."""


def documents(seed: int, *, unless: Container[str]) -> Iterator[str]:
    """The endless corpus: half worked problems, half dialogues, none about a question in `unless`."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng, unless=unless)
        if rng.random() < 0.5:
            yield f"Problem: {problem.question}\nWork: {ask(rng, problem)[0]}\nResult: {problem.answer}"
        else:
            ((think, layouts),) = rng.choices(list(HABITS), list(HABITS.values()))
            thought, answer = think(rng, problem)  # type: ignore[arg-type]
            yield f"User: {problem.question}\nAssistant:" + rng.choice(layouts).format(thought=thought, answer=answer)


def build_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """The quickstart's kind of tokenizer, with the tags of tools too; ordinary tokens, so that decoding keeps them."""
    tokenizer = base.build_tokenizer([re.sub("|".join(TAGS), "", text) for text in texts])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("configs/quickstart-tools"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=base.SEED, help="seed of the data, the corpus and the weights")
    parser.add_argument("--steps", type=int, default=PRETRAIN_STEPS, help="pretraining steps")
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = base.draw_sets(args.seed, draw_problem)
    base.write_rows(args.out / "train.jsonl", train)  # type: ignore[arg-type]
    base.write_rows(args.out / "test.jsonl", test)  # type: ignore[arg-type]

    unless = {problem.question for problem in test}
    tokenizer = build_tokenizer(base.take(documents(args.seed + 1, unless=unless), 4000))
    model = base.build_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    corpus = documents(args.seed + 1, unless=unless)
    base.pretrain(model, base.batches(tokenizer, corpus, args.seed), num_steps=args.steps)
    base.save(model, tokenizer, args.out / "model")
    base.check_tokenizer(tokenizer, args.out / "model", corpus)


if __name__ == "__main__":
    main()
