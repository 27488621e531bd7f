"""Whether answers are right, as the reward `accuracy` says, in a worker process that can be killed."""

from __future__ import annotations

import math
import threading

from grpo.scoring.reward import Reward, resolve_function
from grpo.scoring.scorer import Scorer
from grpo.serving.protocol import ApiError
from grpo.types import Completion, Group, Prompt

SECONDS = 10.0
"""Of the grading of a completion."""


class Verifier:
    """Started with the first question to it; most servers are never asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a scorer is for one call at a time
        self._scorer: Scorer | None = None

    def verdicts(self, completions: list[str], answer: str, question: str) -> list[bool | None]:
        """Of each completion whether its last `<answer>`, else its last box, else its last number is the gold answer.

        Raises:
            ApiError: the gold answer cannot be graded.
        """
        row = {"question": question, "answer": answer}
        group = Group(Prompt(0, [], "", "", row), [Completion([], [], text, "stop") for text in completions])
        with self._lock:
            if self._scorer is None:
                self._scorer = Scorer(
                    [Reward(resolve_function("accuracy"), args={"source": "anywhere"})],
                    columns=["question", "answer"],
                    max_completion_tokens=1,
                    num_workers=1,
                    timeout_seconds=SECONDS,
                    memory_gib=4.0,
                )
            (reason,) = self._scorer.check_rows([row])
            if reason is not None:
                raise ApiError(reason, param="answer")
            (rewards,) = self._scorer.score([group]).rewards.tolist()
        return [None if math.isnan(value) else value > 0.5 for value in rewards]

    def close(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
