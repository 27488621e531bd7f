"""One pass on several processes, for sequences that are too long for one: each has a run of its places.

Everything but attention looks at one place at a time, so a process needs no more than its own; for attention the processes
exchange places for heads, and each computes some of the heads over all places (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1).
The exchange is DeepSpeed's own. A process then holds 1 / n of a pass's activations and logits, and its part of each gradient: all
processes of a run add theirs up as they do without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from grpo.policy.families import attribute
from grpo.system.distributed import SequenceGroup
from grpo.types import MicroBatch


def check_heads(config: PretrainedConfig, size: int) -> None:
    """Raises ValueError if a model's attention heads cannot be shared out evenly over `size` processes."""
    heads = num_heads(config)
    if heads % size:
        possible = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"distributed.sequence_parallel is {size}; the model has {heads} attention heads, and each process takes as many of "
            f"them as the others. Set it to {', '.join(map(str, possible[:-1]))} or {heads}."
        )


def num_heads(config: PretrainedConfig) -> int:
    return attribute(config.get_text_config(), "num_attention_heads")


def repeats(num_kv_heads: int, size: int) -> int:
    """How often key and value heads are there, so that each process has those that its query heads see."""
    return math.lcm(num_kv_heads, size) // num_kv_heads


@dataclass(frozen=True)
class Share:
    """Of a pass with `num_places` places, those of this process: `width` from `start` on, of which the last may be none."""

    group: SequenceGroup
    num_places: int

    @property
    def width(self) -> int:
        return -(-self.num_places // self.group.size)

    @property
    def start(self) -> int:
        return self.group.rank * self.width

    def inputs(self, micro: MicroBatch) -> MicroBatch:
        """The pass with the tokens and positions of this process, and attention that exchanges its heads."""
        return replace(
            micro,
            tokens=self._own(micro.tokens),
            position_ids=self._own(micro.position_ids),
            packing=replace(micro.packing, share=self),
        )

    def _own(self, values: Tensor) -> Tensor:
        own = values[self.start : self.start + self.width]
        return torch.cat([own, own.new_zeros(self.width - len(own))])

    def targets(self, micro: MicroBatch) -> Tensor:
        """Which of the pass's T completion tokens are predicted from this process's places."""
        source = micro.source_index
        return ((source >= self.start) & (source < self.start + self.width)).nonzero().flatten()

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(width, heads, D) of all heads -> (S, heads / n, D) of all places."""
        times = repeats(k.shape[1], self.group.size)
        if times > 1:
            k, v = (x.unsqueeze(2).expand(-1, -1, times, -1).flatten(1, 2) for x in (k, v))
        q, k, v = (self._exchange(x, scatter=2, gather=1)[: self.num_places] for x in (q, k, v))
        return q, k, v

    def by_places(self, out: Tensor) -> Tensor:
        """(S, heads / n, D) -> (width, heads, D)."""
        missing = self.group.size * self.width - self.num_places
        return self._exchange(torch.cat([out, out.new_zeros(missing, *out.shape[1:])]), scatter=1, gather=2)

    def _exchange(self, x: Tensor, *, scatter: int, gather: int) -> Tensor:
        from deepspeed.sequence.layer import _SeqAllToAll  # who only samples has no use for DeepSpeed

        return _SeqAllToAll.apply(self.group.group, x.unsqueeze(0), scatter, gather, 0).squeeze(0)

    def whole(self, targets: Tensor, *parts: Tensor, num_tokens: int) -> list[Tensor]:
        """(T,) of each of the parts, which are those of `targets`, on every process of the group."""
        mine = torch.stack([part.float() for part in parts])
        return list(_Sum.apply(mine.new_zeros(len(parts), num_tokens).index_copy(1, targets, mine), self.group.group))


class _Sum(torch.autograd.Function):
    """The sum over processes that all go on with the same loss: its gradient is already that of each one's own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
