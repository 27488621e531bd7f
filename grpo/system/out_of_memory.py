"""Out of memory: told from other errors, and what a run does about it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from grpo.system.host_memory import available_bytes
from grpo.system.stopping import Interrupted
from grpo.system.terminal import say
from grpo.types import Generator

T = TypeVar("T")

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""Parts of the messages with which torch, the driver and the libraries under them say so."""


def is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    ours = type(error).__module__.startswith(("grpo", "rewards"))  # which may quote a completion with these words
    return not ours and any(words in str(error) for words in OUT_OF_MEMORY)


def free() -> None:
    """Give back what nobody uses any more; to be called outside of the `except` block, whose traceback holds on to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """How much memory is free on a GPU, or for the processes of this machine, within the limit of their container."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def retry_with_fewer_sequences(sample: Callable[[], T], generator: Generator, *, rank: int) -> T:
    """What `sample` returns; out of memory, it is called again with half as many completions at once, and again."""
    while True:
        try:
            return sample()
        except RuntimeError as error:
            if not is_out_of_memory(error) or (changed := generator.halve()) is None:
                raise
            shortage = str(error).splitlines()[0]
        free()
        say(f"out of memory while sampling, process {rank}: {shortage}\n{changed}")


def or_ask_for_less(
    work: Callable[[], T], *, longest: int, tokens: int, may_leave: bool, where: str, undo: Callable[[], None]
) -> T:
    """What `work`, passes of an update, returns.

    What DeepSpeed has of half a gradient dies with the process. Others would wait for one that leaves, so alone only.

    Args:
        longest: tokens of the longest sequence, below which a pass cannot be.
        tokens: memory.micro_batch_tokens.
        may_leave: whether the run can be left and go on by itself.
        undo: forgets what `work` has measured, and lets go of its tensors.

    Raises:
        Interrupted: out of memory; with the setting to go on with.
    """
    try:
        return work()
    except RuntimeError as error:
        if not (may_leave and tokens > longest and is_out_of_memory(error)):
            raise
        shortage = str(error).splitlines()[0]
    # only now nothing holds on to the pass that failed, and there is room for saving
    undo()
    free()
    raise Interrupted(
        f"out of memory in {where}: {shortage}", (f"memory.micro_batch_tokens={max(tokens // 2, longest)}",)
    )
