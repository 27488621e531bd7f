import random

import pytest
import torch

from grpo.batch import minibatch_bounds, pack, plan_micro_batches, spare, take, with_per_token
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


def random_batch(rng: random.Random, num_groups: int = 9) -> Batch:
    groups = [
        Group(
            prompt([rng.randrange(100) for _ in range(rng.randint(1, 9))]),
            [completion([rng.randrange(100) for _ in range(rng.randint(1, 30))]) for _ in range(3)],
        )
        for _ in range(num_groups)
    ]
    return pack(groups, torch.randn(num_groups, 3))


def test_packing_lays_sequences_end_to_end_and_leaves_out_unknown_rewards(batch: Batch):
    assert batch.tokens.tolist() == [1, 2, 10, 11, 3, 13, 3, 14, 15, 16]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 10]
    assert batch.advantages.tolist() == [0.5, 1.5, -1.5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert batch.completion_lens.tolist() == [2, 1, 3]
    assert batch.sequence_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.tokens[batch.target_index].tolist() == [10, 11, 13, 14, 15, 16]
    assert (-batch.sampling_logprobs).tolist() == [10, 11, 13, 14, 15, 16]


def test_taking_sequences_takes_their_tokens_and_per_token_values(batch: Batch):
    part = take(batch, [2, 0])
    assert part.tokens.tolist() == [3, 14, 15, 16, 1, 2, 10, 11]
    assert part.cu_seqlens.tolist() == [0, 4, 8]
    assert part.advantages.tolist() == [-1.5, 0.5]
    assert (-part.sampling_logprobs).tolist() == part.tokens[part.target_index].tolist() == [14, 15, 16, 10, 11]
    assert part.old_logprobs is None


@pytest.mark.parametrize("budget", [1, 40, 100, 10**6])
def test_micro_batches_hold_every_sequence_once_within_the_budget(budget: int):
    batch = random_batch(random.Random(0))
    plan = plan_micro_batches(batch, budget)
    assert sorted(i for part in plan for i in part) == list(range(batch.num_sequences))
    for part in plan:
        assert len(part) == 1 or int(batch.sequence_lens[part].sum()) <= budget


def test_first_fit_decreasing_fills_passes_well():
    batch = random_batch(random.Random(1), num_groups=60)
    used = int(batch.sequence_lens.sum())
    assert len(plan_micro_batches(batch, 200)) <= used / 200 * 1.1 + 1


def test_per_token_results_return_to_the_order_of_the_batch():
    batch = random_batch(random.Random(2))
    plan = plan_micro_batches(batch, 60)
    parts = [take(batch, part).sampling_logprobs for part in plan]
    assert with_per_token(batch, plan, parts).equal(batch.sampling_logprobs)


def test_an_empty_batch_packs_into_no_pass():
    empty = pack([], torch.empty(0, 4))
    assert empty.num_sequences == 0
    assert plan_micro_batches(empty, 100) == []
    assert with_per_token(empty, [], []).numel() == 0
    assert take(empty, []).tokens.numel() == 0


def test_a_spare_pass_has_the_fields_of_its_batch_and_no_weight(batch: Batch):
    batch.weights = torch.ones_like(batch.sampling_logprobs)
    passing = spare(batch)
    assert passing.weights.tolist() == [0.0]
    assert passing.old_logprobs is None
    assert passing.target_index.tolist() == [1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_minibatch_holds_the_same_questions_however_many_processes_there_are(world_size: int):
    for m in range(3):
        held = set()
        for rank in range(world_size):
            mine = list(range(rank, 12, world_size))
            bounds = minibatch_bounds(num_prompts=12, num_minibatches=3, rank=rank, world_size=world_size)
            held |= set(mine[bounds[m]])
        assert held == set(range(4 * m, 4 * m + 4))
