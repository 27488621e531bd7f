"""A training state in another layout: to resume on another number of processes or in another ZeRO stage.

DeepSpeed reads its state back only with as many processes as wrote it, in the same stage. What it writes are always the same
numbers: the float32 weights ("masters"), AdamW's two moments of each, and one count of steps. They lie in flat tensors, a file
per process, and the stage says which elements are where:

    ZeRO 0      a tensor for each parameter, whole, the same on all processes, so in one file
    ZeRO 1, 2   one tensor: the parameters end to end, filled up with zeros, cut into an equal part for each process
    ZeRO 3      a tensor for each 1e9 elements, which holds the process's part of each parameter, each filled up likewise

So each process copies the elements that it is to hold from wherever they lie. The files are mapped into memory, not read: a
process needs no memory beyond its own state, and fetches from disk its share of the 12 bytes per trained weight.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.policy.language_model import trained_parameters
from grpo.policy.policy import Policy
from grpo.system import distributed, progress
from grpo.system.writer import load_tensors

MASTER, STEP, MOMENTS = "master", "step", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """What decides how a training state is cut up."""

    num_processes: int
    zero_stage: int


@dataclass(frozen=True)
class Span:
    """`length` elements that a parameter has from `start` on, and a flat tensor from `offset` on."""

    name: str
    start: int
    offset: int
    length: int


Flat = dict[str, Tensor]
"""The master and, after the first optimizer step, the moments of the same elements; (N,) each."""


@dataclass(frozen=True)
class Part:
    """What one process holds of a training state."""

    flats: list[Flat]
    lengths: list[int]  # of the flat tensors with what fills them up, which DeepSpeed leaves out of some in its files
    num_steps: int  # of the optimizer
    others: frozenset[str] = frozenset()
    """What the optimizer keeps of each weight, where it is not what AdamW keeps."""


def layout_of(policy: Policy) -> Layout:
    return Layout(policy.processes.world_size, int(policy.engine.zero_optimization_stage()))


def what_changes(saved: Layout, now: Layout) -> str:
    """What a user should know of the numbers of a run that goes on in another layout."""
    if saved.num_processes == now.num_processes:
        return (
            f"resumed under ZeRO {now.zero_stage} what ZeRO {saved.zero_stage} saved: weights, optimizer, step, question order "
            "and random numbers are exact; gradients are summed in another order from here on and differ by rounding"
        )
    return (
        f"resumed on {now.num_processes} process{'es' * (now.num_processes > 1)} what {saved.num_processes} saved: weights, "
        "optimizer, step and question order are exact; sampled tokens are not, because each process draws its own random "
        "numbers, and gradients are summed in another order"
    )


def load(directory: Path, policy: Policy, *, saved: Layout) -> None:
    """Read what `Policy.save_training_state` wrote in the layout `saved` into a policy in any layout. Every process calls it.

    Masters, moments and the count of steps are equal to the bit; the weights are the masters in the model's dtype.

    Raises:
        ValueError: on all processes, if the optimizer keeps something else of each weight than AdamW, or has several groups.
    """
    optimizer = policy.engine.basic_optimizer
    name, num_groups = type(optimizer).__name__, len(optimizer.param_groups)
    if num_groups > 1:
        raise _stays(directory, saved, f"{name} with {num_groups} groups of parameters")
    sizes, now = _sizes(policy), layout_of(policy)
    num_files = saved.num_processes if saved.zero_stage else 1
    with progress.busy("reading a checkpoint"):
        files = [_read(directory / "training", sizes, saved, rank) for rank in range(num_files)]
    if kept := sorted(set().union(*(part.others for part in files))):
        raise _stays(directory, saved, f"{name}, which keeps {', '.join(kept)} of each weight")
    stored: dict[str, list[tuple[Span, Flat]]] = defaultdict(list)
    for rank, part in enumerate(files):
        for flat, spans in zip(part.flats, cut(sizes, saved, rank=rank, lengths=part.lengths), strict=True):
            for span in spans:
                stored[span.name].append((span, flat))
    own = _own(policy, num_steps=files[0].num_steps)
    for flat, spans in zip(own.flats, cut(sizes, now, rank=policy.processes.rank, lengths=own.lengths), strict=True):
        for span in spans:
            progress.tick()  # the files are mapped into memory, so this is what reads them
            copied = sum(_copy_common(span, flat, *piece) for piece in stored[span.name])
            assert copied == span.length, f"{directory} holds {copied} of {span.length} elements of {span.name}"
    _refresh_weights(policy)


def _stays(checkpoint: Path, saved: Layout, optimizer: str) -> ValueError:
    """The refusal of what can be taken up in the layout alone that it was saved in."""
    processes = f"{saved.num_processes} process{'es' * (saved.num_processes > 1)}"
    return ValueError(
        f"optimizer is {optimizer}; only {', '.join(MOMENTS)} and {STEP} of AdamW, in one group of parameters, can be taken up "
        f"by another number of processes or in another ZeRO stage. Go on with {processes} and distributed.zero_stage="
        f"{saved.zero_stage}, or begin another run from its weights (model.name={checkpoint / 'hf'}, another run.dir)."
    )


def cut(sizes: dict[str, int], layout: Layout, *, rank: int, lengths: list[int]) -> list[list[Span]]:
    """Which elements of the parameters lie where in the flat tensors of a process.

    Two processes, parameters of 3 and 2 elements, under ZeRO 2: rank 0 has a0 a1 a2, rank 1 has b0 b1 and a zero;
    under ZeRO 3: rank 0 has a0 a1 b0, rank 1 has a2, a zero, and b1.

    Args:
        sizes: elements of each trained parameter, in the order of the optimizer.
        lengths: elements of each flat tensor of the process.
    """
    if layout.zero_stage == 0:
        return [[Span(name, 0, 0, size)] for name, size in sizes.items()]
    if layout.zero_stage < 3:
        return [_cut_end_to_end(sizes, begin=rank * length, end=(rank + 1) * length) for length in lengths]
    names = iter(sizes.items())
    return [_cut_each(names, length, layout.num_processes, rank) for length in lengths]


def _cut_end_to_end(sizes: dict[str, int], *, begin: int, end: int) -> list[Span]:
    spans, position = [], 0
    for name, size in sizes.items():
        first, last = max(begin, position), min(end, position + size)
        if first < last:
            spans.append(Span(name, first - position, first - begin, last - first))
        position += size
    return spans


def _cut_each(names: Any, length: int, num_processes: int, rank: int) -> list[Span]:
    spans, offset = [], 0
    while offset < length:
        name, size = next(names)
        share = math.ceil(size / num_processes)
        start = min(rank * share, size)
        spans.append(Span(name, start, offset, min(share, size - start)))
        offset += share
    assert offset == length, f"parts of parameters up to {name} end at {offset}, not at {length}"
    return spans


def _sizes(policy: Policy) -> dict[str, int]:
    """Elements of each trained parameter in the order of the optimizer, under the names that a checkpoint has for them."""
    names = {id(parameter): name for name, parameter in policy.engine.module.named_parameters()}
    return {names[id(p)]: getattr(p, "ds_numel", p.numel()) for p in trained_parameters(policy.lm)}


def _read(training: Path, sizes: dict[str, int], saved: Layout, rank: int) -> Part:
    """What process `rank` of the layout `saved` wrote."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" if saved.zero_stage else "mp_rank_00_model_states.pt"
    (path,) = training.glob(pattern)
    content = load_tensors(path, classes=distributed.deepspeed_classes(), mmap=True)
    masters, state, padding = _contents(content, sizes, saved.zero_stage)
    state = {i: kept for i, each in state.items() if (kept := {k: v for k, v in each.items() if v is not None})}
    lengths = [master.numel() + more for master, more in zip(masters, padding, strict=True)]
    known = {STEP, *MOMENTS}
    others = frozenset(name for each in state.values() if each.keys() != known for name in each.keys() - known or each)
    if others:
        return Part([], lengths, 0, others)
    flats = [
        {MASTER: master.detach().view(-1), **{name: state[i][name].view(-1) for name in MOMENTS if i in state}}
        for i, master in enumerate(masters)
    ]
    counts = {int(each[STEP]) for each in state.values()}
    assert len(counts) <= 1, f"{path} has several counts of optimizer steps: {sorted(counts)}"
    return Part(flats, lengths, num_steps=max(counts, default=0))


