"""Started by test_reshard: runs that go on from checkpoints of other layouts, on the completions of FixedGenerator."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from helpers import FixedGenerator, number_in_text, shallow, shard_even_small_weights, tiny_config

from grpo import Trainer
from grpo.policy.policy import Policy
from grpo.system import distributed
from grpo.system.distributed import whole

State = dict[str, dict[str, torch.Tensor]]


def run(out: Path, name: str, *, zero: int, steps: int, source: str | None = None, **settings: Any) -> None:
    """Train up to step `steps`, from the newest checkpoint of the run `source` on if there is one.

    What it held goes to resumed.pt and, after each step, step-N.pt.
    """
    if source is not None and os.environ.get("RANK", "0") == "0":
        shutil.copytree(out / source / "checkpoints", out / name / "checkpoints")
    trainer = Trainer(
        tiny_config(
            out / name,
            model={"name": shallow(1), **settings.pop("model", {})},
            rollout={"num_prompts": 6, "group_size": 3, "engine": "hf"},  # nothing is sampled
            algorithm={"kl_coef": 0.1, "num_minibatches": 2, "aggregation": "sequence", "max_sampling_gap": 100},
            logging={"completions_every": 0},
            distributed={"zero_stage": zero, **settings.pop("distributed", {})},
            run={"steps": 4, "resume": "auto"},
            **{"optimizer": {"learning_rate": 1e-5}, **settings},
        ),
        rewards=[number_in_text],
    )
    trainer.collector.generator = FixedGenerator()
    if source is not None:
        store(trainer, out / name / "resumed.pt")
    while trainer.state.step < steps:
        trainer.train_step()
        store(trainer, out / name / f"step-{trainer.state.step}.pt")
    trainer.save()
    trainer.close()


def store(trainer: Trainer, path: Path) -> None:
    counts = {float(state["step"]) for state in trainer.policy.engine.basic_optimizer.state.values()}
    held = {"position": trainer.state.position, "counts": counts, "state": full_state(trainer.policy)}
    if trainer.processes.is_main:
        torch.save(held, path)


def full_state(policy: Policy) -> State:
    """Weight, master and moments of each trained parameter, put together by DeepSpeed itself."""
    optimizer, stage = policy.engine.optimizer, policy.engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()
    if stage == 0:
        flat = optimizer.param_groups[0]["params"]
        trained = [id(p) for group in getattr(optimizer, "fp16_groups", [flat]) for p in group]
        masters = dict(zip(trained, flat, strict=True))
    state: State = {}
    for name, p in policy.engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if stage == 0:
            held = {"master": masters[id(p)], **policy.engine.basic_optimizer.state[masters[id(p)]]}
        else:
            held = {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
            held["master"] = safe_get_full_fp32_param(p)
        with whole(p):
            state[name] = {key: value.detach().clone() for key, value in {"weight": p, **held}.items() if key != "step"}
    return state


if __name__ == "__main__":
    shard_even_small_weights(whole_below=1000)
    out = Path(sys.argv[1])
    for case in json.loads(sys.argv[2]):
        run(out, **case)
    assert [thread.name for thread in threading.enumerate()].count("heartbeat") == 3
    torch.distributed.barrier()
    distributed.stop()
