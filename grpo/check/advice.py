"""Which setting to change when memory runs out, from what to what: the cheapest change that frees some first. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from grpo.config import Config, SupervisedConfig

FEWEST_CHUNK_TOKENS = 128
"""With fewer the logits are no longer what takes the memory."""

WORTHWHILE = 0.75
"""Passes that stay larger than this share of what they were are not worth a try."""


def advice(
    phase: str, config: Config, *, world_size: int, kv_gib: tuple[float, float] | None = None, on_gpu: bool = False
) -> list[str]:
    """Changes that lower the peak of `phase`, each with its numbers, the cheapest first.

    Args:
        phase: loading, or a phase of the step; see `LADDERS`.
        kv_gib: what the native engine holds for keys and values on a process, and the fewest it works with.
        on_gpu: whether the memory is a GPU's.
    """
    rungs = LADDERS.get(phase, LADDERS["update"])
    found = [rung(config, world_size=world_size, kv_gib=kv_gib, on_gpu=on_gpu) for rung in rungs]
    return [text for text in found if text is not None]


def supervised_advice(
    phase: str,
    config: SupervisedConfig,
    *,
    world_size: int,
    kv_gib: tuple[float, float] | None = None,
    on_gpu: bool = False,
) -> list[str]:
    """The same for supervised training: while the model is loaded, or in an update."""
    if phase == "loading":
        return advice(phase, config.parts, world_size=world_size)
    now, longest, parts = config.memory.micro_batch_tokens, config.data.max_tokens, config.parts
    rungs = (_chunk, _checkpointing, _sequence_parallel, _offload, _four_bits, _zero_stage)
    own = _share(longest, config.distributed.sequence_parallel)  # of the longest row, what a process has
    found = [
        _release_kv_cache(parts, kv_gib=kv_gib, on_gpu=on_gpu),
        _smaller_passes(now, now, own),
        *(rung(parts, world_size=world_size) for rung in rungs),
    ]
    if longest > 1:
        found.append(_change("data.max_tokens", longest, longest // 2, "longer rows are left out"))
    return [text for text in found if text is not None]


Rung = Callable[..., str | None]


def _change(setting: str, now: Any, then: Any, why: str) -> str:
    words = {None: "null", True: "true", False: "false"}
    shown = [words[value] if value is None or isinstance(value, bool) else str(value) for value in (now, then)]
    return f"set {setting} from {shown[0]} to {shown[1]} ({why})"


def _kv_cache(config: Config, *, kv_gib: tuple[float, float] | None, **_: Any) -> str | None:
    if kv_gib is None:
        return None
    held, fewest = kv_gib
    then = max(held / 2, fewest * 1.01)  # a hair more than the fewest, for it is shown rounded
    if then >= held:
        return None
    setting = config.memory.kv_cache_gib
    now = f"null ({held:.3g} GiB)" if setting is None else f"{setting:g}"
    return _change("memory.kv_cache_gib", now, f"{then:.3g}", "fewer completions run at once")


def _release_kv_cache(config: Config, *, kv_gib: tuple[float, float] | None, on_gpu: bool, **_: Any) -> str | None:
    if kv_gib is None or not on_gpu or config.memory.release_kv_cache:
        return None
    why = f"the {kv_gib[0]:.3g} GiB of keys and values are free from the end of sampling on"
    return _change("memory.release_kv_cache", False, True, why)


def _max_sequences(config: Config, *, world_size: int, **_: Any) -> str | None:
    now = config.memory.max_sequences
    at_once = min(now, _share(config.rollout.num_prompts, world_size) * config.rollout.group_size)
    if at_once < 2:
        return None
    return _change("memory.max_sequences", now, at_once // 2, "sampling takes longer")


def _micro_batch(config: Config, *, world_size: int, **_: Any) -> str | None:
    """Halve the budget, or what a pass has if that is less, down to one sequence: none is ever split."""
    now, longest = (
        config.memory.micro_batch_tokens,
        _share(config.max_sequence_tokens, config.distributed.sequence_parallel),
    )
    return _smaller_passes(now, min(now, _pass_tokens(config, world_size)), longest)


def _smaller_passes(now: int, tokens: int, longest: int) -> str | None:
    """Half of the tokens that a pass has, but no fewer than a sequence may have."""
    then = max(tokens // 2, longest)
    if then > WORTHWHILE * tokens:
        return None
    return _change("memory.micro_batch_tokens", now, then, "smaller passes; results do not depend on it")


def _pass_tokens(config: Config, world_size: int) -> int:
    """Most tokens that a pass would have without a budget: a process's share of a minibatch, each prompt once."""
    num_prompts, group_size = config.prompts_per_minibatch, config.rollout.group_size
    prompts, completions = _share(num_prompts, world_size), _share(num_prompts * group_size, world_size)
    return prompts * config.data.max_prompt_tokens + completions * config.rollout.max_completion_tokens


