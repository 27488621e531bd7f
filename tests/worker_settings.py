"""What several workers share; imported before anything is set up."""

from __future__ import annotations

from typing import Any

from grpo import distributed

original = distributed.deepspeed_config


def shard_even_small_weights(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """ZeRO-3 leaves weights below 100k elements whole, and the tiny model has no others: nothing would be tested."""
    settings = original(*args, **kwargs)
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings
