"""The library as people use it: from a model's name, with settings by name, callbacks, and metrics as a table."""

import gc
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, launch, tiny_config, tiny_settings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from grpo import Callback, Config, LossInputs, SupervisedTrainer, Trainer
from grpo.algorithm.objective import Objective
from grpo.algorithm.own_loss import use_loss
from grpo.config.elsewhere import ARGUMENTS, CLASSES
from grpo.data.order import PromptOrder
from grpo.observe.console import LineSink
from grpo.observe.rundir import DirectoryLock
from grpo.observe.screen import console_sink
from grpo.policy.given_model import GivenModel
from grpo.policy.model_source import complete_checkpoints
from grpo.report.figures import plot_curves
from grpo.run import inputs
from grpo.system.jsonl import read_jsonl, read_metrics
from grpo.system.stopping import Stopped
from grpo.system.terminal import logger, say
from grpo.system.writer import Writer
from grpo.training.rollout import own_advantages
from grpo.training.state import Rollout
from grpo.types import Prompt

ROWS = [{"question": f"What is {a}+{b}?", "answer": str(a + b)} for a in range(2, 6) for b in range(2, 6)]
SMALL = {
    "data.template": "chat",
    "data.max_prompt_tokens": 96,
    "rollout.num_prompts": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 24,
    "memory.micro_batch_tokens": 256,
    "distributed.zero_stage": 0,
    "scoring.num_workers": 1,
    "preflight.num_questions": 0,
    "run.steps": 2,
}


def brevity(completion: str) -> float:
    return 1 / (1 + len(completion))


