"""Is the gradient of the fast update right? Each part that makes it fast, alone and together, against the plain float32 gradient.

One rollout is sampled and scored as a run does; some of its completions make a minibatch, whose gradient is computed

- as the reference: the model's own layers in float32 (the same weights), eager attention, one sequence at a time, autograd;
- as PLAIN: the same in the run's precision. How far it is from the reference is what that precision does by itself;
- with one fast part after the other, with all of them, and through DeepSpeed, just as a run does.

The weights are cut into groups, by kind (q_proj, q_proj.bias, norm, ...) and by layer, and of each group of each variant

    1 - cos(g, g_ref)      |g| / |g_ref|      slope = (g . g_ref) / |g_ref|^2

are compared: the cosine says how far the direction is off; noise makes g longer, but leaves the slope at 1. Passes are added
up in float32, so that a row shows its own part only. DeepSpeed adds them in the model's precision, and so do the rows through it.

Two things differ from a run's step. The reference of the KL term are the log-probabilities of the rollout: with those of the
starting model its gradient would be zero. And the surrogate counts every token (algorithm.top_entropy 1, clip_cov 0).
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grpo.algorithm.advantage import advantages_of_batch
from grpo.algorithm.batch import micro_batch, pack, plan_passes, take
from grpo.algorithm.loss import grpo_loss, token_weights
from grpo.check.dry_run import at_start, changed, passes_alone
from grpo.check.plain import PlainLM, real_trainer, unshared, use_own_rotary
from grpo.config import Config, TeacherConfig
from grpo.policy.language_model import PackedLM, checkpoint_activations, fuse_kernels, load_lm, resolve_dtype
from grpo.policy.policy import Policy
from grpo.system import distributed
from grpo.system.distributed import deterministic
from grpo.system.files import to_json
from grpo.trainer import Trainer
from grpo.types import Batch, Group, MicroBatch

NUM_SEQUENCES = 32


@dataclass(frozen=True)
class Variant:
    """One way to compute the gradient; what is left out is the plain way."""

    name: str
    packed: bool = True  # many sequences in a pass; else one, through the model's own attention
    shared: bool = False  # completions of a prompt share it
    kernels: bool = False  # log-probabilities by our own backward pass; on CUDA, Triton's kernels over 16-bit logits
    fused: bool = False  # Liger's layers
    checkpointed: bool = False  # activations are computed again
    deterministic: bool = False
    small_passes: bool = False  # the smallest that hold the longest sequence
    zero_stage: int | None = None  # through a Policy, with DeepSpeed
    exact: bool = False  # float32, and eager attention

    @property
    def needs_cuda(self) -> bool:
        """Whether elsewhere it is the same as without."""
        return (self.fused and not self.kernels) or (self.deterministic and not self.fused)


REFERENCE = Variant("reference", packed=False, exact=True)
PLAIN = Variant("plain: one sequence at a time", packed=False)
EVERYTHING = Variant("everything", shared=True, kernels=True, fused=True, checkpointed=True, deterministic=True)


def plan(config: Config, *, on_cuda: bool) -> list[Variant]:
    """The variants, PLAIN first."""
    variants = [
        PLAIN,
        Variant("packed"),
        Variant("packed, shared prompts", shared=True),
        Variant("packed, our log-probabilities", kernels=True),
        Variant("packed, fused layers", fused=True),
        Variant("packed, activations again", checkpointed=True),
        Variant("packed, deterministic", deterministic=True),
        EVERYTHING,
        replace(EVERYTHING, name="everything, small passes", small_passes=True),
    ]
    for stage in sorted({0, 2, config.distributed.zero_stage}):
        through = replace(EVERYTHING, name=f"a run's update, ZeRO {stage}", zero_stage=stage)
        variants += [through, replace(through, name=f"{through.name}, small passes", small_passes=True)]
    return [variant for variant in variants if on_cuda or not variant.needs_cuda]


# --- the minibatch ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What every variant computes the gradient of."""

    config: Config
    batch: Batch
    made_up: bool  # the advantages
    device: torch.device
    tokenizer: PreTrainedTokenizerBase

    def passes(self, variant: Variant) -> list[MicroBatch]:
        """The minibatch as that variant reads it, on the device."""
        batch = self.batch if variant.shared else unshared(self.batch)
        budget = self.config.memory.micro_batch_tokens
        if variant.small_passes:
            budget = int(batch.sequence_lens.max())
        plan = [[i] for i in range(batch.num_sequences)]
        if variant.packed:
            plan = plan_passes(batch, token_budget=budget, num_processes=1)[0]
        return [self._pass(batch, sequences).to(self.device) for sequences in plan]

    def _pass(self, batch: Batch, sequences: list[int]) -> MicroBatch:
        part = take(batch, sequences)
        weights = token_weights(
            self.config.algorithm.aggregation,
            part.trained_lens,
            num_completions=batch.num_sequences,
            num_tokens=int(batch.trained_lens.sum()),
            max_completion_tokens=self.config.rollout.max_completion_tokens,
        )
        micro = micro_batch(part, weights)
        micro.ref_logprobs = micro.sampling_logprobs if self.config.algorithm.kl_in_loss else None
        return micro

    def loss(self, model: Callable[[MicroBatch], tuple[Tensor, Tensor, Tensor]], micro: MicroBatch) -> Tensor:
        """As Trainer's, on-policy."""
        logprobs, entropy, _ = model(micro)
        return grpo_loss(
            logprobs,
            micro.advantages,
            micro.weights,
            self.config.algorithm.objective,
            completion_lens=micro.completion_lens,
            entropy=entropy,
            ref_logprobs=micro.ref_logprobs,
            sampling_logprobs=micro.sampling_logprobs,
        ).loss


