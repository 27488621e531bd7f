"""Groups -> Scores: calls the reward functions in worker processes that can be killed.

A reward function is a plain function; the names of its parameters say what it is given.

    accuracy(completion, answer) -> float | None           one completion: a number, or None for "can't tell"
    accuracy(completions, answer, **kwargs) -> list        the completions of one group, as TRL calls it: every argument
                                                           is a list with one item per completion

It can ask for `completion`, `prompt`, `finish_reason`, `num_tokens`, `max_completion_tokens`, `completion_ids`, any
column of the data, and the keys of its `args`; `**kwargs` is given everything. Three endings are kept apart: a value,
"can't tell" (None, a timeout, a crash), and a bug in the function, which stops the run and shows the sample.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import numbers
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from grpo.config import RewardConfig
from grpo.reward_worker import Call, Errand, FunctionBug, Outcome, SourceFile, WorkerPool
from grpo.terminal import printable
from grpo.types import Completion, Group, Scores

_files: dict[str, SourceFile] = {}  # modules that resolve_function loaded from a path; workers load the same text

SINGLE = ("completion", "prompt", "finish_reason", "num_tokens", "max_completion_tokens", "completion_ids")
LISTED = ("completions", "prompts", "finish_reason", "num_tokens", "max_completion_tokens", "completion_ids")


class RewardError(RuntimeError):
    """A bug in a reward function: it raised an exception or returned what is not a reward."""


@dataclass(frozen=True)
class Reward:
    """A reward function and its place in the sum."""

    function: Callable[..., Any]
    weight: float = 1.0  # 0: only logged
    name: str = ""  # in the metrics; empty: the function's own
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__name__", type(self.function).__name__))


class Scorer:
    """Scores groups of completions with reward functions in persistent worker processes."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        columns: Iterable[str],
        max_completion_tokens: int,
        conversational: bool,
        num_workers: int,
        timeout_seconds: float,
        memory_gib: float,
    ) -> None:
        """Check that every function can be given what it asks for, and start the workers.

        Args:
            rewards: the functions, with weights and arguments.
            columns: the names of the data columns.
            max_completion_tokens: handed to the functions that ask for it.
            conversational: functions with a `completions` parameter get lists of messages instead of strings.
            num_workers: processes.
            timeout_seconds: wall-clock limit of one completion in one function; a list gets it once per completion.
            memory_gib: address space that the calls of one worker may add to what importing the functions took.

        Raises:
            ValueError: a parameter nobody can fill, an argument nobody takes, two rewards of one name, or a function
                that cannot be sent to a process.
            RuntimeError: a worker cannot load the functions.
        """
        names = [reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"rewards has {name} twice; metrics are told apart by name. Set a name for each.")
        self.rewards = list(rewards)
        self.max_completion_tokens = max_completion_tokens
        self.conversational = conversational
        self.timeout_seconds = timeout_seconds
        self._scorers = [_bind(reward, list(columns)) for reward in rewards]
        self._checkers = [check for reward in rewards if (check := _bind_check(reward, list(columns))) is not None]
        self._pool = WorkerPool(
            [bound.pickled() for bound in [*self._scorers, *self._checkers]],
            files=[_files[name] for name in _modules(rewards) if name in _files],
            num_workers=num_workers,
            memory_gib=memory_gib,
        )

    def score(self, groups: list[Group]) -> Scores:
        """What every function says of every completion, and the weighted sum; see `weighted_sum` for "can't tell".

        Raises:
            RewardError: a function raised an exception or returned something that is not a reward.
        """
        with self.begin(len(groups)) as scoring:
            for p, group in enumerate(groups):
                scoring.add(p, group)
            return scoring.result()

    def begin(self, num_groups: int) -> Scoring:
        """Score groups that are still to come, each as soon as it is there; one call at a time.

        with scorer.begin(len(prompts)) as scoring:
            generator.sample(prompts, ..., on_group=scoring.add)
            scores = scoring.result()
        """
        return Scoring(self, self._pool.begin(), num_groups)

    def check_rows(self, rows: list[dict[str, Any]]) -> list[str | None]:
        """Why a data row cannot be graded, or None if it can: what the functions' `check_row` attributes say of it.

        A `check_row` takes columns of the data by name, and of the reward's `args` those that it knows.

        Raises:
            RewardError: a `check_row` raised an exception or returned something else than text or None.
        """
        tasks = [
            _Task(checker, len(self._scorers) + c, row, checker.arguments(row), self.timeout_seconds)
            for row in rows
            for c, checker in enumerate(self._checkers)
        ]
        with _shown_with_its_sample(tasks):
            outcomes = self._pool.run([task.call for task in tasks])
        reasons = [task.reason(outcome) for task, outcome in zip(tasks, outcomes, strict=True)]
        num = len(self._checkers)
        return [next((r for r in reasons[i * num : (i + 1) * num] if r is not None), None) for i in range(len(rows))]

    def check_limits(self, limits: Iterable[int]) -> None:
        """See that every function can work with these limits of a completion, in tokens.

        Raises:
            ValueError: what a function's `check_limit` attribute raises; it is given a limit and the reward's `args`.
        """
        for reward in self.rewards:
            check = getattr(reward.function, "check_limit", lambda limit, /, **args: None)
            for limit in limits:
                check(limit, **reward.args)

    def notices(self) -> list[str]:
        """What the functions want said before they are used: the texts that their `notice` attributes return."""
        texts = [reward.function.notice() for reward in self.rewards if hasattr(reward.function, "notice")]
        return [text for text in texts if text is not None]

    def log_to(self, path: Path) -> None:
        """Append what the functions print to this file; until then it is dropped."""
        self._pool.output = path.resolve()

    def close(self) -> None:
        """Kill the workers."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tasks(self, p: int, group: Group) -> Iterator[_Task]:
        """The calls for group number p, in all functions."""
        singles = [self._single(group, completion) for completion in group.completions]
        listed = self._listed(group)
        for f, bound in enumerate(self._scorers):
            if bound.is_listed:
                seconds = self.timeout_seconds * len(singles)
                yield _Task(bound, f, listed, bound.arguments(listed), seconds, p, 0, len(singles))
            else:
                for g, single in enumerate(singles):
                    yield _Task(bound, f, single, bound.arguments(single), self.timeout_seconds, p, g)

    def _single(self, group: Group, completion: Completion) -> dict[str, Any]:
        """Everything that a function of one completion can ask for."""
        return group.prompt.columns | {
            "completion": completion.text,
            "prompt": group.prompt.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "max_completion_tokens": self.max_completion_tokens,
            "completion_ids": completion.token_ids,
        }

    def _listed(self, group: Group) -> dict[str, Any]:
        """Everything that a function of a list can ask for: a list with one item per completion under every name."""
        num = len(group.completions)
        texts = [completion.text for completion in group.completions]
        completions: list[Any] = texts
        prompts: list[Any] = [group.prompt.text] * num
        if self.conversational:
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            prompts = [[{"role": "user", "content": group.prompt.columns["question"]}] for _ in texts]
        return {name: [value] * num for name, value in group.prompt.columns.items()} | {
            "completions": completions,
            "prompts": prompts,
            "finish_reason": [completion.finish_reason for completion in group.completions],
            "num_tokens": [len(completion.token_ids) for completion in group.completions],
            "max_completion_tokens": [self.max_completion_tokens] * num,
            "completion_ids": [completion.token_ids for completion in group.completions],
        }


class Scoring:
    """Scores groups while others are still being sampled.

    A context manager: what is not scored yet when it is left, as after an error, is given up.
    """

    def __init__(self, scorer: Scorer, errand: Errand, num_groups: int) -> None:
        self._scorer = scorer
        self._errand = errand
        self._tasks: list[_Task] = []
        self._sizes: list[int | None] = [None] * num_groups  # completions of each group; None: still to come
        self._unreported: dict[int, range] = {}  # the tasks of each group that `finished` has not told of

    def add(self, p: int, group: Group) -> None:
        """Hand group number p to the workers, and return at once.

        Raises:
            RewardError: a function raised an exception on a group that was added before.
        """
        assert self._sizes[p] is None, f"group {p} came twice"
        self._sizes[p] = len(group.completions)
        tasks = list(self._scorer.tasks(p, group))
        self._unreported[p] = range(len(self._tasks), len(self._tasks) + len(tasks))
        self._tasks += tasks
        with _shown_with_its_sample(self._tasks):
            self._errand.add([task.call for task in tasks])

    def result(self) -> Scores:
        """Wait for what is not scored yet; see `Scorer.score`."""
        assert None not in self._sizes, "a group never came"
        with _shown_with_its_sample(self._tasks):
            outcomes = self._errand.result()
        return self._scores(range(len(self._sizes)), self._tasks, outcomes)

    def finished(self) -> list[tuple[int, Scores]]:
        """The groups that are scored by now, each once, with their scores (1, G); does not wait."""
        made = self._errand.made
        done = [p for p, tasks in self._unreported.items() if all(task in made for task in tasks)]
        own = {p: self._unreported.pop(p) for p in done}
        return [(p, self._scores([p], [self._tasks[t] for t in own[p]], [made[t] for t in own[p]])) for p in done]

    def _scores(self, places: Sequence[int], tasks: list[_Task], outcomes: list[Outcome]) -> Scores:
        """Of the groups at these places."""
        rewards = self._scorer.rewards
        row = {p: number for number, p in enumerate(places)}
        group_size = next((self._sizes[p] for p in places), 0) or 0
        values = torch.full((len(rewards), len(places), group_size), math.nan)
        for task, outcome in zip(tasks, outcomes, strict=True):
            if outcome.kind == "value":
                verdicts = torch.tensor(task.verdicts(outcome.value))
                values[task.function, row[task.p], task.g : task.g + task.num_values] = verdicts
        return Scores(
            rewards=weighted_sum(values, torch.tensor([reward.weight for reward in rewards])),
            values={reward.name: values[f] for f, reward in enumerate(rewards)},
            num_timeouts=sum(outcome.kind == "timeout" for outcome in outcomes),
            num_crashes=sum(outcome.kind == "crash" for outcome in outcomes),
            seconds=sum(outcome.seconds for outcome in outcomes),
        )

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *exception: object) -> None:
        self._errand.__exit__(*exception)


@contextmanager
def _shown_with_its_sample(tasks: list[_Task]) -> Iterator[None]:
    """A bug in a function is shown with what it was called with."""
    try:
        yield
    except FunctionBug as bug:
        raise tasks[bug.call].error("raised an exception", bug.worker_traceback) from None


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """The reward of each completion: sum over functions of weight * value, where NaN stands for "can't tell".

    A function that can't tell for any completion of a group does not apply to that prompt (a code checker on a maths
    question): it is left out of that group's sum. If it can't tell for some, the sum of those completions is NaN. A
    group to which no function applies is NaN throughout. Functions of weight 0 have no part in any of this.

    Args:
        values: (F, P, G).
        weights: (F,).

    Returns:
        (P, G).
    """
    values, weights = values[weights != 0], weights[weights != 0, None, None]
    applies = ~values.isnan().all(dim=-1, keepdim=True)  # (F, P, 1)
    total = (weights * values.where(applies, 0.0)).sum(dim=0)
    return total.where(applies.any(dim=0), math.nan)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Of the groups of all parts, one part after the other."""
    return Scores(
        rewards=torch.cat([each.rewards for each in parts]),
        values={name: torch.cat([each.values[name] for each in parts]) for name in parts[0].values},
        num_timeouts=sum(each.num_timeouts for each in parts),
        num_crashes=sum(each.num_crashes for each in parts),
        seconds=sum(each.seconds for each in parts),
    )