class Notes(Callback):
    """Writes down what it is called with."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, int]] = []
        self.evaluations: list[tuple[int, int]] = []
        self.saved: list[tuple[int, str]] = []
        self.ended: list[Path] = []

    def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
        self.steps.append((step, metrics["reward/mean"], len(rollout.groups)))

    def on_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        self.evaluations.append((step, len(rows)))

    def on_save(self, step: int, checkpoint: Path) -> None:
        self.saved.append((step, checkpoint.name))

    def on_end(self, checkpoint: Path) -> None:
        self.ended.append(checkpoint)


def test_a_model_rows_and_a_function_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    notes = Notes()
    held_out = {"evaluation.num_questions": 3, "evaluation.every_steps": 1, "checkpoint.every_steps": 1}
    trainer = Trainer(
        str(TINY / "model"),
        rewards=[brevity],
        train_dataset=ROWS,
        eval_dataset=ROWS[:3],
        settings=SMALL | held_out,
        callbacks=[notes],
    )
    last = trainer.train()
    assert last == Path("runs/model/checkpoints/step-00000002")
    rows = [row for row in read_metrics(Path("runs/model/metrics.jsonl")) if "reward/mean" in row]
    assert notes.steps == [(row["step"], row["reward/mean"], 4) for row in rows]
    assert notes.evaluations == [(0, 3), (1, 3), (2, 3)]
    assert dict(notes.saved) == {1: "step-00000001", 2: "step-00000002"}
    assert notes.ended == [last]
    table = trainer.metrics()
    assert table["reward/mean"].dropna().tolist() == [row["reward/mean"] for row in rows]
    assert table["step"].tolist() == [0, 1, 2]
    assert table["eval/length_mean"].notna().all(), "each step stands beside its evaluation"


@pytest.mark.parametrize("way", ["a signal", "KeyboardInterrupt"])
def test_a_callback_stops_a_run_that_can_be_resumed(tmp_path: Path, way: str):
    class Enough(Notes):
        def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
            super().on_step(step, metrics, rollout)
            if step == 1 and way == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif step == 1:
                raise KeyboardInterrupt

    settings = tiny_settings(tmp_path / "run", run={"steps": 3, "resume": "auto"})
    notes = Enough()
    with pytest.raises(Stopped):
        Trainer(Config(**settings), rewards=[brevity], callbacks=[notes]).train()
    assert [step for step, *_ in notes.steps] == [1]
    assert notes.ended == []
    again = Notes()
    Trainer(Config(**settings), rewards=[brevity], callbacks=[again]).train()
    assert [step for step, *_ in again.steps] == [2, 3]


class Failed(Exception):
    """Raised by a callback."""


class SavesAfterTheFirst(Notes):
    """And then fails."""

    trainer: Any

    def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
        super().on_step(step, metrics, rollout)
        if step == 1:
            self.saved_at = self.trainer.save(wait=True)
            raise Failed


def test_what_a_callback_saves_resumes_as_if_nothing_had_been(tmp_path: Path):
    """Between two steps, and not in the middle of one that is over."""
    once = {"run": {"steps": 3, "resume": "auto"}, "checkpoint": {"every_steps": 0}}
    whole = Notes()
    Trainer(tiny_config(tmp_path / "whole", **once), rewards=[brevity], callbacks=[whole]).train()
    first = SavesAfterTheFirst()
    first.trainer = Trainer(tiny_config(tmp_path / "run", **once), rewards=[brevity], callbacks=[first])
    with pytest.raises(Failed):
        first.trainer.train()
    assert first.saved_at.name == "step-00000001"
    first.trainer.close()
    rest = Notes()
    Trainer(tiny_config(tmp_path / "run", **once), rewards=[brevity], callbacks=[rest]).train()
    assert [*first.steps, *rest.steps] == whole.steps


def test_training_goes_on_in_the_same_trainer_after_a_callback_failed_and_is_logged(tmp_path: Path):
    once = {"run": {"steps": 3}, "checkpoint": {"every_steps": 0}}
    first = SavesAfterTheFirst()
    first.trainer = Trainer(tiny_config(tmp_path / "run", **once), rewards=[brevity], callbacks=[first])
    with pytest.raises(Failed):
        first.trainer.train()
    first.trainer.train()
    rows = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward/mean" in row]
    assert rows == [1, 2, 3]
    assert first.saved == [(1, "step-00000001"), (3, "step-00000003")], "the last one is told of once"
    for use in (first.trainer.train, first.trainer.train_step):
        with pytest.raises(RuntimeError, match=r"this trainer has ended: .* make a new one with run\.resume=auto"):
            use()


def test_a_checkpoint_that_is_made_anew_after_a_roll_back_is_told_of_again(tmp_path: Path):
    notes = Notes()
    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=[brevity], callbacks=[notes])
    trainer.train_step()
    good = trainer.save(wait=True)
    trainer.save()
    assert notes.saved == [(1, "step-00000001")]
    trainer._roll_back(good)
    trainer.save()
    assert notes.saved == [(1, "step-00000001")] * 2
    trainer.close()


def test_a_run_is_not_split_over_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(tiny_config(Path("runs/relative")), rewards=[brevity])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match=r"run\.dir is 'runs/relative'; the working directory is now .*elsewhere"):
        trainer.train()
    monkeypatch.chdir(tmp_path)
    assert trainer.train() == Path("runs/relative/checkpoints/step-00000002")


def test_the_librarys_rewards_may_be_named(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=["accuracy", brevity])
    trainer.close()
    assert [reward.name for reward in trainer.collector.scorer.rewards] == ["accuracy", "brevity"]
    for given, said in (
        ("accuracy", "it is a list of functions"),
        (brevity, "it is a list"),
        ([3], "rewards holds 3;"),
    ):
        with pytest.raises(ValueError, match=said):
            Trainer(tiny_config(tmp_path / "other"), rewards=given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean accuracy"):
        Trainer(tiny_config(tmp_path / "other"), rewards=["acuracy"])


def test_settings_by_name_go_over_a_configuration_a_file_and_a_shipped_one(tmp_path: Path):
    config = tiny_config(tmp_path)
    assert Config.of(config, {}) is config
    changed = Config.of(config, {"run.steps": 9, "rollout.stop": ["</answer>"]})
    assert (changed.run.steps, changed.rollout.stop, changed.model) == (9, ["</answer>"], config.model)
    assert config.run.steps == 2
    assert Config.of("quickstart", {"rewards.1.weight": 0.25}).rewards[1].weight == 0.25
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert Config.of(tmp_path / "c.yaml", {"run.seed": 7}).run.seed == 7
    own = Config.of("Qwen/Qwen2.5-0.5B", {"run.steps": 3})
    assert (own.model.name, own.run.dir, own.run.steps) == ("Qwen/Qwen2.5-0.5B", "runs/Qwen2.5-0.5B", 3)
    with pytest.raises(ValueError, match=r"run.step is not a setting. Did you mean run.steps"):
        Config.of("Qwen/Qwen2.5-0.5B", {"run.step": 3})
    with pytest.raises(ValueError, match=r"--config is 'missing.yaml'; there is no such file"):
        Config.of("missing.yaml", {})


def test_a_whole_section_keeps_what_is_not_named_of_it():
    for own in ({"warmup_steps": 1}, {"warmup_steps": 1, "learning_rate": 3e-4}):
        given = [
            {"optimizer": own, "optimizer.learning_rate": 3e-4},
            {"optimizer.learning_rate": 3e-4, "optimizer": own},
        ]
        for settings in given:
            optimizer = Config.of("quickstart", settings).optimizer
            assert (optimizer.learning_rate, optimizer.warmup_steps) == (3e-4, 1)
    usual, named = Config.load("quickstart"), Config.load("quickstart", ["optimizer={warmup_steps: 1}"])
    assert named.optimizer == usual.optimizer.model_copy(update={"warmup_steps": 1})
    schedules = "schedules={rollout.temperature: {points: {0: 1.2, 4: 1.0}}}"
    assert [*Config.load("quickstart", [schedules]).schedules] == ["rollout.temperature"]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Callback(), r"callbacks is <.*Callback object at .*>; it is a list of callbacks"),
        (
            [lambda *_: None],
            r"callbacks\[0\] is <function .*>, which has no on_step. Make it an object of a class that extends",
        ),
        ([Callback(), Callback], r"callbacks\[1\] is the class Callback. Hand over an object: Callback\(\)"),
        ([type("Own", (), {"on_step": print})()], r"which has no on_evaluation"),
    ],
)
def test_what_is_no_callback_is_refused_before_a_model_is_loaded(callbacks: Any, message: str):
    for trainer in (Trainer, SupervisedTrainer):
        with pytest.raises(ValueError, match=message):
            trainer("nowhere/no-model", callbacks=callbacks)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: Trainer(model="m", reward_funcs=[brevity], args=None, train_dataset=[]),  # type: ignore[call-arg]
            [
                r"^grpo\.Trainer\(\): model is an argument of TRL; here it is config, the first argument",
                r"reward_funcs is .* here it is rewards, with weights as grpo\.Reward",
                r"args is .* here it is settings, by our names",
                r"It takes config first, .* by name rewards, tools, .*, tokenizer\.$",
            ],
        ),
        (
            lambda: SupervisedTrainer("m", args=None, peft_config=1),  # type: ignore[call-arg]
            [
                r"^grpo\.SupervisedTrainer\(\): args is .* peft_config is .* lora",
                r"by name train_dataset, .*, tokenizer\.$",
            ],
        ),
        (
            lambda: Trainer("m", train_data=[], beta=0.1),  # type: ignore[call-arg]
            [
                r"train_data is no argument\. Did you mean train_dataset\?",
                r"beta is no argument\. .*`grpo settings beta`",
            ],
        ),
        (lambda: Trainer("m", brevity), [r"^grpo\.Trainer\(\): too many positional arguments\. It takes"]),  # type: ignore[misc]
        (lambda: Trainer(), [r"^grpo\.Trainer\(\): missing a required argument: 'config'\. It takes config first"]),  # type: ignore[call-arg]
    ],
)
def test_arguments_of_trl_are_told_by_their_names_here(call: Callable[[], Any], said: list[str]):
    with pytest.raises(TypeError) as told:
        call()
    for each in said:
        assert re.search(each, str(told.value)), told.value


def test_classes_of_trl_and_a_configuration_for_settings_are_told():
    for name in CLASSES:
        with pytest.raises(ImportError, match=rf"^{name} is a class of TRL; here it is .*grpo\.\w*Trainer"):
            getattr(grpo, name)
    with pytest.raises(AttributeError, match="module 'grpo' has no attribute 'Trainr'"):
        grpo.Trainr  # noqa: B018
    with pytest.raises(
        ValueError, match=r"^settings is a object; it is a dictionary of names and values\. Write settings="
    ):
        Trainer("m", settings=object())  # type: ignore[arg-type]


def test_each_argument_of_trl_is_told_by_one_that_there_is():
    """Each first word is an argument, or a setting, or the absence of one."""
    takes = {*inspect.signature(Trainer).parameters, *inspect.signature(SupervisedTrainer).parameters}
    for name, ours in ARGUMENTS.items():
        assert name not in takes
        first = re.split(r"[, :]", ours)[0]
        assert first in takes | {"args", "left"} or first.split(".")[0] in Config.model_fields, name


def test_a_level_that_was_set_before_the_library_is_imported_stays():
    code = "import logging; logging.getLogger('grpo').setLevel(40); from grpo.system.terminal import logger; print(logger.level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "40\n"


STEP = {"time/step": 0.5, "reward/mean": 0.25}


def test_the_console_is_a_handler_of_the_logger_and_can_be_silenced_and_routed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "level", logger.level)
    assert logger is logging.getLogger("grpo")
    records: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    say("12 questions")
    LineSink(num_steps=2, reward_names=[]).log(1, STEP)
    assert "12 questions\n" in (printed := capsys.readouterr().out)
    assert "1/2" in printed
    logger.addHandler(Kept())
    logger.setLevel(logging.WARNING)
    say("12 questions")
    LineSink(num_steps=2, reward_names=[]).log(1, STEP)
    say("warning: the entropy collapses")
    assert capsys.readouterr().out == "warning: the entropy collapses\n"
    assert [(each.levelname, each.getMessage()) for each in records] == [("WARNING", "warning: the entropy collapses")]
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, Kept)]
    LineSink(num_steps=2, reward_names=[]).log(2, STEP)
    assert capsys.readouterr().out == ""
    assert "2/2" in records[-1].getMessage()
    monkeypatch.setattr("grpo.observe.screen.can_repaint", lambda *_: True)
    sink = console_sink(title="", num_steps=1, first_step=0, reward_names=[], rows=[])
    assert isinstance(sink, LineSink)  # a display would paint on the terminal all the same


def test_drawing_curves_leaves_the_backend_of_the_plots_alone(tmp_path: Path):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    plt.switch_backend("svg")
    (tmp_path / "config.yaml").write_text("model: {name: m}\nrun: {dir: x, steps: 1}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "time/step": 1.0}\n')
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert mpl.get_backend() == "svg"
    assert plt.get_fignums() == []


def own(tmp_path: Path, *, settings: dict[str, Any] | None = None, **arguments: Any) -> Trainer:
    few = {**SMALL, "run.dir": str(tmp_path / "run"), "run.steps": 1, "optimizer.learning_rate": 0.5}
    settings = few | (settings or {})
    return Trainer(str(TINY / "model"), rewards=[brevity], train_dataset=ROWS, settings=settings, **arguments)


def weights_of(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.lm.parameters()]).clone()


def test_an_optimizer_and_an_advantage_by_function_are_those_that_train(tmp_path: Path):
    """With plain gradient descent the step is the learning rate times the gradient, whose norm is the metric."""
    seen: list[torch.Tensor] = []

    def ranks(rewards: torch.Tensor) -> torch.Tensor:
        seen.append(rewards)
        return rewards.argsort(1).argsort(1) - (rewards.shape[1] - 1) / 2

    trainer = own(tmp_path, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=9.0), advantage=ranks)
    before = weights_of(trainer)
    metrics = trainer.train_step()
    step = float((weights_of(trainer) - before).norm())
    clipped = min(metrics["optimizer/grad_norm"], trainer.config.optimizer.max_grad_norm)
    assert step == pytest.approx(metrics["optimizer/learning_rate"] * clipped, rel=1e-3)
    assert step > 0
    assert seen[0].shape == (4, 4)
    trainer.save(wait=True)
    trainer.close()
    advantages = {row["advantage"] for row in read_jsonl(trainer.directory / "completions.jsonl")}
    assert advantages == {-1.5, -0.5, 0.5, 1.5}
    again = Trainer(
        Config.of(trainer.config, {"run.resume": "auto", "run.steps": 2, "run.dir": str(trainer.directory)}),
        rewards=[brevity],
        train_dataset=ROWS,
        advantage=ranks,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=9.0),
    )
    assert torch.equal(weights_of(again), weights_of(trainer))
    again.close()


def plain(rewards: torch.Tensor) -> torch.Tensor:
    return rewards - rewards.nanmean(1, keepdim=True)


def doubled(rewards: torch.Tensor) -> torch.Tensor:
    return 2 * plain(rewards)


def backwards(epoch: int, rows: list[dict[str, Any]]) -> list[int]:
    return [*range(len(rows))][::-1]


def negative(tokens: LossInputs) -> torch.Tensor:
    return -tokens.logprobs * tokens.advantages


def gentle(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99))


def gentler(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.999))


def descent(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.5)


@pytest.mark.parametrize(
    ("argument", "given", "then", "said"),
    [
        ("advantage", plain, None, "the advantage (was plain, is the library's)"),
        ("advantage", plain, doubled, "the advantage (was plain, is doubled)"),
        ("loss", negative, None, "the loss (was negative, is the library's)"),
        ("loss", None, negative, "the loss (was the library's, is negative)"),
        ("order", backwards, None, "the order (was backwards, is the library's)"),
        ("optimizer", None, gentle, "the optimizer (was the library's, is gentle)"),
        ("optimizer", gentle, gentler, "the optimizer (was gentle, is gentler)"),
    ],
)
def test_a_resume_with_another_function_than_the_run_began_with_is_refused_unless_it_is_accepted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, given: Any, then: Any, said: str
):
    auto = {"run.resume": "auto", "rollout.max_completion_tokens": 4}
    own(tmp_path, settings=auto, **{argument: given}).train()
    own(tmp_path, settings=auto, **{argument: given}).close()
    with pytest.raises(ValueError, match=rf"{re.escape(said)} changed since .* run.accept_changes=true to go on"):
        own(tmp_path, settings=auto, **{argument: then})
    accepted = auto | {"run.accept_changes": True, "run.steps": 2}
    own(tmp_path, settings=accepted, **{argument: then}).train()
    assert f"warning: from here on {said} are others than up to step-00000001" in capsys.readouterr().out
    own(tmp_path, settings=auto | {"run.steps": 2}, **{argument: then}).close()


@pytest.mark.parametrize(
    ("given", "then", "names"), [(descent, None, ("SGD", "AdamW")), (None, descent, ("AdamW", "SGD"))]
)
def test_an_optimizer_that_cannot_take_up_the_state_of_another_is_refused_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, then: Any, names: tuple[str, str]
):
    auto = {"run.resume": "auto", "rollout.max_completion_tokens": 4}
    saved = own(tmp_path, settings=auto, optimizer=given).train()
    was, now = names
    with pytest.raises(
        ValueError, match=rf"^optimizer is {now}; .*/step-00000001 holds the state of {was}, which {now} ca"
    ):
        own(tmp_path, settings=auto | {"run.accept_changes": True}, optimizer=then)
    monkeypatch.setattr(Trainer, "_policy_class", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"; the optimizer \(was .*\) changed since .* was written"):
        own(tmp_path, settings=auto, optimizer=then)
    assert complete_checkpoints(saved.parent)[-1] == saved


HERE = "another trainer of this process is at work there, and two would overwrite each other's files. Close it"


def test_two_trainers_of_one_process_do_not_share_a_directory(tmp_path: Path):
    auto = {"run.resume": "auto", "rollout.max_completion_tokens": 4}
    first = own(tmp_path, settings=auto)
    with pytest.raises(ValueError, match=rf"^run.dir is '.*/run'; {re.escape(HERE)}"):
        own(tmp_path, settings=auto)
    first.train_step()  # the other has taken nothing from it
    with pytest.raises(ValueError, match=re.escape(HERE)):
        own(tmp_path, settings=auto)
    first.close()
    second = own(tmp_path, settings=auto)
    second.train()
    own(tmp_path, settings=auto).close()  # a run that has ended is over


def test_a_trainer_that_nobody_holds_on_to_is_in_nobodys_way(tmp_path: Path):
    auto = {"run.resume": "auto", "rollout.max_completion_tokens": 4}
    dropped = own(tmp_path, settings=auto)
    dropped.train_step()
    again = weakref.ref(dropped)
    del dropped
    own(tmp_path, settings=auto).close()
    assert again() is None


class Fails(Callback):
    def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("method", ["train", "train_step"])
def test_a_trainer_that_has_failed_lets_another_in_and_does_not_go_on_beside_it(tmp_path: Path, method: str):
    auto = {"run.resume": "auto", "run.steps": 4, "rollout.max_completion_tokens": 4}
    failed = own(tmp_path, settings=auto, callbacks=[Fails()])
    for _ in range(2):  # it may be tried again while nobody else is there
        with pytest.raises(ZeroDivisionError):
            getattr(failed, method)()
    other = own(tmp_path, settings=auto)
    with pytest.raises(ValueError, match=re.escape(HERE)):
        getattr(failed, method)()
    other.train_step()
    other.close()
    with pytest.raises(RuntimeError, match=r"^this trainer has failed, and another has been at work in .*/run since"):
        getattr(failed, method)()
    failed.close()


def test_a_trainer_that_could_not_be_made_lets_another_in(tmp_path: Path):
    auto = {"run.resume": "auto"}
    with pytest.raises(ValueError, match=r"^optimizer returned int") as kept:
        own(tmp_path, settings=auto, optimizer=lambda parameters: 1)
    own(tmp_path, settings=auto).close()
    assert kept.tb is not None  # as a notebook keeps it


HOLDS = """
import sys
from pathlib import Path
from grpo.observe.rundir import DirectoryLock
lock = DirectoryLock()
lock.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def test_who_is_at_work_is_said_also_where_a_trainer_of_this_process_was_there_before(tmp_path: Path):
    before = DirectoryLock()
    before.take(tmp_path)
    before.release()
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(ValueError, match=r"another process is at work there, .* Wait until it has ended"):
            DirectoryLock().take(tmp_path)
        other.communicate()
    DirectoryLock().take(tmp_path)