def _chunk(config: Config, **_: Any) -> str | None:
    now = config.memory.logprob_chunk_tokens
    used = min(now, config.memory.micro_batch_tokens)  # a pass has no more completion tokens than that
    if used <= FEWEST_CHUNK_TOKENS:
        return None
    then = max(used // 2, FEWEST_CHUNK_TOKENS)
    return _change("memory.logprob_chunk_tokens", now, then, "fewer logits at once; results do not depend on it")


def _offload(config: Config, **_: Any) -> str | None:
    if config.distributed.offload_optimizer:
        return None
    then = "true" if config.distributed.zero_stage else "true with distributed.zero_stage 1 instead of 0"
    return _change("distributed.offload_optimizer", False, then, "the optimizer's states wait in the machine's memory")


def _four_bits(config: Config, **_: Any) -> str | None:
    if config.lora.rank == 0 or config.lora.quantization is not None or config.distributed.zero_stage == 3:
        return None
    return _change("lora.quantization", None, "nf4", "the frozen weights take a quarter; what is trained differs")


def _16_bits(config: Config, **_: Any) -> str | None:
    if config.rollout.weights == "policy":
        return None
    return _change("rollout.weights", "fp8", "policy", "no copy of the layers in 8 bits; sampling takes longer")


def _zero_stage(config: Config, *, world_size: int, **_: Any) -> str | None:
    now = config.distributed.zero_stage
    if config.lora.quantization is not None:
        return None  # weights in 4 bits are whole on every process
    if world_size == 1:
        change = "" if now == 3 else f" with distributed.zero_stage 3 instead of {now}"
        return f"launch on 2 GPUs or more (accelerate launch --num_processes 2){change}, so that each holds a share"
    if now < 3:
        return _change(
            "distributed.zero_stage", now, 3, "weights, gradients and optimizer are shared out over the GPUs"
        )
    return f"launch on {2 * world_size} GPUs instead of {world_size} (accelerate launch --num_processes), for smaller shares"


def _sequence_parallel(config: Config, *, world_size: int, **_: Any) -> str | None:
    now = config.distributed.sequence_parallel
    if world_size % (2 * now):
        return None
    why = "a process holds a smaller share of the longest sequences, where the model's attention heads can be shared out so"
    return _change("distributed.sequence_parallel", now, 2 * now, why)


def _completion_length(config: Config, **_: Any) -> str | None:
    now = config.rollout.max_completion_tokens
    return (
        _change("rollout.max_completion_tokens", now, max(now // 2, 1), "longer answers are cut off")
        if now > 1
        else None
    )


def _smaller_model(config: Config, **_: Any) -> str:
    return f"take a smaller model than model.name {config.model.name}"


def _share(count: int, world_size: int) -> int:
    return math.ceil(count / world_size)


def _checkpointing(config: Config, **_: Any) -> str | None:
    now = config.memory.activation_checkpointing
    if now == 1:
        return None
    return _change("memory.activation_checkpointing", f"{now:g}", 1, "activations are computed twice")


LADDERS: dict[str, list[Rung]] = {
    "loading": [_offload, _four_bits, _zero_stage, _smaller_model],
    "rollout": [_16_bits, _kv_cache, _max_sequences, _offload, _four_bits, _zero_stage, _completion_length],
    "logprobs": [
        _release_kv_cache,
        _micro_batch,
        _chunk,
        _sequence_parallel,
        _offload,
        _four_bits,
        _zero_stage,
        _completion_length,
    ],
    "update": [
        _release_kv_cache,
        _micro_batch,
        _chunk,
        _checkpointing,
        _sequence_parallel,
        _offload,
        _four_bits,
        _zero_stage,
        _completion_length,
    ],
}
"""By phase, what may help there, cheapest first. The rest of a step (taking over the weights) counts as the update."""
