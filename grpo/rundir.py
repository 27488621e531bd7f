"""A run's directory: which one to use, what is written into it, and what of it a resumed run takes up again."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config, RunConfig
from grpo.console import ConsoleSink
from grpo.distributed import Processes
from grpo.evaluate import summarize
from grpo.sinks import JsonlSink, Sink, WandbSink, append_jsonl, read_jsonl, rewind_jsonl

RECORDED = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "math-verify")


def choose(config: RunConfig) -> Path:
    """`run.dir` itself to resume or if it is still unused; otherwise the next free of dir-2, dir-3, ..."""
    wanted = Path(config.dir)
    if config.resume == "auto" or _unused(wanted):
        return wanted
    return next(path for n in count(2) if _unused(path := wanted.with_name(f"{wanted.name}-{n}")))


def _unused(path: Path) -> bool:
    return not path.exists() or not any(path.iterdir())


def record(directory: Path, config: Config, processes: Processes) -> None:
    """Write the resolved configuration and what the run runs on."""
    (directory / "config.yaml").write_text(config.to_yaml())
    device = torch.cuda.get_device_name() if processes.device.type == "cuda" else platform.processor() or "cpu"
    environment = {
        "command": sys.argv,
        "processes": processes.world_size,
        "device": device,
        "python": platform.python_version(),
        **{name: version(name) for name in RECORDED},
    }
    (directory / "environment.json").write_text(json.dumps(environment, indent=1))


class RunLog:
    """Everything a run writes down. Only the main process writes; the others call the same methods without effect."""

    def __init__(self, directory: Path, config: Config, processes: Processes, *, reward_names: list[str]) -> None:
        self.directory = directory
        self.config = config
        self.processes = processes
        self.reward_names = reward_names
        self.sinks: list[Sink] = []

    def open(self, *, step: int) -> None:
        """Start writing after `step` finished steps. What an earlier attempt wrote of later steps is set aside."""
        if not self.processes.is_main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "completions", "evaluations"):
            rewind_jsonl(self.directory / f"{name}.jsonl", step)
        record(self.directory, self.config, self.processes)
        logging = self.config.logging
        self.sinks = [JsonlSink(self.directory)]
        if logging.wandb != "disabled":
            self.sinks.append(
                WandbSink(
                    logging.wandb,
                    project=logging.wandb_project,
                    directory=self.directory,
                    config=self.config.model_dump(),
                )
            )
        self.sinks.append(ConsoleSink(num_steps=self.config.run.steps, first_step=step, reward_names=self.reward_names))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def log_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        for sink in self.sinks:
            sink.log_completions(step, rows)

    def log_evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        if self.processes.is_main:
            append_jsonl(self.directory / "evaluations.jsonl", [{"step": step, **row} for row in rows])
        self.log(step, summarize(rows))

    def evaluation(self, step: int) -> list[dict[str, Any]]:
        """The rows logged for `step`; empty if it has not been evaluated."""
        path = self.directory / "evaluations.jsonl"
        return [row for row in read_jsonl(path) if row["step"] == step] if path.exists() else []

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.sinks = []
