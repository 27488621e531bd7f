"""Where a completion ends: one rule for every engine, applied to the tokens it sampled."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grpo.types import Completion, FinishReason, Prompt, Sampling


def token_limit(prompt: Prompt, sampling: Sampling) -> int:
    """Most tokens that a completion of `prompt` may have.

    Raises:
        ValueError: it may have none.
    """
    limit = sampling.max_tokens if prompt.max_tokens is None else min(prompt.max_tokens, sampling.max_tokens)
    if limit < 1:
        raise ValueError(f"the limit of the completions of prompt {prompt.row} is {limit}; it is at least 1 token.")
    return limit


@dataclass(frozen=True)
class Ending:
    """Knows the tokens that end a completion, and how tokens read as text."""

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: list[int]

    def completion(self, prompt: Prompt, sampling: Sampling, token_ids: list[int], logprobs: list[float]) -> Completion:
        """Cut sampled tokens, which may run on behind the end, to a completion."""
        length, reason = self.find(token_ids[: token_limit(prompt, sampling)], sampling.stop)
        visible = token_ids[:length]
        if visible and visible[-1] in self.end_token_ids:
            visible = visible[:-1]
        return Completion(token_ids[:length], logprobs[:length], prompt.prefill + self.text(visible), reason)

    def find(self, token_ids: list[int], stop: tuple[str, ...]) -> tuple[int, FinishReason]:
        """Number of tokens to the end and why it is the end; all of them and "length" if nothing ends them.

        With end token 9 and stop text "ok", [5, 9, 7] gives 2, "stop"; for tokens that read "o", "k!", "?" it is 2, "stop" too.
        """
        ends = set(self.end_token_ids)
        length = next((place + 1 for place, token in enumerate(token_ids) if token in ends), None)
        before = token_ids if length is None else token_ids[: length - 1]
        if self.has_stop(before, stop):
            length = bisect_left(range(len(before)), True, key=lambda n: self.has_stop(before[: n + 1], stop)) + 1
        return (len(token_ids), "length") if length is None else (length, "stop")

    def has_stop(self, token_ids: list[int], stop: tuple[str, ...]) -> bool:
        """Whether these tokens read as a text that contains a stop text."""
        if not stop:
            return False
        text = self.text(token_ids)
        return any(each in text for each in stop)

    def text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
