"""Another try after a wrong answer, on any question whose answer can be checked."""

from __future__ import annotations

from typing import Any

from grpo.rewards.accuracy import accuracy
from grpo.rewards.reasoning_gym import reasoning_gym

AGAIN = "That is not right. Try again."


class second_try:
    """Says that an answer is wrong, and lets the model try again; rows as any data set has them, or those of reasoning-gym.

    The reward is 1 for an answer that is right at once, and `later` for one that is right after a wrong one.

    Args:
        tries: of a question.
        later: reward of a right answer that is not the first.
        source: as `accuracy` has it, where the row is none of reasoning-gym, which reads `<answer>`.
        again: what is said to a wrong answer.
    """

    def __init__(self, tries: int = 2, later: float = 0.5, source: str = "answer_tag", again: str = AGAIN) -> None:
        if tries < 2:
            raise ValueError(
                f"environment.args sets tries to {tries}; with fewer than 2 there is no second. Set it to 2."
            )
        self.left, self.later, self.source, self.again = tries, later, source, again

    def reset(self, row: dict[str, Any]) -> None:
        self.row = {name: row[name] for name in ("answer", "task", "task_args", "entry") if name in row}
        self.worth = 1.0

    def step(self, text: str) -> tuple[str | None, float]:
        self.left -= 1
        if self._is_right(text):
            return None, self.worth
        self.worth = self.later
        return (self.again, 0.0) if self.left else (None, 0.0)

    def _is_right(self, text: str) -> bool:
        if self.row.get("task") is not None:
            return reasoning_gym(text, self.row["task"], self.row["task_args"], self.row["entry"]) == 1.0
        return accuracy(text, self.row["answer"], source=self.source) == 1.0  # type: ignore[arg-type]
