"""Started by test_checkpoint: a run on several processes, the first of which is asked to stop in the middle of an update."""

import sys
from pathlib import Path

from helpers import tiny_config
from test_checkpoint import UPDATES, stop_at_call

from grpo import Trainer
from grpo.system import distributed
from grpo.system.stopping import Stopped

settings = {**UPDATES, "distributed": {"zero_stage": 2, "sequence_parallel": int(sys.argv[2])}}
trainer = Trainer(tiny_config(Path(sys.argv[1]), **settings, run={"steps": 4, "resume": "auto"}))
if trainer.processes.is_main:
    stop_at_call(trainer, "_optimizer_step", 7)
try:
    trainer.train()
except Stopped as stopped:
    print(f"rank {trainer.processes.rank} stopped: {stopped.reason}")
distributed.stop()
