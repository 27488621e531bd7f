"""Started by test_sft: two updates on rows of all forms, some with equal prompts; writes metrics and weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from helpers import shard_even_small_weights
from safetensors.torch import save_file
from test_sft import ROWS, sft_config

from grpo import SupervisedTrainer
from grpo.system import distributed

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--zero", type=int, required=True)
parser.add_argument("--budget", type=int, required=True)
parser.add_argument("--lora", type=int, default=0, help="rank")
parser.add_argument("--sequence-parallel", type=int, default=1)
arguments = parser.parse_args()
shard_even_small_weights(fetch_ahead=True)
config = sft_config(
    arguments.out / "run",
    training={"rows_per_update": 7},
    optimizer={"learning_rate": 1e-3 if arguments.lora else 1e-5},
    memory={"micro_batch_tokens": 200, "logprob_chunk_tokens": 16},
    lora={"rank": arguments.lora},
    distributed={"zero_stage": arguments.zero, "sequence_parallel": arguments.sequence_parallel},
    evaluation={"num_rows": 3},
    run={"steps": 2},
)
config.memory.micro_batch_tokens = arguments.budget  # less than the longest row too: then each has a pass of its own
trainer = SupervisedTrainer(config, train_dataset=ROWS)
metrics = [trainer.train_step() for _ in range(2)]
metrics.append(trainer.held_out_loss())
trainer.save()
trainer.policy.sync()
weights = {name: weight.float() for name, weight in trainer.policy.whole_weights().items()}
if trainer.processes.is_main:
    save_file(weights, arguments.out / "weights.safetensors")
    (arguments.out / "metrics.json").write_text(json.dumps(metrics))
trainer.close()
torch.distributed.barrier()
distributed.stop()
