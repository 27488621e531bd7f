"""Random numbers, the rules of truncation, and the kernels against plain torch (on the CPU by Triton's interpreter)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from grpo.rollout import plain_kernels
from grpo.rollout.paged import PAGE
from grpo.rollout.sampling import knobs_of, mix, plain_draw, sequence_seeds, uniform
from grpo.types import Sampling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def splitmix64(state: int) -> int:
    """The published generator in plain integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_random_numbers_are_splitmix64():
    states = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    assert [int(value) % 2**64 for value in mix(signed)] == [splitmix64(state) for state in states]
    first = splitmix64((7 + 0x9E3779B97F4A7C15) % 2**64)
    assert float(uniform(torch.tensor([7]), torch.tensor([0]))) == (first >> 11) / 2**53


def test_random_numbers_are_even_and_sequences_and_positions_do_not_repeat():
    seeds = sequence_seeds(0, 500)
    numbers = uniform(seeds.repeat_interleave(400), torch.arange(400).repeat(500))
    assert len(set(numbers.tolist())) == 200_000
    counts = torch.histc(numbers.float(), 100, 0, 1)
    assert float(((counts - 2000).square() / 2000).sum()) < 99 + 4 * 198**0.5
    assert not set(seeds.tolist()) & set(sequence_seeds(1, 500).tolist())


def kept(sampling: Sampling, probabilities: list[float]) -> list[int]:
    """Tokens that are ever drawn."""
    logits = torch.tensor([probabilities]).log().expand(3000, -1).contiguous()
    tokens, _ = plain_draw(logits, sequence_seeds(0, 3000), torch.zeros(3000).int(), knobs_of(sampling), truncated=True)
    return sorted(set(tokens.tolist()))


def test_truncation_keeps_what_it_says():
    p = [0.4, 0.1, 0.3, 0.2]
    assert kept(Sampling(1, top_k=2), p) == [0, 2]
    assert kept(Sampling(1, top_p=0.69), p) == [0, 2]
    assert kept(Sampling(1, top_p=0.71), p) == [0, 2, 3]  # 0.4 + 0.3 is not yet 0.71
    assert kept(Sampling(1, min_p=0.45), p) == [0, 2, 3]  # at least 0.18
    assert kept(Sampling(1, top_k=3, top_p=0.77), p) == [0, 2]  # of 0.9: 0.4 / 0.9 + 0.3 / 0.9 is 0.78
    assert kept(Sampling(1, top_k=1), [0.3, 0.3, 0.2, 0.2]) == [0, 1]  # as likely as the last one kept
    assert kept(Sampling(1, top_p=1e-6), p) == [0]


