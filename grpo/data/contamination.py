"""Do test questions share their words with training questions? DeepSeek-R1 removed training data that shares a 10-gram with a
benchmark (Nature version, supplement D.1); this finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grpo.text.aha import HAN

NUM_WORDS = 10
_WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")  # each Chinese character is a word: nothing stands between them


@dataclass(frozen=True)
class Overlap:
    """A test question and the training question that shares most with it."""

    test: int  # its place
    train: int
    share: float  # of the test question's words that lie in runs shared with it; 1: all, so it may be the same question
    words: str  # the first run


def normalized(text: str) -> str:
    """Without what makes no difference to a reader: case, and how much white space there is."""
    return " ".join(text.casefold().split())


def overlaps(train: Iterable[str], test: Sequence[str], *, num_words: int = NUM_WORDS) -> list[Overlap]:
    """The test questions that share a run of `num_words` words with any training question, in order.

    Words are runs of letters, digits and underscores, whatever their case; all else is dropped. A question with fewer words
    shares them only with one that is the same but for case and white space: without its punctuation "3 + 4" would be "3 - 4".
    """
    runs_of_test = [_runs(question, num_words) for question in test]
    wanted: dict[str, list[tuple[int, int]]] = {}
    for place, runs in enumerate(runs_of_test):
        for start, run in enumerate(runs):
            wanted.setdefault(run, []).append((place, start))
    best: dict[int, Overlap] = {}
    seen: set[frozenset[str]] = set()
    for number, question in enumerate(train):
        found = frozenset(run for run in _runs(question, num_words) if run in wanted)
        if found in seen:  # of questions in the same words around other numbers the first counts, and pairs are many
            continue
        seen.add(found)
        shared: dict[int, set[int]] = {}  # of each test question, where the shared runs start
        for run in found:
            for place, start in wanted[run]:
                shared.setdefault(place, set()).add(start)
        for place, starts in shared.items():
            runs = runs_of_test[place]
            covered = {start + offset for start in starts for offset in range(num_words)}
            share = min(len(covered) / (len(runs) + num_words - 1), 1.0)
            if place not in best or share > best[place].share:
                best[place] = Overlap(place, number, share, runs[min(starts)])
    return [best[place] for place in sorted(best)]


def _runs(question: str, num_words: int) -> list[str]:
    words = _WORD.findall(question.casefold())
    if len(words) < num_words:
        return [normalized(question)]
    return [" ".join(words[start : start + num_words]) for start in range(len(words) - num_words + 1)]
