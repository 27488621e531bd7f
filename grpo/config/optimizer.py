"""The section `optimizer`, and what may not be combined in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from grpo.config.sections import Fraction, Section, Share


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW's decay of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """What the learning rate does after warm-up. All but constant end at final_rate_share with the last step; wsd (warm up, stay,
    decay; MiniCPM, arXiv 2404.06395) stays at its peak and falls in a line at the end, over decay_share."""
    final_rate_share: Share = 0.0
    """Share of the peak rate at which linear, cosine and wsd end."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps after warm-up, the last of them, over which wsd falls. Lowering it stays longer at the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this global L2 norm."""


def check_rate(optimizer: OptimizerConfig) -> None:
    """
    Raises:
        ValueError: a setting has no effect with the others.
    """
    schedule, default = optimizer.schedule, OptimizerConfig.model_fields["decay_share"].default
    if schedule == "constant" and optimizer.final_rate_share:
        raise ValueError(
            f"optimizer.final_rate_share is {optimizer.final_rate_share:g}; it has no effect while optimizer.schedule is "
            "constant. Set that to linear, cosine or wsd, or remove it."
        )
    if schedule != "wsd" and optimizer.decay_share != default:
        raise ValueError(
            f"optimizer.decay_share is {optimizer.decay_share:g}; it has no effect while optimizer.schedule is {schedule}. Set "
            "that to wsd, or remove it."
        )
