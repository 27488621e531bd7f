"""Rollout speed of the native engine beside vLLM, transformers' `generate` and its continuous batching, in one command.

The fixed workload: random weights in the shape of Qwen2.5, prompts of 90 to 199 random tokens, exactly --new-tokens each.

    python benchmarks/rollout.py --size 0.5b --prompts 32 --completions 8 --peers vllm generate continuous

A real length distribution, where answers end by themselves:

    python benchmarks/rollout.py --model DIR --questions test.jsonl --prompts 128 --completions 8 --new-tokens 1024

Without a GPU, to see that it runs:

    python benchmarks/rollout.py --size tiny --prompts 2 --completions 2 --new-tokens 8 --peers generate continuous

The engine is called as a run calls it, through `sample`. Only its launches are watched from within, and a decoding step is timed
alone, on sequences that are made up (see the end of this file).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.profiler import profile
from transformers import GenerationConfig
from vllm_rollout import MARK
from workload import SHAPES, costliest, device_activities, device_name, on_gpu, prompt_ids, saved_model, synchronize

from grpo.config import DataConfig, ModelConfig
from grpo.data.prompts import TEMPLATES, build_prompts
from grpo.data.rows import load_rows
from grpo.inference.model import Sampler, load, sampling_config
from grpo.observe.console import positive
from grpo.policy.sampled_model import SampledModel
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout.decoder import Decoder
from grpo.rollout.paged import PAGE, num_pages_for
from grpo.rollout.slots import READ_AHEAD, Sequence
from grpo.rollout.stop_criteria import Ending
from grpo.system import distributed
from grpo.types import Completion, Prompt, Sampling

FIRST_CALL = 512
"""Tokens of a completion in a first call that is short; the time of the first does not count."""


def main() -> None:
    args = parse_args()
    model, prompts = model_and_prompts(args)
    sampling = Sampling(max_tokens=args.new_tokens, temperature=args.temperature)
    print(f"{device_name()}, torch {torch.__version__}; {shlex.join(sys.argv)}", flush=True)
    sampler, seconds = make_sampler(model, prompts, args)
    records = [native("native", sampler, prompts, sampling, args) | {"start_seconds": seconds}]
    if args.fp8:
        records.append(native("native, 8 bits", sampler, prompts, replace(sampling, weights="fp8"), args))
    model = sampler.model
    del sampler  # the engine's keys and values are not to lie beside the peers' own
    records += [record for name in args.peers for record in peer(name, model, prompts, sampling, args)]
    distributed.stop()
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.5b", help="shape of the random weights")
    parser.add_argument("--model", help="directory of a real model instead")
    parser.add_argument(
        "--questions", type=Path, help="its questions: .jsonl or .jsonl.gz with a `question` in each row"
    )
    parser.add_argument("--template", default="r1_zero", choices=TEMPLATES)
    parser.add_argument("--prompts", type=positive, default=32)
    parser.add_argument("--completions", type=positive, default=8, help="per prompt")
    parser.add_argument("--new-tokens", type=positive, default=512, help="per completion; at most, with --questions")
    parser.add_argument("--slots", type=int, default=0, help="completions at once; 0: all")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--plain-layers", action="store_true", help="the model's own layers instead of the fused ones")
    parser.add_argument("--fp8", action="store_true", help="once more with weights in 8 bits (rollout.weights)")
    parser.add_argument("--repeats", type=positive, default=3, help="calls after the first")
    parser.add_argument("--profile", action="store_true", help="kernels of a decoding step")
    parser.add_argument("--peers", nargs="*", default=[], choices=[*PEERS, "vllm"])
    parser.add_argument("--peer-batch", type=positive, default=256, help="completions that `generate` runs at once")
    parser.add_argument("--out", type=Path, help="append the results to this file, a line of JSON each")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where the random models are kept")
    return parser.parse_args()


def model_and_prompts(args: argparse.Namespace) -> tuple[str, list[Prompt]]:
    model = args.model or str(saved_model(args.size, args.cache))
    if args.questions is None:
        return model, [Prompt(i, tokens, "", "", {}) for i, tokens in enumerate(prompt_ids(args.prompts, args.size))]
    data = DataConfig(name=str(args.questions), template=args.template)
    tokenizer = load_tokenizer(ModelConfig(name=model))
    return model, build_prompts(load_rows(data)[: args.prompts], tokenizer, data)[0]


def make_sampler(model: str, prompts: list[Prompt], args: argparse.Namespace) -> tuple[Sampler, float]:
    """The model with the native engine, and the seconds until it is ready to sample."""
    start = time.perf_counter()
    config = sampling_config(
        model,
        max_prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        max_completion_tokens=args.new_tokens,
        engine="native",
        max_sequences=args.slots or len(prompts) * args.completions,
    )
    config.rollout.fused_layers = not args.plain_layers
    config.rollout.weights = "fp8" if args.fp8 else "policy"
    sampler = load(config, load_tokenizer(config.model))
    synchronize()
    return sampler, time.perf_counter() - start


# ---- the native engine -----------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of `sample`, as it looks from outside, and when its steps were launched."""

    seconds: float
    completions: list[Completion]
    launches: list[tuple[float, int]]  # of each chunk of steps: seconds after the start of the call, rows of its graph
    metrics: dict[str, float]

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


