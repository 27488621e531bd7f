"""Rows as they are written -> rows with `question` and `answer`: sources, columns, conversations. cells.py has the text of a
cell."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import COLUMN_IN_BRACES, TASK_PREFIX, DataConfig, SourceConfig
from grpo.data.cells import cell_of, described, is_conversation, is_missing, said, text_in, text_of
from grpo.data.files import Row, given_rows, is_split, load_table
from grpo.data.gym import make_rows
from grpo.data.where import Selection
from grpo.system import progress

MESSAGES = "question_messages"
"""Column of a row whose question is a conversation: its turns. `question` is then the last of them."""

DATA_NAME = "data_name"
"""Column of a row whose setting lists several sources: which of them it comes from, as `SourceConfig.label`."""


@dataclass(frozen=True)
class Fields:
    """Where question and answer are in a row; each with the setting that says so."""

    question: str  # a template; the bare column is "{column}"
    question_setting: tuple[str, str]  # its name and its value as spelled
    answer: str
    answer_setting: tuple[str, str]
    regex: str | None
    regex_setting: str
    reads_answer: bool = True  # False: no reward asks for the answer, so a structured one is none's business


@progress.busy("reading data")
def load_rows(
    config: DataConfig,
    *,
    evaluation: bool = False,
    reads_answer: bool = True,
    left_out: Counter[str] | None = None,
) -> list[Row]:
    """Rows of the training or the evaluation set, each with `question` and `answer` among its columns.

    Args:
        reads_answer: whether a reward asks for `answer`, which then has to be a text.
        left_out: is to count the rows that data.where or data.eval_where leaves out, by reason.

    Raises:
        ValueError: no such data set, a column is missing, `answer_regex` does not match an answer, or see Selection.
    """
    own = evaluation and config.eval_name is not None
    setting, given = ("data.eval_name", config.eval_name) if own else ("data.name", config.name)
    if given is None:
        raise ValueError(
            "data.name is missing; a run needs questions. Set data.name, or pass train_dataset to Trainer."
            if not evaluation
            else _no_held_out("given as train_dataset")
        )
    if isinstance(given, str) and given.startswith(TASK_PREFIX):
        made = make_rows(given, config.args, held_out=evaluation)
        selection = Selection.of(config, held_out=evaluation, left_out=left_out)
        return _prepared(made, _fields(config, own, reads_answer), selection, setting)
    if evaluation and not own and (not isinstance(given, str) or not is_split(given)):
        raise ValueError(_no_held_out(given if isinstance(given, str) else ", ".join(each.name for each in given)))
    selection = Selection.of(config, held_out=evaluation, left_out=left_out, is_shared=isinstance(given, list))
    if isinstance(given, str):
        return complete(_source_rows(SourceConfig(name=given), config, evaluation, reads_answer, selection, setting))
    rows: list[Row] = []
    for number, source in enumerate(given):
        found = _source_rows(source, config, evaluation, reads_answer, selection, f"{setting}.{number}.name")
        rows += [{**row, DATA_NAME: source.label} for row in found]
    selection.check_values()
    return complete(rows)


def _no_held_out(name: str) -> str:
    return (
        f"data.eval_name is missing; the training questions ({name}) have no held-out split "
        "of their own. Set data.eval_name, pass eval_dataset to Trainer, or set evaluation.num_questions to 0."
    )


def _source_rows(
    source: SourceConfig,
    config: DataConfig,
    evaluation: bool,
    reads_answer: bool,
    selection: Selection,
    setting: str,
) -> list[Row]:
    own = evaluation and config.eval_name is not None
    subset = source.subset or (config.eval_subset if own else config.subset)
    split = source.split or (config.eval_split if evaluation else config.split)
    revision = source.revision or (None if own else config.revision)
    option = f"{setting.removesuffix('name')}split" if source.split else f"data.{'eval_' * evaluation}split"
    table = load_table(source.name, subset, split, setting, revision, split_setting=option)
    prefix = setting.removesuffix("name")
    fields = _own_fields(source, _fields(config, own, reads_answer), prefix)
    return _prepared(table, fields, selection.of_source(source, prefix), setting, name=source.name)


def written_rows(
    config: DataConfig,
    given: Iterable[Mapping[str, Any]] | None,
    *,
    setting: str = "data.name",
    left_out: Counter[str] | None = None,
) -> Iterator[tuple[Row, Fields, str]]:
    """The training rows as they are written, each with where its question is and what errors call it.

    Args:
        given: rows of a program instead of those of `data.name`; `setting` is then what errors blame.
        left_out: see load_rows.

    Raises:
        ValueError: no such data set, a row is none, or see Selection.
    """
    fields = _fields(config, False, False)
    is_shared = given is None and isinstance(config.name, list)
    selection = Selection.of(config, held_out=False, left_out=left_out, is_shared=is_shared)
    sources: list[tuple[Iterable[Mapping[str, Any]], Fields, Selection, str, Row]] = []
    if given is not None:
        sources = [(given_rows(given, setting), fields, selection, setting, {})]
    elif config.name is None:
        raise ValueError(
            "data.name is missing; supervised training needs rows. Set data.name, or pass train_dataset to SupervisedTrainer."
        )
    elif isinstance(config.name, str):
        table = load_table(
            config.name, config.subset, config.split, setting, config.revision, split_setting="data.split"
        )
        sources = [(table, fields, selection, setting, {})]
    else:
        for number, source in enumerate(config.name):
            own, prefix = f"{setting}.{number}.name", f"{setting}.{number}."
            split, option = (source.split, f"{prefix}split") if source.split else (config.split, "data.split")
            subset = source.subset or config.subset
            table = load_table(
                source.name, subset, split, own, source.revision or config.revision, split_setting=option
            )
            chosen = selection.of_source(source, prefix)
            sources.append((table, _own_fields(source, fields, prefix), chosen, own, {DATA_NAME: source.label}))
    for rows, where_question, chosen, name, label in sources:
        for number, row in chosen.kept(rows, name):
            yield {**row, **label}, where_question, f"row {number} of {name}"
    if is_shared:
        selection.check_values()


def has_question(row: Mapping[str, Any], fields: Fields) -> bool:
    """Whether a row has the columns that its question is made of."""
    names = COLUMN_IN_BRACES.findall(fields.question)
    return all(name in row or name.split(".")[0] in row for name in names)


def prepare_rows(
    rows: Iterable[Mapping[str, Any]],
    config: DataConfig,
    *,
    answer_regex: str | None,
    setting: str,
    held_out: bool = False,
    reads_answer: bool = True,
    selection: Selection | None = None,
) -> list[Row]:
    """Give each row its `question` and `answer`; its other columns stay, and one that only some rows have is None in the rest.

    Args:
        rows: dictionaries, a Dataset or a DataFrame.
        held_out: the rows are those of `data.eval_name`, which may have settings of its own.
        reads_answer: see load_rows.
        selection: which of the rows; None: all.

    Raises:
        ValueError: the rows are none, a cell cannot be a question or an answer, or see Selection.
    """
    fields = _fields(config, held_out, reads_answer)
    fields = Fields(**{**vars(fields), "regex": answer_regex})
    selection = selection or Selection(None, setting, Counter())
    return complete(_prepared(given_rows(rows, setting), fields, selection, setting))


def complete(rows: list[Row]) -> list[Row]:
    """The rows with the same columns: one that only some of them have is missing (None) in the others, as in a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    blank = dict.fromkeys(columns)
    for row in rows:
        if len(row) < len(columns):
            present = dict(row)
            row.update(blank)
            row.update(present)
    return rows


