import math
import random
import time
from dataclasses import replace

import pytest
import torch

from grpo.algorithm.batch import (
    empty_micro_batch,
    join,
    micro_batch,
    pack,
    pass_cost,
    plan_passes,
    split,
    take,
    unpack,
)
from grpo.policy.attention import spread
from grpo.types import Batch, Completion, Group, Prompt


def completion(ids: list[int]) -> Completion:
    return Completion(ids, [-float(i) for i in ids], "", "stop")


def prompt(ids: list[int]) -> Prompt:
    return Prompt(0, ids, "", "", {})


@pytest.fixture
def batch() -> Batch:
    groups = [
        Group(prompt([1, 2]), [completion([10, 11]), completion([12])]),
        Group(prompt([3]), [completion([13]), completion([14, 15, 16])]),
    ]
    return pack(groups, torch.tensor([[0.5, float("nan")], [1.5, -1.5]]))


def random_batch(rng: random.Random, num_groups: int = 9, num_completions: int = 3) -> Batch:
    groups = [
        Group(
            prompt([rng.randrange(100) for _ in range(rng.randint(1, 9))]),
            [completion([rng.randrange(100) for _ in range(rng.randint(1, 30))]) for _ in range(num_completions)],
        )
        for _ in range(num_groups)
    ]
    return pack(groups, torch.randn(num_groups, num_completions))


def test_packing_lays_sequences_end_to_end_and_leaves_out_unknown_rewards(batch: Batch):
    assert batch.tokens.tolist() == [1, 2, 10, 11, 3, 13, 3, 14, 15, 16]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 10]
    assert batch.prompt_index.tolist() == [0, 1, 1]
    assert batch.advantages.tolist() == [0.5, 1.5, -1.5]
    assert batch.completion_lens.tolist() == [2, 1, 3]
    assert (-batch.sampling_logprobs).tolist() == [10, 11, 13, 14, 15, 16]


def test_completions_that_were_cut_off_can_be_left_out():
    cut_off = replace(completion([12]), finish_reason="length")
    batch = pack([Group(prompt([1]), [completion([10]), cut_off])], torch.tensor([[1.0, -1.0]]), without_truncated=True)
    assert batch.tokens.tolist() == [1, 10]
    assert batch.advantages.tolist() == [1.0]


def test_taking_sequences_takes_their_tokens_and_per_token_values(batch: Batch):
    part = take(batch, [2, 0])
    assert part.tokens.tolist() == [3, 14, 15, 16, 1, 2, 10, 11]
    assert part.cu_seqlens.tolist() == [0, 4, 8]
    assert part.prompt_index.tolist() == [1, 0]
    assert part.advantages.tolist() == [-1.5, 0.5]
    assert (-part.sampling_logprobs).tolist() == [14, 15, 16, 10, 11]
    assert take(batch, []).tokens.numel() == 0


def test_a_pass_gives_back_the_sequences_it_was_laid_out_from():
    batch = random_batch(random.Random(0))
    back = unpack(micro_batch(batch, torch.zeros(len(batch.sampling_logprobs))))
    for name, value in vars(batch).items():
        if name != "prompt_index":  # other numbers for the same prompts
            assert value is getattr(back, name) is None or torch.equal(getattr(back, name), value), name
    same = batch.prompt_index[:, None] == batch.prompt_index
    assert torch.equal(back.prompt_index[:, None] == back.prompt_index, same)


def test_a_split_pass_has_the_same_sequences_and_what_is_known_of_each_token():
    batch = random_batch(random.Random(1))
    num_tokens = len(batch.sampling_logprobs)
    whole = micro_batch(batch, torch.rand(num_tokens))
    whole.ref_logprobs, whole.selected = torch.rand(num_tokens), torch.rand(num_tokens) > 0.5
    assert split(whole, len(whole.tokens)) == [whole]
    parts = split(whole, 60)
    assert len(parts) > 3
    assert all(len(part.tokens) <= 60 for part in parts)
    assert all(part.old_logprobs is None for part in parts)

    def known(micro):
        columns = (micro.targets, micro.weights, micro.ref_logprobs, micro.selected, micro.advantages)
        return sorted(zip(*(column.tolist() for column in columns), strict=True))

    assert sorted(row for part in parts for row in known(part)) == known(whole)

    def sequences(micro):
        own = unpack(micro)
        return sorted(ids.tolist() for ids in own.tokens.split(own.sequence_lens.tolist()))

    assert sorted(ids for part in parts for ids in sequences(part)) == sequences(whole)


