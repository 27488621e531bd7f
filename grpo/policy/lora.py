"""Low-rank adapters instead of all weights (LoRA, arXiv 2106.09685), as layers of peft.

An adapted layer computes W x + s B A x with s = alpha / rank. W stays as it was loaded, or was put into 4 bits (four_bit.py).
A starts random and B at zero, so the policy starts as the base model to the last bit. Each layer has two adapters: the policy's,
which is trained, and the reference's, which is not: with its B at zero it is the starting model, and a refresh copies the
policy's into it. So the reference costs no second model.

Adapters have the model's dtype, because DeepSpeed casts every parameter to it and keeps float32 masters of those it trains.
There is no dropout: with it, the ratio of an unchanged policy would not be 1.

In bfloat16 a layer's output, and the merged weight that sampling reads, lose what an adapter adds below half a unit in the last
place, 2^-9 of the value. With AdamW steps of 1e-5 on a random model (hidden size 1,024, rank 16) the merged weights held 2 % of
the first update, 14 % of the sum of six and 58 % of 26; ten steps of 1e-4 later, 99 %. The mean gap between what is sampled from
and what is trained stayed below 0.03 nats. Rounding at random, right on average, keeps all of it in the weights but not in the
layers' output, and made the gap larger; so it is to the nearest.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.config import AnyConfig, Config
from grpo.policy.model_source import QUANTIZATION, source_of
from grpo.system.distributed import whole

if TYPE_CHECKING:  # it takes most of a second to import, for runs without adapters too
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

POLICY, REFERENCE = "default", "reference"
"""Names of a layer's adapters."""


PREFIX = "base_model.model."
"""What peft writes before the name of each matrix."""


Adapters: TypeAlias = "dict[str, LoraLayer]"
"""The adapted layers of a model by their names."""


def add_adapters(lm: PreTrainedModel, config: Config, device: torch.device) -> Adapters:
    """Adapt the target layers of a model in place and freeze all else; the same random A on every process.

    Args:
        device: of weights in 4 bits (lora.quantization), which it makes; the others stay where they are.

    Raises:
        ValueError: a name in lora.target_modules is that of no linear layer.
    """
    # peft imports bitsandbytes wherever it is installed, which on some CPUs warns that it has not downloaded kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if config.lora.quantization is not None:
        from grpo.policy.four_bit import put_into_four_bits  # an optional package

        put_into_four_bits(lm, _targets(lm, config), device)
    for name in (POLICY, REFERENCE):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the second adapter is meant
            torch.default_generator.manual_seed(config.run.seed)
            inject_adapter_in_model(peft_config(lm, config), lm, adapter_name=name)
    adapters = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
    for layer in adapters.values():
        layer.set_adapter(POLICY)  # which freezes the other
    stored = source_of(config.model).adapter
    if stored is not None:
        _go_on_with(stored, adapters, config)
    return adapters


def check_quantization(config: AnyConfig) -> None:
    """Raises ValueError if what `lora.quantization` needs is not installed."""
    if config.lora.quantization is None:
        return
    try:
        installed = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        installed = None
    if installed is None or Version(installed) < Version(BITSANDBYTES):
        found = "it is not installed" if installed is None else f"{installed} is installed"
        raise ValueError(
            f"lora.quantization is {config.lora.quantization}; it needs bitsandbytes {BITSANDBYTES} or newer, and {found}. Run "
            "`pip install 'bitsandbytes>=0.50'`, or remove it."
        )


BITSANDBYTES = "0.50"
"""Before it, `matmul_4bit` takes the weight transposed."""


@torch.no_grad()
def _go_on_with(directory: Path, adapters: Adapters, config: Config) -> None:
    """Give the policy's adapters and the reference's the values of one that peft stored.

    Raises:
        ValueError: it adapts other layers.
    """
    weights = load_file(directory / "adapter_model.safetensors")
    ours = {f"{PREFIX}{name}": (source, target) for name, source, target in adapter_pairs(adapters)}
    if ours.keys() != weights.keys():
        kinds = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights})
        raise ValueError(
            f"lora.target_modules is {config.lora.target_modules!r}; model.name {config.model.name!r} is an adapter of other "
            f"layers, which is trained further as it is. Set lora.target_modules=[{','.join(kinds)}]."
        )
    for name, pair in ours.items():
        for matrix in pair:
            matrix.copy_(weights[name])