def interrupted(tmp_path: Path, *, steps: int, **changed: Any) -> Trainer:
    """A trainer that was stepped by hand, until Ctrl-C."""
    auto = {"run.resume": "auto", "run.steps": 9, "rollout.max_completion_tokens": 4}
    trainer = own(tmp_path, settings=auto | changed)
    for _ in range(steps):
        trainer.train_step()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "_sample", lambda: signal.default_int_handler(signal.SIGINT, None))
        with pytest.raises(KeyboardInterrupt):
            trainer.train_step()
    return trainer


def test_a_trainer_goes_on_after_another_was_refused_in_its_directory(tmp_path: Path):
    trainer = interrupted(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"^optimizer returned int"):
        own(tmp_path, settings={"run.resume": "auto"}, optimizer=lambda parameters: 1)
    trainer.train_step()
    assert trainer.state.step == 3
    trainer.close()


def test_a_trainer_that_has_failed_saves_nothing_among_the_checkpoints_of_another(tmp_path: Path):
    failed = interrupted(tmp_path, steps=1)
    other = own(tmp_path, settings={"run.resume": "auto", "rollout.max_completion_tokens": 4})
    with pytest.raises(ValueError, match=re.escape(HERE)):
        failed.save()
    other.train_step()
    with pytest.raises(ValueError, match=re.escape(HERE)):
        failed.save()
    assert not (other.directory / "checkpoints").exists()
    saved = other.save()
    assert complete_checkpoints(other.directory / "checkpoints") == [saved]
    other.close()
    with pytest.raises(RuntimeError, match=r"^this trainer has failed, and another has been at work in .*/run since"):
        failed.save()
    failed.close()


