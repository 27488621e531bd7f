"""The models that a server hosts: which ones, loaded side by side, and how a request becomes a prompt of one."""

from __future__ import annotations

import json
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from grpo.config import Config, DataConfig, ModelConfig
from grpo.data.prompts import TEMPLATES, chat_text, fill, prefill_of, time_limit, tokenize
from grpo.inference.model import load_model
from grpo.inference.options import served_models
from grpo.inference.resolve_model import Chosen, choose, num_positions
from grpo.policy.language_model import resolve_dtype
from grpo.policy.model_source import source_of
from grpo.policy.sampled_model import SampledModel
from grpo.policy.tokenizer import check_positions, load_tokenizer
from grpo.rollout.engine import cache_shape, make_decoder, unsupported
from grpo.rollout.layers import can_fuse
from grpo.rollout.paged import PAGE, PagedCache, num_pages_for
from grpo.rollout.slots import FEWEST_SEQUENCES
from grpo.rollout.stop_criteria import Ending
from grpo.serving.decoder import ServingDecoder
from grpo.serving.protocol import ApiError, CalledTool, Message
from grpo.serving.scheduler import Scheduler
from grpo.system.distributed import GIB
from grpo.system.out_of_memory import free_bytes, is_out_of_memory
from grpo.system.terminal import say
from grpo.turns.form import NoTools, form_of
from grpo.types import Sampling

LONGEST_CONTEXT = 32768
"""Tokens of a sequence by default, where the model knows more: a table of pages is kept for each slot."""

CACHE_SHARE = {"cuda": 0.8, "cpu": 0.25}
"""Of the memory that is free beside the weights, what keys and values may take of all models together."""


