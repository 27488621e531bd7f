"""Exact match: the strict reading of an answer, to log beside `accuracy`."""

from __future__ import annotations

import re

from .verifier.extraction import last_answer_tag


def exact_match(completion: str, answer: str) -> float:
    """1 if the whole content of the last `<answer>` tag is `answer`, letter for letter; else 0.

    Only white space and thousands commas are overlooked. With weight 0 it shows how much of `accuracy` comes from
    answers that had to be picked out of a sentence or worked out to be equal.
    """
    content = last_answer_tag(completion)
    return float(content is not None and _plain(content) == _plain(answer) != "")


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", " ".join(text.split()))