def missing(rows: Sequence[Row], column: str) -> list[int]:
    """The numbers of the rows that have nothing in a column."""
    return [number for number, row in enumerate(rows) if row[column] is None]


def canonical(row: Mapping[str, Any]) -> bytes:
    """The same bytes for the same contents, in any process."""
    return _ENCODER.encode(row).encode()


def _tagged(value: Any) -> list[str]:
    """What JSON has no form for, with its type."""
    return [f"{type(value).__module__}.{type(value).__qualname__}", pickle.dumps(value, protocol=4).hex()]


_ENCODER = json.JSONEncoder(default=_tagged, check_circular=False)


# ---- which columns ---------------------------------------------------------------------------------------------------


def _fields(config: DataConfig, held_out: bool, reads_answer: bool) -> Fields:
    """As `data` has them, or for `data.eval_name` its own where it has any."""
    question = "question_column" if config.question_template is None else "question_template"
    answer, regex = "answer_column", "answer_regex"
    if held_out:
        question = question if config.eval_question_template is None else "eval_question_template"
        answer = answer if config.eval_answer_column is None else "eval_answer_column"
        regex = "eval_answer_regex"
    spelled = getattr(config, question)
    return Fields(
        question=f"{{{spelled}}}" if question == "question_column" else spelled,
        question_setting=(f"data.{question}", spelled),
        answer=getattr(config, answer),
        answer_setting=(f"data.{answer}", getattr(config, answer)),
        regex=getattr(config, regex),
        regex_setting=f"data.{regex}",
        reads_answer=reads_answer,
    )


def _own_fields(source: SourceConfig, fields: Fields, prefix: str) -> Fields:
    """With those that an entry of a list of sources has of its own."""
    own: Row = {}
    if source.question_column is not None:
        own["question"] = f"{{{source.question_column}}}"
        own["question_setting"] = (f"{prefix}question_column", source.question_column)
    if source.question_template is not None:
        own["question"] = source.question_template
        own["question_setting"] = (f"{prefix}question_template", source.question_template)
    if source.answer_column is not None:
        own |= {"answer": source.answer_column, "answer_setting": (f"{prefix}answer_column", source.answer_column)}
    if source.answer_regex is not None:
        own |= {"regex": source.answer_regex, "regex_setting": f"{prefix}answer_regex"}
    return Fields(**{**vars(fields), **own})


