"""benchmarks/trl_learn.py: TRL is given our task and, unless asked not to, our recipe. TRL itself is a double here."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from helpers import ROOT
from transformers import AutoModelForCausalLM

from grpo import Config

QUICK = f"--config {ROOT / 'configs/quickstart.yaml'} --micro-batch 32"


class Trainer:
    """Steps of a second each, by the script's clock, until the callback ends them."""

    made: ClassVar[list[Trainer]] = []
    clock = SimpleNamespace(now=0.0)

    def __init__(self, *, model: str, args: dict[str, Any], reward_funcs: list[Any], train_dataset: Any, **others: Any):
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.args, self.rewards, self.data, self.callbacks = args, reward_funcs, train_dataset, others["callbacks"]
        self.made.append(self)

    def train(self) -> None:
        control = SimpleNamespace(should_training_stop=False)
        for _ in range(self.args["max_steps"]):
            for callback in self.callbacks:
                callback.on_step_begin(self.args, None, control)
            self.clock.now += 1
            for callback in self.callbacks:
                callback.on_step_end(self.args, None, control)
            if control.should_training_stop:
                return


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trl_learn

    trl = ModuleType("trl")
    trl.GRPOConfig, trl.GRPOTrainer = dict, Trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.setattr(trl_learn.time, "perf_counter", lambda: 1 + Trainer.clock.now)
    Trainer.made.clear()
    yield trl_learn
    sys.modules.pop("trl_learn", None)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, words: str) -> tuple[Trainer, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["trl_learn.py", *shlex.split(f"{QUICK} {words}"), "--out", str(out)])
    script.main()
    return Trainer.made[-1], json.loads((out / "learned.json").read_text())


def test_trl_learns_our_task_by_our_recipe_until_the_time_is_over(
    script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trainer, learned = run(
        script, monkeypatch, tmp_path, "--minutes 0.05 --set rollout.group_size=4 algorithm.kl_coef=0.01"
    )
    assert (learned["steps"], learned["seconds"]) == (4, 4.0)  # the first of a second each that is past the third
    assert trainer.args["num_generations"] == 4
    assert trainer.args["per_device_train_batch_size"] * trainer.args["gradient_accumulation_steps"] == 16 * 4
    assert (trainer.args["beta"], trainer.args["learning_rate"], trainer.args["loss_type"]) == (0.01, 5e-4, "grpo")
    assert (trainer.args["max_completion_length"], trainer.args["max_steps"]) == (64, 40)
    assert [reward.__name__ for reward in trainer.rewards] == ["accuracy", "format"]
    assert trainer.args["reward_weights"] == [1.0, 0.5]
    row = trainer.data[0]
    said = [f" 1 </think> <answer> {row['answer']} </answer>", " 1 </think> <answer> none </answer>"]
    columns = {"prefill": ["<think>"] * 2, "answer": [row["answer"]] * 2, "prompts": [row["prompt"]] * 2}
    assert [grade(completions=said, **columns) for grade in trainer.rewards] == [[1.0, 0.0], [1.0, 1.0]]
    assert row["prompt"].endswith("Assistant:")
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_its_own_defaults_are_left_alone(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    trainer, learned = run(script, monkeypatch, tmp_path, "--steps 2 --defaults")
    assert learned["steps"] == 2
    assert not {"learning_rate", "beta", "num_generations", "loss_type", "reward_weights"} & trainer.args.keys()
    assert trainer.args["max_completion_length"] == 64


def test_the_recipe_of_gsm8k_is_told_in_trls_names(script):
    told = script.recipe(Config.load(ROOT / "configs/gsm8k-warm/rl.yaml"), micro_batch=32)
    assert told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] == 256
    assert (told["lr_scheduler_type"], told["warmup_steps"], told["max_grad_norm"]) == ("cosine", 5, 0.3)
    assert (told["beta"], told["scale_rewards"], told["reward_weights"]) == (0.002, "none", [1.0, 0.1, 0.0])
    assert (told["epsilon"], told["epsilon_high"], told["adam_beta2"]) == (0.2, 0.2, 0.95)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("optimizer.schedule=wsd", "optimizer.schedule is 'wsd' and algorithm.num_minibatches 1; this script knows"),
        (
            "rewards='[{function: repetition}]'",
            r"rewards has 'repetition', .* this script knows accuracy, exact_match, format",
        ),
        ("rewards='[{function: accuracy, args: {source: boxed}}]'", "args {'source': 'boxed'}"),
        ("rollout.group_size=5", "--micro-batch is 32; it must divide the 80 completions of a step"),
    ],
)
def test_what_it_does_not_know_is_refused(
    script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: str, said: str
):
    with pytest.raises(SystemExit, match=said):
        run(script, monkeypatch, tmp_path, f"--set {settings}")
