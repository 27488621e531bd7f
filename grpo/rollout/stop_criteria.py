"""Where a completion ends: one rule for every engine, applied to the tokens it sampled."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

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
    _watches: dict[tuple[str, ...], StopWatch] = field(default_factory=dict, init=False, compare=False, repr=False)

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
            places = [*self.watch(stop).places(before), len(before)]
            length = places[bisect_left(places, True, key=lambda n: self.has_stop(before[:n], stop))]
        return (len(token_ids), "length") if length is None else (length, "stop")

    def has_stop(self, token_ids: list[int], stop: tuple[str, ...]) -> bool:
        """Whether these tokens read as a text that contains a stop text."""
        if not stop:
            return False
        text = self.text(token_ids)
        return any(each in text for each in stop)

    def watch(self, stop: tuple[str, ...]) -> StopWatch:
        """What tells, as tokens are drawn, whether they have completed a stop text."""
        return self._watches.setdefault(stop, StopWatch(self, stop))

    def text(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


class StopWatch:
    """Whether the newest tokens of a completion complete a stop text.

    Most tokens cannot: the last character of a stop text is not in them, which is found out once for each token. The others are
    read as text with those before them.
    """

    def __init__(self, ending: Ending, stop: tuple[str, ...]) -> None:
        self.ending, self.stop = ending, stop
        self.reach = max((len(text.encode()) for text in stop), default=0)  # a stop text has no more tokens than bytes
        self._last = {text[-1] for text in stop}
        self._may_complete: dict[int, bool] = {}  # by token

    def has_seen(self, token_ids: list[int], count: int) -> bool:
        """Whether one of the newest `count` tokens completes one."""
        if not self.stop or not any(map(self._may, token_ids[-count:])):
            return False
        newest = token_ids[-(count + self.reach) :]
        # parts of a character before the newest may make other text of them
        return self.ending.has_stop(newest, self.stop) and self.ending.has_stop(token_ids, self.stop)

    def places(self, token_ids: list[int]) -> list[int]:
        """Numbers of tokens up to each that may complete one."""
        return [place for place, token in enumerate(token_ids, 1) if self._may(token)]

    def _may(self, token: int) -> bool:
        known = self._may_complete.get(token)
        if known is None:
            text = self.ending.text([token])
            # alone, part of a character reads as U+FFFD, and a space in front may be missing
            known = "\ufffd" in text or any(last in text or last == " " for last in self._last)
            self._may_complete[token] = known
        return known
