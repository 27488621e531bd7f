"""Rows to learn from -> groups of one completion, each with the tokens that are trained on.

| form | a row has | its prompt | what is learned |
|---|---|---|---|
| `question` | a question and `completion` | that of reinforcement learning: data.template | the completion and an end token |
| `prompt` | `prompt` and `completion` | the text as it stands | the completion and an end token |
| `messages` | `messages`; or `prompt`, a list, and `completion` | the chat template | all turns of the assistant, or the last |
| `ids` | `prompt_ids` and `completion_ids` | these tokens | these tokens |

A conversation is one sequence: what others say between two turns of the assistant is read and not learned. It is rendered by the
tokenizer's chat template turn by turn and read back: a template that drops or rewrites what the assistant said, as some do with
`<think>`, is refused. The end token is the one with which a turn ends in the chat template, else the tokenizer's end of text; it
is a token like any other, whatever padding is. A completion that the row says was cut off (`finish_reason: length`) has none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config.supervised import RowsConfig
from grpo.data.cells import is_conversation, is_list
from grpo.data.prompts import (
    TEMPLATES,
    Message,
    chat_text,
    check_chat,
    conversation,
    end_tokens,
    prefill_of,
    question_of,
    render,
    time_limit,
    token_ids,
    tokenize,
)
from grpo.data.rows import Fields, has_question, question_in, written_rows
from grpo.system import progress
from grpo.types import Completion, Group, Prompt

PROMPT, PROMPT_IDS, COMPLETION_IDS = "prompt", "prompt_ids", "completion_ids"
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
SHOWN = 1500
"""Characters of a row that an error shows."""


@dataclass
class Draft:
    """A row on its way: texts that are still to be tokens."""

    where: str  # what errors call it
    columns: dict[str, Any]
    prompt: str | list[int]
    template: str  # that says how the text of the prompt becomes tokens
    parts: list[tuple[str | list[int], bool]] = field(default_factory=list)  # what follows, and whether it is learned
    messages: list[Message] | None = None
    cut_off: bool = False
    decoded: list[str] = field(default_factory=list)  # where token ids are learned, the text of them

    @property
    def learned(self) -> list[str]:
        """The texts that are learned, without end tokens that were added."""
        return self.decoded or [part for part, is_trained in self.parts if is_trained and isinstance(part, str)]

    def shown(self) -> str:
        """As an error shows it: what is learned stands between « and »."""
        parts = [f"«{part}»" if is_trained else str(part) for part, is_trained in self.parts]
        text = "".join([str(self.prompt), *parts])
        return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


@dataclass(frozen=True)
class Rows:
    """What is learned, and what became of the others."""

    groups: list[Group]  # of one completion each; `prompt.row` is the place here
    dropped: Counter[str]
    notes: list[str]  # what a person should know


@progress.busy("reading rows")
def read_rows(
    config: RowsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    given: Iterable[Mapping[str, Any]] | None = None,
    model: str,
) -> Rows:
    """The rows of `data.name`, or those `given` by a program.

    Args:
        model: its name, for errors that are of its chat template.

    Raises:
        ValueError: no such data, a row from which nothing is learned, a chat template that rewrites what the assistant said, or
            what the settings say is to be refused.
    """
    reader = _Reader(config, tokenizer, model)
    setting = "data.name" if given is None else "train_dataset"
    dropped: Counter[str] = Counter()
    drafts = list(reader.drafts(written_rows(config, given, setting=setting, left_out=dropped)))
    if not drafts:
        raise ValueError(f"{setting} holds no rows. Name a data set with at least one.")
    for draft in drafts:
        _check_learned(draft)
    kept = _without_empty_thoughts(drafts, config, dropped)
    groups = _fitting(_as_groups(kept, config, tokenizer), kept, config, dropped)
    return Rows(groups, dropped, _notes(groups, tokenizer))


# ---- what a row is ---------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, config: RowsConfig, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template_name = config.chat_template or f"that of {model}"
        self.ends = end_tokens(tokenizer)
        self._end_of_turn: str | None = None

    def drafts(self, rows: Iterable[tuple[dict[str, Any], Fields, str]]) -> Iterator[Draft]:
        makers = {"ids": self._ids, "messages": self._messages, "question": self._question, "prompt": self._prompt}
        every = [(row, fields, where, self._form(row, fields, where)) for row, fields, where in rows]
        asks = TEMPLATES[self.config.template].is_chat and any(form == "question" for *_, form in every)
        if asks or any(form == "messages" for *_, form in every):
            check_chat(self.tokenizer, self.config)
        with time_limit(10 * len(every)):
            for row, fields, where, form in every:
                draft = makers[form](row, fields, where)
                draft.cut_off = row.get("finish_reason") == "length"
                yield draft

    def _form(self, row: Mapping[str, Any], fields: Fields, where: str) -> str:
        """Which form a row has. Raises ValueError: none, or several, or not the one that data.form names."""
        config = self.config
        completed = row.get(config.completion_column) is not None
        said = row.get(config.completion_column)
        of_messages = is_conversation(row.get(PROMPT)) and completed
        there = {
            "ids": row.get(PROMPT_IDS) is not None and row.get(COMPLETION_IDS) is not None,
            "messages": is_conversation(row.get(config.messages_column)) or of_messages,
            "question": has_question(row, fields) and completed,
            "prompt": isinstance(row.get(PROMPT), str) and completed,
        }
        found = [form for form, is_there in there.items() if is_there]
        columns = ", ".join(map(str, row))
        if config.form != "auto":
            if not there[config.form]:
                raise ValueError(
                    f"data.form is {config.form!r}; {where} has the columns {columns}, and not what this form needs "
                    f"({self._needs(config.form, fields)}). Correct the row, or data.form."
                )
            return config.form
        if len(found) != 1:
            several = f"it can be learned as {' or as '.join(found)}. Set data.form to one of them"
            flaw = _flaw(row.get(config.messages_column), config.messages_column)
            none = f"nothing can be learned from it ({flaw or f'{config.completion_column} is {said!r}'}). " + (
                "Give it a completion: " + "; ".join(f"{form}: {self._needs(form, fields)}" for form in there)
            )
            raise ValueError(f"{where} has the columns {columns}; {several if found else none}.")
        return found[0]

    def _needs(self, form: str, fields: Fields) -> str:
        config = self.config
        return {
            "ids": f"{PROMPT_IDS} and {COMPLETION_IDS}",
            "messages": f"{config.messages_column}, a list of messages with role and content",
            "question": f"{fields.question_setting[1]} and {config.completion_column}",
            "prompt": f"{PROMPT}, a text, and {config.completion_column}",
        }[form]

    def _ids(self, row: dict[str, Any], fields: Fields, where: str) -> Draft:
        prompt, completion = ([_token_id(each, where) for each in row[name]] for name in (PROMPT_IDS, COMPLETION_IDS))
        said = str(self.tokenizer.decode(completion, skip_special_tokens=True))
        return Draft(where, row, prompt, "none", [(completion, True)], decoded=[said])

    def _question(self, row: dict[str, Any], fields: Fields, where: str) -> Draft:
        config = self.config
        found = question_in(row, fields, where)
        question = question_of({**row, **found}, config)
        text = TEMPLATES[config.template].fill(question, self.tokenizer, config)
        messages = conversation(question, config) if TEMPLATES[config.template].is_chat else None
        draft = Draft(where, {**row, **found}, text, config.template, messages=messages)
        return self._completed(draft, row[config.completion_column])

    def _prompt(self, row: dict[str, Any], fields: Fields, where: str) -> Draft:
        return self._completed(Draft(where, row, row[PROMPT], "none"), row[self.config.completion_column])

    def _completed(self, draft: Draft, completion: Any) -> Draft:
        """With a completion as it stands; what the prompt has begun of it is not said twice."""
        if not isinstance(completion, str):
            raise ValueError(
                f"{self.config.completion_column} of {draft.where} is of type {type(completion).__name__}; a completion is a "
                "text. Convert it, or give the row as messages."
            )
        prefill = prefill_of(str(draft.prompt))
        if prefill and completion.lstrip().startswith(prefill.strip()):
            completion = completion.lstrip().removeprefix(prefill.strip())
        end = self.end_of_turn if TEMPLATES[draft.template].is_chat else str(self.tokenizer.eos_token)
        text = completion.removesuffix(end)
        draft.parts = [(text, True)]
        if draft.columns.get("finish_reason") != "length":
            draft.parts.append(([_id_of(end, self.tokenizer)], True))
        return draft

    @property
    def end_of_turn(self) -> str:
        """The end token with which the chat template ends what the assistant says; without one, the end of text."""
        if self._end_of_turn is None:
            turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "a reply"}]
            after = render(turns, self.tokenizer, self.config, add_generation_prompt=False).rpartition("a reply")[2]
            found = _first_end(after, self.ends)
            self._end_of_turn = found[0] if found else str(self.tokenizer.eos_token)
        return self._end_of_turn

    # ---- conversations -----------------------------------------------------------------------------------------------

    def _messages(self, row: dict[str, Any], fields: Fields, where: str) -> Draft:
        config = self.config
        turns = row.get(config.messages_column)
        if not is_conversation(turns) or config.form == "prompt":
            said = row[config.completion_column]
            answer = [{"role": "assistant", "content": said}] if isinstance(said, str) else list(said)
            turns = [*row[PROMPT], *answer]
        assert turns is not None, "the form was told by it"
        turns = [_message(turn, where) for turn in turns]
        spoken = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not spoken:
            text = render(conversation(turns, config), self.tokenizer, config, add_generation_prompt=True)
            raise ValueError(_nothing_learned(Draft(where, row, text, "chat"), "the assistant says nothing in it"))
        turns = turns[: spoken[-1] + 1]
        if not TEMPLATES[config.template].is_chat:
            return self._single(turns, row, where)
        messages = conversation(turns, config)
        shift = len(messages) - len(turns)
        wanted = [number + shift for number in (spoken if config.loss_on == "all" else spoken[-1:])]
        if wanted[0] == 0:
            raise ValueError(
                f"{where} begins with what the assistant says; nothing comes before it to learn it from. Begin with a message of "
                "the user."
            )
        return self._rendered(messages, wanted, row, where)

    def _single(self, turns: list[Message], row: dict[str, Any], where: str) -> Draft:
        """One question and its answer, in a template that is no chat template."""
        config = self.config
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise ValueError(
                f"data.template is {config.template!r}; {where} is a conversation of {len(turns)} messages, and this template "
                "has room for one question. Set data.template to chat."
            )
        text = TEMPLATES[config.template].fill(turns[0]["content"], self.tokenizer, config)
        return self._completed(Draft(where, row, text, config.template), turns[1]["content"])

    def _rendered(self, messages: list[Message], wanted: list[int], row: dict[str, Any], where: str) -> Draft:
        """The conversation as the chat template has it; what it makes of each turn that is learned is read back."""
        prompt = chat_text(messages[: wanted[0]], self.tokenizer, self.config)
        draft = Draft(where, row, prompt, "chat", messages=messages[: wanted[0]])
        so_far = prompt
        for number in wanted:
            before = chat_text(messages[:number], self.tokenizer, self.config)
            if not before.startswith(so_far):
                raise ValueError(self._rewritten(where, so_far, before, "what was said in earlier turns"))
            whole = render(messages[: number + 1], self.tokenizer, self.config, add_generation_prompt=False)
            said, content = whole[len(before) :], messages[number]["content"].strip()
            prefill = prefill_of(before).strip()
            if prefill and content.startswith(prefill):
                content = content.removeprefix(prefill).strip()
            if not whole.startswith(before) or not said.lstrip().startswith(content):
                raise ValueError(self._rewritten(where, messages[number]["content"], whole, "what the assistant said"))
            start = said.index(content) + len(content)
            end = _first_end(said[start:], self.ends)
            trained = said[: start + (end[1] if end else 0)]
            if number > wanted[0]:
                draft.parts.append((before[len(so_far) :], False))
            draft.parts += [(trained, True)] if content else [(trained, False)]
            if end is not None:
                draft.parts.append(([_id_of(end[0], self.tokenizer)], True))
            elif number == wanted[-1]:
                draft.parts.append(([_id_of(str(self.tokenizer.eos_token), self.tokenizer)], True))
            so_far = before + trained + (end[0] if end else "")
        if row.get("finish_reason") == "length":
            draft.parts.pop()
        return draft

    def _rewritten(self, where: str, expected: str, rendered: str, what: str) -> str:
        thought = " It drops or moves <think>." if "<think>" in expected else ""
        return (
            f"the chat template ({self.template_name}) rewrites {what} in {where}.{thought} What was said: {expected[-300:]!r}; "
            f"what the template makes of the conversation: {rendered[-300:]!r}. Name a file with another chat template "
            "(data.chat_template); set data.loss_on to last, if only earlier turns are concerned; or give rows as question and "
            "completion, which is learned as it stands."
        )


def _token_id(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{where} has {value!r} among its token ids; they are whole numbers from 0 on. Correct the row."
        )
    return value


def _id_of(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    number = tokenizer.convert_tokens_to_ids(token)  # get_vocab makes a dictionary of all tokens at each call
    assert isinstance(number, int), "one token has one id"
    return number


ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""That chat templates know. Most put any other where it stands, so that what a `bot` says would be read and not learned."""