@dataclass(eq=False)
class Hosted:
    """A model, and how it is asked."""

    name: str
    model: SampledModel
    data: DataConfig
    sampling: Sampling  # where a request does not say
    scheduler: Scheduler
    max_context: int  # tokens of a prompt with its completion
    step: str | None = None  # of its run
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.ending = Ending(self.model.tokenizer, self.model.end_token_ids)
        self._lock = threading.Lock()  # a tokenizer is for one thread at a time
        vocabulary = self.model.tokenizer.get_vocab()
        self._longest_token = max(map(len, vocabulary), default=1)
        self._rows = self.model.lm.config.get_text_config().vocab_size
        self._token_bytes: dict[int, list[int]] = {}
        self._tags: dict[str, tuple[str, str]] = {}  # of calls, by the chat template

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @property
    def has_history(self) -> bool:
        """Whether a conversation can have several turns."""
        return TEMPLATES[self.data.template].is_chat

    def chat_prompt(
        self,
        messages: Sequence[Message],
        kwargs: dict[str, Any] | None,
        tools: Sequence[dict[str, Any]] = (),
        begun: str = "",
    ) -> tuple[list[int], bool]:
        """The tokens of a conversation, and whether the prompt opens a thought.

        Args:
            tools: that the model is told of.
            begun: how the answer has to begin.

        Raises:
            ApiError: the template does not take it, or it is too long.
        """
        turns = _turns(messages)
        self._check_text([*(turn["content"] for turn in turns), *map(json.dumps, tools)], "messages")
        data = self.data
        if kwargs:
            data = data.model_copy(update={"chat_template_kwargs": {**data.chat_template_kwargs, **kwargs}})
        if tools:
            data = data.with_tools(list(tools))
        try:
            text = self._conversation(turns, data) if self.has_history else self._question(turns, data)
        except ValueError as error:
            raise ApiError(str(error), param="messages") from None
        for number, turn in enumerate(turns):
            if turn["role"] == "tool" and not _is_told(turn["content"].strip(), text):
                raise ApiError(
                    f"messages.{number} is what a tool answered; the chat template of {self.name} leaves it out. Serve a model "
                    "whose template has tools.",
                    param=f"messages.{number}",
                )
        thinks = prefill_of(text).rstrip().endswith("<think>")
        if begun and thinks:
            raise ApiError(
                f"tool_choice asks for a call, and the chat template of {self.name} begins with a thought. Set it to auto, or "
                "switch thinking off with chat_template_kwargs.",
                param="tool_choice",
            )
        self._check_text([text], "messages")
        return self._tokens(text + begun, data, "messages"), thinks

    def call_tags(self) -> tuple[str, str]:
        """What stands around a call.

        Raises:
            ApiError: the template has no tools.
        """
        template = str(self.tokenizer.chat_template)
        if not self.has_history:
            why = f"it was trained in the template {self.data.template}, and only a chat template tells of them"
            raise ApiError(f"tools are given to {self.name}; {why}. Leave them out.", param="tools")
        if template not in self._tags:
            try:
                self._tags[template] = form_of(self.tokenizer, self.data).tags
            except NoTools as error:
                raise ApiError(
                    f"tools are given to {self.name}; its chat template {error.what}. Leave them out, or serve it with another "
                    "chat template (data.chat_template of a --config).",
                    param="tools",
                ) from None
        return self._tags[template]

    def _conversation(self, turns: list[dict[str, Any]], data: DataConfig) -> str:
        if data.system_prompt is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": data.system_prompt}, *turns]
        with time_limit(1):
            return chat_text(turns, self.tokenizer, data)

    def _question(self, turns: list[dict[str, Any]], data: DataConfig) -> str:
        if len(turns) > 1 or turns[0]["role"] != "user":
            roles = ", ".join(turn["role"] for turn in turns)
            raise ApiError(
                f"messages has the roles {roles}; {self.name} was trained in the template {data.template}, which has room for "
                "one question and no history. Send one message of the user.",
                param="messages",
            )
        if data.chat_template_kwargs:
            raise ApiError(
                f"chat_template_kwargs has no effect in the template {data.template}. Leave it out.",
                param="chat_template_kwargs",
            )
        return fill([turns[0]["content"]], self.tokenizer, data)[0]

    def raw_prompt(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a text that is to be continued.

        Raises:
            ApiError: it is too long, or has no tokens, or one that the model does not know.
        """
        if isinstance(prompt, str):
            self._check_text([prompt], "prompt")
            return self._tokens(prompt, self.data.model_copy(update={"template": "none"}), "prompt")
        return self._checked(prompt, "prompt")

    def _check_text(self, texts: list[str], param: str) -> None:
        size = sum(map(len, texts))
        if size > self._longest_token * self.max_context:  # which is told without reading it
            raise self._too_long(f"{size:,} characters", param)
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise ApiError(f"{param} has half of a surrogate pair, which is no text.", param=param) from None

    def _tokens(self, text: str, data: DataConfig, param: str) -> list[int]:
        with self._lock:
            (tokens,) = tokenize([text], self.tokenizer, data)
        return self._checked(tokens, param)

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise ApiError(f"{param} is empty: there is nothing to go on from.", param=param)
        if max(tokens) >= self._rows:
            raise ApiError(
                f"{param} has the token {max(tokens)}; {self.name} has embeddings for {self._rows}.", param=param
            )
        if len(tokens) >= self.max_context:
            raise self._too_long(f"{len(tokens):,} tokens", param)
        return tokens

    def _too_long(self, size: str, param: str) -> ApiError:
        return ApiError(
            f"{param} has {size}; {self.name} takes {self.max_context:,} tokens, the completion included. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )

    def token_limit(self, wanted: int | None, prompt: list[int]) -> int:
        """Of a completion: as a request says, or as the run has it and there is room for.

        Raises:
            ApiError: a request wants more than there is room for.
        """
        room = self.max_context - len(prompt)
        if wanted is not None and wanted > room:
            raise ApiError(
                f"max_tokens is {wanted}; with a prompt of {len(prompt):,} tokens {self.name} has room for {room:,} more. "
                f"Lower it.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(self.sampling.max_tokens, room) if wanted is None else wanted

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """A token alone as text and as bytes, which need not be whole characters."""
        text = self.ending.text([token])
        if token not in self._token_bytes:
            own = self.tokenizer.convert_ids_to_tokens(token)
            known = isinstance(own, str) and all(letter in BYTES for letter in own)
            self._token_bytes[token] = [BYTES[letter] for letter in own] if known else list(text.encode())
        return text, self._token_bytes[token]


def _is_told(result: str, prompt: str) -> bool:
    """Whether a prompt has a tool's result: as it is, or as a string of JSON, which Llama 3's template makes of it."""
    return any(
        each in prompt for each in (result, json.dumps(result, ensure_ascii=False)[1:-1], json.dumps(result)[1:-1])
    )


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: the arguments of a call are an object there, and its result has the name of the tool.

    Raises:
        ApiError: arguments are no JSON object, or a result belongs to no call.
    """
    turns: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the tool, by the id of a call
    for number, message in enumerate(messages):
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        turns.append({**turn, "content": message.text})
        if message.role == "assistant" and message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turns[-1]["tool_calls"] = [_called(call, number, place) for place, call in enumerate(message.tool_calls)]
        elif message.role == "tool":
            own = message.tool_call_id
            if own is not None and own not in names:
                raise ApiError(
                    f"messages.{number}.tool_call_id is {own[:100]!r}; no call before it has this id. Send the assistant's "
                    "message with its tool_calls, too.",
                    param=f"messages.{number}.tool_call_id",
                )
            if name := message.name or names.get(own or ""):
                turns[-1]["name"] = name
    return turns


def _called(call: CalledTool, number: int, place: int) -> dict[str, Any]:
    where = f"messages.{number}.tool_calls.{place}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(f"{where} is {call.function.arguments[:100]!r}; it is a JSON object. Correct it.", param=where)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _byte_letters() -> dict[str, int]:
    """How byte-level tokenizers write bytes: those that print as they are, the others from 256 on (GPT-2)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_letters()


# ---- loading ---------------------------------------------------------------------------------------------------------


def host(options: Namespace, stack: ExitStack) -> list[Hosted]:
    """Load what the options of `grpo serve` name, side by side.

    Args:
        stack: of what lasts as long as the models are asked.

    Raises:
        ValueError: there is no such model or step, or no memory for it.
    """
    named = list(_chosen(options))
    loaded = []
    for name, step, chosen in named:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_memory(chosen.model, device)
        say(f"loading {name}: {chosen.model.name}")
        tokenizer = load_tokenizer(chosen.model)
        data = chosen.data(tokenizer, options.template, options.system)
        try:
            model = load_model(_config(chosen.model), tokenizer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"--model is {options.model!r}; {name} does not fit in the memory beside what is there. Serve fewer --steps, or "
                "free memory."
            ) from None
        if reason := unsupported(model, fused=True):
            raise ValueError(f"--model is {options.model!r}; {reason}, so it cannot be served. Serve another model.")
        loaded.append((name, step, chosen, model, data))
    budget = free_bytes(loaded[0][3].processes.device) * CACHE_SHARE[device.type] / GIB
    gib = options.kv_cache_gib or budget / len(loaded)
    return [_hosted(*each, options=options, gib=gib, stack=stack) for each in loaded]


def _chosen(options: Namespace) -> Iterator[tuple[str, str | None, Chosen]]:
    """The name, the step and the model of each."""
    for name, step, asked in served_models(options):
        yield name, step, choose(asked)


def _config(model: ModelConfig) -> Config:
    return Config(model=model.model_dump(), run={"dir": "", "steps": 1})


def check_memory(model: ModelConfig, device: torch.device) -> None:
    """Raises ValueError if the weights of a directory are larger than the memory that is free: a CPU's would end the process."""
    folder = Path(source_of(model).base)
    if not folder.is_dir():
        return
    itemsize = resolve_dtype(model.dtype).itemsize
    needed = itemsize * sum(_num_weights(file) for file in folder.glob("*.safetensors"))
    if needed > (free := free_bytes(device)):
        raise ValueError(
            f"--model is {model.name!r}; its weights take {needed / GIB:.3g} GiB, and {free / GIB:.3g} GiB are free. Free "
            "memory, or serve a smaller model, or fewer --steps."
        )


def _num_weights(file: Path) -> int:
    with safe_open(file, "pt") as weights:
        return sum(torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys())  # noqa: SIM118


def _hosted(
    name: str,
    step: str | None,
    chosen: Chosen,
    model: SampledModel,
    data: DataConfig,
    *,
    options: Namespace,
    gib: float,
    stack: ExitStack,
) -> Hosted:
    lm = stack.enter_context(model.sampling_model("paged"))
    context = _context(chosen.model, model, options, gib)
    num_slots = options.max_sequences or (256 if model.processes.device.type == "cuda" else 32)
    try:
        decoder = make_decoder(
            lm,
            model.end_token_ids,
            num_slots=num_slots,
            pages_each=num_pages_for(context),
            gib=gib,
            fused=can_fuse(lm.config),
            kind=ServingDecoder,
        )
    except ValueError as error:
        text = str(error).replace("memory.kv_cache_gib", "--kv-cache-gib")
        raise ValueError(text.partition(" Set it")[0] + " Lower --max-context, or free memory.") from None
    decoder.check_weights()
    with torch.no_grad():
        if model.processes.device.type == "cuda":
            say(f"capturing the steps of {name}")
            for size in sorted({decoder._size(n) for n in range(1, num_slots + 1)}, reverse=True):
                decoder.warm_up(size)
    sampling = chosen.sampling
    say(
        f"{name}: template {data.template}, {context:,} tokens of context, {num_slots} sequences at once, "
        f"{decoder.cache.num_bytes / GIB:.3g} GiB for keys and values"
    )
    return Hosted(name, model, data, sampling, Scheduler(decoder), context, step)


def _context(model: ModelConfig, sampled: SampledModel, options: Namespace, gib: float) -> int:
    """Tokens of a sequence: as --max-context says, or what the model knows and there is memory for."""
    if options.max_context is not None:
        check_positions(model, options.max_context, said=f"--max-context is {options.max_context}; a sequence may have")
        return options.max_context
    shape, dtype = cache_shape(sampled.lm), next(sampled.lm.parameters()).dtype
    num_pages = int(gib * GIB / PagedCache.bytes_per_page(**shape, dtype=dtype)) - 1
    fits = num_pages // FEWEST_SEQUENCES * PAGE
    return max(PAGE, min(num_positions(model) or LONGEST_CONTEXT, LONGEST_CONTEXT, fits))


def warn(text: str) -> None:
    say(f"warning: {text}", file=sys.stderr)
