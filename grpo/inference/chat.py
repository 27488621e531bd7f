"""Talking to a model: one answer at a time, read while it is written."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from grpo.config import DataConfig
from grpo.data.prompts import chat_text, conversation, fill, prefill_of, time_limit, tokenize
from grpo.data.rows import as_asked
from grpo.inference.commands import HELP
from grpo.inference.options import check_number
from grpo.inference.resolve_model import said
from grpo.observe.display import STYLES
from grpo.policy.sampled_model import SampledModel
from grpo.rollout.hf import drawing_options, without_defaults
from grpo.system.terminal import is_text, printable
from grpo.text.thinking import Kind, Reader
from grpo.turns.form import CHAT_CALL, Appended, Unreadable, read_call
from grpo.turns.toolbox import States
from grpo.turns.use import Tools
from grpo.types import Sampling


class Answer:
    """One answer: iterating gives its text as it is sampled; leaving the iteration early stops the sampling."""

    def __init__(self, model: SampledModel, prompt: list[int], sampling: Sampling) -> None:
        self.text = ""  # so far
        self.prompt = prompt
        self.is_cut_off = False  # at sampling.max_tokens; known at the end
        self._model, self._sampling = model, sampling
        self.limit = sampling.max_tokens
        self._stop = threading.Event()
        self._streamer = _Streamer(model)
        self._error: BaseException | None = None

    def __iter__(self) -> Generator[str, None, None]:
        thread = threading.Thread(target=self._sample)
        thread.start()
        try:
            for piece in self._streamer:
                self.text += piece
                yield piece
        finally:
            self._stop.set()
            thread.join()
        if self._error is not None:
            raise self._error
        text_ends = any(stop in self.text for stop in self._sampling.stop)
        self.is_cut_off = not text_ends and not self._streamer.has_ended

    @property
    def tokens(self) -> list[int]:
        """Sampled so far, with the one that ends it."""
        return self._streamer.tokens

    def _sample(self) -> None:
        tokens = torch.tensor([self.prompt], device=self._model.processes.device)
        try:
            with self._model.sampling_model() as lm, without_defaults(lm):
                lm.generate(  # type: ignore[operator]
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=GenerationConfig(
                        **drawing_options(self._sampling),
                        max_new_tokens=self._sampling.max_tokens,
                        eos_token_id=self._model.end_token_ids,
                        pad_token_id=self._model.tokenizer.pad_token_id,
                        stop_strings=list(self._sampling.stop) or None,
                    ),
                    tokenizer=self._model.tokenizer,
                    stopping_criteria=StoppingCriteriaList([_Asked(self._stop)]),
                    streamer=self._streamer,
                )
        except BaseException as error:
            self._error = error
            self._streamer.end()


class _Streamer(TextIteratorStreamer):
    """Without the tokens that end a completion; other special tokens are text, such as `<think>` in some families."""

    def __init__(self, model: SampledModel) -> None:
        super().__init__(
            model.tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.has_ended = False
        self.tokens: list[int] = []
        self._ends = set(model.end_token_ids)

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens.append(int(value))
        if not self.next_tokens_are_prompt and value.item() in self._ends:
            self.has_ended = True
        else:
            super().put(value)


class _Asked(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class Interlude:
    """Calls at the end of an answer, what came of them, and the answer that goes on."""

    calls: list[str]
    results: Appended
    answer: Answer


@dataclass
class Conversation:
    """What was said, and how the next question becomes a prompt. Only the chat template has a history."""

    model: SampledModel
    data: DataConfig
    sampling: Sampling
    messages: list[dict[str, Any]] = field(default_factory=list)  # of the user, the assistant and tools
    tools: Tools | None = None

    def __post_init__(self) -> None:
        if self.tools is not None and self.tools.form is not None:
            self.data = self.tools.told(self.data)
            self.sampling = replace(self.sampling, stop=(*self.sampling.stop, *self.tools.form.stop))

    @property
    def remembers(self) -> bool:
        return self.data.template == "chat"

    def prompt(self, question: str) -> str:
        question = as_asked(question, self.data)
        if not self.remembers:
            return fill([question], self.model.tokenizer, self.data)[0]
        first, *rest = conversation(question, self.data)
        messages = [first, *self.messages, *rest] if rest else [*self.messages, first]
        with time_limit(1):
            return chat_text(messages, self.model.tokenizer, self.data)

    def ask(self, question: str) -> Answer:
        """
        Raises:
            ValueError: the question is no text, or the model does not know as many positions as prompt and answer may take.
        """
        if not is_text(question):
            raise ValueError(f"the question is {question!r}; it has bytes that are no UTF-8. Type it again.")
        text = self.prompt(question)
        (tokens,) = tokenize([text], self.model.tokenizer, self.data)
        if max(tokens) >= self.model.lm.config.get_text_config().vocab_size:
            raise ValueError("the question has tokens for which the model has no embedding. Ask it in other words.")
        limit = getattr(self.model.lm.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(tokens) + self.sampling.max_tokens > limit:
            raise ValueError(
                f"--max-tokens is {self.sampling.max_tokens}; the conversation has {len(tokens)} tokens with this question, and "
                f"the model knows {limit} positions. Forget the conversation (/reset), or lower --max-tokens."
            )
        return Answer(self.model, tokens, self.sampling)

    def after_tools(self, answer: Answer, states: States, num_calls: int) -> Interlude | None:
        """What the tools say to the calls that an answer ends with, and the answer that goes on; None if it ends here.

        Args:
            states: the objects of the tools, which change.
            num_calls: of the answer so far.

        Raises:
            RunError: a tool cannot be used.
        """
        if self.tools is None or self.tools.form is None or answer.is_cut_off:
            return None
        calls = self.tools.form.calls(answer.text, answer.tokens)
        if not calls or num_calls + len(calls) > self.tools.limits.max_calls:
            return None
        said_ = [each.text for each in self.tools.toolbox.answers(calls, states)]
        results = self.tools.form.results(said_, self.model.tokenizer, most=self.tools.limits.max_result_tokens)
        left = answer.limit - len(answer.tokens) - len(results.token_ids)
        if left < 1:
            return None
        prompt = [*answer.prompt, *answer.tokens, *results.token_ids]
        return Interlude(calls, results, Answer(self.model, prompt, replace(self.sampling, max_tokens=left)))

    def remember(self, question: str, answer: str, before: Sequence[tuple[str, Interlude]] = ()) -> None:
        """Add a turn, of the answer what stands behind its thoughts, as the models' own chat templates have it.

        Of an answer that ended within its thoughts that is nothing.

        Args:
            before: what was written before calls of tools, each with these and what came back.
        """
        if not self.remembers:
            return
        opened = _opens_thought(self.prompt(question))
        self.messages.append({"role": "user", "content": as_asked(question, self.data)})
        for words, interlude in before:
            said_ = _without_thoughts(words.partition(CHAT_CALL[0])[0], opened)
            self.messages += [_calling(said_, interlude.calls), *_answering(interlude)]
            opened = words.rfind("<think>") > words.rfind("</think>") or (opened and "</think>" not in words)
        self.messages.append({"role": "assistant", "content": _without_thoughts(answer, opened)})

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash, but for /quit; what to say to it.

        Raises:
            ValueError: there is no such command, or it cannot be done.
        """
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/reset":
                self.messages = []
                return (
                    "forgotten" if self.remembers else f"with the template {self.data.template} nothing is remembered"
                )
            case "/system":
                return self._set_system(argument)
            case "/temperature":
                return self._set_temperature(argument)
            case "/help":
                return HELP
        raise ValueError(
            f"{name} is no command; there are /reset, /system, /temperature, /help and /quit. Type one of them."
        )

    def _set_system(self, text: str) -> str:
        if not self.remembers:
            raise ValueError(
                f"/system is {text!r} with the template {self.data.template}; only the chat template has a system message. "
                "Start with --template chat."
            )
        self.data, self.messages = self.data.model_copy(update={"system_prompt": text or None}), []
        return "set; the conversation starts anew"

    def _set_temperature(self, text: str) -> str:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"/temperature is {text!r}; it is a number. Type /temperature 0.6, say.") from None
        check_number("temperature", value, prefix="/")
        self.sampling = replace(self.sampling, temperature=value)
        return said(self.sampling)


