"""vLLM on the workload of rollout.py, which starts it in a process of its own; see there.

It reads a line of JSON: model, prompts (token ids), completions, new_tokens, temperature, ends (whether an end-of-sequence token
ends a completion), repeats. It prints one for each way it was asked: without log-probabilities, and with those of the sampled
tokens, which training needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in one process, the faster of the two ways

import torch

MARK = "measured "
"""How a line of results begins; vLLM prints its own to the same stream."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192)
"""Batches of which a graph is captured, and from 256 on every 64."""


def main() -> None:
    from vllm import LLM

    asked = json.loads(sys.stdin.readline())
    num_sequences = len(asked["prompts"]) * asked["completions"]
    free, total = torch.cuda.mem_get_info()
    sizes = sorted({*(size for size in SIZES if size < num_sequences), *range(256, num_sequences, 64), num_sequences})
    lm = LLM(
        asked["model"],
        dtype="bfloat16",
        max_num_seqs=num_sequences,
        max_model_len=max(map(len, asked["prompts"])) + asked["new_tokens"] + 8,
        max_num_batched_tokens=16384,
        gpu_memory_utilization=0.8 * free / total,
        compilation_config={"cudagraph_capture_sizes": sizes},
        disable_log_stats=True,
        seed=0,
    )
    for logprobs in (None, 0):
        calls = [timed_call(lm, asked, logprobs) for _ in range(asked["repeats"] + 1)][1:]
        num_tokens, seconds = sorted(calls, key=lambda call: call[1])[(len(calls) - 1) // 2]
        name = "vllm" if logprobs is None else "vllm with log-probabilities"
        print(f"\n{MARK}{json.dumps({'name': name, 'num_tokens': num_tokens, 'seconds': seconds})}", flush=True)


def timed_call(lm: Any, asked: dict[str, Any], logprobs: int | None) -> tuple[int, float]:
    """Tokens and seconds; nothing is left of the prompts of the call before."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        n=asked["completions"],
        temperature=asked["temperature"],
        max_tokens=asked["new_tokens"],
        ignore_eos=not asked["ends"],
        logprobs=logprobs,
    )
    lm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = lm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(each.token_ids) for output in outputs for each in output.outputs), seconds


if __name__ == "__main__":
    main()
