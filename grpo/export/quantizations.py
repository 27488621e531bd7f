"""The types of weights that a GGUF file can be written in."""

from __future__ import annotations

QUANTIZATIONS = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
    "q5_1": ("MOSTLY_Q5_1", "Q5_1"),
    "q5_0": ("MOSTLY_Q5_0", "Q5_0"),
    "q4_1": ("MOSTLY_Q4_1", "Q4_1"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0"),
}
"""What --quantization may be -> the file's type and that of its matrices, by the names of the package gguf."""

K_QUANTS = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Types that llama.cpp's own program makes."""


def check_quantization(name: str, *, file: str) -> None:
    """Raises ValueError if this is not a type that can be written, with the command that makes it if llama.cpp can."""
    if name in QUANTIZATIONS:
        return
    if name in K_QUANTS:
        raise ValueError(
            f"--quantization is {name}; K-quants are made by llama.cpp. Export with --quantization bf16, and then:\n"
            f"  llama-quantize {file} {file.replace('BF16', name.upper())} {name.upper()}"
        )
    raise ValueError(f"--quantization is {name!r}; it is one of {', '.join(QUANTIZATIONS)}. Choose one of them.")
