"""Rollouts through vLLM, an optional extra, in one of two modes; docs/vllm.md says how to set each up.

Both answer the same requests: prompt token ids and sampling parameters in, token ids and log-probabilities out. What a
request says and where a completion ends is decided here, so the modes cannot differ in it.
"""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import TYPE_CHECKING

from grpo.rollout.grouping import Grouping
from grpo.rollout.stop_criteria import Ending, token_limit
from grpo.rollout.vllm_engine import Engine, Request, Sampled
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling

if TYPE_CHECKING:
    from grpo.config import Config
    from grpo.policy.policy import Policy


class VLLMGenerator:
    """Samples from `policy` with the engine of `vllm.mode`; every process must construct it."""

    def __init__(self, policy: Policy, config: Config) -> None:
        check_available(config)
        self.policy = policy
        self.ending = Ending(policy.tokenizer, policy.end_token_ids)
        self.engine = _make_engine(policy, config)

    def sync(self) -> None:
        self.policy.sync()
        self.engine.take_weights()

    def halve(self) -> str | None:
        """See Generator; its memory is vLLM's own to manage."""
        return None

    def release_memory(self) -> None:
        """See Generator; an engine on the GPU that trains gives its memory back at the end of each call."""

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator. A completion's seed is a function of `seed` and its place, whatever else is sampled beside it."""
        grouping = Grouping(prompts, num_completions=num_completions, on_group=on_group)
        wanted = grouping.prompts
        requests = [
            self._request(
                prompt,
                sampling,
                seed=f"{seed} {place}" if prompt.seed is None else f"{prompt.seed} {place % num_completions}",
            )
            for place, prompt in enumerate(wanted)
        ]
        if requests:
            self.engine.generate(
                requests,
                lambda place, sampled: grouping.add(place, self._completion(wanted[place], sampling, sampled)),
            )
        return grouping.groups()

    def metrics(self) -> dict[str, float]:
        """See Generator; vLLM's own metrics stay with vLLM."""
        return {}

    def _request(self, prompt: Prompt, sampling: Sampling, *, seed: str) -> Request:
        parameters = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": random.Random(seed).getrandbits(62),
            "max_tokens": token_limit(prompt, sampling),
            "stop_token_ids": list(self.ending.end_token_ids),
            "ignore_eos": not self.ending.end_token_ids,  # or vLLM's own end token would end what nothing is to end
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop text may hold one
            "logprobs": 0,  # of the sampled token, and of no other
        }
        return Request(prompt.token_ids, parameters)

    def _completion(self, prompt: Prompt, sampling: Sampling, sampled: Sampled) -> Completion:
        completion = self.ending.completion(prompt, sampling, sampled.token_ids, sampled.logprobs)
        length = len(completion.token_ids)
        if completion.finish_reason == "length" and length < token_limit(prompt, sampling):
            raise RuntimeError(
                f"vLLM ended a completion after {length} of {token_limit(prompt, sampling)} tokens, for the reason "
                f"{sampled.finish_reason!r}, without an end token or a stop text. Scored like this it would count as cut off."
            )
        return completion


def _make_engine(policy: Policy, config: Config) -> Engine:
    if config.vllm.mode == "server":
        from grpo.rollout.vllm_server import ServedEngine

        return ServedEngine(policy, config)
    from grpo.rollout.vllm_colocated import ColocatedEngine

    return ColocatedEngine(policy, config)


def check_available(config: Config) -> None:
    """Whether this machine can sample as configured; asks no model, so it can come before one is loaded.

    Raises:
        ValueError: vLLM is not installed, or there is no server that can do what the run needs.
    """
    if config.vllm.mode == "server":
        from grpo.rollout.vllm_server import check_server

        check_server(config)
    elif find_spec("vllm") is None:
        raise ValueError(
            "rollout.engine is vllm; the package vllm is not installed here. Install it with pip install 'vllm>=0.26,<0.29', or "
            "set rollout.engine to auto."
        )
