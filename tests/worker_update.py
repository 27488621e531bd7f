"""Started by test_distributed: two updates on fixed completions; writes metrics and weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from helpers import FixedGenerator, number_in_text, shard_even_small_weights, tiny_config
from safetensors.torch import save_file

from grpo import Trainer
from grpo.system import distributed

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--zero", type=int, required=True)
parser.add_argument("--budget", type=int, required=True)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--lora", type=int, default=0, help="rank")
parser.add_argument("--offload", nargs="*", default=[], choices=["optimizer", "parameters"])
parser.add_argument("--sequence-parallel", type=int, default=1)
parser.add_argument("--family", action="store_true", help="whatever looks at whole completions, minibatches or groups")
arguments = parser.parse_args()

FAMILY = {
    "ratio": "sequence",
    "clip_low": 1e-4,
    "clip_high": 1e-4,
    "top_entropy": 0.3,
    "clip_cov": 0.1,
    "clip_cov_low": 0.1,
    "num_epochs": 2,
    "importance": "truncate",
    "importance_low": 0.01,
    "importance_high": 2.0,
    "entropy_coef": 0.01,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "normalize_by_std": False,  # which the batch's takes the place of below
}
shard_even_small_weights(fetch_ahead=True)
config = tiny_config(
    arguments.out / "run",
    model={"dtype": arguments.dtype},
    rollout={"num_prompts": 6, "group_size": 3, "engine": "hf"},  # nothing is sampled
    algorithm={
        "kl_coef": 0.1,
        "num_minibatches": 2,
        "aggregation": "sequence",
        "max_sampling_gap": 100,
        **(FAMILY if arguments.family else {}),
    },
    # the output layer runs in more chunks on one process than on the other
    memory={"activation_checkpointing": 0.5 if arguments.zero == 3 else 0, "logprob_chunk_tokens": 16},
    # on random completions a larger step makes ratios explode, and noise with them; adapters start where B is zero
    optimizer={"learning_rate": 1e-4 if arguments.lora else 1e-5},
    lora={"rank": arguments.lora},
    distributed={
        "zero_stage": arguments.zero,
        "sequence_parallel": arguments.sequence_parallel,
        **{f"offload_{what}": True for what in arguments.offload},
    },
    checkpoint={"every_steps": 0},
    logging={"completions_every": 0},
)
# less than the longest sequence too: then each has a pass of its own
config.memory.micro_batch_tokens = arguments.budget
if arguments.family:  # refused beside KL in the reward, for batches without signal; here both are to be shared out
    config.algorithm.normalize_by_std = "batch"
trainer = Trainer(config, rewards=[number_in_text])
trainer.collector.generator = FixedGenerator()
widths: list[int] = []  # tokens of each pass on this process
trainer.policy.lm.get_input_embeddings().register_forward_hook(lambda _, args, __: widths.append(args[0].numel()))
metrics = [trainer.train_step() for _ in range(2)]
trainer.policy.sync()
if trainer.processes.is_main:
    with trainer.policy.sampling_model() as lm:
        save_file(
            {k: v.float().contiguous().clone() for k, v in lm.named_parameters()}, arguments.out / "weights.safetensors"
        )
    (arguments.out / "metrics.json").write_text(json.dumps(metrics))
    shards = [getattr(p, "ds_tensor", p).numel() for p in trainer.policy.lm.parameters()]
    (arguments.out / "widths.json").write_text(json.dumps(widths))
    (arguments.out / "held.json").write_text(json.dumps(sum(shards)))
trainer.close()
torch.distributed.barrier()
distributed.stop()
