"""Which rows make up each update: a function of the rows, the seed and how many have been dealt."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from grpo.config.supervised import TrainingConfig
from grpo.data.order import PromptOrder
from grpo.types import Group


class RowOrder:
    """Deals rows to updates, epoch after epoch, each in an order of its own. Every process deals all of them.

    `position` counts the rows dealt so far; it is all there is to save and restore.

    Args:
        groups: one row each, whose `prompt.row` is its place.
        num_updates: of the run; None: those of training.epochs.
        weights: of each source of rows; see PromptOrder.

    Raises:
        ValueError: see PromptOrder.
    """

    def __init__(
        self,
        groups: list[Group],
        config: TrainingConfig,
        *,
        seed: int,
        num_updates: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.groups = groups
        self.sizes = [len(group.prompt.token_ids) + len(group.completions[0].token_ids) for group in groups]
        self.max_rows, self.max_tokens = config.rows_per_update, config.tokens_per_update
        self.last = None if num_updates else max(round(config.epochs * len(groups)), 1)
        self._order = PromptOrder([group.prompt for group in groups], seed=seed, rank=0, world_size=1, weights=weights)
        self.num_updates = num_updates or self._count()

    @property
    def position(self) -> int:
        return self._order.position

    @position.setter
    def position(self, position: int) -> None:
        self._order.position = position

    @property
    def epoch(self) -> float:
        """Rows dealt so far, as a multiple of all."""
        return self.position / len(self.groups)

    def draw(self) -> list[Group]:
        """The rows of the next update: as many as both limits allow, and at least one where any are left."""
        taken: list[Group] = []
        tokens = 0
        while len(taken) < self.max_rows and (self.last is None or self.position < self.last):
            (prompt,) = self._order.draw(1)
            tokens += self.sizes[prompt.row]
            if taken and self.max_tokens is not None and tokens > self.max_tokens:
                self.position -= 1
                break
            taken.append(self.groups[prompt.row])
        return taken

    def _count(self) -> int:
        count = 0
        while self.draw():
            count += 1
        self.position = 0
        return count


def set_aside(groups: list[Group], num_rows: int, *, seed: int) -> tuple[list[Group], list[Group]]:
    """Rows to learn from, and at least `num_rows` others, such that no prompt is among both.

    Raises:
        ValueError: nothing would be left to learn from.
    """
    prompts = sorted({tuple(group.prompt.token_ids) for group in groups})
    random.Random(f"{seed} rows set aside").shuffle(prompts)
    of_prompt: dict[tuple[int, ...], int] = {}
    for group in groups:
        key = tuple(group.prompt.token_ids)
        of_prompt[key] = of_prompt.get(key, 0) + 1
    chosen: set[tuple[int, ...]] = set()
    count = 0
    for prompt in prompts:
        if count >= num_rows:
            break
        chosen.add(prompt)
        count += of_prompt[prompt]
    if count >= len(groups):
        raise ValueError(
            f"evaluation.num_rows is {num_rows}; with all rows of the same prompts that is all of {len(groups):,}, and none "
            "would be left to learn from. Lower it."
        )
    aside = [group for group in groups if tuple(group.prompt.token_ids) in chosen]
    learned = [group for group in groups if tuple(group.prompt.token_ids) not in chosen]
    return [replace(each, prompt=replace(each.prompt, row=n)) for n, each in enumerate(learned)], aside
