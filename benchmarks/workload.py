"""What the benchmarks share: random weights in the shape of Qwen2.5, prompts of 90 to 199 random tokens, the device's times."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2Tokenizer, Qwen3MoeConfig

LONGEST_PROMPT = 199
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 2048,
    },
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "14b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "32b": {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "moe": {
        "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "head_dim": 64, "num_experts": 32,
        "num_experts_per_tok": 4, "moe_intermediate_size": 768, "vocab_size": 151936,
    },
    "tiny-moe": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 2048,
    },
}  # fmt: skip
"""Qwen2.5's, where they differ from `model_config`; tiny, the quickstart's with a larger vocabulary, is for a CPU. moe is a
Qwen3-MoE of 1.4 billion weights, 0.3 of which a token goes through."""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device_type() -> str:
    return "cuda" if on_gpu() else "cpu"


def device_name() -> str:
    return torch.cuda.get_device_name() if on_gpu() else "CPU"


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def model_config(size: str) -> Qwen2Config | Qwen3MoeConfig:
    smaller = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
    kind = Qwen3MoeConfig if "num_experts" in SHAPES[size] else Qwen2Config
    return kind(max_position_embeddings=131072, **{**smaller, **SHAPES[size]})


def random_lm(size: str) -> PreTrainedModel:
    """In bfloat16, on the GPU if there is one."""
    torch.manual_seed(0)
    with torch.device(device_type()):
        return AutoModelForCausalLM.from_config(model_config(size), dtype=torch.bfloat16)


def word_ids(size: str) -> range:
    """Tokens that are words of `word_tokenizer` in a model of this size."""
    return range(1000, min(100_000, model_config(size).vocab_size))


def prompt_ids(number: int, size: str) -> list[list[int]]:
    """Tokens of `number` prompts, the same in every call; each is a word."""
    rng, words = random.Random(0), word_ids(size)
    return [[rng.choice(words) for _ in range(rng.randrange(90, LONGEST_PROMPT + 1))] for _ in range(number)]


def word_tokenizer(vocab_size: int) -> Qwen2Tokenizer:
    """Words of up to four letters, each a token, so that text made of words reads back as the same tokens.

    Every id that a model can draw is some text. The end-of-sequence token has the first id that it cannot draw: no completion
    ends before its limit, in any library, and without changing how it samples.
    """
    all_words = ("Ġ" + "".join(letters) for n in range(1, 5) for letters in product(ascii_lowercase, repeat=n))
    others = [*ascii_lowercase, "Ġ", "<pad>"]
    words = list(islice(all_words, vocab_size - len(others)))
    vocabulary = {token: number for number, token in enumerate([*others, *words])}
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, pad_token="<pad>", unk_token="<pad>", eos_token="<end>", padding_side="left"
    )
    assert tokenizer.eos_token_id == vocab_size, f"the end token has id {tokenizer.eos_token_id}, which may be drawn"
    return tokenizer


def saved_model(size: str, cache: Path, *, teaches: bool = False) -> Path:
    """A directory with the random model and its tokenizer. Rank 0 writes it, once; the other processes wait for it.

    Args:
        teaches: with a row for the end-of-sequence token, too, which a teacher must have.
    """
    directory = cache / f"qwen2.5-{size}{'-teacher' * teaches}"
    if not directory.exists() and os.environ.get("RANK", "0") == "0":
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        lm = random_lm(size)
        if teaches:
            lm.resize_token_embeddings(model_config(size).vocab_size + 128)
        lm.save_pretrained(unfinished)
        word_tokenizer(model_config(size).vocab_size).save_pretrained(unfinished)
        unfinished.rename(directory)
        torch.cuda.empty_cache()
    while not directory.exists():
        time.sleep(0.1)
    return directory


def with_ends(model: Path, mean_tokens: int) -> Path:
    """The same random model with so many end-of-sequence tokens that a completion has about `mean_tokens` tokens.

    Each token is one of them with the same chance, so lengths are distributed geometrically: of 256 completions the longest is
    about six times as long as the mean.
    """
    directory = model.with_name(f"{model.name}-ends-{mean_tokens}")
    if not directory.exists() and os.environ.get("RANK", "0") == "0":
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(model, unfinished, copy_function=os.link)
        size = json.loads((model / "config.json").read_text())["vocab_size"]
        (unfinished / "generation_config.json").unlink(missing_ok=True)  # else it would be the other model's, too
        ends = [*range(size - size // mean_tokens, size)]
        (unfinished / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        unfinished.rename(directory)
    while not directory.exists():
        time.sleep(0.1)
    return directory


def device_activities() -> list[ProfilerActivity]:
    """What a profiler watches to see kernels; the operators, without a GPU."""
    return [ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU]


def kernels_of(profiler: profile) -> list[tuple[str, float, int]]:
    """Name, seconds and calls of each kernel (operator, without a GPU), the costliest first."""
    kind, time_of = (DeviceType.CUDA, "self_device_time_total") if on_gpu() else (DeviceType.CPU, "self_cpu_time_total")
    every = [each for each in profiler.key_averages() if each.device_type == kind and not each.is_user_annotation]
    return sorted(((each.key, getattr(each, time_of) / 1e6, each.count) for each in every), key=lambda each: -each[1])


def costliest(profiler: profile, rows: int = 30) -> str:
    """A table of the first of them: time, share, calls, time of a call."""
    kernels = kernels_of(profiler)
    whole = sum(seconds for _, seconds, _ in kernels)
    lines = [
        f"{seconds * 1e3:10.2f} ms{seconds / whole:6.1%}{count:8}{seconds / count * 1e6:10.1f} us  {name[:70]}"
        for name, seconds, count in kernels[:rows]
    ]
    return "\n".join(lines)