def native(
    name: str, sampler: Sampler, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace
) -> dict[str, Any]:
    """What the median of the calls after the first has measured, which is printed as well."""
    # where all have one length and keep their places, a few hundred tokens of it capture and compile all there is
    is_short = args.questions is None and holds_all(decoder_of(sampler))
    first = replace(sampling, max_tokens=min(FIRST_CALL, sampling.max_tokens)) if is_short else sampling
    calls = [
        timed_call(sampler, prompts, sampling if seed else first, args.completions, seed)
        for seed in range(args.repeats + 1)
    ]
    middle = sorted(calls[1:], key=lambda call: call.seconds)[(args.repeats - 1) // 2]
    mean_length = middle.num_tokens / len(middle.completions)
    before, after = middle.launches[0][0], middle.seconds - middle.launches[-1][0]
    num_sizes = len({size for _, size in calls[0].launches})
    print(
        f"{name}: the first call took {calls[0].seconds:.1f} s, with compiling and capturing steps of {num_sizes} sizes"
    )
    record = report(name, middle.num_tokens, middle.seconds)
    print(
        f"  first step launched after {before * 1e3:.0f} ms, the last {after * 1e3:.0f} ms before the end; "
        f"mean length {mean_length:.0f}\n  {middle.metrics}"
    )
    at = round(fmean(len(prompt.token_ids) for prompt in prompts) + mean_length / 2)
    with sampler.model.sampling_model("paged"):
        num_slots, step = time_a_step(decoder_of(sampler), at, sampling, with_kernels=args.profile)
    saved = 1 - middle.num_tokens * step / num_slots / middle.seconds
    print(f"  decoding step, {num_slots} rows of {at} tokens: {step * 1e3:.2f} ms = {num_slots / step:,.0f} tokens/s")
    print(f"  with all slots busy from first to last it would take {saved:.0%} less", flush=True)
    return record | {
        "first_call_seconds": calls[0].seconds, "calls": [call.seconds for call in calls], "step_seconds": step, "step_at": at,
        "mean_length": mean_length, "metrics": middle.metrics, "command": shlex.join(sys.argv), "device": device_name(),
    }  # fmt: skip


def holds_all(decoder: Decoder) -> bool:
    """Whether there are pages for a sequence of full length in each slot, so that none is preempted: steps of fewer rows, which
    are captured on their own, come late in a call otherwise."""
    num_slots, pages_each = decoder.table.shape
    # besides its own pages a sequence holds its prefix's last, part-filled one
    return decoder.cache.keys.shape[1] * (1 - READ_AHEAD) >= num_slots * (pages_each + 1)


def timed_call(sampler: Sampler, prompts: list[Prompt], sampling: Sampling, num_completions: int, seed: int) -> Call:
    with launches_of(decoder_of(sampler)) as launches:
        synchronize()
        start = time.perf_counter()
        groups = sampler.generator.sample(prompts, sampling, num_completions=num_completions, seed=seed)
        synchronize()
        seconds = time.perf_counter() - start
    completions = [completion for group in groups for completion in group.completions]
    return Call(seconds, completions, [(at - start, size) for at, size in launches], sampler.generator.metrics())


# ---- the peers -------------------------------------------------------------------------------------------------------


def peer(
    name: str, model: SampledModel, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """After a short warm-up. A peer that fails is reported and does not take the others' numbers with it."""
    try:
        if name == "vllm":
            return vllm(prompts, sampling, args)
        with torch.no_grad(), model.sampling_model("sdpa") as lm:
            ending = Ending(model.tokenizer, model.end_token_ids)
            PEERS[name](lm, ending, prompts, replace(sampling, max_tokens=min(8, sampling.max_tokens)), args)
            synchronize()
            start = time.perf_counter()
            num_tokens = PEERS[name](lm, ending, prompts, sampling, args)
            synchronize()
            return [report(name, num_tokens, time.perf_counter() - start)]
    except Exception as error:
        print(f"{name}: failed with {type(error).__name__}: {str(error)[:300]}", flush=True)
        return []


def report(name: str, num_tokens: int, seconds: float) -> dict[str, Any]:
    print(f"{name}: {num_tokens:,} tokens in {seconds:.2f} s = {num_tokens / seconds:,.0f} tokens/s", flush=True)
    return {"name": name, "num_tokens": num_tokens, "seconds": seconds, "tokens_per_second": num_tokens / seconds}


def generation_config(ending: Ending, sampling: Sampling) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0, max_new_tokens=sampling.max_tokens,
        eos_token_id=ending.end_token_ids, pad_token_id=0,
    )  # fmt: skip


def generate(lm: Any, ending: Ending, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace) -> int:
    """transformers' own, --peer-batch completions at once; the number of tokens."""
    wanted = [prompt.token_ids for prompt in prompts for _ in range(args.completions)]
    total = 0
    for start in range(0, len(wanted), args.peer_batch):
        part = wanted[start : start + args.peer_batch]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=lm.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=lm.device)
        output = lm.generate(ids, attention_mask=mask, generation_config=generation_config(ending, sampling))
        total += sum(ending.find(row, ())[0] for row in output[:, longest:].tolist())
    return total


