"""Started by test_distributed: two steps under ZeRO-3; in a pass, processes have different numbers of chunks of logits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import FixedGenerator, shallow, shard_even_small_weights, tiny_config, without_pictures

from grpo import Trainer
from grpo.system import distributed
from grpo.types import MicroBatch

shard_even_small_weights()
without_pictures()
trainer = Trainer(
    tiny_config(
        Path(sys.argv[1]) / f"chunks-of-{sys.argv[2]}",
        model={"name": shallow(1)},
        rollout={"engine": "hf"},  # nothing is sampled
        algorithm={"kl_coef": 0.05, "num_minibatches": 2, "max_sampling_gap": 1e6},
        memory={"logprob_chunk_tokens": int(sys.argv[2])},
        distributed={"zero_stage": 3},
    )
)
trainer.collector.generator = FixedGenerator()
counts = []
forward = trainer.policy.logprobs


def counted(micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    counts.append(-(-len(micro.targets) // int(sys.argv[2])))
    return forward(micro)


trainer.policy.logprobs = counted
trainer.train()
differ = sum(len(set(each)) > 1 for each in zip(*trainer.processes.gather(counts), strict=True))
if trainer.processes.is_main:
    print(f"{differ} passes with different numbers of chunks", flush=True)
distributed.stop()
