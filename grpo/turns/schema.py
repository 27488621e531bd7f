"""A typed Python function -> the JSON schema of its arguments, and whether given arguments are what it says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

Schema = dict[str, Any]
"""As OpenAI's `tools` and chat templates have it: {"type": "function", "function": {name, description, parameters}}."""


def schema_of(function: Callable[..., Any], *, name: str, given: Mapping[str, Any]) -> Schema:
    """The schema of a function, from its annotations and its docstring in Google's form, as transformers reads them.

    Args:
        function: or a method of an object.
        name: that the model calls it by.
        given: its arguments that are not the model's to choose.

    Raises:
        ValueError: an argument has no type, or no description in the docstring.
    """
    from transformers.utils import get_json_schema

    target = inspect.unwrap(function)
    described = target if inspect.isroutine(target) else type(target).__call__
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(
                f"tools has {name}; its parameter {parameter.name!r} has no name that a model could give it by. Let it have "
                "parameters with names and types."
            )
    try:
        found: Schema = get_json_schema(described)
    except Exception as error:  # of several kinds, in other words in each version
        raise ValueError(
            f"tools has {name}; a model is told of a tool by the types and the docstring of its function: {error}. Write "
            '`def lookup(word: str) -> str:` with a docstring that has a section "Args:" and a line "word: what it is".'
        ) from None
    parameters = found["function"]["parameters"]
    for argument in given:
        parameters["properties"].pop(argument, None)
    parameters["required"] = [each for each in parameters.get("required", []) if each not in given]
    description = found["function"]["description"]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def mismatch(arguments: Mapping[str, Any], schema: Schema) -> str | None:
    """What is wrong with the arguments of a call, in words for whoever made it; None if nothing is."""
    parameters = schema["function"]["parameters"]
    known, required = parameters["properties"], parameters.get("required", [])
    for name in arguments:
        if name not in known:
            return f"there is no argument {name!r}; the arguments are {', '.join(known) or 'none'}"
    for name in required:
        if name not in arguments:
            return f"the argument {name!r} is missing"
    return next((wrong for name, value in arguments.items() if (wrong := _wrong(name, value, known[name]))), None)


def _wrong(name: str, value: Any, wanted: Mapping[str, Any]) -> str | None:
    if value is None and wanted.get("nullable"):
        return None
    if "enum" in wanted and value not in wanted["enum"]:
        return f"the argument {name!r} is {value!r}; it is one of {', '.join(map(repr, wanted['enum']))}"
    kinds = wanted.get("type")
    names = [kinds] if isinstance(kinds, str) else list(kinds or [])
    if names and not any(_is(value, kind) for kind in names):
        return f"the argument {name!r} is {value!r}; it is of the type {' or '.join(names)}"
    if isinstance(value, list) and isinstance(wanted.get("items"), Mapping):
        places = (_wrong(f"{name}[{i}]", each, wanted["items"]) for i, each in enumerate(value))
        return next((wrong for wrong in places if wrong), None)
    return None


def _is(value: Any, kind: str) -> bool:
    """JSON tells true from 1, and Python does not."""
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return kind not in TYPES or isinstance(value, TYPES[kind])
