"""Data set rows -> Prompts: load, fill the template, filter, and serve in a resumable order.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import torch
from transformers import PreTrainedTokenizerBase

from grpo.config import COLUMN_IN_BRACES, TASK_PREFIX, DataConfig
from grpo.gym import make_rows
from grpo.policy import END_TOKENS
from grpo.types import Prompt

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question} Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948v1), table 1, word for word: raw text for a base model, no chat template."""


Message = dict[str, str]


@dataclass(frozen=True)
class Template:
    """`fill(question, tokenizer, data)` is the prompt as text."""

    fill: Callable[[str, PreTrainedTokenizerBase, DataConfig], str]
    is_chat: bool = False  # its text has the tokenizer's special tokens already, and its prompts are conversations


def _chat(question: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    return chat_text(conversation(question, data), tokenizer, data)


TEMPLATES: dict[str, Template] = {
    "r1_zero": Template(lambda question, *_: R1_ZERO.replace("{question}", question)),
    "r1_zero_think": Template(lambda question, *_: R1_ZERO.replace("{question}", question) + " <think>"),
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
        ValueError: there is no such file.
    """
    if data.chat_template is None:
        return
    path = Path(data.chat_template)
    if not path.is_file():
        raise ValueError(
            f"data.chat_template is {data.chat_template!r}; there is no file {path.resolve()}. Name a file with the Jinja text "
            "of a chat template."
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def conversation(question: str, data: DataConfig) -> list[Message]:
    """What the chat template is given of a question."""
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    return [*system, {"role": "user", "content": question}]


def chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """A conversation in the tokenizer's chat template, up to where the assistant is to speak.

    Raises:
        ValueError: there is no template, or it fails, or leaves out the system message.
    """
    text = _render(messages, tokenizer, data, add_generation_prompt=True)
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise ValueError(
            f"data.system_prompt is {messages[0]['content']!r}; the tokenizer's chat template leaves it out. Say it in "
            "data.question_template, or name a file with another chat template (data.chat_template)."
        )
    if "add_generation_prompt" not in str(tokenizer.get_chat_template()):
        text += _opening(messages, text, tokenizer, data)
    return text


_REPLY = "a reply"


def _opening(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    """What a chat template that does not know `add_generation_prompt` writes between a question and its answer."""
    reply = {"role": "assistant", "content": _REPLY}
    try:
        whole = _render([*messages, reply], tokenizer, data, add_generation_prompt=False)
    except ValueError:  # one that has no answers in it
        return ""
    between, found, _ = whole.removeprefix(text).rpartition(_REPLY)
    return between.rstrip(" ") if found and whole.startswith(text) else ""


def _render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, add_generation_prompt: bool
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **data.chat_template_kwargs
            )
        )
    except Exception as error:  # a template is a program, and whatever it raises says what is wrong with it
        roles = ", ".join(message["role"] for message in messages)
        remedy = (
            "Remove data.system_prompt and say it in data.question_template, or name"
            if messages[0]["role"] == "system" and _takes(messages[1:], tokenizer, data)
            else "Name"
        )
        raise ValueError(
            f"data.template is 'chat'; the tokenizer's chat template refuses a conversation of the roles {roles}: "
            f"{type(error).__name__}: {error}. {remedy} a file with another chat template (data.chat_template)."
        ) from None


def _takes(messages: list[Message], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> bool:
    try:
        _render(messages, tokenizer, data, add_generation_prompt=True)
    except ValueError:
        return False
    return True


def _check_chat(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
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
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
        return jinja2.meta.find_undeclared_variables(environment.parse(str(tokenizer.get_chat_template())))
    except jinja2.TemplateError:  # transformers adds a tag of its own
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


def load_rows(config: DataConfig, *, evaluation: bool = False) -> list[dict[str, Any]]:
    """Rows of the training or the evaluation set, each with `question` and `answer` among its columns.

    Raises:
        ValueError: no such data set, a column is missing, or `answer_regex` does not match an answer.
    """
    setting, name = "data.name", config.name
    if evaluation and config.eval_name is not None:
        setting, name = "data.eval_name", config.eval_name
    elif evaluation and (name is None or Path(name).is_file()):
        raise ValueError(
            f"data.eval_name is missing; the training questions ({name or 'given as train_dataset'}) have no held-out split "
            "of their own. Set data.eval_name, pass eval_dataset to Trainer, or set evaluation.num_questions to 0."
        )
    if name is not None and name.startswith(TASK_PREFIX):
        rows = make_rows(name, config.args, held_out=evaluation)
        return prepare_rows(rows, config, answer_regex=config.answer_regex, setting=setting)
    if name is None:
        raise ValueError(
            "data.name is missing; a run needs questions. Set data.name, or pass train_dataset to Trainer."
        )
    split = config.eval_split if evaluation else config.split
    own = evaluation and config.eval_name is not None
    subset = config.eval_subset if own else config.subset
    regex = config.eval_answer_regex if own else config.answer_regex
    table = load_table(name, subset, split, setting)
    return prepare_rows(table, config, answer_regex=regex, setting=setting, held_out=own)


FORMATS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet"}


def load_table(name: str, subset: str | None, split: str, setting: str) -> Any:
    """The rows of a local file or of a data set of the hub; `setting` is what errors blame.

    Raises:
        ValueError: there is no such thing.
    """
    import datasets

    path = Path(name)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{setting} is {name!r}; a local file ends in {', '.join(FORMATS)}. Convert the file.")
        try:
            return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            raise ValueError(
                f"{setting} is {name!r}; it cannot be read as {FORMATS[path.suffix]}: {error}. Correct the file."
            ) from error
    if path.suffix in FORMATS or name.startswith((".", "/", "~")):
        raise ValueError(f"{setting} is {name!r}; there is no such file. Correct the path, or name a hub data set.")
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        raise ValueError(
            f"{setting} is {name!r} (subset {subset!r}, split {split!r}); there is no such local file and the hub gave no "
            f"such data set: {error}. Correct the name, or set {setting} to a .jsonl or .parquet file."
        ) from error


def prepare_rows(
    rows: Iterable[Mapping[str, Any]],
    config: DataConfig,
    *,
    answer_regex: str | None,
    setting: str,
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """Give each row its `question` and `answer`; the row's other columns stay.

    Args:
        held_out: the rows are those of `data.eval_name`, which may have settings of its own.
    """
    prepared = []
    pattern = re.compile(answer_regex) if answer_regex is not None else None
    question_option = "question_column" if config.question_template is None else "question_template"
    answer_option = "answer_column"
    if held_out and config.eval_question_template is not None:
        question_option = "eval_question_template"
    if held_out and config.eval_answer_column is not None:
        answer_option = "eval_answer_column"
    for number, row in enumerate(rows):
        where = f"row {number} of {setting}"
        question = _question(row, config, question_option, where)
        given = _cell(row, getattr(config, answer_option), config, answer_option, where)
        answer = "" if given is None or given != given else str(given)  # a missing answer: no reward can grade it
        if pattern is not None and answer:
            found = pattern.search(answer)
            if found is None or found.group(1) is None:
                raise ValueError(
                    f"data.answer_regex is {answer_regex!r}; it finds no group in the answer of row {number} of "
                    f"{setting}: {answer[-200:]!r}. Correct it, or set it to null if the column is the bare answer."
                )
            answer = found.group(1).strip()
        prepared.append({**row, "question": question, "answer": answer})
    if not prepared:
        raise ValueError(f"{setting} holds no rows. Name a data set with at least one.")
    return prepared


def _question(row: Mapping[str, Any], config: DataConfig, option: str, where: str) -> str:
    """The row's columns in their places of the template, which is the one column if there is none."""

    def text(found: re.Match[str]) -> str:
        cell = _cell(row, found[1], config, option, where)
        if cell is None:
            raise ValueError(f"data.{option} is {getattr(config, option)!r}; {where} has no {found[1]}. Drop the row.")
        return str(cell)

    template = f"{{{config.question_column}}}" if option == "question_column" else getattr(config, option)
    return COLUMN_IN_BRACES.sub(text, template)


def _cell(row: Mapping[str, Any], column: str, config: DataConfig, option: str, where: str) -> Any:
    if column not in row:
        raise ValueError(
            f"data.{option} is {getattr(config, option)!r}; {where} has the columns {', '.join(row)}. Name one of them."
        )
    return row[column]


def build_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> tuple[list[Prompt], Counter[str]]:
    """Prompts in the order of `rows`, and how many rows were dropped for which reason.

    Raises:
        ValueError: no row is left, a prompt has no tokens, or the chat template fails.
    """
    template = TEMPLATES[config.template]
    texts = fill([row["question"] for row in rows], tokenizer, config)
    ids = tokenize(texts, tokenizer, config)
    prompts, dropped = [], Counter[str]()
    too_long = f"prompt longer than data.max_prompt_tokens ({config.max_prompt_tokens})"
    for number, (row, text, token_ids) in enumerate(zip(rows, texts, ids, strict=True)):
        if not token_ids:  # seen with tokenizer files that transformers reads as another family's
            raise ValueError(
                f"data.template is {config.template!r}; {type(tokenizer).__name__} turns the prompt {text[:80]!r} into no tokens "
                "at all. If the question is not empty, the tokenizer does not load as it was saved; check model.name."
            )
        if _has_ended(text, token_ids, tokenizer):
            dropped[ENDED] += 1
        elif len(token_ids) > config.max_prompt_tokens:
            dropped[too_long] += 1
        else:
            messages = conversation(row["question"], config) if template.is_chat else None
            prompts.append(Prompt(number, token_ids, text, prefill_of(text), row, messages=messages))
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


ENDED = "prompt ends with an end-of-sequence token"


def fill(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[str]:
    """The prompts of questions as text.

    Raises:
        ValueError: the chat template fails, or does not end.
    """
    template = TEMPLATES[config.template]
    if template.is_chat:
        _check_chat(tokenizer, config)
    with time_limit(len(questions)):
        return [template.fill(question, tokenizer, config) for question in questions]


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[list[int]]:
    """Prompts as token ids, without what the tokenizer appends to a text: a prompt goes on."""
    own_tokens = TEMPLATES[config.template].is_chat
    ids = tokenizer(texts, add_special_tokens=not own_tokens)["input_ids"]
    appended = [] if own_tokens else _appended(tokenizer)
    return [list(each[: len(each) - len(appended)] if appended else each) for each in ids]


def _appended(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts behind every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[start + len(plain) :])
    return []


def _has_ended(text: str, token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a prompt ends a text or a turn, white space aside."""
    known = {tokenizer.eos_token, *(token for token in END_TOKENS if token in tokenizer.all_special_tokens)}
    return text.rstrip().endswith(tuple(filter(None, known))) or token_ids[-1] == tokenizer.eos_token_id


class PromptOrder:
    """Deals prompts to the processes, epoch after epoch, in an order that depends only on seed and position.

    `position` counts the prompts dealt so far over all processes; it is all there is to save and restore.
    """

    def __init__(self, prompts: list[Prompt], *, seed: int, rank: int, world_size: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._epoch: tuple[int, list[int]] = (-1, [])

    def draw(self, num_prompts: int) -> list[Prompt]:
        """This process's share of the next `num_prompts` prompts: every world_size-th, starting at its rank."""
        mine = range(self.position + self.rank, self.position + num_prompts, self.world_size)
        self.position += num_prompts
        return [self._at(place) for place in mine]

    def _at(self, place: int) -> Prompt:
        epoch, offset = divmod(place, len(self.prompts))
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = (epoch, torch.randperm(len(self.prompts), generator=generator).tolist())
        return self.prompts[self._epoch[1][offset]]
