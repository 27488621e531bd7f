"""The policy being trained, the frozen reference, and the tokenizer that goes with them."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.algorithm.batch import micro_batch
from grpo.config import Config, ModelConfig, OptimizerConfig
from grpo.policy import lora
from grpo.policy.attention import packed_inputs
from grpo.policy.families import (
    LeakTest,
    attribute,
    logit_transform,
    refusal,
    restore_dropout,
    switch_off_dropout,
)
from grpo.policy.logprobs import token_logprobs
from grpo.policy.model_source import from_source, model_config, not_loaded, processor_files, source_of
from grpo.system import distributed, progress
from grpo.system.distributed import Processes, TrainingProcesses, deterministic, whole
from grpo.system.terminal import say
from grpo.system.writer import Write, load_tensors, save_tensors, write_now
from grpo.types import Batch, MicroBatch

END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<end_of_turn>", "</s>")
"""Special tokens by which model families end a text or a turn; whichever a tokenizer has ends a completion."""


PLAIN_SENTENCES = (
    "The sum of two and three is five, because three more than two makes five.",
    "A train leaves the station at noon and arrives in the next town one hour later.",
)
FORWARD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Mean gap in nats between two ways to compute the log-probabilities of these that rounding can explain. Ordinary text in
bfloat16 differs by some hundredths; a family whose sequences leak into each other differs by one and more."""


def resolve_dtype(name: str) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Raises ValueError if neither a directory nor the hub has it."""
    try:
        with progress.busy("loading the tokenizer"):
            tokenizer = from_source(AutoTokenizer, config)
    except (OSError, ValueError) as error:
        raise ValueError(not_loaded(config, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_context(config: Config) -> None:
    """Raises ValueError if a sequence may grow longer than the positions the model knows."""
    model = model_config(config.model).get_text_config()
    limit = attribute(model, "max_position_embeddings")
    changing = sorted(rope_types(model) & set(CHANGING_ROPE))
    original = attribute(model, "original_max_position_embeddings") or (
        (model.rope_parameters or {}).get("original_max_position_embeddings", limit) if changing else limit
    )
    if changing and original is not None and config.max_sequence_tokens > original:
        raise ValueError(
            f"model.name is {config.model.name!r}; its rotary embedding ({changing[0]}) changes for all packed sequences once "
            f"one of them is longer than {original} tokens, and a sequence may have {config.max_sequence_tokens} "
            "(data.max_prompt_tokens + rollout.max_completion_tokens). Lower one of the two, or use another model."
        )
    if limit is not None and config.max_sequence_tokens > limit:
        raise ValueError(
            f"rollout.max_completion_tokens is {config.rollout.max_completion_tokens}; with data.max_prompt_tokens "
            f"({config.data.max_prompt_tokens}) a sequence may have {config.max_sequence_tokens} tokens, and model.name "
            f"{config.model.name!r} knows {limit} positions. Lower one of the two."
        )


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[int]]) -> None:
    """Raises ValueError if a prompt has tokens for which the model has no embedding; a GPU would fail without saying why."""
    rows = attribute(model_config(config).get_text_config(), "vocab_size")
    if rows is None:
        return
    if config.resize_embeddings and vocabulary_size(tokenizer) <= rows:
        raise ValueError(
            f"model.resize_embeddings is true; the {vocabulary_size(tokenizer)} tokens of the tokenizer of {config.name!r} have "
            f"room in its embedding matrix of {rows} rows, so it has no effect. Remove it."
        )
    largest = max((max(ids, default=0) for ids in prompts), default=0)
    if largest >= rows and not config.resize_embeddings:
        raise ValueError(
            f"model.name is {config.name!r}; a prompt has its tokenizer's token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), and its embedding matrix has {rows} rows. Use the tokenizer that "
            "the model was trained with, or set model.resize_embeddings to true to add untrained rows."
        )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id, and one."""
    return max(tokenizer.get_vocab().values()) + 1


