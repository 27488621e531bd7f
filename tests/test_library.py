"""The library as people use it: from a model's name, with settings by name, callbacks, and metrics as a table."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, tiny_config, tiny_settings

from grpo import Callback, Config, Trainer
from grpo.system.jsonl import read_metrics
from grpo.system.stopping import Stopped
from grpo.training.state import Rollout

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
    assert len(table) == 5  # two steps and three evaluations


def test_a_callback_stops_a_run_that_can_be_resumed(tmp_path: Path):
    class Enough(Notes):
        def on_step(self, step: int, metrics: Mapping[str, float], rollout: Rollout) -> None:
            super().on_step(step, metrics, rollout)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = tiny_settings(tmp_path / "run", run={"steps": 3, "resume": "auto"})
    notes = Enough()
    with pytest.raises(Stopped):
        Trainer(Config(**settings), rewards=[brevity], callbacks=[notes]).train()
    assert [step for step, *_ in notes.steps] == [1]
    assert notes.ended == []
    again = Notes()
    Trainer(Config(**settings), rewards=[brevity], callbacks=[again]).train()
    assert [step for step, *_ in again.steps] == [2, 3]


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
