"""Tasks of reasoning-gym as data: `data.name: reasoning_gym:chain_sum`, made from `data.args`, with verifiers of their own.

A row has the question and the answer, and what the reward `reasoning_gym` needs: task, task_args and the whole entry.
"""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from typing import Any

from grpo.config import TASK_PREFIX

FILTERED = ("countdown", "puzzle24")
"""Tasks whose verifiers run the answer as Python, and whose answers rewards/reasoning_gym.py lets through as arithmetic only."""
RUNS_IT = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\((?!entry)")
"""In the source of a verifier. In version 0.1.25 it finds seven more: integrals, polynomials, matrices, n_queens, ..."""


def make_rows(name: str, args: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task.

    Args:
        name: `reasoning_gym:<task>`.
        args: size, seed, and the settings of the task.

    Raises:
        ValueError: reasoning-gym is not installed, there is no such task or setting, or its verifier would run answers.
    """
    task = name.removeprefix(TASK_PREFIX)
    if find_spec("reasoning_gym") is None:
        raise ValueError(
            f"data.name is {name!r}; reasoning-gym is not installed, and it makes the questions and checks the answers. "
            "pip install 'grpo[reasoning-gym]', or name other data."
        )
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(
            f"data.name is {name!r}; reasoning-gym has no such task. It has {', '.join(sorted(DATASETS))}."
        )
    if task not in FILTERED and RUNS_IT.search(inspect.getsource(DATASETS[task][0].score_answer)):
        raise ValueError(
            f"data.name is {name!r}; this task's verifier runs the answer as Python code, and answers are what a model wrote. "
            "Take another task."
        )
    try:
        entries = list(reasoning_gym.create_dataset(task, **args))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"data.args is {args}; the task {task} does not take it: {error}. Correct data.args."
        ) from error
    common = {"task": task, "task_args": args}
    return [{"question": entry["question"], "answer": entry["answer"], "entry": entry, **common} for entry in entries]
