"""A causal language model of transformers, made ready to train: packed, its output head in chunks, its kernels fused."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.config import ModelConfig
from grpo.policy.attention import packed_inputs
from grpo.policy.families import (
    attribute,
    logit_transform,
    switch_off_dropout,
    unsharded,
)
from grpo.policy.logprobs import float32_linear, token_logprobs
from grpo.policy.model_source import check_weights, from_source, model_config
from grpo.policy.sequence_parallel import Share
from grpo.policy.tokenizer import load_tokenizer, vocabulary_size
from grpo.system import progress
from grpo.system.distributed import SequenceGroup, whole
from grpo.types import MicroBatch


def resolve_dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


@contextmanager
def in_float32(lm: nn.Module) -> Iterator[None]:
    """Within it, a model computes in float32: each module on a copy of its own weights, made for the call alone.

    The weights stay where they are: what was captured in a CUDA graph, or lies in an optimizer's flat tensor, remains valid.
    """
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = narrow.pop(parameter)

    hooks = [
        hook
        for module in lm.modules()
        for hook in (
            module.register_forward_pre_hook(widen),
            module.register_forward_hook(restore, always_call=True, prepend=True),  # before ZeRO-3 lets go of them
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class PackedLM(nn.Module):
    """A causal language model that reads packed sequences and answers with the log-probabilities of given tokens."""

    def __init__(self, lm: PreTrainedModel, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.sequence_group: SequenceGroup | None = None  # of processes that run each pass together
        self.logprobs_of = LogprobHead(lm, chunk_tokens=chunk_tokens)

    def forward(self, micro: MicroBatch | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability and entropy (nats) of each completion token at the sampling temperature, and whether it is the
        likeliest; each (T,).

        Of token ids (N,), one sequence that is not packed and goes through the attention that the model is set to: the same of
        each token but the first; (N - 1,).
        """
        return self._unpacked(micro) if isinstance(micro, Tensor) else self._packed(micro)

    def _unpacked(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.lm.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        return self.logprobs_of(hidden[:-1], tokens[1:], self.temperature)

    def _packed(self, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        if self.sequence_group is not None:
            return self._together(micro, Share(self.sequence_group, len(micro.tokens)))
        hidden = self.lm.base_model(**packed_inputs(micro)).last_hidden_state.squeeze(0)
        return self.logprobs_of(hidden[micro.source_index], micro.targets, self.temperature)

    def _together(self, micro: MicroBatch, share: Share) -> tuple[Tensor, Tensor, Tensor]:
        """The same, of which this process computes what follows from its places."""
        hidden = self.lm.base_model(**packed_inputs(share.inputs(micro))).last_hidden_state.squeeze(0)
        own = share.targets(micro)
        # without a token of its own a process takes part for one that it leaves out again: ZeRO-3 counts on the output layer
        source = micro.source_index[own] - share.start if len(own) else own.new_zeros(1)
        targets = micro.targets[own] if len(own) else own.new_zeros(1)
        parts = (part[: len(own)] for part in self.logprobs_of(hidden[source], targets, self.temperature))
        logprobs, entropy, likeliest = share.whole(own, *parts, num_tokens=len(micro.targets))
        return logprobs, entropy, likeliest.bool()


class LogprobHead(nn.Module):
    """A model's output layer with the log-softmax behind it, over as many chunks of tokens as there are.

    It shares the output layer's parameters and never calls that module. ZeRO-3 gathers weights whenever a module is called, so
    the number of gathers of a pass would follow from the number of its chunks: processes with different numbers of completion
    tokens would wait for each other for ever. This module is called once in every pass.
    """

    def __init__(self, lm: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        layer = lm.get_output_embeddings()
        self.weight, self.chunk_tokens = layer.weight, chunk_tokens
        self.register_parameter("bias", layer.bias)
        self._logits = output_head(lm, self)

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """See token_logprobs."""
        return token_logprobs(hidden, targets, self._logits, temperature=temperature, chunk_tokens=self.chunk_tokens)

    def _save_to_state_dict(self, *_: Any) -> None:
        """The parameters are saved as the model's."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """The parameters are loaded as the model's."""


def output_head(lm: PreTrainedModel, owner: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
    """(N, H) -> (N, V) logits, as the model's own forward computes them from its last hidden state, or in float32.

    Args:
        owner: a module with the output layer's weight and bias, which is not to be called itself.
    """
    layer, transform = lm.get_output_embeddings(), logit_transform(lm)
    if getattr(lm, "float32_head", False):
        parameters: Any = owner or layer
        return lambda hidden: transform(float32_linear(hidden, parameters.weight, parameters.bias))
    head: Callable[[Tensor], Tensor] = layer if owner is None else partial(type(layer).forward, owner)
    return lambda hidden: transform(head(hidden))


def load_lm(config: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model without dropout: with it, the ratio of an unchanged policy would not be 1.

    Raises:
        ValueError: the files of the weights are not whole.
    """
    settings = model_config(config)
    check_weights(config)
    dropouts = switch_off_dropout(settings)
    with progress.busy("loading the model"):
        lm: PreTrainedModel = from_source(AutoModelForCausalLM, config, config=settings, dtype=dtype)
    lm.stored_dropouts = dropouts  # type: ignore[assignment] # for `_shell`
    logit_transform(lm)  # measured now, while its layers are its own
    lm.float32_head = config.float32_head  # type: ignore[assignment] # for `output_head`
    if config.float32_head and type(lm.get_output_embeddings()) is not nn.Linear:
        raise ValueError(
            f"model.float32_head is true; the output layer of {type(lm).__name__} is a "
            f"{type(lm.get_output_embeddings()).__name__}, and only that of a Linear is known. Remove it."
        )
    if config.resize_embeddings:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same new rows in every process, and in the reference
            lm.resize_token_embeddings(vocabulary_size(load_tokenizer(config)))
    return lm


def decoder_layers(lm: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(lm: PreTrainedModel, share: float) -> None:
    """Compute the activations of this share of the layers, evenly spread, again in the backward pass instead of keeping them."""
    if share > 0:
        # there is no dropout, so no random state to save
        lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for number, layer in enumerate(decoder_layers(lm)):
            layer.gradient_checkpointing = math.floor((number + 1) * share) > math.floor(number * share)


def gather_by_layer(lm: PreTrainedModel) -> None:
    """Let ZeRO-3 gather the weights of a decoder layer at once: module by module, its hooks keep the host busier than the GPU.

    Not with adapters: nothing before the first layer is trained then, its input has no gradient, and DeepSpeed would take
    that for the end of the layer's backward pass and let go of its weights.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in decoder_layers(lm):
        set_z3_leaf_module(layer, True)
    _let_go_by_the_pass_at_hand()


@cache
def _let_go_by_the_pass_at_hand() -> None:
    """Let ZeRO-3 forget which weights a module lets go of when it sees that passes are others than it has recorded.

    DeepSpeed 0.19 remembers that for good (`functools.lru_cache`). After a first pass without a backward one, in which each layer
    is let go of at once, it would let go of it in the forward pass of every update, too, and gather it again in the backward
    pass, at the moment it is needed and not before: its list of what to gather next has it as gathered.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    decision = getattr(Coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    within = [
        cell.cell_contents for cell in getattr(decision, "__closure__", None) or ()
    ]  # DeepSpeed wraps it for its profiler
    forget = [each.cache_clear for each in (decision, *within) if hasattr(each, "cache_clear")]
    invalidate = getattr(Coordinator, "_invalidate_trace", None)
    if invalidate is None or not forget:
        return  # another DeepSpeed, without such a memory

    @wraps(invalidate)
    def forgetting(coordinator: Any) -> None:
        for each in forget:
            each()
        invalidate(coordinator)

    Coordinator._invalidate_trace = forgetting


def fuse_kernels(lm: PreTrainedModel) -> bool:
    """Let norms, rotary embeddings and gated activations be single kernels; whether Liger knows the family.

    Liger would do so for every model of the family that this process makes later, wherever it runs. Here only this model's
    modules change; the rotary embedding is a function of the family, and becomes Liger's for tensors on a GPU.
    """
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    config = lm.config.get_text_config()
    activation = attribute(config, "hidden_activation") or attribute(config, "hidden_act")
    family = vars(sys.modules[type(lm).__module__])
    before = dict(family)
    _apply_liger_kernel_to_instance(
        lm,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        swiglu=activation in ("silu", "swish") and not has_experts(config),  # it does not look which one the model has
        geglu=activation == "gelu_pytorch_tanh",
    )
    fused = family.get(ROTARY)
    family.update(before)
    if fused is not None and fused is not before[ROTARY]:
        family[ROTARY] = _by_device(fused, inspect.unwrap(before[ROTARY]))  # an earlier call may have wrapped it
    return lm.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def has_experts(config: PretrainedConfig) -> bool:
    """Whether tokens are routed to experts. Liger's kernel of them asks the GPU how many tokens each has, so that no step of
    sampling can be captured with it; torch's grouped product does not."""
    return any(attribute(config, name) for name in EXPERTS)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What families call the number of experts in a layer."""


ROTARY = "apply_rotary_pos_emb"


def pair_cost(lm: PreTrainedModel) -> float:
    """What a token and one that it sees take in attention, in the time that a token takes in all layers otherwise, by operations.

    A pair takes 4 for each number of the heads of a layer, forward, and a token 2 for each weight of the linear layers that it
    goes through; backward takes twice as much of both. The output head, which reads completions alone, and sliding windows are
    not counted. 0 where the configuration does not say how wide attention is.
    """
    config = lm.config.get_text_config()
    heads, layers = attribute(config, "num_attention_heads"), attribute(config, "num_hidden_layers")
    width = attribute(config, "head_dim") or (heads and config.hidden_size // heads)
    head = lm.get_output_embeddings()
    linear = sum(m.in_features * m.out_features for m in lm.modules() if isinstance(m, nn.Linear) and m is not head)
    shapes = [getattr(weight, "ds_shape", weight.shape) for weight in lm.parameters()]
    experts = sum(math.prod(shape) for shape in shapes if len(shape) == 3)  # of which a token goes through a few
    if experts:
        most = next(number for name in EXPERTS if (number := attribute(config, name)))
        experts *= (attribute(config, "num_experts_per_tok") or most) / most
    return 2 * layers * heads * width / (linear + experts) if layers and heads and linear + experts else 0.0


def _by_device(on_gpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(elsewhere)
    def choose(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (on_gpu if q.is_cuda else elsewhere)(q, *args, **kwargs)

    return choose


JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that read the same input, so that sampling can run them as one if their weights follow each other in memory."""


def joined_weights(lm: nn.Module) -> list[list[nn.Parameter]]:
    """The weights, and the biases, of each such set of layers."""
    found = []
    for module in lm.modules():
        for names in JOINED:
            parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.Linear)]
            if len(parts) == len(names) and len({part.in_features for part in parts}) == 1:
                for kind in ("weight", "bias"):
                    tensors = [getattr(part, kind) for part in parts]
                    found += [tensors] if all(tensor is not None for tensor in tensors) else []
    return found


def lay_out(lm: PreTrainedModel, device: torch.device) -> None:
    """Move a model to the device, with joined weights end to end in memory."""
    nn.Module.to(lm, device)
    for parts in joined_weights(lm):
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view


def copy_buffers(source: nn.Module, target: nn.Module, device: torch.device) -> None:
    """Give `target` the buffers of `source`, to the bit, under the same names, on the device.

    Under ZeRO-3, transformers 5.17 computes what is not in a checkpoint in the model's precision. Rotary frequencies in bfloat16
    are off by up to 0.4 %, a radian after 250 positions: the model trained would not be the one that is sampled from.
    """
    for path, buffer in source.named_buffers():
        module, _, name = path.rpartition(".")
        target.get_submodule(module)._buffers[name] = buffer.to(device, copy=True)


def with_computed_buffers(config: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel | None:
    """A model without weights that has the buffers which one has that is loaded whole, for copy_buffers; None: its files hold
    some."""
    settings, code = model_config(config), config.trust_remote_code

    def make(dtype: torch.dtype) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False), unsharded():
            return AutoModelForCausalLM.from_config(copy.deepcopy(settings), dtype=dtype, trust_remote_code=code)

    # who loads a model keeps its buffers in the precision that it chooses, and computes them in float32
    shell, exact = make(dtype), make(torch.float32)
    for buffer, computed in zip(shell.buffers(), exact.buffers(), strict=True):
        buffer.copy_(computed)
    return None if {name for name, _ in shell.named_buffers()} & set(shell.state_dict()) else shell


@contextmanager
def gathered_by_layer(lm: PreTrainedModel) -> Iterator[None]:
    """Within it, a sharded model that no DeepSpeed engine runs yet has the weights of a layer whole while that runs. Every
    process enters it, and runs the model equally often."""
    layers = decoder_layers(lm)
    within = {module for layer in layers for module in layer.modules()}
    outside = [module for module in lm.modules() if module not in within and module._parameters]
    held: dict[nn.Module, AbstractContextManager[None]] = {}

    def gather(module: nn.Module, *_: Any) -> None:
        held[module] = whole(*module.parameters(recurse=module in within))
        held[module].__enter__()

    def let_go(module: nn.Module, *_: Any) -> None:
        held.pop(module).__exit__(None, None, None)

    hooks = [
        hook
        for module in (*layers, *outside)
        for hook in (
            module.register_forward_pre_hook(gather),
            module.register_forward_hook(let_go, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trained_parameters(lm: nn.Module) -> list[nn.Parameter]:
    """Parameters to train, joined ones one after the other: ZeRO 1 and 2 lay all of them out anew in this order."""
    followers = {id(parts[0]): parts[1:] for parts in joined_weights(lm)}
    ordered: dict[int, nn.Parameter] = {}
    for parameter in lm.parameters():
        for each in (parameter, *followers.get(id(parameter), ())):
            ordered.setdefault(id(each), each)
    return [parameter for parameter in ordered.values() if parameter.requires_grad]
