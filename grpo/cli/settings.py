"""Every setting with its meaning, its type and its default.

grpo settings                 all of them
grpo settings rollout         of one section
grpo settings temperature     those whose name or meaning has the word
grpo settings num_generations what TRL or verl call so
grpo settings sft             of supervised training, what is not as above
grpo settings --markdown      as a page of documentation: docs/settings.md
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grpo.config.elsewhere import ELSEWHERE, SUPERVISED
from grpo.system.parser import Parser

if TYPE_CHECKING:
    from grpo.config.settings import Settings

PAGE_HEAD = """# Settings

`grpo settings --markdown > docs/settings.md` writes this page.

"""


@dataclass(frozen=True)
class Setting:
    name: str  # section.setting
    type: str
    default: str
    meaning: str


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", help="a section, a setting, or a word of its meaning")
    parser.add_argument("--markdown", action="store_true", help="as a page of documentation")
    arguments = parser.parse_args()
    every = list(settings())
    found = chosen(every, arguments.word)
    foreign = [table[arguments.word] for table in (ELSEWHERE, SUPERVISED) if arguments.word in table]
    for answer in foreign:
        print(answer)
    if foreign:
        found = [each for each in every if re.search(rf"\b{re.escape(each.name)}\b", " ".join(foreign))]
    elif not found:
        parser.error(f"no setting has {arguments.word!r} in its name or meaning.{_nearest(every, arguments.word)}")
    print(PAGE_HEAD + as_markdown(found) if arguments.markdown else "\n".join(map(as_text, found)))


def _nearest(every: list[Setting], word: str) -> str:
    parts = {part for each in every for part in (each.name, *each.name.split("."))}
    near = difflib.get_close_matches(word, sorted(parts | ELSEWHERE.keys() | SUPERVISED.keys()), n=1, cutoff=0.7)
    return "".join(f" Did you mean {each}?" for each in near) or " `grpo settings` lists all."


def settings() -> Iterator[Setting]:
    """All of them, in the order of the sections; then those of supervised training that are not the same."""
    from grpo.config.settings import Config
    from grpo.config.supervised import SupervisedConfig

    first = list(_settings(Config))
    yield from first
    known = {each.name: each for each in first}
    for each in _settings(SupervisedConfig):
        if known.get(each.name) != each:
            yield replace(each, name=f"sft {each.name}")


def _settings(config: type[Settings]) -> Iterator[Setting]:
    from grpo.config.sections import RewardConfig, ScheduleConfig

    listed: dict[str, tuple[str, type[BaseModel]]] = {
        "rewards": ("rewards.<number>", RewardConfig),
        "schedules": ("schedules.<setting>", ScheduleConfig),
    }
    for section, field in config.model_fields.items():
        prefix, model = listed.get(section, (section, field.annotation))
        assert isinstance(model, type), f"section {section} is not a model"
        assert issubclass(model, BaseModel), f"section {section} is not a model"
        meanings = meanings_of(model)
        for name, inner in model.model_fields.items():
            yield Setting(f"{prefix}.{name}", type_of(inner), default_of(inner), meanings.get(name, ""))


def chosen(every: list[Setting], word: str | None) -> list[Setting]:
    """Those of a section of that name; else those that have the word in their name; else in their meaning."""
    if word is None:
        return every
    whole = re.compile(rf"\b{re.escape(word)}", re.IGNORECASE)
    of_section = [each for each in every if word in (each.name.split(".")[0], each.name.split()[0])]
    named = [each for each in every if word.lower() in each.name.lower()]
    return of_section or named or [each for each in every if whole.search(each.meaning)]


def as_text(setting: Setting) -> str:
    return f"{setting.name}  ({setting.type}; default: {setting.default})\n    {setting.meaning}"


def as_markdown(found: list[Setting]) -> str:
    """A table for each section."""
    lines: list[str] = []
    section = ""
    for each in found:
        if each.name.split(".")[0] != section:
            section = each.name.split(".")[0]
            lines += ["", f"## {section}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{each.name}`", each.type, f"`{each.default}`", each.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:])


def type_of(field: FieldInfo) -> str:
    """Such as `whole number`, `a | b`, `list of text`; the bounds are in the message that refuses a value."""
    return _type(field.annotation)


NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "any"}


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(str(each) for each in inner)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(each) for each in inner))
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_of(field: FieldInfo) -> str:
    if field.default_factory is not None:
        value = field.get_default(call_default_factory=True, validated_data={})
    else:
        value = field.default
    if value is PydanticUndefined:
        return "none; it must be set"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _is_plain(value) else str(value)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool)


def meanings_of(model: type[BaseModel]) -> dict[str, str]:
    """Of each field the text that stands beneath it in the source, in one line; of the classes that a class is based on too."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(node, ast.ClassDef), f"the source of {each.__name__} is not a class"
            found |= dict(_meanings(node))
    return found


def _meanings(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, beneath in itertools.pairwise(node.body):
        match field, beneath:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