def test_joined_batches_keep_their_prompts_apart(batch: Batch):
    empty = pack([], torch.empty(0, 2))
    both = join([batch, empty, batch])
    assert both.prompt_index.tolist() == [0, 1, 1, 2, 3, 3]
    assert both.cu_seqlens.tolist() == [0, 4, 6, 10, 14, 16, 20]
    unknown_first = pack(
        [Group(prompt([7]), [completion([8])]), Group(prompt([9]), [completion([6])])],
        torch.tensor([[float("nan")], [1.0]]),
    )
    assert join([unknown_first, batch]).prompt_index.tolist() == [1, 2, 3, 3]  # a number that nobody has does no harm
    back = take(both, [3, 4, 5])
    assert back.tokens.equal(batch.tokens)
    assert back.sampling_logprobs.equal(batch.sampling_logprobs)


def test_a_pass_holds_each_prompt_once_and_every_completion_sees_its_own(batch: Batch):
    micro = micro_batch(batch, weights=torch.ones(6))
    #                                 prompts   completions
    assert micro.tokens.tolist() == [1, 2, 3, 10, 11, 13, 14, 15, 16]
    assert micro.position_ids.tolist() == [0, 1, 0, 2, 3, 1, 1, 2, 3]
    assert micro.targets.tolist() == [10, 11, 13, 14, 15, 16]
    assert micro.source_index.tolist() == [1, 3, 2, 2, 6, 7]
    assert micro.advantages.tolist() == [0.5, 0.5, 1.5, -1.5, -1.5, -1.5]
    packing = micro.packing
    assert packing.cu_queries.tolist() == [0, 2, 3, 5, 6, 9]
    assert packing.cu_keys.tolist() == [0, 2, 3, 7, 9, 13]
    assert micro.tokens[packing.key_index].tolist() == [1, 2, 3, 1, 2, 10, 11, 3, 13, 3, 14, 15, 16]
    assert (packing.longest_query, packing.longest_key) == (3, 4)
    assert micro.num_sequence_tokens == 10
    assert micro.completion_lens.tolist() == [2, 1, 3]


