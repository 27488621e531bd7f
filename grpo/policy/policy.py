"""The policy being trained, and the frozen reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import unset_hf_deepspeed_config

from grpo.algorithm.batch import micro_batch
from grpo.config import Config, ModelConfig, OptimizerConfig
from grpo.policy import lora
from grpo.policy.families import (
    LeakTest,
    refusal,
    restore_dropout,
)
from grpo.policy.language_model import (
    PackedLM,
    checkpoint_activations,
    copy_buffers,
    fuse_kernels,
    gather_by_layer,
    gathered_by_layer,
    in_float32,
    lay_out,
    load_lm,
    output_head,
    resolve_dtype,
    trained_parameters,
    with_computed_buffers,
)
from grpo.policy.logprobs import token_logprobs
from grpo.policy.model_source import model_config
from grpo.policy.sampled_model import FORWARD_TOLERANCE, SampledModel, eval_mode, own_logprobs
from grpo.policy.sequence_parallel import check_heads
from grpo.system import distributed, progress
from grpo.system.distributed import (
    SMALL_PARAMETERS,
    TrainingProcesses,
    deterministic,
    limit_threads,
    num_elements,
    whole,
)
from grpo.system.terminal import say
from grpo.system.writer import Own, Write, load_tensors, save_tensors, write_now
from grpo.types import Batch, MicroBatch


class Policy(SampledModel):
    """The trained model behind DeepSpeed, its reference, and a model with whole weights to sample from.

    Args:
        processes: where to put it; every process must construct it, since loading is a collective under ZeRO-3.
        optimizer: makes one of the trained parameters, instead of AdamW as `config.optimizer` has it.
        samples: whether these processes sample. Where they do not and the model is sharded (ZeRO-3), none holds it whole, unless
            it has adapters, or its files hold buffers, which only a whole copy has for certain.
    """

    processes: TrainingProcesses

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        processes: TrainingProcesses,
        *,
        optimizer: MakeOptimizer | None = None,
        samples: bool = True,
    ) -> None:
        for model in (config.model, config.teacher_model):
            if model is not None:
                check_heads(model_config(model), processes.sequence_parallel)
        dtype, sharded = resolve_dtype(config.model.dtype), config.distributed.zero_stage == 3
        scattered = sharded and not samples and config.lora.rank == 0
        buffers = with_computed_buffers(config.model, dtype=dtype) if scattered else None
        self.holds_whole = buffers is None
        if scattered and self.holds_whole:
            processes.say(
                f"each process keeps a whole copy of {config.model.name}: its files hold buffers beside its weights"
            )
        lm = load_lm(config.model, dtype=dtype)
        if processes.device.type == "cpu" and lm.num_parameters() < SMALL_PARAMETERS:
            limit_threads(1)
        super().__init__(lm, config.model, tokenizer, processes)
        self._sharded = sharded
        self._config = config
        self.temperature = config.rollout.temperature
        checkpoint_activations(self.lm, config.memory.activation_checkpointing)
        self.adapters = lora.add_adapters(self.lm, config, processes.device) if config.lora.rank else {}
        self._replica: PreTrainedModel | None = None
        if not self._sharded:
            lay_out(self.lm, processes.device)
        if buffers is not None:
            copy_buffers(buffers, self.lm, processes.device)
        own = None if self._sharded and self.holds_whole else self._first_logprobs()  # before its kernels are others
        with progress.busy("setting up DeepSpeed"):  # which may compile
            self.engine, self.optimizer = processes.accelerator.prepare(
                self._packed(self.lm), _optimizer(self.lm, config.optimizer, processes.device, optimizer)
            )
        _count_from_zero(self.engine.basic_optimizer)
        self.lm.set_attn_implementation("packed")
        self.reference_moved = False  # it is no longer the starting model
        self.weights_version = 0
        """Counts their changes."""
        self._load_beside(config, buffers)
        if self.adapters:
            self.sync()  # they may not start at nothing
        self._check_forward(*(own or self.plain_logprobs()))

    def _load_beside(self, config: Config, buffers: PreTrainedModel | None) -> None:
        """The reference, or the teacher in its place, and the copy that is sampled from.

        Args:
            buffers: a model that has those of the policy, if there will be no copy.
        """
        teacher, device = config.teacher_model, self.processes.device
        # a PackedLM, or DeepSpeed's engine around one
        self.reference = own = self._load_reference() if config.algorithm.kl_coef > 0 and teacher is None else None
        if teacher is not None and not self.holds_whole:
            self.reference = self._load_sharded_teacher(teacher)
        unset_hf_deepspeed_config()  # from here on, loading a model must not shard it
        if teacher is not None and self.reference is None:
            self.reference = self._load_teacher(teacher)
        if self.adapters or (self._sharded and self.holds_whole):
            buffers = self._replica = self._load_replica()
            copy_buffers(buffers, self.lm, device)
        if buffers is not None and own is not None:
            copy_buffers(buffers, own.lm, device)

    @torch.no_grad()
    def _first_logprobs(self) -> tuple[Tensor, Tensor]:
        """`plain_logprobs` of the model as it was loaded, which DeepSpeed does not run yet."""
        if self.holds_whole:
            return self.plain_logprobs()
        self.lm.set_attn_implementation(self.own_attention)
        tokens = self.plain_tokens()
        with gathered_by_layer(self.lm), eval_mode(self.lm):
            return tokens, own_logprobs(self.lm, tokens, temperature=self.temperature)

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
        reason = self._misfit(micro, kept, LeakTest(self.lm, self.old_logprobs).worst)
        if reason is None and self.processes.sequence_group is not None:
            for model in (self.engine, self.reference):
                if model is not None:
                    getattr(model, "module", model).sequence_group = self.processes.sequence_group
            reason = self._misfit(micro, kept, lambda _: 0.0)
        if reason is not None:
            raise ValueError(refusal(self._config.model.name, reason))

    def _misfit(self, micro: MicroBatch, alone: Tensor, leak: Callable[[MicroBatch], float]) -> str | None:
        """What is wrong with the log-probabilities of a pack, whose sequences have those of `alone` (T,) each for itself.

        Args:
            leak: by how many nats a sequence feels its neighbours.
        """
        name, most = type(self.lm).__name__, FORWARD_TOLERANCE[self.dtype]
        try:
            gap = float((self.old_logprobs(micro) - alone).abs().mean())
            moved = leak(micro)
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

        Where no process holds that model it is the trained one, and every process calls this with equally many sequences.

        Args:
            float32: compute with the same weights in float32.
        """
        found = []
        whole_lm = self.whole_lm if self.holds_whole else None
        context = self._sharded_alone() if whole_lm is None else self.sampling_model()
        with context, in_float32(whole_lm or self.engine.module) if float32 else nullcontext():
            for ids, prompt_len, own in zip(
                batch.tokens.split(batch.sequence_lens.tolist()), batch.prompt_lens, batch.own_tokens(), strict=True
            ):
                there = ids.to(self.processes.device)
                if whole_lm is None:
                    found.append(self.engine(there)[0][prompt_len - 1 :][own])
                    continue
                hidden = whole_lm.base_model(input_ids=there[None], use_cache=False).last_hidden_state[0]
                logprobs, *_ = token_logprobs(
                    hidden[prompt_len - 1 : -1][own],
                    there[prompt_len:][own],
                    output_head(whole_lm),
                    temperature=self.temperature,
                    chunk_tokens=self._config.memory.logprob_chunk_tokens,
                )
                found.append(logprobs)
        return torch.cat(found)

    @torch.no_grad()
    def sentence_logprobs(self, tokens: Tensor, *, temperature: float | None = None) -> Tensor:
        """See SampledModel. Where no process holds the whole model, every one calls it with equally many sentences."""
        if self.holds_whole:
            return super().sentence_logprobs(tokens, temperature=temperature)
        with self._sharded_alone(), self.at_temperature(temperature or self.temperature):
            return torch.stack([self.engine(sentence)[0] for sentence in tokens])

    @contextmanager
    def _sharded_alone(self) -> Iterator[None]:
        """Within it, the trained model reads sequences of token ids, each alone, with its family's own attention."""
        self.lm.set_attn_implementation(self.own_attention)
        try:
            yield
        finally:
            self.lm.set_attn_implementation("packed")

    def _load_reference(self) -> Any:
        """A frozen copy of the starting point, sharded like the policy under ZeRO-3; with adapters the policy's own model."""
        if self.adapters:
            return self.engine
        return self._frozen(load_lm(self._config.model, dtype=self.dtype))

    def _load_sharded_teacher(self, model: ModelConfig) -> Any:
        """Another model in the reference's place, which no process ever holds whole; None if its files hold buffers."""
        buffers = with_computed_buffers(model, dtype=self.dtype)
        if buffers is None:
            return None
        lm = load_lm(model, dtype=self.dtype)
        teacher = self._frozen(lm)
        copy_buffers(buffers, lm, self.processes.device)
        return teacher

    def _load_teacher(self, model: ModelConfig) -> Any:
        """Another model in the reference's place, sharded like the policy under ZeRO-3. It is loaded whole: its buffers are exact
        then; see copy_buffers."""
        lm = load_lm(model, dtype=self.dtype)
        exact = {name: buffer.clone() for name, buffer in lm.named_buffers()}
        teacher = self._frozen(lm)
        for name, buffer in lm.named_buffers():
            path, _, last = name.rpartition(".")
            lm.get_submodule(path)._buffers[last] = exact[name].to(buffer.device)
        return teacher

    def _frozen(self, lm: PreTrainedModel) -> Any:
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

    def logprobs(self, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability and entropy of the completion tokens of a micro-batch on this device, with gradient, and whether each
        is the likeliest; (T,)."""
        progress.tick()
        self.engine.train()
        return self.engine(micro)

    @torch.no_grad()
    def before_update(self, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What `logprobs` says, without gradient."""
        progress.tick()
        return self.engine(micro)

    def old_logprobs(self, micro: MicroBatch) -> Tensor:
        """The policy's own log-probabilities of a micro-batch before it is updated; (T,)."""
        return self.before_update(micro)[0]

    def own_logprobs(self, micro: MicroBatch) -> Tensor:
        """`old_logprobs` of a micro-batch of this process's own; those who run passes together have one each."""
        processes = self.processes
        of_each = [micro] if processes.sequence_group is None else processes.gather_within(micro)
        found = [self.old_logprobs(each.to(processes.device)) for each in of_each]
        return found[processes.rank % len(of_each)]

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
        of_policy = self.adapters and self.reference is self.engine
        with lora.reference_active(self.adapters) if of_policy else nullcontext():
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
        weights = Own()
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
        self.weights_version += 1
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _dense_grad_norm(self) -> Tensor | None:
        """DeepSpeed reports no norm without ZeRO in float32; every process then holds the whole gradient."""
        if self.engine.zero_optimization() or self.engine.bfloat16_enabled():
            return None
        return nn.utils.get_total_norm([p.grad for p in self.lm.parameters() if p.grad is not None])

    @property
    def whole_lm(self) -> PreTrainedModel:
        """See SampledModel: the replica, if there is one.

        Raises:
            RuntimeError: no process has it.
        """
        if not self.holds_whole:
            raise RuntimeError(
                "no process of this run holds the whole model: it is sharded (distributed.zero_stage 3) and sampled elsewhere. "
                "Read its weights with `whole_weights`, or a checkpoint's hf/."
            )
        return self.lm if self._replica is None else self._replica

    def whole_weights(self) -> Own:
        """The weights that are sampled from, copied to the machine's memory, on the main process; {} on others. Every process
        calls it."""
        if self.holds_whole:
            named = self.whole_lm.named_parameters() if self.processes.is_main else ()
            return Own({name: weight.detach().cpu().clone() for name, weight in named})
        self._settle()
        found = Own()
        for name, weight in self.lm.named_parameters():
            progress.tick()
            with whole(weight):
                if self.processes.is_main:
                    found[name] = weight.detach().cpu().clone()
        return found

    def num_whole_bytes(self) -> int:
        """Of the weights that are sampled from."""
        lm = self.whole_lm if self.holds_whole else self.lm
        return sum(num_elements(weight) * weight.element_size() for weight in lm.parameters())

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
        """Write weights, config and tokenizer in Hugging Face format. Every process calls it, and the main one writes."""
        gathered = None if self.holds_whole else self.whole_weights()
        if not self.processes.is_main:
            return
        with nullcontext(self.lm) if gathered is not None else self.sampling_model() as lm:
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

            write(directory, lm.state_dict() if gathered is None else _as_state_dict(lm, gathered), save)

    def export_adapter(self, directory: Path, write: Write = write_now) -> None:
        """Write what was trained in peft's format, if that is adapters. Every process calls it."""
        if self.adapters:
            self._settle()
            stored = lora.peft_config(self.lm, self._config)
            weights = lora.adapter_weights(self.adapters, is_main=self.processes.is_main)
            if self.processes.is_main:
                quantization = self._config.lora.quantization
                write(directory, weights, partial(lora.save_adapter, config=stored, quantization=quantization))

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
        self.weights_version += 1


def _shell(lm: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration without weights, to save some with while `lm` is in use."""
    settings = copy.deepcopy(lm.config)
    restore_dropout(settings, lm.stored_dropouts)  # type: ignore[arg-type]
    with torch.device("meta"):
        return type(lm)(settings)


def _as_state_dict(lm: PreTrainedModel, weights: Own) -> Own:
    """Weights under all the names that the model saves them by; tied ones are one tensor."""
    names = {id(weight): name for name, weight in lm.named_parameters()}
    return Own({name: weights[names[id(weight)]] for name, weight in lm.state_dict(keep_vars=True).items()})


MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""Trained parameters -> their optimizer. The learning rate of each step is still that of `optimizer.learning_rate` and its
schedule, and gradients are clipped to `optimizer.max_grad_norm`."""


def _optimizer(
    lm: nn.Module, config: OptimizerConfig, device: torch.device, make: MakeOptimizer | None
) -> torch.optim.Optimizer:
    """Raises ValueError if what was given makes no optimizer."""
    if make is None:
        return _adamw(lm, config, device)
    made = make(list(trained_parameters(lm)))
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer returned {type(made).__name__}; it is called with the list of trained parameters and returns a "
            "torch.optim.Optimizer of them. Return one, as in optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)."
        )
    return made


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
        if "step" in state:  # one that somebody brought may count nothing
            state["step"] *= 0
