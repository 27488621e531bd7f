"""A loaded model that a user hands to a trainer: written down once, and read from there as any other.

A run reads its model more than once (the policy, the reference, a copy to sample from, each of them on every process), again
when it resumes, and perhaps sharded. The object is one of these at most. So its weights go to a directory named after them, which
is the run's `model.name` from then on. The same weights are the same directory, so a run resumes with an object too; the object
itself stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo.policy.model_source import quantisation
from grpo.system import progress

DIGITS = 12
"""Of the digest, in a directory's name."""


@dataclass(frozen=True)
class GivenModel:
    """A model of transformers with its tokenizer, either checked."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> GivenModel:
        """Args: tokenizer: None: the one that lies where the model was loaded from.

        Raises:
            ValueError: this model cannot be trained from the object, or has no tokenizer.
        """
        _check_model(model)
        taken = sorted(name for name in settings if name in ("model", "model.name", "model.revision"))
        if taken:
            raise ValueError(
                f"settings holds {taken[0]}; the model of this run is the {type(model).__name__} given to the trainer. Remove it."
            )
        if tokenizer is None:
            tokenizer = _tokenizer_beside(model)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}; it must be a tokenizer of transformers. Pass what "
                "AutoTokenizer.from_pretrained returns; of a processor, its `tokenizer`."
            )
        return cls(model, tokenizer)

    @property
    def name(self) -> str:
        """What it is called, without a path: for the run's directory."""
        origin = Path(str(self.lm.config.name_or_path or "")).name
        return re.sub(r"[^\w.-]+", "-", origin) or self.lm.config.model_type

    def write_below(self, folder: Path) -> Path:
        """The directory `folder`/NAME-DIGEST with weights, configuration and tokenizer; made if it is not there yet."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".", dir=folder))
        try:
            with progress.busy("writing down the model that was given"):
                self.tokenizer.save_pretrained(partial)
                self.lm.config.save_pretrained(partial)
                if self.lm.generation_config is not None:  # it says which tokens end a completion
                    self.lm.generation_config.save_pretrained(partial)
                directory = folder / f"{self.name}-{self._digest(partial)[:DIGITS]}"
                if not directory.is_dir():
                    self.lm.save_pretrained(partial)
                    os.chmod(partial, 0o777 & ~_umask())
                    _appear(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return directory

    def _digest(self, described: Path) -> str:
        """Of every weight, and of the files of configuration and tokenizer."""
        digest = xxhash.xxh3_128()
        for path in sorted(described.iterdir()):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
        for name, weight in sorted(self.lm.state_dict().items()):
            progress.tick()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _appear(made: Path, directory: Path) -> None:
    """Rename it, unless another process that was given the same model has been faster."""
    try:
        os.replace(made, directory)
    except OSError:
        if not directory.is_dir():
            raise


def _umask() -> int:
    """That of this process: mkdtemp makes a folder that nobody else can read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_model(model: Any) -> None:
    """Raises ValueError if it is no whole, plain model of transformers."""
    kind = type(model).__name__
    if kind == "PeftModel" or kind.startswith("PeftModelFor"):
        raise ValueError(
            f"the model is a {kind}; adapters are trained from files. Merge them (`model.merge_and_unload()`), or save them and "
            "name their directory: Trainer('my-adapter', settings={'lora.rank': ...})."
        )
    if not isinstance(model, PreTrainedModel):
        hint = "Unwrap it (`model._orig_mod` after torch.compile, `model.module` behind a wrapper)."
        raise ValueError(
            f"the model is a {kind}; it must be a PreTrainedModel of transformers, or the name of one. "
            + (hint if isinstance(model, nn.Module) else "Pass what AutoModelForCausalLM.from_pretrained returns.")
        )
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None or getattr(model, "_hf_peft_config_loaded", False):
        where = f" in {adapted}" if adapted else ""
        raise ValueError(
            f"the model is a {kind} with adapters{where}, put there by get_peft_model or add_adapter; adapters are trained from "
            "files. Merge them (`merge_and_unload()`), or load the model anew."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"the model is a {kind}, which has no output layer over the vocabulary. Load it with AutoModelForCausalLM."
        )
    method = quantisation(model.config)
    if method is not None:
        raise ValueError(
            f"the model's weights are quantised ({method}), and an update needs them in bfloat16 or float32. Load it without "
            "quantization_config."
        )
    for name, weight in model.named_parameters():
        if weight.is_meta or hasattr(weight, "ds_id"):
            where = "on the meta device" if weight.is_meta else "sharded by DeepSpeed"
            raise ValueError(
                f"the model's weight {name} is {where}, and not whole in this process. Load the model without device_map and "
                "outside of ZeRO-3; distributed.zero_stage=3 shards it when the run begins."
            )


def _tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    origin = model.config.name_or_path
    try:
        if not origin:
            raise OSError("the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer is None; a model needs one, and there is none where it comes from ({origin or 'nowhere'}): "
            f"{str(error).splitlines()[0]}. Pass tokenizer=AutoTokenizer.from_pretrained(...)."
        ) from error
