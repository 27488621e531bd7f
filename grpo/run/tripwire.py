"""Stops a run whose tokens were sampled with other log-probabilities than the policy's own, and finds out why.

The gap is the mean over the policy's tokens of |log-probability in the trainer - when sampled|, before the update. In float32
rounding makes less than 0.00001 nats of it. In bfloat16 it depends on the model: 0.009 to 0.010 nats (0.5B), 0.022 (1.5B), 0.052
(7B, random weights). So what rounding makes of the model at hand is measured on the first rollout. A rotary embedding that was
off by 0.4 % made 0.073 instead of 0.022, under a healthy-looking curve.

A cause is not guessed but tried, on a few of the step's sequences: what would the gap be if they had been sampled at another
temperature, from another template, with the weights that the engine holds, after handing it the weights once more? Causes are
ranked by the share of the gap that each explains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo.algorithm.batch import micro_batch, pack
from grpo.config import Config
from grpo.data.prompts import TEMPLATES, build_prompts
from grpo.policy.policy import Policy
from grpo.rollout.fp8 import TOLERANCE, rounded_products
from grpo.system.stopping import RunError
from grpo.types import Batch, Completion, Generator, Group, Prompt

GAP_LIMITS = {torch.float32: 0.001, torch.bfloat16: 0.04}
"""The smallest limits: a hundred times what rounding makes in float32, whose sums some engines round to fewer bits."""

GAP_FACTOR = 3
"""How many times the rounding of a model a gap may be. The rotary fault was 3.3 times."""

FLOAT32_ROUNDING = 1e-5


class SamplingGapError(RunError):
    """Tokens were not sampled from the policy that is trained on them."""


def gap_limit(config: Config, dtype: torch.dtype, rounding: float) -> float:
    """Nats. Dividing logits by a temperature below 1 multiplies their rounding too.

    Args:
        rounding: at temperature 1, see `measure_rounding`.
    """
    own, limit = config.algorithm.max_sampling_gap, max(GAP_LIMITS[dtype], GAP_FACTOR * rounding)
    if config.rollout.weights == "fp8":
        limit = min(limit, TOLERANCE)
    return limit / min(config.rollout.temperature, 1) if own is None else own


def measure_rounding(policy: Policy, groups: list[Group], *, in_8_bits: bool = False) -> float:
    """The gap in nats, at temperature 1, that the model's precision alone can explain.

    It is the smaller of two distances from the log-probabilities that the model which is sampled from gives to the tokens in its
    own forward pass of each sequence alone. To those that the tokens were sampled with: another computation of the same model in
    the same precision, unless the engine samples from something else. And to the same in float32, which has no part in the
    engine's faults, and is often larger, since two computations share some of their rounding. Faults of the trainer's forward
    pass are in neither.

    Every process calls it with what it sampled; the beginnings of a few sequences of each are looked at. Where older weights have
    drawn all of these, the second distance alone counts.

    Args:
        in_8_bits: whether rollout.weights is fp8. Then it is the distance to what the model's own forward pass says with products
            in 8 bits, which the engine has no part in, either.
    """
    if policy.dtype == torch.float32 and not in_8_bits:
        return FLOAT32_ROUNDING
    pairs = _probed(policy, groups)
    batch = _batch(
        [(prompt, _beginning(completion, PROBED_TOKENS - len(prompt.token_ids))) for prompt, completion in pairs]
    )
    own = policy.unpacked_logprobs(batch)
    if in_8_bits:
        with rounded_products(policy.whole_lm):
            return policy.temperature * _mean(policy, (own - policy.unpacked_logprobs(batch)).abs())
    exact = _mean(policy, (own - policy.unpacked_logprobs(batch, float32=True)).abs())
    fresh = _fresh(batch, own)
    sampled = _mean(policy, (own - batch.sampling_logprobs.to(own.device)).abs()[fresh])
    return policy.temperature * (min(sampled, exact) if policy.processes.sum(int(fresh.sum()))[0] else exact)


def _fresh(batch: Batch, like: Tensor) -> Tensor:
    """(T,) which tokens the present weights have drawn: those of older ones say nothing about this policy."""
    return torch.ones_like(like, dtype=torch.bool) if batch.fresh is None else batch.fresh.to(like.device)


@dataclass(frozen=True)
class Cause:
    explains: float  # share of the gap
    text: str

    def __str__(self) -> str:
        return f"{min(max(self.explains, 0.0), 1.0):4.0%}  {self.text}"


def explanation(gap: float, limit: float, step: int, causes: list[Cause]) -> str:
    """The message to stop with."""
    ranked = sorted(causes, key=lambda cause: -cause.explains)
    head = (
        f"policy/sampling_gap is {gap:.3g} nats in step {step}, above {limit:.3g} (algorithm.max_sampling_gap): the tokens were "
        "not sampled from the policy that would be trained on them. The update was left out. Causes, and the share of the gap "
        "that each explains in a few of the step's sequences:"
    )
    return "\n  ".join([head, *map(str, ranked)])


@dataclass
class Probe:
    """A few sequences of this process with the log-probabilities they were sampled with, and the gap of other ones to these.

    Every process asks the same questions in the same order, of equally many sequences; the answers are over all of them.
    """

    policy: Policy
    pairs: list[tuple[Prompt, Completion]]
    sequences_per_pass: int

    def __post_init__(self) -> None:
        self.batch = _batch(self.pairs)
        self.sampled = self.batch.sampling_logprobs.to(self.policy.processes.device)
        self.ours = self.logprobs(self.pairs)
        self.fresh = _fresh(self.batch, self.ours)
        self.gap = self.gap_of(self.ours)

    def logprobs(self, pairs: list[tuple[Prompt, Completion]]) -> Tensor:
        """The policy's of the completions; (T,)."""
        parts = [pairs[i : i + self.sequences_per_pass] for i in range(0, len(pairs), self.sequences_per_pass)]
        return torch.cat([self._one_pass(_batch(part)) for part in parts])

    def _one_pass(self, batch: Batch) -> Tensor:
        micro = micro_batch(batch, torch.zeros(len(batch.sampling_logprobs)))
        return self.policy.own_logprobs(micro)

    def mean(self, values: Tensor) -> float:
        return _mean(self.policy, values)

    def gap_of(self, logprobs: Tensor) -> float:
        return self.mean((logprobs - self.sampled).abs()[self.fresh])

    def explained_by(self, gap: float) -> float:
        """Share of the gap that is gone if `gap` is what would be left."""
        return 1 - gap / self.gap if self.gap else 0.0


