"""Number guessing: higher, lower, or right."""

from __future__ import annotations

import random
import re
from typing import Any

from grpo.rewards.verifier.extraction import last_answer_tag

_NUMBER = re.compile(r"(?<![\d.])-?\d{1,9}(?![\d.]*\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]*\d)")
ASK = "I think of a whole number from {low} to {high}. Guess it; I say whether it is higher or lower."


class guess_number:
    """I think of a number, the `answer` of the row; a guess is the last number in `<answer>`, or of the turn.

    The reward is 1 for the right guess, at whichever turn. With `early` a later one is worth less:
    1 - early * (turns before it) / turns, where `turns` is how many there are.

    Args:
        early: what the last turn loses, from 0 to 1.
        turns: environment.max_turns; only for `early`.
    """

    def __init__(self, early: float = 0.0, turns: int = 8) -> None:
        if not 0 <= early <= 1 or turns < 1:
            raise ValueError(f"early is {early}, turns {turns}; early is within 0 and 1, turns at least 1.")
        self.early, self.turns = early, turns

    @staticmethod
    def rows(size: int, seed: int, low: int = 1, high: int = 100, question: str = ASK) -> list[dict[str, Any]]:
        """Questions.

        Args:
            low, high: which numbers there are.
            question: `{low}` and `{high}` in it.
        """
        if low > high:
            raise ValueError(f"environment.rows has low {low} and high {high}; low is not above high. Correct them.")
        text = question.format(low=low, high=high)
        numbers = [random.Random(seed + i).randint(low, high) for i in range(size)]
        return [{"question": text, "answer": str(number)} for number in numbers]

    def reset(self, answer: str) -> None:
        self.number, self.num_before, self.right = int(answer), 0, False

    def step(self, text: str) -> str | None:
        said = last_answer_tag(text) or text
        found = _NUMBER.findall(_THOUSANDS.sub(lambda number: number[0].replace(",", ""), said))
        if found and int(found[-1]) == self.number:
            self.right = True
            return None
        self.num_before += 1
        if not found:
            return "Say a number."
        return "Higher." if int(found[-1]) < self.number else "Lower."

    def reward(self) -> float:
        return float(self.right) * (1 - self.early * min(1.0, self.num_before / self.turns))
