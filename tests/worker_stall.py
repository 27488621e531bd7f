"""Started by test_heartbeat: a run on two processes. In the update of its second step one of them is in a collective of its own.

python tests/worker_stall.py RUN: with a trainer. Without an argument: on two GPUs over NCCL, where no collective waits by itself.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from grpo import Trainer
from grpo.system import distributed, heartbeat, progress

LIMITS = heartbeat.Limits(beat=0.5, stall=10.0)


def train(run: Path) -> None:
    from helpers import tiny_config

    settings = {"distributed": {"zero_stage": 2}, "checkpoint": {"every_steps": 1}, "run": {"steps": 3}}
    trainer = Trainer(tiny_config(run, **settings))
    aside, own = dist.new_group([0, 1]), trainer._optimizer_step

    def step(minibatch: list) -> None:
        if trainer.state.step == 1 and trainer.processes.rank == 1:
            dist.barrier(group=aside)
        own(minibatch)

    trainer._optimizer_step = step
    trainer.train()


def meet_on_gpus() -> None:
    processes = distributed.join()
    aside, one = dist.new_group([0, 1]), torch.ones(1, device=processes.device)
    dist.all_reduce(one)  # what a first collective sets up is no part of this
    dist.all_reduce(one, group=aside)
    processes.synchronize()
    if processes.rank == 0:
        with progress.phase("update"):
            processes.sum(1.0)
    else:
        with progress.phase("saving"):
            dist.all_reduce(one, group=aside)
            processes.synchronize()


heartbeat.start = partial(heartbeat.start, limits=LIMITS)
train(Path(sys.argv[1])) if len(sys.argv) > 1 else meet_on_gpus()
distributed.stop()