def _message(turn: Mapping[str, Any], where: str) -> Message:
    content = turn.get("content")
    if turn.get("role") not in ROLES:
        raise ValueError(
            f"{where} has a message of the role {turn.get('role')!r}; the roles are {', '.join(ROLES)}, and what the assistant "
            "says is learned. Rename it."
        )
    if not isinstance(content, str):
        raise ValueError(
            f"{where} has a message of the {turn.get('role')} whose content is of type {type(content).__name__}; it is a text. "
            "Convert it, or drop the row."
        )
    return {str(name): value for name, value in turn.items() if value is not None}


def _flaw(turns: Any, column: str) -> str | None:
    """Why a list of mappings is no conversation; None: it is no such list, or it is one."""
    if not is_list(turns):
        return None
    for number, turn in enumerate(turns):
        lacking = [key for key in ("role", "content") if isinstance(turn, Mapping) and key not in turn]
        if lacking:
            return f"{column}.{number} has no {' and no '.join(lacking)}, but {', '.join(map(str, turn)) or 'nothing'}"
    return None


def _first_end(text: str, ends: Iterable[str]) -> tuple[str, int] | None:
    """The first of the end tokens in a text, and where it begins; only white space may come before it."""
    begun = text.lstrip()
    found = [each for each in ends if begun.startswith(each)]
    return (max(found, key=len), len(text) - len(begun)) if found else None