def test_more_tokens_than_there_are_can_be_allowed():
    assert kept(Sampling(1, top_k=9), [0.4, 0.1, 0.3, 0.2]) == [0, 1, 2, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_numbers_give_a_token_of_the_vocabulary_and_no_finite_logprob(temperature: float):
    pytest.importorskip("triton")
    from grpo.rollout import kernels

    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[0], logits[1, 7], logits[2] = float("nan"), float("inf"), float("-inf")
    knobs = knobs_of(Sampling(1, temperature=temperature)).to(DEVICE)
    positions = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for draw, truncated in itertools.product((kernels.draw, plain_draw), (False, True)):
        own = knobs_of(Sampling(1, temperature=temperature, top_p=0.9)).to(DEVICE) if truncated else knobs
        tokens, logprobs = draw(logits, sequence_seeds(0, 3).to(DEVICE), positions, own, truncated=truncated)
        assert bool(((tokens >= 0) & (tokens < 5000)).all())
        assert not logprobs.isfinite().any()


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((2000, 10), float("-inf"))
    logits[:, 3], logits[:, 8] = 0.0, -1.0
    tokens, logprobs = plain_draw(
        logits, sequence_seeds(0, 2000), torch.zeros(2000).int(), knobs_of(Sampling(1)), truncated=False
    )
    assert set(tokens.tolist()) == {3, 8}
    assert logprobs.isfinite().all()


VOCABULARY = 9000 if DEVICE == "cuda" else 4500  # several blocks of the kernel; the interpreter is slow
SETTINGS = [
    Sampling(1),
    Sampling(1, temperature=0.6),
    Sampling(1, temperature=0.0),
    Sampling(1, top_k=7),
    Sampling(1, temperature=0.5, top_p=0.7),
    Sampling(1, min_p=0.1),
    Sampling(1, temperature=1.3, top_k=50, top_p=0.8, min_p=0.02),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_kernel_draws_what_plain_torch_draws(sampling: Sampling, dtype: torch.dtype):
    pytest.importorskip("triton")
    from grpo.rollout import kernels

    torch.manual_seed(0)
    num_rows = 200 if DEVICE == "cuda" else 3  # the interpreter is slow
    logits = (torch.randn(num_rows, VOCABULARY, device=DEVICE) * 2.5).to(dtype)
    logits[:, 100:200] = float("-inf")
    seeds = sequence_seeds(3, num_rows).to(DEVICE)
    positions = torch.randint(0, 500, (num_rows,), dtype=torch.int32, device=DEVICE)
    knobs = knobs_of(sampling).to(DEVICE)
    tokens, logprobs = kernels.draw(logits, seeds, positions, knobs, truncated=sampling.truncated)
    expected = plain_draw(logits, seeds, positions, knobs, truncated=sampling.truncated)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("by", ["plain", "kernel"])
def test_each_row_draws_by_its_own_settings_as_it_would_alone(by: str):
    """Beside rows that leave tokens out, also one that leaves out none and has tokens of hardly any probability."""
    draw = plain_draw
    if by == "kernel":
        pytest.importorskip("triton")
        from grpo.rollout.kernels import draw
    torch.manual_seed(0)
    logits = torch.randn(len(SETTINGS), VOCABULARY, device=DEVICE) * 6
    seeds = sequence_seeds(3, len(SETTINGS)).to(DEVICE)
    positions = torch.arange(len(SETTINGS), dtype=torch.int32, device=DEVICE)
    knobs = torch.stack([knobs_of(sampling) for sampling in SETTINGS]).to(DEVICE)
    tokens, logprobs = draw(logits, seeds, positions, knobs, truncated=True)
    for row, sampling in enumerate(SETTINGS):
        own = slice(row, row + 1)
        alone = draw(logits[own], seeds[own], positions[own], knobs[row], truncated=sampling.truncated)
        assert (tokens[own], logprobs[own]) == alone


def test_a_row_that_draws_from_everything_does_so_beside_others():
    """Top-p 1, searched for by sums in float, would leave out what such a sum does not feel."""
    pytest.importorskip("triton")
    from grpo.rollout import kernels

    logits = torch.full((2, 9000), -24.0, device=DEVICE)
    logits[:, 0] = 0.0
    settings = [Sampling(1), Sampling(1, top_k=3)]
    knobs = torch.stack([knobs_of(sampling) for sampling in settings]).to(DEVICE)
    assert kernels._floor(logits, knobs).tolist()[0] == float("-inf")


def test_the_kernel_draws_tokens_as_often_as_they_are_likely():
    """Over several blocks of the vocabulary, one of them without any probability."""
    pytest.importorskip("triton")
    from grpo.rollout import kernels

    num_rows = 20_000 if DEVICE == "cuda" else 120
    logits = torch.full((17_000,), float("-inf"), device=DEVICE)
    places = torch.tensor([0, 4095, 4096, 13_000, 13_001, 16_999], device=DEVICE)
    logits[places] = torch.tensor([0.0, -1.0, 0.5, -0.5, -2.0, 0.2], device=DEVICE)
    tokens, _ = kernels.draw(
        logits.expand(num_rows, -1),
        sequence_seeds(0, num_rows).to(DEVICE),
        torch.zeros(num_rows, dtype=torch.int32, device=DEVICE),
        knobs_of(Sampling(1)).to(DEVICE),
        truncated=False,
    )
    counts = torch.stack([(tokens == place).sum() for place in places])
    assert int(counts.sum()) == num_rows
    expected = logits[places].softmax(-1) * num_rows
    assert float(((counts - expected).square() / expected).sum()) < 5 + 4 * 10**0.5


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "pages", "window"),
    [
        (5, 14, 2, 64, 4, None),
        (3, 8, 8, 32, 5, 70),
        (40, 4, 1, 80, 3, None),
        (2, 6, 2, 64, 20, 10),
        (1, 4, 4, 16, 20, None),
    ],
)
def test_attention_over_pages_equals_plain_torch_and_keeps_nan_neighbours_out(
    rows: int, heads: int, kv_heads: int, head_dim: int, pages: int, window: int | None
):
    pytest.importorskip("triton")
    from grpo.rollout import kernels

    torch.manual_seed(0)
    num_pages = 1 + rows * pages
    keys, values = (torch.randn(num_pages, kv_heads, PAGE, head_dim, device=DEVICE) for _ in range(2))
    table = 1 + torch.randperm(rows * pages, device=DEVICE).view(rows, pages).int()
    lens = torch.randint(1, pages * PAGE + 1, (rows,), dtype=torch.int32, device=DEVICE)
    lens[0] = pages * PAGE
    for row in range(rows):
        for number in range(pages):
            free = max(0, int(lens[row]) - number * PAGE)
            for cache in (keys, values):
                cache[table[row, number], :, min(free, PAGE) :] = float("nan")
    q = torch.randn(rows, heads, head_dim, device=DEVICE)
    actual = kernels.decode_attention(q, keys, values, table, lens, scale=0.2, window=window)
    expected = plain_kernels.decode_attention(
        q, keys.nan_to_num(), values.nan_to_num(), table, lens, scale=0.2, window=window
    )
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def slow_attention(q: Tensor, keys: Tensor, values: Tensor, pages: list[int], length: int, window: int) -> Tensor:
    """One row with Python loops; q (heads, D)."""
    group = q.shape[0] // keys.shape[1]
    out = torch.zeros_like(q)
    for head in range(q.shape[0]):
        seen = range(max(0, length - window), length)
        k = torch.stack([keys[pages[i // PAGE], head // group, i % PAGE] for i in seen])
        v = torch.stack([values[pages[i // PAGE], head // group, i % PAGE] for i in seen])
        out[head] = ((q[head] @ k.T) * 0.3).softmax(-1) @ v
    return out


@pytest.mark.parametrize("window", [5, 1000])
def test_plain_attention_equals_loops(window: int):
    torch.manual_seed(0)
    keys, values = torch.randn(6, 2, PAGE, 8), torch.randn(6, 2, PAGE, 8)
    table, lens = torch.tensor([[3, 1], [5, 2]], dtype=torch.int32), torch.tensor([100, 7], dtype=torch.int32)
    q = torch.randn(2, 4, 8)
    actual = plain_kernels.decode_attention(
        q, keys, values, table, lens, scale=0.3, window=window if window < 1000 else None
    )
    for row in range(2):
        expected = slow_attention(q[row], keys, values, table[row].tolist(), int(lens[row]), window)
        torch.testing.assert_close(actual[row], expected)
