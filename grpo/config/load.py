"""YAML and overrides in, plain settings out; and back."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

FLOAT = re.compile(
    r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
INT = re.compile(r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
FIRST_OF_NUMBER = list("-+.0123456789")
_NUMBERS = {"tag:yaml.org,2002:int": INT, "tag:yaml.org,2002:float": FLOAT}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this one refuses them.

    And PyYAML reads numbers as YAML 1.1 does: 1e-3 is a text, 010 is 8, and 1:30 is 90. Here they are what YAML 1.2 says, and
    what one means by them: a thousandth, ten, and a text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in PyYAML)
        first: [each for each in found if each[0] not in _NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            again = [key for key, _ in node.value if self.construct_object(key, deep=True) in twice][-1]
            where = f"line {again.start_mark.line + 1} of {self.name}"
            raise ValueError(f"key {sorted(twice)[0]!r} is given twice, the second time in {where}. Keep one of them.")
        return super().construct_mapping(node, deep=deep)


def _construct_int(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 10 if text.lstrip("+-").isdecimal() else 0)


class _StrictDumper(yaml.SafeDumper):
    """Quotes texts that the loader would take for numbers."""


for _tag, _pattern in _NUMBERS.items():
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern.pattern})$"), FIRST_OF_NUMBER)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_text(path: Path, setting: str) -> str:
    """A file that a person wrote.

    Args:
        setting: what names the file, and what it is, for the error.

    Raises:
        ValueError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}; the file cannot be read: {error}. Save it as UTF-8.") from error


def read_yaml(text: str, *, where: str = "the text") -> Any:
    """As a configuration is read. Raises ValueError for a key that is given twice, and yaml.YAMLError.

    Args:
        where: the file's name, for the error.
    """
    loader = _StrictLoader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def write_yaml(value: Any, **options: Any) -> str:
    """So that `read_yaml` gives the value again."""
    return str(yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, **options))


def read_settings(text: str, where: str) -> dict[str, Any]:
    try:
        settings = read_yaml(text, where=where)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{where} is not valid YAML{_problem(error)}. Correct it; YAML is indented by spaces."
        ) from None
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds {settings!r}"
        raise ValueError(f"{where} {found}; a configuration is a mapping of sections. See configs/.")
    return settings


def _problem(error: yaml.YAMLError) -> str:
    """Where and what, in a line; PyYAML says it in five."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    return f"{where}: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"


def apply_override(settings: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"--set {override!r}: an override reads section.setting=value, such as run.steps=10.")
    put(settings, path.strip(), _read_value(value, override))


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set what `path`, such as `run.steps` or `rewards.0.weight`, names. A whole section keeps what is not named of it.

    Raises:
        ValueError: it leads through something that is no section.
    """
    node: Any = settings
    *parents, last = path.split(".")
    if not parents and last != "schedules" and isinstance(value, dict) and isinstance(settings.get(last), dict):
        value = settings[last] | value
    for name in parents:
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        node = node[_child_key(node, name, path)]
    node[_child_key(node, last, path)] = value


def _read_value(text: str, override: str) -> Any:
    """The text as YAML; as it stands where YAML would take it for a comment, such as the pattern `####\\s*(.+)`."""
    if text.lstrip().startswith("#"):
        return text
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {override!r}: {text!r} is not valid YAML{_problem(error)}. Quote it.") from None


def _child_key(node: Any, name: str, path: str) -> str | int:
    if isinstance(node, dict):
        return name
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return int(name)
    if isinstance(node, list):
        raise ValueError(
            f"--set {path}: {name!r} is no entry of a list of {len(node)}; entries are numbered from 0. Correct it, or set the "
            "whole list."
        )
    raise ValueError(f"--set {path}: there is no {name!r} to set in {node!r}. Correct the name.")


def as_override(text: str) -> str:
    """A text as the value of an override that reads it back: as it stands, unless YAML would take it for something else."""
    return text if _read_value(text, "") == text else json.dumps(text)
