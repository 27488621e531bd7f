"""Rollouts through transformers' `generate`: any device, any model.

Slow, because it decodes in lockstep until the last completion of a batch has ended, but it is the plainest way to sample
and so the reference that any faster engine is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grpo.policy.policy import SampledModel
from grpo.rollout.grouping import Grouping
from grpo.rollout.stop_criteria import Ending, token_limit
from grpo.system import progress
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling

FILLER = 0
"""A token that every model has, where none is read; a tokenizer's own pad token may have no embedding."""


class HFGenerator:
    """Samples from `policy`, at most `max_sequences` completions at once."""

    def __init__(self, policy: SampledModel, *, max_sequences: int) -> None:
        self.policy = policy
        self.max_sequences = max_sequences
        self.ending = Ending(policy.tokenizer, policy.end_token_ids)

    def sync(self) -> None:
        self.policy.sync()

    def halve(self) -> str | None:
        """See Generator."""
        if self.max_sequences == 1:
            return None
        self.max_sequences //= 2
        return f"going on with {self.max_sequences} completions at once; memory.max_sequences={self.max_sequences} starts so"

    @torch.no_grad()
    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator."""
        grouping = Grouping(prompts, num_completions=num_completions, on_group=on_group)
        wanted = grouping.prompts
        device = self.policy.processes.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.policy.sampling_model() as lm:
            for own_seed, places in _runs(wanted, sampling, seed=seed):
                torch.manual_seed(own_seed)
                for start in range(0, len(places), self.max_sequences):
                    batch = places[start : start + self.max_sequences]
                    completions = self._generate(lm, wanted[batch.start : batch.stop], sampling)
                    for place, completion in zip(batch, completions, strict=True):
                        grouping.add(place, completion)
        return grouping.groups()

    def metrics(self) -> dict[str, float]:
        """See Generator; `generate` has no slots."""
        return {}

    def _generate(self, lm: PreTrainedModel, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        policy = self.policy
        input_ids, attention_mask = self._pad_left(prompts)
        recorder = LogprobRecorder(sampling.temperature or 1.0)
        output: Tensor
        with without_defaults(lm):
            output = lm.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(
                    **drawing_options(sampling),
                    max_new_tokens=max(token_limit(prompt, sampling) for prompt in prompts),
                    eos_token_id=policy.end_token_ids,
                    pad_token_id=next(iter(policy.end_token_ids), FILLER),
                    stop_strings=list(sampling.stop) or None,
                ),
                tokenizer=policy.tokenizer,
                logits_processor=LogitsProcessorList([recorder]),
            )
        tokens = output[:, input_ids.shape[1] :]
        rows = zip(prompts, tokens.tolist(), recorder.logprobs(tokens).tolist(), strict=True)
        return [self.ending.completion(prompt, sampling, ids, logprobs) for prompt, ids, logprobs in rows]

    def _pad_left(self, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask; both (len(prompts), longest prompt)."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        pad = [longest - len(prompt.token_ids) for prompt in prompts]
        ids = torch.tensor([[FILLER] * n + prompt.token_ids for n, prompt in zip(pad, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
        device = self.policy.processes.device
        return ids.to(device), mask.to(device)


def _runs(prompts: list[Prompt], sampling: Sampling, *, seed: int) -> Iterator[tuple[int, range]]:
    """Seeds, and the places that share each: `generate` has one for all that it draws, so prompts of their own seed go alone."""
    drawn = sampling.temperature > 0
    own = [prompt.seed if drawn and prompt.seed is not None else seed for prompt in prompts]
    for own_seed, places in groupby(range(len(prompts)), key=own.__getitem__):
        start, *others = places
        yield own_seed, range(start, start + 1 + len(others))


def drawing_options(sampling: Sampling) -> dict[str, Any]:
    """The arguments of `generate` for how to draw a token."""
    if sampling.temperature == 0:
        return {}
    kept = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p or None}
    return {"do_sample": True, "temperature": sampling.temperature, **kept}


@contextmanager
def without_defaults(lm: PreTrainedModel) -> Iterator[None]:
    """Whatever a call leaves open, `generate` takes from the model's own generation config: a repetition penalty or a top-k
    there would silently make the samples come from another distribution than the log-probabilities."""
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


class LogprobRecorder(LogitsProcessor):
    """Keeps the log-probability of each sampled token without keeping any step's (N, V) scores.

    `generate` shows a processor the scores of the step about to be sampled together with the tokens so far, so a step's
    scores are read off when the next step shows which token was drawn from them. Sampling warpers such as the temperature
    run after custom processors, so the recorder divides by the temperature itself.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._columns: list[Tensor] = []
        self._pending: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        progress.tick()
        if self._pending is not None:
            self._columns.append(self._pick(input_ids[:, -1]))
        self._pending = scores / self.temperature
        return scores

    def _pick(self, tokens: Tensor) -> Tensor:
        assert self._pending is not None, "no scores were seen"
        return self._pending.gather(1, tokens.unsqueeze(1)).squeeze(1) - self._pending.logsumexp(1)

    def logprobs(self, tokens: Tensor) -> Tensor:
        """(N, steps) for the tokens that `generate` returned."""
        return torch.stack([*self._columns, self._pick(tokens[:, -1])], 1)
