"""Do test questions share their words with training questions? DeepSeek-R1 removed training data that shares a 10-gram with a
benchmark (Nature version, supplement D.1); this finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

NUM_WORDS = 10
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """A test question and the first training question with a run of its words."""

    test: int  # its place
    train: int
    words: str  # what they share


def normalized(text: str) -> str:
    """Without what makes no difference to a reader: case, and how much white space there is."""
    return " ".join(text.casefold().split())


def overlaps(train: Iterable[str], test: Sequence[str], *, num_words: int = NUM_WORDS) -> list[Overlap]:
    """The test questions that share a run of `num_words` words with any training question, in order.

    Words are runs of letters, digits and underscores, whatever their case; all else is dropped. A question with fewer words
    shares them only with one that is the same but for case and white space: without its punctuation "3 + 4" would be "3 - 4".
    """
    wanted: dict[str, list[int]] = {}
    for place, question in enumerate(test):
        for gram in _grams(question, num_words):
            wanted.setdefault(gram, []).append(place)
    found: dict[int, Overlap] = {}
    for number, question in enumerate(train):
        for gram in _grams(question, num_words):
            for place in wanted.pop(gram, ()):
                found.setdefault(place, Overlap(place, number, gram))
    return [found[place] for place in sorted(found)]


def _grams(question: str, num_words: int) -> Iterator[str]:
    words = _WORD.findall(question.casefold())
    if len(words) < num_words:
        yield normalized(question)
    for start in range(len(words) - num_words + 1):
        yield " ".join(words[start : start + num_words])
