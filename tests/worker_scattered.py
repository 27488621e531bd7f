"""Started by test_distributed as two processes: a sharded model of which one process has a whole copy to sample from, and one of
which none has. Both must say and learn the same, to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import TINY, FixedGenerator, number_in_text, shard_even_small_weights, tiny_config
from torch import Tensor

from grpo import Trainer
from grpo.algorithm.batch import pack
from grpo.check.dry_run import policy_that
from grpo.policy.policy import Policy
from grpo.run import tripwire
from grpo.system import distributed
from grpo.types import Batch, Group

out, dtype = Path(sys.argv[1]), sys.argv[2]
has_teacher, together = "teacher" in sys.argv, "together" in sys.argv


DISTILS = {"kl_coef": 1.0, "kl_estimator": "k2"}


class ScatteredTrainer(Trainer):
    """As if sampled elsewhere."""

    _policy_class = policy_that(samples=False)


def sequences(trainer: Trainer) -> Batch:
    """Two of this process."""
    groups = FixedGenerator().sample(
        trainer.prompts.prompts[trainer.processes.rank :: 2][:2], trainer.config.sampling, num_completions=1, seed=0
    )
    return pack([Group(group.prompt, group.completions) for group in groups], torch.zeros(2, 1))


def held(policy: Policy) -> int:
    """Elements of weights that this process has between passes."""
    policy._settle()
    copy = sum(weight.numel() for weight in policy.whole_lm.parameters()) if policy.holds_whole else 0
    return copy + sum(weight.numel() + weight.ds_tensor.numel() for weight in policy.lm.parameters())


def run(kind: type[Trainer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is to be the same: numbers, and what was written; and what the policy holds."""
    config = tiny_config(
        out / kind.__name__,
        model={"dtype": dtype},
        rollout={"num_prompts": 4, "group_size": 3, "engine": "hf"},  # nothing is sampled
        algorithm={
            "max_sampling_gap": 100,
            **(DISTILS if has_teacher else {"kl_coef": 0.1, "reference_refresh_steps": 1}),
        },
        teacher={"name": str(TINY / "model")} if has_teacher else {},
        optimizer={"learning_rate": 1e-3},
        distributed={"zero_stage": 3, "sequence_parallel": 1 + together},
        checkpoint={"every_steps": 2},
        logging={"completions_every": 0},
    )
    trainer = kind(config, rewards=[number_in_text])
    policy = trainer.policy
    trainer.collector.generator = FixedGenerator()
    for _ in range(2):
        trainer.train_step()
    policy.sync()
    batch = sequences(trainer)
    said = {
        "plain": policy.plain_logprobs()[1],
        "at 0.5": policy.sentence_logprobs(policy.plain_logprobs()[0], temperature=0.5),
        "alone": policy.unpacked_logprobs(batch),
        "alone, float32": policy.unpacked_logprobs(batch, float32=True),
    }
    numbers: dict[str, Any] = {"held": held(policy)}
    said |= {f"weight {name}": weight for name, weight in policy.whole_weights().items()}
    groups = FixedGenerator().sample(trainer.prompts.prompts[:2], config.sampling, num_completions=2, seed=0)
    numbers |= {
        "rounding": tripwire.measure_rounding(policy, groups),
        "bytes": policy.num_whole_bytes(),
        "causes": [
            cause.explains
            for cause in tripwire.diagnose(policy, FixedGenerator(), groups, config, earlier_gap=None, rounding=0.01)
        ],
    }
    trainer.save(wait=True)
    trainer.close()
    return numbers, said


numbers, said = {}, {}
shard_even_small_weights(fetch_ahead=True)
for kind in (Trainer, ScatteredTrainer):
    numbers[kind.__name__], said[kind.__name__] = run(kind)
rank = distributed.join().rank
torch.save(said, out / f"said-{rank}.pt")
(out / f"numbers-{rank}.json").write_text(json.dumps(numbers))
torch.distributed.barrier()
distributed.stop()