def show(conversation: Conversation, question: str, terminal: Console) -> None:
    """Ask, and print the answer while it is written. Ctrl-C ends the answer.

    Raises:
        ValueError: see Conversation.ask.
    """
    answer, note = conversation.ask(question), ""
    starts_in_thought = _opens_thought(conversation.prompt(question))
    states: States = {}
    num_calls = 0
    before: list[tuple[str, Interlude]] = []
    try:
        with closing(iter(answer)) as pieces:
            write(pieces, terminal, starts_in_thought=starts_in_thought)
        while (after := conversation.after_tools(answer, states, num_calls)) is not None:
            before.append((answer.text, after))
            num_calls += len(after.calls)
            answer = after.answer
            terminal.print(Text(printable(after.results.text), style="cyan"), end="")
            with closing(iter(answer)) as pieces:
                write(pieces, terminal, starts_in_thought=False, goes_on=True)
    except KeyboardInterrupt:
        note = " (stopped)"
    if answer.is_cut_off:
        note = f" (cut off at {conversation.sampling.max_tokens} tokens)"
    terminal.print(Text.assemble((note, "yellow")))
    conversation.remember(question, answer.text, before)


def _without_thoughts(words: str, opened: bool) -> str:
    """
    Args:
        opened: the prompt ends within a thought.
    """
    thinks = "<think>" in words or opened
    return "" if thinks and "</think>" not in words else words.rpartition("</think>")[2].strip()


def _calling(words: str, calls: list[str]) -> dict[str, Any]:
    """The assistant's message before calls; one that nobody could read stands in it as it was written."""
    made = []
    for text in calls:
        try:
            name, arguments = read_call(text)
            made.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        except Unreadable:
            words = f"{words}\n{CHAT_CALL[0]}{text}{CHAT_CALL[1]}".strip()
    return {"role": "assistant", "content": words, **({"tool_calls": made} if made else {})}


def _answering(interlude: Interlude) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": said_} for said_ in interlude.results.said]


def _opens_thought(prompt: str) -> bool:
    return prefill_of(prompt).rstrip().endswith("<think>")


def write(pieces: Iterable[str], terminal: Console, *, starts_in_thought: bool, goes_on: bool = False) -> None:
    """Print a text as it comes: thoughts dimmed, and tags too; without white space in front, unless it goes on behind another."""
    reader, is_spare = Reader("think" if starts_in_thought else "text"), not goes_on
    try:
        for piece in pieces:
            shown = piece.lstrip() if is_spare else piece
            is_spare = is_spare and not shown
            _print(terminal, reader.feed(shown))
    finally:
        _print(terminal, reader.close())


def _print(terminal: Console, found: Iterable[tuple[Kind, str]]) -> None:
    for kind, text in found:
        terminal.print(Text.assemble((printable(text), STYLES[kind])), end="")
