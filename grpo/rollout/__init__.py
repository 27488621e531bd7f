"""Prompts -> Groups of sampled Completions: the protocol every rollout engine follows, and the choice among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from grpo.config import Config
    from grpo.policy import Policy


class Generator(Protocol):
    def sample(
        self, prompts: list[Prompt], *, num_completions: int, temperature: float, max_tokens: int, seed: int
    ) -> list[Group]:
        """Sample `num_completions` continuations of each prompt, at most `max_tokens` long.

        Temperature 0 is greedy decoding; the log-probabilities are then those of temperature 1. The result is a function of
        the weights, the arguments and the device. Every token carries the log-probability it was sampled with.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's weights after an update. Every process calls it."""
        ...


def make_generator(config: Config, policy: Policy) -> Generator:
    """The engine for this configuration; transformers' `generate` is the only one so far."""
    from grpo.rollout.hf import HFGenerator

    return HFGenerator(policy, max_sequences=config.memory.max_sequences)
