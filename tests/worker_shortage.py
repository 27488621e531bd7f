"""Started by test_check_memory: a dry run in which memory runs out on the second process, while the first waits for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from helpers import tiny_config

from grpo.check import memory
from grpo.policy.policy import Policy


def backward(self: Policy, loss: torch.Tensor, *, last: bool) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


if os.environ["RANK"] == "1":
    Policy.backward = backward
raise SystemExit(memory.check(tiny_config(Path(sys.argv[1]), distributed={"zero_stage": 2})))
