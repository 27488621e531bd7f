"""The native engine: what it samples is what `generate` samples, whatever the slots, the memory and the neighbours."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import QUESTIONS, TINY, launch, save_family, tiny_config
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from grpo import Trainer
from grpo.algorithm.batch import micro_batch, pack
from grpo.policy.policy import Policy
from grpo.policy.tokenizer import load_tokenizer
from grpo.rollout import make_generator
from grpo.rollout.decoder import Decoder, _undone_if_it_fails, bucket_of
from grpo.rollout.engine import NativeGenerator, _unsupported_by_design, first_turns, unsupported
from grpo.rollout.hf import HFGenerator
from grpo.rollout.layers import FusedLayers, Joined, end_to_end, model_layers
from grpo.rollout.paged import PAGE
from grpo.rollout.stop_criteria import token_limit
from grpo.system import distributed
from grpo.types import Ahead, Completion, Group, Prompt, Sampling

CUDA = torch.cuda.is_available()
GREEDY = Sampling(max_tokens=30, temperature=0.0)
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # else all tokens of a random model are about as likely, and rounding decides
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with a window in some layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=12, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES),
    "llama without grouped heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, attention_bias=True),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=12),
    "smollm3": SmolLM3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=12, query_pre_attn_scalar=16),
}
FUSED = [name for name in FAMILIES if name.split()[0] in ("qwen2", "qwen3", "llama", "mistral")]


def make_policy(directory: Path, model: Path = TINY / "model", **sections: Any) -> Policy:
    config = tiny_config(directory, **{"model": {"name": str(model), "dtype": "float32"}, **sections})
    return Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))


def keep_a_free_segment(num_bytes: int) -> None:
    """Let torch's allocator keep a free segment of so many bytes that nothing else lies in: what is half free is filled first."""
    gc.collect()
    torch.cuda.empty_cache()
    before, blocks = torch.cuda.memory_reserved(), []
    while torch.cuda.memory_reserved() < before + num_bytes:
        blocks.append(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"))


def native(policy: Policy, **memory: Any) -> NativeGenerator:
    changed = policy._config.model_copy(deep=True)
    for name, value in memory.items():
        setattr(changed.memory, name, value)
    return NativeGenerator(policy, changed)


def some_prompts(number: int = 6, *, longest: int = 150, vocabulary: int = 400, seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens; some fill a page exactly, or are a single token."""
    rng = random.Random(seed)
    lens = [1, 64, 65, longest, *(rng.randint(2, longest) for _ in range(number))][:number]
    return [Prompt(i, [rng.randrange(5, vocabulary) for _ in range(n)], "", "", {}) for i, n in enumerate(lens)]


def all_completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def tokens_of(groups: list[Group]) -> list[list[int]]:
    return [completion.token_ids for completion in all_completions(groups)]


def lm_logprobs(lm: Any, group: Group, completion: Completion, temperature: float = 1.0) -> Tensor:
    """By one plain forward pass over the whole sequence; on the CPU."""
    ids = torch.tensor([group.prompt.token_ids + completion.token_ids], device=lm.device)
    with torch.no_grad():
        logits = lm(input_ids=ids, use_cache=False).logits[0, len(group.prompt.token_ids) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(-1, ids[0, -len(logits) :].unsqueeze(1)).squeeze(1).cpu()


def fresh_logprobs(policy: Policy, group: Group, completion: Completion, temperature: float = 1.0) -> Tensor:
    with policy.sampling_model() as lm:
        return lm_logprobs(lm, group, completion, temperature)


def assert_logprobs(policy: Policy, groups: list[Group], *, temperature: float = 1.0, tolerance: float = 1e-4) -> None:
    for group in groups:
        for completion in group.completions:
            fresh = fresh_logprobs(policy, group, completion, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), fresh, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return make_policy(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_generate_token_for_token(family: str, tmp_path: Path):
    policy = make_policy(tmp_path, save_family(tmp_path / "model", FAMILIES[family]))
    assert unsupported(policy, fused=False) is None
    prompts = some_prompts()
    ours = native(policy, max_sequences=4).sample(prompts, GREEDY, num_completions=2, seed=0)
    theirs = HFGenerator(policy, max_sequences=16).sample(prompts, GREEDY, num_completions=2, seed=0)
    pairs = list(zip(all_completions(ours), all_completions(theirs), strict=True))
    for mine, other in pairs:
        assert mine.finish_reason == other.finish_reason or mine.token_ids != other.token_ids
        assert_equal_but_for_a_tie(mine, other)
    assert sum(mine.token_ids != other.token_ids for mine, other in pairs) <= len(pairs) / 8
    assert_logprobs(policy, ours)


def assert_equal_but_for_a_tie(mine: Completion, other: Completion) -> None:
    """The same tokens up to the first place where two were equally likely; from there on they are different texts."""
    for token, logprob, their_token, theirs in zip(
        mine.token_ids, mine.logprobs, other.token_ids, other.logprobs, strict=False
    ):
        assert logprob == pytest.approx(theirs, abs=1e-4)
        if token != their_token:
            return
    assert len(mine.token_ids) == len(other.token_ids)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(20), Sampling(20, temperature=0.6), Sampling(20, temperature=1.4, top_k=20, top_p=0.9, min_p=0.01)],
    ids=["plain", "cold", "truncated"],
)
def test_logprobs_are_those_of_the_whole_vocabulary_at_the_temperature(policy: Policy, sampling: Sampling):
    groups = native(policy).sample(some_prompts(), sampling, num_completions=3, seed=1)
    assert_logprobs(policy, groups, temperature=sampling.temperature)


def test_the_trainers_logprobs_equal_the_engines(policy: Policy):
    groups = native(policy).sample(some_prompts(4), Sampling(12), num_completions=2, seed=1)
    batch = pack(groups, torch.ones(4, 2))
    micro = micro_batch(batch, torch.ones_like(batch.sampling_logprobs)).to(policy.processes.device)
    torch.testing.assert_close(policy.old_logprobs(micro), micro.sampling_logprobs, rtol=0, atol=1e-4)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic is above its mean; cells of fewer than five expected draws joined."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    counts = torch.cat([counts[large], counts[~large].sum().view(1)]).double()
    expected = torch.cat([expected[large], expected[~large].sum().view(1)]).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(counts) - 1
    statistic = ((counts - expected).square() / expected).sum()
    return float((statistic - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize(
    "engine", [native, lambda policy: HFGenerator(policy, max_sequences=3000)], ids=["native", "hf"]
)
@pytest.mark.parametrize(
    "sampling", [Sampling(1), Sampling(1, temperature=0.7), Sampling(1, temperature=1.5, top_k=12, top_p=0.8)]
)
def test_first_tokens_are_distributed_as_the_model_says(tmp_path: Path, engine: Callable[..., Any], sampling: Sampling):
    policy = make_policy(tmp_path, save_family(tmp_path / "model", Qwen2Config(**{**SIZES, "initializer_range": 0.05})))
    prompt = some_prompts(6, longest=12)[4]  # transformers reads it 3,000 times
    (group,) = engine(policy).sample([prompt], sampling, num_completions=3000, seed=0)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group.completions]), minlength=512)
    with torch.no_grad(), policy.sampling_model() as lm:
        ids = torch.tensor([prompt.token_ids], device=policy.processes.device)
        p = (lm(input_ids=ids).logits[0, -1].cpu() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        p = p.where(p >= p.topk(sampling.top_k).values[-1], 0)
        ordered = (p / p.sum()).sort(descending=True)
        p = (
            torch.zeros(512).scatter(0, ordered.indices[ordered.values.cumsum(0) - ordered.values < sampling.top_p], 1)
            * p
        )
        assert counts[p == 0].sum() == 0
    assert abs(chi_square(counts, p / p.sum())) < 4  # of 1 in 30,000 for a right engine


def test_second_tokens_are_distributed_as_generates(policy: Policy):
    """Two samples against each other, over pairs of tokens: the second ones come from decoding, not from the prompt."""
    (prompt,) = some_prompts(1, seed=3)
    pairs = []
    for engine in (native(policy), HFGenerator(policy, max_sequences=4000)):
        (group,) = engine.sample([prompt], Sampling(2), num_completions=4000, seed=0)
        pairs.append(Counter(tuple(completion.token_ids) for completion in group.completions))
    common = [pair for pair, count in pairs[1].items() if count + pairs[0][pair] >= 20]
    assert len(common) > 10
    ours, theirs = (torch.tensor([counter[pair] for pair in common], dtype=torch.float64) for counter in pairs)
    statistic = ((ours - theirs).square() / (ours + theirs)).sum()
    assert float((statistic - len(common)) / (2 * len(common)) ** 0.5) < 4


def test_what_a_sequence_draws_depends_on_neither_slots_nor_neighbours(policy: Policy):
    prompts = some_prompts(6)
    expected = native(policy).sample(prompts, Sampling(90), num_completions=3, seed=5)
    narrow = native(policy, max_sequences=3).sample(prompts, Sampling(90), num_completions=3, seed=5)
    assert tokens_of(narrow) == tokens_of(expected)
    alone = native(policy).sample(prompts[:1], Sampling(90), num_completions=3, seed=5)
    assert tokens_of(alone) == tokens_of(expected[:1])
    assert tokens_of(native(policy).sample(prompts, Sampling(90), num_completions=3, seed=6)) != tokens_of(expected)


def test_prompts_with_seeds_of_their_own_draw_the_same_in_both_engines_and_beside_any_others(policy: Policy):
    prompts = [replace(prompt, seed=11 + prompt.row) for prompt in some_prompts(5)]
    for sampling in (Sampling(24), Sampling(24, temperature=0.6, top_p=0.9)):
        expected = tokens_of(native(policy).sample(prompts, sampling, num_completions=3, seed=5))
        together = HFGenerator(policy, max_sequences=8).sample(prompts, sampling, num_completions=3, seed=6)
        assert tokens_of(together) == expected
        alone = HFGenerator(policy, max_sequences=8).sample(prompts[3:4], sampling, num_completions=3, seed=7)
        assert tokens_of(alone) == expected[9:12]
        for ours, theirs in zip(
            together[0].completions,
            native(policy).sample(prompts[:1], sampling, num_completions=3, seed=5)[0].completions,
            strict=True,
        ):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def small_cache(policy: Policy, *, sequences: float, tokens: int) -> float:
    """GiB that hold so many sequences of so many tokens."""
    config = policy.lm.config
    per_page = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * 64
        * (config.hidden_size // config.num_attention_heads)
        * 4
    )
    return (sequences * -(-tokens // 64) + 1) * per_page / 2**30


def test_with_too_little_memory_sequences_are_set_aside_and_come_out_the_same(policy: Policy):
    prompts = some_prompts(8, longest=100)
    sampling = Sampling(150)  # few of these models' completions end before
    expected = native(policy).sample(prompts, sampling, num_completions=4, seed=5)
    scarce = native(policy, kv_cache_gib=small_cache(policy, sequences=4.2, tokens=250))
    assert tokens_of(scarce.sample(prompts, sampling, num_completions=4, seed=5)) == tokens_of(expected)
    assert scarce.metrics()["rollout/preempted"] > 0


def test_an_engine_knows_the_fewest_gib_it_works_with(policy: Policy):
    cache = small_cache(policy, sequences=6, tokens=120)
    held, fewest = native(policy, kv_cache_gib=cache).kv_gib or (0.0, 0.0)
    assert held <= cache
    native(policy, kv_cache_gib=fewest * 1.01)
    with pytest.raises(ValueError, match=r"memory\.kv_cache_gib is"):
        native(policy, kv_cache_gib=fewest * 0.99)


def test_a_cache_too_small_is_refused_by_its_setting(policy: Policy):
    with pytest.raises(ValueError, match=r"memory\.kv_cache_gib is .* sequences of 128 tokens take .* Set it between"):
        native(policy, kv_cache_gib=small_cache(policy, sequences=2, tokens=120))
    with pytest.raises(ValueError, match=r"memory\.kv_cache_gib is 1e\+06; .* GiB are free"):
        native(policy, kv_cache_gib=1e6, max_sequences=10**8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo.rollout.engine.free_bytes", lambda device: 1000)
        with pytest.raises(
            ValueError, match=r"memory\.kv_cache_gib is null .* Free memory, lower data\.max_prompt_tokens"
        ):
            native(policy)


PRIME = 1_000_003
POWERS = torch.tensor([pow(31, i, PRIME) for i in range(400)])


def pages_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose next token is a hash of all tokens before it, which it finds in the pages of the sequence."""

    def read(self: Decoder, prefixes: list[Any]) -> int:
        for prefix in prefixes:
            places = torch.arange(len(prefix.tokens), device=self.device)
            pages = torch.tensor(prefix.pages, dtype=torch.long, device=self.device)[places // PAGE]
            self.cache.keys[0, pages, 0, places % PAGE, 0] = torch.tensor(prefix.tokens, device=self.device).float()
        return sum(len(prefix.tokens) for prefix in prefixes)

    def logits(self: Decoder, size: int) -> Tensor:
        tokens, lens, table = self.state[0, :size], self.state[1, :size].long(), self.table[:size].long()
        page = table.gather(1, (lens // PAGE).unsqueeze(1)).squeeze(1)
        self.cache.keys[0, page, 0, lens % PAGE, 0] = tokens.float()
        known = self.cache.keys[0, table, 0, :, 0].flatten(1).long() + 1
        powers = self.powers[: known.shape[1]] * (torch.arange(known.shape[1], device=self.device) <= lens.unsqueeze(1))
        return torch.nn.functional.one_hot((known * powers).sum(1) % PRIME % 500, 512).float() * 50

    monkeypatch.setattr(Decoder, "read", read)
    monkeypatch.setattr(Decoder, "logits", logits)
    monkeypatch.setattr(Decoder, "powers", POWERS.to("cuda" if CUDA else "cpu"), raising=False)


def continuation(prompt: Prompt, sampling: Sampling, ends: set[int]) -> list[int]:
    """What that model says to a prompt."""
    state = sum((token + 1) * int(POWERS[i]) for i, token in enumerate(prompt.token_ids))
    length = len(prompt.token_ids)
    said: list[int] = []
    while len(said) < token_limit(prompt, sampling) and not (said and said[-1] in ends):
        said.append(state % PRIME % 500)
        state += (said[-1] + 1) * int(POWERS[length + len(said) - 1])
    return said


@pytest.mark.parametrize(("num_prompts", "sequences"), [(1000, None), (150, 3.0), (150, 6.0)])
def test_thousands_of_sequences_through_64_slots_come_out_whole(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, num_prompts: int, sequences: float | None
):
    """A token that is lost, doubled or swapped changes all that follow, and so does a page that is stale or not one's own; with
    room for a few sequences of full length, most are set aside at some time."""
    pages_model(monkeypatch)
    rng = random.Random(0)
    monkeypatch.setattr(policy, "end_token_ids", rng.sample(range(500), 10))
    prompts = [replace(p, max_tokens=rng.randint(1, 120)) for p in some_prompts(num_prompts, vocabulary=500)]
    sampling = Sampling(100)
    cache = {} if sequences is None else {"kv_cache_gib": small_cache(policy, sequences=sequences, tokens=250)}
    engine = native(policy, max_sequences=64, **cache)
    groups = engine.sample(prompts, sampling, num_completions=4, seed=0)
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        expected = continuation(group.prompt, sampling, set(policy.end_token_ids))
        assert [completion.token_ids for completion in group.completions] == [expected] * 4
    assert (engine.metrics()["rollout/preempted"] > 0) == (sequences is not None)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_stop_the_run(policy: Policy, monkeypatch: pytest.MonkeyPatch, broken: float):
    engine, own = native(policy), Decoder.logits
    monkeypatch.setattr(
        Decoder, "logits", lambda self, size: own(self, size).index_fill(1, self.ends[:1].long(), broken)
    )
    for sampling in (Sampling(5), GREEDY):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            engine.sample(some_prompts(3), sampling, num_completions=2, seed=0)


def test_broken_weights_leave_nothing_behind_in_the_cache(policy: Policy):
    engine, prompts = native(policy), some_prompts(3)
    expected = engine.sample(prompts, Sampling(20), num_completions=2, seed=0)
    weight = policy.lm.base_model.layers[0].self_attn.v_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        engine.sample(prompts, Sampling(20), num_completions=2, seed=0)
    with torch.no_grad():
        weight.copy_(before)
    assert engine.sample(prompts, Sampling(20), num_completions=2, seed=0) == expected


def test_every_end_token_and_limit_ends_a_completion(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    usual = Counter(
        t
        for ids in tokens_of(native(policy).sample(some_prompts(6), Sampling(20), num_completions=8, seed=0))
        for t in ids
    )
    ends = [token for token, _ in usual.most_common(2)]
    monkeypatch.setattr(policy, "end_token_ids", [*policy.end_token_ids, *ends])
    prompts = [replace(prompt, max_tokens=n) for prompt, n in zip(some_prompts(6), [1, 3, 9, 9, 40, 40], strict=True)]
    groups = native(policy).sample(prompts, Sampling(20), num_completions=8, seed=0)
    last = set()
    for group in groups:
        for completion in group.completions:
            *before, final = completion.token_ids
            assert not set(before) & set(policy.end_token_ids)
            limit = min(20, group.prompt.max_tokens or 20)
            assert completion.finish_reason == ("stop" if final in policy.end_token_ids else "length")
            assert len(completion.token_ids) == limit or (
                len(completion.token_ids) < limit and completion.finish_reason == "stop"
            )
            last.add(final)
    assert set(ends) <= last


@pytest.mark.parametrize("max_sequences", [3, 16])
def test_each_group_is_handed_on_once_as_soon_as_its_last_completion_has_ended(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, max_sequences: int
):
    monkeypatch.setattr(policy, "end_token_ids", [])
    limits = [90, 2, 50, 40]
    prompts = [replace(prompt, max_tokens=limit) for prompt, limit in zip(some_prompts(4), limits, strict=True)]
    engine = native(policy, max_sequences=max_sequences)
    decode, num_chunks = Decoder.decode, 0

    def counted(decoder: Decoder, rows: Any) -> Any:
        nonlocal num_chunks
        num_chunks += 1
        return decode(decoder, rows)

    monkeypatch.setattr(Decoder, "decode", counted)
    handed_on: list[tuple[int, Group, int]] = []
    groups = engine.sample(
        prompts, Sampling(100), num_completions=2, seed=0, on_group=lambda p, g: handed_on.append((p, g, num_chunks))
    )
    order = [p for p, _, _ in handed_on]
    assert sorted(order) == [0, 1, 2, 3]
    assert order == {3: [1, 0, 2, 3], 16: [1, 3, 2, 0]}[max_sequences]  # with 16 slots in the order of their limits
    assert all(groups[p] == group for p, group, _ in handed_on)
    assert handed_on[0][2] < num_chunks / 2  # long before the others have ended


def test_what_a_listener_raises_ends_the_sampling_and_the_engine_goes_on_working(policy: Policy):
    def listener(p: int, group: Group) -> None:
        raise ZeroDivisionError

    prompts, engine = some_prompts(4), native(policy)
    expected = tokens_of(engine.sample(prompts, GREEDY, num_completions=2, seed=0))
    with pytest.raises(ZeroDivisionError):
        engine.sample(prompts, GREEDY, num_completions=2, seed=0, on_group=listener)
    assert tokens_of(engine.sample(prompts, GREEDY, num_completions=2, seed=0)) == expected


def test_generate_hands_groups_on_after_each_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    generator, num_batches, handed_on = HFGenerator(policy, max_sequences=3), 0, []
    generate = generator._generate

    def counted(*arguments: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        return generate(*arguments)

    monkeypatch.setattr(generator, "_generate", counted)
    groups = generator.sample(
        some_prompts(4),
        GREEDY,
        num_completions=2,
        seed=0,
        on_group=lambda p, group: handed_on.append((p, group, num_batches)),
    )
    # eight completions, three at a time: the second group ends in the second batch, the last two in the third
    assert handed_on == [(0, groups[0], 1), (1, groups[1], 2), (2, groups[2], 2), (3, groups[3], 3)]


def test_stop_texts_end_completions_where_generate_ends_them(policy: Policy):
    from grpo.data.prompts import build_prompts
    from grpo.data.rows import load_rows

    prompts, _ = build_prompts(load_rows(policy._config.data)[:8], policy.tokenizer, policy._config.data)
    sampling = Sampling(60, temperature=0.0, stop=("<answer>", "guess 1"))
    ours = native(policy, max_sequences=3).sample(prompts, sampling, num_completions=1, seed=0)
    theirs = HFGenerator(policy, max_sequences=8).sample(prompts, sampling, num_completions=1, seed=0)
    assert ours != []
    assert tokens_of(ours) == tokens_of(theirs)
    stopped = [c for c in all_completions(ours) if any(text in c.text for text in sampling.stop)]
    assert stopped
    for completion in stopped:
        assert completion.finish_reason == "stop"
        shorter = policy.tokenizer.decode(completion.token_ids[:-1])
        assert not any(text in shorter for text in sampling.stop)


@pytest.mark.parametrize("end", ["tokens", "texts", "limits"])
def test_a_completion_takes_no_more_steps_than_it_needs(policy: Policy, monkeypatch: pytest.MonkeyPatch, end: str):
    """It is taken out one chunk after the one in which it ends, and is not in that one if its limit ends it. Whoever overlooked
    an end would get the same completions later, since all of them are cut."""
    prompts = some_prompts(5)
    usual = tokens_of(native(policy).sample(prompts, Sampling(60), num_completions=4, seed=0))
    frequent = [token for token, _ in Counter(token for ids in usual for token in ids).most_common(3)]
    monkeypatch.setattr(policy, "end_token_ids", frequent if end == "tokens" else [])
    stop = (policy.tokenizer.decode(frequent[:1]),) if end == "texts" else ()
    engine = native(policy, max_sequences=6)
    lens = [len(ids) for ids in tokens_of(engine.sample(prompts, Sampling(60, stop=stop), num_completions=4, seed=0))]
    places = sum(lens) / engine.metrics()["rollout/occupancy"]
    assert engine._decoder is not None
    steps = engine._decoder.chunk
    chunks = sum(-(-n // steps) + (n < 60) for n in lens)
    assert sum(n < 60 for n in lens) > 15 or end == "limits"
    assert round(places) <= chunks * steps


def test_an_update_of_the_weights_is_seen_by_the_next_call(policy: Policy):
    """Nothing of a call outlives it: neither keys and values of its prompts nor anything captured."""
    engine, prompts = native(policy), some_prompts()
    first = engine.sample(prompts, GREEDY, num_completions=1, seed=0)
    saved = {name: weight.clone() for name, weight in policy.lm.state_dict().items()}
    try:
        with torch.no_grad():
            for weight in policy.lm.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
        second = engine.sample(prompts, GREEDY, num_completions=1, seed=0)
        assert tokens_of(second) != tokens_of(first)
        assert_logprobs(policy, second)
    finally:
        policy.lm.load_state_dict(saved)
    assert tokens_of(engine.sample(prompts, GREEDY, num_completions=1, seed=0)) == tokens_of(first)


@pytest.mark.parametrize("synced", [True, False], ids=["synced", "stale"])
def test_stale_weights_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool):
    """Under ZeRO-3 sampling reads a replica; without its refresh the trainer's log-probabilities are not those sampled with."""
    config = tiny_config(
        tmp_path / "run",
        model={"name": str(TINY / "model"), "dtype": "float32"},
        rollout={"engine": "native"},
        distributed={"zero_stage": 3},
        optimizer={"learning_rate": 3e-3},
        run={"dir": str(tmp_path / "run"), "steps": 3},
        algorithm={"kl_coef": 0.0, "max_sampling_gap": 0.01},
    )
    trainer = Trainer(config)
    assert isinstance(trainer.collector.generator, NativeGenerator)
    if not synced:
        monkeypatch.setattr(trainer.policy, "sync", lambda: None)
    trainer.train_step()  # the first rollout is on the weights as they were loaded
    try:
        if synced:
            assert trainer.train_step()["policy/sampling_gap"] < 1e-4
        else:
            with pytest.raises(
                RuntimeError, match=r"in a few of the step's sequences:\n +\d+%  sampled with old weights"
            ):
                trainer.train_step()
    finally:
        trainer.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_sample_their_own_questions_with_the_weights_they_train(tmp_path: Path, stage: int):
    """Three questions over two processes: they take different numbers of steps, and neither waits for the other."""
    settings = ["run.steps=2", f"run.dir={tmp_path / 'run'}", "evaluation.num_questions=0", "preflight.num_questions=0"]
    # few and short: in Triton's interpreter a token takes milliseconds
    settings += [
        f"data.name={QUESTIONS}",
        "rollout.num_prompts=3",
        "rollout.group_size=5",
        "rollout.max_completion_tokens=24",
    ]
    engine = ["rollout.engine=native", f"distributed.zero_stage={stage}", "memory.max_sequences=5"]
    script = ["../scripts/train_zero.py", "--config", "configs/quickstart.yaml", "--set"]
    launch(*script, *settings, *engine, processes=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/slots"] for row in rows] == [5, 5]
    assert all(row["policy/sampling_gap_max"] < 1e-3 for row in rows)


def test_a_call_without_prompts_gives_no_groups(policy: Policy):
    assert native(policy).sample([], Sampling(4), num_completions=2, seed=0) == []


def test_the_metrics_say_what_a_call_took(policy: Policy):
    engine = native(policy, max_sequences=5)
    groups = engine.sample(prompts := some_prompts(4), Sampling(30), num_completions=3, seed=0)
    metrics = engine.metrics()
    assert metrics["rollout/slots"] == 5
    assert metrics["rollout/preempted"] == 0
    assert 0.5 < metrics["rollout/occupancy"] < 1
    assert metrics["rollout/read_tokens"] == sum(len(prompt.token_ids) - 1 for prompt in prompts)  # once for the three
    drawn = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    assert drawn / 5 < metrics["rollout/decoding_steps"] < drawn
    each = -(-max(96 + 24, 150 + 30) // 64)
    pages = math.ceil((5 * (each + 1) + 3 * each + 1) / 0.875)
    config = policy.lm.config
    head_dim = config.hidden_size // config.num_attention_heads
    expected = pages * 64 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4 / 2**30
    assert metrics["rollout/kv_gib"] == pytest.approx(expected)


def test_auto_takes_the_native_engine_and_generate_can_be_asked_for(policy: Policy):
    config = policy._config.model_copy(deep=True)
    assert isinstance(make_generator(config, policy), NativeGenerator)
    config.rollout.engine = "hf"
    assert isinstance(make_generator(config, policy), HFGenerator)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            Gemma2Config(**SIZES, attn_logit_softcapping=1.0),
            "Gemma2ForCausalLM's attention has capped logits (softcap)",
        ),
        (
            Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]),
            "Lfm2ForCausalLM has layers other than full and sliding-window attention: conv",
        ),
        (BloomConfig(vocab_size=512, hidden_size=64), "BloomForCausalLM does not take its attention from"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            "LlamaForCausalLM has a rotary embedding that changes with the longest sequence of a step (dynamic)",
        ),
    ],
    ids=["capped", "convolutions", "own attention", "rotary"],
)
def test_models_the_engine_does_not_fit_are_named(config: PretrainedConfig, reason: str):
    assert str(_unsupported_by_design(AutoModelForCausalLM.from_config(config))).startswith(reason)


def test_native_for_a_model_it_does_not_fit_is_refused_and_auto_says_why(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("grpo.rollout.engine._unsupported_by_design", lambda lm: "its attention is odd")
    config = policy._config.model_copy(deep=True)
    config.rollout.engine = "native"
    with pytest.raises(
        ValueError, match=r"rollout\.engine is native; its attention is odd\. Set rollout\.engine to hf"
    ):
        make_generator(config, policy)
    config.rollout.engine = "auto"
    assert isinstance(make_generator(config, policy), HFGenerator)
    assert "its attention is odd" in capsys.readouterr().out


def test_a_model_whose_numbers_come_out_wrong_is_refused(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    wrong = lambda lm, tokens, positions, places: model_layers(lm, tokens, positions * 0, places)  # noqa: E731
    monkeypatch.setattr("grpo.rollout.decoder.model_layers", wrong)
    assert "differ by" in str(unsupported(policy, fused=False))


class Others:
    """Answer each turn but the third with words of their own, when `num_waiting` turns wait, or nothing else is to do."""

    def __init__(self, prompts: list[Prompt], *, num_completions: int, num_waiting: int) -> None:
        self.so_far = [prompt for prompt in prompts for _ in range(num_completions)]
        self.turns: list[list[tuple[Prompt, Completion]]] = [[] for _ in self.so_far]
        self.num_waiting = num_waiting
        self.waiting: list[int] = []

    def ended(self, place: int, turn: Completion) -> None:
        self.turns[place].append((self.so_far[place], turn))
        self.waiting.append(place)

    def answers(self, *, wait: bool) -> list[tuple[int, Prompt | None]]:
        if not wait and len(self.waiting) < self.num_waiting:
            return []
        answered, self.waiting = self.waiting, []
        return [(place, self._next(place)) for place in answered]

    def _next(self, place: int) -> Prompt | None:
        prompt, turn = self.turns[place][-1]
        number = len(self.turns[place])
        if number == 3:
            return None
        words = [5 + (7 * place + n) % 300 for n in range((1, 90, 3)[(place + number) % 3])]
        self.so_far[place] = replace(prompt, token_ids=[*prompt.token_ids, *turn.token_ids, *words], seed=place)
        return self.so_far[place]


@pytest.mark.parametrize("family", ["qwen2", "mistral with a window", "gemma3"])
def test_turns_go_on_from_what_was_read_as_if_it_was_read_again(family: str, tmp_path: Path):
    policy = make_policy(tmp_path, save_family(tmp_path / "model", FAMILIES[family]))
    prompts, sampling = some_prompts(5), Sampling(9, temperature=0.0, stop=("e",))
    last: list[list[list[int]]] = []
    gib = None
    for scarce, num_waiting in ((False, 20), (False, 1), (True, 4)):
        engine = native(policy, max_sequences=20, kv_cache_gib=gib if scarce else None)
        # room for the longest conversation, which the limit of a turn does not tell
        engine.sample([Prompt(0, [5] * 500, "", "", {})], Sampling(1), num_completions=1, seed=0)
        others = Others(prompts, num_completions=4, num_waiting=num_waiting)
        starts = first_turns([prompt for prompt in prompts for _ in range(4)], Ahead.nothing(prompts), 4)
        assert not engine.sample_turns(starts, sampling, seed=0, listener=others), "none is left under way"
        metrics = engine.metrics()
        assert engine.kv_gib is not None
        gib = engine.kv_gib[1] * 1.001
        assert [len(turns) for turns in others.turns] == [3] * 20
        last.append([turn.token_ids for turns in others.turns for _, turn in turns])
        every = [prompt for turns in others.turns for prompt, _ in turns]
        again = engine.sample(every, sampling, num_completions=1, seed=0)
        for (prompt, turn), group in zip([each for turns in others.turns for each in turns], again, strict=True):
            assert_equal_but_for_a_tie(turn, group.completions[0])
            assert group.prompt is prompt
        if scarce:
            assert metrics["rollout/preempted"] > 0
        else:
            words = sum(len(prompt.token_ids) for prompt in others.so_far) + 9 * len(others.so_far)
            assert metrics["rollout/read_tokens"] < words < engine.metrics()["rollout/read_tokens"]
    assert last[0] == last[1] == last[2]


def test_buckets_waste_at_most_a_quarter_and_few_are_needed():
    buckets = {bucket_of(n) for n in range(1, 1025)}
    assert all(n <= bucket_of(n) <= max(n * 1.25, n + 1) for n in range(1, 1025))
    assert len(buckets) <= 36


# --- fused layers; their kernels on the CPU in plain torch and through Triton's interpreter, on a GPU compiled -------------


@pytest.mark.parametrize("kernels", ["plain_kernels", "kernels"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_layers_equal_the_models_own(family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if kernels == "kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(
        "grpo.rollout.layers.kernels_for", lambda tensor: importlib.import_module(f"grpo.rollout.{kernels}")
    )
    from grpo.rollout.engine import _teacher_forced, make_decoder
    from grpo.rollout.paged import num_pages_for

    policy = make_policy(tmp_path, save_family(tmp_path / "model", FAMILIES[family]))
    with torch.no_grad():
        for name, weight in policy.lm.named_parameters():
            if "norm" in name or "bias" in name:  # 1 and 0 in a fresh model
                weight.add_(torch.randn_like(weight) * 0.2)
    monkeypatch.setattr("grpo.rollout.engine.CHECKED_STEPS", 6)
    # over the border of a page and beyond a window; Triton's interpreter reads three tokens a second
    is_short = kernels == "kernels" and not torch.cuda.is_available() and "window" not in family
    tokens = torch.randint(5, 500, (2, 12 if is_short else PAGE + 4), device=policy.processes.device)
    results = []
    with policy.sampling_model("paged") as lm, torch.no_grad():
        for fused in (False, True):
            decoder = make_decoder(lm, [0], num_slots=2, pages_each=num_pages_for(PAGE + 4), gib=0.5, fused=fused)
            results.append(_teacher_forced(decoder, tokens, temperature=1.0))
            assert isinstance(decoder._layers, FusedLayers) is fused
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projections_of_one_input_are_joined_without_a_copy(stage: int, dtype: str, tmp_path: Path):
    config = tiny_config(
        tmp_path, model={"name": str(TINY / "model"), "dtype": dtype}, distributed={"zero_stage": stage}
    )
    policy = Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=getattr(torch, dtype)))
    with policy.sampling_model() as lm:
        for layer in FusedLayers(lm).layers:
            assert layer.qkv.one
            assert layer.gate_up.one
        attention = lm.base_model.layers[0].self_attn
        joined = Joined([attention.q_proj, attention.k_proj, attention.v_proj])
        x = torch.randn(5, lm.config.hidden_size, dtype=lm.dtype, device=policy.processes.device)
        for part, linear in zip(joined(x), joined.parts, strict=True):
            torch.testing.assert_close(part, linear(x))
        assert joined.weight is not None
        assert joined.weight.data_ptr() == attention.q_proj.weight.data_ptr()


def test_what_was_captured_is_dropped_when_a_weight_moves_and_only_then(policy: Policy):
    engine = native(policy)
    decoder = engine._decoder
    assert decoder is not None
    decoder.check_weights()
    decoder._graphs[1, False] = "a graph"  # type: ignore[assignment]
    decoder.check_weights()
    assert decoder._graphs
    weight = policy.lm.base_model.layers[0].mlp.down_proj.weight
    before = weight.data
    weight.data = before.clone()
    try:
        decoder.check_weights()
        assert not decoder._graphs
    finally:
        weight.data = before


def test_weights_apart_in_memory_are_not_joined():
    one, two = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    assert end_to_end([one.weight, two.weight]) is None
    both = Joined([one, two])
    x = torch.randn(2, 4)
    assert not both.one
    assert torch.equal(torch.cat(list(both(x)), 1), torch.cat([one(x), two(x)], 1))
    whole = torch.randn(6, 4)
    assert torch.equal(end_to_end([whole[:3], whole[3:]]), whole)  # type: ignore[arg-type]
    assert end_to_end([whole[3:], whole[:3]]) is None


# --- on a GPU ------------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device for graphs and flash attention")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma", "mistral with a window"])
def test_sampling_logprobs_in_bfloat16_agree_with_a_forward_pass(family: str, fused: bool, tmp_path: Path):
    name = str(save_family(tmp_path / "model", FAMILIES[family]))
    config = tiny_config(tmp_path, model={"name": name, "dtype": "bfloat16"}, rollout={"fused_layers": fused})
    policy = Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.bfloat16))
    groups = NativeGenerator(policy, config).sample(some_prompts(), Sampling(60), num_completions=4, seed=0)
    with torch.no_grad(), policy.sampling_model() as lm:
        exact = copy.deepcopy(lm).float()
    own, ours = [], []
    for group in groups:
        for completion in group.completions:
            truth = lm_logprobs(exact, group, completion)
            own.append((fresh_logprobs(policy, group, completion) - truth).abs())
            ours.append((torch.tensor(completion.logprobs) - truth).abs())
    # rounding as much as the model's own forward pass in bfloat16 does, but not more: a fifth is left for chance
    assert float(torch.cat(ours).mean()) < 1.2 * float(torch.cat(own).mean())


@pytest.mark.gpu
@gpu
def test_graphs_are_captured_again_when_a_weight_moves(policy: Policy):
    engine, prompts = native(policy), some_prompts()
    first = engine.sample(prompts, GREEDY, num_completions=2, seed=0)
    weight = policy.lm.base_model.layers[0].mlp.down_proj.weight
    before = weight.data
    weight.data = before.clone() * 1.5
    try:
        moved = engine.sample(prompts, GREEDY, num_completions=2, seed=0)
        assert tokens_of(moved) != tokens_of(first)
        assert_logprobs(policy, moved, tolerance=1e-3)
    finally:
        weight.data = before


@pytest.mark.gpu
@gpu
def test_a_capture_that_fails_leaves_torch_as_it_was(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """The engine that samples in its place draws random numbers, and its memory is given back as ever."""
    step, stream = Decoder._step, torch.cuda.current_stream()

    def waits(self: Decoder, size: int) -> None:
        step(self, size)
        self.state.sum().item()

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_step", waits)
        assert "cannot be run or captured" in str(unsupported(policy, fused=True))
    assert torch.cuda.current_stream() == stream
    assert len(torch.rand(8, device="cuda").unique()) > 1
    keep_a_free_segment(2**26)
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - 2**26
    assert unsupported(policy, fused=True) is None


def test_a_capture_that_fails_is_ended_in_torch_on_its_stream_and_in_its_pool(monkeypatch: pytest.MonkeyPatch):
    done: list[Any] = []
    generator = Mock(graphsafe_set_state=lambda state: done.append("generator"))
    monkeypatch.setattr(torch.cuda, "default_generators", [None, generator])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", done.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: done.append(("end", *of)))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: done.append(("release", *of)))
    device, pool = torch.device("cuda", 1), (0, 7)
    with _undone_if_it_fails(device, pool):
        pass
    assert not done
    with pytest.raises(RuntimeError, match=r"^a capture$"), _undone_if_it_fails(device, pool):
        raise RuntimeError("a capture")
    assert done == ["before", ("end", 1, pool), ("release", 1, pool), "generator"]

    def ended(*of: Any) -> None:
        raise RuntimeError("not currently recording to mempool_id")

    done.clear()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    with pytest.raises(RuntimeError, match=r"^a capture$"), _undone_if_it_fails(device, pool):
        raise RuntimeError("a capture")
    assert done == ["before", "generator"], "released once, with its graph"


@pytest.mark.gpu
@gpu
def test_memory_does_not_grow_from_call_to_call(policy: Policy):
    engine, prompts = native(policy), some_prompts()
    sizes = []
    for seed in range(4):
        engine.sample(prompts, Sampling(40), num_completions=4, seed=seed)
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_reserved())
    assert sizes[-1] == sizes[1]
