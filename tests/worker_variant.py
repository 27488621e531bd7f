"""Started by test_check_invariance: a variant of the check in which everything is sharded, or with a fault to be found."""

from __future__ import annotations

import sys
from typing import Any

from helpers import shard_even_small_weights

from grpo.algorithm.loss import TokenLoss
from grpo.check import variant
from grpo.training import learner

kind = sys.argv.pop(1)
original = learner.grpo_loss


def normalized_by_pass(logprobs: Any, advantages: Any, weights: Any, objective: Any, **options: Any) -> TokenLoss:
    """The fault: the loss of each forward pass is a mean of its own, whatever share of the tokens it has."""
    return original(logprobs, advantages, weights / weights.sum().clamp(min=1e-9), objective, **options)


if kind == "sharded":
    shard_even_small_weights()
elif kind == "normalized_by_pass":
    learner.grpo_loss = normalized_by_pass
else:
    raise ValueError(kind)
variant.main()
