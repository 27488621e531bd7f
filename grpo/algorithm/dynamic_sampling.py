"""Which of the questions of a step make up its batch: dynamic sampling (DAPO, arXiv 2503.14476, section 3.2). Pure.

Groups whose answers are all right or all wrong move nothing, so further questions are sampled in their place until
rollout.num_prompts groups have signal. Each draw is sized by the share of groups that had signal lately, and all draws of a
step together have at most rollout.max_oversampling * rollout.num_prompts questions. With 1, the default, that is one draw, taken
as it comes.

- The batch is those with signal that were dealt first, not those that ended first: these would be the short ones.
- If the limit comes before the batch is full, it is filled up with groups without signal, as many as the step would have had
  anyway. Its size, its updates and the weights of its tokens are always the same. (DAPO's published code ends the run there.)
- Groups with signal that the batch has no room for are thrown away, as in DAPO's published code. In the next step they would be
  samples of an older policy, and they are the ones dealt last, of which rounding up leaves few.
- A group has signal here if the values of one reward differ, as in DAPO: the one that says what is right, or that
  rollout.signal_from names; where it cannot tell of a question, as of another kind, the next that is not about manners. By the
  weighted sum a batch would fill up with groups that differ in length or form alone, as wrong answers to the hardest questions
  do; that has taught a policy to be short and wrong within 40 steps (verl-project/verl-recipe#125). With algorithm.pass_at it has
  signal if its advantages, by that reward, are not all 0: where too few answers are wrong they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEMORY = 0.75
"""What was seen of signal counts this much of what it did with every further step, so about four steps are looked back on."""


class DynamicSampler:
    """The questions that a step has drawn so far, and whether their groups have signal; the same on every process.

    Args:
        num_prompts: groups of a batch.
        limit: questions that may be drawn.
        world_size: processes, to whom the questions of a draw are dealt out like cards.
        seen: groups that were looked at in earlier steps, and
        with_signal: how many of them had signal; both fade with MEMORY.
    """

    def __init__(self, *, num_prompts: int, limit: int, world_size: int, seen: float, with_signal: float) -> None:
        self.num_prompts = num_prompts
        self.limit = limit
        self.world_size = world_size
        self.signal: list[bool] = []  # of each question, in the order in which they were dealt
        self.sizes: list[int] = []  # of the draws
        self._earlier = seen, with_signal

    @property
    def signal_rate(self) -> float:
        """Of groups, (with_signal + 1) / (seen + 1), over earlier steps and this one; 1 before anything is seen."""
        seen, with_signal = self._earlier
        return (with_signal + sum(self.signal) + 1) / (seen + len(self.signal) + 1)

    def next_size(self) -> int:
        """How many questions to draw; 0: the batch is full, or the limit is reached.

        With n missing and a rate p, (n + sqrt(n (1 - p))) / p: as many as give n groups with signal, and a standard deviation
        more, since another draw costs the time of the longest completion. Rounded up so that no process is idle.
        """
        missing, rate = self.num_prompts - sum(self.signal), self.signal_rate
        allowed = self.limit - len(self.signal)
        if missing <= 0 or allowed < self.world_size:
            return 0
        wanted = math.ceil((missing + math.sqrt(missing * (1 - rate))) / rate)
        return min(-(-wanted // self.world_size) * self.world_size, allowed)

    def add(self, parts: list[list[bool]]) -> None:
        """Another draw: whether each process's groups of it have signal."""
        size = sum(map(len, parts))
        self.signal += [parts[i % self.world_size][i // self.world_size] for i in range(size)]
        self.sizes.append(size)

    def batch(self) -> list[int]:
        """The places of the batch's questions among those drawn, ascending."""
        by_signal = sorted(range(len(self.signal)), key=lambda place: not self.signal[place])  # stable
        return sorted(by_signal[: self.num_prompts])

    def minibatch_of(self, *, rank: int, num_minibatches: int) -> Tensor:
        """Of each group of a process, in the order in which it drew them, the minibatch that it belongs to; -1: not in the batch.

        A minibatch is a run of consecutive questions of the batch, so it holds the same ones however many processes there are.
        """
        size = self.num_prompts // num_minibatches
        number = {place: i // size for i, place in enumerate(self.batch())}
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        drawn = zip(starts, self.sizes, strict=True)
        mine = [place for start, each in drawn for place in range(start + rank, start + each, self.world_size)]
        return torch.tensor([number.get(place, -1) for place in mine])

    def remembered(self) -> tuple[float, float]:
        """`seen` and `with_signal` for the next step."""
        seen, with_signal = self._earlier
        return MEMORY * (seen + len(self.signal)), MEMORY * (with_signal + sum(self.signal))
