"""A run goes on with another number of processes or another ZeRO stage, from the same numbers to the bit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch, shallow, tiny_config
from number_reward import variety
from worker_reshard import run

from grpo import Trainer
from grpo.run.reshard import Layout, Span, cut, what_changes

LORA = {"lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-4}}
OFFLOAD = {"distributed": {"offload_optimizer": True}}
ONE_PROCESS_FIRST = [
    {"name": "whole", "zero": 0, "steps": 2},
    {"name": "two-1", "zero": 2, "steps": 2},
    {"name": "adapters", "zero": 0, "steps": 2, **LORA},
]
TWO_PROCESSES = [
    {"name": "two-2", "source": "two-1", "zero": 2, "steps": 3},
    {"name": "three-2", "source": "whole", "zero": 3, "steps": 3},
    {"name": "adapters-2", "source": "adapters", "zero": 2, "steps": 3, **LORA},
]
THREE_PROCESSES = [
    {"name": "two-3", "source": "two-2", "zero": 2, "steps": 4},
    {"name": "offloaded-3", "source": "three-2", "zero": 2, "steps": 4, **OFFLOAD},
    {"name": "adapters-3", "source": "adapters-2", "zero": 3, "steps": 4, **LORA},
]
ONE_PROCESS_LAST = [
    {"name": "one-1", "source": "two-2", "zero": 1, "steps": 4},
    {"name": "three-1", "source": "three-2", "zero": 3, "steps": 4},
    {"name": "whole-1", "source": "three-2", "zero": 0, "steps": 4},
    {"name": "whole", "zero": 0, "steps": 4},  # which never had another layout
    {"name": "adapters", "zero": 0, "steps": 4, **LORA},
]
RESUMED = [case for case in TWO_PROCESSES + THREE_PROCESSES + ONE_PROCESS_LAST if "source" in case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen runs, on one, two and three processes: each of another layout than the one it goes on from."""
    out = tmp_path_factory.mktemp("runs")
    for case in ONE_PROCESS_FIRST:
        run(out, **case)
    launch("worker_reshard.py", str(out), json.dumps(TWO_PROCESSES), processes=2)
    launch("worker_reshard.py", str(out), json.dumps(THREE_PROCESSES), processes=3)
    for case in ONE_PROCESS_LAST:
        run(out, **case)
    return out


def held(runs: Path, name: str, when: str) -> dict[str, Any]:
    return torch.load(runs / name / f"{when}.pt")


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: f"{case['source']}-to-{case['name']}")
def test_a_training_state_in_another_layout_is_the_same_to_the_bit(runs: Path, case: dict[str, Any]):
    saved, resumed = held(runs, case["source"], f"step-{case['steps'] - 1}"), held(runs, case["name"], "resumed")
    assert saved["position"] == resumed["position"] > 0
    assert saved["counts"] == resumed["counts"] == {2.0 * (case["steps"] - 1)}  # two minibatches a step
    assert saved["state"].keys() == resumed["state"].keys()
    for name, tensors in saved["state"].items():
        assert tensors["exp_avg_sq"].any(), f"{name} has no second moment, so nothing was compared"
        for kind, tensor in tensors.items():
            assert torch.equal(resumed["state"][name][kind], tensor), f"{kind} of {name}"


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: f"{case['source']}-to-{case['name']}")
def test_the_next_update_is_that_of_a_run_that_kept_its_layout(runs: Path, case: dict[str, Any]):
    never_moved = held(runs, "adapters" if "lora" in case else "whole", f"step-{case['steps']}")["state"]
    for name, tensors in held(runs, case["name"], f"step-{case['steps']}")["state"].items():
        # as in test_distributed: a fifth of one step of 1e-5
        torch.testing.assert_close(tensors["weight"], never_moved[name]["weight"], rtol=0, atol=2e-6)


