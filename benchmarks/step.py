"""A whole training step through `grpo.Trainer`, beside TRL's in the same command: seconds, tokens per second, memory.

The fixed workload: random weights in the shape of Qwen2.5, bfloat16 on CUDA, AdamW on all of them, a reference (kl_coef 0.001),
temperature 1, random rewards; --prompts x --completions per process, prompts of 90 to 199 random tokens, exactly --new-tokens
in each completion.

    python benchmarks/step.py --size 0.5b --peers trl trl-liger --profile
    python benchmarks/step.py --size 1.5b --set memory.micro_batch_tokens=32768 --out one.jsonl

Several GPUs, with the same work for each; beside the run on one, the ratio of the steps is the efficiency of scaling:

    accelerate launch --num_processes 2 --multi_gpu benchmarks/step.py --size 1.5b --set distributed.zero_stage=3 \
--compare one.jsonl

The update alone, on completions that are made up, in seconds:

    python benchmarks/step.py --size 0.5b --update-only --steps 5 --profile --set memory.micro_batch_tokens=32768

The same of a model of which each GPU has its share alone, as beside a vLLM server:

    accelerate launch --num_processes 2 --multi_gpu benchmarks/step.py --size 7b --update-only --sampled-elsewhere \
--set distributed.zero_stage=3

On-policy distillation, in which a teacher stands where the reference does:

    python benchmarks/step.py --size 0.5b --teacher 1.5b --set memory.micro_batch_tokens=32768

Keys and values that are given back before the update; the peaks of the phases, and what giving back and taking again takes:

    python benchmarks/step.py --size 0.5b --set memory.micro_batch_tokens=32768 memory.release_kv_cache=true

Lengths as a model has them that ends by itself, of --mean-tokens on average and a tail up to --new-tokens, where
rollout.carry_over counts; two runs side by side, by the mean of their steps:

    python benchmarks/step.py --size 0.5b --mean-tokens 300 --new-tokens 1024 --warmup 4 --steps 12 --out plain.jsonl
    python benchmarks/step.py --size 0.5b --mean-tokens 300 --new-tokens 1024 --warmup 4 --steps 12 --compare plain.jsonl \
--set rollout.carry_over=true algorithm.importance=truncate algorithm.importance_high=2

Without a GPU, to see that it runs:

    python benchmarks/step.py --size tiny --prompts 2 --completions 4 --new-tokens 16 --peers trl --peer-micro-batch 4

Every number is the median of --steps steps after --warmup, with --mean-tokens the mean. The update has two rates: in tokens
of the sequences, each with a prompt of its own (`throughput/update`), and in those of them that are read, since a prompt goes
through the model once for all its completions in a pass. What it needs in TFLOP is counted over those that are read
(`update_flops`).

The peers are started after our own run, each in a process of its own, on the model that our run has saved under --cache. TRL
without DeepSpeed keeps weights and optimizer in bfloat16, 6 bytes per parameter; ours keeps float32 masters and moments too, 14
bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from card import matrix_rate
from random_reward import random_reward
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, Qwen2Config, Qwen3MoeConfig
from trl_step import measure_trl
from workload import (
    LONGEST_PROMPT,
    SHAPES,
    costliest,
    device_name,
    kernels_of,
    model_config,
    on_gpu,
    prompt_ids,
    saved_model,
    synchronize,
    with_ends,
)

from grpo import Config, Trainer
from grpo.check.dry_run import policy_that
from grpo.config import write_yaml
from grpo.rollout.engine import NativeGenerator
from grpo.rollout.grouping import all_at_once
from grpo.system import distributed, mapped_memory
from grpo.system.mapped_memory import MappedMemory
from grpo.types import Completion, Group, MicroBatch, OnGroup, Prompt, Sampling

GIB = 2**30
PEERS = {"trl": partial(measure_trl, liger=False), "trl-liger": partial(measure_trl, liger=True)}


def main() -> None:
    args = parse_args()
    if not args.peers:
        record = measure(args)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        record = in_a_process(measure, args)
        args.checkpointing = recomputes(record["settings"]["memory"])
    if os.environ.get("RANK", "0") == "0":
        earlier = [json.loads(args.compare.read_text().splitlines()[-1]) | {"name": "before"}] if args.compare else []
        peers = [peer for name in args.peers if (peer := measure_peer(name, args)) is not None]
        if earlier or peers:
            print(side_by_side([record, *earlier, *peers]), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.writelines(json.dumps(each) + "\n" for each in (*peers, record))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.5b", help="shape of the random weights")
    parser.add_argument("--prompts", type=int, default=32, help="per process and step")
    parser.add_argument("--completions", type=int, default=8, help="per prompt")
    parser.add_argument("--new-tokens", type=int, default=512, help="per completion, exactly")
    parser.add_argument("--mean-tokens", type=int, help="on average, and at most --new-tokens")
    parser.add_argument("--steps", type=int, default=3, help="that are measured")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--teacher", choices=SHAPES, help="distil from a model of this shape, on-policy")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE")
    parser.add_argument("--update-only", action="store_true", help="make completions up instead of sampling them")
    parser.add_argument("--sampled-elsewhere", action="store_true", help="with it: no copy of the model to sample from")
    parser.add_argument("--profile", action="store_true", help="parts and kernels of an update, in two more steps")
    parser.add_argument(
        "--trace", type=Path, help="with it: the update's timeline, for chrome://tracing (.json or .json.gz)"
    )
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS, help="after our own run; on one GPU")
    parser.add_argument("--peer-micro-batch", type=int, default=32, help="a peer's completions per forward pass")
    parser.add_argument("--out", type=Path, help="append the result to this file, as a line of JSON")
    parser.add_argument("--compare", type=Path, help="such a file: show the result of its last line beside this one")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where the random models are kept")
    args = parser.parse_args()
    if args.mean_tokens and (args.peers or args.update_only):
        parser.error("--mean-tokens goes with our own whole steps")
    if args.trace and not args.profile:
        parser.error("--trace goes with --profile")
    if args.sampled_elsewhere and not args.update_only:
        parser.error("--sampled-elsewhere goes with --update-only")
    if args.peers and (args.update_only or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        parser.error("--peers are measured in whole steps and on one GPU")
    return args


def in_a_process(run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `run` returns in a process of its own, whose memory it alone has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def recomputes(memory: dict[str, Any]) -> bool:
    """Whether our run computes activations again in the backward pass, as the peers shall then."""
    return memory["activation_checkpointing"] > 0


def measure_peer(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """A peer that fails is reported and does not take the others' numbers with it."""
    try:
        return in_a_process(PEERS[name], args) | {"name": name}
    except Exception as error:
        print(f"{name}: failed with {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None


# ---- our own step ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything about our step, which rank 0 prints as well."""
    model = saved_model(args.size, args.cache)
    if args.mean_tokens:
        model = with_ends(model, args.mean_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        config = make_config(args, model, Path(scratch))
        trainer = make_trainer(args, config)
        watch = Watch(trainer, model_config(args.size))
        all_steps = [timed_step(trainer, watch) for _ in range(args.warmup + args.steps)]
        record = make_record(args, trainer, all_steps[args.warmup :])
        trainer.processes.say(describe(record))
        if args.profile:
            profiler, report = profile_update(trainer, model_config(args.size).vocab_size)
            trainer.processes.say(report)
            if args.trace and trainer.processes.is_main:
                profiler.export_chrome_trace(str(args.trace))
        trainer.close()
        trainer.processes.barrier()
    distributed.stop()
    return record


def make_config(args: argparse.Namespace, model: Path, scratch: Path) -> Config:
    settings = {
        "model": {"name": str(model)},
        "data": {"template": "none", "max_prompt_tokens": LONGEST_PROMPT},
        "rollout": {
            "num_prompts": args.prompts * int(os.environ.get("WORLD_SIZE", "1")),
            "group_size": args.completions,
            "max_completion_tokens": args.new_tokens,
        },
        "algorithm": {"kl_coef": 0.001},
        "memory": {"max_sequences": args.prompts * args.completions},
        "logging": {"completions_every": 0},
        # more than are run: what is measured is the middle of a run, in which later questions are begun
        "run": {"dir": str(scratch / "run"), "steps": args.warmup + args.steps + 2 * args.profile + 10},
    }
    if args.teacher:
        settings["teacher"] = {"name": str(saved_model(args.teacher, args.cache, teaches=True))}
        settings["algorithm"] = {"kl_coef": 1.0, "kl_estimator": "k2"}
    if args.update_only:
        settings["rollout"]["engine"] = "hf"  # it takes no memory before it samples, which it never does
        settings["algorithm"]["max_sampling_gap"] = 1e6
        if any(setting.startswith("rollout.carry_over") for setting in args.set):
            raise SystemExit("rollout.carry_over is set; --update-only samples nothing. Remove one of the two.")
    file = scratch / "settings.yaml"
    file.write_text(write_yaml(settings))
    config = Config.load(file, args.set)
    if args.sampled_elsewhere and (config.distributed.zero_stage < 3 or config.lora.rank):
        raise SystemExit(
            "--sampled-elsewhere is for distributed.zero_stage=3 without adapters; else it changes nothing"
        )
    return config


def make_trainer(args: argparse.Namespace, config: Config) -> Trainer:
    """On as many questions as a step has, so that all steps are the same work."""
    ids = prompt_ids(config.rollout.num_prompts, args.size)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    rows = [{"question": tokenizer.decode(each), "answer": ""} for each in ids]
    kind = ElsewhereTrainer if args.sampled_elsewhere else Trainer
    trainer = kind(config, rewards=[random_reward], train_dataset=rows)
    assert [prompt.token_ids for prompt in trainer.prompts.prompts] == ids, "a prompt is not read as its tokens"
    if args.update_only:
        trainer.collector.generator = MadeUp(len(tokenizer) - 1)
    return trainer


class ElsewhereTrainer(Trainer):
    """As beside a server that samples."""

    _policy_class = policy_that(samples=False)


class MadeUp:
    """A generator of random tokens, as likely as they are to a model that knows nothing."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        shape = (len(prompts), num_completions, sampling.max_tokens)
        ids = torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).tolist()
        logprobs = torch.full((sampling.max_tokens,), 1 / self.vocab_size).log().tolist()
        groups = [
            Group(prompt, [Completion(each, logprobs, "", "length") for each in group])
            for prompt, group in zip(prompts, ids, strict=True)
        ]
        return all_at_once(groups, on_group)

    def sync(self) -> None:
        """The completions do not depend on the weights."""

    def release_memory(self) -> None:
        """They take none."""

    def metrics(self) -> dict[str, float]:
        return {}


def timed_step(trainer: Trainer, watch: Watch) -> dict[str, float]:
    """The trainer's metrics of a step and those of `watch`, with the seconds to the end of the device's work.

    `time/step` here includes the metrics and logs that the trainer's own leaves out; `time/rest` is what is in no other phase.
    """
    synchronize()
    start = time.perf_counter()
    metrics = trainer.train_step()
    synchronize()
    phases = sum(value for name, value in metrics.items() if name.startswith("time/") and name != "time/step")
    metrics["time/step"] = time.perf_counter() - start
    metrics["time/rest"] = metrics["time/step"] - phases
    return metrics | watch.end_step()


class Watch:
    """What the trainer does not publish of a step: the operations of its update, and the memory reserved from the device."""

    def __init__(self, trainer: Trainer, model: Qwen2Config | Qwen3MoeConfig) -> None:
        self.processes, self.model = trainer.processes, model
        self.passes: list[MicroBatch] = []
        self.reserved = 0
        self.kv_seconds: dict[str, float] = {}  # of a step, by what was done with the memory of keys and values
        if (memory := released_memory(trainer)) is not None:
            for method in ("take", "release"):
                around(memory, method, partial(timed, self.kv_seconds, method))
        before(trainer.policy, "logprobs", self.passes.append)
        before(torch.cuda, "reset_peak_memory_stats", self._keep_reserved)  # the trainer's phases each begin with it

    def _keep_reserved(self, *_: Any) -> None:
        now = torch.cuda.max_memory_reserved() + mapped_memory.taken_bytes()  # 0 without a GPU
        self.reserved = max(self.reserved, now)

    def end_step(self) -> dict[str, float]:
        """Since the last call: TFLOP of the update, the mean over processes, and GiB reserved, on the process that has most."""
        self._keep_reserved()
        mine = update_flops(self.model, self.passes), self.reserved
        flops, reserved = zip(*self.processes.gather(mine), strict=True)
        self.passes.clear()
        self.reserved = 0
        kv_seconds = {f"kv/{method}": seconds for method, seconds in self.kv_seconds.items()}
        self.kv_seconds.clear()
        return {"update/tflop": sum(flops) / len(flops) / 1e12, "memory/reserved": max(reserved) / GIB} | kv_seconds


def released_memory(trainer: Trainer) -> MappedMemory | None:
    """What memory.release_kv_cache gives back."""
    generator = trainer.collector.generator
    decoder = generator._decoder if isinstance(generator, NativeGenerator) else None
    return None if decoder is None else decoder.cache.memory


def before(owner: Any, method: str, act: Callable[..., Any]) -> None:
    """Hand the arguments of every call of a method of this object to `act` first."""
    call = getattr(owner, method)

    def after_it(*args: Any, **options: Any) -> Any:
        act(*args, **options)
        return call(*args, **options)

    setattr(owner, method, after_it)


def around(owner: Any, method: str, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run every call of a method of this object within a context."""
    call = getattr(owner, method)

    def within(*args: Any, **options: Any) -> Any:
        with context():
            return call(*args, **options)

    setattr(owner, method, within)


# ---- what is made of the numbers -------------------------------------------------------------------------------------


def make_record(args: argparse.Namespace, trainer: Trainer, steps: list[dict[str, float]]) -> dict[str, Any]:
    kind = fmean if args.mean_tokens else median
    middle = {name: kind(step[name] for step in steps if name in step) for name in steps[-1]}
    peaks = {k.removeprefix("memory/"): max(s[k] for s in steps) for k in middle if k.startswith("memory/")}
    reserved = peaks.pop("reserved")
    world = trainer.processes.world_size
    return {
        "name": "grpo",
        "command": shlex.join(sys.argv),
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
        "size": args.size,
        "processes": world,
        "work": f"{args.prompts} prompts x {args.completions} completions x {_lengths(args)} tokens per process",
        "measured": f"{'mean' if args.mean_tokens else 'median'} of {args.steps} steps after {args.warmup}",
        "update_only": args.update_only,
        "sampled_elsewhere": args.sampled_elsewhere,
        "step": middle["time/step"],
        "generation": None if args.update_only else middle["time/rollout"],
        "rest": middle["time/step"] - middle["time/rollout"],
        "peak_gib": peaks.get("step"),
        "reserved_gib": reserved,
        "tflops_update": middle["update/tflop"] / middle["time/update"],
        "tflops_matrix": matrix_rate() / 1e12,
        "peaks": peaks,
        "medians": middle,
        "steps": steps,
        "settings": trainer.config.model_dump(),
    }


def _lengths(args: argparse.Namespace) -> str:
    return f"{args.mean_tokens} (at most {args.new_tokens})" if args.mean_tokens else str(args.new_tokens)


def update_flops(config: Qwen2Config | Qwen3MoeConfig, passes: list[MicroBatch]) -> float:
    """Floating-point operations that these passes need, forward and backward; recomputing is not counted.

        6 W        per place: the W weights of the layers' matrix products, 2 operations forward and 4 backward, as all learn
        6 V H      per completion token: the output head, which reads no other places
        12 H       per layer and pair of a place and a place it sees: the attention's scores and what it adds up by them

    A prompt's places are there once for all its completions in a pass, and see the prompt up to themselves. Those of a completion
    see all of the prompt, and the completion up to themselves.
    Of a mixture the experts that a place goes through are counted. Norms, rotation, softmax, routing, the embedding's look-up and
    the optimizer are not counted either, nor are passes without work.
    """
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    key_value = hidden * config.num_key_value_heads // config.num_attention_heads
    inner = config.intermediate_size
    if isinstance(config, Qwen3MoeConfig):
        inner = config.num_experts_per_tok * config.moe_intermediate_size
    weights = num_layers * hidden * (2 * hidden + 2 * key_value + 3 * inner)
    flops = 0.0
    for micro in passes:
        if not micro.is_spare:
            head = config.vocab_size * hidden * len(micro.targets)
            flops += 6 * (weights * len(micro.tokens) + head) + 12 * hidden * num_layers * micro.num_pairs
    return flops


def describe(record: dict[str, Any]) -> str:
    """The result for a reader."""
    middle, processes, peaks = record["medians"], record["processes"], record["peaks"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"\n{processes} x {record['device']}; {versions}",
        record["command"],
        f"{record['size']}, {record['work']}; {record['measured']}",
        f"memory {record['settings']['memory']}, distributed {record['settings']['distributed']}\n",
        f"{'':10}{'seconds':>10}{'share':>8}{'peak GiB':>10}",
    ]
    phases = [name.removeprefix("time/") for name in middle if name.startswith("time/") and name != "time/step"]
    for phase in (*phases, "step"):
        seconds = middle[f"time/{phase}"]
        peak = record["peak_gib"] if phase == "step" else peaks.get(phase)
        lines.append(f"{phase:10}{seconds:10.3f}{seconds / record['step']:8.0%}{_or_dash(peak, 10)}")
    lines.append(f"reserved from the device at most: {record['reserved_gib']:.2f} GiB\n")
    if "kv/take" in middle:
        took = {method: f"{1000 * middle[f'kv/{method}']:.1f} ms" for method in ("take", "release")}
        held = f"{middle['rollout/kv_gib']:.2f} GiB"
        lines.append(f"keys and values, {held}: taken in {took['take']}, released in {took['release']} of a step\n")
    for phase in ("rollout", "update")[record["update_only"] :]:
        rate = middle[f"throughput/{phase}"]
        read = f", {rate / processes * (1 - middle['batch/shared']):,.0f} of them read" if phase == "update" else ""
        lines.append(f"{phase:10}{rate / processes:10,.0f} tokens/s per process{read}; {rate:,.0f} in all")
    others = ("batch/shared", "batch/imbalance", "rollout/occupancy", "rollout/staleness", "rollout/carried")
    counts = ("rollout/decoding_steps", "rollout/read_tokens")
    shown = [f"{name} {middle[name]:.3f}" for name in others if name in middle]
    lines.append(", ".join([*shown, *[f"{name} {middle[name]:,.0f}" for name in counts if name in middle]]))
    needed, ours, matrix = middle["update/tflop"], record["tflops_update"], record["tflops_matrix"]
    lines.append(
        f"the update needs {needed:.4g} TFLOP per process, {ours:.4g} TFLOP/s, {ours / matrix:.0%} of a large product's "
        f"{matrix:.4g}\n(forward and backward over the tokens read, a shared prompt once; attention over what each sees;\n"
        "the output head over completion tokens; what is computed again in the backward pass not counted again)"
    )
    return "\n".join(lines)


def side_by_side(records: list[dict[str, Any]]) -> str:
    """A table of steps, with ratios to the first; "the rest" is the update with all that comes before and after it."""
    lines = ["\n" + " " * 16 + "".join(f"{record['name']:>20}" for record in records)]
    rows = {"step": "step, s", "generation": "generation, s", "rest": "the rest, s", "peak_gib": "peak GiB"}
    for key, title in rows.items():
        own = records[0][key]
        ratios = [f" ({value / own:.2f}x)" if own and value else "" for value in (record[key] for record in records)]
        cells = [_or_dash(record[key], 0) + ratio for record, ratio in zip(records, ratios, strict=True)]
        lines.append(f"{title:16}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _or_dash(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>{width}}"


# ---- where the time of an update goes --------------------------------------------------------------------------------


def profile_update(trainer: Trainer, vocab_size: int) -> tuple[profile, str]:
    """Two more steps: the kernels of the first one's update, and the seconds of the parts of the second's.

    The parts are timed by waiting for the device between them, so they do not overlap as they otherwise do.
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    profiler = profile(activities=activities, record_shapes=True)
    start, stop = cache(profiler.start), cache(profiler.stop)  # each runs once, in the first step
    before(trainer.policy, "logprobs", lambda micro: start())
    before(trainer.collector.generator, "sync", stop)
    trainer.train_step()
    parts: dict[str, float] = {}
    for part, method in (("forward", "logprobs"), ("backward", "backward"), ("optimizer", "optimizer_step")):
        around(trainer.policy, method, partial(timed, parts, part))
    trainer.train_step()
    timings = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items())
    return profiler, f"\n\n{timings}{kernels(profiler, vocab_size)}"


@contextmanager
def timed(parts: dict[str, float], part: str) -> Iterator[None]:
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    parts[part] = parts.get(part, 0.0) + time.perf_counter() - start


def kernels(profiler: profile, vocab_size: int) -> str:
    """The costliest kernels (operators, without a GPU), and what some kinds of them take together.

    Operators over the vocabulary are those with an argument of that size: the output head, forward, recomputed and backward, what
    comes after its logits, and the embedding. Kernels that no torch operator launches, such as Triton's own, are not among them.
    """
    by_kernel = kernels_of(profiler)
    by_shape = [each for each in profiler.key_averages(group_by_input_shape=True) if each.device_type == DeviceType.CPU]
    time_of = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    whole = sum(seconds for _, seconds, _ in by_kernel)

    def named(*parts: str) -> float:
        return sum(seconds for name, seconds, _ in by_kernel if any(part in name for part in parts))

    kinds = {
        "kernels": whole,
        "communication": named("nccl"),
        "attention": named("flash", "fmha", "attention"),
        "over the vocabulary": sum(
            getattr(each, time_of) / 1e6 for each in by_shape if vocab_size in _flat(each.input_shapes)
        ),
    }
    shares = [f"{title} {seconds:.3f} s ({seconds / whole:.0%})" for title, seconds in kinds.items()]
    return f"\n{', '.join(shares)}\n{costliest(profiler)}"


def _flat(shape: Any) -> list[int]:
    return [size for each in shape for size in _flat(each)] if isinstance(shape, (list, tuple)) else [shape]


if __name__ == "__main__":
    main()
