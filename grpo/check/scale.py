"""A recipe for many GPUs -> the same recipe for few: which numbers change, why, and what the run will take.

Kept: updates per rollout, completions per question, rollouts per reference, and whatever else the recipe says. Changed: questions
per update, the length of a completion, the number of rollouts, and how memory is used.

Memory of one of N GPUs, in bytes per weight:

    policy       2            2 / N under ZeRO-3, and 2 for the whole copy that samples, if there is one
    reference    2            2 / N under ZeRO-3; 0 without a KL penalty
    optimizer    12 / N       float32 weights and two moments; 0 if offloaded
    gradients    6 / N        with DeepSpeed's buffers

plus activations of a pass (2 bytes x hidden size x layers a token, everything recomputed, and 34 bytes x hidden size for the
layer that is), one chunk of logits, and keys and values of the completions that run at once. With memory.release_kv_cache these
do not lie beside an update's gradients, activations and logits: the larger of the two phases counts, and sampling works with one
layer's activations of a pass over prompts, or with its step's logits in float32, twice.

Time: a decoding step reads the weights, keys, values and logits at the memory's speed, multiplies at the arithmetic's, and
launches 36 microseconds of small kernels a layer; passes multiply at the rates measured on an H200. Other GPUs are scaled by
their data sheets and were not measured. tests/test_scale.py holds both to what docs/performance.md measured: memory within a
tenth, time within a fifth. Dynamic sampling is taken to find signal in half of the groups, and so to sample twice as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.config import Config, ModelConfig, read_yaml, write_yaml
from grpo.config.settings import read_file
from grpo.policy.families import attention_calls, attribute, without_weights
from grpo.policy.model_source import model_config
from grpo.rollout.engine import READ_TOKENS
from grpo.system.distributed import GIB

USABLE = 0.92
"""Share of a GPU's memory that is planned for; the rest is CUDA's own and what fragments."""
LAYER_SECONDS = 36e-6
"""Small kernels of a layer in a decoding step."""
MOST_SEQUENCES = 1024
LEAST_SEQUENCES = 32
"""Completions at once on a GPU; with fewer, decoding waits for launches."""
MOST_PASS, USUAL_PASS = 65_536, 16_384
"""Tokens of a pass: larger ones are no faster, and smaller ones leave a fast GPU waiting for the host on small models."""
LEAST_REFERENCES = 4
"""A run should see its reference replaced so often; the paper's has 26."""
LEAST_ROLLOUTS = 100
"""Of a recipe that never replaces it."""
USUAL_TOKENS = 2048
"""Of a completion, where nothing else is asked for and the recipe has no fewer."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU does a second."""

    bandwidth: float  # bytes read
    decoding: float  # floating-point operations of a decoding step's products
    forward: float  # of passes without gradient
    training: float  # of passes with gradient, 6 a weight and token; what is recomputed is not counted


def _h200_times(bandwidth: float, arithmetic: float) -> Gpu:
    return Gpu(4.3e12 * bandwidth, 790e12 * arithmetic, 450e12 * arithmetic, 310e12 * arithmetic)


GPUS = {
    "h200": _h200_times(1, 1),  # docs/performance.md
    "h100": _h200_times(3.35 / 4.8, 1),  # TB/s and TFLOP/s of the data sheets
    "a100": _h200_times(2.04 / 4.8, 312 / 989),
}


@dataclass(frozen=True)
class Shape:
    """Of a model: what memory and time depend on."""

    name: str
    weights: int
    layers: int
    hidden: int
    vocabulary: int
    kv_bytes: int  # of a token's keys and values, in bfloat16
    positions: int | None


@dataclass(frozen=True)
class Hardware:
    gpus: int
    memory_gib: float  # of each
    gpu: str  # of GPUS


@dataclass(frozen=True)
class Layout:
    """How memory is used."""

    zero_stage: int
    offload: bool
    pass_tokens: int
    sequences: int
    releases: bool = False  # keys and values, for the update


@dataclass(frozen=True)
class Scaled:
    """A recipe for other hardware."""

    recipe: Config
    shape: Shape
    hardware: Hardware
    layout: Layout
    prompts_per_update: int
    rollouts: int
    max_tokens: int