def sample(config: Config, num_sequences: int) -> Work:
    """Completions of a run's first step, with advantages other than 0."""
    with real_trainer(
        config, Trainer, distributed={"zero_stage": 0, **NO_OFFLOAD}, run={"deterministic": True}
    ) as trainer:
        groups, scores = trainer.collector.sample(
            trainer.prompts.draw(config.rollout.num_prompts),
            config.at(0).sampling,
            num_completions=config.rollout.group_size,
            seed=config.run.seed,
        )
        parts = trainer.collector.scorer.parts(scores)
        advantages = advantages_of_batch(config.algorithm.advantage_rule, scores.rewards, parts)
        batch, made_up = choose(groups, advantages, num_sequences)
        return Work(config, batch, made_up, trainer.processes.device, trainer.policy.tokenizer)


COUNTS_ALL = {"top_entropy": 1.0, "clip_cov": 0.0, "clip_cov_low": 1.0, "clip_cov_high": 5.0}

NO_OFFLOAD = {"offload_optimizer": False, "offload_parameters": False}


def choose(groups: list[Group], advantages: Tensor, num_sequences: int) -> tuple[Batch, bool]:
    """The first completions with an advantage, those of a prompt together; and whether the advantages had to be made up.

    Where no rewards differ, every other completion has 1, the rest -1.
    """
    made_up = not bool(advantages.nan_to_num().any())
    if made_up:
        signs = torch.ones(advantages.shape[1])
        signs[1::2] = -1
        advantages = signs.expand_as(advantages)
    batch = pack(groups, advantages)
    return take(batch, batch.advantages.nonzero().flatten()[:num_sequences].tolist()), made_up


# --- a gradient -------------------------------------------------------------------------------------------------------------


def gradient(work: Work, variant: Variant) -> dict[str, Tensor]:
    """The gradient of the whole minibatch by the name of the weight, in float32."""
    if variant.zero_stage is not None:
        return _through_deepspeed(work, variant)
    model = _model(work, variant)
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in model.lm.named_parameters()}
    for micro in work.passes(variant):
        loss = work.loss(model, micro)
        with deterministic(variant.deterministic):
            loss.backward()
        for name, weight in model.lm.named_parameters():
            if weight.grad is not None:
                sums[name] += weight.grad
        model.zero_grad(set_to_none=True)
    return sums


def _model(work: Work, variant: Variant) -> PackedLM:
    """As Policy makes it, with the parts of the variant."""
    config = work.config
    lm = load_lm(config.model, dtype=resolve_dtype(config.model.dtype)).train()
    nn.Module.to(lm, work.device, torch.float32 if variant.exact else None)
    checkpoint_activations(lm, float(variant.checkpointed))
    use_own_rotary(lm)
    if variant.fused and work.device.type == "cuda":
        fuse_kernels(lm)
    lm.set_attn_implementation("packed" if variant.packed else "eager" if variant.exact else "sdpa")
    options: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "chunk_tokens": config.memory.logprob_chunk_tokens,
    }
    return PackedLM(lm, **options) if variant.kernels else PlainLM(lm, **options, alone=not variant.packed)


def _through_deepspeed(work: Work, variant: Variant) -> dict[str, Tensor]:
    """What a Policy has accumulated when the optimizer is about to step."""
    from deepspeed.utils import safe_get_full_grad

    own = work.config.distributed.zero_stage == variant.zero_stage
    config = changed(work.config, distributed={"zero_stage": variant.zero_stage, **({} if own else NO_OFFLOAD)})
    without_kl = config.algorithm.model_copy(update={"kl_coef": 0.0})
    config = config.model_copy(update={"algorithm": without_kl, "teacher": TeacherConfig()})  # no reference is loaded
    processes = distributed.start(config, dtype=resolve_dtype(config.model.dtype))
    policy = Policy(config, work.tokenizer, processes)
    passes = work.passes(variant)
    for number, micro in enumerate(passes):
        policy.backward(work.loss(policy.logprobs, micro), last=number == len(passes) - 1)
    found = {
        name: safe_get_full_grad(weight) if weight.grad is None else weight.grad
        for name, weight in policy.lm.named_parameters()
    }
    return {name: each.detach().float().clone() for name, each in found.items() if each is not None}


