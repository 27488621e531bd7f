"""What a run was given besides its settings, as digests: its questions, and the source of its rewards, tools and environment.

Files may be edited between a run and its resumption under the same names. Checkpoints keep these digests, and a run that
resumes from one compares them.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from grpo.data.rows import canonical
from grpo.scoring.reward import Reward
from grpo.turns.environment import Environment
from grpo.turns.runner import Runner
from grpo.types import Prompt

QUESTIONS, HELD_OUT = "the training questions", "held-out questions"


def digests(
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    tools: Sequence[Runner] = (),
    environment: Environment | None = None,
    what: str = QUESTIONS,
) -> dict[str, str]:
    """By what a person calls it. Held-out questions have their number in the name, since another number of them may be asked."""
    found = {what: _of_prompts(prompts)}
    if eval_prompts:
        found[f"the {len(eval_prompts)} {HELD_OUT}"] = _of_prompts(eval_prompts)
    found |= of_tools(tools)
    found |= of_environment(environment)
    return found | {f"the reward {reward.name}": _of_reward(reward) for reward in rewards}


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not as it was; a set of held-out questions of another size is another set."""
    return [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not (name.endswith(HELD_OUT) and not (name in before and name in now))
    ]


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    """In their order, each as the model reads it and with the columns that rewards are given."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        columns = sorted(prompt.columns.items(), key=lambda column: str(column[0]))
        digest.update(canonical({"text": prompt.text, "columns": dict(columns)}))
    return digest.hexdigest()


def _of_reward(reward: Reward) -> str:
    """Of its arguments, and of the files that it and what it calls are defined in, of its own package or folder."""
    digest = xxhash.xxh3_128(json.dumps(reward.args, sort_keys=True, default=plain).encode())
    if reward.made_with:
        digest.update(json.dumps(reward.made_with, sort_keys=True, default=plain).encode())
    for function in (reward.function, getattr(reward.function, "check_row", None)):
        if function is not None:
            digest.update(_source_of(function))
    return digest.hexdigest()


def of_tools(tools: Sequence[Runner]) -> dict[str, str]:
    """By what a person calls it."""
    return {f"the tool {tool.name}": _of_given(tool.make, tool.given) for tool in tools}


def of_environment(environment: Environment | None) -> dict[str, str]:
    """By what a person calls it; empty: there is none."""
    if environment is None:
        return {}
    runner = environment.runner
    return {f"the environment {runner.name}": _of_given(runner.source, runner.given)}


def _of_given(made: Callable[..., Any], given: dict[str, Any]) -> str:
    """Of a tool's or an environment's arguments, and of the files that it is defined in, as of a reward."""
    digest = xxhash.xxh3_128(json.dumps(given, sort_keys=True, default=plain).encode())
    digest.update(_source_of(made))
    return digest.hexdigest()


def _source_of(function: Callable[..., Any]) -> bytes:
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    place = getattr(module, "__file__", None) or ""
    if module is None or module.__name__ in ("__main__", "__mp_main__") or not place.endswith(".py"):
        try:  # a script holds the run's settings too, and a notebook has no file
            return inspect.getsource(function).encode()
        except (OSError, TypeError):
            return b""
    return b"\0".join(path.read_bytes() for path in _files(Path(place)))


def _files(start: Path) -> list[Path]:
    """A source file, and those in its folder that it imports, directly or through others."""
    found, waiting = {start}, [start]
    while waiting:
        named = _names_imported(waiting.pop().read_bytes())
        beside = {path for name in named if (path := start.parent / f"{name}.py").is_file()} - found
        found |= beside
        waiting += beside
    return sorted(found)


@lru_cache(maxsize=256)
def _names_imported(source: bytes) -> frozenset[str]:
    """The last part of each name. Parsing the built-in rewards takes a third of a second, which each Trainer would wait for."""
    return frozenset(name.rpartition(".")[2] for node in ast.walk(ast.parse(source)) for name in _imported(node))


def _imported(node: ast.AST) -> list[str]:
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return []
    own = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return [*own, *(alias.name for alias in node.names)]


def plain(value: Any) -> str:
    """What JSON does not know, without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