def test_the_gradient_of_shared_keys_is_that_of_plain_indexing():
    batch = random_batch(random.Random(4))
    micro = micro_batch(batch, weights=torch.ones(int(batch.completion_lens.sum())))
    x = torch.randn(len(micro.tokens), 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(micro.packing.key_index), 2, 3, dtype=torch.float64)
    ours, plain = spread(x, micro.packing), x[micro.packing.key_index]
    assert ours.equal(plain)
    expected = torch.autograd.grad((plain * weights).sum(), x)
    # the parts of a shared place are added in float32
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), x), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_shared_keys_is_summed_in_float32():
    groups = [Group(prompt([1, 2, 3]), [completion([4])] * 256)]
    micro = micro_batch(pack(groups, torch.ones(1, 256)), weights=torch.ones(256))
    x = torch.zeros(len(micro.tokens), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(spread(x, micro.packing).sum(), x)
    # in bfloat16, 256 + 1 is 256, and adding ones one by one gets stuck there
    assert gradient[:3].flatten().tolist() == [256.0] * 3  # 257, rounded once
    assert gradient[3:].flatten().tolist() == [1.0] * 256


def test_planning_long_sequences_takes_no_time():
    groups = [Group(prompt([1] * 10), [completion([2] * 80)] * 8) for _ in range(250)]
    started = time.process_time()
    plan = plan_passes(pack(groups, torch.ones(250, 8)), token_budget=150, num_processes=2)
    assert time.process_time() - started < 5  # each has a pass of its own; trying every number of passes took minutes
    assert sum(len(sequences) for passes in plan for sequences in passes) == 2000


def tokens_in(batch: Batch, sequences: list[int]) -> int:
    return len(micro_batch(take(batch, sequences), torch.empty(0)).tokens)


@pytest.mark.parametrize("budget", [1, 40, 100, 10**6])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_passes_hold_every_sequence_once_within_the_budget(budget: int, num_processes: int):
    batch = random_batch(random.Random(0))
    plan = plan_passes(batch, token_budget=budget, num_processes=num_processes)
    assert len(plan) == num_processes
    assert len({len(passes) for passes in plan}) == 1
    held = [sequences for passes in plan for sequences in passes]
    assert sorted(i for sequences in held for i in sequences) == list(range(batch.num_sequences))
    for sequences in held:
        assert len(sequences) <= 1 or tokens_in(batch, sequences) <= budget


def test_passes_are_equally_full_and_split_few_groups():
    batch = random_batch(random.Random(1), num_groups=60, num_completions=8)
    plan = plan_passes(batch, token_budget=1000, num_processes=4)
    sizes = [tokens_in(batch, sequences) for passes in plan for sequences in passes]
    alone = tokens_in(batch, list(range(batch.num_sequences)))
    assert len(sizes) == 4 * -(-alone // 4000)
    assert max(sizes) < 1.03 * sum(sizes) / len(sizes)  # by less than the longest completion, 30 tokens
    assert sum(sizes) < 1.02 * alone  # prompts that are read twice because their group was split


def test_long_sequences_are_dealt_evenly_too():
    rng = random.Random(2)
    groups = [Group(prompt([1] * 50), [completion([2] * rng.randint(100, 4000)) for _ in range(8)]) for _ in range(16)]
    plan = plan_passes(pack(groups, torch.ones(16, 8)), token_budget=16_000, num_processes=4)
    batch = pack(groups, torch.ones(16, 8))
    loads = [sum(tokens_in(batch, sequences) for sequences in passes) for passes in plan]
    assert min(loads) > 0.97 * max(loads)


def waiting(batch: Batch, plan: list[list[list[int]]], pair_cost: float) -> float:
    """Share of their time that processes wait for the one whose pass takes longest."""

    def seconds(sequences: list[int]) -> float:
        micro = micro_batch(take(batch, sequences), torch.empty(0))
        return len(micro.tokens) + pair_cost * micro.num_pairs

    at_once = [[seconds(each) for each in passes] for passes in zip(*plan, strict=True)]
    return 1 - sum(map(sum, at_once)) / sum(len(each) * max(each) for each in at_once)


def test_passes_that_run_at_the_same_time_take_the_same_time():
    """One of a long sequence takes longer than one of many short ones with as many tokens."""
    rng, cost = random.Random(3), 1e-3
    lens = [[min(2000, int(rng.lognormvariate(5, 1.2)) + 10) for _ in range(8)] for _ in range(32)]
    groups = [Group(prompt([1] * 20), [completion([2] * n) for n in each]) for each in lens]
    batch = pack(groups, torch.ones(32, 8))
    by_tokens = plan_passes(batch, token_budget=2100, num_processes=4)
    by_time = plan_passes(batch, token_budget=2100, num_processes=4, pair_cost=cost)
    dealt = [sorted(tuple(each) for passes in plan for each in passes) for plan in (by_tokens, by_time)]
    assert dealt[0] == dealt[1]  # as full as before
    assert waiting(batch, by_time, cost) < 0.03 < 0.08 < waiting(batch, by_tokens, cost)


def test_pairs_are_counted_where_a_prompt_is_shared():
    groups = [
        Group(prompt([1, 2]), [completion([3, 4]), completion([5])]),
        Group(prompt([1, 2, 3]), [completion([4]), completion([6])]),
    ]
    batch = pack(groups, torch.tensor([[1.0, 1.0], [1.0, math.nan]]))
    micro = micro_batch(batch, torch.empty(0))
    seen = [(1, 2), (3, 4), (3,), (1, 2, 3), (4,)]  # by each place of: 1 2, 3 4, 5; 1 2 3, 4
    assert micro.num_pairs == sum(map(sum, seen))
    assert pass_cost(batch, [0, 1, 2], pair_cost=0.5) == len(micro.tokens) + 0.5 * micro.num_pairs


def test_an_empty_batch_needs_no_pass():
    empty = pack([], torch.empty(0, 4))
    assert empty.num_sequences == 0
    assert plan_passes(empty, token_budget=100, num_processes=2) == [[], []]
    assert join([empty, empty]).num_sequences == 0


def test_sequences_longer_than_the_budget_have_a_pass_each_and_there_are_no_more(batch: Batch):
    plan = plan_passes(batch, token_budget=1, num_processes=2)
    assert [len(passes) for passes in plan] == [-(-batch.num_sequences // 2)] * 2
    assert all(len(sequences) <= 1 for passes in plan for sequences in passes)


def test_with_fewer_sequences_than_processes_some_passes_are_empty(batch: Batch):
    plan = plan_passes(batch, token_budget=100, num_processes=5)
    assert sorted(len(passes[0]) for passes in plan) == [0, 0, 1, 1, 1]


def test_a_spare_pass_has_no_weight():
    micro = empty_micro_batch()
    assert micro.is_spare
    assert micro.weights.tolist() == [0.0]
    assert micro.tokens[micro.source_index + 1].equal(micro.targets)
