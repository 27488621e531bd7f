"""Started by test_distillation: does a policy give its teacher's own log-probabilities? And two steps of distillation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from helpers import FixedGenerator, shard_even_small_weights, tiny_config, without_pictures
from test_distillation import DISTILS, own_logprobs

from grpo import Trainer
from grpo.algorithm.batch import micro_batch, pack
from grpo.system import distributed

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("teacher")
parser.add_argument("--zero", type=int, required=True)
parser.add_argument("--lora", type=int, default=0, help="rank")
arguments = parser.parse_args()
shard_even_small_weights(fetch_ahead=True)
without_pictures()
settings = {**DISTILS, "teacher": {"name": arguments.teacher}, "lora": {"rank": arguments.lora}}
settings["algorithm"] = {**DISTILS["algorithm"], "max_sampling_gap": 100}
trainer = Trainer(tiny_config(arguments.out / "run", **settings, distributed={"zero_stage": arguments.zero}))
trainer.collector.generator = FixedGenerator()
groups = FixedGenerator().sample(trainer.prompts.draw(4), None, num_completions=2, seed=0)  # type: ignore[arg-type]
batch = pack(groups, torch.zeros(len(groups), 2))
micro = micro_batch(batch, torch.zeros(len(batch.sampling_logprobs)))
ours = trainer.policy.ref_logprobs(micro.to(trainer.processes.device))
gap = float((ours - own_logprobs(Path(arguments.teacher), groups)).abs().max())
trainer.prompts.position = 0
metrics = [trainer.train_step() for _ in range(2)]
if trainer.processes.is_main:
    names = ("policy/kl", "optimizer/loss", "optimizer/grad_norm")
    (arguments.out / "found.json").write_text(json.dumps([gap, *([row[name] for name in names] for row in metrics)]))
trainer.close()
torch.distributed.barrier()
distributed.stop()
