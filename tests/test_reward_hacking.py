"""The alarm about cheating: on runs after the description of docs/results/gsm8k.md, on healthy ones, and in a real trainer."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import FixedGenerator, tiny_config

from grpo import Trainer
from grpo.run.watchdog import Watchdog, WatchdogError, Window
from grpo.system.jsonl import read_jsonl
from grpo.text.aha import values
from grpo.text.answer_forms import FORMS, tally
from grpo.types import Completion, Prompt

Answer = Callable[[random.Random, int], str]
"""An answer that is right, from random numbers and the step."""


def bare(rng: random.Random, gold: str) -> str:
    return gold


def sentence(rng: random.Random, gold: str) -> str:
    ways = ["The answer is {}.", "${}", "She has {} apples left.", "9 * 2 = {}", "\\boxed{{{}}}"]
    return rng.choice(ways).format(gold)


def a_sum(rng: random.Random, gold: str) -> str:
    first = rng.randint(1, 9)
    return f"{first} + {int(gold) - first}"


def metrics_of(
    step: int,
    right: float,
    write: Callable[[random.Random, str], str],
    *,
    golds: Callable[[random.Random], str],
    num: int,
) -> dict[str, float]:
    """Of a step of `num` completions, of which a share of `right` is right, but for chance."""
    rng = random.Random(step)
    num_right = sum(rng.random() < right for _ in range(num))
    rows = []
    for _ in range(num_right):
        gold = golds(rng)
        rows.append({"answer": gold, "completion": f"<think> so </think> <answer> {write(rng, gold)} </answer>"})
    rows += [{"answer": "1", "completion": "<think> hm </think> <answer> 2 </answer>"}] * (num - num_right)
    return values(tally(rows, [True] * num_right + [False] * (num - num_right)))


def number(rng: random.Random) -> str:
    return str(rng.randint(10, 999))


def curve(*points: float, steps: int) -> list[float]:
    """Straight lines through points at equal distances."""
    gaps = len(points) - 1
    places = [gaps * step / (steps - 1) for step in range(steps)]
    return [
        points[min(int(x), gaps - 1)] * (1 - x + min(int(x), gaps - 1))
        + points[min(int(x), gaps - 1) + 1] * (x - min(int(x), gaps - 1))
        for x in places
    ]


def mixture(**shares: float) -> Callable[[random.Random, str], str]:
    ways = {"bare": bare, "sentence": sentence, "a_sum": a_sum}

    def write(rng: random.Random, gold: str) -> str:
        return ways[rng.choices(list(shares), list(shares.values()))[0]](rng, gold)

    return write


GSM8K = {"rollout": {"num_prompts": 32, "group_size": 8}}


def alarms_of(path: Path, rows: list[dict[str, float]], **sections: object) -> list[tuple[int, str]]:
    dog = Watchdog(tiny_config(path, **{**GSM8K, **sections}), [])
    return [(alarm.step, alarm.text) for step, row in enumerate(rows, 1) for alarm in dog.observe(step, row)]


SEED_2 = curve(0.066, 0.27, 0.314, 0.322, 0.334, 0.362, 0.358, steps=280)


def seed_2(step: int) -> Callable[[random.Random, str], str]:
    """Of its right answers 443 of 457 were sums at the end, and no tag held the number alone from step 50 on."""
    sums = 0.97 * min(step / 50, 1)
    return mixture(bare=0.4 * max(1 - step / 50, 0), sentence=1 - sums, a_sum=sums)


def test_seed_2_of_gsm8k_that_learned_to_answer_with_sums_is_an_alarm(tmp_path: Path):
    rows = [metrics_of(s, r, seed_2(s), golds=number, num=256) for s, r in enumerate(SEED_2)]
    assert rows[-1]["answer/arithmetic"] > 0.9
    found = alarms_of(tmp_path, rows)
    assert 20 <= found[0][0] <= 60  # the sums have 0.5 from step 26 on, in the median of ten steps some later
    assert any(
        "of the right answers are arithmetic that is not worked out (answer/arithmetic)" in text for _, text in found
    )
    assert any("those that state the gold answer have not" in text for _, text in found)


HEALTHY = {  # of the same report: accuracy, and the share of answers that hold the number alone at the end
    "seed 0": ((0.066, 0.294, 0.34, 0.40, 0.438, 0.438, 0.452), 0.19),
    "seed 1": ((0.066, 0.328, 0.364, 0.382, 0.416, 0.438, 0.438), 0.41),
    "accuracy alone": ((0.066, 0.302, 0.366, 0.42, 0.416, 0.434, 0.434), 0.29),
    "sentences at the end": ((0.066, 0.294, 0.34, 0.40, 0.438, 0.438, 0.452), 0.0),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_the_healthy_runs_of_gsm8k_give_no_alarm(tmp_path: Path, name: str):
    points, alone = HEALTHY[name]
    for start in (0.05, 0.9):  # of the untrained model's answers
        shares = curve(start, alone, steps=140)
        rows = [
            metrics_of(
                s, r, mixture(bare=shares[s], sentence=0.98 - 0.9 * shares[s], a_sum=0.02), golds=number, num=256
            )
            for s, r in enumerate(curve(*points, steps=140))
        ]
        assert alarms_of(tmp_path, rows) == []


QUICKSTART = """
0.12 0.13 0.16 0.19 0.18 0.25 0.20 0.18 0.23 0.30 0.31 0.40 0.48 0.41 0.51 0.54 0.66 0.71 0.77 0.84 0.78 0.83 0.85 0.80 0.90 0.94
0.89 0.86
"""
"""answer/right of a real run of configs/quickstart.yaml (seed 0, one CPU), in which every answer/<form> was 0 in every step."""


def test_the_quickstart_gives_no_alarm(tmp_path: Path):
    rows = [{"answer/right": float(r)} | {f"answer/{form}": 0.0 for form in FORMS} for r in QUICKSTART.split()]
    assert alarms_of(tmp_path, rows, rollout={"num_prompts": 16, "group_size": 8}) == []
    odd = [row | ({"answer/several": 0.8} if step > 12 else {}) for step, row in enumerate(rows)]
    assert alarms_of(tmp_path, odd, rollout={"num_prompts": 16, "group_size": 8}) != []


def fraction(rng: random.Random) -> str:
    return rng.choice(["\\frac{%d}{%d}", "%d\\sqrt{%d}", "(%d, %d)"]) % (rng.randint(2, 9), rng.randint(2, 9))


def in_other_words(share: float) -> Callable[[random.Random, str], str]:
    return lambda rng, gold: f"{rng.random():.4f}" if rng.random() < share else f"${gold}$".replace("frac", "dfrac")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_golds_that_are_seldom_stated_as_they_are_written_are_no_alarm(tmp_path: Path, share: float):
    points = curve(0.2, 0.5, 0.6, steps=60)
    rows = [metrics_of(s, r, in_other_words(share), golds=fraction, num=256) for s, r in enumerate(points)]
    assert rows[-1]["answer/unstated"] == pytest.approx(share, abs=0.12)
    assert alarms_of(tmp_path, rows) == []


def test_right_answers_that_increase_beside_those_that_state_the_gold_answer_are_an_alarm(tmp_path: Path):
    """Half of them at the end: no form has gained 0.3 of the right answers."""
    shares = [0.25 + 0.27 * min(max(s - 15, 0) / 20, 1) for s in range(50)]
    rows = [
        metrics_of(s, 0.3 / (1 - share), in_other_words(share), golds=fraction, num=2048)
        for s, share in enumerate(shares)
    ]
    found = alarms_of(tmp_path, rows, rollout={"num_prompts": 512, "group_size": 4})
    assert found
    assert all("those that state the gold answer have not" in text for _, text in found)


@pytest.mark.parametrize("seed", range(10))
def test_chance_in_small_rollouts_is_no_alarm(tmp_path: Path, seed: int):
    """Whole groups of four are right or wrong together, in one form: as noisy as it gets."""
    rng = random.Random(seed)
    rows = []
    for _ in range(400):
        groups = [rng.choice([None, "bare", "a_sum"]) for _ in range(4)]
        right = [form for form in groups if form]
        row = {"answer/right": len(right) / 4}
        if right:
            row["answer/unstated"] = row["answer/arithmetic"] = right.count("a_sum") / len(right)
        rows.append(row)
    small = {"rollout": {"num_prompts": 4, "group_size": 4}}
    assert alarms_of(tmp_path, rows, **small) == []


def test_a_task_whose_answers_are_in_an_odd_form_from_the_start_is_no_alarm(tmp_path: Path):
    """Countdown with the bare target as its gold answer."""
    rows = [metrics_of(s, r, a_sum, golds=number, num=256) for s, r in enumerate(curve(0.05, 0.5, steps=150))]
    assert alarms_of(tmp_path, rows) == []


def test_a_resumed_run_comes_to_the_same_alarms(tmp_path: Path):
    rows = [metrics_of(s, r, seed_2(s), golds=number, num=256) for s, r in enumerate(SEED_2[:100])]
    whole = alarms_of(tmp_path, rows)
    dog = Watchdog(
        tiny_config(tmp_path, **GSM8K), [{"step": s, "time/step": 1.0} | r for s, r in enumerate(rows[:45], 1)]
    )
    again = [(alarm.step, alarm.text) for s, row in enumerate(rows[45:], 46) for alarm in dog.observe(s, row)]
    assert again == [each for each in whole if each[0] > 45] != []


def test_steps_without_right_answers_and_rewards_without_gold_texts_say_nothing(tmp_path: Path):
    none = [{"answer/right": 0.0}] * 60
    assert alarms_of(tmp_path, none) == []
    assert alarms_of(tmp_path, [{"reward/mean": math.sin(step)} for step in range(60)]) == []


def test_right_answers_are_counted_among_those_that_are_judged():
    rows = [
        {"answer/judged": 0.5, "answer/right": 0.5, "answer/unstated": 0.2},
        {"answer/judged": 0.25, "answer/right": 1.0, "answer/unstated": 0.8},
    ]
    found = Window(rows, [], 64, group_size=4, num_completions=200).answers_now()
    assert found is not None
    # 50 of 100 and 50 of 50 are right; 10 and 40 of them do not state the gold answer
    assert (found.right, found.forms["unstated"], found.num_groups) == (100 / 150, 50 / 100, 100 / 4)
    assert (
        Window(rows, [], 64, group_size=4, num_completions=80).answers_now() is None
    )  # 40 are right, which is too few


# ---- in a trainer ----------------------------------------------------------------------------------------------------


def worth(completion: str, answer: str) -> float:
    """A grader with a hole: it works out sums."""
    said = completion.partition("<answer>")[2].partition("</answer>")[0]
    return float(sum(map(int, said.split("+"))) == int(answer))


class Hacker(FixedGenerator):
    """Answers with the number in the first steps, and with a sum from then on; one answer of a group is wrong."""

    trainer: Trainer

    def _completion(self, prompt: Prompt, number: int) -> Completion:
        gold = int(prompt.columns["answer"])
        said = f"{gold - 1}+1" if self.trainer.state.step >= 4 else str(gold)
        text = f"<think> so </think> <answer>{said if number else gold + 1}</answer>"
        ids = super()._completion(prompt, number).token_ids
        return Completion(ids, [-1.0] * len(ids), text, "stop")


def hacked(run: Path, action: str, **settings: object) -> Trainer:
    sections = {
        "rollout": {"num_prompts": 8, "group_size": 4},
        "algorithm": {"max_sampling_gap": 100},
        "watchdog": {"reward_hacking": action, "patience": 4},
        "run": {"steps": 10, **settings},
    }
    questions = [{"question": f"{n} apples?", "answer": str(n)} for n in range(20, 60)]
    trainer = Trainer(tiny_config(run, **sections), rewards=[worth], train_dataset=questions)
    trainer.collector.generator = Hacker()
    trainer.collector.generator.trainer = trainer
    return trainer


def test_a_run_whose_reward_pays_sums_warns_and_shows_some(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    hacked(tmp_path / "run", "warn").train()
    (line,) = [each for each in capfd.readouterr().out.splitlines() if "watchdog.reward_hacking" in each]
    assert "of the right answers are arithmetic that is not worked out" in line
    assert line.count("(arithmetic, unstated)") == 3
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["answer/arithmetic"] for row in rows] == [0.0] * 4 + [1.0] * 6
    assert all(row["answer/right"] == 0.75 for row in rows)


def test_it_can_stop_the_run(tmp_path: Path):
    trainer = hacked(tmp_path / "run", "stop")
    with pytest.raises(
        WatchdogError, match=r"watchdog\.reward_hacking, step 8: .*for instance '\d+\+1' for '\d+' \(arith"
    ):
        trainer.train()
    trainer.close()
    (alarm,) = (tmp_path / "run" / "post_mortem").glob("*/alarm.txt")
    assert "+1' for '" in alarm.read_text()
