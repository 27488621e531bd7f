"""reasoning-gym: what does the task's own verifier say?"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from .verifier.extraction import last_answer_tag

MAX_CHARS = 200  # of an arithmetic answer
_ARITHMETIC = re.compile(r"[-+*/()0-9 ]+")
ARITHMETIC = {"countdown": _ARITHMETIC, "puzzle24": _ARITHMETIC}
"""Their verifiers hand the answer to sympy's parse_expr, which runs it as Python: nothing but this may reach it, and no power."""


def reasoning_gym(completion: str, task: str, task_args: dict[str, Any], entry: dict[str, Any]) -> float:
    """1 if the task's verifier gives the content of the last `<answer>` full marks, else 0.

    Verifiers give wrong or badly written answers up to 0.1, and some a share for being near; neither is right.

    Args:
        task: its name in reasoning-gym; task_args: what its data set was made with; entry: the row as it came from there.
    """
    answer = last_answer_tag(completion)
    if not answer or not _may_be_verified(answer, task):
        return 0.0
    verifier = _data_set(task, json.dumps(task_args, sort_keys=True))
    try:
        return float(verifier.score_answer(answer, entry) >= 1.0)
    except Exception:  # some trip over what is badly written; on the row's own answer they work, as check_entry saw
        return 0.0


def check_entry(task: str, task_args: dict[str, Any], entry: dict[str, Any]) -> str | None:
    """Why this row cannot be graded: its own answer does not pass. Of some tasks there is no one answer, and nothing to check."""
    answer = entry["answer"]
    if answer is None or reasoning_gym(f"<answer>{answer}</answer>", task, task_args, entry) == 1.0:
        return None
    return f"the answer of the row, {answer[:80]!r}, does not pass the verifier of {task}"


reasoning_gym.check_row = check_entry  # type: ignore[attr-defined]


def _may_be_verified(answer: str, task: str) -> bool:
    if task not in ARITHMETIC:
        return True
    return len(answer) <= MAX_CHARS and "**" not in answer and ARITHMETIC[task].fullmatch(answer) is not None


@lru_cache
def _data_set(task: str, args: str) -> Any:
    """A verifier reads its data set's settings. The import takes seconds, and only who uses the tasks has the package."""
    import reasoning_gym as package

    return package.create_dataset(task, **{**json.loads(args), "size": 1})