def resolve_rewards(configured: Iterable[RewardConfig]) -> list[Reward]:
    """The rewards that a YAML lists. Raises ValueError as `resolve_function` does."""
    return [Reward(resolve_function(r.function), weight=r.weight, name=r.name or "", args=r.args) for r in configured]


def resolve_function(spec: str) -> Callable[..., Any]:
    """The reward function that a YAML names.

    Args:
        spec: a name in the package `rewards` ("accuracy"), "module:function", or "path/to/file.py:function".

    Raises:
        ValueError: there is no such function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        module, known = importlib.import_module("rewards"), importlib.import_module("rewards").__all__
        if spec not in known:
            raise ValueError(
                f"rewards.*.function is {spec!r}; {_nearest(spec, known)}. Name one of these, "
                "module:function, or path/to/file.py:function."
            )
        name = spec
    else:
        module = _load_file(spec, Path(place)) if place.endswith(".py") else _import_module(spec, place)
    function = getattr(module, name, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(
            f"rewards.*.function is {spec!r}; {place} has no function {name!r}: {_nearest(name, defined)}. "
            "Name one of its functions."
        )
    return function


# ---- who is given what -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bound:
    """A function and the names of what it is given."""

    reward: Reward
    function: Callable[..., Any]
    names: list[str]
    args: dict[str, Any]
    is_listed: bool

    def arguments(self, known: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return {name: known[name] for name in self.names} | self.args

    def pickled(self) -> bytes:
        """The function as bytes: by value where a worker could not, or should not have to, import its module."""
        module = sys.modules.get(getattr(self.function, "__module__", None) or "")
        # pytest's own loader marks a test module, which imports torch and much else besides
        by_value = type(getattr(module, "__loader__", None)).__module__.startswith("_pytest")
        try:
            if by_value:
                cloudpickle.register_pickle_by_value(module)
            return cloudpickle.dumps(self.function)
        except Exception as error:
            raise ValueError(
                f"reward {self.reward.name} is {self.function!r}; it runs in another process and cannot be sent there: "
                f"{error}. Define it in a module, and create what it holds on to inside of it."
            ) from error
        finally:
            if by_value:
                cloudpickle.unregister_pickle_by_value(module)


def _bind(reward: Reward, columns: list[str]) -> _Bound:
    """Check a reward function's parameters against what there is."""
    parameters = inspect.signature(reward.function).parameters
    is_listed = "completions" in parameters
    built_in = LISTED if is_listed else SINGLE
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
            raise ValueError(
                f"rewards.*.args of {reward.name} sets {name!r}; the function has no such parameter: "
                f"{_nearest(name, list(parameters))}. Remove it or correct the name."
            )
    return _bound(reward, reward.function, [*built_in, *columns], reward.args, is_listed)