def shape_of(name: str) -> Shape:
    """Of a hub id or directory, from its configuration alone.

    Raises:
        ValueError: there is none, or not of a causal language model.
    """
    try:
        config = model_config(ModelConfig(name=name))
        lm, reason = without_weights(config, trust_remote_code=False)
        if lm is None:
            raise ValueError(reason)
    except ValueError as error:
        raise ValueError(
            f"--model is {name!r}; neither a directory nor the hub gave the configuration of a causal language model: "
            f"{str(error).splitlines()[0]} Correct the name, or the directory's config.json."
        ) from error
    text = config.get_text_config()
    calls, _ = attention_calls(lm)
    per_layer = sum(call.num_kv_heads * (call.key_dim + call.value_dim) for call in calls) // max(len(calls), 1)
    return Shape(
        name,
        sum(weight.numel() for weight in lm.parameters()),
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        text.num_hidden_layers * per_layer * 2,
        attribute(text, "max_position_embeddings"),
    )


def memory_gib(
    shape: Shape,
    layout: Layout,
    *,
    gpus: int,
    reference: bool,
    samples: bool,
    sequence_tokens: int,
    chunk_tokens: int,
) -> dict[str, float]:
    """What takes how much of one GPU while the policy is updated, or sampled if that takes more; see above."""
    shares = gpus if layout.zero_stage == 3 else 1
    model, kept = shape.weights, shape.hidden * (2 * shape.layers + 34)
    parts = {
        "policy": model * (2 / shares + 2 * (layout.zero_stage == 3 and samples)),
        "reference": model * 2 / shares * reference,
        "optimizer": 0 if layout.offload else model * 12 / gpus,
        "gradients": model * 6 / gpus,
        "activations": layout.pass_tokens * kept,
        "logits": chunk_tokens * shape.vocabulary * 2,
        "keys and values": layout.sequences * sequence_tokens * shape.kv_bytes,
    }
    if layout.releases:
        parts = _fuller_phase(parts, shape, layout)
    return {name: size / GIB for name, size in parts.items()}


def _fuller_phase(parts: Mapping[str, float], shape: Shape, layout: Layout) -> dict[str, float]:
    """Of an update's parts and keys and values: these with what sampling works with, or the others."""
    of_updates = {"activations", "logits"} | ({"gradients"} if layout.zero_stage < 3 else set())  # 3 keeps a share
    work = max(READ_TOKENS * shape.hidden * 34, layout.sequences * shape.vocabulary * 8)
    update = {name: size for name, size in parts.items() if name != "keys and values"}
    sampling = {name: size for name, size in parts.items() if name not in of_updates} | {"sampling": work}
    return max(update, sampling, key=lambda phase: sum(phase.values()))


@dataclass(frozen=True)
class Work:
    """Of one GPU in one rollout with all its updates."""

    prompts: int
    completions: int
    sequences: int  # at once
    prompt_tokens: float  # means
    mean_tokens: float
    max_tokens: float
    num_forwards: int  # passes without gradient over every token: old log-probabilities, reference


def phase_seconds(shape: Shape, gpu: Gpu, work: Work) -> dict[str, float]:
    """What sampling, log-probabilities and updates take."""
    rows = min(work.sequences, work.completions)
    step = 2 * shape.weights / gpu.bandwidth + shape.layers * LAYER_SECONDS
    kept = (work.prompt_tokens + work.mean_tokens / 2) * shape.kv_bytes
    row = (kept + 4 * shape.vocabulary) / gpu.bandwidth + 2 * shape.weights / gpu.decoding
    steps = work.completions * work.mean_tokens / rows
    tail = work.max_tokens - work.mean_tokens  # steps of the last completions, few at a time
    tokens = work.completions * work.mean_tokens + work.prompts * work.prompt_tokens
    return {
        "rollout": steps * (step + rows * row) + tail * step,
        "logprobs": 2 * shape.weights * tokens * work.num_forwards / gpu.forward,
        "update": 6 * shape.weights * tokens / gpu.training,
    }


