"""One request on its way: its choices in the scheduler, and their text for the client, whole or in pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from grpo.rollout.sampling import sequence_seeds
from grpo.serving.decoder import Served
from grpo.serving.models import Hosted
from grpo.serving.protocol import ApiError
from grpo.serving.scheduler import TopLogprobs, Update, Worker
from grpo.serving.text import Answer, Calls, Part
from grpo.types import Sampling


@dataclass(frozen=True)
class Piece:
    """What came of one choice."""

    index: int
    parts: list[tuple[Part, str]]
    logprobs: list[tuple[int, TopLogprobs]]  # of tokens, the one that ends it left out
    finish_reason: str | None


@dataclass(frozen=True)
class Asked:
    """How a request wants its choices drawn."""

    sampling: Sampling
    seed: int
    num_choices: int
    wants_logprobs: bool = False
    ignores_ends: bool = False
    keeps_end: bool = False  # tells the log-probability of the token that ends a choice, too


def timed_out(seconds: float) -> ApiError:
    """Of a request that has taken so long."""
    return ApiError(
        f"the request has taken {seconds:g} seconds, the limit of this server.",
        status=504,
        type="timeout_error",
        code="timeout",
    )


@dataclass(eq=False)
class Generation:
    """The choices of all prompts of a request: those of the first, then those of the second, ...

    The random numbers are those of the engine's `sample` for these prompts, number of completions and seed.

    Args:
        limits: most tokens of the choices of each prompt; with 0 it has ended before it starts.
        thinks: of each prompt, whether it opens a thought; None: nothing is a thought.
        seconds: after which it ends with an error.
        calls: makes what takes calls of tools out of a choice; None: there are no tools.
    """

    hosted: Hosted
    worker: Worker
    prompts: list[list[int]]
    limits: list[int]
    asked: Asked
    thinks: list[bool] | None
    seconds: float
    calls: Callable[[], Calls] | None = None
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None

    def __post_init__(self) -> None:
        asked, n = self.asked, self.asked.num_choices
        seeds = sequence_seeds(asked.seed, len(self.prompts) * n).tolist()
        self.sequences = [
            Served(
                index,
                self.prompts[index // n],
                self.limits[index // n],
                own,
                sampling=asked.sampling,
                wants_logprobs=asked.wants_logprobs,
                ignores_ends=asked.ignores_ends,
                owner=self,
            )
            for index, own in enumerate(seeds)
        ]
        stops = asked.sampling.stop
        self.answers = [
            Answer(
                self.hosted.ending,
                stops,
                None if self.thinks is None else self.thinks[index // n],
                None if self.calls is None else self.calls(),
            )
            for index in range(len(seeds))
        ]
        for index, answer in enumerate(self.answers):
            if self.limits[index // n] == 0:
                answer.finish_reason = "length"
        self._inbox: list[Update] = []
        self._something = asyncio.Event()
        self._num_open = sum(answer.finish_reason is None for answer in self.answers)
        self._has_expired = False

    def start(self) -> None:
        n = self.asked.num_choices
        for first in range(0, len(self.sequences), n):
            if self.answers[first].finish_reason is None:
                self.worker.add(self.hosted.scheduler, self.sequences[first : first + n])

    def receive(self, update: Update) -> None:
        """Called in the event loop."""
        self._inbox.append(update)
        self._something.set()

    def leave(self) -> None:
        """Free the slots of what has not ended; of what has, nothing."""
        open_ = [
            sequence
            for sequence, answer in zip(self.sequences, self.answers, strict=True)
            if answer.finish_reason is None and not sequence.has_ended
        ]
        if open_:
            self.worker.cancel(self.hosted.scheduler, open_)

    def _expire(self) -> None:
        self._has_expired = True
        self._something.set()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What comes, until all choices have ended.

        Raises:
            ApiError: it took too long, or the model failed.
        """
        left = self.arrived + self.seconds - time.monotonic()
        timer = asyncio.get_running_loop().call_later(left, self._expire)
        try:
            while self._num_open:
                await self._something.wait()  # a loop that is behind finds several updates at once
                self._something.clear()
                if self._has_expired:
                    raise timed_out(self.seconds)
                updates, self._inbox = self._inbox, []
                if found := [piece for update in updates if (piece := self._piece(update)) is not None]:
                    yield found
        finally:
            timer.cancel()

    def _piece(self, update: Update) -> Piece | None:
        if update.error is not None:
            raise ApiError(f"{self.hosted.name} failed: {update.error}", status=500, type="server_error", code="failed")
        if self.first_token is None:
            self.first_token = time.monotonic()
        answer = self.answers[update.sequence.index]
        if answer.finish_reason is not None:
            return None  # drawn before the scheduler knew
        before = len(answer.tokens)
        parts = answer.feed(update.tokens, has_ended=update.has_ended, ignores_ends=self.asked.ignores_ends)
        if answer.finish_reason is not None:
            self._num_open -= 1
            if not update.has_ended:  # at a stop text, of which the scheduler knows nothing
                self.worker.cancel(self.hosted.scheduler, [update.sequence])
        tops = [] if update.logprobs is None else list(zip(answer.tokens[before:], update.logprobs, strict=False))
        at_end = (
            answer.finish_reason in ("stop", "tool_calls")
            and bool(tops)
            and tops[-1][0] in self.hosted.ending.end_token_ids
        )
        if at_end and not self.asked.keeps_end:
            tops = tops[:-1]
        return Piece(update.sequence.index, parts, tops, answer.finish_reason)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    def usage(self) -> dict[str, Any]:
        read, written = self.num_prompt_tokens, self.num_completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