# ---- what is refused or left out -------------------------------------------------------------------------------------


def _check_learned(draft: Draft) -> None:
    """Raises ValueError: nothing of the row would be learned, but for its end."""
    if not any(
        is_trained and len(part if isinstance(part, list) else part.strip()) > 0 for part, is_trained in _said(draft)
    ):
        raise ValueError(_nothing_learned(draft, "its completion is empty"))
    if len(draft.prompt) == 0:
        raise ValueError(
            f"{draft.where} has an empty prompt; its first token would be learned from nothing. Give it a prompt, or a question."
        )


def _said(draft: Draft) -> Iterable[tuple[str | list[int], bool]]:
    """Without the end tokens that were added to texts."""
    has_text = any(isinstance(part, str) for part, _ in draft.parts)
    return [(part, is_trained) for part, is_trained in draft.parts if isinstance(part, str) or not has_text]


def _nothing_learned(draft: Draft, why: str) -> str:
    return (
        f"{draft.where} has no token to learn: {why}. As the model reads it: {draft.shown()!r}. Give it a completion, or drop "
        "the row."
    )


def _without_empty_thoughts(drafts: list[Draft], config: RowsConfig, dropped: Counter[str]) -> list[Draft]:
    if config.empty_thoughts == "keep":
        return drafts
    empty = {number for number, draft in enumerate(drafts) if _thinks_nothing(draft)}
    if empty and config.empty_thoughts == "error":
        first = drafts[min(empty)]
        raise ValueError(
            f"{len(empty):,} of {len(drafts):,} rows have an empty <think></think>, which teaches not to think; the first is "
            f"{first.where}: {first.shown()!r}. Set data.empty_thoughts to drop or to keep, or correct the rows."
        )
    if len(empty) == len(drafts):
        raise ValueError(
            f"data.empty_thoughts is 'drop'; all of {len(drafts):,} rows have an empty <think></think>. Set it to keep, or give "
            "rows with thoughts."
        )
    if empty:
        dropped["empty <think></think> (data.empty_thoughts)"] += len(empty)
    return [draft for number, draft in enumerate(drafts) if number not in empty]