def seconds(scaled: Scaled, *, mean_share: float) -> float:
    """Of one rollout with its updates, if completions have this share of the most tokens on average."""
    algorithm, gpus = scaled.recipe.algorithm, scaled.hardware.gpus
    prompts = math.ceil(scaled.prompts_per_update * algorithm.num_minibatches / gpus)
    most = _mean_limit(scaled.recipe) * scaled.max_tokens
    work = Work(
        prompts=prompts,
        completions=prompts * scaled.recipe.rollout.group_size,
        sequences=scaled.layout.sequences,
        prompt_tokens=PROMPT_TOKENS,
        mean_tokens=mean_share * most,
        max_tokens=most,
        num_forwards=(scaled.recipe.algorithm.updates_per_rollout > 1) + (algorithm.kl_coef > 0),
    )
    phases = phase_seconds(scaled.shape, GPUS[scaled.hardware.gpu], work)
    return (
        min(scaled.recipe.rollout.max_oversampling, 1 / SIGNAL) * phases["rollout"]
        + phases["logprobs"]
        + algorithm.num_epochs * phases["update"]
    )


def _mean_limit(recipe: Config) -> float:
    """Of completions, over the run, as a share of the largest: 1 unless it follows a schedule."""
    updates = range(0, recipe.optimizer_steps, recipe.algorithm.updates_per_rollout)
    schedule = recipe.schedules.get("rollout.max_completion_tokens")
    return fmean(schedule.at(update) for update in updates) / recipe.rollout.max_completion_tokens if schedule else 1.0


PROMPT_TOKENS = 200
"""Of a usual question under the paper's template."""
EXPECTED, SHORT, LONG = 0.5, 0.25, 1.0
"""Mean length of a completion as a share of the most; a policy's grows while it learns."""
SIGNAL = 0.5
"""Share of the groups that dynamic sampling takes; it is smaller where nearly all answers are wrong, or nearly all right."""


def scale_down(recipe: Config, shape: Shape, hardware: Hardware, *, max_tokens: int, hours: float) -> Scaled:
    """The recipe with as many questions per update, up to its own, as leave time for enough rollouts.

    Raises:
        ValueError: the model does not fit, has too few positions, the time is too short, or this is no scaling down.
    """
    _check_scope(recipe, hardware, max_tokens)
    _check_positions(recipe, shape, max_tokens)
    every = _rollouts_per_reference(recipe)
    least = min(LEAST_REFERENCES * every if every else LEAST_ROLLOUTS, recipe.run.steps)
    for prompts in _halved(recipe, hardware.gpus):
        completions = math.ceil(prompts * recipe.algorithm.num_minibatches / hardware.gpus) * recipe.rollout.group_size
        layout = _layout(recipe, shape, hardware, max_tokens=max_tokens, completions=completions)
        scaled = Scaled(recipe, shape, hardware, layout, prompts, least, max_tokens)
        each = seconds(scaled, mean_share=EXPECTED) / 3600
        if least * each <= hours:
            affordable = min(int(hours / each), recipe.run.steps)
            cut = affordable % every if every and affordable < recipe.run.steps else 0
            return replace(scaled, rollouts=affordable - cut)
    raise ValueError(
        f"--hours is {hours:g}; the fewest rollouts that show what the recipe does, {least}, take {least * each:.1f} hours with "
        f"{prompts} per update (questions) and --max-tokens {max_tokens}. Give more --hours or --gpus, or lower --max-tokens."
    )


def _check_scope(recipe: Config, hardware: Hardware, max_tokens: int) -> None:
    rollout = recipe.rollout
    if max_tokens > rollout.max_completion_tokens:
        raise ValueError(
            f"--max-tokens is {max_tokens}; the recipe has {rollout.max_completion_tokens} (rollout.max_completion_tokens), and "
            "is scaled down only. Lower --max-tokens."
        )
    if hardware.gpus > rollout.num_prompts:
        raise ValueError(
            f"--gpus is {hardware.gpus}; each needs a question of every rollout, and the recipe has {rollout.num_prompts} "
            "(rollout.num_prompts). Lower --gpus."
        )
    if recipe.lora.rank:
        raise ValueError(
            f"lora.rank is {recipe.lora.rank}; what is known of memory and time is of training all weights. Remove it "
            "from --config."
        )
    if rollout.engine in ("hf", "vllm"):
        raise ValueError(
            f"rollout.engine is {rollout.engine!r}; what is known of memory and time is of the native engine. Remove it from "
            "--config."
        )


def _halved(recipe: Config, gpus: int) -> Iterator[int]:
    """Questions per update: the recipe's, half of it, ... while every process has one in a rollout."""
    prompts = recipe.prompts_per_minibatch
    while prompts and prompts * recipe.algorithm.num_minibatches >= gpus:
        yield prompts
        prompts //= 2


