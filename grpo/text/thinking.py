"""Which part of a completion is thought and which is answer, of a whole text or of one that is still being written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "think", "answer", "tag"]

_BEGINS: dict[str, Kind] = {"<think>": "think", "</think>": "text", "<answer>": "answer", "</answer>": "text"}
"""What follows each tag."""
_TAG = re.compile("|".join(_BEGINS))


@dataclass
class Reader:
    """Cuts a text into parts as it arrives: `think` and `answer` inside their tags, the tags themselves, and `text` elsewhere.

    For "<think>2+3", "=5</th" and "ink> 5" it gives (tag, "<think>"), (think, "2+3"), then (think, "=5"), then (tag, "</think>"),
    (text, " 5"): what may turn out to be a tag is held back until it is known.
    """

    kind: Kind = "text"  # of what comes next
    _held: str = ""

    def feed(self, text: str) -> Iterator[tuple[Kind, str]]:
        """The parts that are certain now."""
        text, self._held = self._held + text, ""
        start = 0
        for tag in _TAG.finditer(
            text
        ):  # looking for each tag by itself would read the rest of the text again and again
            if tag.start() > start:
                yield self.kind, text[start : tag.start()]
            yield "tag", tag[0]
            self.kind, start = _BEGINS[tag[0]], tag.end()
        end = len(text) - _begun_tag(text[start:])
        self._held = text[end:]
        if end > start:
            yield self.kind, text[start:end]

    def close(self) -> Iterator[tuple[Kind, str]]:
        """What was held back, once nothing more comes."""
        if self._held:
            yield self.kind, self._held
        self._held = ""


def parts(completion: str) -> list[tuple[Kind, str]]:
    """A whole completion, cut up; one whose thoughts begin in the prompt has a `</think>` without its opening tag."""
    opened, closed = completion.find("<think>"), completion.find("</think>")
    reader = Reader("think" if closed >= 0 and not 0 <= opened < closed else "text")
    return [*reader.feed(completion), *reader.close()]


def _begun_tag(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a tag."""
    longest = max(map(len, _BEGINS)) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(tag.startswith(text[-size:]) for tag in _BEGINS)), 0)
