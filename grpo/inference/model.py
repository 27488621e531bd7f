"""A model that is only sampled: no optimizer, no reference, no DeepSpeed. What evaluates, samples and chats loads this.

    config = sampling_config(model_directory("runs/gsm8k"), max_prompt_tokens=300, max_completion_tokens=1024)
    tokenizer = load_tokenizer(config.model)
    sampler = load(config, tokenizer)
    sampler.generator.sample(prompts, Sampling(1024, temperature=0.6), num_completions=4, seed=0)

Started by torchrun or `accelerate launch`, every process has the whole model and samples its share of the prompts.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo.config import Config, ModelConfig
from grpo.policy.families import attribute, unsharded
from grpo.policy.language_model import lay_out, load_lm, resolve_dtype
from grpo.policy.model_source import base_quantization, source_of
from grpo.policy.sampled_model import SampledModel
from grpo.policy.tokenizer import check_context
from grpo.rollout import make_generator
from grpo.rollout.paged import PagedCache, num_pages_for
from grpo.system import distributed, progress
from grpo.system.distributed import Processes
from grpo.system.files import checksum
from grpo.system.out_of_memory import free_bytes
from grpo.types import Generator


@dataclass(frozen=True)
class Sampler:
    """A model with what samples from it."""

    model: SampledModel
    generator: Generator

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @property
    def processes(self) -> Processes:
        return self.model.processes


def fingerprint(model: str, revision: str) -> str:
    """What tells a model's files from others of the same name: the commit of the hub, or the checksum of a directory's files."""
    if not Path(model).is_dir():
        settings, _ = PretrainedConfig.get_config_dict(model, revision=revision)
        return str(settings["_commit_hash"])
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    with progress.busy("reading the model's files"):
        return xxhash.xxh3_128(repr([(path.name, checksum(path)) for path in files]).encode()).hexdigest()


def sampling_config(
    model: str,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    revision: str = "main",
    dtype: str = "auto",
    engine: str = "auto",
    max_sequences: int | None = None,
    kv_cache_gib: float | None = None,
    trust_remote_code: bool = False,
) -> Config:
    """The settings of a run as far as a sampler reads them: see `model`, `rollout` and `memory` in grpo/config/settings.py.

    Raises:
        ValueError: see Config; the engine is vLLM; or the model knows fewer positions than a sequence may have.
    """
    if engine == "vllm":
        raise ValueError(
            "rollout.engine is vllm; it takes its weights from a policy that is trained, and here none is. Set it to auto."
        )
    rollout: dict[str, Any] = {"max_completion_tokens": max_completion_tokens, "engine": engine}
    most = max_prompt_tokens + max_completion_tokens
    memory: dict[str, Any] = {"kv_cache_gib": kv_cache_gib, "micro_batch_tokens": most}
    if max_sequences is not None:
        memory["max_sequences"] = max_sequences
    config = Config(
        model={"name": model, "revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code},
        data={"max_prompt_tokens": max_prompt_tokens},
        rollout=rollout,
        memory=memory,
        run={"dir": "", "steps": 1},
    )
    check_context(config)
    return config


def load(config: Config, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """Load the model of a configuration and make its engine. Every process calls it.

    Raises:
        ValueError: the model is not there, or the engine cannot run it here.
    """
    model = load_model(config, tokenizer)
    lm = model.lm
    if model.processes.device.type == "cpu":
        most = max_sequences_in_memory(lm, config.max_sequence_tokens)
        if config.memory.max_sequences > most:
            memory = config.memory.model_copy(update={"max_sequences": most})
            config = config.model_copy(update={"memory": memory})
    return Sampler(model, make_generator(config, model))


def load_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> SampledModel:
    """The model of a configuration without an engine. Every process calls it.

    Raises:
        ValueError: the model is not there.
    """
    processes = distributed.join()
    with unsharded():  # whatever a trainer of this process has set up
        lm = merged(load_lm(config.model, dtype=resolve_dtype(config.model.dtype)), config.model)
    lm.requires_grad_(False).eval()
    lay_out(lm, processes.device)
    if processes.device.type == "cpu":
        use_fastest_threads(lm)
    return SampledModel(lm, config.model, tokenizer, processes)


def max_sequences_in_memory(lm: PreTrainedModel, num_tokens: int) -> int:
    """How many sequences of so many tokens a CPU's memory holds at once, with their logits, in MEMORY_SHARE of what is free.

    A GPU says when its memory is full; on a CPU the system kills the process.
    """
    config = lm.config.get_text_config()
    heads = attribute(config, "num_attention_heads") or 1
    kv_heads = attribute(config, "num_key_value_heads") or heads
    head_dim = attribute(config, "head_dim") or config.hidden_size // heads
    dtype = next(lm.parameters()).dtype
    page = PagedCache.bytes_per_page(
        num_layers=config.num_hidden_layers, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    each = num_pages_for(num_tokens) * page + LOGITS_COPIES * 4 * config.vocab_size
    return max(1, int(MEMORY_SHARE * free_bytes(torch.device("cpu")) / each))


MEMORY_SHARE = 0.25

LOGITS_COPIES = 8
"""In float32, that drawing a token has in memory at once: scaled, sorted, cumulative in float64, ..."""


def use_fastest_threads(lm: PreTrainedModel) -> None:
    """Let torch use one thread instead of one for each processor, if a step is not clearly faster with more.

    For a small model they wait for each other, and for the processes that grade: 256 questions x 4 completions of the
    quickstart's model took 283 s with two threads on two processors, and 72 s with one. OMP_NUM_THREADS decides if it is set.
    """
    usual = torch.get_num_threads()
    if usual == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    seconds = {}
    for number in (usual, 1):
        torch.set_num_threads(number)
        _timed_step(lm)
        seconds[number] = min(_timed_step(lm) for _ in range(3))
    if seconds[usual] * WORTH_THREADS < seconds[1]:
        torch.set_num_threads(usual)


WORTH_THREADS = 1.3
"""How much faster a step has to be with all threads."""


def _timed_step(lm: PreTrainedModel) -> float:
    """Seconds that 64 sequences of one token take."""
    start = time.perf_counter()
    with torch.no_grad():
        lm(input_ids=torch.zeros(64, 1, dtype=torch.int64), use_cache=False)
    return time.perf_counter() - start


def merged(lm: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """With the adapter, if `model.name` is one, in its weights.

    Raises:
        ValueError: it was trained over weights in 4 bits, and these are not.
    """
    adapter = source_of(config).adapter
    if adapter is not None:
        if base_quantization(adapter) is not None:
            raise ValueError(
                f"--model is {config.name!r}, an adapter that was trained over weights in 4 bits; over those of its model it "
                "says something else. Name the folder hf beside it, which is the merged model."
            )
        from peft import PeftModel

        PeftModel.from_pretrained(lm, str(adapter)).merge_and_unload()
    return lm