@pytest.mark.parametrize("leave", ["fail", "close"])
def test_others_are_let_in_when_a_checkpoint_in_the_background_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: str
):
    trainer = own(tmp_path, settings={"checkpoint.background": True, "rollout.max_completion_tokens": 4})
    trainer.train_step()
    written = Writer._save

    def slowly(self: Writer, *arguments: Any) -> None:
        time.sleep(0.1)
        written(self, *arguments)

    monkeypatch.setattr(Writer, "_save", slowly)
    saved = trainer.save(wait=False)
    assert not trainer.checkpoints.is_written
    if leave == "close":
        trainer.close()
    else:
        trainer.callbacks = [Fails()]
        with pytest.raises(ZeroDivisionError):
            trainer.train_step()
    assert complete_checkpoints(trainer.directory / "checkpoints") == [saved]
    DirectoryLock().take(trainer.directory)
    trainer.close()


def test_a_refusal_of_the_main_process_is_that_of_all(tmp_path: Path):
    said = launch("worker_refused.py", str(tmp_path / "run"), processes=2, timeout=120)
    for rank in (0, 1):
        assert f"rank {rank} failed\n" in said
        assert f"rank {rank} was refused: True\n" in said
        assert f"rank {rank} is at step 3\n" in said
    assert "rank 0 failed again" in said
    assert "rank 1 failed again" not in said


