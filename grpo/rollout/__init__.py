"""Prompts -> Groups of sampled Completions: the engines, each a types.Generator, and the choice among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.system import progress
from grpo.system.terminal import say
from grpo.types import Generator

if TYPE_CHECKING:
    from grpo.config import Config
    from grpo.policy.sampled_model import SampledModel


def check_engine(config: Config) -> None:
    """Whether `rollout.engine` can run here, as far as that can be told before a model is loaded.

    Raises:
        ValueError: its package or its server is not there, or it has no rollout.weights fp8 of this model on this machine; or
            memory.release_kv_cache is set and there is no CUDA GPU.
    """
    if config.rollout.engine == "vllm":
        from grpo.rollout.vllm import check_available

        check_available(config)
    import torch

    from grpo.system import mapped_memory

    if config.memory.release_kv_cache and (reason := mapped_memory.missing()) is not None:
        raise ValueError(
            f"memory.release_kv_cache is true; it gives GPU memory back to the reference and the update, and {reason}. Remove it."
        )
    if config.rollout.weights == "fp8":
        from grpo.policy.model_source import model_config
        from grpo.rollout.fp8 import unsupported_here

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reason = unsupported_here(model_config(config.model), device)
        if reason is not None:
            raise ValueError(f"rollout.weights is fp8; {reason}. Set rollout.weights to policy.")


ENGINES = {"NativeGenerator": "native engine", "HFGenerator": "transformers' generate", "VLLMGenerator": "vLLM"}
"""What a display calls each."""


def make_generator(config: Config, policy: SampledModel, *, setting: str = "rollout.engine") -> Generator:
    """The engine that `rollout.engine` names; `auto` takes the native one if it supports the model.

    Args:
        setting: what the user calls it.

    Raises:
        ValueError: the engine cannot run this model here.
    """
    from grpo.rollout.hf import HFGenerator

    engine = config.rollout.engine
    if engine == "vllm":
        from grpo.policy.policy import Policy
        from grpo.rollout.vllm import VLLMGenerator

        assert isinstance(policy, Policy), "vLLM takes its weights from a policy that is trained"
        return VLLMGenerator(policy, config)
    if engine in ("native", "auto"):
        from grpo.rollout.engine import NativeGenerator, unsupported, unsupported_in_8_bits

        in_8_bits = config.rollout.weights == "fp8"
        with progress.busy("compiling the kernels of the native engine"):
            reason = unsupported(policy, fused=config.rollout.fused_layers)
            not_in_8_bits = unsupported_in_8_bits(policy) if in_8_bits and reason is None else None
        if not_in_8_bits is not None:
            raise ValueError(f"rollout.weights is fp8; {not_in_8_bits}. Set rollout.weights to policy.")
        if reason is None:
            return NativeGenerator(policy, config)
        if in_8_bits:
            raise ValueError(
                f"rollout.weights is fp8, which the native engine makes; {reason}. Set rollout.weights to policy and "
                "rollout.engine to hf."
            )
        if engine == "native":
            raise ValueError(f"rollout.engine is native; {reason}. Set rollout.engine to hf.")
        if policy.processes.is_main:
            unused = "; memory.release_kv_cache has no effect then" if config.memory.release_kv_cache else ""
            say(f"{setting} is auto: sampling with transformers' generate, because {reason}{unused}")
    return HFGenerator(policy, max_sequences=config.memory.max_sequences)
