"""Started by test_tripwire and on GPUs: processes that sample from another policy than they train; each says what it takes for
the cause."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import shard_even_small_weights, tiny_config

from grpo import Trainer, distributed
from grpo.tripwire import SamplingGapError


def stale(generator: Any) -> None:
    """What is sampled from is never brought up to date; without a replica, that is the weights as they were at the start."""
    policy = generator.policy
    if policy._replica is None:
        policy._replica = policy._load_replica()
    generator.sync = lambda: None


def hotter(generator: Any) -> None:
    sample = generator.sample
    generator.sample = lambda prompts, sampling, **options: sample(
        prompts, replace(sampling, temperature=1.4), **options
    )


FAULTS = {"old weights": stale, "another temperature": hotter}

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--fault", choices=FAULTS, default="old weights")
parser.add_argument("--zero", type=int, default=3)
parser.add_argument("--lora", type=int, default=0, help="rank")
parser.add_argument("--offload", nargs="*", default=[], choices=["optimizer", "parameters"])
arguments = parser.parse_args()

shard_even_small_weights(fetch_ahead=True)
config = tiny_config(
    arguments.out / "run",
    distributed={"zero_stage": arguments.zero, **{f"offload_{what}": True for what in arguments.offload}},
    lora={"rank": arguments.lora},
    memory={"micro_batch_tokens": 120},  # several passes, so that ZeRO-3 knows what comes next and fetches it ahead
    optimizer={"learning_rate": 1e-2 if arguments.lora else 3e-3},
    checkpoint={"every_steps": 6},
    run={"steps": 6},
)
trainer = Trainer(config)
FAULTS[arguments.fault](trainer.generator)
try:
    trainer.train()
except SamplingGapError as error:
    first = str(error).splitlines()[1]
    cause = (
        arguments.fault
        if f"sampled with {arguments.fault}" in first or f"sampled at {arguments.fault}" in first
        else first
    )
    print(f"rank {trainer.processes.rank} stopped in step {trainer.state.step + 1}: {cause}", flush=True)
trainer.close()
torch.distributed.barrier()
distributed.stop()
