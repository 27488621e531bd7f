r"""In which odd form a right answer stands: what a policy writes that has learned to please its grader (reward hacking).

A grader is more generous than a teacher: it may work out `4 + 3 * 4`, or pick one value out of several. A policy finds that
out, and its accuracy rises while it stops to think (docs/results/gsm8k.md, seed 2). No form proves a thing alone: whether one
takes over the right answers in the course of a run, watchdog.py says.

The forms are judged by the texts alone, without the grader whose mistakes they are to show.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FORMS = {
    "arithmetic": "arithmetic that is not worked out",
    "several": "several values where the gold answer is one",
    "long": "far longer than the gold answer",
    "no_thought": "given after an empty thought",
    "unstated": "without the gold answer as it is written",
}
"""Each form, in words that follow "right answers that are"."""

MANY_CHARS = 200
"""An answer is `long` if it has so many characters and four times those of the gold answer more."""

_DIGITS = r"\d[\d,]*+(?:\.\d++)?+"  # possessive: no digits are tried twice, however many a policy writes
_QUOTIENT = re.compile(rf"(?<![\d.)}}]){_DIGITS}\s*/\s*{_DIGITS}(?![\d.])")
_POWER_OF_TEN = re.compile(r"(?:[*×·]|\\times|\\cdot)\s*10\s*(?:\^|\*\*)")
_OPERATION = re.compile(  # between two numbers; none where letters follow the second one: 1+2i, 3 + 2\sqrt{5}
    r"[\d)}]\s*(?:[-+*/×·÷\u2212]|\\(?:times|cdot|div)(?![a-zA-Z]))\s*[({$\s]*"
    + _DIGITS
    + r"(?![\^_a-zA-Z]|\s*\\(?!times|cdot|div|\)))"
)
_SEPARATOR = re.compile(r",|;|\n|\\quad|\\\\|\b(?:or|and)\b")
_BOXES = re.compile(r"\\boxed\s*\{[^{}]*\}(?:[\s,;$]|\b(?:or|and)\b)*\\boxed\s*\{")
_MARKS = re.compile(r"\\(?:left|right|displaystyle|text|mathrm|mbox|boxed)(?![a-zA-Z])|\\[,;:! ()\[\]]|[{}$~*`\"]")
_SPACES = re.compile(r"(?<!\w) | (?!\w)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|\\!)+(?=\d{3}(?!\d))")
_JOINED = re.compile(r"\w|\.\d")
_SHORT_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_PLAIN_FRACTION = re.compile(r"\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_BOX = re.compile(r"\\boxed\s*\{")


def forms(completion: str, gold: str) -> tuple[str, ...]:
    """Those of FORMS that a completion's answer has, beside this gold answer.

    `forms("<think> </think> <answer>4 + 3 * 4</answer>", "16")` is arithmetic, no_thought and unstated. Where the gold answer
    itself is arithmetic, as in Countdown, an answer that is so too is none of the first and the last.
    """
    answer = committed_answer(completion)
    asks_for_arithmetic = _has_arithmetic(gold)
    found = {
        "arithmetic": not asks_for_arithmetic and _is_unworked(answer, gold),
        "several": _num_values(answer) > 1 and _num_values(gold) == 1,
        "long": len(answer) > MANY_CHARS + 4 * len(gold),
        "no_thought": has_empty_thought(completion),
        "unstated": not asks_for_arithmetic and not states(answer, gold),
    }
    return tuple(name for name, is_so in found.items() if is_so)


def committed_answer(completion: str) -> str:
    r"""The content of the last `<answer>` tag, else of the last `\boxed{}`, else the last line that says anything."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return completion[start + len("<answer>") : end].strip()
    boxes = list(_BOX.finditer(completion))
    if boxes:
        return _until_closed(completion[boxes[-1].end() :])
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def sole_box(completion: str) -> str | None:
    r"""The content of the last `\boxed{}`; None if there is none that is the whole answer: closed, filled, not one of several."""
    boxes = list(_BOX.finditer(completion))
    if not boxes or _BOXES.search(completion):
        return None
    rest = completion[boxes[-1].end() :]
    end = _closing(rest)
    return None if end is None else rest[:end].strip() or None


def _until_closed(text: str) -> str:
    return text[: _closing(text)].strip()


