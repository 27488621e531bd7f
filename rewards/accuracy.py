"""Accuracy: is the final answer right?"""

from __future__ import annotations

from typing import Literal

from .verifier.equivalence import is_equivalent, read_gold
from .verifier.extraction import from_answer_tag, from_anywhere, from_box, last_number

Source = Literal["answer_tag", "boxed", "last_number", "anywhere"]

_CANDIDATE = {
    "answer_tag": from_answer_tag,
    "boxed": from_box,
    "last_number": last_number,
    "anywhere": from_anywhere,
}


def accuracy(completion: str, answer: str, *, source: Source = "answer_tag") -> float | None:
    r"""1 if the completion's final answer is mathematically equal to `answer`, 0 if not (DeepSeek-R1, section 2.2).

    One candidate is considered, so listing all possible answers earns nothing. A completion without an answer is wrong.

    Args:
        completion: what the model wrote.
        answer: the gold answer: a number, LaTeX, or a word; a `\boxed{}` around it is taken off.
        source: where the candidate is looked for. `answer_tag`: in the last `<answer>...</answer>`; there a `\boxed{}`
            wins, then `$...$`, then the last number of a sentence. `boxed`: the last `\boxed{}`. `last_number`: the
            last number anywhere. `anywhere`: the last tag, without one the last box, without one the last number.

    Returns:
        1.0, 0.0, or None ("can't tell") when `answer` itself cannot be graded; `check_answer` says why.
    """
    gold = read_gold(answer)
    if isinstance(gold, str):
        return None
    candidate = candidate_answer(completion, source)
    return float(candidate is not None and is_equivalent(candidate, gold))


def check_answer(answer: str, *, source: Source = "answer_tag") -> str | None:
    """Why this gold answer cannot be graded; None if it can. To be asked of every data row before training."""
    if not isinstance(answer, str):
        return f"answer is {answer!r}, a {type(answer).__name__}; accuracy compares text. Make the column a string"
    gold = read_gold(answer)
    if isinstance(gold, str):
        return f"answer is {answer[:80]!r}; {gold}. Rewrite or drop the row"
    if source == "last_number" and gold.number is None:
        return f"answer is {answer[:80]!r}; source last_number only finds plain numbers. Use source answer_tag or boxed"
    return None


accuracy.check_row = check_answer  # type: ignore[attr-defined]


def explain_answer(completion: str, answer: str, *, source: Source = "answer_tag") -> str:
    """What is compared with what; for a person who reads the verdict."""
    candidate = candidate_answer(completion, source)
    found = f"no answer ({source})" if candidate is None else repr(candidate)
    return check_answer(answer, source=source) or f"found {found}, gold {answer!r}"


accuracy.explain = explain_answer  # type: ignore[attr-defined]


def candidate_answer(completion: str, source: Source) -> str | None:
    """The one answer that is considered; None if there is none."""
    if source not in _CANDIDATE:
        raise ValueError(f"accuracy's source is {source!r}; it is one of {', '.join(_CANDIDATE)}. Set one of them.")
    return _CANDIDATE[source](completion)