def test_a_directory_that_is_gone_is_said(tmp_path: Path):
    trainer = interrupted(tmp_path, steps=0)
    shutil.rmtree(trainer.directory)
    with pytest.raises(RuntimeError, match=r"^run.dir is '.*/run', which is gone"):
        trainer.train_step()
    trainer.close()


class Stops(Callback):
    """Asks to stop, and sees whether another could take the directory while where the run stands is saved."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.refused = 0

    def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
        raise KeyboardInterrupt

    def on_save(self, step: int, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match=re.escape(HERE)):
            DirectoryLock().take(self.directory)
        self.refused += 1


def test_a_run_that_is_stopped_has_its_directory_until_it_is_saved(tmp_path: Path):
    stops = Stops(tmp_path / "run")
    auto = {"run.resume": "auto", "run.steps": 4, "rollout.max_completion_tokens": 4}
    with pytest.raises(Stopped):
        own(tmp_path, settings=auto, callbacks=[stops]).train()
    assert stops.refused == 1
    own(tmp_path, settings=auto).close()


def test_what_refers_to_itself_alone_holds_no_directory(tmp_path: Path):
    lock = DirectoryLock()
    lock.take(tmp_path)
    lock.itself = lock  # type: ignore[attr-defined] # as a trainer is part of what its model calls
    gc.disable()
    try:
        del lock
        DirectoryLock().take(tmp_path)
    finally:
        gc.enable()


def test_a_forked_process_does_not_unlock_its_parents_directory(tmp_path: Path):
    lock = DirectoryLock()
    lock.take(tmp_path)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ValueError, match=re.escape(HERE)):
        DirectoryLock().take(tmp_path)
    lock.release()
    DirectoryLock().take(tmp_path)


def changed(before: Any, now: Any) -> list[str]:
    first, second = (inputs.digests([], [], [], own={"advantage": each}) for each in (before, now))
    return inputs.changed(first, second)


def test_two_functions_of_one_name_are_told_apart_by_what_they_do_and_were_made_with():
    def power(exponent: float) -> Any:
        return lambda rewards: rewards**exponent

    def counted() -> Any:
        calls = 0

        def count(rewards: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return rewards

        return count

    assert changed(power(2.0), power(2.0)) == []
    assert changed(power(2.0), power(3.0)) == ["the advantage"]
    assert changed(partial(plain), partial(plain)) == []
    assert changed(partial(pow, 2), partial(pow, 3)) == ["the advantage"]
    assert changed(lambda rewards: rewards + 1, lambda rewards: rewards + 2) == ["the advantage"]
    assert changed(lambda rewards: rewards + 1, lambda rewards: rewards + 1) == []
    used = counted()
    used(torch.ones(1))
    assert changed(counted(), used) == []  # a counter is no setting
    assert changed(plain, None) == ["the advantage"]
    older = inputs.digests([], [], [])  # which says nothing of functions
    assert inputs.changed(older, inputs.digests([], [], [], own={"advantage": plain})) == []


class Clip:
    """An advantage that is an object, with a setting, and a counter."""

    def __init__(self, most: Any) -> None:
        self.most = most
        self.calls = 0

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return rewards.clamp(max=self.most)

    def apply(self, rewards: torch.Tensor) -> torch.Tensor:
        return self(rewards)

    @classmethod
    def of_class(cls, rewards: torch.Tensor) -> torch.Tensor:
        return cls(1.0)(rewards)


def scaled(scale: Any) -> Any:
    def by_default(rewards: torch.Tensor, scale: Any = scale) -> torch.Tensor:
        return rewards * scale

    def by_keyword(rewards: torch.Tensor, *, scale: Any = scale) -> torch.Tensor:
        return rewards * scale

    return {
        "a callable object": Clip(scale),
        "a method": Clip(scale).apply,
        "a partial of a method": partial(Clip(scale).apply),
        "a default": by_default,
        "a default by keyword": by_keyword,
        "a lambda's default": lambda rewards, s=scale: rewards * s,
        "a variable around it": lambda rewards: rewards * scale,
    }


@pytest.mark.parametrize("way", scaled(0.0))
def test_a_setting_of_a_function_is_compared_wherever_it_lies(way: str):
    for before, now in [(0.2, 0.3), ((0.9, 0.99), (0.9, 0.999)), (("a", (1, 2)), ("a", (1, 3))), (None, 0.2)]:
        assert changed(scaled(before)[way], scaled(now)[way])
        assert not changed(scaled(before)[way], scaled(before)[way])
    assert not changed(scaled([])[way], scaled([1])[way])  # as a cache


def test_what_a_function_counts_and_what_is_none_of_ours_is_not_compared():
    used = Clip(0.5)
    used(torch.ones(1))
    assert not changed(Clip(0.5), used)
    assert not changed(Clip(0.5).apply, used.apply)
    module = torch.nn.ReLU()
    for function in (Clip.of_class, torch.relu, torch.optim.SGD, module, math.sqrt):
        assert not changed(function, function)
    assert not changed(module, torch.nn.ReLU().eval())


@pytest.mark.parametrize(
    ("before", "same", "other"),
    [
        ({(0, 1): 2.0, (1, 0): 3.0}, {(1, 0): 3.0, (0, 1): 2.0}, {(0, 1): 2.5, (1, 0): 3.0}),
        ({1: 2.0, "a": 3.0}, {"a": 3.0, 1: 2.0}, {1: 2.0, "b": 3.0}),
        (
            [{None: 1, "a": {(0, 1): [object()]}}],
            [{"a": {(0, 1): [object()]}, None: 1}],
            [{None: 1, "a": {(0, 1): []}}],
        ),
        ({0, 8}, {8, 0}, {0, 9}),
        ({(0, 1): {0, 8}}, {(0, 1): {8, 0}}, {(0, 1): {0, 9}}),
    ],
)
def test_an_argument_that_json_does_not_know_is_compared_too(before: Any, same: Any, other: Any):
    assert not changed(partial(plain, table=before), partial(plain, table=same))
    assert changed(partial(plain, table=before), partial(plain, table=other))


def test_a_lambda_of_a_script_is_told_apart_by_its_default():
    script = """