def _check_positions(recipe: Config, shape: Shape, max_tokens: int) -> None:
    prompt = recipe.data.max_prompt_tokens
    if shape.positions is not None and prompt + max_tokens > shape.positions:
        raise ValueError(
            f"--max-tokens is {max_tokens}; with data.max_prompt_tokens ({prompt}) a sequence may have {prompt + max_tokens} "
            f"tokens, and {shape.name} knows {shape.positions} positions. Lower --max-tokens, or take another --model."
        )


def _rollouts_per_reference(recipe: Config) -> int:
    return recipe.algorithm.reference_refresh_steps // recipe.algorithm.updates_per_rollout


def _layout(recipe: Config, shape: Shape, hardware: Hardware, *, max_tokens: int, completions: int) -> Layout:
    """The first way to use the memory that fits, the fastest tried first."""
    longest = recipe.data.max_prompt_tokens + max_tokens
    most = min(completions, MOST_SEQUENCES)

    def size(layout: Layout) -> float:
        return sum(memory_of(recipe, shape, layout, gpus=hardware.gpus, max_tokens=max_tokens).values())

    def fits(layout: Layout) -> bool:
        return size(layout) <= USABLE * hardware.memory_gib

    tried = None
    releases = (True,) if recipe.memory.release_kv_cache else (False, True)
    for (offload, stage), release, usual in product(zero_stages(hardware.gpus), releases, (True, False)):
        passes = max(longest, USUAL_PASS if usual else 0)
        tried = Layout(stage, offload, passes, min(most, LEAST_SEQUENCES), release)
        if not fits(tried):
            continue
        more = (replace(tried, sequences=count) for count in doubled(tried.sequences, most))
        tried = last_that(fits, first=tried, others=more)
        larger = (replace(tried, pass_tokens=tokens) for tokens in doubled(passes, MOST_PASS))
        return last_that(fits, first=tried, others=larger)
    assert tried is not None, "there is a stage to try"
    raise ValueError(
        f"--gpu-memory is {hardware.memory_gib:g}; {shape.name} with {shape.weights / 1e9:.2f} billion weights needs "
        f"{size(tried) / USABLE:.0f} GiB on each of {hardware.gpus} even with distributed.zero_stage {tried.zero_stage}, "
        f"distributed.offload_optimizer, memory.release_kv_cache, passes of one sequence ({longest} tokens) and "
        f"{tried.sequences} completions at once. Give more --gpus or --gpu-memory, lower --max-tokens, or take a smaller --model."
    )


def zero_stages(gpus: int) -> list[tuple[bool, int]]:
    stages = (2, 3) if gpus > 1 else (2,)
    return list(product((False, True), stages))


def doubled(first: int, most: int) -> Iterator[int]:
    while first < most:
        first = min(2 * first, most)
        yield first


def last_that(fits: Callable[[Layout], bool], *, first: Layout, others: Iterable[Layout]) -> Layout:
    for layout in takewhile(fits, others):
        first = layout
    return first


def memory_of(recipe: Config, shape: Shape, layout: Layout, *, gpus: int, max_tokens: int) -> dict[str, float]:
    """`memory_gib` of this recipe."""
    found = memory_gib(
        shape,
        layout,
        gpus=gpus,
        reference=recipe.algorithm.kl_coef > 0,
        samples=True,
        sequence_tokens=recipe.data.max_prompt_tokens + max_tokens,
        chunk_tokens=recipe.memory.logprob_chunk_tokens,
    )
    if recipe.rollout.weights == "fp8":
        found["weights in 8 bits"] = shape.weights / GIB
    return found


