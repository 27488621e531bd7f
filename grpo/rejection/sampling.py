"""Samples of questions with their verdicts and token ids, written to a directory that another start goes on with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grpo.evaluation.sample_file import SAMPLES, Book, claimed, finished
from grpo.inference.model import Sampler
from grpo.observe.bar import Bar
from grpo.scoring.answers import answer_in_parts, evaluation_rows
from grpo.scoring.scorer import Scorer
from grpo.system import distributed
from grpo.system.out_of_memory import retry_with_fewer_sequences
from grpo.types import Generator, Group, Prompt, Sampling, Scores

Row = dict[str, Any]

KEPT = ("row", "sample", "completion", "finish_reason", "num_tokens", "reward", "rewards", "right", "extra")


def sample_rows(groups: list[Group], scores: Scores) -> list[Row]:
    """A row per completion: as `evaluation_rows` without the columns of the question, and with the ids of its tokens."""
    ids = [completion.token_ids for group in groups for completion in group.completions]
    rows = evaluation_rows(groups, scores)
    return [
        {name: row[name] for name in KEPT if name in row} | {"completion_ids": list(own)}
        for row, own in zip(rows, ids, strict=True)
    ]


def seed_of(seed: int, *key: object) -> int:
    """Of the random numbers of a question: a function of its place, whoever samples it and when."""
    return random.Random(" ".join(map(str, (seed, *key)))).getrandbits(62)


def claim(directory: Path, wanted: Mapping[str, Any]) -> AbstractContextManager[None]:
    """See sample_file.claimed."""
    wanted = json.loads(json.dumps(wanted))  # as it reads back
    return claimed(directory, wanted, option="--out", difference=_difference)


def _difference(name: str, before: Any, now: Any) -> str:
    if name in CONTENTS or name.startswith("the reward "):
        return f"{CONTENTS.get(name, f'{name} has changed')} since the samples there were begun"
    return f"the samples there have {name} {before!r}, and these {now!r}"


CONTENTS = {
    "model_files": "the files of the model have changed",
    "questions": "the questions, or how they become prompts, have changed",
    "rows": "the rows that are to be rewritten have changed",
}


def sample(
    prompts: list[Prompt],
    *,
    load: Callable[[], Sampler],
    scorer: Scorer,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    directory: Path,
    what: str,
    wrap: Callable[[Generator], Generator] = lambda generator: generator,
) -> None:
    """Answer this process's share of the prompts that are not done in the directory. Every process calls it.

    Args:
        prompts: each with a `row` of its own and a `seed`.
        load: loads the model; not called where nothing is left to do.
        what: is sampled, in words.
        wrap: what stands between the engine and the scorer.
    """
    processes = distributed.join()
    path = directory / SAMPLES
    wanted = {prompt.row: num_samples for prompt in prompts}
    done = processes.on_main(lambda: finished(path, ["row"], wanted))
    left = [prompt for prompt in prompts if prompt.row not in done]
    mine = left[processes.rank :: processes.world_size]
    if not left:
        return
    before = f", {len(prompts) - len(left):,} of them before" * (len(left) < len(prompts))
    processes.say(f"{what}: {len(prompts):,} x {num_samples}{before}")
    sampler = load()
    most_tokens = len(mine) * num_samples * sampling.max_tokens
    bar = Bar(what, total=len(mine), most_tokens=most_tokens, shown=processes.is_main)
    book = Book(path, {}, bar)

    def work() -> None:
        answer_in_parts(
            [prompt for prompt in mine if prompt.row not in book.written],
            generator=wrap(sampler.generator),
            scorer=scorer,
            sampling=sampling,
            num_samples=num_samples,
            seed=seed,
            on_rows=book.add,
            rows_of=sample_rows,
        )

    try:
        with bar:
            retry_with_fewer_sequences(work, sampler.generator, rank=processes.rank)
    finally:
        book.flush()
    processes.barrier()


def by_question(path: Path) -> Iterator[tuple[int, list[Row]]]:
    """Each question's number and its rows in the order of sampling, by number. The file may be larger than memory."""
    places: dict[int, list[int]] = {}
    with path.open("rb") as file:
        place = 0
        for line in file:
            places.setdefault(json.loads(line)["row"], []).append(place)
            place += len(line)
        for row in sorted(places):
            yield row, sorted((_at(file, place) for place in places[row]), key=lambda each: each["sample"])


def _at(file: Any, place: int) -> Row:
    file.seek(place)
    return dict(json.loads(file.readline()))
