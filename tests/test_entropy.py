"""What keeps the entropy up: a weight of its bonus that follows a target, and tokens of high covariance that are left out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers import FixedGenerator, number_in_text, tiny_config

from grpo import Trainer
from grpo.algorithm.loss import covariances, lot_limit, lots, token_sums
from grpo.algorithm.objective import EntropyControl


def test_the_weight_rises_below_the_target_and_falls_above_it_and_is_left_out_there():
    control = EntropyControl(target=0.3, step=0.01, most=0.025)
    coef, entropy, seen = 0.0, None, []
    for drawn in (0.5, 0.2, 0.1, 0.29, 0.31, 0.4, 0.3, 0.2):
        seen.append(control.in_use(coef, entropy))
        coef, entropy = control.next(coef, drawn), drawn
    # 0.5 cannot make it negative; 0.2, 0.1 and 0.29 raise it, at last to its bound; after 0.31 and 0.4 it is left out
    assert seen == pytest.approx([0, 0, 0.01, 0.02, 0.025, 0, 0, 0])
    assert coef == pytest.approx(0.01)


def followed(directory: Path, *, steps: int) -> Trainer:
    algorithm = {
        "entropy_coef": 0.02,
        "entropy_target": 0.6,
        "entropy_step": 0.003,
        "entropy_max": 0.1,
        "max_sampling_gap": 100,
    }
    config = tiny_config(
        directory, algorithm=algorithm, run={"steps": steps, "resume": "auto"}, optimizer={"learning_rate": 3e-3}
    )
    trainer = Trainer(config, rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()
    return trainer


def test_a_run_follows_its_entropy_and_goes_on_exactly_after_a_resume(tmp_path: Path):
    whole = followed(tmp_path / "whole", steps=5)
    rows, in_use = [], []
    for _ in range(5):
        rows.append(whole.train_step())
        in_use.append(whole.learner.objective.entropy_coef)
    whole.close()
    coef, before, expected = 0.02, None, []
    for row in rows:
        expected.append(0.0 if before is not None and before > 0.6 else coef)
        coef, before = max(0.0, coef + (0.003 if row["policy/entropy"] < 0.6 else -0.003)), row["policy/entropy"]
    assert [row["policy/entropy_coef"] for row in rows] == in_use == expected
    assert 0 in expected[1:3], "a resume after two steps has to know that the entropy was above"
    assert len(set(expected)) > 2, f"the entropy was on one side: {[row['policy/entropy'] for row in rows]}"
    first = followed(tmp_path / "halves", steps=5)
    for _ in range(2):
        first.train_step()
    first.save(wait=True)
    first.close()
    second = followed(tmp_path / "halves", steps=5)
    again = [second.train_step() for _ in range(3)]
    second.close()
    for name in ("policy/entropy_coef", "policy/entropy", "optimizer/loss", "optimizer/grad_norm"):
        assert [row[name] for row in again] == [row[name] for row in rows[2:]]


def test_covariances_do_not_depend_on_how_tokens_are_shared_out():
    torch.manual_seed(0)
    advantages, logprobs = torch.randn(60), -torch.rand(60) * 5
    mean_a, mean_l = sum(advantages.tolist()) / 60, sum(logprobs.tolist()) / 60
    expected = [(p - mean_l) * (a - mean_a) for a, p in zip(advantages.tolist(), logprobs.tolist(), strict=True)]
    parts = [*zip(advantages.split([7, 30, 23]), logprobs.split([7, 30, 23]), strict=True)]
    sums = [token_sums(*part) for part in parts]
    found = torch.cat([covariances(*part, sums) for part in parts])
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_lots_are_spread_evenly_whatever_the_log_probabilities():
    rng = random.Random(0)
    for logprobs in ([-rng.random() * 1e-4 for _ in range(20_000)], [-rng.randrange(1, 9) / 8 for _ in range(20_000)]):
        targets = torch.tensor([rng.randrange(150_000) for _ in range(20_000)])
        drawn = lots(torch.tensor(logprobs), targets, torch.tensor([1] * 5000 + [60] * 250))
        assert int(drawn.min()) >= 0
        counts = torch.histc(drawn.double() / 2**32, 10, 0, 1)
        assert ((counts - 2000).abs() < 5 * (2000 * 0.9) ** 0.5).all(), counts  # five standard deviations
        assert len(drawn.unique()) > 19_000
        for number in (1, 40, 30_000):
            assert int((drawn <= lot_limit(drawn, number)).sum()) == min(number, len(drawn))
    assert lot_limit(torch.zeros(0, dtype=torch.long), 3) == lot_limit(torch.tensor([5]), 0) == -1


def test_tokens_that_are_repeated_have_lots_of_their_own_wherever_their_completion_is():
    lens = torch.tensor([40, 1, 40, 0, 7, 40])
    logprobs, targets = torch.zeros(128), torch.full((128,), 9)
    logprobs[80], targets[81 + 6] = -0.5, 3  # the end of the third and of the fifth: all begin as the first does
    drawn = lots(logprobs, targets, lens)
    assert drawn[:40].equal(drawn[88:]), "the last is the first again"
    assert len(drawn[:88].unique()) == 88
    parts = [*zip(logprobs.split(lens.tolist()), targets.split(lens.tolist()), strict=True)]
    alone = [lots(*part, lens[i : i + 1]) for i, part in enumerate(parts)]
    assert torch.cat(alone).equal(drawn)
    order = [5, 2, 0, 4, 3, 1]
    moved = lots(*(torch.cat([parts[i][k] for i in order]) for k in (0, 1)), lens[order])
    assert moved.equal(torch.cat([alone[i] for i in order]))


def test_beside_the_highest_entropies_tokens_of_high_covariance_are_chosen_of_those_that_count(tmp_path: Path):
    algorithm = {"kl_coef": 0.0, "max_sampling_gap": 100, "top_entropy": 0.3}
    selected = []
    for clip_cov in (0.0, 0.1):
        bounds = {"clip_cov_low": 0.0, "clip_cov_high": 1e9} if clip_cov else {}
        config = tiny_config(tmp_path / f"{clip_cov}", algorithm={**algorithm, "clip_cov": clip_cov, **bounds})
        trainer = Trainer(config, rewards=[number_in_text])
        trainer.collector.generator = FixedGenerator()
        selected.append(trainer.train_step()["policy/selected"])
        trainer.close()
    # a tenth of all tokens is left out of the 0.3 that counted, half of which have a positive covariance
    assert selected == pytest.approx([0.3, 0.2], abs=0.01)
