"""Started by test_checkpoint: three steps on two processes; when the second is saved, the second process has a full disk."""

import resource
import sys
from pathlib import Path

from helpers import tiny_config, without_pictures

from grpo import Trainer
from grpo.system import distributed

run = Path(sys.argv[1]) / "run"
config = tiny_config(run, distributed={"zero_stage": 2}, checkpoint={"every_steps": 1, "keep": 10}, run={"steps": 3})
trainer = Trainer(config)
own = trainer.checkpoints.save
without_pictures()


def save(state, step, **options):
    full = state.step == 2 and trainer.processes.rank == 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else soft, hard))
    try:
        return own(state, step, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


trainer.checkpoints.save = save
trainer.train()
distributed.stop()
