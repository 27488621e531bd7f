"""The shipped recipes are what was published: their numbers follow from the loaded files."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, tiny_config

from grpo import Trainer
from grpo.config import Config, RewardConfig
from grpo.data.rows import load_rows, prepare_rows
from grpo.scoring.reward import resolve_function
from grpo.types import Group

RECIPES = ROOT / "configs" / "recipes"
PAPER = ROOT / "configs" / "r1_zero_paper.yaml"


def test_the_papers_numbers_follow_from_its_configuration():
    config = Config.load(PAPER)
    algorithm, rollout = config.algorithm, config.rollout
    assert config.prompts_per_minibatch == 32  # questions per update
    assert config.prompts_per_minibatch * rollout.group_size == 512  # completions per update
    assert config.completions_per_step == 8192 == 512 * 16  # per rollout: 16 updates, each completion in one of them
    assert algorithm.num_minibatches == 16
    assert config.optimizer_steps == 10_400 == 650 * 16
    assert algorithm.reference_refresh_steps / algorithm.num_minibatches == 25  # rollouts
    assert config.optimizer_steps // algorithm.reference_refresh_steps == 26  # references
    assert config.completions_per_step * config.run.steps == 5_324_800
    assert (config.optimizer.learning_rate, algorithm.kl_coef, rollout.temperature) == (3e-6, 0.001, 1.0)


def test_the_papers_limit_of_tokens_doubles_after_8200_updates():
    config = Config.load(PAPER)
    assert config.rollout.max_completion_tokens == 65_536  # what memory is planned for
    limits = [config.at(16 * rollout).rollout.max_completion_tokens for rollout in (0, 512, 513, 649)]
    assert limits == [32_768, 32_768, 65_536, 65_536]  # rollout 512 begins with update 8,192


def sampled(trainer: Trainer) -> list[Group]:
    return trainer.collector.generator.sample(
        trainer.prompts.draw(4), trainer.config.sampling, num_completions=8, seed=0
    )


def test_a_resumed_run_may_sample_longer_completions_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = {"evaluation": {"num_questions": 0}, "checkpoint": {"every_steps": 0}}
    Trainer(tiny_config(tmp_path / "run", **common, run={"steps": 1, "resume": "auto"})).train()
    longer = tiny_config(
        tmp_path / "run", **common, rollout={"max_completion_tokens": 32}, run={"steps": 2, "resume": "auto"}
    )
    trainer = Trainer(longer)
    assert trainer.state.step == 1
    assert "rollout.max_completion_tokens is 32 from here on; it was 24 up to step-00000001" in capsys.readouterr().out
    lengths = [len(each.token_ids) for group in sampled(trainer) for each in group.completions]
    assert 24 < max(lengths) <= 32


@pytest.mark.parametrize(
    ("name", "completions", "per_update", "tokens"),
    [
        ("simplerl-zoo-0.5b", 1024 * 8, 256 * 8, 8192),
        ("simplerl-zoo-1.5b", 1024 * 8, 256 * 8, 8192),
        ("oat-zero-1.5b", 128 * 8, 128, 3000),
        ("countdown-3b", 64, 64, 1024),
        ("dapo-32b", 512 * 16, 32 * 16, 20_480),
    ],
)
def test_a_published_recipe_has_the_published_batches(name: str, completions: int, per_update: int, tokens: int):
    config = Config.load(RECIPES / f"{name}.yaml")
    assert config.completions_per_step == completions
    assert config.prompts_per_minibatch * config.rollout.group_size == per_update
    assert config.rollout.max_completion_tokens == tokens
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "# Published" in text
    assert "# What differs here\n" in text


@pytest.mark.parametrize(
    ("name", "beta2", "weight_decay"),
    [
        ("simplerl-zoo-0.5b", 0.999, 0.01),
        ("simplerl-zoo-1.5b", 0.999, 0.01),
        ("oat-zero-1.5b", 0.95, 0.0),
        ("countdown-3b", 0.999, 0.0),
        ("dapo-32b", 0.999, 0.1),
    ],
)
def test_a_published_recipe_has_the_published_optimizer(name: str, beta2: float, weight_decay: float):
    optimizer = Config.load(RECIPES / f"{name}.yaml").optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, beta2, weight_decay)


@pytest.mark.parametrize(
    "name", ["countdown-3b", "dapo-32b", "oat-zero-1.5b", "simplerl-zoo-0.5b", "simplerl-zoo-1.5b"]
)
def test_a_published_recipe_evaluates_so_that_scripts_compare_takes_it(name: str):
    assert Config.load(RECIPES / f"{name}.yaml").evaluation.num_questions > 0


def test_dapos_held_out_questions_are_read_by_their_own_columns():
    data = Config.load(RECIPES / "dapo-32b.yaml").data
    row = {"problem": "What is 1+1?", "answer": "2", "solution": "It is two."}  # as HuggingFaceH4/aime_2024 has it
    (prepared,) = prepare_rows([row], data, answer_regex=None, setting="data.eval_name", held_out=True)
    assert prepared["question"].startswith("What is 1+1?\nPlease reason")
    assert prepared["answer"] == "2"
    with pytest.raises(
        ValueError, match=r"data.eval_answer_column is 'answer'; row 0 of data.eval_name has the columns"
    ):
        prepare_rows([{"problem": "?"}], data, answer_regex=None, setting="data.eval_name", held_out=True)


def test_there_is_no_recipe_without_a_test():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(ROWS)


MATH = ({"problem": "What is 1+1?", "answer": "2"}, r"so \boxed{2}", r"so \boxed{3}")
COUNTDOWN = (
    {"nums": [65, 45, 76], "target": 34},
    "<think> try </think> <answer> 65 + 45 - 76 </answer>",
    "<think> try </think> <answer> 65 + 45 + 76 </answer>",
)
ROWS = {
    "simplerl-zoo-0.5b": (*MATH, [1.0], [0.0]),
    "simplerl-zoo-1.5b": (*MATH, [1.0], [0.0]),
    "oat-zero-1.5b": (*MATH, [1.0], [0.0]),
    "countdown-3b": (*COUNTDOWN, [1.0, 1.0], [0.0, 1.0]),
    "dapo-32b": ({"prompt": "What is 1+1?", "solution": "2"}, *MATH[1:], [1.0, 0.0], [0.0, 0.0]),
}
"""A row as the hub has it, a right and a wrong completion, and what each reward makes of them."""


@pytest.mark.parametrize("name", ROWS)
def test_a_published_recipe_reads_its_data_and_rewards_what_is_right(name: str):
    config = Config.load(RECIPES / f"{name}.yaml")
    row, right, wrong, *expected = ROWS[name]
    (prepared,) = prepare_rows([row], config.data, answer_regex=config.data.answer_regex, setting="data.name")
    assert all(
        str(value) in prepared["question"] for value in row.values() if value != row.get("answer", row.get("solution"))
    )
    known = {**prepared, "num_tokens": 50, "max_completion_tokens": config.rollout.max_completion_tokens}
    for completion, values in zip((right, wrong), expected, strict=True):
        assert [called(reward, {**known, "completion": completion}) for reward in config.rewards] == values


def called(reward: RewardConfig, known: dict[str, Any]) -> float:
    function = resolve_function(reward.function)
    wanted = inspect.signature(function).parameters.keys() - reward.args.keys()
    return function(**{name: known[name] for name in wanted if name in known}, **reward.args)


def test_a_countdown_question_is_the_one_of_tinyzero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config = Config.load(RECIPES / "countdown-3b.yaml")
    row = next(iter(load_rows(config.data, evaluation=True)))
    assert row["question"] == (
        f"Using the numbers {row['nums']}, create an equation that equals {row['target']}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return "
        "the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    )