import json, sys
from grpo.run import inputs
print(json.dumps(inputs.digests([], [], [], own={"advantage": lambda rewards, s=float(sys.argv[1]): rewards * s})))
"""
    command = [sys.executable, "-c", script]
    said = [
        json.loads(subprocess.run([*command, scale], capture_output=True, check=True).stdout)
        for scale in ("0.5", "0.5", "0.7")
    ]
    assert inputs.changed(said[0], said[1]) == []
    assert inputs.changed(said[0], said[2]) == ["the advantage"]


def test_held_out_questions_that_nothing_asks_and_steps_that_are_all_done_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def train() -> None:
        held_out = {"name": str(TINY / "train.jsonl"), "eval_name": str(TINY / "test.jsonl")}
        config = tiny_config(tmp_path / "run", data=held_out, run={"steps": 1, "resume": "auto"})
        Trainer(config, rewards=[brevity]).train()

    train()
    said = capsys.readouterr().out
    assert "test.jsonl', without effect: evaluation.num_questions is 0" in said
    assert "steps are done" not in said
    train()
    assert "all 1 steps are done; raise run.steps to go on" in capsys.readouterr().out


def test_settings_that_a_function_stands_in_for_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changed = {"algorithm.normalize_by_std": False, "optimizer.beta1": 0.8, "algorithm.clip_high": 0.28}
    own(tmp_path, advantage=lambda rewards: rewards, loss=of_the_paper, settings=changed).close()
    said = capsys.readouterr().out
    assert "algorithm.clip_high is 0.28, without effect: loss was given to Trainer" in said
    assert "algorithm.normalize_by_std is False, without effect: advantage was given to Trainer" in said
    assert "optimizer.beta1" not in said  # nothing stands in for it


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda rewards: rewards.sum(1),
            r"^advantage returned a tensor of the shape \(4,\); for rewards of the shape \(4, 4\)",
        ),
        (lambda rewards: 1, r"^advantage returned int; for rewards of the shape"),
        (
            lambda rewards: rewards / 0 - rewards / 0,
            r"^advantage returned \[nan, .* each known reward has a finite advantage",
        ),
    ],
)
def test_an_advantage_that_is_none_is_refused(returned: Any, message: str):
    with pytest.raises(ValueError, match=message):
        own_advantages(returned, torch.ones(4, 4))


def test_an_unknown_reward_has_no_advantage():
    given = own_advantages(lambda rewards: torch.zeros_like(rewards), torch.tensor([[1.0, math.nan]]))
    assert given[0, 0] == 0
    assert given[0, 1].isnan()


def test_what_makes_no_optimizer_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^optimizer returned int; it is called with the list of trained parameters"):
        own(tmp_path, optimizer=lambda parameters: 1)


def of_the_paper(tokens: LossInputs) -> torch.Tensor:
    """GRPO's surrogate within 0.2, without a KL term."""
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    return -torch.minimum(ratio * tokens.advantages, ratio.clamp(0.8, 1.2) * tokens.advantages)


