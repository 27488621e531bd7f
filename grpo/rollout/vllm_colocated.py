"""A vLLM engine inside every training process, on the GPU that also trains.

While the policy trains, the engine sleeps at level 2: it keeps neither weights nor keys and values. Each call wakes it,
loads the policy's present weights and ends with putting it to sleep. So there is no place where older weights could
survive; with level 1, which keeps a copy of them, a library that forgot to load once sampled from it for whole runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from grpo.policy.model_source import source_of
from grpo.rollout.vllm_engine import OnAnswer, Request, Sampled
from grpo.system import progress

if TYPE_CHECKING:
    from grpo.config import Config
    from grpo.policy.policy import Policy


class ColocatedEngine:
    """See Engine in vllm_engine.py. Every process must construct it, since vLLM agrees on its memory with the others."""

    def __init__(self, policy: Policy, config: Config) -> None:
        from vllm import LLM, SamplingParams

        self.policy = policy
        self.parameters = SamplingParams
        _return_cached_memory()
        with progress.busy("starting vLLM"):
            self.llm = self._start(LLM, policy, config)
        self.llm.sleep(level=2)

    def _start(self, LLM: Any, policy: Policy, config: Config) -> Any:
        source = source_of(config.model)
        return LLM(
            model=source.base,
            revision=source.revision,
            tokenizer_revision=source.revision,
            trust_remote_code=config.model.trust_remote_code,
            dtype=str(policy.dtype).removeprefix("torch."),
            tensor_parallel_size=1,
            distributed_executor_backend="external_launcher",  # in this process, on its GPU and in its process group
            max_model_len=config.max_sequence_tokens,
            max_num_seqs=config.memory.max_sequences,
            gpu_memory_utilization=config.vllm.gpu_memory_utilization,
            logprobs_mode=config.vllm_logprobs_mode,
            generation_config="vllm",  # not the model's own: a repetition penalty there would change the samples
            enable_sleep_mode=True,
        )

    def take_weights(self) -> None:
        """Nothing to do: the engine sleeps, and waking loads the policy's weights."""

    def generate(self, requests: list[Request], on_answer: OnAnswer) -> None:
        """See Engine. The answers come in all at once, because `LLM.generate` returns when it has the last."""
        with self._awake(), progress.busy("sampling with vLLM", math.inf):  # for itself, in one call
            outputs = self.llm.generate(
                [{"prompt_token_ids": request.token_ids} for request in requests],
                [self.parameters(**request.parameters) for request in requests],
                use_tqdm=False,
            )
        for place, output in enumerate(outputs):
            on_answer(place, _sampled(output.outputs[0]))

    @contextmanager
    def _awake(self) -> Iterator[None]:
        _return_cached_memory()
        self.llm.wake_up(tags=["weights"])
        self._load_weights()
        self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not reset its prefix cache: it would go on from keys and values of older weights."
            )
        try:
            yield
        finally:
            self.llm.sleep(level=2)

    @torch.no_grad()
    def _load_weights(self) -> None:
        """In the names and layout of a checkpoint; vLLM's own loader fuses and splits them as its model wants."""
        with self.policy.sampling_model() as lm:
            weights = ((name, parameter.detach()) for name, parameter in lm.named_parameters())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})


def _return_cached_memory() -> None:
    """vLLM takes its memory from the driver, where what PyTorch freed but keeps is not free (vllm#13941: none to wake up in)."""
    torch.cuda.empty_cache()


def _sampled(output: Any) -> Sampled:
    """Of a vllm.CompletionOutput, whose `logprobs` has {token id: Logprob} for each place."""
    token_ids = list(output.token_ids)
    logprobs = [place[token].logprob for token, place in zip(token_ids, output.logprobs, strict=True)]
    return Sampled(token_ids, logprobs, output.finish_reason)