CHANGING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies transformers picks by the longest sequence of a forward pass, for all of it."""


def rope_types(model: PretrainedConfig) -> set[str]:
    """The kinds of rotary embedding of a model's layers."""
    parameters = attribute(model, "rope_parameters") or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {kind["rope_type"] for kind in kinds if "rope_type" in kind}


def end_token_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion, sorted.

    Base models disagree with themselves: the tokenizer, the model's config and its generation config may each name another
    one. A completion that ends with any of them has ended; honouring only one makes most completions run to the limit.
    """
    model = model_config(config)
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, model.get_text_config().eos_token_id, _generation_eos(config)):
        ids.update([value] if isinstance(value, int) else value or [])
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    ids.update(vocabulary[token] for token in END_TOKENS if token in vocabulary and token in special)
    if not ids:
        raise ValueError(
            f"model.name is {config.name!r}; its tokenizer, config and generation config name no end-of-sequence token, "
            "so no completion could ever end. Set eos_token_id in its generation_config.json."
        )
    return sorted(ids)


def _generation_eos(config: ModelConfig) -> int | list[int] | None:
    source = source_of(config)
    try:
        return GenerationConfig.from_pretrained(source.base, revision=source.revision).eos_token_id
    except OSError:
        return None  # a model need not have a generation_config.json


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
            module.register_forward_hook(restore, always_call=True),
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
        self.logprobs_of = LogprobHead(lm, chunk_tokens=chunk_tokens)

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of each completion token at the sampling temperature; (T,) and (T,)."""
        hidden = self.lm.base_model(**packed_inputs(micro)).last_hidden_state.squeeze(0)
        return self.logprobs_of(hidden[micro.source_index], micro.targets, self.temperature)


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
        self._logits = output_head(lm, lambda hidden: type(layer).forward(self, hidden))

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See token_logprobs."""
        return token_logprobs(hidden, targets, self._logits, temperature=temperature, chunk_tokens=self.chunk_tokens)

    def _save_to_state_dict(self, *_: Any) -> None:
        """The parameters are saved as the model's."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """The parameters are loaded as the model's."""


def output_head(lm: PreTrainedModel, layer: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """(N, H) -> (N, V) logits, as the model's own forward computes them from its last hidden state.

    Args:
        layer: what to compute the output layer with instead of its module.
    """
    head, transform = layer or lm.get_output_embeddings(), logit_transform(lm)
    return lambda hidden: transform(head(hidden))


def load_lm(config: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model without dropout: with it, the ratio of an unchanged policy would not be 1."""
    settings = model_config(config)
    dropouts = switch_off_dropout(settings)
    with progress.busy("loading the model"):
        lm: PreTrainedModel = from_source(AutoModelForCausalLM, config, config=settings, dtype=dtype)
    lm.stored_dropouts = dropouts  # type: ignore[assignment] # for `_shell`
    logit_transform(lm)  # measured now, while its layers are its own
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
        swiglu=activation in ("silu", "swish"),  # it does not look which one the model has
        geglu=activation == "gelu_pytorch_tanh",
    )
    fused = family.get(ROTARY)
    family.update(before)
    if fused is not None and fused is not before[ROTARY]:
        family[ROTARY] = _by_device(fused, inspect.unwrap(before[ROTARY]))  # an earlier call may have wrapped it
    return lm.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


