"""Started by test_tripwire: processes that do not sample from the policy they train; all must stop in the same step.

python tests/worker_tripwire.py OUT --fault stale [--zero 3] [--lora 8] [--offload optimizer parameters]

stale        The copies to sample from are never brought up to date: found in step 2.
temperature  Completions are sampled at 1.4 instead of 1: found in step 1.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch
from helpers import VARIETY, shallow, shard_even_small_weights, tiny_config
from test_tripwire import Hotter

from grpo import Trainer
from grpo.run.tripwire import SamplingGapError
from grpo.system import distributed

CAUSES = {"stale": "old weights", "temperature": "another temperature"}

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--fault", choices=CAUSES, default="stale")
parser.add_argument("--zero", type=int, default=3)
parser.add_argument("--lora", type=int, default=0, help="rank")
parser.add_argument("--offload", nargs="*", default=[], choices=["optimizer", "parameters"])
arguments = parser.parse_args()
shard_even_small_weights(fetch_ahead=True)
trainer = Trainer(
    tiny_config(
        arguments.out / "run",
        model={"name": shallow(2 if arguments.lora else 1)},  # with adapters one layer shows less
        rewards=VARIETY,
        rollout={"max_completion_tokens": 12, "num_prompts": max(4, int(os.environ.get("WORLD_SIZE", "1")))},
        algorithm={"kl_coef": 1e-3},  # every token has a gradient, and is in the post-mortem
        distributed={"zero_stage": arguments.zero, **{f"offload_{what}": True for what in arguments.offload}},
        lora={"rank": arguments.lora},
        memory={"micro_batch_tokens": 240},  # several passes, so that ZeRO-3 knows what comes next and fetches it ahead
        optimizer={"learning_rate": 1e-2 if arguments.lora else 3e-3},
        checkpoint={"every_steps": 2},
        run={"steps": 4},
    )
)
if arguments.fault == "stale":
    trainer.collector.generator.sync = lambda: None
else:
    trainer.collector.generator = Hotter(trainer.collector.generator)
try:
    trainer.train()
except SamplingGapError as error:
    first = str(error).splitlines()[1]
    cause = next((cause for cause in CAUSES.values() if re.match(rf" *\d+%  sampled (with|at) {cause}", first)), first)
    print(f"rank {trainer.processes.rank} stopped in step {trainer.state.step + 1}: {cause}", flush=True)
trainer.close()
torch.distributed.barrier()
distributed.stop()
