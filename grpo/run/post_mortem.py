"""What a run leaves behind when it is stopped or rolled back because something is wrong:

    post_mortem/step-00000012/
        alarm.txt             what was wrong, with the numbers
        completions.jsonl     the step's prompts and completions with their rewards and advantages, of all processes
        metrics.jsonl         the last steps' metrics; the step's own, if it came that far, is the last row
        config.yaml           every setting, resolved
        rollout-rank-0.safetensors    what process 0 sampled
        update-rank-0.safetensors     what process 0 trained on: those of the sequences that make a gradient, dealt anew

`safetensors.torch.load_file` reads the latter two. Both hold sequences end to end, as types.Batch says:

    rollout   tokens (L,), cu_seqlens (B + 1,), prompt_lens (B,), prompt_index (B,), advantages (B,), sampling_logprobs (T,);
              with rollout.carry_over, fresh (T,), which of them the weights at hand drew;
              with tools, trained (C,), which of the completion tokens the model wrote: T of them;
              sequence i belongs to line i of that process's part of completions.jsonl, whose rows have a `rank`
    update    per trained token: targets, advantages, weights (in the loss), logprobs (the policy's, before the update),
              sampling_logprobs, and where the algorithm has them old_logprobs, ref_logprobs, selected; all (T,);
              completion_lens (B,)
"""

from __future__ import annotations

import shutil
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from grpo.algorithm.batch import pack
from grpo.scoring.answers import training_rows
from grpo.system import progress
from grpo.system.distributed import Processes, TrainingProcesses
from grpo.system.jsonl import append_jsonl, iterate_backwards
from grpo.system.terminal import say
from grpo.training.state import Rollout
from grpo.types import MicroBatch

LAST_METRICS = 100
"""Rows of metrics.jsonl that are kept."""


def write(run_dir: Path, step: int, text: str, rollout: Rollout, processes: Processes) -> Path | None:
    """Write the folder; every process calls it. None if the disk would not take it, which is said: the alarm comes first."""
    rows = [{"rank": processes.rank, **row} for row in _rows(step, rollout)]
    rows = [row for part in processes.gather(rows) for row in part]
    directory = processes.on_main(lambda: _attempt(lambda: _write_shared(run_dir, step, text, rows)))
    if directory is None:
        return None
    has_passes = (
        not isinstance(processes, TrainingProcesses) or processes.speaks
    )  # of those that ran them together, one
    _attempt(lambda: _write_tensors(directory, rollout, processes.rank, with_passes=has_passes))
    processes.barrier()
    return directory


def _attempt(write: Any) -> Any:
    try:
        with progress.busy("writing the post-mortem"):
            return write()
    except Exception as error:  # of a disk, or of a library on top of it
        say(f"warning: the post-mortem could not be written: {error}")
        return None


def _rows(step: int, rollout: Rollout) -> list[dict[str, Any]]:
    rows = training_rows(step, rollout.groups, rollout.scores, rollout.advantages, in_batch=rollout.minibatch >= 0)
    prompts = [group.prompt.text for group in rollout.groups for _ in group.completions]
    return [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


def _write_shared(run_dir: Path, step: int, text: str, rows: list[dict[str, Any]]) -> Path:
    directory = _claim(run_dir / "post_mortem", f"step-{step:08d}")
    (directory / "alarm.txt").write_text(text + "\n")
    append_jsonl(directory / "completions.jsonl", rows)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():  # it may stop in the first step
        append_jsonl(directory / "metrics.jsonl", list(islice(iterate_backwards(metrics), LAST_METRICS))[::-1])
    shutil.copy(run_dir / "config.yaml", directory)
    return directory


def _claim(parent: Path, name: str) -> Path:
    """A new directory; a step that was done again after a roll-back may have left one of its name."""
    for number in count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        if not path.exists():
            path.mkdir(parents=True)
            return path
    raise AssertionError("count(1) does not end")


def _write_tensors(directory: Path, rollout: Rollout, rank: int, *, with_passes: bool) -> None:
    save_file(_sampled(rollout), directory / f"rollout-rank-{rank}.safetensors")
    if with_passes:
        save_file(_update(rollout.passes), directory / f"update-rank-{rank}.safetensors")


def _sampled(rollout: Rollout) -> dict[str, Tensor]:
    batch = pack(rollout.groups, rollout.advantages.nan_to_num())  # of unknown reward too
    batch.advantages = rollout.advantages.flatten().clone()
    return {name: value for name, value in vars(batch).items() if value is not None}


PER_TOKEN = ("targets", "advantages", "weights", "sampling_logprobs", "old_logprobs", "ref_logprobs", "selected")


def _update(passes: list[tuple[MicroBatch, Tensor]]) -> dict[str, Tensor]:
    real = [(micro, logprobs) for micro, logprobs in passes if not micro.is_spare]
    tensors: dict[str, list[Tensor]] = {}
    for micro, logprobs in real:
        tensors.setdefault("completion_lens", []).append(micro.completion_lens)
        tensors.setdefault("logprobs", []).append(logprobs)
        for name in PER_TOKEN:
            value = getattr(micro, name)
            if value is not None:
                tensors.setdefault(name, []).append(value)
    return {name: torch.cat(parts).cpu() for name, parts in tensors.items()}
