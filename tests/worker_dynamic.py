"""Started by test_dynamic_sampling: a step of fixed completions, of which some groups have no signal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from helpers import FixedGenerator, number_or_nothing, tiny_config
from test_dynamic_sampling import DYNAMIC, FIXED

from grpo import Trainer, distributed

out = Path(sys.argv[1])
trainer = Trainer(tiny_config(out / "run", **FIXED, rollout=DYNAMIC), rewards=[number_or_nothing])
trainer.generator = FixedGenerator()
metrics = trainer.train_step()
if trainer.processes.is_main:
    (out / "metrics.json").write_text(json.dumps(metrics))
trainer.close()
torch.distributed.barrier()
distributed.stop()
