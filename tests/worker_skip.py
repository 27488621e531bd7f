"""Started by test_watchdog: one sequence on one process makes an update not finite, in every ZeRO stage and precision.

Writes for each whether the weights stayed, and whether the update after it is the one without the bad one before.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from helpers import FixedGenerator, number_in_text, shallow, shard_even_small_weights, tiny_config

from grpo import Trainer
from grpo.system import distributed
from grpo.types import Batch, MicroBatch

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("cases", nargs="+", help="stage:dtype[:offload]")
arguments = parser.parse_args()
shard_even_small_weights()


def bad(trainer: Trainer, kind: str) -> None:
    """Let the next minibatch have one value that is not finite, on the last process, in the first of its passes."""
    deal = trainer.learner.deal

    def dealt(mine: Batch) -> list[MicroBatch]:
        trainer.learner.deal = deal
        passes = deal(mine)
        assert len(passes) > 1, "several passes make up an update here"
        if trainer.processes.rank == trainer.processes.world_size - 1:
            getattr(passes[0], kind)[0] = math.nan
        return passes

    trainer.learner.deal = dealt


def weights(trainer: Trainer) -> list[torch.Tensor]:
    trainer.policy.sync()
    with trainer.policy.sampling_model() as lm:
        return [weight.detach().clone() for weight in lm.parameters()]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def run(stage: int, dtype: str, offload: bool, kind: str) -> dict[str, object]:
    config = tiny_config(
        arguments.out / "run",
        model={"name": shallow(1), "dtype": dtype},
        rollout={"num_prompts": 4, "group_size": 3, "engine": "hf"},  # nothing is sampled
        algorithm={"kl_coef": 0.0, "max_sampling_gap": 100},
        optimizer={"learning_rate": 1e-3},
        distributed={"zero_stage": stage, "offload_optimizer": offload},
        logging={"completions_every": 0},
    )
    config.memory.micro_batch_tokens = 64
    trainer = Trainer(config, rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()
    trainer.train_step()
    before, state = weights(trainer), asdict(trainer.state)
    saved = trainer.save()
    trainer.train_step()
    expected = weights(trainer)
    trainer._restore(saved)
    restored = equal(before, weights(trainer))
    bad(trainer, kind)
    metrics = trainer.train_step()
    kept = equal(before, weights(trainer))
    counted = trainer.state.optimizer_steps - state["optimizer_steps"]
    trainer.state.position = state["position"]
    trainer.train_step()
    after = weights(trainer)
    trainer.close()
    return {
        "restored": restored,
        "kept": kept,
        "skipped": metrics["optimizer/skipped"],
        "has_loss": "optimizer/loss" in metrics,
        "counted": counted,
        "moved": not equal(before, after),
        "as_without": equal(after, expected),
    }


results = {}
for number, case in enumerate(arguments.cases):
    stage, dtype, *offload = case.split(":")
    results[case] = run(int(stage), dtype, bool(offload), ("advantages", "weights")[number % 2])
(arguments.out / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
torch.distributed.barrier()
distributed.stop()
