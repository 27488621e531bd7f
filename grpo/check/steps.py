"""Does the fast update learn as the plain one does? The first steps of a run, with each of the two, side by side.

Both sample with the run's own engine, from the same questions and the same random numbers. One update is that of a run, the other
is plain (grpo/check/plain.py). Once the weights differ by a rounding the completions differ too, so one pair of runs says little:
several seeds say how far two runs of the same kind are apart.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from statistics import mean, stdev

import torch

from grpo.check.plain import PlainTrainer, real_trainer
from grpo.config import Config
from grpo.trainer import Trainer

SHOWN = {
    "policy/kl": "KL",
    "optimizer/grad_norm": "grad norm",
    "policy/sampling_gap": "gap",
    "policy/clip_fraction": "clipped",
    "reward/mean": "reward",
    "completion/length_mean": "length",
}
KINDS: dict[str, type[Trainer]] = {"fast": Trainer, "plain": PlainTrainer}

Steps = list[dict[str, float]]


def check(config: Config, *, num_steps: int, seeds: Sequence[int] | None = None) -> int:
    """Run the steps of both kinds with each seed, print them, and return 0: what they mean is for the reader to say.

    Args:
        seeds: None: run.seed alone.

    Raises:
        ValueError: as Trainer.
    """
    chosen = seeds or [config.run.seed]
    runs: dict[str, list[Steps]] = {kind: [] for kind in KINDS}
    for seed in chosen:
        for kind, trainer_class in KINDS.items():
            runs[kind].append(run(config, trainer_class, seed=seed, num_steps=num_steps))
        print("\n".join(side_by_side(seed, *(runs[kind][-1] for kind in KINDS))), flush=True)
    print("\n".join(summary(runs)))
    return 0


def run(config: Config, trainer_class: type[Trainer], *, seed: int, num_steps: int) -> Steps:
    """The metrics of a run's first steps; the schedule is that of the whole run."""
    with real_trainer(config, trainer_class, run={"seed": seed}) as trainer:
        steps = [trainer.train_step() for _ in range(num_steps)]
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


def side_by_side(seed: int, fast: Steps, plain: Steps) -> list[str]:
    """Step by step, each metric of the fast update and of the plain one."""
    shown = {name: title for name, title in SHOWN.items() if name in fast[0]}
    lines = ["", f"seed {seed}; fast | plain", "step" + "".join(f"{title:>22}" for title in shown.values())]
    for number, (one, other) in enumerate(zip(fast, plain, strict=True), 1):
        pairs = "".join(f"{one[name]:>11.4g} |{other[name]:>9.4g}" for name in shown)
        lines.append(f"{number:>4}{pairs}")
    return lines


def summary(runs: dict[str, list[Steps]]) -> list[str]:
    """The last step's value of each metric: mean and, of several seeds, standard deviation."""
    lines = ["", f"{'last step':<24}" + "".join(f"{kind:>24}" for kind in runs)]
    for name in SHOWN:
        if name in runs["fast"][0][-1]:
            values = [[steps[-1][name] for steps in each] for each in runs.values()]
            lines.append(f"{name:<24}" + "".join(f"{_spread(each):>24}" for each in values))
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g}" + (f" +- {stdev(values):.2g}" if len(values) > 1 else "")
