"""The native engine: rollouts on the policy's own weights, at the speed of the hardware.

There is no second copy of the weights and no transfer: a decoding step reads the tensors that the optimizer has just updated
(under ZeRO-3 and with LoRA, the whole and merged replica that `sync` refreshes; for rollout.weights fp8 a copy of its layers in 8
bits is made at each call, fp8.py). Sequences take and leave slots as they start and end, each step is one CUDA graph whose size
follows the number of running sequences, and a prompt is read once for all of its completions.

    slots.py     who runs, and on which pages         decoder.py   the cache and the captured step
    layers.py    a step through the layers            sampling.py  logits -> tokens
    paged.py     attention over pages                 kernels.py   the same on CUDA

Sampling is reproducible: a token's random number depends on the seed, its sequence's place in the call and its position alone.
What a sequence draws is then independent of the slots and of its neighbours as far as its logits are, and those depend on the
number of rows of a step only through rounding: matrix products of different shapes add in different orders.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import replace
from itertools import groupby
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.config import Config
from grpo.policy.families import attention_calls, attribute
from grpo.policy.sampled_model import FORWARD_TOLERANCE, SampledModel
from grpo.policy.tokenizer import CHANGING_ROPE, rope_types
from grpo.rollout import fp8
from grpo.rollout.decoder import LENGTH, TOKEN, Chunk, Decoder
from grpo.rollout.grouping import Grouping
from grpo.rollout.layers import can_fuse
from grpo.rollout.paged import PAGE, PagedCache, num_pages_for
from grpo.rollout.sampling import numbered_seeds
from grpo.rollout.slots import FEWEST_SEQUENCES, READ_AHEAD, Prefix, Sequence, Slots
from grpo.rollout.stop_criteria import Ending, token_limit
from grpo.system import progress
from grpo.system.distributed import GIB
from grpo.system.out_of_memory import free_bytes, is_out_of_memory
from grpo.types import Ahead, Completion, Draft, Group, Listener, OnGroup, Prompt, Sampling, Start

READ_TOKENS = 16384
"""Most prompt tokens in one forward pass; a longer prompt is read alone. The update's micro-batches are larger."""


