"""Save and resume. A checkpoint is a directory that appears whole or not at all:

    checkpoints/step-00000050/
        hf/             weights, config and tokenizer; `AutoModelForCausalLM.from_pretrained` loads it
        adapter/        with LoRA: the adapters alone, which are merged into hf/; `PeftModel.from_pretrained` loads it
        training/       DeepSpeed's state: float32 masters and optimizer moments, a file per process
        reference.safetensors    the reference's weights, once it is no longer the starting model
        random/         each process's random states
        state.json      where the run stands, and the configuration it ran with

It is written under a temporary name and renamed once everything is on disk, so a run that is killed while saving still has
the checkpoint before. Only then are old ones removed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo import reshard
from grpo.config import Config
from grpo.distributed import Processes
from grpo.policy import Policy
from grpo.reshard import Layout

REFERENCE = "reference.safetensors"


@dataclass
class RunState:
    """Where a run stands."""

    step: int = 0  # finished training steps
    optimizer_steps: int = 0
    position: int = 0  # prompts dealt so far


def save(directory: Path, state: RunState, *, policy: Policy, config: Config, processes: Processes, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Every process calls it."""
    final = directory / name_of(state.step)
    if processes.broadcast(final.exists()):
        return final
    partial = final.with_suffix(".partial")
    if processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "random").mkdir(parents=True)
        policy.export(partial / "hf")
    processes.barrier()
    policy.export_adapter(partial / "adapter")
    policy.save_training_state(partial)
    if policy.reference_moved:
        policy.save_reference(partial / REFERENCE)
    torch.save(_random_states(), partial / "random" / f"rank-{processes.rank}.pt")
    processes.barrier()
    if processes.is_main:
        record = {**asdict(state), "world_size": processes.world_size, "config": config.model_dump()}
        (partial / "state.json").write_text(json.dumps(record, indent=1))
        _flush(partial)
        os.replace(partial, final)
        _flush_directory(directory)
        for old in complete_checkpoints(directory)[:-keep]:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))
    processes.barrier()
    return final


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def find(run_dir: Path, config: Config, processes: Processes) -> Path | None:
    """The newest checkpoint of the run to resume, or None to start anew.

    Raises:
        ValueError: it is of another experiment.
    """
    if config.run.resume == "never":
        return None
    newest = next(reversed(complete_checkpoints(run_dir / "checkpoints")), None)
    if newest is not None:
        _check_resumable(newest, config)
    return newest


def complete_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.suffix != ".partial")


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


MAY_CHANGE = {
    "run.steps",
    "run.resume",
    "run.dir",
    "checkpoint",
    "logging",
    "evaluation",
    "scoring",
    "memory",
    "vllm",
    "distributed",
}
"""What may differ between a run and its resumption without making it another experiment."""


def _check_resumable(checkpoint: Path, config: Config) -> None:
    before, now = _flat(read_state(checkpoint)["config"]), _flat(config.model_dump())
    for name in sorted(before.keys() | now.keys()):
        if name in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE:
            continue
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name} is {now.get(name)!r}; {checkpoint} was written with {before.get(name)!r}, and a run resumes with "
                "the settings it began with. Restore the value, or choose another run.dir."
            )


def restore(checkpoint: Path, *, policy: Policy, processes: Processes) -> RunState:
    """Load weights, optimizer and random states in place, in whatever layout they were written. Every process calls it."""
    saved = read_state(checkpoint)
    written, now = Layout(saved["world_size"], saved["config"]["distributed"]["zero_stage"]), reshard.layout_of(policy)
    if written == now:
        policy.load_training_state(checkpoint)
    else:
        reshard.load(checkpoint, policy, saved=written)
        if processes.is_main:
            print(reshard.what_changes(written, now), flush=True)
    if (checkpoint / REFERENCE).exists():
        policy.load_reference(checkpoint / REFERENCE)
    if (
        processes.rank < written.num_processes
    ):  # one more keeps the states it started with; sampling has its own, seeded anew
        _restore_random_states(torch.load(checkpoint / "random" / f"rank-{processes.rank}.pt", weights_only=False))
    return RunState(saved["step"], saved["optimizer_steps"], saved["position"])


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, settings in config.items()
        for name, value in (settings.items() if isinstance(settings, dict) else [("", settings)])
    }


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def _flush(directory: Path) -> None:
    """Push every file to disk before the rename that declares the checkpoint complete."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_directory(path)
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
