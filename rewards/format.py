"""Format: did the model think inside `<think>` and answer inside `<answer>`?"""

from __future__ import annotations

import unicodedata

_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that show nothing
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format(completion: str) -> float:
    """1 if the whole completion is `<think>...</think> <answer>...</answer>`, else 0 (DeepSeek-R1, section 2.2).

    Each tag occurs once, both contents hold something that can be seen, and nothing but white space stands outside of them.
    A `<think>` that the prompt already ends with has to be part of `completion`.
    """
    text = completion.strip()
    places = [text.find(tag) for tag in _TAGS]
    if places != sorted(places) or any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    before, thought, between, answer, after = _split_at_tags(text)
    return float(bool(thought and answer) and not (before or between or after))


def explain_format(completion: str) -> str:
    """The first thing that is wrong, in words."""
    text = completion.strip()
    for tag in _TAGS:
        if text.count(tag) != 1:
            return f"{tag} occurs {text.count(tag)} times" if tag in text else f"{tag} is missing"
    places = [text.find(tag) for tag in _TAGS]
    if places != sorted(places):
        return "the tags are out of order"
    before, thought, between, answer, after = _split_at_tags(text)
    empty = "thought" if not thought else "" if answer else "answer"
    if empty:
        return f"the {empty} is empty"
    outside = before or between or after
    return f"{outside[:40]!r} stands outside of the tags" if outside else "well-formed"


format.explain = explain_format  # type: ignore[attr-defined]


def _split_at_tags(text: str) -> list[str]:
    """The five stretches before, between and after the four tags, stripped; a content that shows nothing is empty."""
    stretches = []
    for tag in _TAGS:
        stretch, _, text = text.partition(tag)
        stretches.append(stretch.strip())
    before, thought, between, answer = stretches
    return [before, _visible(thought), between, _visible(answer), text.strip()]


def _visible(text: str) -> str:
    """The text, or nothing if it holds only spaces, controls, marks and characters of no width."""
    return text if any(unicodedata.category(c)[0] in "LNPS" and c not in _BLANKS for c in text) else ""
