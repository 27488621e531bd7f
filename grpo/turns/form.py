"""How calls are written and results come back: in tags of our own, or as the model's chat template has them; and how what an
environment says is put to the model: as a turn of the user.

    a prompt without a chat template     <tool>{"name": "calculator", "arguments": {"expression": "2*3"}}</tool><result>6</result>
                                         <answer> 5 </answer> User: Higher. Assistant:
    a chat template                      the assistant ends its turn; a turn of the tool or the user follows, and the next of the
                                         assistant

Who wrote a token is known from where it came from, and never read from the text: a `<result>` that a model writes itself is its
own words, is trained on like them, and no tool has answered.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.data.prompts import TEMPLATES, chat_text, render
from grpo.turns.schema import Schema

CALL = ("<tool>", "</tool>")
RESULT = ("<result>", "</result>")
CHAT_CALL = ("<tool_call>", "</tool_call>")
"""Of the chat templates of Qwen 2.5 and 3, Hermes and many after them."""


CUT_OFF = " [cut off]"
"""Behind a result that is longer than `tools.max_result_tokens`."""

LONG_TOKEN = 64
"""Characters: no more of a result are looked at for each of its tokens."""


@dataclass(frozen=True)
class Form:
    """How a model calls tools.

    Args:
        stop: texts that end the model's turn.
        tags: around a call.
        before, between, after: what stands before the first result, between two, and after the last.
        anchor: a text that results are tokenised behind, as they stand behind the model's words.
        ends: of a chat template, the tokens that end a turn: one that a text of rollout.stop has cut short makes no calls, since
            the results would stand within it.
    """

    stop: tuple[str, ...]
    tags: tuple[str, str]
    before: str
    between: str
    after: str
    anchor: str
    ends: frozenset[int] = frozenset()

    def calls(self, turn: str, token_ids: list[int]) -> list[str]:
        """The calls of a turn that the model wrote, each as the text between its tags; one that it never opened is empty.

        Args:
            token_ids: of the turn, with the one that ended it.
        """
        if self.stop and self.tags[1] not in turn:
            return []
        if self.stop:  # the turn has ended with the first close
            before = turn.partition(self.tags[1])[0]
            return [before.rpartition(self.tags[0])[2] if self.tags[0] in before else ""]
        if not token_ids or token_ids[-1] not in self.ends:
            return []
        opening, closing = self.tags
        calls: list[str] = []
        _, opened, rest = turn.partition(opening)
        while opened and closing in rest:
            end = end_of_call(rest, closing)
            end = rest.index(closing) if end is None else end  # of a string that is never closed
            calls.append(rest[:end])
            _, opened, rest = rest[end + len(closing) :].partition(opening)
        return calls

    def results(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, *, most: int) -> Appended:
        """What is put behind a turn whose calls had these results.

        Args:
            most: tokens of a result.
        """
        said = tuple(_cut(each, tokenizer, most) for each in texts)
        text = self.before + self.between.join(said) + self.after
        return Appended(text, _tokens(text, tokenizer, self.anchor), said)


@dataclass(frozen=True)
class Appended:
    """What others put behind a model's turn."""

    text: str
    token_ids: list[int]
    said: tuple[str, ...]  # without what stands around it


