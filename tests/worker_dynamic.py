"""Started by test_dynamic_sampling: a step of fixed completions, in which the batch's groups are all with one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_dynamic_sampling import alternating

from grpo.system import distributed

out = Path(sys.argv[1])
trainer = alternating(out / "run")
metrics = trainer.train_step()
if trainer.processes.is_main:
    (out / "metrics.json").write_text(json.dumps(metrics))
trainer.close()
torch.distributed.barrier()
distributed.stop()
