"""Does the run fit, and how long will it take? Steps of the longest possible sequences, on this machine and this model.

What is run is the trainer's own step with every prompt stretched to data.max_prompt_tokens and every completion running to
rollout.max_completion_tokens: all questions that a step may sample, the reference as configured, every minibatch and its
optimizer step. Two things differ from the run: nothing ends a completion, and rewards are random numbers, because scoring takes
no GPU memory. Data and rewards are loaded and checked all the same. No file is left behind; the updated weights are thrown away.

The longest completions take the most time, but not always the most memory: no sequence is split, so they may leave much of a
pass empty that shorter ones fill up to memory.micro_batch_tokens. Then one more step runs, with completions that do.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from grpo.algorithm.batch import plan_passes
from grpo.check.advice import advice
from grpo.check.dry_run import rehearse
from grpo.config import AnyConfig, Config
from grpo.observe.console import print_of_rank
from grpo.observe.sinks import check_sinks
from grpo.policy.policy import Policy
from grpo.rollout.engine import NativeGenerator
from grpo.run.disk import Room
from grpo.run.loop import Loop
from grpo.system import mapped_memory
from grpo.system.distributed import GIB, Processes, TrainingProcesses
from grpo.system.out_of_memory import is_out_of_memory
from grpo.trainer import Trainer
from grpo.training.collector import Collector
from grpo.turns.generator import TurnGenerator
from grpo.types import Batch, Prompt

NUM_STEPS = 2
"""The last one is shown: the first compiles and captures."""

FULL = 0.97
"""A pass with this share of memory.micro_batch_tokens counts as full."""

MOST_PARTS = 16
"""The completion lengths that are tried are the longest, half of it, a third, ... and this part of it."""

PHASES = ("rollout", "logprobs", "update", "step")
AnyLoop = TypeVar("AnyLoop", bound=Loop)
Advise = Callable[[str, Loop | None, int], list[str]]
"""What to change, from the phase in which memory ran out, the trainer if there is one, and the number of processes."""


def check(config: Config) -> int:
    """Run the longest steps and print what they took.

    Returns:
        0 if they fit. If not, 1 after the advice is printed; where other processes wait for this one it ends here, and the
        launcher ends them.

    Raises:
        ValueError: as Trainer.
    """
    return tried(
        lambda: worst_case(config),
        lambda trainer: report(
            config, run(trainer), measured(trainer), disk(trainer, config, num_steps=config.run.steps)
        ),
        partial(_advise, config),
    )


def tried(make: Callable[[], AnyLoop], measure: Callable[[AnyLoop], str], advise: Advise) -> int:
    """Make a trainer, step it and print what `measure` says, or where memory ran out and what `advise` says; see check."""
    trainer: AnyLoop | None = None
    try:
        trainer = make()
        trainer.processes.say(measure(trainer))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _explain(error, advise, trainer)
        if os.environ["WORLD_SIZE"] != "1":
            sys.stdout.flush()
            os._exit(1)  # leaving the process group in order would wait for the others
        return 1
    return 0


def worst_case(config: Config) -> Trainer:
    """A trainer whose steps are the longest that `config` allows."""
    check_sinks(config)
    trainer = rehearse(
        config, EndlessTrainer, rollout={"stop": []}, run={"steps": max(config.run.steps, NUM_STEPS + 1)}
    )
    longest, num_questions = config.data.max_prompt_tokens, config.max_questions_per_step
    trainer.state.groups_seen = 1e9  # and none had signal, so that dynamic sampling draws all that it may at once
    trainer.prompts.prompts = [stretched(p, longest) for p in trainer.prompts.prompts[:num_questions]]
    completions = f"{num_questions} x {config.rollout.group_size} completions"
    trainer.processes.say(
        f"\nThe longest steps there can be, {NUM_STEPS} of them: {completions} that all run to "
        f"{config.rollout.max_completion_tokens:,} tokens after prompts of {longest:,}; random rewards."
    )
    return trainer


def run(trainer: Trainer) -> dict[str, float]:
    """Metrics of the last of the longest steps, with the peaks of a step of fuller passes where those are higher."""
    config, world_size = trainer.config, trainer.processes.num_parts
    metrics = [trainer.train_step() for _ in range(NUM_STEPS)][-1]
    length = filling_length(config, world_size=world_size)
    if length is None:
        return metrics
    longest = config.rollout.max_completion_tokens
    shares = [fullest_pass(config, each, world_size=world_size) for each in (length, longest)]
    trainer.processes.say(
        f"One more step with completions of {length:,} tokens, which fill a pass to {shares[0]:.0%} of "
        f"memory.micro_batch_tokens; the longest fill {shares[1]:.0%}. It counts for the peaks, not for the time."
    )
    trainer.prompts.prompts = [replace(prompt, max_tokens=length) for prompt in trainer.prompts.prompts]
    filled = trainer.train_step()
    return metrics | {name: max(metrics[name], filled[name]) for name in metrics if name.startswith("memory/")}


def filling_length(config: Config, *, world_size: int) -> int | None:
    """The longest completions that fill a pass, or those that come closest; None if these are the longest that there can be."""
    longest = config.rollout.max_completion_tokens
    shares: dict[int, float] = {}
    for parts in range(1, min(MOST_PARTS, longest) + 1):
        length = longest // parts
        shares[length] = fullest_pass(config, length, world_size=world_size)
        if shares[length] >= FULL:
            break
    best = max(shares, key=lambda each: shares[each])
    return None if best == longest else best


def fullest_pass(config: Config, completion_tokens: int, *, world_size: int) -> float:
    """The share of the token budget in the fullest pass over a minibatch of prompts that are as long as they may be."""
    prompt, group_size = config.data.max_prompt_tokens, config.rollout.group_size
    count, budget = config.prompts_per_minibatch * group_size, config.pass_tokens
    nothing = torch.empty(0)
    batch = Batch(
        tokens=nothing,
        cu_seqlens=torch.arange(count + 1) * (prompt + completion_tokens),
        prompt_lens=torch.full((count,), prompt),
        prompt_index=torch.arange(count) // group_size,
        advantages=nothing,
        sampling_logprobs=nothing,
    )
    plan = plan_passes(batch, token_budget=budget, num_processes=world_size)
    sequences = [each for passes in plan for each in passes]
    sizes = [len({i // group_size for i in each}) * prompt + len(each) * completion_tokens for each in sequences]
    return max(sizes) / budget


class EndlessPolicy(Policy):
    """Its completions run to their limit, because no token ends them."""

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, processes: TrainingProcesses, **options: Any
    ) -> None:
        super().__init__(config, tokenizer, processes, **options)
        self.end_token_ids = []


class EndlessTrainer(Trainer):
    """Trains an EndlessPolicy."""

    _policy_class = EndlessPolicy


def stretched(prompt: Prompt, length: int) -> Prompt:
    """The prompt said again and again, to exactly `length` tokens."""
    times = -(-length // len(prompt.token_ids))
    return replace(prompt, token_ids=(prompt.token_ids * times)[:length], max_tokens=None)


@dataclass(frozen=True)
class GpuMemory:
    """GiB of the GPU with the least left once the steps are done and PyTorch keeps what they took; None: no GPU."""

    free: float | None
    total: float | None
    resident: float  # largest resident memory that a process ever had on the host
    processes: int
    released: float = 0.0  # GiB for keys and values that are not taken now, and will be (memory.release_kv_cache)

    @classmethod
    def now(cls, processes: Processes) -> GpuMemory:
        on_gpu = processes.device.type == "cuda"
        mine = torch.cuda.mem_get_info(processes.device) if on_gpu else None
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        everyone = processes.gather((mine, resident, mapped_memory.released_bytes() / GIB))
        free, total = min(each for each, *_ in everyone) if on_gpu else (None, None)
        _, residents, released = zip(*everyone, strict=True)
        return cls(
            free and free / GIB, total and total / GIB, max(residents), processes.world_size, released=max(released)
        )


def measured(trainer: Loop) -> GpuMemory:
    """Once the steps are done."""
    return GpuMemory.now(trainer.processes)


def report(config: Config, metrics: dict[str, float], memory: GpuMemory, disk: str) -> str:
    """What a step took by phase, what is left of the GPU, how long the run will take at most, and what it takes of the disk."""
    return "\n".join(
        [*phases(metrics, PHASES), "", *fits(memory), projection(config, metrics), disk, *spare(memory, "train")]
    )


def disk(trainer: Loop, config: AnyConfig, *, num_steps: int) -> str:
    """What the checkpoints of a run that begins anew take where it will lie."""
    where = Path(config.run.dir)
    room = trainer.processes.on_main(
        lambda: Room.at(where / "checkpoints", config, trainer.policy, step=0, num_steps=num_steps)
    )
    advice = " That is not enough: free some space, or set run.dir to a directory on another disk."
    return (
        f"A checkpoint takes about {room.each / GIB:.3g} GiB of the disk, at most {room.at_once} are there at once, and "
        f"{room.free / GIB:.3g} GiB are free for {where}.{advice if room.fits < room.at_once else ''}"
    )


def phases(metrics: dict[str, float], names: Sequence[str]) -> list[str]:
    """A table of seconds and peaks."""
    lines = [f"\n{'phase':<10}{'seconds':>10}{'peak GiB':>12}"]
    for phase in names:
        peak = metrics.get(f"memory/{phase}")
        lines.append(f"{phase:<10}{metrics[f'time/{phase}']:>10.2f}{'-' if peak is None else f'{peak:.2f}':>12}")
    return lines


def fits(memory: GpuMemory) -> list[str]:
    if memory.total is None:
        return [
            f"It fits. The largest process took {memory.resident:.2f} GiB of this machine's memory; there is no GPU."
        ]
    released = (
        f" Keys and values of {memory.released:.1f} GiB are released until the next rollout (memory.release_kv_cache), which "
        "takes them from what is free and, where it has to, from what PyTorch keeps. Peaks while sampling and scoring count them."
        if memory.released
        else ""
    )
    return [
        f"It fits. Of the fullest GPU's {memory.total:.1f} GiB {memory.free:.1f} are free, with all that PyTorch keeps for the "
        "next step. Peaks are what tensors took at once." + released
    ]


def spare(memory: GpuMemory, command: str) -> list[str]:
    """That there are more GPUs than were used."""
    gpus = torch.cuda.device_count()
    if memory.processes >= gpus:
        return []
    return [f"{memory.processes} of {gpus} GPUs were used. For all of them: grpo {command} --dry-run --config ..."]


def projection(config: Config, metrics: dict[str, float]) -> str:
    """The run's time if every step were as long as these."""
    step = metrics["time/step"]
    text = f"{config.run.steps:,} such steps take {duration(config.run.steps * step)}"
    evaluation, seconds = config.evaluation, 0.0
    if evaluation.num_questions:
        every, steps = evaluation.every_steps, config.run.steps
        times = len({0, steps} | set(range(every, steps, every) if every else ()))
        answers = evaluation.num_questions * evaluation.num_samples
        tokens = times * answers * config.rollout.max_completion_tokens
        seconds = tokens / metrics["throughput/rollout"]
        each = f"{evaluation.num_questions:,} questions" + f" x {evaluation.num_samples}" * (evaluation.num_samples > 1)
        text += f" and {times} evaluations of {each} about {duration(seconds)} more"
    return (
        f"{text}. An upper bound: completions mostly end before their limit. Not in it: scoring (the rewards were random), "
        "checkpoints and loading."
    )


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _explain(error: RuntimeError, advise: Advise, trainer: Loop | None) -> None:
    """Say where memory ran out and what to do."""
    phase = "loading" if trainer is None else trainer.clock.phase
    world_size = int(os.environ["WORLD_SIZE"])
    text = shortage(phase, advise(phase, trainer, world_size), reason=str(error).splitlines()[0])
    print_of_rank(text, f"on rank {os.environ['RANK']} of {world_size}: {text}")