def continuous_batching(
    lm: Any, ending: Ending, prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace
) -> int:
    """transformers' own; the number of tokens."""
    from transformers import ContinuousBatchingConfig

    memory = {"max_memory_percent": 0.5} if on_gpu() else {"num_blocks": 64, "max_batch_tokens": 1024}
    output = lm.generate_batch(
        [prompt.token_ids for prompt in prompts for _ in range(args.completions)],
        generation_config=generation_config(ending, sampling),
        continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True, **memory),
    )
    return sum(len(each.generated_tokens) for each in output.values())


PEERS = {"generate": generate, "continuous": continuous_batching}
"""Those that take the model as it is loaded here."""


def vllm(prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace) -> list[dict[str, Any]]:
    """In a process of its own, by the median of as many calls as ours."""
    asked = {
        "model": args.model or str(saved_model(args.size, args.cache)), "prompts": [prompt.token_ids for prompt in prompts],
        "completions": args.completions, "new_tokens": sampling.max_tokens, "temperature": sampling.temperature,
        "ends": args.questions is not None, "repeats": args.repeats,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("vllm_rollout.py"))],
        input=json.dumps(asked) + "\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    records = [report(each["name"], each["num_tokens"], each["seconds"]) for each in map(json.loads, lines)]
    if done.returncode:
        print(f"vllm: failed with exit code {done.returncode}: {done.stdout.strip()[-300:]}", flush=True)
    return records


# ---- what is looked at inside the engine: its decoder, and there `begin` and `decode` ----------------------------------


def decoder_of(sampler: Sampler) -> Decoder:
    return sampler.generator._decoder


@contextmanager
def launches_of(decoder: Decoder) -> Iterator[list[tuple[float, int]]]:
    """When each chunk of steps is launched meanwhile, and the rows of its graph."""
    launches: list[tuple[float, int]] = []
    decode = decoder.decode

    def watched(rows: list[Sequence]) -> Any:
        at = time.perf_counter()
        chunk = decode(rows)
        launches.append((at, chunk.num_places // decoder.chunk))
        return chunk

    decoder.decode = watched
    try:
        yield launches
    finally:
        del decoder.decode  # the method of its class again


@torch.no_grad()
def time_a_step(decoder: Decoder, at: int, sampling: Sampling, *, with_kernels: bool) -> tuple[int, float]:
    """Rows of a step with all slots busy and about `at` tokens in each, and its seconds, without prompts and results.

    On a GPU it is a captured graph. With kernels, the costliest of them are printed.
    """
    rows = made_up(decoder, at, num_steps=2 * TIMED_STEPS + decoder.chunk)
    decoder.begin(sampling)
    decoder.decode(rows)  # compiles and captures, if that has not been done yet
    synchronize()
    start = time.perf_counter()
    launch(decoder, rows)
    seconds = (time.perf_counter() - start) / TIMED_STEPS
    if with_kernels:
        with profile(activities=device_activities()) as profiler:
            launch(decoder, rows)
        print(f"  {TIMED_STEPS} decoding steps:\n{costliest(profiler)}", flush=True)
    return len(rows), seconds


TIMED_STEPS = 16


def launch(decoder: Decoder, rows: list[Sequence]) -> None:
    for _ in range(TIMED_STEPS // decoder.chunk):
        decoder.decode(rows)
    synchronize()


def made_up(decoder: Decoder, at: int, *, num_steps: int) -> list[Sequence]:
    """A sequence for each slot, of `at` tokens or as many as leave room for the steps; where pages run out, they share some."""
    num_slots, pages_each = decoder.table.shape
    length = max(min(at, pages_each * PAGE - num_steps), 1)
    pages = cycle(range(1, decoder.cache.keys.shape[1]))  # page 0 is nobody's
    own = num_pages_for(length + num_steps)
    return [
        Sequence(slot, [0] * (length + 1), num_steps + 1, seed=slot, own=list(islice(pages, own)))
        for slot in range(num_slots)
    ]


if __name__ == "__main__":
    main()
