"""The questions with which early reviewers tried DeepSeek-R1, as a benchmark of nine: `--benchmarks probes`.

The wording is our own. Three puzzles are made so that one number answers them and nothing has to be assumed: the reviewers' boat
with compartments is kept, and the two whose original wording is not known are built anew on the same idea.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Probe:
    """A question and why its answer is right."""

    subject: str
    question: str
    answer: str
    reason: str

    @property
    def row(self) -> dict[str, Any]:
        """As a row of a data set."""
        return {"question": self.question, "answer": self.answer, "subject": self.subject}


PROBES = [
    Probe("letters", 'How many times does the letter "r" occur in the word "strawberry"?', "3", "st-r-awbe-r-r-y"),
    Probe("letters", 'How many times does the letter "s" occur in the word "Mississippi"?', "4", "Mi-s-s-i-s-s-ippi"),
    Probe("letters", 'How many vowels does the word "airborne" have?', "4", "a, i, o, e"),
    Probe("arithmetic", "What is 2485 times 8919?", "22163715", "2485 * 8919 = 2485 * 9000 - 2485 * 81"),
    Probe(
        "arithmetic",
        "What is 23929 divided by 5783, rounded to eight decimal places?",
        "4.13781774",
        "23929 / 5783 = 4.1378177416...",
    ),
    Probe("arithmetic", "Solve for X: X * 3 / 67 = 27.", "603", "X = 27 * 67 / 3 = 9 * 67"),
    Probe(
        "puzzle",
        "A farmer wants to bring a wolf, a goat and a cabbage across a river. His boat carries him and has three separate, "
        "locked compartments, each large enough for one of the three. How many times does the boat have to cross the river at "
        "least until all of them are on the other side?",
        "1",
        "All three travel at once, each in a compartment of its own, so none can eat another; and nobody is left behind.",
    ),
    Probe(
        "puzzle",
        "Five people stand in a circle and face its middle. They wear the numbers 11, 12, 13, 14 and 15. Number 12 stands "
        "directly to the left of number 11, number 13 directly to the left of 12, number 14 directly to the left of 13, and "
        "number 15 directly to the left of 14. Which number does the person directly to the right of number 11 wear?",
        "15",
        "Going left from 11 one meets 12, 13, 14, 15, and then, since the circle closes, 11 again. So 11 stands directly to the "
        "left of 15, and whoever has 11 to the left is to the right of 11.",
    ),
    Probe(
        "puzzle",
        "A house is built against a steep hill. The door on its third floor is level with the street behind the house. Each "
        "floor is 3 metres high. Somebody steps out of the door on the third floor onto that street. How many metres does this "
        "person fall?",
        "0",
        "The door is level with the street, so there is nowhere to fall, however high the floor is above the other side.",
    ),
]
