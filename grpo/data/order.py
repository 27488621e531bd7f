"""Prompts in a resumable order: seeded, weighted, ranked or a user's own, without those that are passed over."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any

import torch

from grpo.config import DataConfig
from grpo.data.rows import DATA_NAME
from grpo.types import Prompt

Order = Callable[[int, list[dict[str, Any]]], Iterable[int]]
"""The epoch, counted from 0, and the rows of the questions -> the numbers of those rows in the order in which they are asked.

A run that resumes calls it again, and every process does: it has to say the same each time, so random numbers follow from the
epoch, as in `random.Random(epoch)`."""


def ranks(prompts: Sequence[Prompt], config: DataConfig) -> list[int] | None:
    """Of each prompt the place of its value of `data.order_by` among all there are; None: there is no column to order by.

    Raises:
        ValueError: a question has no value there, or some have numbers and others texts.
    """
    if config.order_by is None:
        return None
    name = config.order_by.removeprefix("-")
    values: list[Any] = [prompt.columns.get(name) for prompt in prompts]
    without = sum(value is None or value != value for value in values)
    if without:
        raise ValueError(
            f"data.order_by is {config.order_by!r}; {without:,} of {len(prompts):,} questions have nothing in the column "
            f"{name!r}. The columns are {', '.join(prompts[0].columns)}. Name one that all of them have, or remove data.order_by."
        )
    if not (all(isinstance(value, Real) for value in values) or all(isinstance(value, str) for value in values)):
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(
            f"data.order_by is {config.order_by!r}; its values are of the types {', '.join(kinds)}, which have no order. Name a "
            "column of numbers, or one of texts."
        )
    descending = config.order_by.startswith("-")
    place = {value: place for place, value in enumerate(sorted(set(values), reverse=descending))}
    return [place[value] for value in values]


class PromptOrder:
    """Deals prompts to the processes, epoch after epoch, in an order that depends only on seed and position.

    `position` counts the prompts dealt so far over all processes; it is all there is to save and restore, unless solved questions
    are passed over.

    An epoch has as many places as there are prompts. Without weights each prompt has one. With weights each source has its share
    of them, rounded to whole places: its prompts in an order of their own, begun anew when all were dealt; the next epoch goes on
    where this one ended.

    With a `solved_share` below 1 a prompt in `solved` is dealt at that share of its turns, and passed over at the others; so is
    one in `hopeless` with a `hopeless_share`, and one that the step has dealt already. A draw looks at no more turns than there
    are prompts. Where these are not enough, the last of the others passed over are taken too, and of those dealt already if these
    are not enough either. What is looked at beyond a draw is settled then and kept in `ahead`, whatever is solved later. All
    three are saved, too.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        *,
        seed: int,
        rank: int,
        world_size: int,
        weights: Mapping[str, float] | None = None,
        own: Order | None = None,
        solved_share: float = 1.0,
        hopeless_share: float = 1.0,
        ranks: Sequence[int] | None = None,
        ranked_epochs: int = 1,
    ) -> None:
        """
        Args:
            weights: of each source, as the prompts have it in their column `data_name`.
            own: a user's order instead of the seeded one.
            solved_share, hopeless_share: of their turns at which such questions are asked.
            ranks: of each prompt; in the first `ranked_epochs` epochs those of a lower one come first.

        Raises:
            ValueError: a source has no prompts, or too small a share for one place in an epoch; or `own` gives no order.
        """
        self.own = own
        self.prompts = prompts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.solved_share, self.hopeless_share = solved_share, hopeless_share
        self.solved: AbstractSet[int] = frozenset()  # rows of prompts
        self.hopeless: AbstractSet[int] = frozenset()
        self.ranks, self.ranked_epochs = ranks, ranked_epochs
        self.ahead: list[int] = []  # places after `position` that will be dealt; between and before them are none
        self._dealt: set[int] = set()  # rows of this step, where solved ones are passed over
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._sources = [] if weights is None else _shared_out(prompts, weights)
        if own is not None and self._own_order(own, 0) != self._own_order(own, 0):
            raise ValueError(
                "order gave two answers for epoch 0; every process asks it, and a resumed run asks again. Draw by the epoch: "
                "random.Random(epoch)."
            )

    @property
    def passes_over(self) -> bool:
        return min(self.solved_share, self.hopeless_share) < 1

    def begin_step(
        self, position: int, *, ahead: Sequence[int], solved: Iterable[int], hopeless: Iterable[int] = ()
    ) -> None:
        """Deal on from there, with these rows solved, and these hopeless."""
        self.position, self.ahead, self.solved = position, [*ahead], frozenset(solved)
        self.hopeless, self._dealt = frozenset(hopeless), set()

    def draw(self, num_prompts: int) -> list[Prompt]:
        """This process's share of the next `num_prompts` prompts: every world_size-th, starting at its rank."""
        return [*self.share(self.take(num_prompts)[0]).values()]

    def take(self, num_prompts: int, *, num_ahead: int = 0) -> tuple[Sequence[int], Sequence[int]]:
        """The places of the next `num_prompts` prompts, over all processes, and of those dealt after them."""
        wanted = num_prompts + num_ahead
        if not self.passes_over:
            places: Sequence[int] = range(self.position, self.position + wanted)
        else:
            places = self._with_those_asked(wanted)
            self.ahead = [*places[num_prompts:]]
            self._dealt.update(self._at(place).row for place in places[:num_prompts])
        taken, after = places[:num_prompts], places[num_prompts:wanted]
        self.position = taken[-1] + 1 if taken else self.position
        return taken, after

    def share(self, places: Sequence[int]) -> dict[int, Prompt]:
        """This process's prompts of those at the places of a `take`, by place."""
        return {place: self._at(place) for place in places[self.rank :: self.world_size]}

    def _with_those_asked(self, num: int) -> list[int]:
        """`ahead`, filled up to `num` places."""
        places = [*self.ahead]
        start = places[-1] + 1 if places else self.position
        turns = range(start, start + max(len(self.prompts), num - len(places)))
        dealt = self._dealt | {self._at(place).row for place in places}
        passed_over: dict[int, int] = {}  # questions and the last turn of each, ascending
        for place in turns:
            if len(places) >= num:
                return places
            row = self._at(place).row
            if row in dealt:
                continue
            passed_over.pop(row, None)
            if self._is_asked(place):
                places.append(place)
                dealt.add(row)
            else:
                passed_over[row] = place
        fresh = [*passed_over.values()]
        again = sorted({*turns}.difference(places, fresh)) if len(places) + len(fresh) < num else []
        spare = [*again, *fresh]
        return sorted([*places, *spare[len(places) + len(spare) - num :]])

    def _is_asked(self, place: int) -> bool:
        """Whether the question whose turn it is is asked: a function of what is known of it, the seed and the place."""
        row = self._at(place).row
        share = self.solved_share if row in self.solved else self.hopeless_share if row in self.hopeless else 1.0
        return share == 1 or random.Random(f"{self.seed} turn {place}").random() < share

    def _at(self, place: int) -> Prompt:
        epoch, offset = divmod(place, len(self.prompts))
        if self._epoch[0] != epoch and self.own is not None:
            self._epoch = (epoch, self._own_order(self.own, epoch))
        elif self._epoch[0] != epoch:
            pool = [number for source in self._sources for number in self._of_source(*source, epoch)]
            order = self._permutation(len(self.prompts), epoch)
            if self.ranks is not None and epoch < self.ranked_epochs:
                order.sort(key=self.ranks.__getitem__)  # those of equal rank stay in their order
            self._epoch = (epoch, [pool[place] for place in order] if pool else order)
        return self.prompts[self._epoch[1][offset]]

    def _own_order(self, own: Order, epoch: int) -> list[int]:
        """Raises ValueError if what `own` returned does not name a question for each place of the epoch."""
        num = len(self.prompts)
        rule = f"it returns as many numbers as there are questions, {num:,}, each from 0 to {num - 1:,}; one may come twice"
        given = own(epoch, [dict(prompt.columns) for prompt in self.prompts])
        try:
            numbers = [int(number) for number in given]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"order returned {type(given).__name__} ({error}); {rule}. Correct the function."
            ) from error
        strange = [number for number in numbers if not 0 <= number < num]
        if strange or len(numbers) != num:
            found = f"the number {strange[0]}" if strange else f"{len(numbers):,} numbers"
            raise ValueError(f"order returned {found} for epoch {epoch}; {rule}. Correct the function.")
        return numbers

    def _of_source(self, members: list[int], num_places: int, epoch: int) -> list[int]:
        """The prompts of a source that an epoch deals."""
        first, last = epoch * num_places, (epoch + 1) * num_places - 1
        rounds = range(first // len(members), last // len(members) + 1)
        dealt = [members[n] for each in rounds for n in self._permutation(len(members), each)]
        start = first - rounds[0] * len(members)
        return dealt[start : start + num_places]

    def _permutation(self, length: int, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(length, generator=generator).tolist()


def _shared_out(prompts: list[Prompt], weights: Mapping[str, float]) -> list[tuple[list[int], int]]:
    """The numbers of each source's prompts, and how many places of an epoch it has: largest remainders are rounded up.

    Raises:
        ValueError: see PromptOrder.
    """
    members: dict[str, list[int]] = {label: [] for label in weights}
    for number, prompt in enumerate(prompts):
        members[prompt.columns[DATA_NAME]].append(number)
    exact = {label: len(prompts) * weight / sum(weights.values()) for label, weight in weights.items()}
    places = {label: int(share) for label, share in exact.items()}
    spare = len(prompts) - sum(places.values())
    for label in sorted(exact, key=lambda label: places[label] - exact[label])[:spare]:
        places[label] += 1
    for label, weight in weights.items():
        if not members[label] or not places[label]:
            what = (
                "not one question of it is left, for the reasons that a line before this one gives. Mend those"
                if not members[label]
                else f"that is not one of {len(prompts):,} questions. Raise the weight"
            )
            raise ValueError(f"data.name has the weight {weight:g} for {label}; {what}, or remove the source.")
    return [(members[label], places[label]) for label in weights]
