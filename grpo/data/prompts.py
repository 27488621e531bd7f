"""Rows -> Prompts: fill the template, and filter.

A prompt ends where the model is to go on. Two things in a tokenizer's files break that without a word, and are mended here: a
tokenizer that appends an end-of-sequence token to every text, and a chat template that does not open the assistant's turn. What
still ends with such a token is refused. What a prompt ends with and is already part of the answer, as `<think>` is, is the
prompt's prefill, whatever template wrote it.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.data.chat_template import SYNTAX, read_chat_template
from grpo.data.rows import MESSAGES
from grpo.policy.tokenizer import END_TOKENS
from grpo.system import progress
from grpo.types import Prompt

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question} Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948v1), table 1, word for word: raw text for a base model, no chat template."""


Message = dict[str, str]
Question = str | list[Message]
"""A conversation is for the template `chat` alone."""


@dataclass(frozen=True)
class Template:
    """`fill(question, tokenizer, data)` is the prompt as text."""

    fill: Callable[[Any, PreTrainedTokenizerBase, DataConfig], str]
    is_chat: bool = False  # its text has the tokenizer's special tokens already, and its prompts are conversations


def _chat(question: Question, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    return chat_text(conversation(question, data), tokenizer, data)


TOOLS = (
    "The assistant may call tools while it thinks, each with one line of JSON, "
    '<tool>{{"name": ..., "arguments": {{...}}}}</tool>, and then reads what the tool answers between <result> and </result>. '
    "The tools are: {tools}. "
)
"""What the paper's template says of tools, before the question."""


def _r1_zero(question: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    told = TOOLS.format(tools="; ".join(map(_signature, data.tools))) if data.tools else ""
    return R1_ZERO.replace("User: {question}", told + "User: {question}").replace("{question}", question)


def _signature(schema: Mapping[str, Any]) -> str:
    """calculator(expression: string), which computes an expression, where expression is ..."""
    function = schema["function"]
    properties = function["parameters"]["properties"]
    types = ", ".join(f"{name}: {each.get('type', 'any')}" for name, each in properties.items())
    meanings = "".join(
        f" {name}: {each['description']}" for name, each in properties.items() if each.get("description")
    )
    return f"{function['name']}({types}): {function['description']}{meanings}"


TEMPLATES: dict[str, Template] = {
    "r1_zero": Template(_r1_zero),
    "r1_zero_think": Template(lambda *given: _r1_zero(*given) + " <think>"),
    "chat": Template(_chat, is_chat=True),
    "none": Template(lambda question, *_: question),
}

PREFILL = re.compile(r"<think>(\s*</think>)?\s*\Z")
"""The beginning of an answer at the end of a prompt: an open thought, or an empty one where thinking is switched off."""


def prefill_of(prompt: str) -> str:
    """The end of a prompt that already belongs to the answer; often empty."""
    found = PREFILL.search(prompt)
    return "" if found is None else found[0]


# ---- chat templates --------------------------------------------------------------------------------------------------


TEMPLATE_SECONDS = 10.0
"""A chat template may take so long, and PROMPT_SECONDS more for each prompt; a thousandth of a second is usual."""
PROMPT_SECONDS = 0.05


def use_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Give the tokenizer the chat template of `data.chat_template`, which is then saved with it.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is not valid Jinja.
    """
    if data.chat_template is None:
        return
    tokenizer.chat_template = read_chat_template(data.chat_template)


def conversation(question: Question, data: DataConfig) -> list[Message]:
    """What the chat template is given of a question.

    Raises:
        ValueError: a conversation has a system message beside data.system_prompt.
    """
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if system and turns[0]["role"] == "system":
        raise ValueError(
            f"data.system_prompt is {data.system_prompt!r}; the conversation that ends with {turns[-1]['content'][:80]!r} has a "
            "system message of its own. Remove data.system_prompt, or the message."
        )
    return [*system, *turns]


def question_of(row: Mapping[str, Any], config: DataConfig) -> Question:
    """A row's question as its template takes it: only chat templates have room for several turns.

    Raises:
        ValueError: the question is a conversation, and the template is none.
    """
    turns = row.get(MESSAGES)
    if not turns or (len(turns) == 1 and not TEMPLATES[config.template].is_chat):
        return str(row["question"])
    if not TEMPLATES[config.template].is_chat:
        raise ValueError(
            f"data.template is {config.template!r}; the question {row['question'][:80]!r} is a conversation of {len(turns)} "
            "messages, and this template has room for one. Set data.template to chat, or data.question_column to one message: "
            "messages.0.content."
        )
    return list(turns)


def chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """A conversation in the tokenizer's chat template, up to where the assistant is to speak.

    Raises:
        ValueError: there is no template, or it fails, or leaves out the system message.
    """
    text = render(messages, tokenizer, data, add_generation_prompt=True)
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise ValueError(
            f"{'data.system_prompt' if data.system_prompt is not None else 'the system message of a conversation'} is "
            f"{messages[0]['content']!r}; the tokenizer's chat template leaves it out. {_other_place(data)}, or name a file with "
            "another chat template (data.chat_template)."
        )
    if "add_generation_prompt" not in str(tokenizer.get_chat_template()):
        text += _opening(messages, text, tokenizer, data)
    return text


_REPLY = "a reply"


def _opening(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """What a chat template that does not know `add_generation_prompt` writes between a question and its answer."""
    reply = {"role": "assistant", "content": _REPLY}
    try:
        whole = render([*messages, reply], tokenizer, data, add_generation_prompt=False)
    except ValueError:  # one that has no answers in it
        return ""
    between, found, _ = whole.removeprefix(text).rpartition(_REPLY)
    return between.rstrip(" ") if found and whole.startswith(text) else ""


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, add_generation_prompt: bool
) -> str:
    """A conversation in the tokenizer's chat template. Raises ValueError if the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=[*data.tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **data.chat_template_kwargs,
            )
        )
    except Exception as error:  # a template is a program, and whatever it raises says what is wrong with it
        roles = ", ".join(message["role"] for message in messages)
        is_system = len(messages) > 1 and messages[0]["role"] == "system" and _takes(messages[1:], tokenizer, data)
        remedy = f"{_other_place(data)}, or name" if is_system else "Name"
        raise ValueError(
            f"data.template is 'chat'; the tokenizer's chat template refuses a conversation of the roles {roles}: "
            f"{type(error).__name__}: {error}. {remedy} a file with another chat template (data.chat_template)."
        ) from None