# --- how far it is from the reference ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How a gradient g lies to the reference, over some weights."""

    dot: float
    square: float  # |g|^2
    ref_square: float

    def __add__(self, other: Match) -> Match:
        return Match(self.dot + other.dot, self.square + other.square, self.ref_square + other.ref_square)

    @property
    def angle(self) -> float:
        """1 - cosine; 0 if both are zero, 1 if one is, NaN if one is not finite."""
        if self.square == 0 or self.ref_square == 0:
            return float(self.square != self.ref_square)
        return 1 - self.dot / (self.square * self.ref_square) ** 0.5

    @property
    def ratio(self) -> float:
        """Of the norms."""
        return (self.square / self.ref_square) ** 0.5 if self.ref_square else float(self.square == 0)

    @property
    def slope(self) -> float:
        """g's share of the reference: 1, also where unrelated noise has made g longer."""
        return self.dot / self.ref_square if self.ref_square else float(self.square == 0)


def compare(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Match]:
    """By group: `all`, each kind, and each layer as `layer N`."""
    groups: dict[str, Match] = {}
    for name, exact in reference.items():
        mine = found.get(name, torch.zeros_like(exact)).double().flatten()
        there = exact.double().flatten()
        match = Match(*(float(a @ b) for a, b in ((mine, there), (mine, mine), (there, there))))
        for group in groups_of(name):
            groups[group] = groups[group] + match if group in groups else match
    return groups


def groups_of(name: str) -> list[str]:
    """The groups that a weight belongs to. Its kind is the name of the module that has it; all norms are one."""
    module, _, part = name.rpartition(".")
    last = module.rpartition(".")[2]
    kind = "norm" if "norm" in last else last if part == "weight" else f"{last}.{part}"
    layer = re.search(r"\.(\d+)\.", name)
    return ["all", kind, *([f"layer {layer[1]}"] if layer else [])]


@dataclass(frozen=True)
class Tolerance:
    """What a group may differ by, whatever PLAIN does."""

    angle: float
    slope: float


TOLERANCE = {
    torch.float32: Tolerance(angle=5e-9, slope=1e-4),  # an error of 1e-4 of the gradient is an angle of half its square
    torch.bfloat16: Tolerance(angle=1e-4, slope=0.02),
}
WORSE = 3
"""Times as far off as PLAIN is a fault. Two orders of the same sums differ by less than two in their noise."""

UNRESOLVED = 0.1
"""From this angle of PLAIN on a group is mostly rounding, such as the biases of keys, whose gradient may be zero: its slope says
nothing."""


def faults(found: dict[str, Match], plain: dict[str, Match], tolerance: Tolerance) -> list[str]:
    """The groups that are further from the reference than the precision itself explains."""
    return [name for name, match in found.items() if not _is_close(match, plain[name], tolerance)]


def _is_close(match: Match, plain: Match, tolerance: Tolerance) -> bool:
    """Not of NaN."""
    if not match.angle <= max(tolerance.angle, WORSE * plain.angle):
        return False
    if plain.angle > UNRESOLVED:
        return match.square <= WORSE**2 * plain.square
    return abs(match.slope - 1) <= max(tolerance.slope, WORSE * abs(plain.slope - 1))


# --- the check --------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    variant: Variant
    num_passes: int
    seconds: float
    groups: dict[str, Match]
    faults: list[str]


def check(config: Config, *, num_sequences: int = NUM_SEQUENCES, out: Path | None = None) -> int:
    """Compute every variant's gradient, print how far each is from the reference, and return 0 if none is too far, else 1.

    Args:
        out: a file for all the numbers, as JSON.

    Raises:
        ValueError: as Trainer; adapters are trained; there is no completion to train on.
    """
    config = changed(at_start(config), algorithm=COUNTS_ALL, **passes_alone(config))
    if config.lora.rank:
        raise ValueError(
            f"lora.rank is {config.lora.rank}; this check compares the gradients of all weights. Set lora.rank=0."
        )
    dtype = resolve_dtype(config.model.dtype)
    work = sample(config, num_sequences)
    _free()
    print(_preface(work, dtype), flush=True)
    reference = gradient(work, REFERENCE)
    results: list[Result] = []
    for variant in plan(config, on_cuda=work.device.type == "cuda"):
        _free()
        results.append(_measure(work, variant, reference, results, TOLERANCE[dtype]))
        print(row(results[-1], letter(len(results) - 1)), flush=True)
    print("\n".join([*table(results, "1 - cosine", lambda match: f"{match.angle:.1e}"), *_ratios(results)]))
    print(conclusion(results))
    if out is not None:
        out.write_text(to_json(_report(work, dtype, results), indent=1))
    return int(any(result.faults for result in results))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(
    work: Work, variant: Variant, reference: dict[str, Tensor], before: list[Result], tolerance: Tolerance
) -> Result:
    started = time.perf_counter()
    groups = compare(gradient(work, variant), reference)
    seconds = time.perf_counter() - started
    plain = before[0].groups if before else groups
    wrong = faults(groups, plain, tolerance)  # of the first, by itself: what is not finite
    return Result(variant, len(work.passes(variant)), seconds, groups, wrong)