def _advise(config: Config, phase: str, trainer: Loop | None, world_size: int) -> list[str]:
    collector = trainer.collector if isinstance(trainer, Trainer) else None
    return advice(phase, config, world_size=world_size, **held(trainer, collector))


def held(trainer: Loop | None, collector: Collector | None) -> dict[str, Any]:
    """What `advice` is told of keys and values, and of where they lie."""
    generator = None if collector is None else collector.generator
    generator = generator.inner if isinstance(generator, TurnGenerator) else generator
    kv_gib = generator.kv_gib if isinstance(generator, NativeGenerator) else None
    return {"kv_gib": kv_gib, "on_gpu": trainer is not None and trainer.processes.device.type == "cuda"}


WHERE = {
    "loading": "while the model is loaded and set up",
    "rollout": "while sampling (rollout)",
    "logprobs": "while computing old and reference log-probabilities (logprobs)",
}


def shortage(phase: str, changes: Sequence[str], *, reason: str) -> str:
    """What is said when memory runs out."""
    first, *more = changes
    lines = [
        f"It does not fit: out of memory {WHERE.get(phase, 'in forward and backward passes or the optimizer step (update)')}.",
        f"  {reason}",
        f"First, {first}.",
        *([f"If that is not enough, {text}." for text in more]),
    ]
    return "\n".join(lines)