def _other_place(data: DataConfig) -> str:
    """Where a system message may stand that a chat template does not take."""
    if data.system_prompt is not None:
        return "Remove data.system_prompt and say it in data.question_template"
    return "Say it in the first message of the user"


def _takes(messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> bool:
    try:
        render(messages, tokenizer, data, add_generation_prompt=True)
    except ValueError:
        return False
    return True


def check_chat(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Raises ValueError: there is no chat template, or it has no use for one of `data.chat_template_kwargs`."""
    if not tokenizer.chat_template:
        raise ValueError(
            "data.template is 'chat'; the tokenizer of this model has no chat template. Set data.template to r1_zero, or name a "
            "file with one (data.chat_template)."
        )
    known = _arguments(tokenizer) if data.chat_template_kwargs else set()
    for name, value in data.chat_template_kwargs.items():
        if known is not None and name not in known:
            raise ValueError(
                f"data.chat_template_kwargs.{name} is {value!r}; the chat template does not read it. It reads "
                f"{', '.join(sorted(known - GIVEN)) or 'no arguments'}. Remove it, or correct the name."
            )


GIVEN = {
    "messages",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    "bos_token",
    "eos_token",
    "tools",
    "documents",
}
"""What transformers itself gives a chat template."""


def _arguments(tokenizer: PreTrainedTokenizerBase) -> set[str] | None:
    """Names that a chat template reads and does not set; None if that cannot be told."""
    try:
        return jinja2.meta.find_undeclared_variables(SYNTAX.parse(str(tokenizer.get_chat_template())))
    except jinja2.TemplateError:
        return None


class _TooLong(BaseException):
    """Not an Exception: a template's own handlers must not catch it."""


@contextmanager
def time_limit(num_prompts: int) -> Iterator[None]:
    """Break off a chat template whose loops do not end, in this thread, whichever it is.

    Raises:
        ValueError: it took too long for so many prompts.
    """
    thread, seconds = threading.get_ident(), TEMPLATE_SECONDS + PROMPT_SECONDS * num_prompts

    def interrupt() -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
        timer.cancel()
        timer.join()  # if it is interrupting, that comes to be before this ends
    except _TooLong:
        raise ValueError(
            f"data.template is 'chat'; the tokenizer's chat template has not ended within {seconds:g} seconds. Name a file with "
            "another chat template (data.chat_template)."
        ) from None
    finally:
        timer.cancel()


# ---- rows ------------------------------------------------------------------------------------------------------------


@progress.busy("making prompts")
def build_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[Prompt], Counter[str]]:
    """Prompts in the order of `rows`, and how many rows were dropped for which reason.

    Raises:
        ValueError: no row is left, a prompt has no tokens, or the chat template fails.
    """
    template = TEMPLATES[config.template]
    questions = [question_of(row, config) for row in rows]
    texts = fill(questions, tokenizer, config)
    ids = tokenize(texts, tokenizer, config)
    ends = end_tokens(tokenizer)
    prompts, dropped = [], Counter[str]()
    too_long = f"prompt longer than data.max_prompt_tokens ({config.max_prompt_tokens})"
    for number, (row, text, token_ids) in enumerate(zip(rows, texts, ids, strict=True)):
        if not token_ids:  # seen with tokenizer files that transformers reads as another family's
            raise ValueError(
                f"data.template is {config.template!r}; {type(tokenizer).__name__} turns the prompt {text[:80]!r} into no tokens "
                "at all. If the question is not empty, the tokenizer does not load as it was saved; check model.name."
            )
        if text.rstrip().endswith(ends) or token_ids[-1] == tokenizer.eos_token_id:  # a text or a turn
            dropped[ENDED] += 1
        elif len(token_ids) > config.max_prompt_tokens:
            dropped[too_long] += 1
        else:
            messages = conversation(questions[number], config) if template.is_chat else None
            kind = kind_of(row, config)
            prompts.append(Prompt(number, token_ids, text, prefill_of(text), row, messages=messages, kind=kind))
    if not prompts and dropped[ENDED]:
        chat, raw = "Name a file with another chat template (data.chat_template)", "Remove it from the questions"
        raise ValueError(
            f"data.template is {config.template!r}; {dropped[ENDED]} of {len(rows)} prompts end with an end-of-sequence token, "
            f"so the model would have nothing to say; the first: {texts[0][-200:]!r}. {chat if template.is_chat else raw}."
        )
    if not prompts:
        shortest = min(map(len, ids))
        raise ValueError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}; the shortest of {len(rows)} prompts has {shortest} "
            f"tokens, so none is left. Set data.max_prompt_tokens >= {shortest}."
        )
    return prompts, dropped