def _bind_check(reward: Reward, columns: list[str]) -> _Bound | None:
    """The same for the function's `check_row`; None if it has none."""
    check = getattr(reward.function, "check_row", None)
    if check is None:
        return None
    parameters = inspect.signature(check).parameters
    args = {name: value for name, value in reward.args.items() if name in parameters or _takes_everything(check)}
    return _bound(reward, check, columns, args, is_listed=False)


def _bound(
    reward: Reward, function: Callable[..., Any], available: list[str], args: dict[str, Any], is_listed: bool
) -> _Bound:
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if name not in available and name not in args and not optional:
            raise ValueError(
                f"reward {reward.name} asks for {name!r}; {_nearest(name, available)}. "
                f"Rename the parameter, add the column, or set rewards.*.args.{name}."
            )
    takes_everything = _takes_everything(function)
    names = [name for name in dict.fromkeys(available) if takes_everything or name in parameters]
    return _Bound(reward, function, names, args, is_listed)


def _takes_everything(function: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _nearest(name: str, known: Iterable[str]) -> str:
    """ "there is a, b, c; did you mean b?" """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1)
    return f"there is {', '.join(known) or 'nothing'}" + (f"; did you mean {close[0]}?" if close else "")


# ---- calls and what comes of them ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One call of a function, and where its values go."""

    bound: _Bound
    function: int  # its number in the pool
    sample: dict[str, Any]  # all there is to know, for error messages
    arguments: dict[str, Any]
    seconds: float
    p: int = 0  # the group
    g: int = 0  # its first completion
    num_values: int = 1  # how many completions from there

    @property
    def call(self) -> Call:
        return Call(self.function, self.arguments, self.seconds)

    def verdicts(self, value: Any) -> list[float]:
        """The returned value or values as floats, NaN for None."""
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy and torch
        values = value if self.bound.is_listed else [value]
        if not isinstance(values, (list, tuple)) or len(values) != self.num_values:
            what = f"{len(values)} values" if isinstance(values, (list, tuple)) else _shorten(values)
            raise self.error(f"returned {what} for {self.num_values} completions; it must return a list of as many")
        return [self._verdict(item.tolist() if hasattr(item, "tolist") else item) for item in values]

    def _verdict(self, value: Any) -> float:
        if value is None:
            return math.nan
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise self.error(f'returned {_shorten(value)}; it must return a finite number, or None for "can\'t tell"')
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
            f"score 0 inside of it. The sample:\n{shown}\n{printable(worker_traceback)}".rstrip()
        )


def _shorten(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


# ---- modules ---------------------------------------------------------------------------------------------------------


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(
            f"rewards.*.function is {spec!r}; the module {name!r} cannot be imported: {error}. "
            "Install it, add its folder to PYTHONPATH, or name its file: path/to/file.py:function."
        ) from error


def _modules(rewards: Sequence[Reward]) -> list[str]:
    """Where the functions and their `check_row`s were defined, each once."""
    functions = [f for reward in rewards for f in (reward.function, getattr(reward.function, "check_row", None))]
    return list(dict.fromkeys(getattr(f, "__module__", type(f).__module__) for f in functions))


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(
            f"rewards.*.function is {spec!r}; there is no file {path.resolve()}. "
            "Give the path from the folder in which the run is started, or an absolute one."
        )
    path = path.resolve()
    name = f"reward_file_{zlib.crc32(str(path).encode()):08x}"  # of two files with one name, and never with a dot
    if name not in _files:
        _files[name] = SourceFile(name, str(path), path.read_text(encoding="utf-8"))
        _files[name].load()
    return sys.modules[name]
