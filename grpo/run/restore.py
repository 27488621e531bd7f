"""A checkpoint taken up again, in whatever layout it was written: weights, optimizer, random states, and the step under way."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from grpo.observe.metrics import Meter
from grpo.policy.policy import Policy
from grpo.run import inputs, reshard
from grpo.run.checkpoint import REFERENCE
from grpo.run.reshard import Layout
from grpo.run.resumable import read_state
from grpo.system import progress
from grpo.system.distributed import Processes, TrainingProcesses
from grpo.system.terminal import say
from grpo.system.writer import load_tensors
from grpo.training import carry_over
from grpo.training.state import Rollout, RunState, StepState, redistribute
from grpo.types import Completion, Drafts, Episode, Group, MicroBatch, Packing, Prompt, Scores, ToolCall, Turn


def restore(
    checkpoint: Path, *, policy: Policy, processes: Processes, given: dict[str, str], max_completion_tokens: int | None
) -> tuple[RunState, StepState]:
    """Load weights, optimizer and random states in place, in whatever layout they were written. Every process calls it.

    Args:
        given: digests of what the run is given; see grpo/run/inputs.py.
        max_completion_tokens: of the run now. What tools answered under another limit is not carried on: those conversations
            begin anew.

    Returns:
        Where the run stands, and this process's part of the step under way.

    Raises:
        ValueError: the optimizer is another than the one whose state the checkpoint has, or keeps something else than AdamW and
            was saved in another layout.
    """
    saved = read_state(checkpoint)
    _check_optimizer(checkpoint, saved.get("optimizer"), policy)  # older ones do not say
    written, now = Layout(saved["world_size"], saved["config"]["distributed"]["zero_stage"]), reshard.layout_of(policy)
    if written == now:
        policy.load_training_state(checkpoint)
    else:
        reshard.load(checkpoint, policy, saved=written)
        if processes.is_main:
            say(reshard.what_changes(written, now))
    if (checkpoint / REFERENCE).exists():
        policy.load_reference(checkpoint / REFERENCE)
    if processes.rank < written.num_processes:  # one more keeps the states it started with; sampling seeds its own
        _restore_random_states(load_tensors(checkpoint / "random" / f"rank-{processes.rank}.pt"))
    where = RunState(**{field.name: saved[field.name] for field in fields(RunState) if field.name in saved})
    changed = inputs.changed(saved.get("given") or given, given)  # which run.accept_changes has let pass
    if inputs.OWN["optimizer"] in changed:
        processes.say(
            f"of the optimizer all but the learning rate, such as a momentum, stays as {checkpoint.name} has it"
        )
    if inputs.QUESTIONS in changed:
        where.solved, where.hopeless = [], []
    asks_others = inputs.QUESTIONS in changed or inputs.OWN["order"] in changed  # at the places to come
    if asks_others:
        where.ahead = []
    together = saved["config"]["distributed"].get("sequence_parallel", 1)
    step = _under_way(checkpoint / "under_way", written.num_processes, policy.processes, together_before=together)
    step.drafts = {} if asks_others else _drafts(checkpoint / "drafts", written.num_processes, where, processes)
    if _limit(saved["config"]) != max_completion_tokens:
        step.drafts = {
            place: drafts for place, drafts in step.drafts.items() if not any(each.dialogue for each in drafts)
        }
    done = where.optimizer_steps - step.first_update if step.rollout else 0
    processes.say(f"resumed after step {where.step}{f' and {done} updates of the next' * (done > 0)} from {checkpoint}")
    return where, step


def _check_optimizer(checkpoint: Path, before: str | None, policy: Policy) -> None:
    """Raises ValueError if it cannot take up the state of the one before."""
    now = type(policy.engine.basic_optimizer).__name__
    if before not in (None, now):
        raise ValueError(
            f"optimizer is {now}; {checkpoint} holds the state of {before}, which {now} cannot take up. Give Trainer the "
            "optimizer that the run began with, or begin another run from its weights "
            f"(model.name={checkpoint / 'hf'}, another run.dir)."
        )


def _limit(config: dict[str, Any]) -> int | None:
    """Of completions, in a configuration; None: supervised training has none."""
    return config.get("rollout", {}).get("max_completion_tokens")


def _under_way(directory: Path, num_parts: int, processes: TrainingProcesses, *, together_before: int) -> StepState:
    if not directory.exists():
        return StepState()

    def part(rank: int) -> StepState:
        progress.tick()
        return load_tensors(directory / f"rank-{rank}.pt", classes=UNDER_WAY)

    together = processes.sequence_parallel
    if (num_parts, together_before) == (processes.world_size, together):
        return part(processes.rank)
    return redistribute(
        [part(rank) for rank in range(num_parts)],
        rank=processes.rank,
        num_processes=processes.world_size,
        together_before=together_before,
        together=together,
    )


def _drafts(directory: Path, num_parts: int, where: RunState, processes: Processes) -> Drafts:
    if not directory.exists():
        return {}

    def part(rank: int) -> Drafts:
        progress.tick()
        return carry_over.from_tensors(load_tensors(directory / f"rank-{rank}.pt", classes=carry_over.CLASSES))

    if num_parts == processes.world_size:
        return part(processes.rank)
    parts = [part(rank) for rank in range(num_parts)]
    return carry_over.redistribute(
        parts,
        position=where.position,
        ahead=where.ahead,
        rank=processes.rank,
        num_processes=processes.world_size,
    )


UNDER_WAY = (
    *(StepState, Rollout, Group, Prompt, Completion, Turn, ToolCall, Episode, Scores, MicroBatch, Packing, Meter),
    (StepState, "grpo.under_way.StepUnderWay"),
    (Rollout, "grpo.post_mortem.Evidence"),
    (Meter, "grpo.metrics.Meter"),
)
"""The classes of a step under way, and the names that checkpoints have had for them."""


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