class NativeGenerator:
    """Samples with the policy's own weights; see the module. Every process must construct it.

    Raises:
        ValueError: a process has too little memory for keys and values.
    """

    def __init__(self, policy: SampledModel, config: Config) -> None:
        self.policy = policy
        self.max_sequences = config.memory.max_sequences
        self.kv_cache_gib = config.memory.kv_cache_gib
        self.fused = config.rollout.fused_layers
        self.in_8_bits = config.rollout.weights == "fp8"
        self.can_release = config.memory.release_kv_cache
        self.ending = Ending(policy.tokenizer, policy.end_token_ids)
        self._metrics: dict[str, float] = {}
        self._wanted_kv_gib = 0.0, 0.0  # and the fewest
        self._decoder: Decoder | None = None
        problem = None
        try:
            with policy.sampling_model("paged") as lm:
                self._make_decoder(lm, num_pages_for(config.max_sequence_tokens))
        except ValueError as error:
            problem = str(error)
        for each in policy.processes.gather(problem):  # one process alone would leave the others waiting
            if each is not None:
                raise ValueError(each)
        self.release_memory()

    def sync(self) -> None:
        self.policy.sync()

    @property
    def kv_gib(self) -> tuple[float, float] | None:
        """GiB held for keys and values, and the fewest that `memory.kv_cache_gib` may be; None if making them has failed."""
        if self._decoder is None:
            return None
        held = self._decoder.cache.num_bytes / GIB
        fewest = FEWEST_SEQUENCES * self._decoder.table.shape[1] + 1
        return held, held * fewest / self._decoder.cache.keys.shape[1]

    def halve(self) -> str | None:
        """See Generator."""
        held, fewest = self.kv_gib or self._wanted_kv_gib  # making a smaller one may have failed, too
        gib = max(held / 2, fewest * 1.01)
        if self.max_sequences == 1 or gib >= held:
            return None
        self._decoder = None
        self._wanted_kv_gib = gib, fewest
        self.max_sequences, self.kv_cache_gib = self.max_sequences // 2, gib
        return (
            f"going on with {self.max_sequences} completions at once and {gib:.3g} GiB for keys and values; "
            f"memory.max_sequences={self.max_sequences} memory.kv_cache_gib={gib:.3g} starts so"
        )

    def release_memory(self) -> None:
        """See Generator: with memory.release_kv_cache, that of keys and values."""
        if self._decoder is not None:
            self._decoder.cache.release()

    def metrics(self) -> dict[str, float]:
        """See Generator."""
        return self._metrics

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator."""
        return self.sample_ahead(
            prompts,
            sampling,
            num_completions=num_completions,
            seed=seed,
            on_group=on_group,
            ahead=Ahead.nothing(prompts),
        )

    def sample_ahead(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
        ahead: Ahead,
    ) -> list[Group]:
        """See CarryingGenerator."""
        grouping = Grouping(prompts, num_completions=num_completions, on_group=on_group)
        whole = Whole(grouping, ahead, num_completions=num_completions)
        under_way = self.sample_turns(whole.starts, sampling, seed=seed, listener=whole, step=ahead.step)
        ahead.left = whole.left(under_way)
        return grouping.groups()

    @torch.no_grad()
    def sample_turns(
        self, starts: list[Start], sampling: Sampling, *, seed: int, listener: Listener, step: int = 0
    ) -> dict[int, Draft]:
        """See TurnTakingGenerator."""
        self._metrics = {}
        if sampling.weights == "fp8" and not self.in_8_bits:
            raise ValueError("sampling.weights is fp8; this engine was made without. Set rollout.weights to fp8.")
        if not starts:
            return {}
        with self.policy.sampling_model("paged") as lm:
            longest = max(len(start.prompt.token_ids) + token_limit(start.prompt, sampling) for start in starts)
            decoder = self._decoder_for(lm, longest)
            decoder.cache.take()
            call = Call(decoder, self.ending, starts, sampling, seed=seed, listener=listener, step=step)
            call.run()
        self._metrics = call.metrics()
        return call.under_way()

    def _decoder_for(self, lm: PreTrainedModel, longest: int) -> Decoder:
        """The decoder there is, or a new one if a sequence may be longer than the configuration says."""
        if self._decoder is None or self._decoder.table.shape[1] < num_pages_for(longest):
            self._make_decoder(lm, num_pages_for(longest))
        assert self._decoder is not None, "the decoder was just made"
        return self._decoder

    def _make_decoder(self, lm: PreTrainedModel, pages_each: int) -> None:
        self._decoder = None  # its memory is for the new one
        self._decoder = make_decoder(
            lm,
            self.policy.end_token_ids,
            num_slots=self.max_sequences,
            pages_each=pages_each,
            gib=self.kv_cache_gib,
            fused=self.fused and can_fuse(lm.config),
            reserved=fp8.num_bytes(lm) if self.in_8_bits else 0,
            can_release=self.can_release,
        )


class Whole:
    """The listener of completions that nobody answers: each is over when its first turn is.

    Args:
        ahead: what was begun of the questions of the grouping, and of those that follow them.
    """

    def __init__(self, grouping: Grouping, ahead: Ahead, *, num_completions: int) -> None:
        self.grouping, self.ahead, self.size = grouping, ahead, num_completions
        self.starts = first_turns(grouping.prompts, ahead, num_completions)
        self.over: list[int] = []
        self.ended_ahead: dict[int, Draft] = {}

    def ended(self, place: int, turn: Completion) -> None:
        """See Listener."""
        self.over.append(place)
        if place < len(self.grouping.prompts):
            self.grouping.add(place, turn)
        else:
            self.ended_ahead[place] = Draft.of(turn, self.ahead.step)

    def answers(self, *, wait: bool) -> list[tuple[int, Prompt | None]]:
        """See Listener."""
        over, self.over = self.over, []
        return [(place, None) for place in over]

    def left(self, under_way: dict[int, Draft]) -> list[list[Draft]]:
        """Of each later question, what there is of its completions."""
        every = self.ended_ahead | under_way
        places = range(len(self.grouping.prompts), len(self.starts))
        drafts = [every[place] for place in places]
        return [drafts[start : start + self.size] for start in range(0, len(drafts), self.size)]


def first_turns(asked: list[Prompt], ahead: Ahead, num_completions: int) -> list[Start]:
    """Where the completions of a call begin, whose first turn is not over.

    Args:
        asked: the prompt of each completion that somebody waits for.
    """
    later = [prompt for prompt in ahead.prompts for _ in range(num_completions)]
    return [
        Start(
            place,
            prompt,
            place % num_completions,
            ahead.start_of(place, num_completions),
            later=place >= len(asked),
        )
        for place, prompt in enumerate([*asked, *later])
    ]


class Call:
    """One call of `sample_turns`, from the starts of completions until all that somebody waits for are over."""

    def __init__(
        self,
        decoder: Decoder,
        ending: Ending,
        starts: list[Start],
        sampling: Sampling,
        *,
        seed: int,
        listener: Listener,
        step: int,
    ) -> None:
        self.decoder, self.ending, self.sampling = decoder, ending, sampling
        self.seed, self.listener, self.step = seed, listener, step
        decoder.begin(sampling)
        self.end_tokens = frozenset(ending.end_token_ids)
        self.stop_watch = ending.watch(sampling.stop)
        self.prompts = {start.place: start.prompt for start in starts}  # of the turn that each is in
        self.sequences = self._begun(starts)
        self.num_missing = sum(not start.later for start in starts)
        self.num_sampling = self.num_missing  # of these, those that do not wait for an answer
        self.ended: set[Sequence] = set()
        self.num_drawn = 0  # tokens that turns have from this call
        before = [each for each in self.sequences.values() if each.tokens and self._is_over(each, len(each.tokens))]
        self.slots = Slots(
            self._prefixes({*before}),
            num_slots=decoder.state.shape[1],
            pages=range(1, decoder.cache.keys.shape[1]),
            pages_each=decoder.table.shape[1],
        )
        for sequence in before:  # in an earlier call
            self._end(sequence)
        self.num_places = 0
        self.num_steps = 0  # of decoding
        self.num_read = 0  # tokens whose keys and values were computed before them
        self.timeline: list[tuple[float, int]] = []  # when each chunk was launched, and its sequences

    def _begun(self, starts: list[Start]) -> dict[int, Sequence]:
        """By its place, the sequence of each start, with what there is of it."""
        own = [self.seed if start.prompt.seed is None else start.prompt.seed for start in starts]
        numbers = [start.place if start.prompt.seed is None else start.number for start in starts]
        seeds = numbered_seeds(own, numbers).tolist()
        return {start.place: self._sequence(start, number) for start, number in zip(starts, seeds, strict=True)}

    def _sequence(self, start: Start, seed: int) -> Sequence:
        draft, limit = start.draft, token_limit(start.prompt, self.sampling)
        kept = slice(limit)  # which may be less than it was
        return Sequence(
            start.place,
            start.prompt.token_ids,
            limit,
            seed,
            draft.tokens[kept],
            draft.logprobs[kept],
            draft.steps[kept],
            later=start.later,
        )

    def _prefixes(self, over: set[Sequence]) -> list[Prefix]:
        """What there is to read: of each prompt, for the turns that begin, and those under way, each alone."""
        prefixes: list[Prefix] = []
        for _, run in groupby(self.sequences.values(), key=lambda each: id(self.prompts[each.index])):
            own = [each for each in run if each not in over]
            prefixes += [Prefix(deque([each])) for each in own if each.tokens]
            if new := [each for each in own if not each.tokens]:
                prefixes.append(Prefix(deque(new)))
        return prefixes

    def run(self) -> None:
        """Launch a chunk of steps, and while it runs take in the results of the one before."""
        before: Chunk | None = None
        if self.num_missing:
            self._listen()  # of what had ended before
        while self.num_missing:
            chunk = self._launch(before)
            if before is not None:
                self._take_in(before)
            self._listen()
            before = chunk
            progress.drew(0 if chunk is None else chunk.num_places)
        if before is not None and any(each.later for each in before.rows):
            self._take_in(before)

    def under_way(self) -> dict[int, Draft]:
        """See TurnTakingGenerator.sample_turns."""
        return {
            place: Draft(each.tokens, each.logprobs, each.steps)
            for place, each in self.sequences.items()
            if each not in self.ended
        }

    def _launch(self, before: Chunk | None) -> Chunk | None:
        """The next steps of all that run and do not come to their limits in the chunk before; None if there are none."""
        while prefixes := self.slots.read_ahead(READ_TOKENS):
            self.num_read += self.decoder.read(prefixes)
            progress.tick()
        self.decoder.copy(self.slots.start(self.decoder.chunk))
        self.slots.grow(2 * self.decoder.chunk)  # the steps of the chunk before are not counted yet
        under_way = set() if before is None else set(before.rows)
        rows = [
            sequence
            for sequence in self.slots.running
            if sequence.remaining > self.decoder.chunk or sequence not in under_way
        ]
        if not rows:
            return None
        self.timeline.append((time.perf_counter(), len(rows)))
        chunk = self.decoder.decode(rows)
        self.num_places += chunk.num_places
        self.num_steps += self.decoder.chunk
        return chunk

    def _take_in(self, chunk: Chunk) -> None:
        """Append what each sequence of a chunk drew, and hand on the turns that have ended."""
        chunk.wait()
        if not chunk.logprobs[:, : len(chunk.rows)].isfinite().all():
            self.decoder.cache.clear()
            raise FloatingPointError(
                "the policy's logits are not finite numbers, so no token can be drawn from them: its weights are broken. Go on "
                "from an older checkpoint with model.name=.../hf and a lower optimizer.learning_rate."
            )
        tokens, logprobs = chunk.tokens.T.tolist(), chunk.logprobs.T.tolist()
        for row, (sequence, length) in enumerate(zip(chunk.rows, chunk.lens.tolist(), strict=False)):
            if sequence in self.ended:
                continue  # in the chunk before
            count = length - sequence.num_cached
            sequence.tokens += tokens[row][:count]
            sequence.logprobs += logprobs[row][:count]
            sequence.steps += [self.step] * count
            self.num_drawn += count
            if self._is_over(sequence, count):
                self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.ended.add(sequence)
        self.num_sampling -= not sequence.later
        turn = self._completion(sequence)
        sequence.num_kept = min(sequence.num_cached, len(sequence.prompt) + len(turn.token_ids))
        self.slots.set_down(sequence)
        self.listener.ended(sequence.index, turn)

    def _listen(self) -> None:
        """Let sequences whose turns have been answered go on, and those that are over go."""
        for place, prompt in self.listener.answers(wait=not self.num_sampling):
            before = self.sequences[place]
            if prompt is None:
                self.slots.let_go(before)
                self.num_missing -= not before.later
                continue
            self.prompts[place] = prompt
            after = self._begun([Start(place, prompt, later=before.later)])[place]
            self.sequences[place] = after
            self.num_sampling += not after.later
            self.slots.take_up(before, after)

    def _completion(self, sequence: Sequence) -> Completion:
        prompt = self.prompts[sequence.index]
        completion = self.ending.completion(prompt, self.sampling, sequence.tokens, sequence.logprobs)
        length = len(completion.token_ids)
        self.num_drawn -= sequence.steps[length:].count(self.step)
        cut_off = completion.finish_reason == "length"
        assert not cut_off or length == sequence.limit, "a completion was cut off below its limit"
        ages = [self.step - step for step in sequence.steps[:length]]
        return replace(completion, ages=ages) if any(ages) else completion

    def _is_over(self, sequence: Sequence, count: int) -> bool:
        """Whether its turn is, of which the newest `count` tokens have not been looked at."""
        if len(sequence.tokens) == sequence.limit or sequence.tokens[-1] in self.end_tokens:
            return True
        return self.stop_watch.has_seen(sequence.tokens, count)

    def metrics(self) -> dict[str, float]:
        return {
            "rollout/slots": max((rows for _, rows in self.timeline), default=0),
            "rollout/kv_gib": self.decoder.cache.num_bytes / GIB,
            "rollout/occupancy": self.num_drawn / self.num_places if self.num_places else 1.0,
            "rollout/preempted": self.slots.num_preempted,
            "rollout/decoding_steps": self.num_steps,
            "rollout/read_tokens": self.num_read,
        }


D = TypeVar("D", bound=Decoder)


def make_decoder(
    lm: PreTrainedModel,
    end_token_ids: list[int],
    *,
    num_slots: int,
    pages_each: int,
    gib: float | None,
    fused: bool,
    reserved: int = 0,
    can_release: bool = False,
    kind: type[D] = Decoder,  # type: ignore[assignment]
) -> D:
    """A decoder whose cache holds `num_slots` sequences of full length, or as much as there is memory for.

    Args:
        gib: GiB for the cache; None: as much as is needed, but at most half of what is free.
        reserved: bytes of what is free that are spoken for.
        can_release: see PagedCache.

    Raises:
        ValueError: there is not enough memory for the fewest sequences that always come to an end.
    """
    weight = next(lm.parameters())
    shape = cache_shape(lm)
    page_bytes = PagedCache.bytes_per_page(**shape, dtype=weight.dtype)
    fewest = FEWEST_SEQUENCES * pages_each + 1  # page 0 is nobody's
    free = max(free_bytes(weight.device) - reserved, 0)
    budget = free / 2 if gib is None else gib * GIB
    # besides its own pages a sequence holds its prefix's last, part-filled one
    ample = math.ceil((num_slots * (pages_each + 1) + fewest) / (1 - READ_AHEAD))
    num_pages = min(int(budget / page_bytes), ample)
    most = LARGEST_SHARE * free
    if num_pages < fewest or num_pages * page_bytes > most:
        setting = "null (half of what is free)" if gib is None else f"{gib:g}"
        needed = fewest * page_bytes
        remedy = f"Set it between {needed / GIB:.3g} and {most / GIB:.3g}" if needed < most else "Free memory"
        raise ValueError(
            f"memory.kv_cache_gib is {setting}; {free / GIB:.3g} GiB are free, of which a step needs some to work in, and keys "
            f"and values of {FEWEST_SEQUENCES} sequences of {pages_each * PAGE} tokens take {needed / GIB:.3g}. {remedy}, lower "
            "data.max_prompt_tokens or rollout.max_completion_tokens, or raise distributed.zero_stage on more GPUs."
        )
    cache = PagedCache(**shape, num_pages=num_pages, dtype=weight.dtype, device=weight.device, can_release=can_release)
    return kind(lm, cache, num_slots=num_slots, pages_each=pages_each, end_token_ids=end_token_ids, fused=fused)


LARGEST_SHARE = 0.9
"""Of the free memory, what a cache may take: logits and the reading of prompts take some besides it."""


def cache_shape(lm: PreTrainedModel) -> dict[str, int]:
    """As the layers hand keys and values to their attention, which `_unsupported_by_design` has found to be alike."""
    calls, _ = attention_calls(lm)
    return {"num_layers": len(calls), "num_kv_heads": calls[0].num_kv_heads, "head_dim": calls[0].key_dim}


CHECKED_STEPS = 8
CHECKED_TOKENS = 2 * PAGE + CHECKED_STEPS // 2
"""Length of the sequences by which a model is checked, and how many of these tokens it decodes: it goes over a border of pages
when it reads the prompt and when it decodes."""


def unsupported(policy: SampledModel, *, fused: bool) -> str | None:
    """Why this engine cannot sample from this model, or None if it can."""
    with policy.sampling_model() as lm:
        reason = _unsupported_by_design(lm)
    return reason or _strays(policy, "policy", fused=fused, tolerance=FORWARD_TOLERANCE[policy.dtype])


def unsupported_in_8_bits(policy: SampledModel) -> str | None:
    """Why it cannot with `rollout.weights: fp8`, though it can without."""
    with policy.sampling_model() as lm:
        reason = fp8.unsupported(lm)
    return reason or _strays(policy, "fp8", fused=True, tolerance=fp8.TOLERANCE)


def _strays(policy: SampledModel, weights: Literal["policy", "fp8"], *, fused: bool, tolerance: float) -> str | None:
    """Whether a step cannot be run, or is too far from the model's own forward pass."""
    positions = attribute(policy.whole_lm.config.get_text_config(), "max_position_embeddings") or CHECKED_TOKENS
    tokens, own = policy.plain_logprobs(min(CHECKED_TOKENS, positions))
    with policy.sampling_model("paged") as lm:
        fused = fused and can_fuse(lm.config)
        pages_each = num_pages_for(tokens.shape[1])
        decoder: Decoder = make_decoder(
            lm, policy.end_token_ids, num_slots=2, pages_each=pages_each, gib=None, fused=fused
        )
        decoder.begin(Sampling(1, weights=weights))
        try:
            ours = _teacher_forced(decoder, tokens, temperature=policy.temperature)
            decoder.warm_up(len(tokens))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return f"a step of {type(lm).__name__} cannot be run or captured: {str(error).splitlines()[0]}"
    gap = float((ours - own[:, -ours.shape[1] :]).abs().mean())
    if not gap < tolerance:
        it = "weights in 8 bits" if weights == "fp8" else "it"
        of = f"the log-probabilities of {type(lm).__name__} differ by {gap:.3g} nats on average"
        return f"with {it} {of} from the model's own"
    return None


