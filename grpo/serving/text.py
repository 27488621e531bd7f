"""Tokens -> the text that a client sees, while they are drawn: characters of several tokens, stop texts, thoughts.

What a stream gives in pieces is, put together, what it would be whole, wherever the pieces were cut.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from grpo.rollout.stop_criteria import Ending
from grpo.turns.form import Unreadable, encodable, end_of_call, read_call

Part = Literal["reasoning", "content", "call"]
"""What a piece of text belongs to; that of a call is a whole one, as JSON in OpenAI's form."""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character whose last bytes are still to come reads as, for all of its bytes or for each."""


MOST_HELD = 256
"""Unfinished characters in a row that are waited with. More are none: a model in a loop draws thousands, and all of them would be
read again with each."""


class Detokenizer:
    """Gives the text of tokens as they come, and holds back what a next token may still change."""

    def __init__(self, ending: Ending) -> None:
        self._ending = ending
        self._tokens: list[int] = []
        self._start = 0  # tokens from here on are read together
        self._num_shown = 0  # characters of theirs that are written
        self._last = self._since = 0  # the newest two places up to which nothing was held back, the older one first
        self.text = ""  # written so far

    def feed(self, tokens: list[int]) -> str:
        """The text that is certain now."""
        self._tokens += tokens
        text = self._ending.text(self._tokens[self._start :])
        # all of them: of bytes that are tokens of their own, one that is not finished spoils those before (SentencePiece)
        certain = text.rstrip(UNFINISHED)
        if len(text) - len(certain) > MOST_HELD:
            certain = text
        new = certain[self._num_shown :]
        self._num_shown = max(self._num_shown, len(certain))
        if certain == text:  # what comes next needs only the newest tokens as context
            self._start, self._last, self._since = self._last, self._since, len(self._tokens)
            self._num_shown = len(self._ending.text(self._tokens[self._start :]))
        self.text += new
        return new

    def close(self) -> str:
        """The rest: what the tokens read as together goes for more than how they came."""
        whole = self._ending.text(self._tokens)
        if not whole.startswith(self.text):  # a tokenizer whose text of the beginning depends on the end
            rest = self._ending.text(self._tokens[self._start :])[self._num_shown :]  # what was held back
            self.text += rest
            return rest
        rest, self.text = whole[len(self.text) :], whole
        return rest


@dataclass
class StopFinder:
    """Cuts a text in pieces off where a stop text begins, and holds back what may become one.

    Of several stop texts the one that is complete first counts, as for the engine, which ends with the token that completes it.
    """

    stop: tuple[str, ...]
    found: str | None = None
    _held: str = ""

    def feed(self, piece: str) -> str:
        """What can be shown now; nothing after a stop text was found."""
        if not self.stop or self.found is not None:
            return "" if self.found is not None else piece
        text, self._held = self._held + piece, ""
        ends = [(place + len(stop), -len(stop)) for stop in self.stop if (place := text.find(stop)) >= 0]
        if ends:
            end, size = min(ends)
            self.found = text[end + size : end]
            return text[: end + size]
        size = begun(text, self.stop)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def close(self) -> str:
        held, self._held = self._held, ""
        return held


