"""Countdown, with what an expression makes as an answer to it."""

from __future__ import annotations

import random
from typing import Any

from grpo.rewards.countdown import countdown as is_right
from grpo.rewards.countdown import explain_countdown

ASK = (
    "Using the numbers {nums}, make an expression that equals {target}. Use + - * / and brackets, and each number exactly once. "
    "Write it as <answer> (1+2)*3 </answer>; I say what is wrong with it, and you may try again."
)


class countdown:
    """Says what an expression makes, or which number it uses wrongly, until it is right.

    Rows have `nums` and `target`, as those of the reward `countdown` and of configs/countdown. The reward is 1 for an expression
    that is right, at whichever turn.
    """

    @staticmethod
    def rows(size: int, seed: int, numbers: int = 3, most: int = 20) -> list[dict[str, Any]]:
        """Questions whose target some expression makes, with that as their answer.

        Args:
            numbers: how many there are.
            most: the largest of them.
        """
        if numbers < 2 or most < 2:
            raise ValueError(
                f"environment.rows has numbers {numbers} and most {most}; both are at least 2. Correct them."
            )
        return [_row(random.Random(seed + i), numbers, most) for i in range(size)]

    def reset(self, nums: list[int], target: int) -> None:
        self.nums, self.target, self.right = list(nums), target, False

    def step(self, text: str) -> str | None:
        self.right = is_right(text, self.nums, self.target) == 1.0
        return None if self.right else explain_countdown(text, self.nums, self.target)

    def reward(self) -> float:
        return float(self.right)


def _row(rng: random.Random, numbers: int, most: int) -> dict[str, Any]:
    nums = [rng.randint(1, most) for _ in range(numbers)]
    value, text = nums[0], str(nums[0])
    for number in nums[1:]:
        sign = rng.choice("+-*" if value * number <= 10 * most else "+-")
        value = value + number if sign == "+" else value - number if sign == "-" else value * number
        text = f"({text}{sign}{number})"
    return {
        "question": ASK.format(nums=nums, target=value),
        "answer": text.removeprefix("(").removesuffix(")"),
        "nums": nums,
        "target": value,
    }
