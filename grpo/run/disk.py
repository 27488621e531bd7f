"""What a run's checkpoints take of its disk, and which of them may go where it is full."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from grpo.config import AnyConfig, Config
from grpo.policy.model_source import complete_checkpoints, numbers_of
from grpo.policy.policy import Policy
from grpo.system.distributed import num_elements
from grpo.system.files import free_bytes

TRAINING_BYTES = 12
"""For each trained weight: itself and the optimizer's two averages, in float32."""


def num_bytes(policy: Policy) -> int:
    """About what a checkpoint takes: the model as it is exported, the reference once that has moved, and the training state of
    what is trained, which beside float32 has DeepSpeed's copy in 16 bits."""
    models = 1 + (policy.reference_moved and not policy.adapters)
    copied = sum(
        num_elements(weight) * weight.element_size() for weight in trained(policy) if weight.element_size() < 4
    )
    return models * policy.num_whole_bytes() + num_training_bytes(policy) + copied


def num_training_bytes(policy: Policy) -> int:
    return TRAINING_BYTES * sum(map(num_elements, trained(policy)))


def trained(policy: Policy) -> list[Tensor]:
    return [weight for weight in policy.lm.parameters() if weight.requires_grad]


def beyond(directory: Path, config: AnyConfig, number: int) -> list[Path]:
    """The complete checkpoints that are not among so many of the newest, oldest first, but for those that stay for good."""
    found = complete_checkpoints(directory)[:-number]
    return [old for old in found if not _stays(*numbers_of(old), config.checkpoint.keep_every)]


def _stays(step: int, updates: int | None, keep_every: int) -> bool:
    """For good, by `checkpoint.keep_every`."""
    return updates is None and keep_every > 0 and step % keep_every == 0


def may_go(directory: Path, config: AnyConfig) -> dict[Path, int]:
    """The bytes of each checkpoint that may go before another is written, oldest first, whatever `checkpoint.keep` says.

    Not the newest; nor any that a roll-back of the watchdog may need; nor links, and what lies on another disk.
    """
    rolls_back = isinstance(config, Config) and "roll_back" in dict(config.watchdog).values()
    spared = max(config.checkpoint.keep - 1, 1) if rolls_back else 1
    return {
        old: _size(old)
        for old in beyond(directory, config, spared)
        if not old.is_symlink() and old.stat().st_dev == directory.stat().st_dev
    }


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def to_go(directory: Path, config: AnyConfig, needed: int) -> list[Path]:
    """The oldest that make room for another checkpoint, which takes `needed` bytes or what the newest takes; none if there is
    room, or if they would not make enough."""
    there = complete_checkpoints(directory)
    needed, free, chosen = max(needed, _size(there[-1]) if there else 0), free_bytes(directory), list[Path]()
    for old, size in may_go(directory, config).items():
        if free >= needed:
            break
        chosen.append(old)
        free += size
    return chosen if free >= needed else []


class Room(NamedTuple):
    each: int
    """Bytes that a checkpoint takes, about."""
    at_once: int
    """So many are to be there, and two where one takes the place of the only one."""
    fits: int
    """So many there is room for, with those that are there."""
    free: int
    """Bytes."""
    can_go: int
    """Bytes of `may_go`."""

    @classmethod
    def at(cls, directory: Path, config: AnyConfig, policy: Policy, *, step: int, num_steps: int) -> Room:
        """Of a run that has made this step, as this process sees the disk; `directory` may not be there yet."""
        each, free, settings = num_bytes(policy), free_bytes(directory), config.checkpoint
        there = [numbers_of(path) for path in complete_checkpoints(directory)]
        every = settings.every_steps or num_steps
        due = [(n, None) for n in range(step + 1, num_steps + 1) if n == num_steps or n % every == 0]
        newest, for_good, at_once = deque(there[-settings.keep :]), 0, len(there)
        for each_due in due:
            if len(newest) == settings.keep:
                for_good += _stays(*newest.popleft(), settings.keep_every)
            at_once = max(at_once, for_good + len(newest) + 1, 2 if at_once else 1)
            newest.append(each_due)
        can_go = sum(may_go(directory, config).values()) if there else 0
        return cls(each, at_once, len(there) + free // each, free, can_go)