def _contents(
    content: dict[str, Any], sizes: dict[str, int], stage: int
) -> tuple[list[Tensor], dict[int, Any], list[int]]:
    """The masters in a file of DeepSpeed's, AdamW's state by their number, and how many zeros were left out of each."""
    if stage == 0 and "fp32_groups" not in content["optimizer"]:  # the model itself is in float32
        masters, state = [content["module"][name] for name in sizes], content["optimizer"]["state"]
        return masters, state, [0] * len(masters)
    if stage == 0:
        (masters,), state = content["optimizer"]["fp32_groups"], content["optimizer"]["optimizer_state_dict"]["state"]
        return masters, state, [0] * len(masters)
    optimizer = content["optimizer_state_dict"]
    if stage < 3:
        masters, state = optimizer["single_partition_of_fp32_groups"], optimizer["base_optimizer_state"]["state"]
        return masters, state, optimizer["group_paddings"]
    masters, state = optimizer["fp32_flat_groups"], optimizer["optimizer_state_dict"]["state"]
    return masters, state, [0] * len(masters)


def _own(policy: Policy, *, num_steps: int) -> Part:
    """What this process holds; after `num_steps` > 0 with room for moments, which torch makes with the first step only."""
    optimizer = policy.engine.basic_optimizer
    if layout_of(policy).zero_stage == 3:
        masters = policy.engine.optimizer.fp32_partitioned_groups_flat
    else:
        (masters,) = (group["params"] for group in optimizer.param_groups)
    flats = []
    for master in masters:
        state = optimizer.state[master] if num_steps else {}
        if num_steps:
            state.update({name: torch.zeros_like(master) for name in MOMENTS if name not in state})
            state[STEP] = torch.tensor(float(num_steps), device=master.device)
        flats.append({MASTER: master.detach().view(-1), **{name: state[name].view(-1) for name in MOMENTS if state}})
    return Part(flats, [master.numel() for master in masters], num_steps)


def _copy_common(span: Span, target: Flat, other: Span, source: Flat) -> int:
    """Copy the elements of a parameter that lie in both; how many there are."""
    first, last = max(span.start, other.start), min(span.start + span.length, other.start + other.length)
    for name in target.keys() & source.keys() if first < last else ():
        into = target[name].narrow(0, span.offset + first - span.start, last - first)
        into.copy_(source[name].narrow(0, other.offset + first - other.start, last - first))
    return max(0, last - first)


def _refresh_weights(policy: Policy) -> None:
    """Make the weights what the masters say, as DeepSpeed does after an optimizer step."""
    policy.weights_version += 1
    optimizer, stage = policy.engine.optimizer, layout_of(policy).zero_stage
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:  # small ones, which stay whole
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    elif policy.engine.bfloat16_enabled():
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)