def _mean(policy: Policy, values: Tensor) -> float:
    """Over the values of all processes; 0 if there is none."""
    total, number = policy.processes.sum(float(values.sum()), values.numel())
    return total / number if number else 0.0


def _probed(policy: Policy, groups: list[Group]) -> list[tuple[Prompt, Completion]]:
    """A few sequences, equally many on all processes, of as many prompts as possible."""
    pairs = sorted(_spread(groups), key=lambda pair: pair[1].ages is not None)  # those of the present weights first
    return pairs[: min(PROBED, *policy.processes.gather(len(pairs)))]


def _beginning(completion: Completion, most: int) -> Completion:
    """Its first tokens, one at least."""
    n = max(1, most)
    return replace(
        completion,
        token_ids=completion.token_ids[:n],
        logprobs=completion.logprobs[:n],
        trained=None if completion.trained is None else completion.trained[:n],
        ages=None if completion.ages is None else completion.ages[:n],
    )


def _batch(pairs: list[tuple[Prompt, Completion]]) -> Batch:
    return pack([Group(prompt, [completion]) for prompt, completion in pairs], torch.zeros(len(pairs), 1))


PROBED = 16
"""Sequences of a process that are looked at, at most."""
PROBED_TOKENS = 4096
"""Of each, with its prompt, where rounding is measured: in float32 attention holds a score for each pair of tokens, 115 GB of 28
heads at 32,000. A longer prompt is read whole."""


