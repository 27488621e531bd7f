"""What a model's family does, found by running its own code: nothing here is a list of families.

- `check_family` refuses, before weights are loaded, what packed sequences do not fit. It builds the model without weights and
  looks at what each layer asks of its attention.
- `logit_transform` measures what the model does to the numbers of its output layer: Gemma caps them, Granite divides them,
  Cohere multiplies them.
- `LeakTest` puts NaN beside a sequence. Its log-probabilities stay numbers only if nothing of its neighbours reaches it, in
  whatever precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from grpo.config import ModelConfig
from grpo.policy.attention import unknown_arguments
from grpo.policy.model_source import check_not_quantised, model_config
from grpo.types import MicroBatch

# --- configurations -------------------------------------------------------------------------------------------------------


def attribute(config: PretrainedConfig, name: str) -> Any:
    """The value that all layers share; None if there is none, or each layer has its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError, which 5.17 does not have
        return None


Dropouts = list[tuple[str, float]]
"""Names and values of the dropouts of a configuration and of its part for text, in that order."""


def switch_off_dropout(settings: PretrainedConfig) -> list[Dropouts]:
    """Set every dropout to 0, for which `restore_dropout` wants what this returns."""
    before = []
    for part in _parts(settings):
        found = [(name, value) for name, value in vars(part).items() if "drop" in name and isinstance(value, float)]
        for name, _ in found:
            setattr(part, name, 0.0)
        before.append(found)
    return before


def restore_dropout(settings: PretrainedConfig, before: list[Dropouts]) -> None:
    for part, dropouts in zip(_parts(settings), before, strict=True):
        for name, value in dropouts:
            setattr(part, name, value)


def _parts(settings: PretrainedConfig) -> list[PretrainedConfig]:
    text = settings.get_text_config()
    return [settings] if text is settings else [settings, text]


# --- before weights are loaded --------------------------------------------------------------------------------------------


def check_family(config: ModelConfig) -> None:
    """Raises ValueError if this model cannot be trained on packed sequences, as far as that shows without its weights."""
    settings = model_config(config)
    check_not_quantised(config, settings)
    reason = unfit(settings, trust_remote_code=config.trust_remote_code)
    if reason is not None:
        raise ValueError(refusal(config.name, reason))


def refusal(name: str, reason: str) -> str:
    return (
        f"model.name is {name!r}; {reason}. Packing does not work for this model family; use another "
        "(docs/families.md has a table)."
    )


def unfit(settings: PretrainedConfig, *, trust_remote_code: bool = False) -> str | None:
    """Why packed sequences do not fit a model of this configuration; None: nothing is known against it."""
    cap = attribute(settings.get_text_config(), "attn_logit_softcapping")
    if cap:
        return f"it caps its attention logits at {cap} (attn_logit_softcapping), which the fast attention kernels leave out"
    has_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    if settings.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_code:
        return f"transformers has no causal language model of the type {settings.model_type}"
    key = (type(settings), str(settings.to_dict() | {"_name_or_path": ""}))
    if has_code or key not in _FOUND:
        lm, reason = without_weights(settings, trust_remote_code=trust_remote_code)
        _FOUND[key] = reason if lm is None else unfit_layers(lm)
    return _FOUND[key]


_FOUND: dict[tuple[type[PretrainedConfig], str], str | None] = {}
"""What `unfit` found of the layers, by the configuration: a process that trains several times need not run them each time."""


def without_weights(settings: PretrainedConfig, *, trust_remote_code: bool) -> tuple[PreTrainedModel | None, str]:
    """A model of this configuration on the meta device; None, and why it cannot be made."""
    settings = copy.deepcopy(settings)
    try:
        with torch.device("meta"), unsharded():
            # in bfloat16, without which torch's grouped product of experts does not run
            options = {"trust_remote_code": trust_remote_code, "dtype": torch.bfloat16}
            return AutoModelForCausalLM.from_config(settings, **options), ""
    except Exception as error:  # of any family's code
        return None, f"its model cannot be made: {_first_line(error)}"