def kind_of(row: Mapping[str, Any], config: DataConfig) -> str | None:
    """What data.kind_column says of a row; None if it says nothing."""
    kind = None if config.kind_column is None else row.get(config.kind_column)
    return None if kind is None else str(kind)


MOST_KINDS = 32
"""Of questions. Each has metrics of its own."""


def check_kinds(rows: Sequence[Mapping[str, Any]], config: DataConfig) -> None:
    """Raises ValueError: no question has `data.kind_column`, or they are of too many kinds, or one cannot be a name."""
    if config.kind_column is None:
        return
    kinds = sorted({kind for row in rows if (kind := kind_of(row, config)) is not None})
    if not kinds:
        raise ValueError(
            f"data.kind_column is {config.kind_column!r}; not one training question has something in it. The columns are "
            f"{', '.join(rows[0])}. Name one of them, or remove data.kind_column."
        )
    if len(kinds) > MOST_KINDS:
        raise ValueError(
            f"data.kind_column is {config.kind_column!r}; the questions are of {len(kinds):,} kinds, such as {kinds[0][:40]!r}, "
            f"and each would have metrics of its own. Name a column of at most {MOST_KINDS} values."
        )
    for kind in kinds:
        if not kind.isprintable() or kind != kind.strip() or not kind:
            raise ValueError(
                f"data.kind_column is {config.kind_column!r}; a question is of the kind {kind!r}, which cannot be part of a "
                "metric's name. Let it have letters and other visible signs."
            )


ENDED = "prompt ends with an end-of-sequence token"


def fill(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[str]:
    """The prompts of questions as text.

    Raises:
        ValueError: the chat template fails, or does not end.
    """
    template = TEMPLATES[config.template]
    if template.is_chat:
        check_chat(tokenizer, config)
    with time_limit(len(questions)):
        return [template.fill(question, tokenizer, config) for question in questions]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[list[int]]:
    """Prompts as token ids, without what the tokenizer appends to a text: a prompt goes on."""
    own_tokens = TEMPLATES[config.template].is_chat
    appended = [] if own_tokens else _appended(tokenizer)
    ids = token_ids(texts, tokenizer, add_special_tokens=not own_tokens)
    return [each[: len(each) - len(appended)] if appended else each for each in ids]


TOKENIZED_AT_ONCE = 1000
"""Texts; what a tokenizer returns of each token (its text, its place, masks) takes some twenty times the room of its id."""


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> Iterator[list[int]]:
    """The tokens of each text, in order; of any number of texts, no more than their ids are ever in memory."""
    for start in range(0, len(texts), TOKENIZED_AT_ONCE):
        part = list(texts[start : start + TOKENIZED_AT_ONCE])
        yield from tokenizer(part, add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]


def _appended(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts behind every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[start + len(plain) :])
    return []


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that end a text or a turn. To be asked once for many texts: a tokenizer collects its special tokens anew each
    time."""
    special = set(tokenizer.all_special_tokens)
    return tuple({str(token) for token in (tokenizer.eos_token, *special.intersection(END_TOKENS)) if token})
