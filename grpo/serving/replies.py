"""What a generation looks like in OpenAI's forms: a chat's or a completion's, whole or chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from grpo.serving.generation import Generation, Piece
from grpo.serving.models import Hosted
from grpo.serving.scheduler import TopLogprobs


@dataclass
class ChatReply:
    """Of a chat.

    Args:
        num_top: alternatives to each token; None: no log-probabilities.
    """

    generation: Generation
    num_top: int | None
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    kind = "chat.completion"

    def first_chunks(self) -> list[dict[str, Any]]:
        return [
            self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self.generation.answers))
        ]

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """None if there is nothing to say yet."""
        delta = _of_parts(piece)
        if not delta and not piece.logprobs and piece.finish_reason is None:
            return None
        return self._chunk(piece.index, delta, piece)

    def _chunk(self, index: int, delta: dict[str, Any], piece: Piece | None = None) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": None if piece is None else self._logprobs(piece.logprobs),
            "finish_reason": None if piece is None else piece.finish_reason,
        }
        return self.envelope([choice], ".chunk")

    def envelope(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind + suffix,
            "created": self.created,
            "model": self.generation.hosted.name,
            "choices": choices,
        }

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The answer, of all pieces."""
        choices = []
        for index, answer in enumerate(self.generation.answers):
            own = [piece for piece in pieces if piece.index == index]
            found = _joined(own)
            calls = _calls(own)
            message = {
                "role": "assistant",
                "content": found.get("content", None if calls else ""),
                **({"tool_calls": [_without_index(call) for call in calls]} if calls else {}),
                "reasoning_content": found.get("reasoning_content"),
                "reasoning": found.get("reasoning_content"),
            }
            tops = [each for piece in own for each in piece.logprobs]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(tops),
                    "finish_reason": answer.finish_reason,
                }
            )
        return {**self.envelope(choices), "usage": self.generation.usage()}

    def _logprobs(self, tops: list[tuple[int, TopLogprobs]]) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        hosted = self.generation.hosted
        content = [
            {
                **_token(hosted, token, top.logprob),
                "top_logprobs": [
                    _token(hosted, *each)
                    for each in zip(top.top_tokens[: self.num_top], top.top_logprobs[: self.num_top], strict=True)
                ],
            }
            for token, top in tops
        ]
        return {"content": content, "refusal": None}


def _token(hosted: Hosted, token: int, logprob: float) -> dict[str, Any]:
    text, bytes_ = hosted.token_text(token)
    return {"token": text, "logprob": logprob, "bytes": bytes_}


def _of_parts(piece: Piece) -> dict[str, Any]:
    found: dict[str, Any] = {**_joined([piece])}
    if own := found.get("reasoning_content"):
        found["reasoning"] = own
    return found | ({"tool_calls": calls} if (calls := _calls([piece])) else {})


def _calls(pieces: list[Piece]) -> list[dict[str, Any]]:
    return [json.loads(text) for piece in pieces for part, text in piece.parts if part == "call"]


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    """As a whole message has it: in a stream, pieces of a call are told by its place."""
    return {name: value for name, value in call.items() if name != "index"}


def _joined(pieces: list[Piece]) -> dict[str, str]:
    """The text of each part that there is."""
    found: dict[str, str] = {}
    for piece in pieces:
        for part, text in piece.parts:
            if part == "call":
                continue
            name = "reasoning_content" if part == "reasoning" else "content"
            found[name] = found.get(name, "") + text
    return found


Tops = list[tuple[int, TopLogprobs | None]]
"""Tokens with their log-probabilities."""


@dataclass
class CompletionReply(ChatReply):
    """Of a raw completion.

    Args:
        echo: the prompts as text, where they are to stand in front.
        scores: of each prompt the log-probabilities of its tokens from the second on, where they are to be told.
    """

    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    echo: list[str] | None = None
    scores: list[list[TopLogprobs]] | None = None
    kind = "text_completion"

    def __post_init__(self) -> None:
        self._lens: dict[int, int] = {}  # characters of each choice that were sent with log-probabilities

    def _echo(self, index: int) -> str:
        return "" if self.echo is None else self.echo[index // self.generation.asked.num_choices]

    def _of_prompt(self, index: int) -> Tops:
        """The first token follows nothing, and has no log-probability."""
        if self.scores is None:
            return []
        number = index // self.generation.asked.num_choices
        return list(zip(self.generation.prompts[number], [None, *self.scores[number]], strict=True))

    def first_chunks(self) -> list[dict[str, Any]]:
        """What stands in front; of a choice that is nothing else, its end too."""
        return [
            self._text(index, self._echo(index), self._of_prompt(index), answer.finish_reason)
            for index, answer in enumerate(self.generation.answers)
            if self._echo(index) or answer.finish_reason
        ]

    def _chunk(self, index: int, delta: dict[str, Any], piece: Piece | None = None) -> dict[str, Any]:
        assert piece is not None, "the first chunks of a completion are its echo"
        return self._text(index, delta.get("content", ""), [*piece.logprobs], piece.finish_reason)

    def _text(self, index: int, text: str, tops: Tops, finish_reason: str | None) -> dict[str, Any]:
        return self.envelope([self._choice(index, text, tops, finish_reason)])

    def _choice(self, index: int, text: str, tops: Tops, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if self.num_top is None else self._listed(index, tops)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(self.generation.answers):
            own = [piece for piece in pieces if piece.index == index]
            tops = [*self._of_prompt(index), *(each for piece in own for each in piece.logprobs)]
            text = self._echo(index) + _joined(own).get("content", "")
            choices.append(self._choice(index, text, tops, answer.finish_reason))
        return {**self.envelope(choices), "usage": self.generation.usage()}

    def _listed(self, index: int, tops: Tops) -> dict[str, Any]:
        """In the older form of completions."""
        hosted, num_top = self.generation.hosted, self.num_top or 0
        place = self._lens.get(index, len(self._echo(index)) if self.scores is None else 0)
        tokens, offsets = [], []
        for token, _ in tops:
            text, _ = hosted.token_text(token)
            tokens.append(text)
            offsets.append(place)
            place += len(text)
        self._lens[index] = place
        alternatives = [None if top is None else _alternatives(hosted, top, num_top) for _, top in tops]
        return {
            "tokens": tokens,
            "token_logprobs": [None if top is None else top.logprob for _, top in tops],
            "top_logprobs": alternatives if num_top else None,
            "text_offset": offsets,
        }


def _alternatives(hosted: Hosted, top: TopLogprobs, number: int) -> dict[str, float]:
    """The likeliest first. Of tokens with the same text, such as parts of characters, the likeliest is told."""
    found: dict[str, float] = {}
    for token, logprob in zip(top.top_tokens[:number], top.top_logprobs[:number], strict=True):
        found.setdefault(hosted.token_text(token)[0], logprob)
    return found
