"""What both modes of vLLM answer: prompt token ids and sampling parameters in, token ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Request(NamedTuple):
    """One completion to sample."""

    token_ids: list[int]  # of the prompt
    parameters: dict[str, Any]  # under the names that both vllm.SamplingParams and /v1/completions know


class Sampled(NamedTuple):
    """What vLLM made of a request."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None


OnAnswer = Callable[[int, Sampled], None]
"""Called with the place of a request and its answer."""


class Engine(Protocol):
    def generate(self, requests: list[Request], on_answer: OnAnswer) -> None:
        """Answer each request; `on_answer` is called in this thread, in whatever order the answers come in."""
        ...

    def take_weights(self) -> None:
        """Sample with the policy's present weights from here on. Every process calls it."""
        ...
