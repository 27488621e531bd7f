"""Questions that are solved are asked less often: which, exactly as often as said, and the same after a resume."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUESTIONS, FixedGenerator, tiny_config
from test_carry_over import CARRIES, metrics_of

from grpo import Trainer
from grpo.config import Config
from grpo.data.order import PromptOrder
from grpo.scoring.answers import is_solved
from grpo.system.jsonl import read_jsonl
from grpo.system.stopping import Stopped
from grpo.training.carry_over import CarryOver, redistribute
from grpo.types import Draft, Prompt


def order(num: int, *, share: float, solved: set[int], rank: int = 0, world_size: int = 1) -> PromptOrder:
    prompts = [Prompt(i, [i], "", "", {}) for i in range(num)]
    dealer = PromptOrder(prompts, seed=4, rank=rank, world_size=world_size, solved_share=share)
    dealer.solved = solved
    return dealer


def rows_of(prompts: list[Prompt]) -> list[int]:
    return [prompt.row for prompt in prompts]


def in_loops(num: int, sizes: list[int], *, share: float, solved: set[int]) -> list[list[int]]:
    """The rows of each draw, turn by turn; two draws are a step."""
    plain, start, draws = order(num, share=1.0, solved=set()), 0, []
    for number, size in enumerate(sizes):
        before: list[int] = draws[-1] if number % 2 else []
        turns = [(turn, plain._at(turn).row) for turn in range(start, start + max(num, size))]
        asked = [(t, row) for t, row in turns if row not in solved or random.Random(f"4 turn {t}").random() < share]
        chosen: dict[int, int] = {}
        for these, again in ((asked, False), (turns[::-1], False), (turns[::-1], True)):
            for turn, row in these:
                is_new = row not in [*before, *chosen.values()]
                if len(chosen) < size and turn not in chosen and (is_new or again):
                    chosen[turn] = row
        start = max(chosen) + 1
        draws.append([chosen[turn] for turn in sorted(chosen)])
    return draws


def dealt_by(dealer: PromptOrder, sizes: list[int]) -> list[list[int]]:
    draws = []
    for number, size in enumerate(sizes):
        if number % 2 == 0:
            dealer.begin_step(dealer.position, ahead=dealer.ahead, solved=dealer.solved)
        draws.append(rows_of(dealer.draw(size)))
    return draws


@pytest.mark.parametrize(("num", "solved"), [(30, range(0, 30, 2)), (12, range(10)), (12, range(12)), (3, range(2))])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_draw_is_that_of_looking_at_turn_after_turn(num: int, solved: range, share: float):
    sizes = [4, 5, 1, 4, 8, 4, 4, 4]
    expected = in_loops(num, sizes, share=share, solved={*solved})
    assert dealt_by(order(num, share=share, solved={*solved}), sizes) == expected
    for first, second in zip(expected[::2], expected[1::2], strict=True):
        assert num < 30 or len({*first, *second}) == len(first + second), "a step asks no question twice"
    if len(solved) <= num - 8 and share == 0:
        assert not {row for rows in expected for row in rows} & {*solved}
    for rank in range(2):
        dealer = order(num, share=share, solved={*solved}, rank=rank, world_size=2)
        assert dealt_by(dealer, sizes) == [rows[rank::2] for rows in expected]


def test_a_solved_question_is_asked_at_its_share_of_turns_and_the_others_at_all():
    dealer = order(1000, share=0.25, solved=set(range(400)))
    rows = [row for draw in dealt_by(dealer, 90 * [30]) for row in draw]
    epochs = dealer.position / 1000
    solved = sum(row < 400 for row in rows)
    assert (len(rows) - solved) / epochs == pytest.approx(600, rel=0.02)  # turns of an epoch that is not over
    assert solved / epochs == pytest.approx(100, abs=4 * (400 * 0.25 * 0.75 / epochs) ** 0.5)
    assert len({row for row in rows if row < 400}) > 200, "not always the same ones"


def test_hopeless_questions_have_a_share_of_their_own():
    dealer = order(1000, share=1.0, solved=set(range(300)))
    dealer.hopeless, dealer.hopeless_share = set(range(600, 1000)), 0.25
    rows = []
    for _ in range(90):
        dealer.begin_step(dealer.position, ahead=dealer.ahead, solved=dealer.solved, hopeless=dealer.hopeless)
        rows += rows_of(dealer.draw(30))
    epochs, hopeless = dealer.position / 1000, sum(row >= 600 for row in rows)
    assert (len(rows) - hopeless) / epochs == pytest.approx(600, rel=0.02)
    assert hopeless / epochs == pytest.approx(100, abs=4 * (400 * 0.25 * 0.75 / epochs) ** 0.5)


def test_what_was_begun_ahead_is_asked_although_it_is_solved_by_then():
    prompts = [Prompt(i, [i], "", "", {}) for i in range(12)]
    dealers = [PromptOrder(prompts, seed=4, rank=r, world_size=2, solved_share=0.0) for r in range(2)]
    drafts: list[Any] = [{}, {}]
    begun: list[int] = []
    asked: list[int] = []
    num_settled = 0
    for step in range(1, 13):
        solved = {row for row in asked if row % 3}
        num_settled += sum(dealers[0]._at(place).row in solved for place in begun)
        places: list[int] = []
        for rank, dealer in enumerate(dealers):
            dealer.begin_step(dealer.position, ahead=dealer.ahead, solved=solved)
            carried = CarryOver(dealer, drafts[rank], step=step, num_ahead=4, seed=lambda place: place)
            mine, ahead = carried.draw(2)
            asked += rows_of(mine)
            places += [prompt.seed for prompt in mine if prompt.seed is not None]
            assert all(ahead.begun[: len(mine)]) or step == 1, "what was begun of it is there"
            ahead.left = [[Draft([7], [-1.0], [step])] for _ in ahead.prompts]
            drafts[rank] = carried.drafts
        assert step == 1 or sorted(places) == begun[:2], "what was settled on is dealt, in its order"
        begun = [*dealers[0].ahead]
        assert sorted(place for part in drafts for place in part) == begun, "and no draft is left behind"
        for number in (1, 2, 4):
            parts = [
                redistribute(drafts, position=dealers[0].position, ahead=begun, rank=rank, num_processes=number)
                for rank in range(number)
            ]
            assert [sorted(part) for part in parts] == [begun[rank::number] for rank in range(number)]
    assert num_settled > 0, "nothing was solved between being begun and being asked"
    assert dealers[0].position - 24 > 3, "some were passed over"


def test_a_question_is_solved_or_not_unless_unknown_verdicts_decide_it():
    nan = float("nan")
    verdicts = torch.tensor(
        [[1, 1, 1], [1, nan, 0], [1, nan, 1], [nan, nan, nan], [1 - 1e-12, 1, 0.9], [1, nan, nan]], dtype=torch.float64
    )
    assert is_solved(verdicts, at_least=1.0) == [True, False, None, None, False, None]
    assert is_solved(verdicts, at_least=0.6) == [True, None, True, None, True, None]


# ---- training --------------------------------------------------------------------------------------------------------


def by_row(completion: str, question: str) -> float:
    """Right in every third question, and in every third one where the answer has an even number of characters."""
    return float([True, False, len(completion) % 2 == 0][sum(map(ord, question)) % 3])


RUN: dict[str, Any] = {"steps": 8, "resume": "auto", "seed": 3}


def few_questions(directory: Path, **sections: Any) -> Config:
    merged = {
        "data": {"split": "train[:14]"},
        "rollout": {"solved_share": 0.2, "hopeless_share": 0.6, **sections.pop("rollout", {})},
        "run": RUN,
        **sections,
    }
    return tiny_config(directory, **merged)


def test_what_all_answers_had_right_is_passed_over_until_one_is_wrong(tmp_path: Path):
    algorithm = {"kl_coef": 0.0, "max_sampling_gap": 100}
    trainer = Trainer(few_questions(tmp_path / "run", algorithm=algorithm), rewards=[by_row])
    trainer.collector.generator = FixedGenerator()
    solved: set[int] = set()
    hopeless: set[int] = set()
    turn = 0
    for step in range(8):
        metrics = trainer.train_step()
        rows = read_jsonl(tmp_path / "run/completions.jsonl")[16 * step :]
        expected: list[int] = []
        before = turn
        while len(expected) < 4:
            row = trainer.prompts._at(turn).row
            share = 0.2 if row in solved else 0.6 if row in hopeless else 1.0
            asked = random.Random(f"3 turn {turn}").random() < share
            expected += [row] * (asked and row not in expected)
            turn += 1
        assert [row["row"] for row in rows[::4]] == expected
        assert metrics["group/passed_over"] == turn - before - 4
        for start in range(0, 16, 4):
            right = [row["rewards"]["by_row"] == 1 for row in rows[start : start + 4]]
            (solved.add if all(right) else solved.discard)(rows[start]["row"])
            (hopeless.discard if any(right) else hopeless.add)(rows[start]["row"])
        assert metrics["progress/solved"] == len(solved) / 14
        assert metrics["progress/hopeless"] == len(hopeless) / 14
        assert metrics["progress/epoch"] == turn / 14
    trainer.save(wait=True)
    trainer.close()
    assert turn - 8 * 4 > 3
    assert solved
    assert hopeless
    for first, *remembered in ((0, sorted(solved), sorted(hopeless)), (14, [], [])):
        questions = read_jsonl(QUESTIONS)[first : first + 14]
        given = few_questions(tmp_path / "run", algorithm=algorithm, run={"accept_changes": True, **RUN})
        resumed = Trainer(given, rewards=[by_row], train_dataset=questions)
        resumed.close()
        assert resumed.state.step == 8
        assert [resumed.state.solved, resumed.state.hopeless] == remembered, (
            "rows of other questions say nothing of these"
        )


def one_to_three(completion: str) -> float:
    return 1.0 + len(completion) % 3


def test_a_reward_that_is_no_verdict_solves_nothing_and_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = few_questions(tmp_path / "run", algorithm={"kl_coef": 0.0, "max_sampling_gap": 100})
    trainer = Trainer(config, rewards=[one_to_three])
    assert "the reward one_to_three decides which questions are solved or hopeless: 1 means right" in caplog.text
    trainer.collector.generator = FixedGenerator()
    with pytest.raises(ValueError, match=r"the reward one_to_three has given a completion [23], and 1 means right"):
        trainer.train_step()
    trainer.close()


def test_a_run_that_carries_over_and_was_stopped_deals_as_if_it_had_not_been(tmp_path: Path):
    rollout = {**CARRIES["rollout"], "max_oversampling": 2.0}
    configs = [
        few_questions(tmp_path / name, rollout=rollout, algorithm=CARRIES["algorithm"]) for name in ("whole", "stopped")
    ]
    Trainer(configs[0], rewards=[by_row]).train()
    trainer = Trainer(configs[1], rewards=[by_row])
    sample, calls = trainer._sample, []

    def stops() -> None:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        sample()

    trainer._sample = stops  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.train()
    trainer = Trainer(configs[1], rewards=[by_row])
    assert trainer.state.step == 5
    assert trainer.state.solved
    assert trainer.state.ahead
    trainer.train()
    rows = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "stopped") == rows
    assert (tmp_path / "stopped/completions.jsonl").read_text() == (tmp_path / "whole/completions.jsonl").read_text()
    assert sum(row.get("group/passed_over", 0) for row in rows) > 3
    assert max(row.get("rollout/carried", 0) for row in rows) > 0


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"solved_from": 0.9}, r"rollout.solved_from is 0.9; it has no effect while rollout.solved_share is 1"),
        ({"solved_share": 1.2}, r"rollout.solved_share is 1.2; input should be less than or equal to 1"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(tmp_path: Path, rollout: dict[str, float], said: str):
    with pytest.raises(ValueError, match=said):
        tiny_config(tmp_path, rollout=rollout)