def test_a_loss_by_function_trains_as_the_settings_that_it_is_equal_to(tmp_path: Path):
    """Several passes in two minibatches, so that the second is off-policy."""
    settings = {"algorithm.kl_coef": 0.0, "algorithm.num_minibatches": 2, "run.dir": str(tmp_path / "own")}
    ours = own(tmp_path, settings=settings | {"run.dir": str(tmp_path / "ours")})
    theirs = own(tmp_path, settings=settings, loss=of_the_paper)
    start = weights_of(ours)
    for trainer in (ours, theirs):
        metrics = trainer.train_step()
        assert metrics["optimizer/grad_norm"] > 0
        trainer.close()
    assert not torch.equal(weights_of(ours), start)
    torch.testing.assert_close(weights_of(theirs), weights_of(ours), rtol=0, atol=1e-6)


def test_a_loss_is_given_the_whole_of_each_completion_and_those_without_advantage(tmp_path: Path):
    seen: list[LossInputs] = []

    def spread(tokens: LossInputs) -> torch.Tensor:
        seen.append(tokens)
        return -tokens.entropy

    zero = {"algorithm.kl_coef": 0.5, "memory.micro_batch_tokens": 2048}
    trainer = own(tmp_path, loss=spread, advantage=lambda rewards: torch.zeros_like(rewards), settings=zero)
    entropy = trainer.train_step()["policy/entropy"]
    (tokens,) = seen
    assert len(tokens.completion_lens) == 16
    for each in (tokens.logprobs, tokens.entropy, tokens.advantages, tokens.old_logprobs, tokens.ref_logprobs):
        assert each is not None
        assert each.shape == (int(tokens.completion_lens.sum()),)
    assert tokens.kl_coef == 0.5
    assert tokens.ref_logprobs is not None
    torch.testing.assert_close(tokens.ref_logprobs, tokens.old_logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens.sampling_logprobs, tokens.old_logprobs, rtol=0, atol=1e-3)
    assert trainer.train_step()["policy/entropy"] > entropy  # the advantages are 0, so it is this loss that did it
    trainer.close()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            lambda tokens: tokens.logprobs.sum(),
            r"^loss returned a tensor of the shape \(\); .* Leave out the sum or mean",
        ),
        (lambda tokens: 0.5, r"^loss returned float; it returns the loss of each token, a tensor of the shape \(3,\)"),
        (lambda tokens: tokens.advantages, r"^loss returned a tensor without gradient"),
    ],
)
def test_what_is_no_loss_is_refused(returned: Any, message: str):
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        use_loss(returned)(
            logprobs, torch.ones(3), torch.ones(3), Objective(), completion_lens=torch.tensor([3]), entropy=logprobs
        )


def test_a_loss_may_work_in_place():
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    given = {"advantages": torch.ones(3), "old_logprobs": torch.full((3,), -1.0), "entropy": torch.zeros(3)}

    def loss(tokens: LossInputs) -> torch.Tensor:
        tokens.old_logprobs.mul_(7)
        return tokens.logprobs.mul_(tokens.advantages.mul_(5))

    used = {name: value.clone() for name, value in given.items()}
    result = use_loss(loss)(
        logprobs * 1, used.pop("advantages"), torch.ones(3), Objective(), completion_lens=torch.tensor([3]), **used
    )
    assert result.loss == -15
    assert torch.equal(used["old_logprobs"], given["old_logprobs"])
    assert result.ratio.tolist() == [1, 1, 1]


def test_tokens_without_weight_cannot_make_a_loss_infinite():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    result = use_loss(lambda tokens: (tokens.logprobs - tokens.old_logprobs).exp())(
        logprobs,
        torch.ones(2),
        torch.tensor([1.0, 0.0]),
        Objective(),
        completion_lens=torch.tensor([2]),
        entropy=logprobs,
        old_logprobs=torch.tensor([-1.0, -1e4]),
    )
    result.loss.backward()
    assert result.loss == 1
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [1, 0]


def test_an_order_by_function_decides_what_is_asked_and_is_taken_up_on_resume(tmp_path: Path):
    settings = {"run.resume": "auto", "rollout.max_completion_tokens": 4}

    def order(epoch: int, rows: list[dict[str, Any]]) -> list[int]:
        largest = sorted(range(len(rows)), key=lambda number: -int(rows[number]["answer"]))
        return largest if epoch == 0 else largest[::-1]

    asked: list[int] = []
    for num_steps in (3, 5):  # an epoch has four steps
        trainer = own(tmp_path, settings=settings, order=order)
        while trainer.state.step < num_steps:
            trainer.train_step()
        trainer.save(wait=True)
        trainer.close()
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    asked = [int(row["answer"]) for row in rows[:: SMALL["rollout.group_size"]]]
    answers = sorted((int(row["answer"]) for row in ROWS), reverse=True)
    assert asked == [*answers, *answers[::-1][:4]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            [0, 1],
            r"^order returned 2 numbers for epoch 0; it returns as many numbers as there are questions, 3, each from 0",
        ),
        ([0, 1, 3], r"^order returned the number 3 for epoch 0"),
        (None, r"^order returned NoneType"),
    ],
)
def test_what_is_no_order_is_refused(returned: Any, message: str):
    prompts = [Prompt(row, [1], "", "", {"question": "", "answer": ""}) for row in range(3)]
    with pytest.raises(ValueError, match=message):
        PromptOrder(prompts, seed=0, rank=0, world_size=1, own=lambda epoch, rows: returned)


