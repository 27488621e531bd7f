"""Started by test_distributed: two steps under ZeRO-3; how many decoder layers the backward passes of the second gather again,
and whose linear layers they run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle
from helpers import FixedGenerator, shard_even_small_weights, tiny_config, without_pictures
from torch import Tensor

from grpo import Trainer
from grpo.policy.language_model import decoder_layers
from grpo.system import distributed

shard_even_small_weights()
without_pictures()
trainer = Trainer(
    tiny_config(
        Path(sys.argv[1]) / "run",
        rollout={"engine": "hf"},  # nothing is sampled
        algorithm={"kl_coef": 0.05, "max_sampling_gap": 1e6},
        # several passes a step: the second with a backward pass is recorded
        memory={"micro_batch_tokens": 120, "activation_checkpointing": float(sys.argv[2])},
        distributed={"zero_stage": 3},
    )
)
trainer.collector.generator = FixedGenerator()
layer_of = {
    id(weight): number
    for number, layer in enumerate(decoder_layers(trainer.policy.lm))
    for weight in layer.parameters()
}
gathered: list[set[int]] = []
begun, backward = AllGatherCoalescedHandle.__init__, trainer.policy.backward


def watched(handle: AllGatherCoalescedHandle, *args: object, **options: object) -> None:
    begun(handle, *args, **options)
    gathered[-1].update(layer_of[id(weight)] for weight in handle.params if id(weight) in layer_of)


def counted(loss: Tensor, *, last: bool) -> None:
    gathered.append(set())
    backward(loss, last=last)
    gathered.append(set())


gathered.append(set())
AllGatherCoalescedHandle.__init__ = watched
trainer.train_step()
gathered[:] = [set()]
trainer.policy.backward = counted
trainer.train_step()
if trainer.processes.is_main:
    forward, again = (sum(map(len, gathered[first::2])) for first in (0, 1))
    print(f"{forward} layers gathered in forward passes, {again} in backward passes", flush=True)
    print(f"torch's own linear layers: {torch.nn.functional.linear is torch._C._nn.linear}", flush=True)
trainer.close()
distributed.stop()
