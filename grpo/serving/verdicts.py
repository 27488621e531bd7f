"""Whether answers are right, as the reward `accuracy` says, in a worker process that can be killed."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from grpo.scoring.reward import Reward, resolve_function
from grpo.scoring.scorer import Scorer
from grpo.serving.protocol import ApiError
from grpo.types import Completion, Group, Prompt

SECONDS = 10.0
"""Of the grading of a completion."""

MOST_WAITING = 16
"""Requests for verdicts."""


class Verifier:
    """Started with the first question to it; most servers are never asked. It grades in a thread of its own, one by one."""

    def __init__(self) -> None:
        self._scorer: Scorer | None = None
        self._thread = ThreadPoolExecutor(1, "verdicts")
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._is_closed = False

    def ask(self, completions: list[str], answer: str, question: str, seconds: float) -> Future[list[bool | None]]:
        """Of each completion whether its last `<answer>`, else its last box, else its last number is the gold answer.

        Args:
            seconds: after which it is given up, the time for which it waits included.

        Raises:
            ApiError: too many wait. From the future: the gold answer cannot be graded, or the time is over.
        """
        if not self._places.acquire(blocking=False):
            raise ApiError(
                f"{MOST_WAITING} requests for verdicts wait, as many as may. Try again later.",
                status=429,
                type="rate_limit_error",
                code="queue_full",
                retry_after=1,
            )
        until = time.monotonic() + seconds
        future = self._thread.submit(self._verdicts, completions, {"question": question, "answer": answer}, until)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def _verdicts(self, completions: list[str], row: dict[str, str], until: float) -> list[bool | None]:
        if self._scorer is None:
            self._scorer = Scorer(
                [Reward(resolve_function("accuracy"), args={"source": "anywhere"})],
                columns=["question", "answer"],
                max_completion_tokens=1,
                num_workers=1,
                timeout_seconds=SECONDS,
                memory_gib=4.0,
            )
        (reason,), _ = self._scorer._check([row])  # check_rows would keep a file for whatever a client sends
        if reason is not None:
            raise ApiError(reason, param="answer")
        found: list[bool | None] = []
        for text in completions:
            if time.monotonic() > until or self._is_closed:
                raise ApiError(
                    "the verdicts have taken the time that a request has. Ask about fewer completions at once.",
                    status=504,
                    type="timeout_error",
                    code="timeout",
                )
            group = Group(Prompt(0, [], "", "", row), [Completion([], [], text, "stop")])
            value = self._scorer.score([group]).rewards.item()
            found.append(None if math.isnan(value) else value > 0.5)
        return found

    def close(self) -> None:
        """Waits for the completion that is being graded."""
        self._is_closed = True
        self._thread.shutdown(cancel_futures=True)
        if self._scorer is not None:
            self._scorer.close()