def test_in_bfloat16_the_masters_move_and_the_weights_follow_them(tmp_path: Path):
    bfloat16 = {"model": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-3}}
    run(tmp_path, "zero-0", zero=0, steps=1, **bfloat16)
    for name, source, stage in (("zero-2", "zero-0", 2), ("zero-3", "zero-2", 3), ("again", "zero-3", 0)):
        run(tmp_path, name, source=source, zero=stage, steps=1, **bfloat16)
        saved, resumed = held(tmp_path, "zero-0", "step-1"), held(tmp_path, name, "resumed")
        assert saved["counts"] == resumed["counts"] == {2.0}
        for parameter, tensors in saved["state"].items():
            assert tensors["master"].dtype == torch.float32
            assert all(torch.equal(resumed["state"][parameter][kind], tensor) for kind, tensor in tensors.items())


def test_a_run_in_another_layout_says_what_is_no_longer_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, "before", zero=0, steps=1)
    capsys.readouterr()
    run(tmp_path, "after", source="before", zero=2, steps=1)
    assert "resumed under ZeRO 2 what ZeRO 0 saved: weights, optimizer, step" in capsys.readouterr().out
    assert "resumed on 2 processes what 4 saved: " in what_changes(Layout(4, 2), Layout(2, 3))
    assert "sampled tokens are not" in what_changes(Layout(1, 2), Layout(2, 2))


def stepped_by_hand(run_dir: Path, optimizer: Any, *, zero: int) -> Trainer:
    sections = {
        "model": {"name": shallow(1)},
        "rollout": {"num_prompts": 4, "group_size": 3, "max_completion_tokens": 4},
    }
    config = tiny_config(run_dir, **sections, distributed={"zero_stage": zero}, run={"steps": 4, "resume": "auto"})
    return Trainer(config, rewards=[variety], optimizer=optimizer)


def two_groups(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.1}])


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (partial(torch.optim.SGD, momentum=0.5), "SGD, which keeps momentum_buffer of each weight"),
        (partial(torch.optim.AdamW, amsgrad=True), "AdamW, which keeps max_exp_avg_sq of each weight"),
        (two_groups, "AdamW with 2 groups of parameters"),
    ],
)
@pytest.mark.parametrize("saved", [0, 2, 3])
def test_what_an_optimizer_keeps_otherwise_than_adamw_stays_in_its_layout(
    tmp_path: Path, optimizer: Any, said: str, saved: int
):
    first = stepped_by_hand(tmp_path / "run", optimizer, zero=saved)
    first.train_step()
    first.save()
    first.close()
    way_back = f"Go on with 1 process and distributed.zero_stage={saved}, or begin another run from its weights"
    with pytest.raises(ValueError, match=rf"^optimizer is {said}; only exp_avg, .*\. {way_back} "):
        stepped_by_hand(tmp_path / "run", optimizer, zero=1 if saved == 0 else 0)
    stepped_by_hand(tmp_path / "run", optimizer, zero=saved).close()


def test_an_optimizer_that_keeps_nothing_goes_on_in_any_layout(tmp_path: Path):
    first = stepped_by_hand(tmp_path / "run", torch.optim.SGD, zero=2)
    first.train_step()
    first.save()
    first.close()
    again = stepped_by_hand(tmp_path / "run", torch.optim.SGD, zero=0)
    for before, now in zip(first.policy.lm.parameters(), again.policy.lm.parameters(), strict=True):
        assert torch.equal(before, now)
    again.train_step()
    again.close()


def test_what_lies_where_in_each_stage():
    sizes = {"a": 3, "b": 2}
    assert [cut(sizes, Layout(2, 2), rank=rank, lengths=[3]) for rank in (0, 1)] == [
        [[Span("a", start=0, offset=0, length=3)]],
        [[Span("b", start=0, offset=0, length=2)]],
    ]
    assert [cut(sizes, Layout(2, 3), rank=rank, lengths=[3]) for rank in (0, 1)] == [
        [[Span("a", start=0, offset=0, length=2), Span("b", start=0, offset=2, length=1)]],
        [[Span("a", start=2, offset=0, length=1), Span("b", start=1, offset=2, length=1)]],
    ]