@contextmanager
def unsharded() -> Iterator[None]:
    """A model made within it is whole, though DeepSpeed may be set up to shard what this process loads."""
    shards = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = shards


def unfit_layers(lm: PreTrainedModel) -> str | None:
    """Why packed sequences do not fit these layers, by the calls of their attention; no weight is read."""
    name = type(lm).__name__
    head = lm.get_output_embeddings()
    if head is None or lm.base_model is lm:
        return f"{name} has no output layer of its own behind its layers"
    calls, is_complete = attention_calls(lm)
    if any(not call.has_packing for call in calls):
        return f"{name}'s attention is not told where packed sequences begin and end"
    extra = next((call.extra for call in calls if call.extra), None)
    if extra:
        return f"{name}'s attention has {extra}, which the attention over packed sequences leaves out"
    num_layers = attribute(lm.config.get_text_config(), "num_hidden_layers") or 0
    others = num_layers - len({call.layer for call in calls})
    if others > 0 and (is_complete or not (calls or lm._supports_attention_backend)):
        return (
            f"{others} of {name}'s {num_layers} layers mix positions by other means than transformers' attention interface (a "
            "convolution, a recurrence, or attention of their own)"
        )
    try:
        logit_transform(lm)
    except ValueError as error:
        return str(error)
    return None


# --- what layers ask of their attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCall:
    """What one layer handed to its attention."""

    layer: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    has_packing: bool
    extra: str  # the name of something that changes its result, and that ours does not know


_calls: list[AttentionCall] = []


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **others: Any
) -> tuple[Tensor, None]:
    _calls.append(
        AttentionCall(
            layer=getattr(module, "layer_idx", len(_calls)),
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            has_packing=others.get("packing") is _calls,
            extra=unknown_arguments(module, others),
        )
    )
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register("recorded", _record)
# without a mask registered under that name, transformers makes none, which would want values


@torch.no_grad()
def attention_calls(lm: PreTrainedModel) -> tuple[list[AttentionCall], bool]:
    """What each layer hands to its attention in a pass over a few tokens, and whether the pass came to its end.

    On a model without weights it may not: experts are chosen by values, of which there are none.
    """
    own, training = lm.config._attn_implementation, lm.training
    device = next(lm.parameters()).device
    _calls.clear()
    try:
        lm.set_attn_implementation("recorded")
        with device:
            lm.eval().base_model(
                input_ids=torch.zeros(1, 4, dtype=torch.long),
                attention_mask=None,
                use_cache=False,
                packing=_calls,
            )
        is_complete = True
    except Exception:  # of any family's code; what it does with weights is found out once they are loaded
        is_complete = False
    finally:
        lm.set_attn_implementation(own)
        lm.train(training)
    return list(_calls), is_complete


