"""Rollouts that carry over: the same answers to the same questions as without, none older than allowed, exact under resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUESTIONS, launch, tiny_config
from test_engine import make_policy, native, some_prompts, tokens_of

from grpo import Config, SupervisedConfig, Trainer
from grpo.algorithm.batch import join, micro_batch, pack, split
from grpo.check.invariance import _one_plain_step
from grpo.data.order import PromptOrder
from grpo.observe.metrics import Meter, measure_carry_over
from grpo.policy.model_source import name_of
from grpo.rollout.slots import Prefix, Sequence, Slots
from grpo.run.resumable import changed_setting, completed
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import Stopped
from grpo.training.carry_over import CarryOver, from_tensors, redistribute, to_tensors
from grpo.types import Ahead, Completion, Dialogue, Draft, Group, Prompt, Sampling

CARRIES: dict[str, Any] = {
    "rollout": {"carry_over": True, "max_staleness": 2},
    "algorithm": {"importance": "truncate", "importance_high": 2.0},
    "memory": {"max_sequences": 10},
}


def sampled_in_turns(
    generator: Any, prompts: list[Prompt], sampling: Sampling, *, size: int, num_ahead: int, num_completions: int = 3
) -> list[Group]:
    """The groups of all prompts in batches of `size`, each step with the questions after it in free places."""
    order = PromptOrder(prompts, seed=0, rank=0, world_size=1, own=lambda epoch, rows: range(len(rows)))
    groups: list[Group] = []
    drafts: Any = {}
    for step in range(1, len(prompts) // size + 1):
        room = min(num_ahead, len(prompts) - step * size)
        carried = CarryOver(order, drafts, step=step, num_ahead=room, seed=lambda place: 100 + place)
        batch, ahead = carried.draw(size)
        groups += generator.sample_ahead(batch, sampling, num_completions=num_completions, seed=step, ahead=ahead)
        drafts = carried.drafts
    assert not drafts, "nothing is left behind the last question"
    return groups


def test_under_the_same_weights_every_question_has_the_answers_it_would_have_had_anyway(tmp_path: Path):
    policy = make_policy(tmp_path)
    prompts = some_prompts(9, seed=1)
    seeded = [replace(prompt, seed=100 + place) for place, prompt in enumerate(prompts)]
    for sampling in (Sampling(60), Sampling(40, stop=("1",))):
        expected = native(policy).sample(seeded, sampling, num_completions=3, seed=5)
        carried = sampled_in_turns(native(policy, max_sequences=7), prompts, sampling, size=3, num_ahead=6)
        assert [group.prompt.row for group in carried] == list(range(9))
        assert tokens_of(carried) == tokens_of(expected)
        for ours, theirs in zip(carried, expected, strict=True):
            for one, other in zip(ours.completions, theirs.completions, strict=True):
                assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        ages = [each.ages for group in carried for each in group.completions if each.ages]
        assert ages, "nothing was carried over"
        assert all(age == sorted(age, reverse=True) and 0 < max(age) <= 2 for age in ages)
        assert any(0 in age for age in ages), "no draft went on in its own step"


def test_what_nobody_waits_for_gives_up_its_pages_first(tmp_path: Path):
    from test_engine import small_cache

    policy = make_policy(tmp_path)
    prompts = some_prompts(8, longest=40)
    seeded = [replace(prompt, seed=100 + place) for place, prompt in enumerate(prompts)]
    expected = native(policy).sample(seeded, Sampling(90), num_completions=3, seed=5)
    tight = native(policy, max_sequences=12, kv_cache_gib=small_cache(policy, sequences=5, tokens=130))
    assert tokens_of(sampled_in_turns(tight, prompts, Sampling(90), size=2, num_ahead=6)) == tokens_of(expected)


def test_a_lower_limit_cuts_a_draft_and_a_higher_one_lets_it_go_on(tmp_path: Path):
    policy = make_policy(tmp_path)
    prompts = [replace(prompt, seed=7 + prompt.row) for prompt in some_prompts(4)]
    whole = native(policy).sample(prompts[1:], Sampling(24), num_completions=2, seed=1)
    ahead = Ahead(1, [[] for _ in prompts], prompts[1:])
    native(policy).sample_ahead(prompts[:1], Sampling(12), num_completions=2, seed=1, ahead=ahead)
    for limit in (6, 24):
        later = Ahead(2, ahead.left, [])
        groups = native(policy).sample_ahead(prompts[1:], Sampling(limit), num_completions=2, seed=1, ahead=later)
        assert tokens_of(groups) == [tokens[:limit] for tokens in tokens_of(whole)]


def test_questions_are_dealt_in_order_and_none_is_begun_too_early():
    prompts = some_prompts(10)
    orders = [PromptOrder(prompts, seed=3, rank=rank, world_size=2) for rank in range(2)]
    plain = PromptOrder(prompts, seed=3, rank=0, world_size=1)
    for step in range(1, 6):
        parts = [CarryOver(order, {}, step=step, num_ahead=4, seed=lambda place: place).draw(4) for order in orders]
        start = plain.position
        assert [prompt.row for pair in zip(*(part[0] for part in parts), strict=True) for prompt in pair] == [
            prompt.row for prompt in plain.draw(4)
        ]
        ahead = [prompt.seed for pair in zip(*(part[1].prompts for part in parts), strict=True) for prompt in pair]
        assert ahead == list(range(start + 4, start + 8)), "a seed is the place's, whoever samples"
        assert [order.position for order in orders] == [plain.position] * 2


def test_a_request_to_stop_leaves_the_drafts_of_the_step_before():
    order = PromptOrder(some_prompts(6), seed=3, rank=0, world_size=1)
    before = {0: [Draft([7], [-1.0], [1])], 3: [Draft([8], [-1.0], [1])]}
    carried = CarryOver(order, before, step=2, num_ahead=2, seed=lambda place: place)
    _, ahead = carried.draw(2)
    assert ahead.begun == [before[0], [], [], before[3]]
    assert set(before) == {0, 3}
    ahead.left = [[Draft()], [Draft([8, 9], [-1.0, -2.0], [1, 2])]]
    assert carried.drafts == {3: ahead.left[1]}
    assert carried.num_tokens == (2, 1)


def test_drafts_follow_their_questions_to_other_processes():
    parts = [{place: [Draft([place], [0.0], [1])] for place in range(10 + rank, 18, 2)} for rank in range(2)]
    for processes in (1, 2, 4):
        dealt = [redistribute(parts, position=10, rank=rank, num_processes=processes) for rank in range(processes)]
        assert sorted(place for part in dealt for place in part) == list(range(10, 18))
        assert all((place - 10) % processes == rank for rank, part in enumerate(dealt) for place in part)


def test_which_tokens_are_fresh_stays_with_them_in_batches_and_passes():
    def completion(*ages: int) -> Completion:
        return Completion([5] * len(ages), [-0.5] * len(ages), "", "stop", ages=[*ages] if any(ages) else None)

    prompt = Prompt(0, [1, 2], "", "", {})
    old = pack([Group(prompt, [completion(1, 0), completion(2, 2, 1)])], torch.tensor([[1.0, -1.0]]))
    new = pack([Group(prompt, [completion(0, 0), completion(0)])], torch.tensor([[1.0, -1.0]]))
    assert new.fresh is None
    both = join([old, new])
    assert both.fresh.tolist() == [False, True, False, False, False, True, True, True]
    whole = micro_batch(both, torch.ones(8))
    parts = split(whole, 4)
    assert len(parts) > 1
    assert sorted(map(len, (part.fresh for part in parts))) == sorted(len(part.targets) for part in parts)
    assert sum(int(part.fresh.sum()) for part in parts) == 4


def test_drafts_come_back_from_a_checkpoints_tensors():
    drafts = {7: [Draft([5, 6], [-0.25, -1.5], [1, 2]), Draft()], 9: [Draft(), Draft([8], [-3.0], [2])]}
    assert from_tensors(to_tensors(drafts)) == drafts
    assert from_tensors(to_tensors({})) == {}


def chunks_until_the_batch_is_whole(*, later: int, seed: int) -> int:
    """Of 16 answers that are waited for, on few pages, with so many others behind them."""
    rng = random.Random(seed)
    lengths = [min(1 + int(rng.expovariate(1 / 300)), 1024) for _ in range(16 + later)]
    every = [Sequence(i, [1] * 100, 1024, i, later=i >= 16) for i in range(len(lengths))]
    slots = Slots([Prefix(deque([each])) for each in every], num_slots=64, pages=range(1, 120), pages_each=18)
    waited, chunks = set(range(16)), 0
    while waited:
        chunks += 1
        assert chunks < 4000, "it never ends"
        while slots.read_ahead(16384):
            pass
        slots.start(4)
        slots.grow(8)
        ended = []
        for each in slots.running:
            each.tokens += [0] * min(4, lengths[each.index] - len(each.tokens))
            if len(each.tokens) == lengths[each.index]:
                ended.append(each)
        slots.finish(ended)
        waited -= {each.index for each in ended}
    return chunks


def test_what_is_waited_for_does_not_wait_for_pages_of_what_is_not():
    for seed in range(4):
        alone = chunks_until_the_batch_is_whole(later=0, seed=seed)
        assert chunks_until_the_batch_is_whole(later=48, seed=seed) < 1.15 * alone


# ---- training --------------------------------------------------------------------------------------------------------


def carrying(directory: Path, *, steps: int = 6, **sections: dict[str, Any]) -> Config:
    every = {**CARRIES, "checkpoint": {"every_steps": 2}, "run": {"steps": steps, "resume": "auto"}, **sections}
    merged = {name: {**CARRIES.get(name, {}), **values} for name, values in every.items()}
    return tiny_config(directory, **merged)


def metrics_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(timed) and k != "timestamp"} for row in rows]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("carries") / "run"
    Trainer(carrying(run, algorithm={"num_minibatches": 2})).train()
    return run


def test_a_run_trains_on_old_tokens_weighs_them_and_tells_them_apart(whole_run: Path):
    steps = [row for row in metrics_of(whole_run) if "rollout/staleness" in row]
    assert len(steps) == 6
    assert steps[0]["rollout/carried"] == 0
    assert max(row["rollout/carried"] for row in steps) > 0.2
    assert 1 <= max(row["rollout/staleness_max"] for row in steps) <= 2
    assert steps[-1]["rollout/ahead"] == 0, "nobody asks for what comes after the last step"
    assert steps[1]["rollout/ahead"] > 0
    # old tokens are far from the policy by now; the gap of those it has just drawn is rounding
    assert max(row["policy/importance_max"] for row in steps) > 1.01
    assert all(row["policy/sampling_gap"] < 1e-4 for row in steps if "policy/sampling_gap" in row)


@pytest.mark.parametrize(("method", "call", "name"), [("_optimizer_step", 5, "step-00000002-0001"), ("_sample", 4, "")])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, whole_run: Path, method: str, call: int, name: str
):
    config = carrying(tmp_path / "run", algorithm={"num_minibatches": 2})
    trainer = Trainer(config)
    own, calls = getattr(trainer, method), []

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments)

    setattr(trainer, method, stops)
    with pytest.raises(Stopped):
        trainer.train()
    assert (tmp_path / "run/checkpoints" / (name or name_of(3))).is_dir()
    trainer = Trainer(config)
    assert trainer.step.drafts, "the drafts came back"
    trainer.train()
    assert metrics_of(tmp_path / "run") == metrics_of(whole_run)
    assert (tmp_path / "run/completions.jsonl").read_text() == (whole_run / "completions.jsonl").read_text()


def test_a_roll_back_forgets_the_drafts(tmp_path: Path, whole_run: Path):
    config = carrying(tmp_path / "run", algorithm={"num_minibatches": 2})
    shutil.copytree(whole_run, tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").glob("step-0000000[56]"):
        shutil.rmtree(checkpoint)
    assert (tmp_path / "run/checkpoints" / name_of(4)).is_dir()
    trainer = Trainer(config)
    assert trainer.step.drafts
    trainer._roll_back(tmp_path / "run/checkpoints" / name_of(4))
    assert not trainer.step.drafts
    row = {"step": 5, "to": 4, "rule": "signal", "rate_factor": 0.5, "text": ""}
    (tmp_path / "run/roll_backs.jsonl").write_text(json.dumps(row) + "\n")
    trainer.close()
    assert not Trainer(config).step.drafts, "also after a kill that followed"


def test_every_place_draws_its_own_numbers_and_others_after_a_roll_back(tmp_path: Path):
    trainer = Trainer(carrying(tmp_path / "run"))
    before = [trainer._question_seed(place) for place in range(50)]
    trainer.state.step = 3
    assert [trainer._question_seed(place) for place in range(50)] == before, "whenever it is sampled"
    assert len(set(before)) == 50
    trainer.guard.roll_backs.rows.append({"to": 0, "rate_factor": 1.0})
    assert not set(before) & {trainer._question_seed(place) for place in range(50)}
    trainer.close()


def test_a_checkpoint_that_is_older_than_a_setting_has_its_default():
    config = carrying(Path("run"))
    before = config.model_dump(mode="json")
    del before["rollout"]["fused_layers"], before["tools"]
    assert changed_setting(completed(before, config), config.model_dump(mode="json"), may_change=set()) is None
    del before["rollout"]["carry_over"]
    changed = changed_setting(completed(before, config), config.model_dump(mode="json"), may_change=set())
    assert changed == "rollout.carry_over"


@pytest.mark.parametrize("kind", [Config, SupervisedConfig])
def test_so_has_one_that_is_older_than_a_setting_of_entries_of_lists(kind: type[Config | SupervisedConfig]):
    sources = [{"name": "a.jsonl", "weight": 2}, {"name": "b.jsonl", "weight": 1}]
    rewards = [{"function": "accuracy", "name": "right"}]
    given = {"model": {"name": "m"}, "data": {"name": sources}, "rewards": rewards, "run": {"dir": "run", "steps": 9}}
    config, before = kind(**given), kind(**given).model_dump(mode="json")
    for entry in before["data"]["name"]:
        del entry["where"], entry["subset"]
    del before["rewards"][0]["form"], before["data"]["pass_rate"]
    now = config.model_dump(mode="json")
    assert changed_setting(completed(before, config), now, may_change=set()) is None
    before["data"]["name"][1]["where"] = {"level": [1]}
    assert changed_setting(completed(before, config), now, may_change=set()) == "data.name"
    del before["data"]["name"][1]
    assert changed_setting(completed(before, config), now, may_change=set()) == "data.name"
    del before["rewards"]
    assert changed_setting(completed(before, config), now, may_change={"data"}) == "rewards."


def test_processes_with_unequal_shares_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"rollout.num_prompts is 4; with rollout.carry_over each of the 3 processes"):
        carrying(tmp_path).check_world_size(3)
    carrying(tmp_path).check_world_size(2)


def test_the_check_of_one_update_runs_without(tmp_path: Path):
    assert not _one_plain_step(carrying(tmp_path, rollout={"max_staleness": 3})).rollout.carry_over


def test_the_throughput_counts_what_a_step_has_drawn():
    prompt = Prompt(0, [1], "", "", {})
    groups = [
        Group(prompt, [Completion([5] * n, [-1.0] * n, "", "stop", ages=ages)])
        for n, ages in ((3, [1, 1, 0]), (2, [2, 2]))
    ]
    meter = Meter()
    measure_carry_over(meter, groups, torch.tensor([True, False]), 10, 4)
    assert meter.totals["throughput/rollout"] == 4 - 2 - 2  # what was carried counts where it was drawn, dropped or not
    assert float(meter.sums["rollout/staleness"]) == 2


def test_dynamic_sampling_takes_from_the_same_drafts(tmp_path: Path):
    config = carrying(tmp_path / "run", rollout={"max_oversampling": 3.0, "signal_from": None})
    Trainer(config).train()
    steps = [row for row in metrics_of(tmp_path / "run") if "rollout/staleness" in row]
    assert len(steps) == 6
    assert max(row["rollout/staleness_max"] for row in steps) <= 2
    assert max(row["rollout/carried"] for row in steps) > 0
    assert max(row["rollout/draws"] for row in steps) > 1


def test_two_processes_carry_over_and_resume_as_one(tmp_path: Path):
    printed = launch("worker_carry_over.py", str(tmp_path), processes=2)
    assert "as if it had not been" in printed


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"algorithm": {"importance": "none", "importance_high": None}},
            "algorithm.importance none would train on them",
        ),
        ({"rollout": {"engine": "hf"}}, "rollout.engine hf cannot go on with completions"),
        ({"rollout": {"carry_over": False, "max_staleness": 3}}, "no effect while rollout.carry_over is false"),
        (
            {"teacher": {"name": "a/b"}, "algorithm": {"kl_coef": 1.0, "kl_estimator": "k2"}},
            "divergence from the teacher",
        ),
    ],
)
def test_what_does_not_go_with_it_is_said(tmp_path: Path, sections: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        carrying(tmp_path, **sections)


def test_a_gap_is_measured_on_what_the_weights_at_hand_have_drawn():
    from grpo.algorithm.loss import grpo_loss
    from grpo.algorithm.objective import Objective
    from grpo.observe.metrics import Predicted, measure_micro_batch

    prompt = Prompt(0, [1, 2], "", "", {})
    completion = Completion([5, 6, 7], [-5.0, -1.0, -1.0], "", "stop", ages=[1, 0, 0])
    micro = micro_batch(pack([Group(prompt, [completion])], torch.ones(1, 1)), torch.ones(3))
    now = torch.tensor([-1.0, -1.0, -1.5])
    objective = Objective(importance="truncate", importance_high=2.0)
    result = grpo_loss(
        now,
        micro.advantages,
        micro.weights,
        objective,
        completion_lens=micro.completion_lens,
        sampling_logprobs=micro.sampling_logprobs,
    )
    meter = Meter()
    measure_micro_batch(
        meter, micro, objective, Predicted(now, torch.zeros(3), torch.ones(3, dtype=torch.bool)), result
    )
    assert float(meter.sums["policy/sampling_gap"] / meter.counts["policy/sampling_gap"]) == pytest.approx(0.25)
    assert float(meter.maxima["policy/sampling_gap_max"]) == pytest.approx(0.5)


# ---- tools and environments ------------------------------------------------------------------------------------------


class Twice:
    """Says the question once more, and pays for the second turn by what the first was; it remembers its steps."""

    def reset(self, question: str) -> None:
        self.question, self.said = question, [""]

    def step(self, text: str) -> tuple[str | None, float]:
        self.said.append(text)
        return (self.question if len(self.said) < 4 else None), 0.01 * len(self.said[-2])


def talking(directory: Path, *, environment: bool = False, **sections: Any) -> Trainer:
    """A run of the model of quickstart-tools that carries over."""
    from test_turns import run_with_tools

    every = {"rollout": CARRIES["rollout"], "algorithm": CARRIES["algorithm"], "memory": {"max_sequences": 16}}
    every |= {"run": {"steps": 4, "resume": "auto"}, "checkpoint": {"every_steps": 1}}
    config = run_with_tools(
        directory, **{name: every.get(name, {}) | sections.get(name, {}) for name in every | sections}
    )
    if not environment:
        return Trainer(config)
    settings = config.model_dump(mode="json", exclude_unset=True)
    settings["environment"] = {"reply_template": "\nUser: {text}\nAssistant:", "max_turns": 3}
    return Trainer(Config(**settings), rewards=[], environment=Twice)


def under_way(drafts: Any) -> list[Draft]:
    """Those that go on behind what others have answered."""
    every = [draft for own in drafts.values() for draft in own if draft.dialogue]
    return [draft for draft in every if draft.dialogue.turns and not draft.dialogue.ended]


@pytest.mark.parametrize("environment", [False, True])
def test_a_conversation_is_the_same_whether_it_is_carried_or_not(tmp_path: Path, environment: bool):
    trainer = talking(tmp_path / "run", environment=environment)
    generator, prompts = trainer.collector.generator, trainer.prompts.prompts[:9]
    seeded = [replace(prompt, seed=100 + place) for place, prompt in enumerate(prompts)]
    expected = generator.sample(seeded, Sampling(96), num_completions=3, seed=5)
    carried = sampled_in_turns(generator, prompts, Sampling(96), size=3, num_ahead=6)
    trainer.close()
    assert tokens_of(carried) == tokens_of(expected)
    for ours, theirs in zip(carried, expected, strict=True):
        for one, other in zip(ours.completions, theirs.completions, strict=True):
            assert (one.text, one.finish_reason, one.trained) == (other.text, other.finish_reason, other.trained)
            assert [turn.text for turn in one.turns or []] == [turn.text for turn in other.turns or []]
            assert replace(one.episode, seconds=0.0) == replace(other.episode, seconds=0.0) if environment else True
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    old = [each for group in carried for each in group.completions if each.ages]
    assert any(each.trained and 0 in each.ages for each in old), "none went on in its own step"
    assert all(len(each.ages) == len(each.token_ids) and max(each.ages) <= 2 for each in old)


@pytest.mark.parametrize("environment", [False, True])
def test_a_run_with_carried_conversations_goes_on_after_a_stop_as_if_there_had_been_none(
    tmp_path: Path, environment: bool
):
    whole = talking(tmp_path / "whole", environment=environment)
    whole.train()
    stopped = talking(tmp_path / "stopped", environment=environment)
    own = stopped._sample

    def sample(*arguments: Any) -> Any:
        if stopped.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments)

    stopped._sample = sample  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.train()
    resumed = talking(tmp_path / "stopped", environment=environment)
    assert resumed.state.step == 1
    carried = under_way(resumed.step.drafts)
    assert carried, "no conversation is in the middle"
    assert any(draft.dialogue.states for draft in carried) == environment
    resumed.train()
    rows = metrics_of(tmp_path / "whole")
    timed = ("tools/seconds", "tools/wait", "environment/seconds")
    assert [{k: v for k, v in row.items() if k not in timed} for row in metrics_of(tmp_path / "stopped")] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows
    ]
    steps = [row for row in rows if "rollout/staleness" in row]
    assert max(row["rollout/carried"] for row in steps) > 0.1
    assert max(row["rollout/staleness_max"] for row in steps) <= 2
    assert all(row["policy/sampling_gap_max"] < 1e-3 for row in steps), "of the tokens that the weights at hand drew"
    assert all(row["tools/calls" if not environment else "environment/turns"] > 0 for row in steps)


def test_what_was_begun_of_other_questions_or_answered_under_another_limit_is_not_gone_on_with(tmp_path: Path):
    settings = {**CARRIES, "run": {"steps": 3, "resume": "auto"}}
    trainer = Trainer(tiny_config(tmp_path / "run", **settings))
    trainer.train_step()
    place, later = trainer.state.position, trainer.state.position + 1
    turns = Dialogue((), {}, (), None)
    trainer.step.drafts = {place: [Draft([5], [-1.0], [1])], later: [Draft([5], [-1.0], [1], turns)]}
    trainer.save(wait=True)
    trainer.close()
    limit = trainer.config.rollout.max_completion_tokens
    questions = read_jsonl(QUESTIONS)
    for rows, tokens, order, kept in (
        (questions, limit, None, [place, later]),
        (questions, limit - 1, None, [place]),
        (questions[50:], limit, None, []),
        (questions, limit, lambda epoch, rows: range(len(rows)), []),
    ):
        rollout = {**CARRIES["rollout"], "max_completion_tokens": tokens}
        run = {"steps": 3, "resume": "auto", "accept_changes": True}
        config = tiny_config(tmp_path / "run", **{**settings, "rollout": rollout, "run": run})
        resumed = Trainer(config, train_dataset=rows, order=order)
        resumed.close()
        assert resumed.state.step == 1
        assert sorted(resumed.step.drafts) == kept