ROTARY = "apply_rotary_pos_emb"


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


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the buffers of `source`, to the bit, under the same names.

    Under ZeRO-3, transformers 5.17 computes what is not in a checkpoint in the model's precision. Rotary frequencies in bfloat16
    are off by up to 0.4 %, a radian after 250 positions: the model trained would not be the one that is sampled from.
    """
    for path, buffer in source.named_buffers():
        module, _, name = path.rpartition(".")
        target.get_submodule(module)._buffers[name] = buffer.clone()


def trained_parameters(lm: nn.Module) -> list[nn.Parameter]:
    """Parameters to train, joined ones one after the other: ZeRO 1 and 2 lay all of them out anew in this order."""
    followers = {id(parts[0]): parts[1:] for parts in joined_weights(lm)}
    ordered: dict[int, nn.Parameter] = {}
    for parameter in lm.parameters():
        for each in (parameter, *followers.get(id(parameter), ())):
            ordered.setdefault(id(each), each)
    return [parameter for parameter in ordered.values() if parameter.requires_grad]


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
        with _eval_mode(lm):
            try:
                yield lm
            finally:
                lm.set_attn_implementation(own)

    @torch.no_grad()
    def plain_logprobs(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Two plain sentences and the model's own log-probabilities of them; (2, N) and (2, N - 1).

        Args:
            length: N, the sentences said again and again if it takes that; None: the shorter one's.
        """
        both = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PLAIN_SENTENCES]
        length = length or min(map(len, both))
        tokens = torch.tensor([(ids * length)[:length] for ids in both], device=self.processes.device)
        with self.sampling_model() as lm:
            logits = lm(input_ids=tokens, use_cache=False).logits[:, :-1].float() / self.temperature
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