def _thinks_nothing(draft: Draft) -> bool:
    prefill = prefill_of(draft.prompt) if isinstance(draft.prompt, str) else ""
    begun = "" if "</think>" in prefill else prefill
    return any(EMPTY_THOUGHT.search(begun * (number == 0) + text) for number, text in enumerate(draft.learned))


def _fitting(groups: list[Group], drafts: list[Draft], config: RowsConfig, dropped: Counter[str]) -> list[Group]:
    sizes = [len(group.prompt.token_ids) + len(group.completions[0].token_ids) for group in groups]
    fits = [group for group, size in zip(groups, sizes, strict=True) if size <= config.max_tokens]
    num_long = len(groups) - len(fits)
    if num_long and (config.too_long == "error" or not fits):
        longest = max(range(len(sizes)), key=lambda i: sizes[i])
        raise ValueError(
            f"data.max_tokens is {config.max_tokens}; {num_long:,} of {len(groups):,} rows are longer, {drafts[longest].where} "
            f"with {sizes[longest]:,} tokens the longest, and no row is ever cut. Set data.max_tokens >= {sizes[longest]}"
            + (", or data.too_long to drop." if fits else ".")
        )
    if num_long:
        dropped[f"longer than data.max_tokens ({config.max_tokens}), the longest has {max(sizes):,}"] += num_long
    return [
        Group(Prompt(**{**vars(group.prompt), "row": number}), group.completions) for number, group in enumerate(fits)
    ]


