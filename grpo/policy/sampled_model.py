"""A language model as what samples sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config import ModelConfig
from grpo.policy.families import attribute
from grpo.policy.language_model import resolve_dtype
from grpo.policy.model_source import processor_files
from grpo.policy.tokenizer import end_token_ids
from grpo.system.distributed import Processes

PLAIN_SENTENCES = (
    "The sum of two and three is five, because three more than two makes five.",
    "A train leaves the station at noon and arrives in the next town one hour later.",
)
FORWARD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Mean gap in nats between two ways to compute the log-probabilities of these that rounding can explain. Ordinary text in
bfloat16 differs by some hundredths; a family whose sequences leak into each other differs by one and more."""


class SampledModel:
    """A language model as a Generator sees it: what it is sampled with. Alone, a model that is only sampled.

    Its log-probabilities are those at `temperature`.
    """

    def __init__(
        self, lm: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, processes: Processes
    ) -> None:
        self.lm = lm
        capped = attribute(lm.config.get_text_config(), "attn_logit_softcapping")
        self.own_attention = "eager" if capped else lm.config._attn_implementation  # sdpa would leave the cap out
        self.tokenizer = tokenizer
        self.processor_files = processor_files(config)
        self.end_token_ids = end_token_ids(config, tokenizer)
        self.processes = processes
        self.dtype = resolve_dtype(config.dtype)
        self.temperature = 1.0

    @property
    def whole_lm(self) -> PreTrainedModel:
        """The model whose weights are whole on this process."""
        return self.lm

    def sync(self) -> None:
        """Bring the sampling weights up to date after an update; a collective. There is nothing to do."""

    @contextmanager
    def sampling_model(self, attention: str | None = None) -> Iterator[PreTrainedModel]:
        """The model with whole weights, in eval mode, with the attention of that name; None: transformers' for its family."""
        lm = self.whole_lm
        own = lm.config._attn_implementation
        lm.set_attn_implementation(attention or self.own_attention)
        with eval_mode(lm):
            try:
                yield lm
            finally:
                lm.set_attn_implementation(own)

    def plain_logprobs(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Two plain sentences and the model's own log-probabilities of them; (2, N) and (2, N - 1).

        Args:
            length: N, the sentences said again and again if it takes that; None: the shorter one's.
        """
        tokens = self.plain_tokens(length)
        return tokens, self.sentence_logprobs(tokens)

    def plain_tokens(self, length: int | None = None) -> Tensor:
        """See plain_logprobs; (2, N)."""
        both = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PLAIN_SENTENCES]
        length = length or min(map(len, both))
        return torch.tensor([(ids * length)[:length] for ids in both], device=self.processes.device)

    @torch.no_grad()
    def sentence_logprobs(self, tokens: Tensor, *, temperature: float | None = None) -> Tensor:
        """The model's own log-probabilities of all but the first of token ids (B, N), at its temperature or another;
        (B, N - 1)."""
        with self.sampling_model() as lm:
            return own_logprobs(lm, tokens, temperature=temperature or self.temperature)


def own_logprobs(lm: PreTrainedModel, tokens: Tensor, *, temperature: float) -> Tensor:
    """What a model's own forward pass says of all but the first of token ids (B, N); (B, N - 1)."""
    logits = lm(input_ids=tokens, use_cache=False).logits[:, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
