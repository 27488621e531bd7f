"""Out of memory: told from other errors, and what a run does about it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from grpo.system.terminal import say

if TYPE_CHECKING:
    from grpo.rollout import Generator

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


def or_fewer_at_once(sample: Callable[[], T], generator: Generator, *, rank: int) -> T:
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
