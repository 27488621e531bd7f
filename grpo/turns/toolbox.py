"""Which tools there are: found, described, and called in worker processes that can be killed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import ToolsConfig
from grpo.config.sections import ScoringConfig
from grpo.scoring.binding import pickled
from grpo.scoring.reward import loaded_files, resolve_function
from grpo.scoring.worker import Call, Outcome
from grpo.scoring.worker_pool import Errand, WorkerPool
from grpo.system import progress
from grpo.turns.form import encodable
from grpo.turns.runner import Runner
from grpo.turns.schema import Schema, mismatch, schema_of
from grpo.types import CallStatus, ToolCall

SETTING = "tools.functions"

Given = Callable[..., Any] | type
"""A function, or a class: each conversation has an object of its own, which is called, or whose public methods are the tools."""


@dataclass(frozen=True)
class Tool:
    """What a model can call by a name."""

    name: str
    schema: Schema
    runner: int  # its number in the pool
    method: str = ""  # of an object


@dataclass(frozen=True)
class Request:
    """A call that can be made."""

    tool: Tool
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of a call: how it is counted, and what the model reads."""

    call: ToolCall
    text: str


States = dict[int, bytes]
"""Of a conversation: by the number of their runner, the objects that it has to itself."""


class Toolbox:
    """The tools of a run, and the processes they run in.

    Args:
        given: functions and classes.
        args: of each, arguments that are not the model's to choose.

    Raises:
        ValueError: a tool has no types or no docstring, two have one name, or one cannot be sent to a process.
    """

    def __init__(
        self,
        given: Sequence[Given],
        args: Sequence[Mapping[str, Any]] | None = None,
        *,
        timeout_seconds: float,
        num_workers: int,
        memory_gib: float,
        environment: Sequence[str] = (),
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.runners = [_runner(each, dict(own)) for each, own in zip(given, args or [{}] * len(given), strict=True)]
        self.tools: dict[str, Tool] = {}
        for tool in (tool for number, runner in enumerate(self.runners) for tool in _tools(number, runner)):
            if tool.name in self.tools:
                raise ValueError(
                    f"{SETTING} has two tools of the name {tool.name!r}; a model tells them apart by name. Rename one of them."
                )
            self.tools[tool.name] = tool
        modules = dict.fromkeys(_module_of(runner.make) for runner in self.runners)
        with progress.busy("starting the tool workers"):
            self._pool = WorkerPool(
                [pickled(runner, f"tool {runner.name}", own=runner.make) for runner in self.runners],
                files=[loaded_files[name] for name in modules if name in loaded_files],
                num_workers=num_workers,
                memory_gib=memory_gib,
                environment=environment,
            )

    @classmethod
    def of(cls, config: ToolsConfig, scoring: ScoringConfig, given: Sequence[Given] | None = None) -> Toolbox | None:
        """The tools that a configuration names, or those that are given instead; None if there are none.

        Raises:
            ValueError: as Toolbox; a name is unknown, or a tool refuses to run here (its `_check`, which is given its args).
        """
        if given is None:
            functions = [resolve_function(each.function, SETTING, "grpo.tools") for each in config.functions]
            args = [each.args for each in config.functions]
        else:
            functions, args = list(given), [{} for _ in given]
        for function, own in zip(functions, args, strict=True):
            getattr(function, "_check", lambda **_: None)(**own)
        if not functions:
            return None
        return cls(
            functions,
            args,
            timeout_seconds=config.timeout_seconds,
            num_workers=scoring.num_workers,
            memory_gib=scoring.memory_gib,
            environment=scoring.environment,
        )

    @property
    def schemas(self) -> list[Schema]:
        return [tool.schema for tool in self.tools.values()]

    def notices(self) -> list[str]:
        """What is to be said before the tools are used: what their `_notice` attributes return."""
        texts = [getattr(runner.make, "_notice", lambda: None)() for runner in self.runners]
        return [text for text in texts if text is not None]

    def read(self, text: str) -> Request | Answer:
        """A call as a model wrote it, a JSON object with `name` and `arguments`; or what is wrong with it."""
        try:
            call = json.loads(text)
        except (ValueError, RecursionError) as error:
            return _no("", "unreadable", f"the call is no JSON: {error}")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return _no("", "unreadable", 'a call is a JSON object, {"name": ..., "arguments": {...}}')
        name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # as OpenAI has them
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                return _no(name, "unreadable", f"the arguments are no JSON: {error}")
        if name not in self.tools:
            return _no(name, "refused", f"there is no tool {name!r}; there is {', '.join(self.tools)}")
        if not isinstance(arguments, dict):
            return _no(name, "unreadable", "the arguments are no JSON object")
        wrong = mismatch(arguments, self.tools[name].schema)
        return Request(self.tools[name], arguments) if wrong is None else _no(name, "refused", wrong)

    def begin(self) -> Errand:
        """Make calls that are still to come, while this thread does something else."""
        return self._pool.begin()

    def call(self, request: Request, states: States, columns: Mapping[str, Any]) -> Call:
        """The call that a worker is to make.

        Args:
            columns: of the question.
        """
        tool = request.tool
        own = columns if tool.method and tool.runner not in states else {}  # only `reset` is given them
        arguments = {
            "method": tool.method,
            "arguments": request.arguments,
            "state": states.get(tool.runner),
            "columns": own,
        }
        return Call(tool.runner, arguments, self.timeout_seconds)

    def answer(self, request: Request, outcome: Outcome, states: States) -> Answer:
        """What came of it; the conversation's objects are then as the call left them."""
        name = request.tool.name
        if outcome.kind == "timeout":
            return _no(name, "timeout", f"{name} took longer than {self.timeout_seconds:g} seconds", outcome.seconds)
        if outcome.kind == "crash":
            return _no(name, "crash", f"{name} took too much memory, or its process died", outcome.seconds)
        well, text, state = outcome.value
        if state is not None:
            states[request.tool.runner] = state
        return Answer(ToolCall(name, "ok" if well else "error", outcome.seconds), text if well else f"error: {text}")

    def answers(self, calls: list[str], states: States) -> list[Answer]:
        """What comes of calls as a model wrote them, made one after another."""
        found = []
        for text in calls:
            request = self.read(text)
            if isinstance(request, Request):
                with self.begin() as errand:
                    errand.add([self.call(request, states, {})])
                    request = self.answer(request, errand.result()[0], states)
            found.append(request)
        return found

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _no(name: str, status: CallStatus, why: str, seconds: float = 0.0) -> Answer:
    return Answer(ToolCall(encodable(name), status, seconds), f"error: {why}")


def _runner(given: Given, args: dict[str, Any]) -> Runner:
    return Runner(given, args, is_object=inspect.isclass(given))


def _tools(number: int, runner: Runner) -> Iterator[Tool]:
    if not callable(runner.make):
        raise ValueError(f"{SETTING} has {runner.make!r}; a tool is a function or a class. Hand over one of these.")
    name = runner.name
    _check_args(name, runner.make, runner.given)
    if inspect.isclass(runner.make):
        yield from _of_class(number, runner.make)
    else:
        yield Tool(name, schema_of(runner.make, name=name, given=runner.given), number)


def _of_class(number: int, kind: type) -> Iterator[Tool]:
    """Its objects' `__call__` under the name of the class, or else each public method."""
    if any("__call__" in vars(each) for each in kind.__mro__[:-1]):
        name = kind.__name__
        yield Tool(name, schema_of(_bound(kind, "__call__"), name=name, given={}), number, "__call__")
        return
    names = [name for name in _methods(kind) if name != "reset"]
    if not names:
        raise ValueError(
            f"{SETTING} has the class {kind.__name__}; it has no public methods, and its objects cannot be called. Give it a "
            "method with types and a docstring for each tool, or __call__."
        )
    for name in names:
        yield Tool(name, schema_of(_bound(kind, name), name=name, given={}), number, name)


def _methods(kind: type) -> Iterable[str]:
    return [name for name, value in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]


def _bound(kind: type, name: str) -> Callable[..., Any]:
    """A method without its `self`, whose signature a schema is made of; no object is made for it."""
    return getattr(kind, name).__get__(object.__new__(kind))


def _check_args(name: str, make: Callable[..., Any], args: Mapping[str, Any]) -> None:
    parameters = inspect.signature(make).parameters
    for argument in args:
        if argument not in parameters:
            raise ValueError(
                f"{SETTING} sets {argument!r} of {name}; it has no such parameter: {', '.join(parameters) or 'none'}. Remove it "
                "or correct the name."
            )


def _module_of(make: Callable[..., Any]) -> str:
    return str(getattr(make, "__module__", type(make).__module__))
