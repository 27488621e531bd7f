"""What a run was given besides its settings, as digests: its questions, and the source of its rewards, tools and environment, and
of the functions that stand in for the library's own.

Files may be edited between a run and its resumption under the same names. Checkpoints keep these digests, and a run that
resumes from one compares them.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType
from typing import Any

import xxhash

from grpo.data.rows import canonical
from grpo.scoring.reward import Reward, changed_variables
from grpo.turns.environment import Environment
from grpo.turns.runner import Runner
from grpo.types import Prompt

QUESTIONS, HELD_OUT = "the training questions", "held-out questions"
OWN = {name: f"the {name}" for name in ("advantage", "loss", "optimizer", "order")}
"""Argument of Trainer that is a function -> what a person calls it."""
LIBRARY = "the library's"


def digests(
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    tools: Sequence[Runner] = (),
    environment: Environment | None = None,
    own: Mapping[str, Callable[..., Any] | None] | None = None,
    what: str = QUESTIONS,
) -> dict[str, str]:
    """By what a person calls it. Held-out questions have their number in the name, since another number of them may be asked.

    Args:
        own: of each argument in OWN the function that was given; None: the library's.
        what: the questions are called.
    """
    found = {what: _of_prompts(prompts)}
    if eval_prompts:
        found[f"the {len(eval_prompts)} {HELD_OUT}"] = _of_prompts(eval_prompts)
    found |= of_tools(tools)
    found |= of_environment(environment)
    found |= {OWN[name]: LIBRARY if function is None else _of_own(function) for name, function in (own or {}).items()}
    return found | {f"the reward {reward.name}": _of_reward(reward) for reward in rewards}


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not as it was; a set of held-out questions of another size is another set, and older checkpoints do not say whose
    of OWN they were written with."""
    return [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not ((name.endswith(HELD_OUT) or name in OWN.values()) and not (name in before and name in now))
    ]


def described(name: str, before: dict[str, str], now: dict[str, str]) -> str:
    """Something that changed; of a function that stands in for the library's, or did, also what it was and is."""
    if name not in OWN.values():
        return name
    was, is_now = (text if (text := each[name]) == LIBRARY else text.rpartition(" ")[0] for each in (before, now))
    return f"{name} (was {was}, is {is_now})" if was != is_now else f"{name} ({was})"


def _of_prompts(prompts: Sequence[Prompt]) -> str:
    """In their order, each as the model reads it and with the columns that rewards are given."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        columns = sorted(prompt.columns.items(), key=lambda column: str(column[0]))
        digest.update(canonical({"text": prompt.text, "columns": dict(columns)}))
    return digest.hexdigest()


def _of_reward(reward: Reward) -> str:
    """Of its arguments, and of the files that it and what it calls are defined in, of its own package or folder."""
    digest = xxhash.xxh3_128(json.dumps(reward.args, sort_keys=True, default=plain).encode())
    if reward.made_with:
        digest.update(json.dumps(reward.made_with, sort_keys=True, default=plain).encode())
    for function in (reward.function, getattr(reward.function, "check_row", None)):
        if function is not None:
            digest.update(_source_of(function))
    return digest.hexdigest()


def of_tools(tools: Sequence[Runner]) -> dict[str, str]:
    """By what a person calls it."""
    return {f"the tool {tool.name}": _of_given(tool.make, tool.given) for tool in tools}


def of_environment(environment: Environment | None) -> dict[str, str]:
    """By what a person calls it; empty: there is none."""
    if environment is None:
        return {}
    runner = environment.runner
    return {f"the environment {runner.name}": _of_given(runner.source, runner.given)}


def _of_given(made: Callable[..., Any], given: dict[str, Any]) -> str:
    """Of a tool's or an environment's arguments, and of the files that it is defined in, as of a reward."""
    digest = xxhash.xxh3_128(json.dumps(given, sort_keys=True, default=plain).encode())
    digest.update(_source_of(made))
    return digest.hexdigest()


def _of_own(function: Callable[..., Any]) -> str:
    """Its name, and a digest of its source, of the arguments of a `partial`, and of the constants that it was made with."""
    digest = xxhash.xxh3_128()
    while isinstance(function, partial):
        digest.update(_text([function.args, function.keywords]).encode())
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)  # of an object: its class
    code = getattr(function, "__code__", None)
    digest.update(named.__qualname__.encode())
    if code is not None and named.__name__ == "<lambda>":  # its lines may hold the settings too, or another one
        digest.update(_compiled(code).encode())
    if named.__name__ != "<lambda>" or _is_in_a_file(named):
        digest.update(_source_of(named))
    digest.update(json.dumps(_made_with(function), sort_keys=True).encode())
    return f"{named.__name__} {digest.hexdigest()}"


def _compiled(code: CodeType) -> str:
    """A function's code, wherever it stands."""
    constants = [
        _compiled(each)
        if isinstance(each, CodeType)
        else repr(sorted(map(repr, each)) if isinstance(each, frozenset) else each)
        for each in code.co_consts
    ]
    return repr([code.co_code, code.co_names, constants])