def test_an_order_that_is_drawn_anew_each_time_it_is_asked_for_is_refused():
    prompts = [Prompt(row, [1], "", "", {"question": "", "answer": ""}) for row in range(30)]
    rng = random.Random(0)
    with pytest.raises(ValueError, match="order gave two answers for epoch 0; every process asks it"):
        PromptOrder(prompts, seed=0, rank=0, world_size=1, own=lambda epoch, rows: rng.sample(range(30), 30))
    PromptOrder(
        prompts, seed=0, rank=0, world_size=1, own=lambda epoch, rows: random.Random(epoch).sample(range(30), 30)
    )


def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(TINY / "model")


def test_a_loaded_model_is_what_training_starts_from_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.25)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    few = {**SMALL, "run.steps": 1, "run.resume": "auto", "optimizer.learning_rate": 0.01}

    def trainer() -> Trainer:
        return Trainer(model, tokenizer=tokenizer, rewards=[brevity], train_dataset=ROWS, settings=few)

    first = trainer()
    assert first.directory == Path("runs/model")
    for name, weight in first.policy.lm.state_dict().items():
        assert torch.equal(weight, before[name]), name
    last = first.train()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not torch.equal(weights_of(first), torch.cat([w.flatten() for w in model.parameters()]))
    again = trainer()  # the same weights are the same run
    assert again.state.step == 1
    again.close()
    assert len(list(Path("runs/models").iterdir())) == 1
    stored = AutoModelForCausalLM.from_pretrained(last / "hf", dtype=torch.float32).state_dict()
    assert torch.equal(stored["model.norm.weight"], first.policy.lm.state_dict()["model.norm.weight"])
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match=r"model\.name"):  # other weights are another run
        trainer()


def test_the_tokenizer_of_a_loaded_model_is_found_where_it_was_loaded_from(tmp_path: Path):
    model, tokenizer = loaded()
    given = GivenModel.of(model, None, {})
    assert given.name == "model"
    assert given.tokenizer.get_vocab() == tokenizer.get_vocab()
    directory = given.write_below(tmp_path)
    assert given.write_below(tmp_path) == directory
    assert AutoTokenizer.from_pretrained(directory).chat_template == tokenizer.chat_template


def test_other_ends_are_another_model_and_two_that_write_the_same_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    before = GivenModel.of(model, None, {}).write_below(tmp_path)
    model.generation_config.eos_token_id = [0, 7]
    after = GivenModel.of(model, None, {}).write_below(tmp_path)
    assert after != before
    assert json.loads((after / "generation_config.json").read_text())["eos_token_id"] == [0, 7]
    shutil.rmtree(after)
    save = model.save_pretrained

    def meanwhile(directory: Path) -> None:
        """Another process writes the same."""
        save(directory)
        shutil.copytree(directory, after)

    monkeypatch.setattr(model, "save_pretrained", meanwhile)
    assert GivenModel.of(model, None, {}).write_below(tmp_path) == after
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([before.name, after.name])


def test_a_model_with_adapters_in_place_is_refused():
    model = AutoModelForCausalLM.from_pretrained(TINY / "model")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"is a Qwen2ForCausalLM with adapters in .*q_proj, put there by get_peft_model"
    ):
        GivenModel.of(model, None, {})


def test_models_that_cannot_be_trained_from_an_object_are_refused(tmp_path: Path):
    model, tokenizer = loaded()
    nowhere = AutoModelForCausalLM.from_config(deepcopy(model.config))
    nowhere.config.name_or_path = ""
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config)
    quantised = AutoModelForCausalLM.from_config(deepcopy(model.config))
    quantised.config.quantization_config = {"quant_method": "awq"}
    adapted = get_peft_model(
        AutoModelForCausalLM.from_config(deepcopy(model.config)), LoraConfig(target_modules=["q_proj"])
    )
    refused: list[tuple[Any, Any, dict[str, Any], str]] = [
        (nowhere, None, {}, r"^tokenizer is None; a model needs one, .* Pass tokenizer=AutoTokenizer"),
        (meta, tokenizer, {}, r"^the model's weight .* is on the meta device"),
        (quantised, tokenizer, {}, r"^the model's weights are quantised \(awq\)"),
        (adapted, tokenizer, {}, r"^the model is a PeftModel.*merge_and_unload"),
        (model.model, tokenizer, {}, r"no output layer over the vocabulary\. Load it with AutoModelForCausalLM"),
        (torch.compile(model), tokenizer, {}, r"^the model is a OptimizedModule; .* after torch\.compile"),
        (3, tokenizer, {}, r"^the model is a int; it must be a PreTrainedModel"),
        (model, "gpt2", {}, r"^tokenizer is a str; it must be a tokenizer of transformers"),
        (
            model,
            tokenizer,
            {"model.name": "x"},
            r"^settings holds model\.name; the model of this run is the Qwen2ForCausalLM",
        ),
        (str(TINY / "model"), tokenizer, {}, r"^tokenizer was given beside a model that is read from files"),
    ]
    for given, its_tokenizer, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            Trainer(given, tokenizer=its_tokenizer, rewards=[brevity], train_dataset=ROWS, settings=settings)


def test_supervised_training_starts_from_a_loaded_model_too(tmp_path: Path):
    model, tokenizer = loaded()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.25)
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
    settings = {"run.dir": str(tmp_path / "run"), "distributed.zero_stage": 0, "evaluation.num_questions": 0}
    settings |= {"data.max_tokens": 256}
    trainer = SupervisedTrainer(model, tokenizer=tokenizer, train_dataset=rows, settings=settings)
    for name, weight in trainer.policy.lm.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    trainer.close()
