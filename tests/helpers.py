"""What several tests share: a small configuration, a generator with known completions, and launching processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import warm
from number_reward import digits_in_text as digits_in_text
from number_reward import number_in_text as number_in_text
from number_reward import number_or_nothing as number_or_nothing
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from grpo import Trainer, report
from grpo.config import Config
from grpo.rollout.grouping import all_at_once
from grpo.system import distributed
from grpo.system.jsonl import read_jsonl
from grpo.types import Completion, Group, MicroBatch, OnGroup, Prompt, Sampling, Scores

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "quickstart"
QUESTIONS = ROOT / "tests" / "data" / "questions.jsonl"
"""The first 200 of the quickstart's 4,000, which every Trainer would tokenize anew for a second."""
VARIETY = [{"function": f"{ROOT / 'tests' / 'number_reward.py'}:variety"}]
"""A reward that tells completions of a few tokens apart; `accuracy` and `format` give 0 to all below some twenty."""
VOCABULARY = 300  # token ids below this are ordinary text of the tiny model

QWEN = """{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""In the form of Qwen 2.5: a chat template with tools."""


def tiny_settings(run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of the tiny model that takes a second a step; `sections` are merged over it."""
    settings: dict[str, Any] = {
        "model": {"name": str(TINY / "model")},
        "data": {"name": str(QUESTIONS), "template": "chat", "max_prompt_tokens": 96},
        "rollout": {"num_prompts": 4, "group_size": 4, "max_completion_tokens": 24},
        "algorithm": {"kl_coef": 0.0},
        "optimizer": {"learning_rate": 1e-3},
        "memory": {"micro_batch_tokens": 256, "activation_checkpointing": 0},
        "distributed": {"zero_stage": 0},
        "scoring": {"num_workers": 1},
        "preflight": {"num_questions": 0},
        "run": {"dir": str(run_dir), "steps": 2},
    }
    for section, values in sections.items():
        if isinstance(values, dict):
            settings[section] = {**settings.get(section, {}), **values}
        else:
            settings[section] = values
    return settings


def save_family(directory: Path, config: PretrainedConfig) -> Path:
    """A random model with the tiny tokenizer."""
    shutil.copytree(TINY / "model", directory)
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def shallow(num_layers: int) -> str:
    """The tiny model's first layers, made once in a run of tests. Under ZeRO-3 each module takes milliseconds in each pass."""
    directory = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / f"shallow-{num_layers}"
    if not directory.exists():
        with tempfile.TemporaryDirectory(dir=directory.parent) as made:
            target = shutil.copytree(TINY / "model", Path(made) / "model")
            config = read_json(target / "config.json")
            kept = config["layer_types"][:num_layers]
            (target / "config.json").write_text(
                json.dumps({**config, "num_hidden_layers": num_layers, "layer_types": kept})
            )
            weights = load_file(target / "model.safetensors")
            layers = re.compile(r"model\.layers\.(\d+)\.")
            kept = {
                name: weight
                for name, weight in weights.items()
                if (layer := layers.match(name)) is None or int(layer[1]) < num_layers
            }
            save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
            with contextlib.suppress(OSError):  # another process was first
                target.rename(directory)
    return str(directory)


def tiny_config(run_dir: Path, **sections: Any) -> Config:
    return Config(**tiny_settings(run_dir, **sections))


ROLLS_BACK = {
    "watchdog": {"signal": "roll_back", "patience": 2, "max_skipped": 2, "rate_factor": 0.25, "max_roll_backs": 1},
    "checkpoint": {"every_steps": 1, "keep": 4},
    "run": {"steps": 8, "resume": "auto"},
}


def troubled(run_dir: Path, *, first_bad: int, times: int, **sections: object) -> Trainer:
    """All rewards are equal from step `first_bad` on, until the run has rolled back `times` times."""
    trainer = Trainer(tiny_config(run_dir, **{**ROLLS_BACK, **sections}))
    own = trainer.collector.sample

    def flat(*arguments: Any, **options: Any) -> tuple[list[Group], Scores]:
        groups, scores = own(*arguments, **options)
        bad = trainer.state.step + 1 >= first_bad and len(trainer.guard.roll_backs.rows) < times
        return groups, replace(scores, rewards=torch.ones_like(scores.rewards)) if bad else scores

    trainer.collector.sample = flat
    return trainer


class FixedGenerator:
    """Completions that depend on the prompt alone, so that runs on different processes can be compared."""

    def __init__(self, longest: int = 20) -> None:
        self.longest = longest

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        groups = [Group(p, [self._completion(p, i) for i in range(num_completions)]) for p in prompts]
        return all_at_once(groups, on_group)

    def _completion(self, prompt: Prompt, number: int) -> Completion:
        rng = random.Random(f"{prompt.row} {number}")
        ids = [rng.randrange(5, VOCABULARY) for _ in range(rng.randint(1, self.longest))]
        return Completion(ids, [-1.0] * len(ids), f"{rng.random():.3f}", "length")

    def sync(self) -> None:
        """The completions do not depend on the weights."""

    def release_memory(self) -> None:
        """They take none."""

    def metrics(self) -> dict[str, float]:
        return {}


def sequences_of(micro: MicroBatch) -> list[tuple[torch.Tensor, int]]:
    """Token ids of each sequence of a pass, its prompt in front, and the length of that prompt."""
    num_queries, num_keys = micro.packing.cu_queries.diff().tolist(), micro.packing.cu_keys.diff().tolist()
    keys = micro.tokens[micro.packing.key_index].split(num_keys)
    return [(ids, len(ids) - own) for ids, own in zip(keys, num_queries, strict=True) if len(ids) > own]


def clean_environment() -> dict[str, str]:
    """The environment for a process of its own: without the process group that a Trainer here has set up."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in group}


def launch(script: str, *arguments: str, processes: int = 1, timeout: float = 300) -> str:
    """Run tests/<script> as a process group and return what it printed, rank by rank; fails with its output if it failed.

    Without a launcher, whose part are the variables. What a launcher does besides is tested in test_stopping, test_distributed,
    test_check_invariance and test_heartbeat, with real ones.
    """
    done = launch_group(script, *arguments, processes=processes, timeout=timeout)
    said = "\n".join(f"rank {rank}:\n{each.stdout[-4000:]}{each.stderr[-8000:]}" for rank, each in enumerate(done))
    assert [each.returncode for each in done] == [0] * processes, said
    return "".join(each.stdout for each in done)


def launch_group(
    script: str, *arguments: str, processes: int, timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """Of each rank what it printed and its exit code; of a rank that did not end after another had failed, -9."""
    group = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment = {
        **clean_environment(),
        **group,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
    }
    return warm.run_together(
        [[str(ROOT / "tests" / script), *arguments]] * processes,
        envs=[{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)],
        cwd=ROOT,
        timeout=timeout,
    )


def free_port() -> int:
    """One that stays free until a process group takes it, seconds later: the kernel gives other sockets none from this range, and
    other workers of this pytest look elsewhere in it."""
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "0"))) % 8
    while True:
        port = random.SystemRandom().randrange(16_000 + 2_000 * worker, 18_000 + 2_000 * worker)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


ONE_STEP = [
    "scripts/train_zero.py",
    "--config",
    "configs/quickstart.yaml",
    "--set",
    "run.steps=1",
    "preflight.num_questions=0",
]


def launch_script(
    *overrides: str, launcher: tuple[str, ...] = (), forked: bool = True
) -> subprocess.CompletedProcess[str]:
    """One step of the quickstart as a user starts it, with settings and with options for accelerate.

    Args:
        forked: accelerate's program is a fork, whose command line cannot be read; what it launches are interpreters all the same.
    """
    command = ["-m", "accelerate.commands.launch", *launcher, *ONE_STEP, *overrides]
    if forked:
        return warm.run(command, cwd=ROOT, timeout=300, env=clean_environment())
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, env=clean_environment()
    )


def run_script(*overrides: str) -> subprocess.CompletedProcess[str]:
    """The same without accelerate, which takes as long as all the rest."""
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    return warm.run([*ONE_STEP, *overrides], cwd=ROOT, timeout=300, env=environment)


def shard_even_small_weights(*, whole_below: int = 0, fetch_ahead: bool = False) -> None:
    """ZeRO-3 leaves weights below 100k elements whole, and the tiny model has no others: nothing would be tested.

    Args:
        fetch_ahead: let go of every weight after its use, and fetch the next few, as with a model of 7B. Otherwise ZeRO-3 keeps
            what it needs again within 1e9 elements, which is all of the tiny model.
    """
    # DeepSpeed formats all of them for a message that it does not print, for seconds where they are whole
    torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[method-assign, assignment]
    original = distributed.deepspeed_config

    def settings(*args: object, **kwargs: object) -> dict:
        values = original(*args, **kwargs)
        if values["zero_optimization"]["stage"] == 3:
            values["zero_optimization"]["stage3_param_persistence_threshold"] = whole_below
            if fetch_ahead:
                values["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 20_000}
        return values

    distributed.deepspeed_config = settings


def without_pictures() -> None:
    """Of this process's runs none draws its curves and its page when it ends, for a second; tests of that have the fixture
    `pictures`."""
    report.at_the_end = lambda run_dir: [
        f"curves     {run_dir / 'curves.png'}",
        f"report     {run_dir / 'report.html'}",
    ]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run's steps, without those that a clock or the machine decides."""
    clocks = ("time/", "throughput/", "memory/", "tools/seconds", "tools/wait", "environment/seconds")
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "time/step" in row]
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows]