def peft_config(lm: PreTrainedModel, config: Config) -> LoraConfig:
    """The adapters' configuration as peft spells and stores it."""
    source = source_of(config.model)
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type] # peft divides it by r, whatever its type
        target_modules=_targets(lm, config),
        lora_dropout=0.0,
        base_model_name_or_path=source.base,
        revision=source.revision,
        task_type="CAUSAL_LM",
    )


def _targets(lm: PreTrainedModel, config: Config) -> list[str]:
    """Last parts of the names of all linear layers but the output layer; or those that were asked for."""
    head = lm.get_output_embeddings()
    linear = {
        name.removesuffix(".base_layer")
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if config.lora.target_modules == "all-linear":
        return kinds
    for asked in config.lora.target_modules:
        if not any(f".{name}".endswith(f".{asked}") for name in linear):
            raise ValueError(
                f"lora.target_modules holds {asked!r}; no linear layer below the output layer of model.name "
                f"{config.model.name!r} has this name. Known: {', '.join(kinds)}."
            )
    return config.lora.target_modules


def _matrices(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank)."""
    return cast("nn.Linear", layer.lora_A[adapter]).weight, cast("nn.Linear", layer.lora_B[adapter]).weight


def adapter_pairs(adapters: Adapters) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name of each matrix, the policy's, and the reference's."""
    for name, layer in adapters.items():
        for kind, source, target in zip("AB", _matrices(layer, POLICY), _matrices(layer, REFERENCE), strict=True):
            yield f"{name}.lora_{kind}.weight", source, target


@contextmanager
def reference_active(adapters: Adapters) -> Iterator[None]:
    """Within it, the layers run with the reference's adapters."""
    _activate(adapters, REFERENCE)
    try:
        yield
    finally:
        _activate(adapters, POLICY)


def _activate(adapters: Adapters, name: str) -> None:
    """As peft's `set_adapter` does, which takes 20 ms for 28 layers and switches gradients off and on, under DeepSpeed's eyes."""
    for layer in adapters.values():
        layer._active_adapter = name


def share_unadapted(plain: nn.Module, lm: nn.Module) -> None:
    """Let a model without adapters read embeddings, norms and whatever else has no adapter from the adapted one's memory."""
    own = dict(lm.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in own:  # an adapted layer's own weight and bias have other names, below `base_layer`
            parameter.data = own[name].data


def dense_weight(layer: nn.Module) -> Tensor:
    """(out, in); of a layer in 4 bits, what they stand for."""
    made = getattr(layer, "dense_weight", None)
    return cast("nn.Linear", layer).weight if made is None else made()


@torch.no_grad()
def merge_into(plain: nn.Module, adapters: Adapters) -> None:
    """Write W + s B A of every adapted layer into a model without adapters. Every process calls it."""
    for name, layer in adapters.items():
        base, (a, b) = layer.get_base_layer(), _matrices(layer, POLICY)
        with whole(*base.parameters(), a, b):
            merged = dense_weight(base).float() + layer.scaling[POLICY] * (b.float() @ a.float())
            cast("nn.Linear", plain.get_submodule(name)).weight.copy_(merged)


def adapter_weights(adapters: Adapters, *, is_main: bool) -> dict[str, Tensor]:
    """The policy's adapters under peft's names, on the main process. Every process calls it."""
    weights: dict[str, Tensor] = {}
    for name, source, _ in adapter_pairs(adapters):
        with whole(source):
            if is_main:
                weights[f"{PREFIX}{name}"] = source.detach().cpu().clone()
    return weights


def save_adapter(
    weights: dict[str, Tensor], directory: Path, *, config: LoraConfig, quantization: str | None = None
) -> None:
    """Write `adapter_weights` in peft's format, for `PeftModel.from_pretrained`; and how the weights beneath are quantised."""
    config.save_pretrained(str(directory))
    if quantization is not None:
        (directory / QUANTIZATION).write_text(json.dumps({"base": quantization}))
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