# --- what becomes of the output layer's numbers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitTransform:
    """logits = cap tanh(scale x / cap) of the output layer's x; without a cap scale x."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.cap is not None:
            return self.cap * torch.tanh(x * (self.scale / self.cap))
        return x if self.scale == 1 else x * self.scale


_TRANSFORMS: WeakKeyDictionary[PreTrainedModel, LogitTransform] = WeakKeyDictionary()


def logit_transform(lm: PreTrainedModel) -> LogitTransform:
    """What the model's own forward pass does to the numbers of its output layer; measured once.

    Raises:
        ValueError: it is neither a factor nor a cap.
    """
    if lm not in _TRANSFORMS:
        _TRANSFORMS[lm] = _measured_transform(lm)
    return _TRANSFORMS[lm]


def _measured_transform(lm: PreTrainedModel) -> LogitTransform:
    """The model's forward pass around a stand-in for its layers, which gives known numbers, and one for its output layer, which
    hands them on. So no weight is read, and it does not matter by which name a family calls its factor: `logits_scaling` divides
    in Granite and multiplies in HyperCLOVA X."""
    name = type(lm).__name__
    given = torch.tensor([2.0**-16, -(2.0**-16), 0.125, -1.0, 3.0, 11.0, -90.0, 2.0**40])
    try:
        found = _forward_around(lm, given)
    except Exception as error:  # of any family's code
        raise ValueError(
            f"{name}'s logits are not a function of its output layer alone ({_first_line(error)})"
        ) from None
    scale, most = float(found[0]) * 2.0**16, float(found[-1])
    measured = LogitTransform(scale, None if most == scale * 2.0**40 else most)
    if not torch.allclose(measured(given), found, rtol=1e-5, atol=0):
        raise ValueError(f"{name} does more to the numbers of its output layer than multiply and cap them")
    return measured


class _StandIn(nn.Module):
    """Answers every call, and every call of a module below it, with the same; its other attributes are those of `original`."""

    def __init__(self, original: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(original=original, answer=answer)  # not as a module of this one

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["original"], name)
        if isinstance(value, nn.Module):
            return self
        return (
            torch.zeros(()) if isinstance(value, Tensor) else value
        )  # asked for its precision, which is to be the exact one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"](*args)


@dataclass
class _Hidden(ModelOutput):
    """An output of layers that holds hidden states, and None under every other name."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def _forward_around(lm: PreTrainedModel, values: Tensor) -> Tensor:
    head = lm.get_output_embeddings()
    where = next(name for name, module in lm.named_modules() if module is head)
    hidden = _Hidden(last_hidden_state=values.view(1, 1, -1))
    shell = _with(lm, lm.base_model_prefix, _StandIn(lm.base_model, lambda *_: hidden))
    shell = _with(shell, where, _StandIn(head, lambda x, *_: x.clone()))
    output = type(lm).forward(shell, input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return output.logits.view(-1)[: len(values)].float()


def _with(module: Any, path: str, replacement: nn.Module) -> Any:
    """The module with another one at a path below it; both share all else, and the module itself stays as it is."""
    name, _, rest = path.partition(".")
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    shell._modules[name] = _with(module._modules[name], rest, replacement) if rest else replacement
    return shell


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


# --- whether neighbours reach a sequence ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeakTest:
    """Whether a sequence of a pack feels its neighbours.

    Two passes: one in which everything but the first sequence is NaN behind the embedding, with the neighbours' tokens reversed,
    and one in which everything but the last is. Attention that looks across a border, a convolution, a recurrence or a mean over
    the pack then gives NaN, however little of it arrives; a difference of two passes would have to be told from rounding.
    """

    lm: PreTrainedModel
    logprobs: Callable[[MicroBatch], Tensor]

    def worst(self, micro: MicroBatch) -> float:
        """Most nats by which the first or the last sequence's log-probabilities move; infinite if NaN reaches them."""
        calm, moved = self.logprobs(micro), 0.0
        parts = micro.completion_lens.tolist()
        for sequence in (0, len(parts) - 1):
            kept = self._places(micro, sequence)
            with self._broken_but_at(kept):
                loud = self.logprobs(_other_tokens(micro, ~kept))
            gap = (loud - calm).split(parts)[sequence].abs().max()
            moved = max(moved, float(gap) if gap.isfinite() else float("inf"))
        return moved

    def _places(self, micro: MicroBatch, sequence: int) -> Tensor:
        """(S,) which places of the pass a sequence's prompt and completion have."""
        packing, num_sequences = micro.packing, len(micro.completion_lens)
        keys = packing.key_index.split(packing.cu_keys.diff().tolist())
        kept = torch.zeros(len(micro.tokens), dtype=torch.bool, device=micro.tokens.device)
        kept[keys[len(keys) - num_sequences + sequence]] = True
        return kept

    @contextmanager
    def _broken_but_at(self, kept: Tensor) -> Iterator[None]:
        def break_up(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.masked_fill(~kept.view(1, -1, 1), float("nan"))

        handle = self.lm.get_input_embeddings().register_forward_hook(break_up)
        try:
            yield
        finally:
            handle.remove()


def _other_tokens(micro: MicroBatch, where: Tensor) -> MicroBatch:
    tokens = micro.tokens.clone()
    tokens[where] = tokens[where].flip(0)
    return replace(micro, tokens=tokens)
