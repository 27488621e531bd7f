"""A recipe of supervised training -> the same for the GPUs at hand: how memory is used, and what a million tokens take.

Rows, epochs, rows per update and rate stay. Memory and time are estimated as in scale.py, without reference and sampling.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from grpo.check.scale import (
    GPUS,
    MOST_PASS,
    USABLE,
    USUAL_PASS,
    Hardware,
    Layout,
    Shape,
    annotated,
    doubled,
    last_that,
    memory_gib,
    zero_stages,
)
from grpo.config import SupervisedConfig, read_yaml
from grpo.config.settings import read_file


def layout_for(recipe: SupervisedConfig, shape: Shape, hardware: Hardware, *, max_tokens: int) -> Layout:
    """The first way to use the memory that fits, the fastest tried first.

    Raises:
        ValueError: none fits, the model has too few positions, or the recipe trains adapters.
    """
    if recipe.lora.rank:
        raise ValueError(
            f"lora.rank is {recipe.lora.rank}; what is known of memory and time is of training all weights. Remove it from "
            "--config."
        )
    if shape.positions is not None and max_tokens > shape.positions:
        raise ValueError(
            f"--max-tokens is {max_tokens}; {shape.name} knows {shape.positions} positions. Lower --max-tokens, or take another "
            "--model."
        )

    def fits(layout: Layout) -> bool:
        return sum(memory_of(recipe, shape, layout, hardware).values()) <= USABLE * hardware.memory_gib

    for (offload, stage), least in product(zero_stages(hardware.gpus), (USUAL_PASS, 0)):
        first = Layout(stage, offload, max(max_tokens, least), sequences=0)
        if fits(first):
            larger = (replace(first, pass_tokens=tokens) for tokens in doubled(first.pass_tokens, MOST_PASS))
            return last_that(fits, first=first, others=larger)
    needed = sum(memory_of(recipe, shape, first, hardware).values()) / USABLE
    raise ValueError(
        f"--gpu-memory is {hardware.memory_gib:g}; {shape.name} with {shape.weights / 1e9:.2f} billion weights needs "
        f"{needed:.0f} GiB on each of {hardware.gpus} even with distributed.zero_stage {first.zero_stage}, "
        f"distributed.offload_optimizer and passes of one row ({max_tokens} tokens). Give more --gpus or --gpu-memory, lower "
        "--max-tokens, or take a smaller --model."
    )


def memory_of(recipe: SupervisedConfig, shape: Shape, layout: Layout, hardware: Hardware) -> dict[str, float]:
    """GiB of one GPU, by part."""
    return memory_gib(
        shape,
        layout,
        gpus=hardware.gpus,
        reference=False,
        samples=recipe.evaluation.num_questions > 0,
        sequence_tokens=0,
        chunk_tokens=recipe.memory.logprob_chunk_tokens,
    )


def seconds_per_million(shape: Shape, hardware: Hardware) -> float:
    """Of tokens of prompts and completions that are trained on once."""
    return 6 * shape.weights * 1e6 / (GPUS[hardware.gpu].training * hardware.gpus)


def as_yaml(
    recipe: SupervisedConfig,
    source: Path,
    shape: Shape,
    hardware: Hardware,
    *,
    max_tokens: int,
    run_dir: str,
    out: Path,
) -> str:
    """The recipe's file for this hardware, each change with its reason, and the estimates at the top.

    Raises:
        ValueError: see layout_for.
    """
    layout = layout_for(recipe, shape, hardware, max_tokens=max_tokens)
    own = recipe.data.max_tokens
    changes: dict[str, tuple[Any, str]] = {
        "model.name": (shape.name, f"{shape.weights / 1e9:.3g} billion weights"),
        "data.max_tokens": (
            max_tokens,
            "as the recipe" if max_tokens == own else f"--max-tokens; the recipe has {own:,}",
        ),
        "memory.micro_batch_tokens": (layout.pass_tokens, "what fits; results do not depend on it"),
        "memory.activation_checkpointing": (1, "least memory"),
        "distributed.zero_stage": (layout.zero_stage, f"for {hardware.gpus} GPU(s), what fits with the least traffic"),
        "distributed.sequence_parallel": (1, "each GPU runs passes of its own"),
        "distributed.offload_optimizer": (
            layout.offload,
            "it does not fit otherwise; each update waits for the CPU" if layout.offload else "it fits without",
        ),
        "run.dir": (run_dir, "of its own"),
    }
    settings = read_file(source)
    for name, (value, _) in changes.items():
        section, setting = name.split(".", 1)
        settings.setdefault(section, {})[setting] = value
    header = _header(recipe, source, shape, hardware, layout, out)
    text = annotated(settings, {name: reason for name, (_, reason) in changes.items()}, header, {})
    SupervisedConfig(**read_yaml(text))
    return text


def _header(
    recipe: SupervisedConfig, source: Path, shape: Shape, hardware: Hardware, layout: Layout, out: Path
) -> list[str]:
    memory = memory_of(recipe, shape, layout, hardware)
    launch = f"grpo sft --processes {hardware.gpus} --config {out}"
    needs_more = recipe.evaluation.num_questions > 0 and not recipe.memory.release_kv_cache
    epochs = f"{recipe.training.epochs:g} epochs" if recipe.run.steps is None else f"{recipe.run.steps:,} updates"
    return [
        f"{source.name} for {shape.name}, by `grpo scale`, for {hardware.gpus} x {hardware.gpu} with "
        f"{hardware.memory_gib:g} GiB. The estimates are those of grpo/check/scale.py;",
        "the first command measures them, the second trains. What has no reason beside it is the recipe's:",
        f"  {launch} --dry-run",
        f"  {launch}",
        "",
        f"Time    {seconds_per_million(shape, hardware):.0f} s for a million tokens of rows, in each of {epochs}. Not in it: "
        "evaluations, checkpoints" + ", the optimizer on the CPU" * layout.offload + ".",
        f"Memory  {sum(memory.values()):.1f} GiB: "
        + ", ".join(f"{name} {size:.1f}" for name, size in memory.items() if size)
        + ".",
        *["        The answers to held-out questions need some more."] * needs_more,
        f"Kept    {recipe.training.rows_per_update} rows per update, {epochs}, the learning rate.",
    ]
