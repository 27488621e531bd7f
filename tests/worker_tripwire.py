"""Started by test_tripwire: two processes under ZeRO-3, whose copies to sample from are never brought up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import shard_even_small_weights, tiny_config

from grpo import Trainer, distributed
from grpo.tripwire import SamplingGapError

shard_even_small_weights()
config = tiny_config(
    Path(sys.argv[1]) / "run",
    distributed={"zero_stage": 3},
    optimizer={"learning_rate": 3e-3},
    checkpoint={"every_steps": 2},
    run={"steps": 4},
)
trainer = Trainer(config)
trainer.generator.sync = lambda: None
try:
    trainer.train()
except SamplingGapError as error:
    first = str(error).splitlines()[1]
    cause = "old weights" if "sampled with old weights" in first else first
    print(f"rank {trainer.processes.rank} stopped in step {trainer.state.step + 1}: {cause}", flush=True)
trainer.close()
torch.distributed.barrier()
distributed.stop()
