"""The update without what makes it fast: the reference of the checks of the fast one.

The model's own layers, a float32 copy of the logits with autograd's log_softmax, and a prompt of its own for every completion.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.check.dry_run import ANEW, NOTHING_HELD_OUT, changed
from grpo.config import Config
from grpo.policy.attention import packed_inputs
from grpo.policy.language_model import ROTARY, PackedLM, output_head
from grpo.policy.policy import Policy
from grpo.trainer import Trainer
from grpo.training.learner import Learner
from grpo.types import Batch, MicroBatch

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class PlainLM(PackedLM):
    """A PackedLM whose log-probabilities are autograd's of float32 logits.

    Args:
        alone: a pass holds one sequence, which the model reads through its own attention.
    """

    def __init__(self, lm: PreTrainedModel, *, alone: bool = False, **options: Any) -> None:
        super().__init__(lm, **options)
        self.alone = alone

    def _packed(self, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """See PackedLM."""
        inputs = {"input_ids": micro.tokens[None], "use_cache": False} if self.alone else packed_inputs(micro)
        hidden = self.lm.base_model(**inputs).last_hidden_state.squeeze(0)[micro.source_index]
        size = self.logprobs_of.chunk_tokens
        chunks = zip(hidden.split(size), micro.targets.split(size), strict=True)
        parts = [checkpoint(self._logprobs, *chunk, use_reentrant=False) for chunk in chunks]
        logprobs, entropies, likeliest = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies), torch.cat(likeliest)

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = output_head(self.lm)(hidden).float() / self.temperature
        all_logprobs = logits.log_softmax(-1)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        chosen = all_logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen, entropy, chosen == all_logprobs.amax(-1)


def use_own_rotary(lm: PreTrainedModel) -> None:
    """Undo what `policy.fuse_kernels` did to the family; it changes nothing else beyond the model it is given."""
    family = vars(sys.modules[type(lm).__module__])
    if ROTARY in family:
        family[ROTARY] = inspect.unwrap(family[ROTARY])


def unshared(batch: Batch) -> Batch:
    """The same sequences, each with a prompt of its own."""
    return replace(batch, prompt_index=torch.arange(batch.num_sequences))


class PlainPolicy(Policy):
    """A Policy whose update, and whose reference, is plain."""

    def _packed(self, lm: PreTrainedModel) -> PackedLM:
        use_own_rotary(lm)
        return PlainLM(lm, temperature=self.temperature, chunk_tokens=self._config.memory.logprob_chunk_tokens)


class PlainLearner(Learner):
    """A Learner whose sequences share no prompt."""

    def deal(self, mine: Batch) -> list[MicroBatch]:
        """See Learner."""
        return super().deal(unshared(mine))


class PlainTrainer(Trainer):
    """A Trainer whose update is plain. Its engine samples as any other's."""

    _policy_class = PlainPolicy
    _learner_class = PlainLearner


@contextmanager
def real_trainer(config: Config, trainer_class: type[AnyTrainer], **changes: dict[str, Any]) -> Iterator[AnyTrainer]:
    """A trainer with the run's own data and rewards, to be stepped by hand, that leaves no file behind.

    Args:
        changes: settings to set, by section.

    Raises:
        ValueError: as Trainer.
    """
    quiet: dict[str, dict[str, Any]] = {
        "logging": {"wandb": "disabled", "completions_every": 0, "tensorboard": False},
        "evaluation": NOTHING_HELD_OUT,
    }
    with TemporaryDirectory(prefix="grpo-check-") as directory:
        run = {**ANEW, **changes.pop("run", {}), "dir": str(Path(directory) / "run")}
        wanted = changed(config, **quiet, **changes, run=run).model_copy(update={"schedules": config.schedules})
        trainer = trainer_class(wanted)
        try:
            yield trainer
        finally:
            trainer.close()
