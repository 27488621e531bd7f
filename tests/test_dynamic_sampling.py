"""Groups without signal are replaced, exactly, and those that stay cost no pass where they make no gradient."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import FixedGenerator, launch, number_in_text, number_or_nothing, tiny_config
from test_trainer import short_above, steps_of

from grpo import Trainer
from grpo.algorithm.advantage import group_advantages
from grpo.algorithm.batch import pack
from grpo.algorithm.dynamic_sampling import DynamicSampler
from grpo.scoring.reward import Reward
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import Stopped


def draws(
    num_prompts: int = 4, limit: int = 12, world_size: int = 1, seen: float = 0, found: float = 0
) -> DynamicSampler:
    return DynamicSampler(num_prompts=num_prompts, limit=limit, world_size=world_size, seen=seen, with_signal=found)


def test_further_questions_are_drawn_by_the_rate_of_signal_until_the_batch_is_full():
    step = draws()
    assert step.next_size() == 4  # nothing is known: a rate of 1
    step.add([[True, False, False, True]])
    assert step.signal_rate == pytest.approx(3 / 5)
    assert step.next_size() == 5  # (2 + sqrt(2 * 0.4)) / 0.6 = 4.82
    step.add([[False, True, True, True, False]])
    assert step.next_size() == 0
    assert step.batch() == [0, 3, 5, 6]  # 7 has signal too, but there are four before it
    assert step.minibatch_of(rank=0, num_minibatches=2).tolist() == [0, -1, -1, 0, -1, 1, 1, -1, -1]
    seen, found = step.remembered()
    assert (seen, found) == (0.75 * 9, 0.75 * 5)
    following = draws(seen=seen, found=found)
    # a rate of (3.75 + 1) / (6.75 + 1) = 0.613, so (4 + sqrt(4 * 0.387)) / 0.613 = 8.56
    assert following.next_size() == 9


def test_at_the_limit_groups_without_signal_fill_the_batch_up():
    step = draws(limit=6)
    step.add([[False, True, False, False]])
    assert step.next_size() == 2  # more would be needed, and no more are allowed
    step.add([[False, True]])
    assert step.next_size() == 0
    assert step.batch() == [0, 1, 2, 5]


def test_without_oversampling_the_batch_is_what_was_drawn():
    step = draws(limit=4, seen=100)
    assert step.next_size() == 4
    step.add([[False, True, False, False]])
    assert step.next_size() == 0
    assert step.minibatch_of(rank=0, num_minibatches=4).tolist() == [0, 1, 2, 3]


def test_no_process_is_idle_in_a_draw():
    step = draws(num_prompts=5, limit=14, world_size=4)
    assert step.next_size() == 8
    step.add([[True, False], [True, False], [True, False], [True, False]])
    assert step.next_size() == 4  # (1 + sqrt(4 / 9)) / (5 / 9) = 3
    step.add([[False], [False], [False], [False]])
    assert step.next_size() == 0  # two more are allowed, for four processes


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_minibatch_holds_the_same_questions_however_many_processes_there_are(world_size: int):
    has_signal = [place % 3 != 1 for place in range(20)]
    step = draws(num_prompts=12, limit=20, world_size=world_size)
    places: list[list[int]] = [[] for _ in range(world_size)]
    for start, end in ((0, 12), (12, 20)):
        mine = [list(range(start + rank, end, world_size)) for rank in range(world_size)]
        step.add([[has_signal[place] for place in each] for each in mine])
        for rank, each in enumerate(mine):
            places[rank] += each
    held: list[list[int]] = [[], [], []]
    for rank in range(world_size):
        numbers = step.minibatch_of(rank=rank, num_minibatches=3).tolist()
        for place, number in zip(places[rank], numbers, strict=True):
            if number >= 0:
                held[number].append(place)
    assert [sorted(each) for each in held] == [[0, 2, 3, 5], [6, 8, 9, 11], [12, 14, 15, 17]]


def test_a_limit_that_allows_nothing_more_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"rollout.max_oversampling is 1.1; .* not one question more than the 4"):
        tiny_config(tmp_path, rollout={"num_prompts": 4, "max_oversampling": 1.1})


FIXED = {"algorithm": {"kl_coef": 0.0, "max_sampling_gap": 100}}
DYNAMIC = {"num_prompts": 4, "group_size": 4, "max_completion_tokens": 24, "max_oversampling": 5}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trainer.policy.lm.named_parameters()}


def test_the_update_is_that_of_the_questions_with_signal_and_the_metrics_say_what_became_of_the_others(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", **FIXED, rollout=DYNAMIC), rewards=[number_or_nothing])
    trainer.collector.generator = FixedGenerator()
    metrics = trainer.train_step()
    trainer.close()
    rows = read_jsonl(tmp_path / "run/completions.jsonl")
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert trainer.state.position == len(groups) == metrics["group/sampled"] > 4
    differ = [len({row["reward"] for row in group}) > 1 for group in groups]
    wanted = [place for place, each in enumerate(differ) if each][:4]
    used = [group for group in groups if group[0]["in_batch"]]
    assert used == [groups[place] for place in wanted]
    assert len(used) == 4

    def mean(groups: list[list[dict]]) -> float:
        values = [row["reward"] for group in groups for row in group]
        return sum(values) / len(values)

    dropped = [group for group in groups if group not in used]
    assert metrics["reward/mean"] == pytest.approx(mean(groups))
    assert metrics["batch/reward_mean"] == pytest.approx(mean(used))
    assert metrics["group/with_signal"] == pytest.approx(sum(differ) / len(differ))
    assert metrics["batch/with_signal"] == 1
    assert metrics["group/replaced"] == len(differ) - sum(differ)
    assert metrics["group/surplus"] == sum(differ) - 4
    assert metrics["completion/dropped_tokens"] == sum(row["num_tokens"] for group in dropped for row in group)
    assert metrics["rollout/draws"] >= 2
    assert (trainer.state.groups_seen, trainer.state.groups_with_signal) == (0.75 * len(differ), 0.75 * sum(differ))

    plain = Trainer(tiny_config(tmp_path / "plain", **FIXED), rewards=[number_or_nothing])
    plain.collector.generator = FixedGenerator()
    chosen = {group[0]["row"] for group in used}
    plain.prompts.prompts = [prompt for prompt in plain.prompts.prompts if prompt.row in chosen]
    expected = plain.train_step()
    plain.close()
    assert "batch/with_signal" not in expected
    assert metrics["optimizer/grad_norm"] == pytest.approx(expected["optimizer/grad_norm"], rel=1e-5)
    assert metrics["optimizer/loss"] == pytest.approx(expected["optimizer/loss"], abs=1e-6)
    assert expected["reward/mean"] == pytest.approx(metrics["batch/reward_mean"])


def test_a_group_is_taken_for_the_reward_that_is_asked_for_not_for_the_sum(tmp_path: Path):
    """Numbers differ in every group; with the sum as judge nothing would be replaced."""
    rewards = [Reward(number_in_text, weight=0.1, name="number"), Reward(number_or_nothing, name="half")]
    for wanted, replaced in (("half", True), ("number", False)):
        rollout = {**DYNAMIC, "signal_from": wanted}
        trainer = Trainer(tiny_config(tmp_path / wanted, **FIXED, rollout=rollout), rewards=rewards)
        trainer.collector.generator = FixedGenerator()
        metrics = trainer.train_step()
        trainer.close()
        assert (metrics["group/replaced"] > 0) == replaced
        assert metrics["batch/with_signal"] == metrics["group/with_signal"] == 1
        rows = [row for row in read_jsonl(tmp_path / wanted / "completions.jsonl") if row["in_batch"]]
        groups = [{row["rewards"][wanted] for row in rows[i : i + 4]} for i in range(0, len(rows), 4)]
        assert min(map(len, groups)) > 1


def seldom_wrong(completion: str) -> float:
    return float(int(completion[-1]) > 2)


def test_of_the_best_of_k_a_group_with_too_few_wrong_answers_takes_no_place_in_the_batch(tmp_path: Path):
    config = tiny_config(
        tmp_path / "run",
        algorithm={"pass_at": 3, "kl_coef": 0.0, "max_sampling_gap": 100},
        rollout={"group_size": 8, "max_oversampling": 4.0},
    )
    trainer = Trainer(config, rewards=[seldom_wrong])
    trainer.collector.generator = FixedGenerator()
    assert trainer.train_step()["batch/with_signal"] == 1
    trainer.close()
    rows = read_jsonl(tmp_path / "run/completions.jsonl")
    groups = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    wrong = [(group[0]["in_batch"], sum(1 - row["reward"] for row in group)) for group in groups]
    assert all(number >= 3 for in_batch, number in wrong if in_batch)
    assert any(0 < number < 3 for in_batch, number in wrong if not in_batch), "all that differed were taken"
    assert all(any(row["advantage"] for row in group) for group in groups if group[0]["in_batch"])


def test_a_weight_below_zero_is_refused_where_rewards_are_divided_by_their_mean(tmp_path: Path):
    by_mean = {"algorithm": {"normalize_by_std": False, "normalize_by_mean": True}}
    falls = {"rewards.0.weight": {"points": {0: 1, 5: -0.5}}}
    for config, rewards in (
        (tiny_config(tmp_path / "run", **by_mean), [seldom_wrong, Reward(number_or_nothing, weight=-0.5)]),
        (tiny_config(tmp_path / "run", **by_mean, rewards=[{"function": "accuracy"}], schedules=falls), None),
    ):
        with pytest.raises(
            ValueError, match=r"the reward (number_or_nothing|accuracy) has the weight -0.5, and a mean below"
        ):
            Trainer(config, rewards=rewards)


def test_a_reward_to_choose_groups_by_must_be_one_of_the_run(tmp_path: Path):
    config = tiny_config(tmp_path / "run", rollout={**DYNAMIC, "signal_from": "acuracy"})
    with pytest.raises(
        ValueError, match=r"signal_from is 'acuracy'; the rewards of this run are number_or_nothing\. Name"
    ):
        Trainer(config, rewards=[number_or_nothing])
    with pytest.raises(
        ValueError, match=r"signal_from is 'accuracy'; it has no effect while rollout.max_oversampling, .* are 1"
    ):
        tiny_config(tmp_path / "run", rollout={"signal_from": "accuracy"})


def sampled_run(run: Path) -> Trainer:
    """With one reward, some of the groups have signal and some have not."""
    return Trainer(
        tiny_config(
            run,
            rollout={**DYNAMIC, "group_size": 2, "engine": "native"},
            rewards=[{"function": "format"}],
            checkpoint={"every_steps": 0},
            run={"steps": 3, "seed": 1, "resume": "auto"},
        )
    )


def test_a_run_stopped_in_the_middle_of_a_draw_goes_on_as_if_it_had_not_been(tmp_path: Path):
    sampled_run(tmp_path / "whole").train()
    trainer = sampled_run(tmp_path / "stopped")
    own = trainer.collector.sample

    def sample(prompts, *arguments, **options):
        if trainer.state.step and trainer.prompts.position > trainer.state.position + len(prompts):
            os.kill(os.getpid(), signal.SIGTERM)  # a second draw
        return own(prompts, *arguments, **options)

    trainer.collector.sample = sample
    with pytest.raises(Stopped):
        trainer.train()
    resumed = sampled_run(tmp_path / "stopped")
    assert resumed.state.step > 0
    assert resumed.state.groups_seen > 0
    short_above(resumed, 4)  # and what it draws, it draws once, however often sampling is tried
    resumed.train()
    rows, others = steps_of(tmp_path / "whole"), steps_of(tmp_path / "stopped")
    assert max(row["rollout/draws"] for row in rows[1:]) > 1
    for row in (*rows, *others):
        for name in [name for name in row if name.startswith(("rollout/", "policy/sampling_gap"))]:
            del row[name]  # fewer ran at once, so the recorded log-probabilities are rounded otherwise
    assert others == rows
    assert read_jsonl(tmp_path / "stopped/completions.jsonl") == read_jsonl(tmp_path / "whole/completions.jsonl")


def alternating(run: Path) -> Trainer:
    """Every second question has signal, so of two processes one has no group in the batch; and there is a KL in the reward."""
    kl = {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1", "normalize_by_std": False, "max_sampling_gap": 100}
    config = tiny_config(run, algorithm=kl, rollout=DYNAMIC, optimizer={"learning_rate": 1e-30})
    trainer = Trainer(config, rewards=[number_or_nothing])
    trainer.collector.generator = FixedGenerator()
    for weight in trainer.policy.reference.parameters():
        weight.data.mul_(1.1)
    silent, heard = (
        [
            prompt
            for prompt in trainer.prompts.prompts
            if bool(number_or_nothing("1", prompt.columns["question"])) == each
        ]
        for each in (False, True)
    )
    dealt = [prompt for pair in zip(heard, silent, strict=False) for prompt in pair]
    trainer.prompts._at = lambda place: dealt[place]
    return trainer


def test_two_processes_fill_the_same_batch_as_one_also_if_it_is_all_with_one_of_them(tmp_path: Path):
    launch("worker_dynamic.py", str(tmp_path / "two"), processes=2)
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    trainer = alternating(tmp_path / "one")
    one = trainer.train_step()
    trainer.close()

    def batch(run: Path) -> set[tuple[int, str]]:
        return {(row["row"], row["completion"]) for row in read_jsonl(run / "completions.jsonl") if row["in_batch"]}

    assert len(batch(tmp_path / "one")) == 16
    assert batch(tmp_path / "two/run") == batch(tmp_path / "one")
    assert two["optimizer/grad_norm"] == pytest.approx(one["optimizer/grad_norm"], rel=1e-5)
    assert two["batch/reward_mean"] == pytest.approx(one["batch/reward_mean"])
    assert two["policy/kl_penalty"] == pytest.approx(one["policy/kl_penalty"], rel=1e-5)
    assert abs(one["policy/kl_penalty"]) > 0.01
    assert two["group/sampled"] % 2 == 0
    assert two["group/sampled"] - two["group/replaced"] - two["group/surplus"] == 4


def test_a_kl_in_the_reward_is_that_of_the_completions_own_group(tmp_path: Path):
    trainer = alternating(tmp_path / "run")
    trainer.train_step()
    rows = read_jsonl(tmp_path / "run/completions.jsonl")
    prompts = [trainer.prompts._at(place) for place in range(len(rows) // 4)]
    groups = trainer.collector.generator.sample(prompts, trainer.config.sampling, num_completions=4, seed=0)
    rewards = torch.tensor([row["reward"] for row in rows]).view(-1, 4)
    used = torch.tensor([row["in_batch"] for row in rows[::4]])
    assert used.tolist()[:7] == [True, False, True, False, True, False, True]
    plain = group_advantages(rewards, normalize_by_std=False)[used]
    divergences = trainer.learner.divergences(pack(groups, torch.zeros_like(rewards)), trainer.step.meter)
    penalized = group_advantages(rewards - 0.1 * divergences.view_as(rewards), normalize_by_std=False)[used]
    trainer.close()
    found = [row["advantage"] for row in rows if row["in_batch"]]
    torch.testing.assert_close(torch.tensor(found), penalized.flatten(), rtol=0, atol=1e-5)
    assert (penalized - plain).abs().max() > 0.01
    assert all(row["advantage"] is None for row in rows if not row["in_batch"])


@pytest.mark.parametrize("setting", [{"entropy_coef": 0.1}, {"top_entropy": 0.2}])
def test_completions_without_an_advantage_are_read_where_their_entropy_counts(
    tmp_path: Path, setting: dict[str, float]
):
    metrics = []
    for name, kl_coef in (("without", 0.0), ("with", 1e-30)):
        algorithm = {"kl_coef": kl_coef, "max_sampling_gap": 100, **setting}
        trainer = Trainer(tiny_config(tmp_path / name, algorithm=algorithm), rewards=[number_or_nothing])
        trainer.collector.generator = FixedGenerator()
        metrics.append(trainer.train_step())
        trainer.close()
    for name in ("optimizer/grad_norm", "optimizer/loss", "policy/entropy"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)


def test_completions_without_a_gradient_count_but_cost_no_pass(tmp_path: Path):
    """Against passes over all of them, which a KL term too small to matter asks for; the second step has no signal at all."""
    trained, metrics = [], []
    for name, kl_coef in (("left-out", 0.0), ("all", 1e-30)):
        algorithm = {"kl_coef": kl_coef, "max_sampling_gap": 100}
        trainer = Trainer(tiny_config(tmp_path / name, algorithm=algorithm), rewards=[number_or_nothing])
        trainer.collector.generator = FixedGenerator()
        first = trainer.train_step()
        prompts = trainer.prompts.prompts
        silent = next(prompt for prompt in prompts if number_or_nothing("1", prompt.columns["question"]) == 0)
        trainer.prompts.prompts = [silent] * len(prompts)
        metrics.append([first, trainer.train_step()])
        trainer.close()
        trained.append(weights(trainer))
    (some, none), (every, all_flat) = metrics
    assert some["optimizer/grad_norm"] == pytest.approx(every["optimizer/grad_norm"], rel=1e-5)
    tokens = [each["throughput/update"] * each["time/update"] for each in (some, every)]
    assert 0 < tokens[0] < 0.8 * tokens[1]
    assert none["group/with_signal"] == none["optimizer/grad_norm"] == 0
    assert none["optimizer/steps"] == 2
    assert none["policy/entropy"] == pytest.approx(
        all_flat["policy/entropy"], rel=1e-4
    )  # nothing else shows a wrong template
    for name, expected in trained[1].items():  # AdamW moves them in the second step too
        torch.testing.assert_close(trained[0][name], expected, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
