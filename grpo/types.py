"""What flows through one training step: Prompt -> Completion -> Group -> Scores -> Batch.

Shapes use one legend everywhere:

    P  prompts            G  completions per prompt      B  sequences (P * G, less those that are not trained on)
    L  all tokens of a pack (prompts and completions)    T  its completion tokens        V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """One data row, ready for the model."""

    row: int  # its place in the (filtered) data set
    token_ids: list[int]  # what the model reads
    text: str  # the same as text, with the template filled in
    prefill: str  # the end of `text` that already belongs to the answer, such as "<think>"; often empty
    columns: dict[str, Any]  # the data row; `question` and `answer` are always there
    max_tokens: int | None = None  # a limit for its completions, where it is to be lower than that of the sampling


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token, and when to stop.

    Top-k, top-p and min-p choose which tokens may be drawn, in this order, each of what the one before left; a token as likely
    as the last one kept is kept too.
    """

    max_tokens: int  # per completion
    temperature: float = 1.0  # 0: greedy decoding
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the fewest likeliest tokens that have this probability together
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of these texts

    @property
    def truncated(self) -> bool:
        """Whether some tokens may never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    `token_ids` and `logprobs` are aligned: `logprobs[t]` is the log-probability of `token_ids[t]` given the prompt and the
    tokens before it, under softmax(logits / temperature) over the whole vocabulary: the policy of the loss, whatever top-k,
    top-p and min-p left to draw from. At temperature 0 it is that of temperature 1. With finish_reason "stop" the last token is
    an end-of-sequence token or completes a stop text. `text` is what a reader sees: no end-of-sequence token, and with the
    prompt's `prefill` put back in front, so that a reward sees the whole answer.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class Group:
    """The completions of one prompt: the unit over which GRPO centres rewards."""

    prompt: Prompt
    completions: list[Completion]


def grouped(prompts: list[Prompt], completions: list[Completion]) -> list[Group]:
    """Groups of completions that come in the order of their prompts, equally many of each."""
    each = len(completions) // max(len(prompts), 1)
    return [Group(prompt, completions[i * each : (i + 1) * each]) for i, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class Scores:
    """What the reward functions said of some groups.

    NaN stands for "can't tell": the completion is neither rewarded nor counted as wrong.
    """

    rewards: Tensor  # (P, G) weighted sum over the functions
    values: dict[str, Tensor]  # function name -> (P, G), unweighted
    num_timeouts: int  # calls that were killed for exceeding the time limit
    num_crashes: int  # calls whose worker process died or ran out of memory


@dataclass
class Batch:
    """Sequences end to end, without padding: prompt 0, completion 0, prompt 1, completion 1, ...

    For two sequences of prompts `a b` and `c` with completions `x y` and `z`:

        tokens           a b x y c z        cu_seqlens      0 4 6       prompt_lens     2 1
        position_ids     0 1 2 3 0 1        completion_lens   2 1       sequence_index  0 0 1
        target_index     2 3 5              (tokens[target_index] are x y z; each is predicted at the place before)

    Per-token fields hold the completion tokens only, in the same order.
    """

    tokens: Tensor  # (L,) int64
    cu_seqlens: Tensor  # (B + 1,) int32, where each sequence starts, and L
    prompt_lens: Tensor  # (B,) int64
    advantages: Tensor  # (B,)
    sampling_logprobs: Tensor  # (T,) as the generator sampled them
    old_logprobs: Tensor | None = None  # (T,) of the policy before the first update; None: strictly on-policy
    ref_logprobs: Tensor | None = None  # (T,) of the reference; None: no KL term
    weights: Tensor | None = None  # (T,) in the loss, set per optimizer step

    PER_TOKEN: ClassVar = ("sampling_logprobs", "old_logprobs", "ref_logprobs", "weights")

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_lens)

    @property
    def sequence_lens(self) -> Tensor:
        return self.cu_seqlens.diff().long()

    @property
    def completion_lens(self) -> Tensor:
        return self.sequence_lens - self.prompt_lens

    @property
    def sequence_index(self) -> Tensor:
        """(T,) the sequence that each completion token belongs to."""
        lens = self.completion_lens
        return torch.arange(len(lens), device=lens.device).repeat_interleave(lens)

    @property
    def position_ids(self) -> Tensor:
        """(L,) place of each token in its sequence."""
        lens = self.sequence_lens
        starts = self.cu_seqlens[:-1].long().repeat_interleave(lens)
        return torch.arange(len(self.tokens), device=lens.device) - starts

    @property
    def target_index(self) -> Tensor:
        """(T,) places of the completion tokens in `tokens`."""
        return (self.position_ids >= self.prompt_lens.repeat_interleave(self.sequence_lens)).nonzero().squeeze(-1)

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in vars(self).items()}
        return Batch(**moved)
