"""Which tools and which environment there are: found, described, and called in worker processes that can be killed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.config import DataConfig, ToolsConfig
from grpo.config.sections import ScoringConfig
from grpo.data.rows import MESSAGES
from grpo.scoring.binding import pickled
from grpo.scoring.reward import loaded_files, resolve_function
from grpo.scoring.worker import Call, FunctionBug, Outcome
from grpo.scoring.worker_pool import Errand, WorkerPool
from grpo.system import progress
from grpo.system.stopping import RunError
from grpo.turns.environment import Environment
from grpo.turns.episode import Action
from grpo.turns.form import Unreadable, encodable, read_call, without_fence
from grpo.turns.runner import GAP, OBSERVATION, Runner
from grpo.turns.schema import Schema, mismatch, schema_of
from grpo.types import CallStatus, Reply, ToolCall

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

    @property
    def object(self) -> int | None:
        """Which of a conversation's objects it changes."""
        return self.tool.runner if self.tool.method else None


@dataclass(frozen=True)
class Ask:
    """A step of the environment that can be made."""

    action: Action
    text: str  # of the turn
    seed: int


@dataclass(frozen=True)
class Answer:
    """What came of a call: how it is counted, and what the model reads."""

    call: ToolCall
    text: str


States = dict[int, bytes]
"""Of a conversation: by the number of their runner, the objects that it has to itself."""