def _preface(work: Work, dtype: torch.dtype) -> str:
    batch, tolerance = work.batch, TOLERANCE[dtype]
    prompts = len(batch.prompt_index.unique())
    name = torch.cuda.get_device_name() if work.device.type == "cuda" else "CPU"
    lines = [
        f"{batch.num_sequences} completions of {prompts} prompts, {len(batch.tokens):,} tokens, "
        f"{str(dtype).removeprefix('torch.')} on {name}, torch {torch.__version__}.",
        f"Too far from the float32 gradient: 1 - cosine above {WORSE} times that of a and above {tolerance.angle:g},",
        f"or a slope off by more than {WORSE} times that of a and by more than {tolerance.slope:g}.",
    ]
    if work.made_up:
        lines.append("All rewards are equal, so there are no advantages: they are made up, 1 and -1 in turn.")
    titles = f"   {'':{WIDE}}{'passes':>8}{'seconds':>9}{'1 - cos':>10}{'ratio':>9}{'slope':>9}"
    return "\n".join([*lines, "", titles])


WIDE = 42


def letter(number: int) -> str:
    """Of a variant in the tables."""
    return chr(ord("a") + number)


def row(result: Result, name: str) -> str:
    """A variant's line: over all weights, and the groups that are wrong."""
    match = result.groups["all"]
    numbers = f"{result.num_passes:>8}{result.seconds:>9.1f}{match.angle:>10.1e}{match.ratio:>9.4f}{match.slope:>9.4f}"
    verdict = f"FAIL: {', '.join(result.faults)}" if result.faults else "ok"
    return f"{name}  {result.variant.name:<{WIDE}}{numbers}  {verdict}"


def _ratios(results: list[Result]) -> list[str]:
    return table(results, "norm / reference's", lambda match: f"{match.ratio:.4f}")


def table(results: list[Result], title: str, show: Callable[[Match], str]) -> list[str]:
    """A number of each variant, by kind and for some layers."""
    heads = "".join(f"{letter(number):>9}" for number in range(len(results)))
    lines = ["", f"{title:<20}{heads}"]
    for label, pick in _shown(results):
        lines.append(f"{label:<20}" + "".join(f"{show(pick(result.groups)):>9}" for result in results))
    return lines


def _shown(results: list[Result]) -> Iterator[tuple[str, Callable[[dict[str, Match]], Match]]]:
    """All weights, each kind, the first, the middle and the last layer, and the worst of each variant."""
    names = list(results[0].groups)
    layers = [name for name in names if name.startswith("layer ")]
    ends = dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]) if layers else {}
    for name in [*(name for name in names if name not in layers), *ends]:
        yield name, lambda groups, name=name: groups[name]  # type: ignore[misc]
    if layers:
        yield "worst layer", lambda groups: max((groups[name] for name in layers), key=lambda match: match.angle)


def conclusion(results: list[Result]) -> str:
    """Which variants are wrong, and where."""
    wrong = [
        f"{letter(number)} ({results[number].variant.name})" for number in range(len(results)) if results[number].faults
    ]
    if wrong:
        return f"\nFurther from the float32 gradient than the precision explains: {', '.join(wrong)}."
    return f"\nAll {len(results)} variants have the gradient of the plain float32 model, as far as the precision goes."


def _report(work: Work, dtype: torch.dtype, results: list[Result]) -> dict[str, Any]:
    return {
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name() if work.device.type == "cuda" else "cpu",
        "num_sequences": work.batch.num_sequences,
        "made_up_advantages": work.made_up,
        "variants": [
            {
                **asdict(result.variant),
                "passes": result.num_passes,
                "seconds": result.seconds,
                "faults": result.faults,
                "groups": {
                    name: {"one_minus_cosine": match.angle, "ratio": match.ratio, "slope": match.slope}
                    for name, match in result.groups.items()
                },
            }
            for result in results
        ],
    }
