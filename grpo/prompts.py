"""Data set rows -> Prompts: load, fill the template, filter, and serve in a resumable order."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo.config import COLUMN_IN_BRACES, TASK_PREFIX, DataConfig
from grpo.gym import make_rows
from grpo.types import Prompt

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {question} Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948v1), table 1, word for word: raw text for a base model, no chat template."""


@dataclass(frozen=True)
class Template:
    """`fill(question, tokenizer, system_prompt)` is the prompt without `prefill`, which follows it and counts as answer."""

    fill: Callable[[str, PreTrainedTokenizerBase, str | None], str]
    prefill: str = ""
    adds_special_tokens: bool = True  # False where the filled text has the tokenizer's special tokens already


def _chat(question: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "data.template is 'chat'; the tokenizer of this model has no chat template. Set data.template to r1_zero."
        )
    return chat_text([{"role": "user", "content": question}], tokenizer, system_prompt)


def chat_text(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    """A conversation in the tokenizer's own chat template, up to where the assistant is to speak."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return str(tokenizer.apply_chat_template([*system, *messages], tokenize=False, add_generation_prompt=True))


TEMPLATES: dict[str, Template] = {
    "r1_zero": Template(lambda question, *_: R1_ZERO.replace("{question}", question)),
    "r1_zero_think": Template(lambda question, *_: R1_ZERO.replace("{question}", question) + " ", prefill="<think>"),
    "chat": Template(_chat, adds_special_tokens=False),
    "none": Template(lambda question, *_: question),
}


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
            _check_cache(error, path)
            raise ValueError(
                f"{setting} is {name!r}; it cannot be read as {FORMATS[path.suffix]}: {error}. Correct the file."
            ) from error
    if path.suffix in FORMATS or name.startswith((".", "/", "~")):
        raise ValueError(f"{setting} is {name!r}; there is no such file. Correct the path, or name a hub data set.")
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        _check_cache(error, path)
        raise ValueError(
            f"{setting} is {name!r} (subset {subset!r}, split {split!r}); there is no such local file and the hub gave no "
            f"such data set: {error}. Correct the name, or set {setting} to a .jsonl or .parquet file."
        ) from error


def _check_cache(error: Exception, path: Path) -> None:
    """Raise ValueError if not the data is at fault, but the folder for prepared data, by default in the user's home."""
    place = getattr(error, "filename", None)
    if getattr(error, "errno", None) in NOT_WRITABLE and place is not None and Path(place) != path:
        raise ValueError(
            f"HF_HOME is {os.environ.get('HF_HOME', '~/.cache/huggingface')!r}; data sets are prepared in a folder there, which "
            f"cannot be written to: {error}. Make room, or set HF_HOME (or HF_DATASETS_CACHE) to a folder that can be."
        ) from error


NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


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
        ValueError: no row is left, or a prompt has no tokens.
    """
    template = TEMPLATES[config.template]
    texts = [template.fill(row["question"], tokenizer, config.system_prompt) + template.prefill for row in rows]
    ids = tokenizer(texts, add_special_tokens=template.adds_special_tokens)["input_ids"]
    prompts, dropped = [], Counter[str]()
    for number, (row, text, token_ids) in enumerate(zip(rows, texts, ids, strict=True)):
        if not token_ids:  # seen with tokenizer files that transformers reads as another family's
            raise ValueError(
                f"data.template is {config.template!r}; {type(tokenizer).__name__} turns the prompt {text[:80]!r} into no tokens "
                "at all. If the question is not empty, the tokenizer does not load as it was saved; check model.name."
            )
        if len(token_ids) > config.max_prompt_tokens:
            dropped[f"prompt longer than data.max_prompt_tokens ({config.max_prompt_tokens})"] += 1
        else:
            prompts.append(Prompt(number, list(token_ids), text, template.prefill, row))
    if not prompts:
        shortest = min(len(token_ids) for token_ids in ids)
        raise ValueError(
            f"data.max_prompt_tokens is {config.max_prompt_tokens}; the shortest of {len(rows)} prompts has {shortest} "
            f"tokens, so none is left. Set data.max_prompt_tokens >= {shortest}."
        )
    return prompts, dropped


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