def _unsupported_by_design(lm: PreTrainedModel) -> str | None:
    config = lm.config.get_text_config()
    name = type(lm).__name__
    if not getattr(lm, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    others = set(attribute(config, "layer_types") or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"{name} has layers other than full and sliding-window attention: {', '.join(sorted(others))}"
    calls, _ = attention_calls(lm)
    extra = next((call.extra for call in calls if call.extra), None)
    if extra:
        return f"{name}'s attention has {extra}"
    changing = sorted(rope_types(config) & set(CHANGING_ROPE))
    if changing:
        return f"{name} has a rotary embedding that changes with the longest sequence of a step ({changing[0]})"
    if attribute(config, "kv_lora_rank"):
        return f"{name} keeps compressed keys and values (multi-head latent attention)"
    if [call.layer for call in calls] != list(range(len(calls))):
        return f"{name} does not call its attention once for each layer, one after the other"
    if (
        len({(call.num_kv_heads, call.key_dim, call.value_dim) for call in calls}) != 1
        or calls[0].key_dim != calls[0].value_dim
    ):
        return f"{name} has layers whose keys and values are of different sizes"
    return None


@torch.no_grad()
def _teacher_forced(decoder: Decoder, tokens: Tensor, *, temperature: float) -> Tensor:
    """Log-probabilities of the last tokens of each row of `tokens` (B, N), at most half of it: what is before them is read as a
    prompt, then one token per step."""
    num_rows, length = tokens.shape
    prompt_len = max(length // 2, length - CHECKED_STEPS)
    pages = [
        list(range(1 + row * decoder.table.shape[1], 1 + (row + 1) * decoder.table.shape[1])) for row in range(num_rows)
    ]
    prompts = [Sequence(0, row[: prompt_len + 1], 1, 0) for row in tokens.tolist()]
    decoder.check_weights()
    decoder.read([Prefix(deque([prompt]), own) for prompt, own in zip(prompts, pages, strict=True)])
    decoder.table.copy_(torch.tensor(pages))
    parts = []
    for place in range(prompt_len, length - 1):
        decoder.state[TOKEN] = tokens[:, place]
        decoder.state[LENGTH] = place
        logits = decoder.logits(num_rows).float() / temperature
        parts.append(logits.log_softmax(-1).gather(1, tokens[:, place + 1 : place + 2]))
    return torch.cat(parts, 1)
