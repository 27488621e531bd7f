"""Rollouts that carry over: what is sampled of later questions while the last answers of a batch still run.

The batch of a step is always the next questions in dealt order, however long their answers are, so length decides nothing
about who is trained on. Places that fall free while the last of them run are given to completions of the questions that follow,
at most `rollout.max_staleness` steps ahead, and what there is of these when the batch is whole is kept as drafts:

    step 1   questions 0-3  ####  ##  ######  ###        4-7   ##  #              begun in free places: drafts
    step 2   questions 4-7  ##---  #-----  ----  --      8-11  -  -----           # by the weights of step 1, - of step 2

A draft goes on from its tokens under the weights of the step that it goes on in. Every token keeps the log-probability that it
was drawn with, and the loss weighs it by `algorithm.importance`. Each step takes at least `rollout.num_prompts` questions, so
no token can be older than `rollout.max_staleness` steps.

Where tools or an environment answer, a draft is a conversation: those that have been asked for answer before the step is over,
and the objects that they have for it are kept as bytes, as between two turns. Nothing is asked twice.

A batch of the answers that end first would train on short ones first. Keys and values are computed anew from a draft's tokens, as
in AReaL (arXiv 2505.24298): those of older weights are not the present ones'.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo.data.order import PromptOrder
from grpo.policy.sampled_model import SampledModel
from grpo.rollout.engine import unsupported
from grpo.types import Ahead, Dialogue, Draft, Drafts, Generator, Prompt, Reply, ToolCall, Turn


def check_carries(generator: Generator, policy: SampledModel) -> None:
    """Raises ValueError if an engine, which `rollout.engine` auto has chosen, cannot go on with what was begun."""
    if not hasattr(generator, "sample_ahead"):
        reason = unsupported(policy, fused=False)
        raise ValueError(
            f"rollout.carry_over is true; it needs the native engine, and {reason}. Remove rollout.carry_over."
        )


class CarryOver:
    """The questions of a step as they are drawn, each with what there is of its completions, and those that come after them.

    Args:
        order: what deals them; its position moves on with every draw.
        drafts: what the steps before have left to this process; stays as it is.
        step: number of the step, counted from 1.
        num_ahead: how many questions after a draw may be begun, over all processes.
        seed: of the completions of the question at a place.
    """

    def __init__(
        self, order: PromptOrder, drafts: Drafts, *, step: int, num_ahead: int, seed: Callable[[int], int]
    ) -> None:
        self.order, self.step, self.num_ahead, self.seed = order, step, num_ahead, seed
        self._drafts = dict(drafts)
        self._under_way: tuple[list[int], Ahead] | None = None  # places of the later questions of the last draw

    def draw(self, num_prompts: int) -> tuple[list[Prompt], Ahead]:
        """This process's share of the next `num_prompts` questions, and of those that follow."""
        drafts = self.drafts
        taken, after = self.order.take(num_prompts, num_ahead=self.num_ahead)
        mine, later = self._share(taken), self._share(after)
        begun: list[list[Draft]] = [drafts.pop(place, []) for place in (*mine, *later)]
        self._drafts = drafts
        ahead = Ahead(self.step, begun, [*later.values()])
        self._under_way = [*later], ahead
        return [*mine.values()], ahead

    def _share(self, places: Sequence[int]) -> dict[int, Prompt]:
        dealt = self.order.share(places)
        return {place: replace(prompt, seed=self.seed(place)) for place, prompt in dealt.items()}

    @property
    def drafts(self) -> Drafts:
        """What there is of the questions whose turn has not come."""
        if self._under_way is None:
            return dict(self._drafts)
        places, ahead = self._under_way
        begun = {place: left for place, left in zip(places, ahead.left, strict=True) if any(d.tokens for d in left)}
        return self._drafts | begun

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens of `drafts` that the model wrote, and how many of them this step has drawn."""
        every = [draft.own_steps for drafts in self.drafts.values() for draft in drafts]
        return sum(map(len, every)), sum(len(steps) - bisect_left(steps, self.step) for steps in every)  # they ascend


def redistribute(
    parts: list[Drafts], *, position: int, ahead: Sequence[int] = (), rank: int, num_processes: int
) -> Drafts:
    """The drafts of one of `num_processes`, of those of any number of them: questions are dealt on from `position`, or, where
    solved ones are passed over, at the places of `ahead`."""
    every = {place: drafts for part in parts for place, drafts in part.items()}
    turns = {place: turn for turn, place in enumerate(ahead)} or {place: place - position for place in every}
    return {place: drafts for place, drafts in every.items() if turns[place] % num_processes == rank}


def to_tensors(drafts: Drafts) -> dict[str, Any]:
    """Drafts as a checkpoint holds them: a few tensors, since a million Python numbers take seconds to write and to read.

    Returns:
        places and num_drafts (Q,) of the questions, lens (D,) of the drafts, and tokens, logprobs and steps (T,) of all of them,
        end to end; and the dialogue of each draft.
    """
    every = [draft for own in drafts.values() for draft in own]
    return {
        "places": torch.tensor([*drafts], dtype=torch.int64),
        "num_drafts": torch.tensor([len(own) for own in drafts.values()], dtype=torch.int64),
        "lens": torch.tensor([len(draft.tokens) for draft in every], dtype=torch.int64),
        "tokens": torch.tensor([token for draft in every for token in draft.tokens], dtype=torch.int64),
        "logprobs": torch.tensor([each for draft in every for each in draft.logprobs], dtype=torch.float64),
        "steps": torch.tensor([step for draft in every for step in draft.steps], dtype=torch.int64),
        "dialogues": [draft.dialogue for draft in every],
    }


CLASSES = (Dialogue, Turn, ToolCall, Reply)
"""Of the objects that `to_tensors` leaves as they are."""


def from_tensors(saved: dict[str, Any]) -> Drafts:
    """What `to_tensors` was given."""
    lens = saved["lens"].tolist()
    columns = [[part.tolist() for part in saved[name].split(lens)] for name in ("tokens", "logprobs", "steps")]
    dialogues = saved.get("dialogues", [None] * len(lens))  # older checkpoints have none
    every = iter([Draft(*parts) for parts in zip(*columns, dialogues, strict=True)])
    questions = zip(saved["places"].tolist(), saved["num_drafts"].tolist(), strict=True)
    return {place: [next(every) for _ in range(number)] for place, number in questions}
