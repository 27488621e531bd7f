"""Which requests run in the next steps: an open-ended loop over the native engine's slots and pages.

One thread owns the device. It takes requests from a queue, launches a chunk of steps of each model that has any, and while those
run hands on what the chunk before has drawn. Sampling is that of `grpo sample`: a token's random number depends on its sequence's
seed and position alone, so neighbours, slots and the time of arrival change nothing but rounding.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from grpo.rollout.engine import READ_TOKENS
from grpo.rollout.slots import Prefix, Slots
from grpo.serving.decoder import Served, ServedChunk, ServingDecoder
from grpo.system.out_of_memory import free, is_out_of_memory
from grpo.system.terminal import say

PIECE, CPU_PIECE = 4096, 256
"""Tokens of prompts that are read between two launches; what runs waits for them, and so does a shorter prompt."""


@dataclass(frozen=True)
class TopLogprobs:
    """Of one token: the model's own log-probability of it at temperature 1, and of the likeliest tokens there."""

    logprob: float
    top_tokens: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True)
class Update:
    """What a sequence has drawn since the last one."""

    sequence: Served
    tokens: list[int]
    logprobs: list[TopLogprobs] | None  # of each token, if the sequence wants them
    has_ended: bool
    error: str | None = None  # it ended because of this


class Scheduler:
    """The requests of one model.

    Args:
        num_slots: most sequences in a step.
    """

    def __init__(self, decoder: ServingDecoder) -> None:
        self.decoder = decoder
        self.num_preempted = 0
        self._end_token_ids = set(decoder.ends.tolist())
        self._before: ServedChunk | None = None
        self.piece = PIECE if decoder.device.type == "cuda" else CPU_PIECE
        self.slots = self._empty_slots()

    def _empty_slots(self) -> Slots:
        return Slots(
            [],
            num_slots=self.decoder.state.shape[1],
            pages=range(1, self.decoder.cache.keys.shape[1]),
            pages_each=self.decoder.table.shape[1],
        )

    def __bool__(self) -> bool:
        return bool(self.slots) or self._before is not None

    def add(self, sequences: Iterable[Served]) -> None:
        """Sequences that go on from the same prompt, which is read once."""
        self.slots.unread.append(Prefix(deque(sequences)))

    def cancel(self, sequence: Served) -> None:
        if not sequence.has_ended:
            sequence.has_ended = True
            self.slots.cancel(sequence)

    def score(self, prompt: list[int]) -> list[TopLogprobs]:
        """Of each token of a prompt but the first, beside whatever else runs.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        logprobs, tokens, top = self.decoder.score(prompt)
        if not logprobs.isfinite().all():
            raise FloatingPointError("the model's logits are not finite numbers: its weights are broken")
        return [TopLogprobs(*each) for each in zip(logprobs.tolist(), tokens.tolist(), top.tolist(), strict=True)]

    def turn(self) -> list[Update]:
        """Launch the next steps, and take in what the ones before have drawn."""
        chunk = self._launch()
        before, self._before = self._before, chunk
        self.num_preempted = self.slots.num_preempted
        return [] if before is None else self._take_in(before)

    def fail(self, why: str) -> list[Update]:
        """Give up all that runs and waits, and be ready for new requests."""
        self.decoder.forget()  # first: where the device fails here too, `lose` still knows who waits
        return self.lose(why)

    def lose(self, why: str) -> list[Update]:
        """Give up all that runs and waits. The device, which may take nothing any more, is not asked."""
        waiting = [each for prefix in (*self.slots.unread, *self.slots.ready) for each in prefix.waiting]
        lost = [*self.slots.running, *waiting]
        self.slots, self._before = self._empty_slots(), None
        for sequence in lost:
            sequence.has_ended = True  # type: ignore[attr-defined]
        return [Update(sequence, [], None, True, why) for sequence in lost]  # type: ignore[arg-type]

    def _launch(self) -> ServedChunk | None:
        """See grpo.rollout.engine.Call, which does this for a closed batch, and reads each prompt whole."""
        decoder, slots = self.decoder, self.slots
        while slots.read_ahead(READ_TOKENS):
            pass  # they have pages now
        self._read_a_piece()
        decoder.copy(slots.start(decoder.chunk))
        slots.grow(2 * decoder.chunk)  # the steps of the chunk before are not counted yet
        under_way = set() if self._before is None else set(self._before.rows)
        rows = [each for each in slots.running if each.remaining > decoder.chunk or each not in under_way]
        return decoder.decode(rows) if rows else None

    def _read_a_piece(self) -> None:
        """Read up to `piece` tokens of prompts that have pages.

        Half of it is the oldest's, so that none waits forever; the rest goes to those that have the fewest tokens left, so that a
        short prompt does not wait for a long one. What is not read to its end does not start.
        """
        unread = [each for each in self.slots.ready if each.num_kept < len(each.tokens)]
        if not unread:
            return

        def left(prefix: Prefix) -> int:
            return len(prefix.tokens) - prefix.num_kept

        shares = {unread[0]: min(left(unread[0]), self.piece // 2)}
        for prefix in sorted(unread, key=left):
            has = shares.get(prefix, 0)
            shares[prefix] = has + min(left(prefix) - has, self.piece - sum(shares.values()))
        for prefix, share in shares.items():
            prefix.end = None if share == left(prefix) else prefix.num_kept + share
        self.decoder.read(unread)
        for prefix, share in shares.items():
            prefix.num_kept += share

    def _take_in(self, chunk: ServedChunk) -> list[Update]:
        chunk.wait()
        tokens, lens = chunk.tokens.T.tolist(), chunk.lens.tolist()
        finite = chunk.logprobs.isfinite().all(0).tolist()
        updates, finished = [], []
        for row, sequence in enumerate(chunk.rows):
            assert isinstance(sequence, Served), "only such sequences are added"
            if sequence.has_ended:
                continue  # in the chunk before, or its client has left
            count = lens[row] - sequence.num_cached
            if not finite[row]:
                raise FloatingPointError(
                    "the model's logits are not finite numbers, so no token can be drawn from them: its weights are broken"
                )
            drawn = tokens[row][:count]
            sequence.tokens += drawn
            at_end = not sequence.ignores_ends and sequence.tokens[-1] in self._end_token_ids
            sequence.has_ended = at_end or len(sequence.tokens) == sequence.limit
            if sequence.has_ended:
                finished.append(sequence)
            top = _top(chunk, row, count) if sequence.wants_logprobs else None
            updates.append(Update(sequence, drawn, top, sequence.has_ended))
        self.slots.finish(finished)  # type: ignore[arg-type]
        return updates


def _top(chunk: ServedChunk, row: int, count: int) -> list[TopLogprobs]:
    assert chunk.own_logprobs is not None, "a chunk with such a row has them"
    assert chunk.top_tokens is not None, "a chunk with such a row has them"
    assert chunk.top_logprobs is not None, "a chunk with such a row has them"

    def of(values: Tensor) -> list[Any]:
        return values[:count, row].tolist()

    return [
        TopLogprobs(*each)
        for each in zip(of(chunk.own_logprobs), of(chunk.top_tokens), of(chunk.top_logprobs), strict=True)
    ]


class Worker:
    """The thread that owns the device, and serves all models in turns.

    Args:
        deliver: called in this thread with the updates of a turn.
    """

    def __init__(self, schedulers: list[Scheduler], deliver: Callable[[list[Update]], None]) -> None:
        self.schedulers, self.deliver = schedulers, deliver
        self.error: BaseException | None = None  # it has ended because of this
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Once what runs has ended."""
        self._inbox.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    def add(self, scheduler: Scheduler, sequences: list[Served]) -> None:
        """From any thread."""
        self._inbox.put(lambda: scheduler.add(sequences))
        if self.error is not None:  # since the thread has looked into the queue for the last time
            self._give_up()

    def score(self, scheduler: Scheduler, prompt: list[int]) -> Future[list[TopLogprobs]]:
        """From any thread; see Scheduler.score. It runs between two turns."""
        future: Future[list[TopLogprobs]] = Future()

        def score() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(scheduler.score(prompt))
            except Exception as error:  # of this request alone
                future.set_exception(error)

        self._inbox.put(score)
        if self.error is not None:
            self._give_up()
        return future

    def cancel(self, scheduler: Scheduler, sequences: list[Served]) -> None:
        """From any thread; of sequences that have ended it does nothing."""

        def cancel() -> None:
            for sequence in sequences:
                scheduler.cancel(sequence)

        self._inbox.put(cancel)

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._serve()
        except BaseException as error:
            self.error = error
            say(f"error: the thread of the device has ended:\n{traceback.format_exc()}")
            self._give_up()

    def _give_up(self) -> None:
        """Fail what runs, what waits, and what is still in the queue."""
        with self._ending:
            with contextlib.suppress(Empty):
                while True:
                    if (request := self._inbox.get_nowait()) is not None:
                        request()
            self.deliver([update for each in self.schedulers for update in each.lose("the server has lost its device")])

    def _serve(self) -> None:
        device = self.schedulers[0].decoder.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while True:
            if not self._take_requests():
                return
            for scheduler in self.schedulers:
                if scheduler and (updates := self._turn(scheduler)):
                    self.deliver(updates)

    def _take_requests(self) -> bool:
        """Waits for one if nothing runs; False: it is time to end."""
        while True:
            idle = not any(self.schedulers)
            try:
                request = self._inbox.get(block=idle)
            except Empty:
                return True
            if request is None:
                if idle:
                    return False
                self._inbox.put(None)
                return True
            request()

    def _turn(self, scheduler: Scheduler) -> list[Update]:
        try:
            return scheduler.turn()
        except Exception as error:
            say(f"error: requests are lost:\n{traceback.format_exc()}")
            memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
            why = "out of memory" if memory else str(error).splitlines()[0] if str(error) else type(error).__name__
        free()
        return scheduler.fail(why)