def begun(text: str, words: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of the words."""
    words = tuple(words)
    longest = min(max(map(len, words)) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(word.startswith(text[-n:]) for word in words)), 0)


@dataclass
class Thoughts:
    """Splits an answer in pieces into its thoughts and the rest; the tags of thoughts are in neither.

    A thought begins with `<think>`, or before the first token where the prompt ends with that tag, and ends with `</think>`.
    There is one: what comes behind it is content, whatever tags are in it. `<answer>` is content, too. White space in front of
    the opening tag is in neither.
    """

    thinks: bool = False
    has_thought: bool = False
    _held: str = ""
    _said: bool = False  # something else than white space

    def feed(self, piece: str) -> list[tuple[Part, str]]:
        """What is certain now."""
        text, self._held = self._held + piece, ""
        parts: list[tuple[Part, str]] = []
        while text and not self.has_thought:
            tag = "</think>" if self.thinks else "<think>"
            before, found, after = text.partition(tag)
            if not found:
                size = begun(text, [tag])
                before, self._held = text[: len(text) - size], text[len(text) - size :]
            if not self.thinks and not self._said:
                if not found and not before.strip():
                    before, self._held = "", before + self._held
                self._said, before = bool(before.strip()), before if before.strip() else ""
            parts.append(("reasoning" if self.thinks else "content", before))
            if found:
                self.has_thought, self.thinks = self.thinks, not self.thinks
            text = after
        parts.append(("content", text))
        return [(kind, part) for kind, part in parts if part]

    def close(self) -> list[tuple[Part, str]]:
        held, self._held = self._held, ""
        return [("reasoning" if self.thinks else "content", held)] if held else []


@dataclass
class Calls:
    """Takes the calls of tools out of the content of an answer in pieces, each as soon as it is closed.

    What stands between the tags and is no call stays content, with its tags, and so does one that is never closed. White space
    around calls is left out.

    Args:
        tags: around a call.
        most: calls; the rest of the content is left out once there are so many. None: any number.
        begun: what the prompt has already written of the answer.
    """

    tags: tuple[str, str]
    most: int | None = None
    begun: str = ""
    number: int = 0  # so far

    def __post_init__(self) -> None:
        self._held, self._is_open, self._blank = self.begun, False, ""
        self._is_behind_call = False
        self._num_searched = 0  # characters of an open call in which no tag closes it

    def feed(self, piece: str) -> list[tuple[Part, str]]:
        """What is certain now."""
        text, self._held = self._held + piece, ""
        parts: list[tuple[Part, str]] = []
        while text:
            if not self._is_open:
                before, found, text = text.partition(self.tags[0])
                size = 0 if found else begun(before, [self.tags[0]])
                parts += self._content(before[: len(before) - size])
                self._held = before[len(before) - size :]
                self._is_open, self._num_searched = bool(found), 0
            elif (end := end_of_call(text, self.tags[1], self._num_searched)) is not None:
                parts += self._closed(text[:end])
                self._is_open, text = False, text[end + len(self.tags[1]) :]
            else:
                if self.tags[1] in text[self._num_searched :]:
                    self._num_searched = text.rindex(self.tags[1]) + len(self.tags[1])
                self._held = text
                break
        return parts

    def close(self) -> list[tuple[Part, str]]:
        rest, self._held = self.tags[0] * self._is_open + self._held, ""
        parts = self._content(rest)
        if self._blank and not self.number:
            parts.append(("content", self._blank))
        return parts

    def _content(self, text: str) -> list[tuple[Part, str]]:
        """White space waits for what comes behind it."""
        text = self._blank + text
        if self._is_behind_call:
            text = text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if not shown or self._is_full:
            return []
        self._is_behind_call = False
        return [("content", shown)]

    def _closed(self, text: str) -> list[tuple[Part, str]]:
        if self._is_full:
            return []
        try:
            name, arguments = _call(text)
        except Unreadable:
            return self._content(text.join(self.tags))
        self._blank, self._is_behind_call = "", True
        call = {
            "index": self.number,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self.number += 1
        return [("call", json.dumps(call))]

    @property
    def _is_full(self) -> bool:
        return self.most is not None and self.number >= self.most


def _call(text: str) -> tuple[str, str]:
    """The name and the arguments of a call, these as JSON that any client reads.

    Python's own reader takes more than JSON has: NaN, and half a surrogate pair ("\\ud800"), which is no text in UTF-8.

    Raises:
        Unreadable: it is none.
    """
    name, arguments = read_call(text)
    if not name:
        raise Unreadable("a call has a name")
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the arguments are no JSON: {error}", name) from None
    return encodable(name), encodable(written)


@dataclass
class Answer:
    """One choice while it is written.

    Args:
        stop: texts that end it and are cut off.
        thinks: whether the prompt has opened a thought; None: a raw completion, in which nothing is a thought.
        calls: takes calls of tools out of it; None: there are no tools.
    """

    ending: Ending
    stop: tuple[str, ...] = ()
    thinks: bool | None = None
    calls: Calls | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.ending)
        self._finder = StopFinder(self.stop)
        self._thoughts = None if self.thinks is None else Thoughts(self.thinks)

    def feed(self, tokens: list[int], *, has_ended: bool, ignores_ends: bool = False) -> list[tuple[Part, str]]:
        """The pieces of text that came with these tokens. Sets `finish_reason` and cuts `tokens` off at the end."""
        if self.finish_reason is not None:
            return []
        visible = tokens
        self.tokens += tokens
        ends = self.ending.end_token_ids
        at_end = has_ended and not ignores_ends and bool(self.tokens) and self.tokens[-1] in ends
        if at_end:
            visible = tokens[:-1]
        shown = self._finder.feed(self._detokenizer.feed(visible))
        if has_ended and self._finder.found is None:
            shown += self._finder.feed(self._detokenizer.close())
        if self._finder.found is not None:
            self.finish_reason = "stop"
            self.tokens = self.tokens[: self._num_tokens_to_stop()]
        elif has_ended:
            self.finish_reason = "stop" if at_end else "length"
            shown += self._finder.close()
        if self._thoughts is None:
            return [("content", shown)] if shown else []
        parts = self._thoughts.feed(shown)
        if self.finish_reason is not None:
            parts += self._thoughts.close()
        return parts if self.calls is None else self._called(self.calls, parts)

    def _called(self, calls: Calls, parts: list[tuple[Part, str]]) -> list[tuple[Part, str]]:
        """The parts, with calls of their own. One that ends with calls says so."""
        found: list[tuple[Part, str]] = []
        for part, text in parts:
            found += calls.feed(text) if part == "content" else [(part, text)]
        if self.finish_reason is not None:
            found += calls.close()
            if calls.number and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return found

    def _num_tokens_to_stop(self) -> int:
        """As the engine counts: to the token that completes a stop text."""
        length, _ = Ending(self.ending.tokenizer, []).find(self.tokens, self.stop)
        return length
