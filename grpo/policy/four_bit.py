"""Frozen weights in 4 bits beneath adapters: QLoRA (arXiv 2305.14314), by the kernels of bitsandbytes.

A weight is one of 16 values that are as likely as each other under a normal distribution (NF4, section 3), times the largest
magnitude of its block of 64. These magnitudes are kept in 8 bits, in blocks of 256 ("double quantization"): 4.13 bits a weight in
all. A pass makes a layer's weights dense, in the precision of its input, and lets go of them.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from grpo.system import progress


class FourBitLinear(nn.Linear):
    """x W^T + b of a weight that is stored in 4 bits and never trained.

    `bitsandbytes.nn.Linear4bit` is a layer that keeps the precision of the first input it has seen, and on some CPUs lays its
    weights out anew in an evaluation. Here every input has its own precision, and the weights stay as they are.
    """

    def __init__(self, dense: nn.Linear, device: torch.device) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.register_parameter("bias", dense.bias)
        packed, self.state = bnb.functional.quantize_4bit(
            dense.weight.data.to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x, self.weight, bias=self.bias, quant_state=self.state)

    def dense_weight(self) -> Tensor:
        """(out, in), in the precision that it had."""
        return bnb.functional.dequantize_4bit(self.weight.data, self.state)


def put_into_four_bits(lm: nn.Module, kinds: list[str], device: torch.device) -> None:
    """Put every linear layer whose name ends with one of `kinds` into 4 bits, on the device, one after the other."""
    chosen = [
        (name, layer)
        for name, layer in lm.named_modules()
        if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{kind}") for kind in kinds)
    ]
    for name, layer in chosen:
        path, _, last = name.rpartition(".")
        setattr(lm.get_submodule(path), last, FourBitLinear(layer, device))
        progress.tick()
