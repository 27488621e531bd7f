"""A reward function and what it is given: its form, its arguments by name, a call of it, the verdicts that come back."""

from __future__ import annotations

import inspect
import io
import json
import math
import numbers
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, ClassVar

import cloudpickle

from grpo.scoring.reward import FORMS, LARGEST, Form, Reward, RewardError, loaded_files, nearest
from grpo.scoring.worker import Call, Outcome
from grpo.system.terminal import printable

LOGS = ("log_metric", "log_extra")  # methods of worker.Logged
SHARED = (
    "finish_reason",
    "num_tokens",
    "max_completion_tokens",
    "completion_ids",
    "turns",
    "environment_reward",
    "trainer_state",
    *LOGS,
)
SINGLE = ("completion", "prompt", *SHARED)
LISTED = ("completions", "prompts", *SHARED)


@dataclass(frozen=True)
class BoundFunction:
    """A function and the names of what it is given."""

    reward: Reward
    function: Callable[..., Any]
    names: list[str]
    args: dict[str, Any]
    form: Form | None = "completion"  # None: texts or messages, as the prompts are

    @property
    def is_listed(self) -> bool:
        return self.form != "completion"

    @property
    def in_process(self) -> bool:
        """Whether the function is called in the training process, as a model on its GPU is, and not in a worker."""
        return bool(getattr(self.function, "in_process", False))

    @property
    def logs(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in LOGS)

    def arguments(self, known: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return {name: known[name] for name in self.names if name not in LOGS} | self.args

    def pickled(self) -> bytes:
        """The function as bytes: by value where a worker could not, or should not have to, import its module."""
        return pickled(self.function, f"reward {self.reward.name}", own=self.function)


def pickled(sent: Callable[..., Any], what: str, *, own: Callable[..., Any]) -> bytes:
    """A function that workers are to call as bytes.

    Args:
        sent: the function.
        what: it is, in an error.
        own: the user's function, if `sent` is made around one.

    Raises:
        ValueError: it cannot be sent to another process.
    """
    module = sys.modules.get(getattr(own, "__module__", None) or "")
    # pytest's own loader marks a test module, which imports torch and much else besides
    of_pytest = type(getattr(module, "__loader__", None)).__module__.startswith("_pytest")
    by_value = module is not None and module.__name__ != "__main__" and (of_pytest or not _can_be_imported(module))
    try:
        if by_value:
            cloudpickle.register_pickle_by_value(module)
        file = io.BytesIO()
        _Pickler(file).dump(sent)
        return file.getvalue()
    except Exception as error:
        raise ValueError(
            f"{what} is {own!r}; it runs in another process and cannot be sent there: {error}. Define it in a module, and "
            "create what it holds on to inside of it."
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _can_be_imported(module: ModuleType) -> bool:
    """Whether a process that has not done so yet finds the same module by its name: not that of a script in a process which
    `multiprocessing` has started, nor one that was read from a file or made by hand."""
    name, place = module.__name__, getattr(module, "__file__", None)
    if name in loaded_files:  # workers load these first
        return True
    if name == "__mp_main__":
        return False
    package, _, _ = name.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else None
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return place is None or spec.origin is None or Path(spec.origin).resolve() == Path(place).resolve()
    return False


def _code_of_a_file(code: CodeType) -> tuple[Any, ...]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return make, tuple(code.co_filename if each == "<dynamic-code>" else each for each in arguments)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Lets code know its file, which cloudpickle 3.1.3 conceals: a traceback of a bug shows the line."""

    dispatch_table: ClassVar = ChainMap({CodeType: _code_of_a_file}, cloudpickle.Pickler.dispatch_table)


def bind(reward: Reward, columns: list[str], elsewhere: Mapping[str, str]) -> BoundFunction:
    """Check a reward function's parameters against what there is."""
    parameters = inspect.signature(reward.function).parameters
    if not parameters:
        raise ValueError(
            f"reward {reward.name} has no parameters, so it would say the same of every completion. Name what it is to be given: "
            f"{', '.join(dict.fromkeys([*SINGLE, *columns]))}."
        )
    if _yields(reward.function):
        raise ValueError(
            f"reward {reward.name} uses `yield`, so it returns a generator, whose values nobody has computed yet. Return a "
            "number, or a list with one for each completion."
        )
    form = reward.form or _form_by_parameters(parameters)
    built_in = SINGLE if form == "completion" else LISTED
    for name in parameters:
        if name in built_in and name in columns:
            raise ValueError(
                f"reward {reward.name} asks for {name!r}; the data has a column of that name, and so has the rollout. "
                "Rename the column."
            )
    for name in reward.args:
        if name in built_in or name in columns:
            raise ValueError(
                f"rewards.*.args of {reward.name} sets {name!r}; that comes with the completion or the data row. "
                "Remove it, or rename the column."
            )
        if name not in parameters and not _takes_everything(reward.function):
            settable = [each for each in parameters if each not in built_in and each not in columns]
            if reward.made_with is not None:
                settable += inspect.signature(type(reward.function)).parameters
            raise ValueError(
                f"rewards.*.args of {reward.name} sets {name!r}; the function has no such parameter: "
                f"{nearest(name, settable)} Remove it or correct the name."
            )
    return _bound(reward, reward.function, [*built_in, *columns], reward.args, form, elsewhere)


def _yields(function: Callable[..., Any]) -> bool:
    """Whether a function, a `functools.partial` of one, or an object's `__call__` is a generator's."""
    called = (function, getattr(type(function), "__call__", None))  # noqa: B004 # the method itself
    return any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in called)


def _form_by_parameters(parameters: Mapping[str, inspect.Parameter]) -> Form | None:
    """None: a function of a group whose completions come as the prompts do."""
    annotations = {name: _annotation(parameter) for name, parameter in parameters.items()}
    completions = annotations.get("completions", "")
    if re.match(r"(list|sequence)\[(list|sequence)\[", completions):
        return "messages"
    if re.match(r"(list|sequence)\[str\]", completions):
        return "texts"
    of_lists = re.match(r"(list|sequence)\[(list|sequence)\[", annotations.get("completion_ids", ""))
    return None if "completions" in parameters or "prompts" in parameters or of_lists else "completion"


def _annotation(parameter: inspect.Parameter) -> str:
    """As text, whether it was evaluated or not, without the names of modules."""
    return re.sub(r"\b(\w+\.)+", "", str(parameter.annotation)).lower()


def bind_check(reward: Reward, columns: list[str], elsewhere: Mapping[str, str]) -> BoundFunction | None:
    """The same for the function's `check_row`; None if it has none."""
    check = getattr(reward.function, "check_row", None)
    if check is None:
        return None
    parameters = inspect.signature(check).parameters
    args = {name: value for name, value in reward.args.items() if name in parameters or _takes_everything(check)}
    return _bound(reward, check, columns, args, "completion", elsewhere)


def _bound(
    reward: Reward,
    function: Callable[..., Any],
    available: list[str],
    args: dict[str, Any],
    form: Form | None,
    elsewhere: Mapping[str, str],
) -> BoundFunction:
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if name not in available and name not in args and not optional and name in elsewhere:
            raise ValueError(
                f"reward {reward.name} asks for {name!r}; only the {elsewhere[name]} have a column of that name. Add the "
                f"column to the others, give the parameter a default, or set rewards.*.args.{name} to replace it."
            )
        if name not in available and name not in args and not optional:
            raise ValueError(
                f"reward {reward.name} asks for {name!r}; {nearest(name, available)} "
                f"Rename the parameter, add the column, or set rewards.*.args.{name}."
            )
    takes_everything = _takes_everything(function)
    names = [name for name in dict.fromkeys(available) if takes_everything or name in parameters]
    return BoundFunction(reward, function, names, args, form)


def asks_for(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def reads_answer(rewards: Iterable[Reward]) -> bool:
    """Whether a function, or the check of its rows, asks for `answer` by name."""
    functions = [f for reward in rewards for f in (reward.function, getattr(reward.function, "check_row", None))]
    return any(f is not None and asks_for(f, "answer") for f in functions)


def _takes_everything(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


# ---- calls and what comes of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One call of a function, and where its values go."""

    bound: BoundFunction
    function: int  # its number in the pool
    sample: dict[str, Any]  # all there is to know, for error messages
    arguments: dict[str, Any]
    seconds: float
    p: int = 0  # the group
    g: int = 0  # its first completion
    num_values: int = 1  # how many completions from there

    @property
    def call(self) -> Call:
        return Call(self.function, self.arguments, self.seconds, self.bound.logs)

    @property
    def how_called(self) -> str:
        if self.bound.function is not self.bound.reward.function:  # its check_row
            return ""
        form = self.bound.form or ("messages" if isinstance(self.sample["completions"][0], list) else "texts")
        others = " or ".join(f"`{name}` ({how})" for name, how in FORMS.items() if name != form)
        return f"It was called {FORMS[form]}. If it wants another form, set rewards.*.form to {others}."

    def extras(self, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """What `log_extra` was given, by completion."""
        for name, cells in columns.items():
            if len(cells) != self.num_values:
                raise self.error(
                    f"logged {len(cells)} values of {name!r} (log_extra) for {self.num_values} completions"
                )
        return [{name: _plain(cells[i]) for name, cells in columns.items()} for i in range(self.num_values)]

    def verdicts(self, value: Any) -> list[float]:
        """The returned value or values as floats, NaN for None."""
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy and torch
        values = value if self.bound.is_listed else [value]
        if not isinstance(values, (list, tuple)) or len(values) != self.num_values:
            what = f"{len(values)} values" if isinstance(values, (list, tuple)) else _shorten(values)
            raise self.error(
                f"returned {what} for {self.num_values} completions; it must return a list of as many", self.how_called
            )
        return [self._verdict(item.tolist() if hasattr(item, "tolist") else item) for item in values]

    def _verdict(self, value: Any) -> float:
        if value is None:
            return math.nan
        if not isinstance(value, numbers.Real) or not abs(value) <= LARGEST:  # type: ignore[operator] # nor if it is NaN
            made = "a function; if it makes a reward from its args, name what it returns, in a module of yours"
            what = made if callable(value) else _shorten(value)
            raise self.error(
                f'returned {what}; it must return a finite number within {LARGEST:.3g}, or None for "can\'t tell"'
            )
        return float(value)

    def reason(self, outcome: Outcome) -> str | None:
        """What a `check_row` said."""
        if outcome.kind != "value":
            return f"{self.bound.reward.name} ended in a {outcome.kind} while checking the row"
        if outcome.value is not None and not isinstance(outcome.value, str):
            raise self.error(
                f"returned {_shorten(outcome.value)} from check_row; it must return a reason (text) or None"
            )
        return outcome.value

    def error(self, what: str, worker_traceback: str = "") -> RewardError:
        """The error that shows the sample."""
        shown = "\n".join(f"  {name}: {_shorten(value, 2000)}" for name, value in self.sample.items())
        return RewardError(
            f"Reward {self.bound.reward.name} {what}. This is a bug in the reward: what the model writes badly must "
            f"score 0 inside of it. The sample:\n{shown}",
            printable(worker_traceback),
        )


def _plain(value: Any) -> Any:
    """As JSON has it, or its text."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)


def _shorten(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


# ---- modules ---------------------------------------------------------------------------------------------------------
