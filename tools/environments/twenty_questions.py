"""Twenty questions over a table: which thing is it?"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any

from grpo.rewards.verifier.extraction import last_answer_tag

PROPERTIES = (
    "mammal",
    "bird",
    "fish",
    "insect",
    "pet",
    "farm",
    "water",
    "fly",
    "predator",
    "large",
    "africa",
    "arctic",
)

ANIMALS = {
    "dog": "mammal pet farm predator",
    "cat": "mammal pet predator",
    "cow": "mammal farm large",
    "pig": "mammal farm",
    "lion": "mammal predator large africa",
    "elephant": "mammal large africa",
    "bat": "mammal fly",
    "whale": "mammal water large",
    "seal": "mammal water predator arctic",
    "fox": "mammal predator",
    "polar bear": "mammal predator large arctic",
    "hen": "bird farm",
    "eagle": "bird fly predator",
    "parrot": "bird fly pet",
    "ostrich": "bird large africa",
    "duck": "bird fly water farm",
    "shark": "fish water predator large",
    "goldfish": "fish water pet",
    "bee": "insect fly farm",
    "ant": "insect",
}
"""Each with those of PROPERTIES that it has; no two have the same."""

ASK = (
    "I think of one of these animals: {animals}. Find out which. Ask about one of these at a time, and I say yes or no: "
    "{properties}. When you know it, name the animal."
)


class twenty_questions:
    """I think of an animal of a table, the `answer` of the row.

    What counts is `<answer>`, or else the last line of the turn: a name of the table is a guess, and a property a question. The
    reward is 1 for the right name; a wrong one ends the episode.
    """

    @staticmethod
    def rows(size: int, seed: int) -> list[dict[str, Any]]:
        """Questions."""
        text = ASK.format(animals=", ".join(ANIMALS), properties=", ".join(PROPERTIES))
        return [{"question": text, "answer": random.Random(seed + i).choice(list(ANIMALS))} for i in range(size)]

    def reset(self, answer: str) -> None:
        if answer not in ANIMALS:
            raise ValueError(f"the answer of a row is {answer!r}; the table has {', '.join(ANIMALS)}. Correct the row.")
        self.answer, self.right = answer, False

    def step(self, text: str) -> str | None:
        said = last_answer_tag(text) or next((line for line in reversed(text.splitlines()) if line.strip()), "")
        named, asked = _among(ANIMALS, said), _among(PROPERTIES, said)
        if len(named) == 1 and not asked:
            self.right = named[0] == self.answer
            return None
        if len(asked) == 1 and not named:
            return "Yes." if asked[0] in ANIMALS[self.answer].split() else "No."
        return f"Ask about one of these: {', '.join(PROPERTIES)}; or name one animal."

    def reward(self) -> float:
        return float(self.right)


def _among(words: Iterable[str], text: str) -> list[str]:
    """Those of the words that a text has, as words of their own."""
    return [word for word in words if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
