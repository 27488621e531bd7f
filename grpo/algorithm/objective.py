"""What makes loss and advantages one algorithm or another: values, which the configuration holds without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EntropyControl:
    """The weight of the entropy bonus as it follows a target (Skywork-OR1, arXiv 2505.22312).

    It rises by `step` after every training step whose entropy was below the target, falls by as much after one above it, and
    stays from 0 to `most`. The bonus is left out altogether after a step above the target.
    """

    target: float
    step: float
    most: float

    def next(self, coef: float, entropy: float) -> float:
        """After a step with this entropy and that weight."""
        return min(max(0.0, coef + (self.step if entropy < self.target else -self.step)), self.most)

    def in_use(self, coef: float, entropy: float | None) -> float:
        """The weight in the loss; `entropy` is that of the step before, None: of the first."""
        return 0.0 if entropy is not None and entropy > self.target else coef


@dataclass(frozen=True)
class AdvantageRule:
    """The values that make advantages of rewards; config.AlgorithmConfig says what each means."""

    baseline: str = "mean"
    normalize_by_std: bool | str = True
    normalize_by_mean: bool = False
    pass_at: int = 1
    separate_rewards: bool = False


@dataclass(frozen=True)
class Objective:
    """The values that make `grpo_loss` one algorithm or another; config.AlgorithmConfig says what each means.

    What is left out here does nothing: REINFORCE remains.
    """

    ratio: str = "token"
    clip: str = "surrogate"
    clip_low: float | None = None
    clip_high: float | None = None
    clip_dual: float | None = None
    soft_positive: float = 1.0
    soft_negative: float = 1.05
    importance: str = "none"
    importance_level: str = "token"
    importance_low: float | None = None
    importance_high: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_weighted: bool = False
    entropy_coef: float = 0.0
