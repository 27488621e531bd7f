"""Started by test_checkpoint: two processes save twice; at the first time only one of them has the memory for a copy."""

import sys
from pathlib import Path

from helpers import tiny_config, without_pictures

from grpo import Trainer
from grpo.run import checkpoint
from grpo.system import distributed
from grpo.system.writer import Writer

run = Path(sys.argv[1]) / "run"
trainer = Trainer(tiny_config(run, distributed={"zero_stage": 2}, checkpoint={"every_steps": 0}))
rank = trainer.processes.rank
checkpoint.copy_fits = lambda *_: trainer.state.step > 1 or rank == 0
without_pictures()
chosen: list[bool] = []
start = Writer.start


def note(writer: Writer) -> None:
    chosen.append(writer.background)
    start(writer)


Writer.start = note
for _ in range(2):
    trainer.train_step()
    trainer.save(wait=False)
trainer.checkpoints.finish()
print(f"rank {rank} in the background: {chosen}")
trainer.close()
distributed.stop()
