"""The learning rate as a plain function of the optimizer step; nothing to save, nothing to step twice. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

from grpo.config import OptimizerConfig

SCHEDULES: dict[str, Callable[[float, OptimizerConfig], float]] = {
    "constant": lambda progress, config: 1.0,
    "linear": lambda progress, config: 1.0 - progress,
    "cosine": lambda progress, config: (1 + math.cos(math.pi * progress)) / 2,
    "wsd": lambda progress, config: min((1.0 - progress) / config.decay_share, 1.0),
}
"""From 1 to 0, or constant, against progress in [0, 1] since the end of warm-up."""


def learning_rate(config: OptimizerConfig, *, step: int, num_steps: int) -> float:
    """Rate of optimizer step `step`, counted from 0, of `num_steps`: the first warm-up step has 1/warmup_steps of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 1.0)
    last = config.final_rate_share
    return config.learning_rate * (last + (1 - last) * SCHEDULES[config.schedule](progress, config))
