"""Rollout speed of the native engine beside transformers' `generate` and its continuous batching, in one command.

The fixed workload: random weights in the shape of Qwen2.5, prompts of 90 to 199 random tokens, exactly --new-tokens each.

    python benchmarks/rollout.py --size 0.5b --prompts 32 --completions 8 --peers generate continuous

A real length distribution, where answers end by themselves:

    python benchmarks/rollout.py --model DIR --questions test.jsonl --prompts 128 --completions 8 --new-tokens 1024
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from workload import SHAPES, prompt_ids, random_lm

from grpo.config import DataConfig, ModelConfig
from grpo.policy import end_token_ids, lay_out
from grpo.prompts import TEMPLATES, build_prompts
from grpo.rollout.decoder import CHUNK, LENGTH, REMAINING, Decoder
from grpo.rollout.ending import Ending
from grpo.rollout.engine import Call, make_decoder
from grpo.rollout.layers import can_fuse
from grpo.rollout.paged import num_pages_for
from grpo.rows import load_rows
from grpo.types import Prompt, Sampling

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart" / "model"


def main() -> None:
    args = parse_args()
    lm, ending = load(args)
    prompts = questions(args, ending) if args.questions else random_prompts(args.prompts)
    sampling = Sampling(max_tokens=args.new_tokens, temperature=args.temperature)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args}", flush=True)
    native(lm, ending, prompts, sampling, args)
    if "generate" in args.peers:
        peer(f"generate, {args.peer_batch} at once", lambda s: generate(lm, ending, prompts, s, args), sampling)
    if "continuous" in args.peers:
        peer("continuous batching", lambda s: continuous_batching(lm, ending, prompts, s, args), sampling)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.5b", help="shape of the random weights")
    parser.add_argument("--model", help="directory of a real model instead")
    parser.add_argument(
        "--questions", type=Path, help="its questions: .jsonl or .jsonl.gz with a `question` in each row"
    )
    parser.add_argument("--template", default="r1_zero", choices=TEMPLATES)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--completions", type=int, default=8, help="per prompt")
    parser.add_argument("--new-tokens", type=int, default=512, help="per completion; at most, with --questions")
    parser.add_argument("--slots", type=int, default=0, help="completions at once; 0: all")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--plain-layers", action="store_true", help="the model's own layers instead of the fused ones")
    parser.add_argument("--repeats", type=int, default=3, help="calls after the first, at least 1")
    parser.add_argument("--profile", action="store_true", help="kernels of a decoding step")
    parser.add_argument("--peers", nargs="*", default=[], choices=["generate", "continuous"])
    parser.add_argument("--peer-batch", type=int, default=256, help="completions that `generate` runs at once")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Any, Ending]:
    torch.manual_seed(0)
    if args.model:
        lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ends = end_token_ids(ModelConfig(name=args.model), tokenizer)
    else:
        lm = random_lm(args.size)
        tokenizer, ends = AutoTokenizer.from_pretrained(QUICKSTART), []
    lay_out(lm.eval(), torch.device("cuda"))
    return lm, Ending(tokenizer, ends)


def random_prompts(number: int) -> list[Prompt]:
    return [Prompt(i, tokens, "", "", {}) for i, tokens in enumerate(prompt_ids(number))]


def questions(args: argparse.Namespace, ending: Ending) -> list[Prompt]:
    data = DataConfig(name=str(args.questions), template=args.template)
    return build_prompts(load_rows(data)[: args.prompts], ending.tokenizer, data)[0]


def native(lm: Any, ending: Ending, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace) -> None:
    lm.set_attn_implementation("paged")
    longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_tokens
    decoder = make_decoder(
        lm,
        ending.end_token_ids,
        num_slots=args.slots or len(prompts) * args.completions,
        pages_each=num_pages_for(longest),
        gib=None,
        fused=can_fuse(lm) and not args.plain_layers,
    )
    decoder.check_weights()
    seconds, calls, starts = [], [], []
    with torch.no_grad():
        for repeat in range(args.repeats + 1):
            call = Call(decoder, ending, prompts, sampling, num_completions=args.completions, seed=repeat)
            torch.cuda.synchronize()
            start = time.perf_counter()
            call.run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            calls.append(call)
            starts.append(start)
    print(f"native: first call {seconds[0]:.1f} s, with compiling and capturing {len(decoder._graphs)} graphs")
    middle = sorted(range(1, len(seconds)), key=seconds.__getitem__)[(len(seconds) - 1) // 2]
    call, took, start = calls[middle], seconds[middle], starts[middle]
    num_tokens = sum(len(completion.token_ids) for completion in call.completions if completion is not None)
    report("native", num_tokens, took)
    launches = [at - start for at, _ in call.timeline]
    print(
        f"  first step launched after {launches[0] * 1e3:.0f} ms, the last {(took - launches[-1]) * 1e3:.0f} ms before the end; "
        f"mean length {num_tokens / len(call.completions):.0f}\n  {call.metrics()}"
    )
    lens = [
        len(prompt.token_ids) + len(c.token_ids) // 2 for prompt, c in zip(call.prompts, call.completions, strict=True)
    ]
    rate = step_rate(decoder, sum(lens) // len(lens), args)
    print(f"  with all slots busy from first to last it would take {1 - num_tokens / rate / took:.0%} less", flush=True)


def step_rate(decoder: Decoder, middle: int, args: argparse.Namespace) -> float:
    """Tokens per second of a captured step with all slots busy and `middle` tokens each, without host or prefill."""
    size = decoder.state.shape[1]
    graph = decoder._graph(size)

    def reset() -> None:
        decoder.state[LENGTH] = middle
        decoder.state[REMAINING] = 10_000
        pages = torch.arange(decoder.table.numel(), dtype=torch.int32, device="cuda") % (
            decoder.cache.keys.shape[1] - 1
        )
        decoder.table.copy_(1 + pages.view_as(decoder.table))
        decoder.step_number.zero_()

    reset()
    for _ in range(CHUNK):
        graph.replay()
    reset()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CHUNK):
        graph.replay()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / CHUNK * 1e3
    print(
        f"  decoding step, {size} rows of {middle} tokens: {milliseconds:.2f} ms = {size / milliseconds * 1e3:,.0f} tokens/s"
    )
    if args.profile:
        from torch.profiler import ProfilerActivity, profile

        reset()
        with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(CHUNK):
                graph.replay()
            torch.cuda.synchronize()
        table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=64)
        print(table, flush=True)
    return size / milliseconds * 1e3


def peer(name: str, run: Callable[[Sampling], int], sampling: Sampling) -> None:
    """After a short warm-up. A peer that fails is reported and does not take the others' numbers with it."""
    try:
        with torch.no_grad():
            run(replace(sampling, max_tokens=8))
            torch.cuda.synchronize()
            start = time.perf_counter()
            num_tokens = run(sampling)
            torch.cuda.synchronize()
        report(name, num_tokens, time.perf_counter() - start)
    except Exception as error:
        print(f"{name}: failed with {type(error).__name__}: {str(error)[:300]}", flush=True)


