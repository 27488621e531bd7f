"""Started by test_distributed: three steps at once, and three steps with a save and a resume between."""

from __future__ import annotations

import argparse
from pathlib import Path

from helpers import TINY, tiny_config

from grpo import Trainer, distributed

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--zero", type=int, required=True)
arguments = parser.parse_args()


def trainer(name: str) -> Trainer:
    return Trainer(
        tiny_config(
            arguments.out / name,
            data={"eval_name": str(TINY / "test.jsonl")},
            evaluation={"num_questions": 5},  # an odd number over two processes
            algorithm={"kl_coef": 0.05, "num_minibatches": 2},
            distributed={"zero_stage": arguments.zero},
            run={"steps": 3, "resume": "auto"},
        )
    )


trainer("whole").train()
first = trainer("halves")
first.train_step()
first.save()
first.train_step()
first.close()
second = trainer("halves")
assert second.state.step == 1, f"resumed at step {second.state.step}"
second.train()
distributed.stop()