def _notes(groups: list[Group], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ends = {_id_of(token, tokenizer) for token in end_tokens(tokenizer)}
    endless = sum(group.completions[0].token_ids[-1] not in ends for group in groups)
    return (
        [
            f"note: {endless:,} of {len(groups):,} rows do not end with an end token, as they were cut off or given so; from "
            "them the model does not learn where to stop"
        ]
        if endless
        else []
    )


# ---- tokens ----------------------------------------------------------------------------------------------------------


def _as_groups(drafts: list[Draft], config: RowsConfig, tokenizer: PreTrainedTokenizerBase) -> list[Group]:
    prompts: dict[int, list[int]] = {n: each.prompt for n, each in enumerate(drafts) if isinstance(each.prompt, list)}
    for template in dict.fromkeys(draft.template for draft in drafts):
        numbers = [n for n, each in enumerate(drafts) if each.template == template and n not in prompts]
        if numbers:
            own = config.model_copy(update={"template": template})
            found = tokenize([str(drafts[n].prompt) for n in numbers], tokenizer, own)
            prompts |= dict(zip(numbers, found, strict=True))
    texts = [part for draft in drafts for part, _ in draft.parts if isinstance(part, str)]
    said = token_ids(texts, tokenizer, add_special_tokens=False)
    groups = []
    for number, draft in enumerate(drafts):
        ids: list[int] = []
        trained: list[bool] = []
        for part, is_trained in draft.parts:
            tokens = next(said) if isinstance(part, str) else part
            ids += tokens
            trained += [is_trained] * len(tokens)
        first = trained.index(True) if True in trained else len(trained)
        prompt_ids, ids, trained = [*prompts[number], *ids[:first]], ids[first:], trained[first:]
        groups.append(_group(draft, prompt_ids, ids, trained, tokenizer))
    return groups


def _group(
    draft: Draft, prompt_ids: list[int], ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase
) -> Group:
    text = draft.prompt if isinstance(draft.prompt, str) else str(tokenizer.decode(draft.prompt))
    said = "".join(draft.learned)
    columns = {"question": text, "answer": "", **draft.columns}
    prompt = Prompt(-1, prompt_ids, text, prefill_of(text), columns, messages=draft.messages)
    completion = Completion(
        ids,
        [0.0] * len(ids),
        said,
        "length" if draft.cut_off else "stop",
        trained=None if all(trained) else trained,
    )
    return Group(prompt, [completion])
