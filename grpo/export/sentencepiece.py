"""SentencePiece's BPE as llama.cpp computes it: of all neighbours whose union is a token, the one with the best score is merged.

A tokenizer.json has an order of merges instead of scores. The score of a token is minus the rank of the first merge that gives
it. That is the same as long as every way to put a token together is a merge, as it is in what was converted from SentencePiece.
Whether it is so is tried on text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

NO_SCORE = -1.0e6
"""Of tokens that no merge gives: single characters, bytes, special tokens."""


def scores_of(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """A score for each token: the higher, the sooner its parts are merged."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [float(-first[token]) if token in first else NO_SCORE for token in tokens]


@dataclass(frozen=True)
class Pieces:
    """What llama.cpp knows of a SentencePiece vocabulary."""

    ids: dict[str, int]
    scores: Sequence[float]
    add_space_prefix: bool

    def encode(self, text: str) -> list[int]:
        """The slow, obvious way, without special tokens: quadratic in the length."""
        parts = list((" " * self.add_space_prefix + text).replace(" ", "▁"))
        while True:
            unions = [a + b for a, b in pairwise(parts)]
            merged = [(self.scores[self.ids[union]], -i) for i, union in enumerate(unions) if union in self.ids]
            if not merged:
                break
            where = -max(merged)[1]
            parts[where : where + 2] = [parts[where] + parts[where + 1]]
        return [number for part in parts for number in self._ids_of(part)]

    def _ids_of(self, part: str) -> list[int]:
        if part in self.ids:
            return [self.ids[part]]
        return [self.ids.get(f"<0x{byte:02X}>", -1) for byte in part.encode()]


def differs(pieces: Pieces, encode: Callable[[str], list[int]]) -> str | None:
    """A text that the two encode otherwise, in words; None if there is none among SAMPLES."""
    for text in SAMPLES:
        ours, theirs = pieces.encode(text), encode(text)
        if ours != theirs:
            return f"{text!r} is {theirs} in the tokenizer and {ours} in llama.cpp"
    return None


SAMPLES = (
    "What is 12+8+5-5+9? Let me think: 12 + 8 = 20, so the answer is 29.",
    "<think>\nWait, let's check that again. I've made a mistake; don't worry.\n</think>\n<answer>x^2 - 3.5y</answer>",
    'The quick brown fox jumps over the lazy dog, 3 33 333 3333 33333 times!!! (Really?) "Yes", she said.',
    "    def mean(values: list[float]) -> float:\n        return sum(values) / len(values)  # indented\n\n\n",
    "Größe, naïve, façade, Привет, мир, 你好，世界, こんにちは, ∑_{i=1}^{n} i = \\frac{n(n+1)}{2}, 🚀🦙",
    "multiplication unbelievable international responsibilities characteristically",
)
