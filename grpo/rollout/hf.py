"""Rollouts through transformers' `generate`: any device, any model.

Slow, because it decodes in lockstep until the last completion of a batch has ended, but it is the plainest way to sample
and so the reference that any faster engine is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grpo.policy.sampled_model import SampledModel
from grpo.rollout.grouping import Grouping
from grpo.rollout.sampling import completion_seeds, draw, knobs_of
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

    def release_memory(self) -> None:
        """See Generator; keys and values are gone at the end of each call."""

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
        if sampling.weights == "fp8":
            raise ValueError("sampling.weights is fp8, which the native engine makes. Set rollout.engine to native.")
        seeds = None
        if sampling.temperature > 0 and any(prompt.seed is not None for prompt in prompts):
            seeds = completion_seeds(prompts, seed=seed, num_completions=num_completions)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.policy.sampling_model() as lm:
            torch.manual_seed(seed)
            for start in range(0, len(wanted), self.max_sequences):
                batch = slice(start, start + self.max_sequences)
                own = None if seeds is None else seeds[batch].to(device)
                for place, completion in enumerate(self._generate(lm, wanted[batch], sampling, own), start):
                    grouping.add(place, completion)
        return grouping.groups()

    def metrics(self) -> dict[str, float]:
        """See Generator; `generate` has no slots."""
        return {}

    def _generate(
        self, lm: PreTrainedModel, prompts: list[Prompt], sampling: Sampling, seeds: Tensor | None
    ) -> list[Completion]:
        """One batch; `seeds` (B,) of its completions if they have random numbers of their own."""
        policy = self.policy
        input_ids, attention_mask = self._pad_left(prompts)
        recorder = LogprobRecorder(sampling.temperature or 1.0)
        processors: list[LogitsProcessor] = [recorder]
        if seeds is not None:
            processors.append(OwnDraws(seeds, prompts, sampling, padded_to=input_ids.shape[1]))
        output: Tensor
        with without_defaults(lm):
            output = lm.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(
                    **(drawing_options(sampling) if seeds is None else {}),
                    max_new_tokens=max(token_limit(prompt, sampling) for prompt in prompts),
                    eos_token_id=policy.end_token_ids,
                    pad_token_id=next(iter(policy.end_token_ids), FILLER),
                    stop_strings=list(sampling.stop) or None,
                ),
                tokenizer=policy.tokenizer,
                logits_processor=LogitsProcessorList(processors),
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


class OwnDraws(LogitsProcessor):
    """Draws as the native engine does, where prompts have seeds of their own: by the completion's seed and the token's position.

    What a completion draws is then the same beside any others, so that completions of many prompts share a pass. `generate` has
    one stream of random numbers for a whole batch, and each prompt had to go alone: 7 times slower for 256 questions x 4
    completions of the quickstart's model on a CPU. `generate` decodes greedily, and finds only the drawn token left.

    Args:
        seeds: (B,) of the completions.
        padded_to: tokens of `generate`'s input, of which those of the prompts are the last.
    """

    def __init__(self, seeds: Tensor, prompts: list[Prompt], sampling: Sampling, *, padded_to: int) -> None:
        self.seeds, self.truncated = seeds, sampling.truncated
        self.knobs = knobs_of(sampling).to(seeds.device)
        self.padding = padded_to - torch.tensor([len(prompt.token_ids) for prompt in prompts], device=seeds.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, _ = draw(scores, self.seeds, input_ids.shape[1] - self.padding, self.knobs, truncated=self.truncated)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens.long().unsqueeze(1), 0.0)


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
        progress.drew(len(scores))
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
