"""One variant of the invariance check, a process among its peers: the same completions, one update, what it did to the weights.

python -m grpo.check.variant --config VARIANT.yaml --directory SHARED --out RESULT.json

Whichever variant comes first samples the completions into SHARED/rollout.json and leaves its updated weights there; the others
replay the completions and compare their weights. Started by grpo/check/invariance.py, which says what is compared and why.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo.check.dry_run import rehearse
from grpo.config import Config
from grpo.observe.console import errors_for_users
from grpo.policy.policy import Policy
from grpo.rollout.grouping import all_at_once
from grpo.system import distributed
from grpo.system.out_of_memory import is_out_of_memory
from grpo.trainer import Trainer
from grpo.types import Completion, Group, OnGroup, Prompt, Sampling

EPSILON = 1e4
"""AdamW divides a gradient g by |g| + epsilon in its first step. With the usual 1e-8 that is the sign of g, and the noise in
gradients near zero is as large as any update; with an epsilon far above every clipped gradient the update is g itself, scaled."""

SCALE = 1e6
"""Weights move by SCALE * g: so far that what they were before hardly matters, and bfloat16 weights show the update."""

SMALL = 0.01
"""A weight's difference is measured against its own update and this share of the whole one: some have a gradient of zero but for
rounding, such as biases of keys."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "directory", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        with errors_for_users():
            result = run(Config.load(arguments.config), arguments.directory)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        arguments.out.write_text(json.dumps({"out_of_memory": str(error).splitlines()[0]}))
        os._exit(1)  # the launcher ends the others, which wait for this one
    if result is not None:
        arguments.out.write_text(json.dumps(result))
    torch.distributed.barrier()
    distributed.stop()


class CountingPolicy(Policy):
    """Counts the passes of the update."""

    num_passes = 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See Policy."""
        self.num_passes += 1
        super().backward(loss, last=last)


class CountingTrainer(Trainer):
    """Trains a CountingPolicy."""

    policy: CountingPolicy
    _policy_class = CountingPolicy


def run(config: Config, directory: Path) -> dict[str, Any] | None:
    """One update; on the main process what came of it."""
    trainer = rehearse(config, CountingTrainer)
    processes, policy = trainer.processes, trainer.policy
    rollout, reference = directory / "rollout.json", directory / "weights.safetensors"
    if not processes.on_main(rollout.exists):
        _sample(trainer, rollout)
    trainer.collector.generator = Replay(rollout, policy)
    gc.collect()  # the sampling engine's memory is free from here on
    for group in policy.optimizer.param_groups:
        group["eps"] = EPSILON
    before = policy.whole_weights()
    metrics = trainer.train_step()
    policy.sync()
    after = policy.whole_weights()
    if not processes.is_main:
        return None
    if not reference.exists():
        save_file(after, reference)
    return {
        "passes": policy.num_passes,
        "grad_norm": metrics["optimizer/grad_norm"],
        **compare(before, after, reference),
    }


def _sample(trainer: Trainer, path: Path) -> None:
    """Sample the first questions' completions, on all processes, and write them down."""
    config = trainer.config
    groups = trainer.collector.generator.sample(
        trainer.prompts.draw(config.rollout.num_prompts),
        config.sampling,
        num_completions=config.rollout.group_size,
        seed=config.run.seed + trainer.processes.rank,
    )
    trainer.prompts.position = 0
    mine = {str(group.prompt.row): [to_replay(each) for each in group.completions] for group in groups}
    everyone = trainer.processes.gather(mine)
    if trainer.processes.is_main:
        path.write_text(json.dumps({row: found for part in everyone for row, found in part.items()}))
    trainer.processes.barrier()


def to_replay(completion: Completion) -> dict[str, Any]:
    """As JSON, with what an update reads: nothing of tools and environments but which tokens are trained."""
    return asdict(replace(completion, turns=None, episode=None))


class Replay:
    """A Generator that answers each question with the completions in a file."""

    def __init__(self, path: Path, policy: Policy) -> None:
        self.completions = {row: [Completion(**each) for each in found] for row, found in _read(path).items()}
        self.policy = policy

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator."""
        return all_at_once([Group(prompt, self.completions[str(prompt.row)]) for prompt in prompts], on_group)

    def sync(self) -> None:
        """The policy is brought up to date by whoever reads it."""

    def halve(self) -> str | None:
        """It takes no memory."""
        return None

    def release_memory(self) -> None:
        """It has none."""

    def metrics(self) -> dict[str, float]:
        """Nothing was sampled."""
        return {}


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads(path.read_text())


def compare(before: dict[str, Tensor], after: dict[str, Tensor], reference: Path) -> dict[str, Any]:
    """How far an update is from the one whose outcome `reference` holds.

    Returns:
        `update`: L2 norm of the difference of all weights' updates, relative to that of the reference's update.
        `weight`, `weight_update`: the weight that is worst off, and its own relative difference; see SMALL.
    """
    squared_differences, squared_norms = {}, {}
    with safe_open(str(reference), "pt") as expected:
        for name, weight in after.items():
            other = expected.get_tensor(name).float()
            squared_differences[name] = float((weight.float() - other).double().square().sum())
            squared_norms[name] = float((other - before[name].float()).double().square().sum())
    norm = sum(squared_norms.values()) ** 0.5
    apart = {name: squared_differences[name] ** 0.5 / (squared_norms[name] ** 0.5 + SMALL * norm) for name in after}
    worst = max(apart, key=lambda name: (apart[name] != apart[name], apart[name]))  # NaN is worst of all
    update = sum(squared_differences.values()) ** 0.5 / norm
    return {"update": update, "weight": worst, "weight_update": apart[worst]}


if __name__ == "__main__":
    main()