# ---- question and answer ---------------------------------------------------------------------------------------------


def _prepared(
    rows: Iterable[Mapping[str, Any]], fields: Fields, selection: Selection, setting: str, *, name: str = ""
) -> list[Row]:
    pattern = re.compile(fields.regex) if fields.regex is not None else None
    prepared = []
    for number, row in selection.kept(rows, setting):
        where = f"row {number} of {setting}"
        prepared.append({**row, **question_in(row, fields, where), "answer": _answer(row, fields, pattern, where)})
    if not prepared:
        found = f" ({name})" if name else ""
        raise ValueError(f"{setting} holds no rows{found}. Name a data set with at least one.")
    return prepared


def question_in(row: Mapping[str, Any], fields: Fields, where: str) -> Row:
    """The row's columns in their places of the template; or the turns of a conversation, and the last of them as the question."""
    if (column := COLUMN_IN_BRACES.fullmatch(fields.question)) is not None:
        cell = cell_of(row, column[1], fields.question_setting, where)
        if is_conversation(cell):
            turns = _turns(cell, fields, where)
            return {"question": turns[-1]["content"], MESSAGES: turns}

    def text(found: re.Match[str]) -> str:
        cell = cell_of(row, found[1], fields.question_setting, where)
        if is_missing(cell):
            raise ValueError(f"{said(fields.question_setting)}; {where} has no {found[1]}. Drop the row.")
        return text_in(cell, found[1], fields.question_setting, where)

    return {"question": COLUMN_IN_BRACES.sub(text, fields.question)}


def _answer(row: Mapping[str, Any], fields: Fields, pattern: re.Pattern[str] | None, where: str) -> str:
    cell = cell_of(row, fields.answer, fields.answer_setting, where)
    if is_missing(cell):
        return ""  # no reward can grade it
    if not fields.reads_answer and text_of(cell) is None:
        return json.dumps(cell, default=str)
    answer = text_in(cell, fields.answer, fields.answer_setting, where)
    if pattern is None or not answer:
        return answer
    found = pattern.search(answer)
    if found is None or found.group(1) is None:
        raise ValueError(
            f"{fields.regex_setting} is {fields.regex!r}; it finds no group in the answer of {where}: {answer[-200:]!r}. "
            "Correct it, or set it to null if the column is the bare answer."
        )
    return found.group(1).strip()


# ---- conversations ---------------------------------------------------------------------------------------------------


def _turns(cell: Sequence[Mapping[str, Any]], fields: Fields, where: str) -> list[Row]:
    """The messages up to where the assistant is to speak, without the empty fields that tables put into them.

    Raises:
        ValueError: a message is no text, or the assistant has spoken already.
    """
    turns = [{name: value for name, value in message.items() if value is not None} for message in cell]
    column = fields.question[1:-1]
    if turns[-1]["role"] == "assistant" and fields.answer in (
        f"{column}.-1.content",
        f"{column}.{len(turns) - 1}.content",
    ):
        turns.pop()
    for number, turn in enumerate(turns):
        if not isinstance(turn.get("content"), str):
            raise ValueError(
                f"{said(fields.question_setting)}; the content of message {number} in {where} is "
                f"{described(turn.get('content'))}, not a text. Convert it to text, or drop the row."
            )
        text_in(turn["content"], column, fields.question_setting, where)
    if not turns or turns[-1]["role"] in ("assistant", "system"):
        raise ValueError(
            f"{said(fields.question_setting)}; the conversation of {where} ends with a message of the "
            f"{turns[-1]['role'] if turns else 'assistant'}, and the assistant is to answer a user. Drop that message; or, where "
            f"it is the gold answer, set data.answer_column to {column}.-1.content; or take one message: data.question_column "
            f"{column}.0.content."
        )
    return turns


def stands_around_a_question(template: str | None) -> bool:
    """Whether data.question_template is words around any question, and not made of other columns."""
    return template is not None and set(COLUMN_IN_BRACES.findall(template)) == {"question"}


def as_asked(question: str, data: DataConfig) -> str:
    """A question that a person types, in the words that a run's data have around theirs."""
    if data.question_template is None or not stands_around_a_question(data.question_template):
        return question
    return COLUMN_IN_BRACES.sub(lambda _: question, data.question_template)


def asked_rows(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Data rows of questions that a person asks, with gold answers to all of them or to none (None).

    Raises:
        ValueError: a question is empty, or there are answers to some only.
    """
    if answers and len(answers) != len(questions):
        raise ValueError(
            f"--answer is given {len(answers)} times with {len(questions)} of --question; each answer belongs to the question in "
            "its place. Give one for each question, or none."
        )
    if any(not question.strip() for question in questions):
        raise ValueError("--question is empty; there is nothing to ask. Write a question.")
    gold: Sequence[str | None] = answers or [None] * len(questions)
    return [{"question": question, "answer": answer} for question, answer in zip(questions, gold, strict=True)]