@dataclass(frozen=True)
class ReplyForm:
    """How what an environment says to a turn is put to the model.

    Args:
        stop: texts that end the model's turn.
        before, after: what stands around it.
        end: of a chat template, what ends a turn; it is put in front where something else has ended the model's.
        ends: tokens that end a turn themselves.
    """

    stop: tuple[str, ...]
    before: str
    after: str
    end: str = ""
    ends: frozenset[int] = frozenset()

    def reply(
        self, texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, *, most: int, behind: list[int]
    ) -> Appended:
        """What is put behind a turn to which this was said.

        Args:
            most: tokens of what is said.
            behind: the tokens of the turn.
        """
        said = (_cut("\n".join(texts), tokenizer, most),)
        is_open = bool(self.end) and not (behind and behind[-1] in self.ends)
        text = self.end * is_open + self.before + said[0] + self.after
        return Appended(text, _tokens(text, tokenizer, "a" if is_open or not self.end else self.end), said)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, anchor_text: str) -> list[int]:
    """Tokens of a text that others precede. Alone, it would begin with a space on tokenizers as that of Llama 2."""
    anchor, both = (
        tokenizer(each, add_special_tokens=False)["input_ids"] for each in (anchor_text, anchor_text + text)
    )
    if both[: len(anchor)] == anchor:
        return list(both[len(anchor) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    text = harmless(encodable(text[: most * LONG_TOKEN]), tokenizer)
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(token_ids) <= most:
        return text
    return str(tokenizer.decode(token_ids[:most], clean_up_tokenization_spaces=False)).rstrip("\ufffd") + CUT_OFF


def harmless(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A result in which nothing reads as the end of a turn, a call, or the end of the result: "< /result>"."""
    return _marks(tokenizer).sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


@lru_cache(maxsize=4)
def _marks(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Tags and special tokens. Others that were added to a vocabulary are text, such as runs of spaces in a program."""
    tags = {*CALL, *RESULT, *CHAT_CALL, "<tool_response>", "</tool_response>"}
    marks = {each for each in {*_special(tokenizer), *tags} if len(each.strip()) > 1}
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))


def encodable(text: str) -> str:
    """With a "?" for half a surrogate pair, which JSON can write ("\\ud800") and a tokenizer refuses."""
    return text.encode("utf-8", "replace").decode()


TAGGED = Form(
    stop=(CALL[1],), tags=CALL, before=RESULT[0], between=f"{RESULT[1]}{RESULT[0]}", after=RESULT[1], anchor="a"
)
"""Of prompts without a chat template."""


def form_of(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Form:
    """The form of a run's calls.

    Raises:
        ValueError: the chat template has no tools, or writes calls in a way that is not read here.
    """
    if not TEMPLATES[data.template].is_chat:
        return TAGGED
    return _chat_form(tokenizer, data)


class NoTools(ValueError):
    """A chat template that has no tools, or none that are read here.

    Args:
        what: it does, or does not, in words.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"data.template is 'chat'; the tokenizer's chat template {what}. Set data.template to r1_zero or none, where calls "
            "stand in tags of our own, or name a file with another chat template (data.chat_template)."
        )
        self.what = what


class Unreadable(ValueError):
    """A text that is no call.

    Args:
        name: of the tool, as far as it can be read.
    """

    def __init__(self, why: str, name: str = "") -> None:
        super().__init__(why)
        self.name = name


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call as a model wrote it: a JSON object with `name` and `arguments`.

    Raises:
        Unreadable: it is none.
    """
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the call is no JSON: {error}") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Unreadable('a call is a JSON object, {"name": ..., "arguments": {...}}')
    name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # as OpenAI has them
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"the arguments are no JSON: {error}", name) from None
    if not isinstance(arguments, dict):
        raise Unreadable("the arguments are no JSON object", name)
    return name, arguments


def without_fence(text: str) -> str:
    """A program without the fence that models put around one: three backticks, with a language or without."""
    found = re.fullmatch(r"\s*```[^\n`]*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    return found[1] if found is not None else text


def end_of_call(text: str, tag: str, start: int = 0) -> int | None:
    """Where an open call ends: at the first closing tag that stands in none of its strings; None: it is not there.

    Where a string that was never closed has taken in what follows, the call has ended with the first tag of all.

    Args:
        text: behind the tag that opens it.
        start: up to where the tags are known to stand in a string.
    """
    while (place := text.find(tag, start)) >= 0:
        try:
            json.loads(text[:place])
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Unterminated string"):
                return text.find(tag)
        else:
            return place
        start = place + len(tag)
    return None


_QUESTION, _WORDS, _FIRST, _SECOND = "9f1c question", "9f1c words", "9f1c first", "9f1c second"


def _chat_form(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Form:
    """What a chat template writes around calls and results, found by rendering them once."""
    tool: Schema = {
        "type": "function",
        "function": {"name": "probe", "description": "9f1c tool", "parameters": {"type": "object", "properties": {}}},
    }
    probed = data.with_tools([tool])
    call = {"type": "function", "function": {"name": "probe", "arguments": {"word": "9f1c word"}}}
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _WORDS, "tool_calls": [call, call]},
    ]
    answers = [{"role": "tool", "name": "probe", "content": text} for text in (_FIRST, _SECOND)]
    try:
        prompt = render(asked[:1], tokenizer, probed, add_generation_prompt=True)
        if "9f1c tool" not in prompt:
            raise NoTools("does not tell the model of tools")
        whole = render([*asked, *answers], tokenizer, probed, add_generation_prompt=True)
    except NoTools:
        raise
    except ValueError as error:  # such as Llama 3's: "This model only supports single tool-calls at once!"
        own = str(error.__context__ or error)[:300]  # the template's words, without what `render` says of them
        raise NoTools(f"refuses tools, or a turn with two calls ({own})") from None
    # Only what stands behind the calls is looked at: Qwen 3 writes empty thoughts into an assistant's turn if it is the last,
    # and none once a result follows. No matter: what the model has sampled is never rendered again.
    turns = whole.rpartition(_QUESTION)[2]
    calls = re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", turns, re.DOTALL)
    if len(calls) != 2 or "9f1c word" not in calls[0]:
        raise NoTools("writes calls in a form that is not read here (<tool_call>{...}</tool_call> is)")
    behind = turns.rpartition(CHAT_CALL[1])[2].lstrip()  # the end token, which the model draws, and what follows it
    end = next((each for each in _ends(tokenizer) if behind.startswith(each)), None)
    if end is None or behind.count(_FIRST) != 1 or behind.count(_SECOND) != 1:
        raise NoTools("does not end a turn with its calls, or leaves out a result")
    rest = behind.removeprefix(end)
    before, _, rest = rest.partition(_FIRST)
    between, _, after = rest.partition(_SECOND)
    ends = frozenset(tokenizer.get_vocab()[token] for token in (end, str(tokenizer.eos_token or end)))
    return Form(stop=(), tags=CHAT_CALL, before=before, between=between, after=after, anchor=end, ends=ends)


def _ends(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that may end a turn, the longest first."""
    return sorted(_special(tokenizer), key=len, reverse=True)


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens: those with a part, such as the end of a text, and those that were only added (Gemma's <end_of_turn>)."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True))


# ---- what an environment says ----------------------------------------------------------------------------------------


def reply_form(tokenizer: PreTrainedTokenizerBase, data: DataConfig, template: str | None) -> ReplyForm:
    """The form of what a run's environment says.

    Args:
        template: environment.reply_template.

    Raises:
        ValueError: the chat template leaves out a second question; or there is no telling how it is to be put.
    """
    if TEMPLATES[data.template].is_chat:
        if template is not None:
            raise ValueError(
                f"environment.reply_template is {template!r} with data.template chat, where a reply is a turn of the user as the "
                "chat template has it. Remove it."
            )
        return _chat_reply(tokenizer, data)
    if template is None and data.template == "none":
        raise ValueError(
            "environment.reply_template is missing; data.template none does not say how what the environment says is put to the "
            'model. Set it, say to "\\nUser: {text}\\nAssistant:".'
        )
    template = REPLIES[data.template] if template is None else template
    if template.count("{text}") != 1:
        raise ValueError(
            f"environment.reply_template is {template!r}; what is said takes the place of {{text}} in it, once. Write "
            '"\\nUser: {text}\\nAssistant:", say.'
        )
    before, _, after = template.partition("{text}")
    return ReplyForm(STOPS.get(data.template, ()), before, after)


REPLIES = {"r1_zero": " User: {text} Assistant:", "r1_zero_think": " User: {text} Assistant: <think>"}
"""The paper's template begins with "A conversation between User and Assistant", and goes on as it began."""

STOPS = {"r1_zero": ("</answer>",), "r1_zero_think": ("</answer>",)}
"""A base model that has answered would go on with a question of its own."""


def _chat_reply(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ReplyForm:
    """What a chat template writes between the assistant's words and the user's, and behind these, found by rendering it once."""
    turns = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _WORDS},
        {"role": "user", "content": _FIRST},
    ]
    behind = chat_text(turns, tokenizer, data).rpartition(_WORDS)[2]
    if behind.count(_FIRST) != 1:
        raise ValueError(
            "data.template is 'chat'; the tokenizer's chat template leaves out what a user says to an answer, and an environment "
            "speaks as one. Set data.template to r1_zero, or name a file with another chat template (data.chat_template)."
        )
    end = next((each for each in _ends(tokenizer) if behind.lstrip().startswith(each)), "")
    before, _, after = (behind.lstrip().removeprefix(end) if end else behind).partition(_FIRST)
    return ReplyForm((), before, after, end, frozenset(_special(tokenizer).values()))