class Toolbox:
    """The tools of a run and its environment, and the processes they run in.

    Args:
        given: functions and classes.
        args: of each, arguments that are not the model's to choose.
        environment: what answers a turn that has no calls; None: nobody.

    Raises:
        ValueError: a tool has no types or no docstring, two have one name, or one cannot be sent to a process.
    """

    def __init__(
        self,
        given: Sequence[Given],
        args: Sequence[Mapping[str, Any]] | None = None,
        *,
        environment: Environment | None = None,
        timeout_seconds: float,
        num_workers: int,
        memory_gib: float,
        variables: Sequence[str] = (),
    ) -> None:
        self.timeout_seconds, self.environment = timeout_seconds, environment
        self.runners = [_runner(each, dict(own)) for each, own in zip(given, args or [{}] * len(given), strict=True)]
        self.tools: dict[str, Tool] = {}
        for tool in (tool for number, runner in enumerate(self.runners) for tool in _tools(number, runner)):
            if tool.name in self.tools:
                raise ValueError(
                    f"{SETTING} has two tools of the name {tool.name!r}; a model tells them apart by name. Rename one of them."
                )
            self.tools[tool.name] = tool
        calls = [pickled(runner, f"tool {runner.name}", own=runner.make) for runner in self.runners]
        makers = [runner.make for runner in self.runners]
        if environment is not None:
            own = environment.runner
            calls.append(pickled(own, f"environment {own.name}", own=own.source))
            makers.append(own.source)
        modules = dict.fromkeys(map(_module_of, makers))
        with progress.busy("starting the tool workers"):
            self._pool = WorkerPool(
                calls,
                files=[loaded_files[name] for name in modules if name in loaded_files],
                num_workers=num_workers,
                memory_gib=memory_gib,
                environment=variables,
            )

    @classmethod
    def of(
        cls,
        config: ToolsConfig,
        scoring: ScoringConfig,
        given: Sequence[Given] | None = None,
        environment: Environment | None = None,
    ) -> Toolbox | None:
        """The tools that a configuration names, or those that are given instead; None if there are none, and no environment.

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
        if not functions and environment is None:
            return None
        return cls(
            functions,
            args,
            environment=environment,
            timeout_seconds=config.timeout_seconds,
            num_workers=scoring.num_workers,
            memory_gib=scoring.memory_gib,
            variables=scoring.environment,
        )

    @property
    def schemas(self) -> list[Schema]:
        return [tool.schema for tool in self.tools.values()]

    def notices(self) -> list[str]:
        """What is to be said before the tools are used: what their `_notice` attributes return."""
        made = [runner.make for runner in self.runners]
        if self.environment is not None:
            made.append(self.environment.runner.source)
        texts = [getattr(each, "_notice", lambda: None)() for each in made]
        return [text for text in texts if text is not None]

    def read(self, text: str) -> Request | Answer:
        """A call as a model wrote it, or what is wrong with it.

        It is a JSON object with `name` and `arguments`. Where there is one tool that needs one text and nothing else, such as
        `python`, any text but an object is that.
        """
        try:
            text = without_fence(text)
            bare = None if text.lstrip().startswith("{") or not text.strip() else self._of_a_text()
            name, arguments = read_call(text) if bare is None else (bare[0], {bare[1]: text})
        except Unreadable as error:
            if error.name and error.name not in self.tools:
                return self._unknown(error.name)
            return _no(error.name, "unreadable", str(error))
        if name not in self.tools:
            return self._unknown(name)
        wrong = mismatch(arguments, self.tools[name].schema)
        return Request(self.tools[name], arguments) if wrong is None else _no(name, "refused", wrong)

    def _of_a_text(self) -> tuple[str, str] | None:
        """The only tool and the only argument that it needs, which is a text."""
        if len(self.tools) != 1:
            return None
        ((name, tool),) = self.tools.items()
        parameters = tool.schema["function"]["parameters"]
        needed = parameters.get("required", [])
        is_text = len(needed) == 1 and parameters["properties"][needed[0]].get("type") == "string"
        return (name, needed[0]) if is_text else None

    def _unknown(self, name: str) -> Answer:
        return _no(name, "refused", f"there is no tool {name!r}; there is {', '.join(self.tools)}")

    def begin(self) -> Errand:
        """Make calls that are still to come, while this thread does something else."""
        return self._pool.begin()

    def call(self, request: Request | Ask, states: States, columns: Mapping[str, Any]) -> Call:
        """The call that a worker is to make.

        Args:
            columns: of the question.
        """
        if isinstance(request, Ask):
            assert self.environment is not None, "who asks has one"
            number = len(self.runners)
            step = {"action": request.action, "text": request.text, "seed": request.seed}
            state = {"state": states.get(number), "columns": {} if number in states else columns}
            return Call(number, {**step, **state}, self.environment.config.timeout_seconds)
        tool = request.tool
        own = columns if tool.method and tool.runner not in states else {}  # only `reset` is given them
        arguments = {
            "method": tool.method,
            "arguments": request.arguments,
            "state": states.get(tool.runner),
            "columns": own,
        }
        # once: what a call has done in the world before its worker died is not to be done twice
        return Call(tool.runner, arguments, self.timeout_seconds, once=True)

    def answer(self, request: Request | Ask, outcome: Outcome, states: States) -> Answer | Reply:
        """What came of it; the conversation's objects are then as the call left them."""
        if isinstance(request, Ask):
            if outcome.kind != "value":
                return Reply(None, None, outcome.seconds)
            step = outcome.value
            if step.state is not None:
                states[len(self.runners)] = step.state
            return Reply(step.said, step.reward, outcome.seconds)
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
        """What comes of calls as a model wrote them, made one after another.

        Raises:
            RunError: a class's object cannot be made, begun or kept.
        """
        found: list[Answer] = []
        for text in calls:
            request = self.read(text)
            if isinstance(request, Request):
                with self.begin() as errand:
                    try:
                        errand.add([self.call(request, states, {})])
                        outcome = errand.result()[0]
                    except FunctionBug as bug:
                        raise self.unusable(request, bug) from None
                made = self.answer(request, outcome, states)
                assert isinstance(made, Answer), "a tool's"
                found.append(made)
            else:
                found.append(request)
        return found

    def unusable(self, request: Request | Ask, bug: FunctionBug) -> RunError:
        """What to say of a bug in what was called."""
        if isinstance(request, Ask):
            assert self.environment is not None, "it was asked"
            said = f" on the turn {request.text[-500:]!r}" if request.action == "step" else ""
            return RunError(
                f"Environment {self.environment.runner.name} raised an exception in `{request.action}`{said}. This is a bug in "
                f"the environment: what the model writes badly must be answered inside of it.\n{bug.worker_traceback}"
            )
        return RunError(
            f"Tool {request.tool.name} cannot be used: its object cannot be made, its `reset` raised an exception, or the object "
            f"cannot be kept between two calls (pickle).\n{bug.worker_traceback}"
        )

    def observed(self, rows: Sequence[dict[str, Any]], data: DataConfig) -> list[dict[str, Any]]:
        """The rows with what each `reset` has to say of them behind their question, and as a column of its own.

        Raises:
            RunError, ValueError: as observations and with_observations.
        """
        return with_observations(rows, self.observations(rows), data)

    def observations(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """What each `reset` has to say of the rows; empty: nothing, of none.

        A class whose `reset` says nothing of the first row is not asked about the others.

        Raises:
            ValueError: a `reset` asks for a column that the rows do not have.
            RunError: a `reset` raised an exception, or took too long.
        """
        for name, make in self._begun():
            check_columns(name, make, rows)
        said = [self._said(number, name, rows) for number, name in self._resettable()]
        texts = ["\n".join(filter(None, each)) for each in zip(*said, strict=True)]
        return texts if any(texts) else []

    def _resettable(self) -> list[tuple[int, str]]:
        """Runners whose objects may say something when they begin, by number, and what they are called in errors."""
        own = [
            (number, f"Tool {runner.name}")
            for number, runner in enumerate(self.runners)
            if runner.is_object and hasattr(runner.make, "reset")
        ]
        environment = self.environment
        return own + ([] if environment is None else [(len(self.runners), f"Environment {environment.runner.name}")])

    def _begun(self) -> list[tuple[str, Callable[..., Any]]]:
        """What makes objects for a question, as a person calls it."""
        own = [(f"Tool {runner.name}", runner.make) for runner in self.runners if runner.is_object]
        return own + (
            []
            if self.environment is None
            else [(f"Environment {self.environment.runner.name}", self.environment.runner.source)]
        )

    def _said(self, number: int, name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
        """What the `reset` of the objects of a runner says of each row."""
        if not any(first := self._resets(number, name, rows[:1])):
            return [""] * len(rows)
        return first + self._resets(number, name, rows[1:])

    def _resets(self, number: int, name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
        of_tool = number < len(self.runners)
        environment = self.environment
        seconds = self.timeout_seconds if of_tool or environment is None else environment.config.timeout_seconds
        own = {"method": "reset", "arguments": {}} if of_tool else {"action": "reset", "text": "", "seed": 0}
        try:
            outcomes = self._pool.run([Call(number, {**own, "state": None, "columns": row}, seconds) for row in rows])
        except FunctionBug as bug:
            raise RunError(
                f"{name} raised an exception as its object was made for a question, or in its `reset`.\n{bug.worker_traceback}"
            ) from None
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.kind != "value":
                raise RunError(f"{name} ended in a {outcome.kind} in its `reset` for {str(row)[:500]}")
        return [outcome.value[1] if of_tool else outcome.value for outcome in outcomes]

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def log_to(self, path: Path) -> None:
        """Append what tools and environments print to this file; until then it is dropped."""
        self._pool.output = path.resolve()

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_columns(name: str, make: Callable[..., Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError: the `reset` of a class asks for columns that the rows do not have."""
    reset = getattr(make, "reset", None)
    if not rows or not inspect.isfunction(reset):
        return
    _, *parameters = inspect.signature(reset).parameters.values()
    missing = [
        each.name
        for each in parameters
        if each.default is each.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        and each.name not in (*rows[0], "row")
    ]
    if missing:
        raise ValueError(
            f"{name}: its `reset` asks for {', '.join(missing)}; the rows have the columns {', '.join(rows[0])}. Name data that "
            "has them, or give the parameters of `reset` defaults."
        )


def _no(name: str, status: CallStatus, why: str, seconds: float = 0.0) -> Answer:
    return Answer(ToolCall(encodable(name), status, seconds), f"error: {why}")


def with_observations(rows: Sequence[dict[str, Any]], texts: Sequence[str], data: DataConfig) -> list[dict[str, Any]]:
    """The rows with these texts behind their questions, and as a column of their own.

    Args:
        texts: one for each, or none.

    Raises:
        ValueError: there is no place for them, or a column of the name.
    """
    if not texts:
        return list(rows)
    if data.template == "none" and data.question_template is not None:
        raise ValueError(
            f"data.question_template is {data.question_template!r} with data.template none, and a `reset` returned "
            f"{texts[0][:80]!r}; it would stand behind the template, where the model is to go on. Put it into a column of "
            "the data, or set data.template to r1_zero or chat."
        )
    if OBSERVATION in rows[0]:
        raise ValueError(
            f"the data has a column {OBSERVATION!r}, under which what a `reset` returned is kept. Rename the column."
        )
    return [_with_observation(row, text) for row, text in zip(rows, texts, strict=True)]


def _with_observation(row: dict[str, Any], text: str) -> dict[str, Any]:
    question = f"{row['question']}{GAP}{text}" if text and row["question"] else row["question"] or text
    turns = row.get(MESSAGES)
    own = {MESSAGES: [*turns[:-1], {**turns[-1], "content": question}]} if turns else {}
    return {**row, "question": question, OBSERVATION: text, **own}


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