def _made_with(function: Callable[..., Any]) -> dict[str, Any]:
    """The constants among the defaults of its parameters, the variables of the functions around it, and the attributes of its
    object, be that called itself or by a method. Variables and attributes that the source changes are left out, as a counter."""
    called = function
    if not hasattr(function, "__code__"):  # an object
        called = function.__call__  # type: ignore[operator] # which mypy does not know of one
    held = _enclosed(called) | _defaults(called)
    if inspect.ismethod(called) and not isinstance(called.__self__, type):
        attributes, changes = getattr(called.__self__, "__dict__", {}), _attributes_changed(type(called.__self__))
        held |= {f"self.{name}": each for name, each in attributes.items() if name not in changes}
    return {name: each for name, each in held.items() if _is_constant(each)}


def _is_constant(value: Any) -> bool:
    """A number, a text, None, or a tuple of them; not a list, say, which may be filled while the run goes on."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, str | int | float)


def _enclosed(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables of the functions around one that it reads and does not change."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    held = {}
    for name, cell in zip(code.co_freevars if code is not None else (), cells, strict=True):
        with suppress(ValueError):  # one that has no value yet
            held[name] = cell.cell_contents
    changes = changed_variables(function) if held else []
    return {name: each for name, each in held.items() if name not in changes}


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Of its parameters: a source says how a default is computed, and not what came of it."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    defaults = getattr(function, "__defaults__", None) or ()
    named = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return dict(zip(named, defaults, strict=True)) | (getattr(function, "__kwdefaults__", None) or {})


def _attributes_changed(kind: type) -> frozenset[str]:
    """Attributes of its objects that methods other than those which make them assign, as far as the source can be seen."""
    found: set[str] = set()
    for each in kind.__mro__[:-1]:
        try:
            (written,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except (OSError, TypeError, SyntaxError):
            continue
        methods = [node for node in ast.walk(written) if isinstance(node, ast.FunctionDef) and node.name not in MAKING]
        found |= {
            node.attr
            for method in methods
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
    return frozenset(found)


MAKING = ("__new__", "__init__", "__post_init__")


def _is_in_a_file(function: Callable[..., Any]) -> bool:
    """Of a module; a script holds the run's settings too, and a notebook has no file."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    place = getattr(module, "__file__", None) or ""
    return module is not None and module.__name__ not in ("__main__", "__mp_main__") and place.endswith(".py")


def _source_of(function: Callable[..., Any]) -> bytes:
    if not _is_in_a_file(function):
        try:
            return inspect.getsource(function).encode()
        except (OSError, TypeError):
            return b""
    place = sys.modules[function.__module__].__file__
    assert place is not None, "a module of a file has one"
    return b"\0".join(path.read_bytes() for path in _files(Path(place)))


def _files(start: Path) -> list[Path]:
    """A source file, and those in its folder that it imports, directly or through others."""
    found, waiting = {start}, [start]
    while waiting:
        named = _names_imported(waiting.pop().read_bytes())
        beside = {path for name in named if (path := start.parent / f"{name}.py").is_file()} - found
        found |= beside
        waiting += beside
    return sorted(found)


@lru_cache(maxsize=256)
def _names_imported(source: bytes) -> frozenset[str]:
    """The last part of each name. Parsing the built-in rewards takes a third of a second, which each Trainer would wait for."""
    return frozenset(name.rpartition(".")[2] for node in ast.walk(ast.parse(source)) for name in _imported(node))


def _imported(node: ast.AST) -> list[str]:
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return []
    own = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return [*own, *(alias.name for alias in node.names)]


def _text(value: Any) -> str:
    """The same for equal values in every process; also of mappings with keys that JSON does not know or cannot sort."""
    try:
        return json.dumps(value, sort_keys=True, default=plain)
    except TypeError:
        if isinstance(value, Mapping):
            return f"{{{', '.join(sorted(f'{_text(key)}: {_text(each)}' for key, each in value.items()))}}}"
        return f"[{', '.join(map(_text, value))}]"  # of which one is such a mapping


def plain(value: Any) -> str:
    """What JSON does not know, without the addresses of objects, and sets in one order."""
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(plain, value)))}}}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
