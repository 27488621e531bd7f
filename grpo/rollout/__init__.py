"""Prompts -> Groups of sampled Completions: the protocol every rollout engine follows, and the choice among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from grpo.system import progress
from grpo.system.terminal import say
from grpo.types import Group, OnGroup, Prompt, Sampling

if TYPE_CHECKING:
    from grpo.config import Config
    from grpo.policy.policy import SampledModel


class Generator(Protocol):
    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """Sample `num_completions` continuations of each prompt.

        The result is a function of the weights and the arguments, up to rounding, which depends on the device and on how much
        runs at once; see Completion for the log-probabilities. `on_group` is called in this thread for each group as soon as it
        is whole, in whatever order they end; what it raises ends the sampling.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's weights after an update. Every process calls it."""
        ...

    def halve(self) -> str | None:
        """Out of memory, sample half as many completions at once from now on; what changed, in words. None: it cannot be less."""
        ...

    def metrics(self) -> dict[str, float]:
        """The rollout/ metrics of the last call of `sample`; see grpo/observe/metrics.py."""
        ...


def check_engine(config: Config) -> None:
    """Whether `rollout.engine` can run here, as far as that can be told before a model is loaded.

    Raises:
        ValueError: its package or its server is not there.
    """
    if config.rollout.engine == "vllm":
        from grpo.rollout.vllm import check_available

        check_available(config)


def make_generator(config: Config, policy: SampledModel) -> Generator:
    """The engine that `rollout.engine` names; `auto` takes the native one on CUDA if it supports the model.

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
    if engine == "native" or (engine == "auto" and policy.processes.device.type == "cuda"):
        from grpo.rollout.engine import NativeGenerator, unsupported

        with progress.busy("compiling the kernels of the native engine"):
            reason = unsupported(policy, fused=config.rollout.fused_layers)
        if reason is None:
            return NativeGenerator(policy, config)
        if engine == "native":
            raise ValueError(f"rollout.engine is native; {reason}. Set rollout.engine to hf.")
        if policy.processes.is_main:
            say(f"rollout.engine is auto: sampling with transformers' generate, because {reason}")
    return HFGenerator(policy, max_sequences=config.memory.max_sequences)