class Policy(SampledModel):
    """The trained model behind DeepSpeed, its reference, and a model with whole weights to sample from.

    Args:
        processes: where to put it; every process must construct it, since loading is a collective under ZeRO-3.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, processes: TrainingProcesses) -> None:
        lm = load_lm(config.model, dtype=resolve_dtype(config.model.dtype))
        super().__init__(lm, config.model, tokenizer, processes)
        self._sharded = config.distributed.zero_stage == 3
        self._config = config
        self.temperature = config.rollout.temperature
        checkpoint_activations(self.lm, config.memory.activation_checkpointing)
        self.adapters = lora.add_adapters(self.lm, config) if config.lora.rank else {}
        self._replica: PreTrainedModel | None = None
        if not self._sharded:
            lay_out(self.lm, processes.device)
        own = None if self._sharded else self.plain_logprobs()  # before its kernels are others
        with progress.busy("setting up DeepSpeed"):  # which may compile
            self.engine, self.optimizer = processes.accelerator.prepare(
                self._packed(self.lm), _adamw(self.lm, config.optimizer, processes.device)
            )
        _count_from_zero(self.engine.basic_optimizer)
        self.lm.set_attn_implementation("packed")
        # a PackedLM, or DeepSpeed's engine around one
        self.reference = self._load_reference() if config.algorithm.kl_coef > 0 else None
        self.reference_moved = False  # it is no longer the starting model
        unset_hf_deepspeed_config()  # from here on, loading a model must not shard it
        self._replica = self._load_replica() if self._sharded or self.adapters else None
        if self._replica is not None:
            copy_buffers(self._replica, self.lm)
            if self.reference is not None:
                copy_buffers(self._replica, self.reference.lm)
        if self.adapters:
            self.sync()  # they may not start at nothing
        self._check_forward(*(own or self.plain_logprobs()))

    def _packed(self, lm: PreTrainedModel) -> PackedLM:
        fused = self.processes.device.type != "cuda" or fuse_kernels(lm)
        if not fused and self.processes.is_main:
            say(f"no fused kernels for {lm.config.model_type}: its update runs the layers of transformers")
        if self._sharded and not self.adapters:
            gather_by_layer(lm)
        return PackedLM(lm, temperature=self.temperature, chunk_tokens=self._config.memory.logprob_chunk_tokens)

    def _check_forward(self, tokens: Tensor, alone: Tensor) -> None:
        """Packed sequences must have the log-probabilities `alone` that the model itself gives to each of the `tokens`.

        They would not if the model does more to its hidden states than its output layer, or if its attention, its position
        embeddings or a convolution looks across the border of packed sequences; several families do. The first two of the three
        sequences here share a prompt.
        """
        both, length = tokens.cpu(), tokens.shape[1]
        prompt_len = length // 2
        kept = alone[[0, 0, 1], prompt_len - 1 :].flatten()
        batch = Batch(
            tokens=both[[0, 0, 1]].flatten(),
            cu_seqlens=torch.arange(0, 3 * length + 1, length),
            prompt_lens=torch.full((3,), prompt_len),
            prompt_index=torch.tensor([0, 0, 1]),
            advantages=torch.zeros(3),
            sampling_logprobs=kept.cpu(),
        )
        micro = micro_batch(batch, weights=torch.zeros(len(kept))).to(self.processes.device)
        reason = self._misfit(micro, kept)
        if reason is not None:
            raise ValueError(refusal(self._config.model.name, reason))

    def _misfit(self, micro: MicroBatch, alone: Tensor) -> str | None:
        """What is wrong with the log-probabilities of a pack, whose sequences have those of `alone` (T,) each for itself."""
        name, most = type(self.lm).__name__, FORWARD_TOLERANCE[self.dtype]
        try:
            gap = float((self.old_logprobs(micro) - alone).abs().mean())
            moved = LeakTest(self.lm, self.old_logprobs).worst(micro)
        except (TypeError, ValueError, AttributeError, IndexError) as error:  # of any family's code
            return f"{name} does not run over packed sequences ({str(error).splitlines()[0]})"
        if not moved < most:
            return f"packed sequences of {name} see their neighbours (a convolution, a recurrence, or attention of its own)"
        if not gap < most:
            return (
                f"the log-probabilities of packed sequences differ by {gap:.3g} nats on average from {name}'s own for each "
                "sequence alone"
            )
        return None

    @torch.no_grad()
    def unpacked_logprobs(self, batch: Batch, *, float32: bool = False) -> Tensor:
        """What `old_logprobs` says, from the model that is sampled from and its own forward pass of each sequence alone; (T,).

        Args:
            float32: compute with the same weights in float32.
        """
        found = []
        with self.sampling_model() as lm, in_float32(lm) if float32 else nullcontext():
            for ids, prompt_len in zip(
                batch.tokens.split(batch.sequence_lens.tolist()), batch.prompt_lens, strict=True
            ):
                there = ids.to(self.processes.device)
                hidden = lm.base_model(input_ids=there[None], use_cache=False).last_hidden_state[0]
                logprobs, _ = token_logprobs(
                    hidden[prompt_len - 1 : -1],
                    there[prompt_len:],
                    output_head(lm),
                    temperature=self.temperature,
                    chunk_tokens=self._config.memory.logprob_chunk_tokens,
                )
                found.append(logprobs)
        return torch.cat(found)

    def _load_reference(self) -> Any:
        """A frozen copy of the starting point, sharded like the policy under ZeRO-3; with adapters the policy's own model."""
        if self.adapters:
            return self.engine
        lm = load_lm(self._config.model, dtype=self.dtype)
        lm.requires_grad_(False)
        packed = self._packed(lm)
        if self._sharded:
            import deepspeed

            settings = distributed.deepspeed_config(self._config, dtype=self.dtype)
            with progress.busy("setting up DeepSpeed"):
                packed = deepspeed.initialize(model=packed, config=settings)[0]
        else:
            packed.to(self.processes.device)
        lm.set_attn_implementation("packed")
        packed.eval()
        return packed

    def _load_replica(self) -> PreTrainedModel:
        """Under ZeRO-3 a process holds a shard of each weight, and adapters lie beside the weights that they change; sampling
        reads this whole and merged copy, refreshed by `sync`."""
        replica = load_lm(self._config.model, dtype=self.dtype).requires_grad_(False).eval()
        lay_out(replica, self.processes.device)
        if not self._sharded:
            lora.share_unadapted(replica, self.lm)
        return replica

    def logprobs(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the completion tokens of a micro-batch on this device, with gradient; (T,)."""
        progress.tick()
        self.engine.train()
        return self.engine(micro)

    @torch.no_grad()
    def before_update(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """What `logprobs` says, without gradient."""
        progress.tick()
        return self.engine(micro)

    def old_logprobs(self, micro: MicroBatch) -> Tensor:
        """The policy's own log-probabilities of a micro-batch before it is updated; (T,)."""
        return self.before_update(micro)[0]

    def use_temperature(self, temperature: float) -> None:
        """All log-probabilities, of the reference too, are those of this sampling temperature from here on."""
        self.temperature = temperature
        for model in (self.engine, self.reference):
            if model is not None:
                getattr(model, "module", model).temperature = temperature  # DeepSpeed's engine holds one

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Within it, `old_logprobs` are those of another sampling temperature than the run's."""
        packed = self.engine.module
        packed.temperature = temperature
        try:
            yield
        finally:
            packed.temperature = self.temperature

    @torch.no_grad()
    def ref_logprobs(self, micro: MicroBatch) -> Tensor:
        """The reference's log-probabilities of a micro-batch; (T,)."""
        assert self.reference is not None, "no reference was loaded, because kl_coef is 0"
        progress.tick()
        with lora.reference_active(self.adapters) if self.adapters else nullcontext():
            return self.reference(micro)[0]

    def _settle(self) -> None:
        """Let ZeRO-3 take back every weight that a pass has gathered, or that it fetches ahead for the pass it expects next.

        Without it, whoever gathers weights after a forward pass alone finds some of them empty, still on their way.
        """
        for engine in (self.engine, self.reference) if self._sharded else ():
            if engine is not None:
                engine.optimizer.empty_partition_cache()

    def _reference_pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name of each weight of the reference, the policy's of that name, and the reference's."""
        assert self.reference is not None, "no reference was loaded, because kl_coef is 0"
        self._settle()
        if self.adapters:
            yield from lora.adapter_pairs(self.adapters)
            return
        for (name, source), target in zip(self.lm.named_parameters(), self.reference.parameters(), strict=True):
            yield name, source, target

    @torch.no_grad()
    def refresh_reference(self) -> None:
        """Make the current policy the reference. Every process calls it; no more than one weight is gathered at a time."""
        for _, source, target in self._reference_pairs():
            progress.tick()
            with whole(source), whole(target, written=True):
                target.copy_(source)
        self.reference_moved = True

    def save_reference(self, path: Path, write: Write = write_now) -> None:
        """Write the reference's weights to one file. Every process calls it."""
        weights = {}
        for name, _, target in self._reference_pairs():
            with whole(target):
                if self.processes.is_main:
                    weights[name] = target.detach().cpu().clone()
        if self.processes.is_main:
            write(path, weights, save_file)

    @torch.no_grad()
    def load_reference(self, path: Path) -> None:
        """Read what `save_reference` wrote. Every process calls it."""
        with safe_open(path, framework="pt") as weights:
            for name, _, target in self._reference_pairs():
                with progress.busy("reading a checkpoint"):
                    weight = weights.get_tensor(name)
                with whole(target, written=True):
                    target.copy_(weight)
        self.reference_moved = True

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this process's share of the loss; `last` marks the end of an optimizer step.

        DeepSpeed averages gradients over the processes. Our loss is a sum over all of them, so it is scaled back.
        """
        progress.tick()
        self.engine.set_gradient_accumulation_boundary(last)
        with deterministic(self._config.run.deterministic):
            self.engine.backward(loss * self.processes.world_size)

    def optimizer_step(self, learning_rate: float) -> float:
        """Clip, update, and return the global L2 norm of the gradient before clipping.

        If it is not finite, on whichever process that began, there is no update: weights, moments and their count of steps stay
        as they are on all processes, and the gradient is dropped. DeepSpeed sees to that in every stage but one.
        """
        progress.tick()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._dense_grad_norm()
        if norm is not None and not norm.isfinite():
            self.engine.zero_grad()
            return math.inf
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _dense_grad_norm(self) -> Tensor | None:
        """DeepSpeed reports no norm without ZeRO in float32; every process then holds the whole gradient."""
        if self.engine.zero_optimization() or self.engine.bfloat16_enabled():
            return None
        return nn.utils.get_total_norm([p.grad for p in self.lm.parameters() if p.grad is not None])

    @property
    def whole_lm(self) -> PreTrainedModel:
        """See SampledModel: the replica, if there is one."""
        return self.lm if self._replica is None else self._replica

    def sync(self) -> None:
        """Bring the sampling weights up to date after an update; a collective. Without a replica there is nothing to do."""
        if self._replica is None:
            return
        self._settle()
        if self.adapters:
            return lora.merge_into(self._replica, self.adapters)
        with torch.no_grad():
            for source, target in zip(self.lm.parameters(), self._replica.parameters(), strict=True):
                progress.tick()
                with whole(source):
                    target.copy_(source)

    def export(self, directory: Path, write: Write = write_now) -> None:
        """Write weights, config and tokenizer in Hugging Face format. To be called by the main process alone."""
        with self.sampling_model() as lm:
            shell = _shell(lm)
            shell.generation_config = GenerationConfig(
                eos_token_id=self.end_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                bos_token_id=lm.generation_config.bos_token_id,
            )  # sampling defaults of the base would not fit the trained model, and an odd one makes saving fail

            def save(weights: dict[str, Tensor], path: Path) -> None:
                shell.save_pretrained(path, state_dict=dict(weights))  # which it empties
                self.tokenizer.save_pretrained(path)
                for name, content in self.processor_files.items():
                    (path / name).write_bytes(content)

            write(directory, lm.state_dict(), save)

    def export_adapter(self, directory: Path, write: Write = write_now) -> None:
        """Write what was trained in peft's format, if that is adapters. Every process calls it."""
        if self.adapters:
            self._settle()
            stored = lora.peft_config(self.lm, self._config)
            weights = lora.adapter_weights(self.adapters, is_main=self.processes.is_main)
            if self.processes.is_main:
                write(directory, weights, partial(lora.save_adapter, config=stored))

    def save_training_state(self, directory: Path, write: Write = write_now) -> None:
        """Write DeepSpeed's state to directory/training, without what is not trained. Every process calls it."""
        # what can fail on one process only, and leave the others waiting: writing, making folders, copying a script that gathers
        # weights, which hf/ holds anyway
        files = self.engine.checkpoint_engine
        files.save = lambda state_dict, path: write(Path(path), state_dict, save_tensors)
        files.makedirs = lambda *_, **__: None
        self.engine._copy_recovery_script = lambda _: None
        self.engine.save_checkpoint(
            str(directory), tag="training", save_latest=False, exclude_frozen_parameters=bool(self.adapters)
        )

    def load_training_state(self, directory: Path) -> None:
        """Read what `save_training_state` wrote. Every process calls it."""
        classes = distributed.deepspeed_classes()
        self.engine.checkpoint_engine.load = lambda path, map_location=None: load_tensors(Path(path), classes=classes)
        with progress.busy("reading a checkpoint"):
            loaded, _ = self.engine.load_checkpoint(
                str(directory), tag="training", load_module_strict=not self.adapters
            )
        assert loaded is not None, f"DeepSpeed found no training state in {directory}"


def _shell(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration without weights, to save some with while `lm` is in use."""
    settings = copy.deepcopy(lm.config)
    restore_dropout(settings, lm.stored_dropouts)  # type: ignore[arg-type]
    with torch.device("meta"):
        return type(lm)(settings)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _adamw(lm: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    options: dict[str, Any] = {"fused": True} if device.type == "cuda" else {}
    return torch.optim.AdamW(
        trained_parameters(lm),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        **options,
    )


def _count_from_zero(optimizer: torch.optim.Optimizer) -> None:
    """Forget a step that was none: without ZeRO in bfloat16, DeepSpeed makes room for AdamW's moments by a step with gradients of
    zero. Counted, it would make the first update 0.73 times as large as in the other stages, as if the moments had decayed."""
    for state in optimizer.state.values():
        state["step"] *= 0
