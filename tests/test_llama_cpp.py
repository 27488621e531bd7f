"""llama.cpp itself reads what is exported: the same token ids, and the model's own greedy answers.

Skips without the package xllamacpp, whose wheel holds llama.cpp's server (`pip install xllamacpp`).
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, save_family
from test_export import FAMILIES, SIZES, export, sentencepiece, spread_norms
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

llama_cpp = pytest.importorskip("xllamacpp")

TEXTS = (
    "User: What is 12+8+5-5+9?\nAssistant:",
    "A man's 3 apples, 33 pears and 333 plums; don't   he's WE'LL\n\n\n  indented\ttab",
    "<think> 12+8=20\n</think> <answer> 20 </answer>",
    "Größe, naïve, Привет, 你好, 🚀 and x² − 3·y ≤ 10⁻³",
)


STRETCHED = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}  # the texts have up to 60 tokens
MODELS = FAMILIES | {
    "linear": Qwen2Config(**SIZES, rope_parameters={**STRETCHED, "rope_type": "linear"}),
    "yarn": Qwen2Config(**SIZES, rope_parameters={**STRETCHED, "rope_type": "yarn", "beta_fast": 8.0}),
    "llama 3": LlamaConfig(
        **SIZES,
        rope_parameters={**STRETCHED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}


class LlamaCpp:
    """A server of llama.cpp within this process."""

    def __init__(self, file: Path) -> None:
        settings = llama_cpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = str(file), 256, 1, 1
        settings.cache_type_k = settings.cache_type_v = (
            llama_cpp.ggml_type.GGML_TYPE_F32
        )  # as transformers; usual is float16
        self.server = llama_cpp.Server(settings)

    def ask(self, path: str, **content: Any) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.server.listening_address}{path}", json.dumps(content).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def greedy(self, ids: list[int], num_tokens: int) -> list[int]:
        options = {"temperature": 0, "n_predict": num_tokens, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", prompt=ids, **options)["tokens"]


def shortfalls(lm: Any, ids: list[int], answer: list[int]) -> Tensor:
    """How many nats each token of an answer is less likely than the likeliest would be, after those before it; (T,)."""
    with torch.no_grad():
        logprobs = lm(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    return logprobs.max(-1).values - logprobs[range(len(answer)), answer]


NEAR = 0.01
"""Nats. Kernels of llama.cpp round otherwise; a tie within it may go either way. A wrong weight costs whole nats."""


@pytest.fixture(params=[*MODELS, "quickstart", "sentencepiece"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "quickstart":
        yield TINY / "model"
    elif request.param == "sentencepiece":
        yield sentencepiece(tmp_path, all_ways=True)
    else:
        yield save_family(tmp_path / "model", MODELS[request.param])


def test_llama_cpp_reads_text_and_answers_as_transformers(model: Path, tmp_path: Path):
    if model != TINY / "model":
        spread_norms(model)
    server = LlamaCpp(export(model, tmp_path / "out", "--quantization", "f32"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert server.tokenize(text) == ids, text
        answer = server.greedy(ids, 24)
        assert answer, text
        assert shortfalls(lm, ids, answer).max() < NEAR, text
    if "Qwen2" in type(lm).__name__:
        question = [{"role": "user", "content": "What is 12+8?"}]
        shown = server.ask("/apply-template", messages=question)["prompt"]
        assert shown == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
