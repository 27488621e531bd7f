"""Tasks of reasoning-gym as data: `data.name: reasoning_gym:chain_sum`, made from `data.args`, with verifiers of their own.

A row has the question and the answer, and what the reward `reasoning_gym` needs: task, task_args and the whole entry.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from grpo.config import TASK_PREFIX

FILTERED = ("countdown", "puzzle24")
"""Tasks whose verifiers run the answer as Python, and whose answers rewards/reasoning_gym.py lets through as arithmetic only."""
RUNS_IT = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\((?!entry)")
"""In the source of a verifier. In version 0.1.25 it finds seven more: integrals, polynomials, matrices, n_queens, ..."""


NONSENSE = ("0", "nan", "x")
"""Answers that a sound verifier takes where they are right and nowhere else."""
NUM_PROBED = 8

Verify = Callable[[str, dict[str, Any]], float]


def make_rows(name: str, args: dict[str, Any], *, held_out: bool = False) -> list[dict[str, Any]]:
    """The rows of a task.

    Row i is made from seed + i. So held-out rows are those that would come next: of the seed that is as many further on.

    Args:
        name: `reasoning_gym:<task>`.
        args: size, seed (0 if it is not there), and the settings of the task.

    Raises:
        ValueError: reasoning-gym is not installed, has no such task or setting, or its verifier runs answers or takes nonsense.
    """
    task = name.removeprefix(TASK_PREFIX)
    if find_spec("reasoning_gym") is None:
        raise ValueError(
            f"data.name is {name!r}; reasoning-gym is not installed, and it makes the questions and checks the answers. "
            "pip install reasoning-gym==0.1.25, or name other data."
        )
    import reasoning_gym

    args = {"seed": 0, **args}
    _check_task(name, task, args)
    try:
        data_set = reasoning_gym.create_dataset(task, **args)
        if held_out:
            data_set = reasoning_gym.create_dataset(task, **{**args, "seed": args["seed"] + len(data_set)})
        entries = list(data_set)
    except Exception as error:  # whatever the package makes of settings that it cannot use
        raise ValueError(
            f"data.args is {args}; the task {task} does not take it: {error}. Correct data.args."
        ) from error
    _check_verifier(name, data_set.score_answer, entries[:NUM_PROBED])
    common = {"task": task, "task_args": args}
    return [{"question": entry["question"], "answer": entry["answer"], "entry": entry, **common} for entry in entries]


def _check_task(name: str, task: str, args: dict[str, Any]) -> None:
    """There is such a task with such settings, and its verifier runs no answers."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = "".join(f" Did you mean {each}?" for each in difflib.get_close_matches(task, DATASETS, n=1))
        raise ValueError(
            f"data.name is {name!r}; reasoning-gym has no such task.{near} It has {', '.join(sorted(DATASETS))}."
        )
    if task not in FILTERED and RUNS_IT.search(inspect.getsource(DATASETS[task][0].score_answer)):
        raise ValueError(
            f"data.name is {name!r}; this task's verifier runs the answer as Python code, and answers are what a model wrote. "
            "Take another task."
        )
    known = [field.name for field in fields(DATASETS[task][1])]
    for setting in args:
        if setting not in known:
            raise ValueError(
                f"data.args.{setting} is {args[setting]!r}; the task {task} has no such setting. It has {', '.join(known)}."
            )


def _check_verifier(name: str, verify: Verify, entries: list[dict[str, Any]]) -> None:
    for nonsense in NONSENSE:
        if _is_taken(nonsense, verify, entries):
            raise ValueError(
                f"data.name is {name!r}; this task's verifier gives the answer {nonsense!r} full marks where it is wrong, and a "
                "policy would learn to say nothing else. Take another task."
            )


def _is_taken(nonsense: str, verify: Verify, entries: list[dict[str, Any]]) -> bool:
    """Whether most of the entries whose answer it is not take it; that some do may be right, as 0 is for 0.0."""
    others = [entry for entry in entries if entry["answer"] != nonsense]
    return 2 * sum(_passes(nonsense, verify, entry) for entry in others) > len(others)


def _passes(answer: str, verify: Verify, entry: dict[str, Any]) -> bool:
    try:
        return verify(answer, entry) >= 1.0
    except Exception:  # then it does not pass in training either
        return False