def changes(scaled: Scaled, run_dir: str) -> dict[str, tuple[Any, str]]:
    """setting -> its value and the reason for it."""
    recipe, layout = scaled.recipe, scaled.layout
    updates, group = recipe.algorithm.num_minibatches, recipe.rollout.group_size
    prompts, own = scaled.prompts_per_update, recipe.prompts_per_minibatch
    fewer = "as the recipe" if prompts == own else f"the recipe has {own} per update: halved until the time is enough"
    found: dict[str, tuple[Any, str]] = {
        "model.name": (scaled.shape.name, f"{scaled.shape.weights / 1e9:.3g} billion weights"),
        "rollout.num_prompts": (prompts * updates, f"{prompts} per update x {updates} updates per rollout; {fewer}"),
        **_lengths(scaled),
        "memory.micro_batch_tokens": (layout.pass_tokens, "what fits; results do not depend on it"),
        "memory.max_sequences": (
            layout.sequences,
            f"at once on a GPU, of {math.ceil(prompts * updates / scaled.hardware.gpus) * group} in a rollout",
        ),
        "memory.activation_checkpointing": (1, "least memory"),
        "distributed.zero_stage": (
            layout.zero_stage,
            f"for {scaled.hardware.gpus} GPU(s), what fits with the least traffic",
        ),
        "distributed.sequence_parallel": (1, "each GPU runs passes of its own"),
        "run.steps": (scaled.rollouts, _why_steps(scaled)),
        "distributed.offload_optimizer": (
            layout.offload,
            "it does not fit otherwise; each update waits for the CPU" if layout.offload else "it fits without",
        ),
        "run.dir": (run_dir, "of its own"),
    }
    if layout.releases:
        own = recipe.memory.release_kv_cache
        found["memory.release_kv_cache"] = (
            True,
            "as the recipe" if own else "it does not fit otherwise; some milliseconds of each step",
        )
    if recipe.distributed.offload_parameters:
        found["distributed.offload_parameters"] = (False, "it fits without")
    if recipe.memory.kv_cache_gib is not None:
        found["memory.kv_cache_gib"] = (None, "what memory.max_sequences completions need")
    if recipe.optimizer.warmup_steps:
        warmup = _share_of_updates(recipe.optimizer.warmup_steps, scaled)
        found["optimizer.warmup_steps"] = (
            warmup,
            f"{recipe.optimizer.warmup_steps} x the share of the recipe's updates",
        )
    return found


def _lengths(scaled: Scaled) -> dict[str, tuple[Any, str]]:
    """The limit of a completion, and the schedules, of which one may be for it."""
    recipe, limit = scaled.recipe, "rollout.max_completion_tokens"
    own = recipe.rollout.max_completion_tokens
    reason = "as the recipe" if scaled.max_tokens == own else f"--max-tokens; the recipe has {own:,}"
    found: dict[str, tuple[Any, str]] = {limit: (scaled.max_tokens, reason)}
    for setting, schedule in recipe.schedules.items():
        values = [schedule.points[step] for step in sorted(schedule.points)]
        if setting == limit:
            values = [_share_of_length(int(value), scaled) for value in values]
        points = dict(zip(_shares_of_updates(sorted(schedule.points), scaled), values, strict=True))
        lengths = "; --max-tokens at most, and the same ratios" if setting == limit else ""
        found[f"schedules.{setting}"] = (
            schedule.model_dump() | {"points": points},
            f"after the same shares of the updates as the recipe's{lengths}",
        )
    return found


def _shares_of_updates(steps: list[int], scaled: Scaled) -> list[int]:
    """The same of each; no two fall together, nor one beyond the end."""
    num_updates = scaled.rollouts * scaled.recipe.algorithm.updates_per_rollout
    found: list[int] = []
    for number, step in enumerate(steps):
        earliest, latest = found[-1] + 1 if found else 0, num_updates - len(steps) + number
        found.append(min(max(_share_of_updates(step, scaled), earliest), latest))
    return found


def _share_of_updates(step: int, scaled: Scaled) -> int:
    return round(step * scaled.rollouts / scaled.recipe.run.steps)


def _why_steps(scaled: Scaled) -> str:
    recipe = scaled.recipe
    every = _rollouts_per_reference(recipe)
    made = scaled.rollouts * recipe.algorithm.updates_per_rollout
    updates = f"rollouts, {made:,} updates of the recipe's {recipe.optimizer_steps:,}"
    return f"{updates}; {scaled.rollouts // every} references, one for every {every} rollouts" if every else updates


def as_yaml(scaled: Scaled, source: Path, *, run_dir: str, out: Path, num_questions: int | None) -> str:
    """The recipe's file with the changes, each with its reason, and the estimates at the top.

    Args:
        num_questions: in the training data; None if that is not known.

    Raises:
        ValueError: what comes out would be refused.
    """
    settings, why = read_file(source), changes(scaled, run_dir)
    comments: dict[str, list[str]] = {}
    for name, (value, _) in why.items():
        section, setting = name.split(".", 1)
        settings.setdefault(section, {})[setting] = value
    for reward in settings.get("rewards", []):
        if reward["function"] == "overlong" and "buffer" in reward.get("args", {}):
            reward["args"]["buffer"] = _share_of_length(reward["args"]["buffer"], scaled)
            comments["rewards"] = ["# overlong's buffer: the same share of the most tokens as the recipe's"]
    reasons = {name: reason for name, (_, reason) in why.items()}
    text = annotated(settings, reasons, _header(scaled, source, out, num_questions), comments)
    Config(**read_yaml(text))
    return text


