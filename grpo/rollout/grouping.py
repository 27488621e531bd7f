"""Completions as they end -> groups as they become whole: one bookkeeping for every engine."""

from __future__ import annotations

from grpo.types import Completion, Group, OnGroup, Prompt


class Grouping:
    """The completions of one call of `sample`: those of prompt 0, then those of prompt 1, ...; None while under way.

    A group is handed to `on_group` with its prompt's place, once, as soon as the last of its completions is there.
    """

    def __init__(self, prompts: list[Prompt], *, num_completions: int, on_group: OnGroup | None) -> None:
        self.prompts = [prompt for prompt in prompts for _ in range(num_completions)]  # of each completion
        self.completions: list[Completion | None] = [None] * len(self.prompts)
        self._groups: list[Group | None] = [None] * len(prompts)
        self._num_missing = [num_completions] * len(prompts)
        self._num_completions = num_completions
        self._on_group = on_group

    def add(self, place: int, completion: Completion) -> None:
        """The completion at this place has ended."""
        assert self.completions[place] is None, f"completion {place} ended twice"
        self.completions[place] = completion
        p = place // self._num_completions
        self._num_missing[p] -= 1
        if not self._num_missing[p]:
            self._hand_on(p)

    def _hand_on(self, p: int) -> None:
        own = slice(p * self._num_completions, (p + 1) * self._num_completions)
        group = Group(self.prompts[own.start], [each for each in self.completions[own] if each is not None])
        self._groups[p] = group
        if self._on_group is not None:
            self._on_group(p, group)

    def groups(self) -> list[Group]:
        """All groups, in the order of the prompts."""
        whole = [group for group in self._groups if group is not None]
        assert len(whole) == len(self._groups), "a completion was lost"
        return whole


def all_at_once(groups: list[Group], on_group: OnGroup | None) -> list[Group]:
    """The groups of a generator that has them all at the same time, handed on."""
    for p, group in enumerate(groups):
        if on_group is not None:
            on_group(p, group)
    return groups
