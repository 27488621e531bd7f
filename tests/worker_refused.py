"""Started by test_library: two processes whose trainer has failed, on both and then on the main one alone, go on from there."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from helpers import tiny_config
from test_library import HOLDS

from grpo import Callback, Trainer
from grpo.system import distributed
from grpo.training.state import Rollout


class Fails(Callback):
    """In the first step on both processes, in the second on the main one."""

    def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
        if step == 1 or (step == 2 and trainer.processes.is_main):
            raise ZeroDivisionError


config = tiny_config(Path(sys.argv[1]), rollout={"max_completion_tokens": 4}, run={"steps": 9})
trainer = Trainer(config, callbacks=[Fails()])
rank, other = trainer.processes.rank, None
try:
    trainer.train_step()
except ZeroDivisionError:
    print(f"rank {rank} failed")
if rank == 0:
    command = [sys.executable, "-c", HOLDS, str(trainer.directory)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
trainer.processes.barrier()
try:
    trainer.train_step()
except ValueError as refused:
    print(f"rank {rank} was refused: {'another process is at work there' in str(refused)}")
trainer.processes.barrier()
if other is not None:
    other.communicate()
trainer.processes.barrier()
for _ in range(2):
    try:
        trainer.train_step()
    except ZeroDivisionError:
        print(f"rank {rank} failed again")
print(f"rank {rank} is at step {trainer.state.step}")
trainer.close()
distributed.stop()
