"""What a process's passes over a minibatch are, of which each process has a part."""

from __future__ import annotations

import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from helpers import tiny_config
from test_batch import completion, prompt

from grpo import Trainer
from grpo.algorithm.batch import Outline, join, pack, plan_passes
from grpo.config import AlgorithmConfig
from grpo.observe.metrics import Meter
from grpo.training.learner import Learner, local_sums
from grpo.types import Batch, Group, MicroBatch, Packing


class Peer:
    """A process of several, each a thread: what `Processes` is to a Learner."""

    speaks = False

    def __init__(self, rank: int, table: dict[int, Any], barrier: Barrier, sequence_parallel: int) -> None:
        self.rank, self.table, self.barrier = rank, table, barrier
        self.world_size, self.sequence_parallel = barrier.parties, sequence_parallel
        self.num_parts, self.part = self.world_size // sequence_parallel, rank // sequence_parallel

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(20)
        values = [self.table[rank] for rank in range(self.world_size)]
        self.barrier.wait(20)
        return values

    def exchange(self, values: list[Any]) -> list[Any]:
        return [given[self.rank] for given in self.gather(values)]


def learner(peer: Peer, *, every_token_counts: bool) -> Learner:
    made = Learner.__new__(Learner)
    made.processes, made.every_token_counts = peer, every_token_counts  # type: ignore[assignment]
    made.algorithm, made.token_budget, made.max_completion_tokens = AlgorithmConfig(), 60, 30
    made.pair_cost = 0.5
    return made


def parts_of_a_minibatch() -> list[Batch]:
    """Of four processes, one of which has nothing; half of the advantages are 0, and in one part not all tokens are trained."""
    rng, parts = random.Random(0), []
    for num_groups in (3, 0, 2, 5):
        groups = [
            Group(
                prompt([rng.randrange(100) for _ in range(rng.randint(1, 9))]),
                [completion([rng.randrange(100) for _ in range(rng.randint(2, 30))]) for _ in range(3)],
            )
            for _ in range(num_groups)
        ]
        if num_groups == 2:
            cut = [
                replace(each, trained=[True, *[False] * (len(each.token_ids) - 1)]) for each in groups[0].completions
            ]
            groups[0] = replace(groups[0], completions=cut)
        advantages = torch.tensor([[rng.choice([0.0, 1.0, -0.5]) for _ in range(3)] for _ in groups])
        parts.append(pack(groups, advantages.reshape(num_groups, 3)))
    return parts


def assert_equal(ours: Any, theirs: Any) -> None:
    for field in fields(theirs):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(other, Packing):
            assert_equal(one, other)
        elif isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


def test_attention_counts_in_which_passes_run_at_the_same_time():
    whole = Outline.of(join(parts_of_a_minibatch()))
    peer = Peer(0, {}, Barrier(4), 1)
    plan = learner(peer, every_token_counts=True)._plan(whole)
    assert plan == plan_passes(whole, token_budget=60, num_processes=4, pair_cost=0.5)
    assert plan != plan_passes(whole, token_budget=60, num_processes=4)


def test_attention_counts_in_what_is_said_of_waiting(monkeypatch: pytest.MonkeyPatch):
    alone = Peer(0, {}, Barrier(1), 1)
    alone.speaks = True
    said: list[dict[str, Any]] = []
    monkeypatch.setattr("grpo.training.learner.measure_passes", lambda meter, passes, **how: said.append(how))
    made = learner(alone, every_token_counts=True)
    made._fix = lambda passes: None
    made.prepare([join(parts_of_a_minibatch())], Meter())
    assert said == [{"pair_cost": 0.5}]


@pytest.mark.parametrize("every_token_counts", [False, True])
@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_a_process_has_the_passes_of_the_whole_minibatch_though_it_gets_its_own_sequences_alone(
    every_token_counts: bool, sequence_parallel: int
):
    parts, table, barrier = parts_of_a_minibatch(), {}, Barrier(4)
    peers = [Peer(rank, table, barrier, sequence_parallel) for rank in range(4)]
    with ThreadPoolExecutor(4) as threads:
        dealt: list[list[MicroBatch]] = list(
            threads.map(lambda peer: learner(peer, every_token_counts=every_token_counts).deal(parts[peer.rank]), peers)
        )
    for peer, passes in zip(peers, dealt, strict=True):
        expected = learner(peer, every_token_counts=every_token_counts).deal_whole(join(parts))
        assert len(passes) == len(expected) > 1
        for ours, theirs in zip(passes, expected, strict=True):
            assert_equal(ours, theirs)


def test_sums_of_a_checkpoint_are_added_to_those_on_the_device():
    meter = Meter(sums={"policy/sampling_gap": torch.tensor(0.5)}, counts={"policy/sampling_gap": 3.0})
    sums = local_sums(torch.zeros((), device="meta"), meter, True)
    assert sums.device.type == "meta"
    assert sums.shape == (4,)
    assert local_sums(torch.tensor(2.0), meter, True).tolist() == [2, 0.5, 3, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which may be waited for")
def test_an_update_waits_for_the_gpu_once(tmp_path: Path):
    """For the sums that are logged, when the last pass has been handed over."""
    trainer = Trainer(
        tiny_config(
            tmp_path / "run",
            model={"dtype": "bfloat16"},
            rollout={"num_prompts": 8, "group_size": 8},
            algorithm={"kl_coef": 0.05},
            memory={"micro_batch_tokens": 256},
            evaluation={"num_questions": 0},
        )
    )
    trainer.train_step()
    own = trainer.learner.accumulate

    def watched(minibatch: list[MicroBatch], *others: Any) -> Any:
        assert len(minibatch) > 2
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return own(minibatch, *others)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.learner.accumulate = watched  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train_step()
    waited = [f"{each.filename}:{each.lineno}" for each in caught if "called a synchronizing" in str(each.message)]
    trainer.close()
    assert len(waited) == 1, waited
    assert "learner.py" in waited[0]
