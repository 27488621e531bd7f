"""Started by test_distributed: four steps at once, and four steps with a save and a resume between; the reference moves once.

What is offloaded waits in the machine's memory after the resume only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from helpers import QUESTIONS, VARIETY, shallow, shard_even_small_weights, tiny_config, without_pictures

from grpo import Trainer
from grpo.system import distributed

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--zero", type=int, required=True)
parser.add_argument("--lora", type=int, default=0, help="rank")
parser.add_argument("--offload", nargs="*", default=[], choices=["optimizer", "parameters"])
arguments = parser.parse_args()
shard_even_small_weights()
without_pictures()


def trainer(name: str, *, offload: Sequence[str] = ()) -> Trainer:
    return Trainer(
        tiny_config(
            arguments.out / name,
            data={"eval_name": str(QUESTIONS)},
            rollout={"max_completion_tokens": 10},
            **({"model": {"name": shallow(2)}} if arguments.lora else {}),
            rewards=VARIETY,
            evaluation={"num_questions": 5},  # an odd number over two processes
            algorithm={"kl_coef": 0.05, "num_minibatches": 2, "reference_refresh_steps": 4},  # after step 2
            lora={"rank": arguments.lora},
            distributed={"zero_stage": arguments.zero, **{f"offload_{what}": True for what in offload}},
            run={"steps": 4, "resume": "auto", "seed": 2},
        )
    )


trainer("whole").train()
first = trainer("halves")
for _ in range(3):
    first.train_step()
first.save()
first.close()
second = trainer("halves", offload=arguments.offload)
assert second.state.step == 3, f"resumed at step {second.state.step}"
second.train()
distributed.stop()
