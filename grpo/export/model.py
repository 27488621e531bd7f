"""The model that is exported: whole weights, an adapter merged into them, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config import ModelConfig
from grpo.inference.model import merged
from grpo.policy.model_source import check_weights, from_source, not_loaded
from grpo.system import progress


@dataclass(frozen=True)
class Whole:
    """A model in memory, in the type that its files have."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def config(self) -> PretrainedConfig:
        return self.lm.config

    def weights(self) -> dict[str, Tensor]:
        """By transformers' names; the output layer only if it is not the embedding."""
        weights = dict(self.lm.state_dict())
        if self.lm.get_output_embeddings().weight is self.lm.get_input_embeddings().weight:
            weights.pop("lm_head.weight", None)
        return weights


def load_whole(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Whole:
    """Raises ValueError if the weights cannot be read."""
    check_weights(config)
    try:
        with progress.busy("loading the model"):
            lm = merged(from_source(AutoModelForCausalLM, config, dtype="auto"), config)
    except (OSError, ValueError) as error:
        raise ValueError(not_loaded(config, error)) from error
    return Whole(lm.requires_grad_(False).eval(), tokenizer)