def diagnose(
    policy: Policy,
    generator: Generator,
    groups: list[Group],
    config: Config,
    *,
    earlier_gap: float | None,
    rounding: float,
) -> list[Cause]:
    """Try the causes. Every process calls it before the update, with what it sampled; it takes some forward passes.

    Args:
        earlier_gap: median of the steps before; None in the first.
        rounding: see `measure_rounding`.
    """
    pairs = _probed(policy, groups)
    probe = Probe(policy, pairs, max(config.pass_tokens // config.max_sequence_tokens, 1))
    return [
        _temperature(probe, config),
        _template(probe, config),
        *_weights(probe, generator, config, earlier_gap),
        _left_out(probe, rounding),
        Cause(
            min(rounding / max(probe.gap, 1e-9), 1.0),
            f"rounding, which makes {rounding:.3g} nats of this model in "
            + ("8 bits (rollout.weights)" if config.rollout.weights == "fp8" else "this precision"),
        ),
    ]


def _spread(groups: list[Group]) -> list[tuple[Prompt, Completion]]:
    """Completions of as many prompts as possible: the first of each group, then the second of each, ..."""
    columns = zip(*(group.completions for group in groups), strict=True)
    return [(group.prompt, completion) for column in columns for group, completion in zip(groups, column, strict=True)]


def _temperature(probe: Probe, config: Config) -> Cause:
    """First coarsely and among temperatures that are easily confused with the run's, then closely around the best."""
    own = config.rollout.temperature

    def gap_at(temperature: float) -> float:
        with probe.policy.at_temperature(temperature):
            return probe.gap_of(probe.logprobs(probe.pairs))

    coarse = {own * 2 ** (power / 2) for power in range(-5, 6)} | {1.0, own**2, config.evaluation.temperature or 1.0}
    best = min(sorted(coarse - {own}), key=gap_at)
    fine = [best * 2 ** (power / 20) for power in range(-4, 5)]
    best = min(fine, key=gap_at)
    left = gap_at(best)
    text = f"sampled at another temperature: at {best:.3g} instead of {own:g} (rollout.temperature) {left:.3g} nats would be left"
    return Cause(probe.explained_by(left), text)


FIRST = 4
"""Tokens of a completion that say most about the end of the prompt."""


def _template(probe: Probe, config: Config) -> Cause:
    """Other prompts, and whether the gap is largest where the prompt ends; the latter proves little, so it counts half."""
    gaps = {name: probe.gap_of(probe.logprobs(pairs)) for name, pairs in _other_prompts(probe, config)}
    best = min(gaps, key=lambda name: gaps[name])
    lens = probe.batch.trained_lens.to(probe.ours.device)
    place = torch.cat([torch.arange(length, device=lens.device) for length in lens.tolist()])
    gap, fresh = (probe.ours - probe.sampled).abs(), probe.fresh
    first, rest = probe.mean(gap[fresh & (place < FIRST)]), probe.mean(gap[fresh & (place >= FIRST)])
    text = (
        f"sampled from another prompt: from {best}, {gaps[best]:.3g} nats would be left; the gap is {first:.3g} in the first "
        f"{FIRST} tokens of completions and {rest:.3g} after them"
    )
    concentrated = 1 - rest / first if first else 0.0
    return Cause(max(probe.explained_by(gaps[best]), concentrated / 2), text)


def _other_prompts(probe: Probe, config: Config) -> Iterator[tuple[str, list[tuple[Prompt, Completion]]]]:
    """The probed completions after prompts that they may have been sampled from."""
    tokenizer = probe.policy.tokenizer

    def instead(change: Callable[[list[int]], list[int]]) -> list[tuple[Prompt, Completion]]:
        return [(replace(p, token_ids=change(p.token_ids) or p.token_ids), c) for p, c in probe.pairs]

    yield "the prompt without its first token", instead(lambda ids: ids[1:])
    yield "the prompt without its last token", instead(lambda ids: ids[:-1])
    if tokenizer.bos_token_id is not None:
        yield "the prompt after a begin-of-sequence token", instead(lambda ids: [tokenizer.bos_token_id, *ids])
    for name in TEMPLATES:
        if name == config.data.template or (name == "chat" and not tokenizer.chat_template):
            continue
        data = config.data.model_copy(update={"template": name, "max_prompt_tokens": sys.maxsize})
        try:
            others = [(build_prompts([p.columns], tokenizer, data)[0][0], c) for p, c in probe.pairs]
        except ValueError:  # the tokenizer has no such prompts
            continue
        yield f"data.template {name}", others


def _weights(probe: Probe, generator: Generator, config: Config, earlier_gap: float | None) -> list[Cause]:
    """Old weights in what samples, or a forward pass of the trainer that is not the model's.

    The model that is sampled from computes the log-probabilities in its own, unpacked way, before its weights are brought up to
    date and after; and the engine samples again after it was handed the weights. Where no process holds that model, the trained
    one does so: packing is told apart, and nothing else of the forward pass.
    """
    policy = probe.policy
    before = probe.gap_of(policy.unpacked_logprobs(probe.batch))
    generator.sync()
    policy.sync()
    unpacked = policy.unpacked_logprobs(probe.batch)
    apart = probe.mean((unpacked - probe.ours).abs())
    again = _sampled_again(probe, generator, config)
    stale = probe.explained_by(before) * probe.explained_by(apart)
    shares = [stale, probe.explained_by(again)]
    text = f"sampled with old weights: after the engine was given the weights once more it samples with {again:.3g}"
    form = (
        "another forward pass in training (packing, kernels, buffers such as rotary frequencies): the model's own is "
        f"{probe.gap_of(unpacked):.3g} nats from the recorded log-probabilities with the policy's weights"
    )
    if policy.holds_whole:
        text += (
            f"; the model to sample from was {before:.3g} nats from the recorded log-probabilities as it was, and {apart:.3g} "
            "from the policy's after it was given them"
        )
    else:
        form += "; kernels, output layer and buffers are the same in both here, and what they do cannot be told"
    forward = probe.explained_by(probe.gap_of(unpacked)) * min(apart / max(probe.gap, 1e-9), 1.0)
    if earlier_gap is not None:
        text += f"; the gap of the steps before was {earlier_gap:.3g}"
        shares.append(0.8 * probe.explained_by(earlier_gap))  # other faults may come later too
        forward = min(forward, 1 - probe.explained_by(earlier_gap))  # this one shows in every step
    return [
        Cause(max(shares), text),
        Cause(forward, form),
    ]


def _sampled_again(probe: Probe, generator: Generator, config: Config) -> float:
    prompts = [prompt for prompt, _ in probe.pairs]
    groups = generator.sample(prompts, config.sampling, num_completions=1, seed=config.run.seed)
    pairs = [(group.prompt, group.completions[0]) for group in groups]
    ours = probe.logprobs(pairs)
    return probe.mean((ours - _batch(pairs).sampling_logprobs.to(ours.device)).abs())


def _left_out(probe: Probe, rounding: float) -> Cause:
    """Log-probabilities of what top-k, top-p or min-p left are larger than those of the whole vocabulary, every single one.

    So each token that is smaller by more than rounding speaks against it, however little it is.
    """
    excess = (probe.sampled - probe.ours)[probe.fresh]
    above, below = probe.mean(excess.clamp(min=0)), probe.mean((-excess).clamp(min=0))
    smaller = probe.mean((excess < -4 * rounding).float())
    text = (
        f"log-probabilities among the tokens that top-k, top-p or min-p left: {above:.3g} nats of the gap are above the "
        f"policy's, {below:.3g} below, at {smaller:.0%} of the tokens; they would all be above"
    )
    return Cause(1 - 10 * max(below / above, smaller) if above else 0.0, text)
