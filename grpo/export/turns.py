"""The turns of a chat template, found by rendering it: what stands before, between and after the messages.

A template is a program; what other programs want is the text around a message. Conversations of marked messages are rendered, and
the text between the marks is what the template adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import jinja2
from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.data.prompts import chat_text

SYSTEM, USER, ASSISTANT, LAST = "⟦system⟧", "⟦user⟧", "⟦assistant⟧", "⟦last⟧"


@dataclass(frozen=True)
class Turns:
    """A conversation is `start` (or `before_system`, a system message and `after_system`), then its turns, then `prompt`."""

    start: str  # without a system message
    before_system: str | None  # None: the template has no place for one
    after_system: str
    before_user: str
    after_user: str
    before_assistant: str
    after_assistant: str  # not after the last message
    prompt: str  # after the last question: what opens the answer

    def fill(self, messages: list[dict[str, str]]) -> str:
        """A conversation, as the template would write it, for which an answer is wanted."""
        text, turns = self.start, messages
        if messages[0]["role"] == "system":
            assert self.before_system is not None, "a conversation without a place for its system message"
            text, turns = self.before_system + messages[0]["content"] + self.after_system, messages[1:]
        for message in turns:
            if message["role"] == "user":
                text += self.before_user + message["content"] + self.after_user
            else:
                text += self.before_assistant + message["content"] + self.after_assistant
        return text + self.prompt


def turns_of(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Turns | None:
    """None if what the template writes is not that of turns, one after another.

    Args: data: with the arguments that the run gave its template.
    """
    user, answer, last = (
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ASSISTANT},
        {"role": "user", "content": LAST},
    )
    plain = _between(tokenizer, data, [user, answer, last], (USER, ASSISTANT, LAST))
    system = _between(
        tokenizer, data, [{"role": "system", "content": SYSTEM}, user, answer, last], (SYSTEM, USER, ASSISTANT, LAST)
    )
    if plain is None:
        return None
    first, to_answer, to_question, end = plain
    opening = [first, to_question] if system is None else [first, to_question, system[1]]
    before_user = common_beginning([text[::-1] for text in opening])[::-1]
    after_user = common_beginning([to_answer, end])

    def without(text: str) -> str:
        return text[: len(text) - len(before_user)]

    found = Turns(
        start=without(first),
        before_system=None if system is None else system[0],
        after_system="" if system is None else without(system[1]),
        before_user=before_user,
        after_user=after_user,
        before_assistant=to_answer[len(after_user) :],
        after_assistant=without(to_question),
        prompt=end[len(after_user) :],
    )
    for length in (1, 3, 5):
        asked = [{"role": "assistant" if n % 2 else "user", "content": f"Message {n}."} for n in range(length)]
        if found.fill(asked) != chat_text(asked, tokenizer, data):
            return None
    return found


def common_beginning(texts: Sequence[str]) -> str:
    """The longest text that all of them begin with."""
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in same)


def _between(
    tokenizer: PreTrainedTokenizerBase, data: DataConfig, messages: list[dict[str, str]], marks: tuple[str, ...]
) -> list[str] | None:
    """The text before, between and after the marks; None if the template refuses the conversation or leaves one out."""
    try:
        rest = chat_text(messages, tokenizer, data)
    except (ValueError, jinja2.TemplateError):
        return None
    parts = []
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        before, _, rest = rest.partition(mark)
        parts.append(before)
    return [*parts, rest]