def annotated(
    settings: dict[str, Any], reasons: Mapping[str, str], header: Sequence[str], comments: Mapping[str, Sequence[str]]
) -> str:
    """YAML with lines at its top and above sections, and a reason beside each setting that has one."""
    lines = [f"# {line}".rstrip() for line in header]
    for section, values in settings.items():
        lines += ["", f"{section}:"]
        if isinstance(values, list):
            lines += [f"  {line}" for line in [*comments.get(section, []), *_dumped(values)]]
            continue
        for setting, value in values.items():
            reason = reasons.get(f"{section}.{setting}", "")
            first, *rest = _dumped({setting: value})
            lines += [f"  {first}" + (f" # {reason}" if reason else ""), *(f"  {line}" for line in rest)]
    return "\n".join(lines) + "\n"


def _measured(layout: Layout) -> str:
    if layout.releases:
        return "For a run of 0.5B that took 11.9 GiB with memory.release_kv_cache the estimate is 13.5"
    return "Within a tenth of what was measured (0.5B, 1.5B, 512 tokens)"


def _share_of_length(tokens: int, scaled: Scaled) -> int:
    return max(1, tokens * scaled.max_tokens // scaled.recipe.rollout.max_completion_tokens)


def _dumped(value: Any) -> list[str]:
    return write_yaml(value, width=10_000).splitlines()


def _header(scaled: Scaled, source: Path, out: Path, num_questions: int | None) -> list[str]:
    recipe, hardware = scaled.recipe, scaled.hardware
    memory = memory_of(recipe, scaled.shape, scaled.layout, gpus=hardware.gpus, max_tokens=scaled.max_tokens)
    hours = [scaled.rollouts * seconds(scaled, mean_share=share) / 3600 for share in (EXPECTED, SHORT, LONG)]
    questions = scaled.rollouts * scaled.prompts_per_update * recipe.algorithm.num_minibatches
    epochs = (
        "the start of a run says how many epochs"
        if num_questions is None
        else f"{questions / num_questions:.2f} epochs"
    )
    launch = f"grpo train --processes {hardware.gpus} --config {out}"
    short = f"{hours[1]:.1f} with a quarter, {hours[2]:.1f} if all are cut off"
    every = _rollouts_per_reference(recipe)
    has_fewer = scaled.prompts_per_update < recipe.prompts_per_minibatch
    return [
        f"{source.name} for {scaled.shape.name}, by `grpo scale`, for {hardware.gpus} x {hardware.gpu} with "
        f"{hardware.memory_gib:g} GiB. The estimates are those of grpo/check/scale.py;",
        "the first command measures them, the second trains. What has no reason beside it is the recipe's:",
        f"  {launch} --dry-run",
        f"  {launch}",
        "",
        f"Time    {hours[0]:.1f} hours if completions have half of the most tokens on average; {short}. Each of these",
        "        within a fifth of what was measured, which is 0.5B and 1.5B on an H200. Not in it: evaluations, checkpoints,",
        "        rewards slower than sampling"
        + ", the optimizer on the CPU" * scaled.layout.offload
        + f", what dynamic sampling replaces beyond {1 - SIGNAL:.0%} of the groups"
        * (recipe.rollout.max_oversampling > 1)
        + ".",
        f"Memory  {sum(memory.values()):.1f} GiB: "
        + ", ".join(f"{name} {size:.1f}" for name, size in memory.items() if size)
        + (f"; {'sampling' if 'sampling' in memory else 'the update'} takes most" if scaled.layout.releases else "")
        + ".",
        f"        {_measured(scaled.layout)}; 8 % of the GPU are left free.",
        f"Data    {questions:,} questions, {questions * recipe.rollout.group_size:,} completions; {epochs}.",
        f"Kept    {recipe.algorithm.updates_per_rollout} update(s) per rollout, {recipe.rollout.group_size} completions per "
        + "question"
        + (f", a new reference every {every} rollouts" if every else "")
        + ", the learning rate.",
        *["        Updates of fewer completions are noisier and may want a lower one."] * has_fewer,
    ]
