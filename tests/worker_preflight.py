"""Started by test_preflight: each of some processes samples its share, and all come to the same result."""

from __future__ import annotations

import sys
from pathlib import Path

from helpers import FixedGenerator, number_in_text, tiny_config

from grpo import Trainer
from grpo.run.preflight import PreflightRefused
from grpo.system import distributed

trainer = Trainer(tiny_config(Path(sys.argv[1]), preflight={"num_questions": 5}), rewards=[number_in_text])
trainer.collector.generator = FixedGenerator()  # all of its completions are cut off
try:
    trainer.preflight.before_training(trainer.log.directory)
    refusal = ""
except PreflightRefused as error:
    refusal = str(error)
refusals = trainer.processes.gather(refusal)
assert "ends badly: 100%" in refusal, refusal
assert set(refusals) == {refusal}, refusals
distributed.stop()