def report(name: str, num_tokens: int, seconds: float) -> None:
    print(f"{name}: {num_tokens:,} tokens in {seconds:.2f} s = {num_tokens / seconds:,.0f} tokens/s", flush=True)


def generation_config(ending: Ending, sampling: Sampling) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0, max_new_tokens=sampling.max_tokens,
        eos_token_id=ending.end_token_ids or -1, pad_token_id=0,
    )  # fmt: skip


def generate(lm: Any, ending: Ending, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace) -> int:
    lm.set_attn_implementation("sdpa")
    wanted = [prompt.token_ids for prompt in prompts for _ in range(args.completions)]
    total = 0
    for start in range(0, len(wanted), args.peer_batch):
        part = wanted[start : start + args.peer_batch]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device="cuda")
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device="cuda")
        output = lm.generate(ids, attention_mask=mask, generation_config=generation_config(ending, sampling))
        total += sum(ending.find(row, ())[0] for row in output[:, longest:].tolist())
    return total


def continuous_batching(
    lm: Any, ending: Ending, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace
) -> int:
    from transformers import ContinuousBatchingConfig

    lm.set_attn_implementation("sdpa")
    settings = ContinuousBatchingConfig(return_logprobs=True, max_memory_percent=0.5)
    output = lm.generate_batch(
        [prompt.token_ids for prompt in prompts for _ in range(args.completions)],
        generation_config=generation_config(ending, sampling),
        continuous_batching_config=settings,
    )
    return sum(len(each.generated_tokens) for each in output.values())


if __name__ == "__main__":
    main()