def _closing(text: str) -> int | None:
    """Where the brace closes that was opened before the text; None if it does not."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return at
    return None


def has_empty_thought(completion: str) -> bool:
    """Whether there is a `<think>` and neither letter nor digit in it."""
    end = completion.find("</think>")
    if end < 0:
        return False
    opened = completion.find("<think>", 0, end)  # or in the prompt
    return not any(character.isalnum() for character in completion[opened + len("<think>") if opened >= 0 else 0 : end])


def _is_unworked(answer: str, gold: str) -> bool:
    """Whether a number would be worked out by carrying out the answer's last side: in `9 * 2 = 18` nothing is left to do."""
    last = answer.rsplit("=", 1)[-1]
    if _has_arithmetic(last):
        return True
    is_whole = gold.strip().lstrip("-").replace(",", "").isdigit()
    return is_whole and _QUOTIENT.fullmatch(last.strip(" $.()")) is not None


def _has_arithmetic(text: str) -> bool:
    """Whether two numbers have the sign of an operation between them. A quotient and a power of ten, 2 * 10^5, are numbers."""
    return _OPERATION.search(_POWER_OF_TEN.sub("e", _QUOTIENT.sub("1", text))) is not None


def _num_values(text: str) -> int:
    """How many numbers a text lists; 1 for a sentence, whatever it mentions."""
    if _BOXES.search(text):
        return 2
    plain = re.sub(r"\\(?:text|mbox|textrm)\s*\{\s*,?\s*(or|and)\s*\}", r" \1 ", _THOUSANDS.sub("", text))
    items = [item for item in _SEPARATOR.split(plain) if item.strip(" $.()[]{}\\")]
    is_list = len(items) > 1 and all(re.search(r"\d", each) and not re.search(r"[a-zA-Z]{3}", each) for each in items)
    return len(items) if is_list else 1


def states(answer: str, gold: str) -> bool:
    """Whether the gold answer stands in an answer as it is written, spaces, thousands commas and styles of LaTeX aside."""
    wanted, text = _plain(gold).strip("(). "), _plain(answer)
    if not wanted:
        return True
    at = text.find(wanted)
    while at >= 0:
        before, after = text[:at][-1:], text[at + len(wanted) :][:2]
        is_joined = wanted[0].isalnum() and (before.isalnum() or before in (".", "_"))
        is_joined |= wanted[-1].isalnum() and _JOINED.match(after) is not None
        if not is_joined:
            return True
        at = text.find(wanted, at + 1)
    return False


def _plain(text: str) -> str:
    text = _PLAIN_FRACTION.sub(
        lambda found: "/".join(filter(None, found.groups())), _SHORT_FRACTION.sub(r"\\frac", text)
    )
    text = _MARKS.sub("", _THOUSANDS.sub("", text))
    return _SPACES.sub("", " ".join(text.split())).replace("\u2212", "-").lower().removesuffix(".0")


# ---- of a step -------------------------------------------------------------------------------------------------------

OF_OWN_FORM = ("grpo.rewards.code", "grpo.rewards.countdown", "grpo.rewards.reasoning_gym")
"""Modules of rewards for which right is what does the task, and not the gold answer as it is written."""


def tell_of(verdict: Callable[..., Any]) -> bool:
    """Whether forms say something of the answers that this reward calls right."""
    return getattr(verdict, "__module__", None) not in OF_OWN_FORM


def tally(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[bool | None]) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of `answer/judged`, `answer/right` and `answer/<form>` over `completion_rows` and their verdicts.

    They add up over processes. Rows without a verdict do not count, nor do those whose question has no gold answer or one that is
    no text, as where programs are asked for.
    """
    judged = [(row, right) for row, right in zip(rows, verdicts, strict=True) if right is not None and _has_gold(row)]
    sums: dict[str, float] = defaultdict(float)
    right_rows = [row for row, right in judged if right]
    for row in right_rows:
        for name in forms(row["completion"], row["answer"]):
            sums[name] += 1
    tallied = {f"answer/{name}": (sums[name], float(len(right_rows))) for name in FORMS if right_rows}
    if judged:
        tallied["answer/right"] = float(len(right_rows)), float(len(judged))
    return tallied | ({"answer/judged": (float(len(judged)), float(len(rows)))} if rows else {})


def _has_gold(row: Mapping[str, Any]) -> bool:
    """Whether there is a gold answer to compare with; that of a question without one is empty."""
    return isinstance(row["answer"], str) and bool(row["answer"].strip())


def excerpts(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[bool | None], *, num: int) -> list[str]:
    """Right answers in odd forms beside their gold answers: at most `num`, of different questions first."""
    shown: dict[str, str] = {}
    for row, right in zip(rows, verdicts, strict=True):
        if right and _has_gold(row) and row["question"] not in shown:
            found = forms(row["completion"], row["answer"])
            if found:
                answer = " ".join(committed_answer(row["completion"]).split())
                shown[row["question"]] = f"{_cut(answer)!r} for {_cut(row['answer'])!r} ({', '.join(found)})"
    return list(shown.values())[:num]


def _cut(text: str) -> str:
    return text if len(text) <= 120 else text[:120] + "..."
