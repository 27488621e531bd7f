"""Groups -> Scores: calls the reward functions in worker processes that can be killed.

A reward function is a plain function; the names of its parameters say what it is given.

    accuracy(completion, answer) -> float | None           one completion: a number, or None for "can't tell"
    accuracy(completions, answer, **kwargs) -> list        the completions of one group, as TRL calls it: every argument
                                                           is a list with one item per completion

It can ask for `completion`, `prompt`, `finish_reason`, `num_tokens`, `max_completion_tokens`, `completion_ids`, any
column of the data, and the keys of its `args`; as in TRL also for `trainer_state`, `log_metric` and `log_extra`. `**kwargs`
is given everything. It may be `async`. Three endings are kept apart: a value, "can't tell" (None, a timeout, a crash), and a
bug in the function, which stops the run and shows the sample.

Which of the two it is, and whether completions come as texts or as messages, is its form. `Reward.form` says it, or else the
parameters do: one named `completions` or `prompts`, or annotated with a list of lists, makes it a function of a group, and
`completions: list[str]` and `list[list[...]]` mean texts and messages. Where nothing says it, a group's completions are
messages if the prompts are conversations, as in TRL.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import io
import json
import math
import numbers
import os
import re
import sys
import time
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, ClassVar, Literal

import cloudpickle
import torch
from torch import Tensor

from grpo.config import RewardConfig, read_text
from grpo.data.rows import canonical
from grpo.scoring import verdict_cache
from grpo.scoring.worker import Call, Errand, FunctionBug, Outcome, SourceFile, WorkerPool
from grpo.system import progress
from grpo.system.terminal import printable
from grpo.types import Completion, Group, Scores

_files: dict[str, SourceFile] = {}  # modules that resolve_function loaded from a path; workers load the same text

ROWS_PER_CHECK = 256  # at first, between two looks at the clock
SECONDS_BETWEEN_LINES = 3.0

LOGS = ("log_metric", "log_extra")  # methods of reward_worker.Logged
SHARED = ("finish_reason", "num_tokens", "max_completion_tokens", "completion_ids", "trainer_state", *LOGS)
SINGLE = ("completion", "prompt", *SHARED)
LISTED = ("completions", "prompts", *SHARED)

LARGEST = float(torch.finfo(torch.float32).max)
"""Of a reward. Rewards are 64-bit numbers up to the advantage, which is a 32-bit one: a larger reward would become infinite."""

Form = Literal["completion", "texts", "messages"]
FORMS: dict[str, str] = {
    "completion": "once for each completion, as text",
    "texts": "once for a group, with its completions as texts",
    "messages": "once for a group, with its completions as lists of messages",
}
"""How a function can be called."""


class RewardError(RuntimeError):
    """A bug in a reward function: it raised an exception or returned what is not a reward."""


@dataclass(frozen=True)
class Reward:
    """A reward function and its place in the sum."""

    function: Callable[..., Any]
    weight: float = 1.0  # 0: only logged
    name: str = ""  # in the metrics; empty: the function's own
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments
    form: Form | None = None  # how it is called; None: as its parameters say

    def __post_init__(self) -> None:
        """Raises ValueError if the function is a class, or there is no such form."""
        if inspect.isclass(self.function):
            raise ValueError(
                f"reward {self.function.__name__} is a class; a reward is a function, or an object that can be called. Hand over "
                f"an object: {self.function.__name__}(...)."
            )
        if not self.name:
            function = _unwrapped(self.function)
            object.__setattr__(self, "name", getattr(function, "__name__", type(function).__name__))
        if self.form is not None and self.form not in FORMS:
            raise ValueError(
                f"reward {self.name} has the form {self.form!r}; it is {', '.join(FORMS)} or None. Correct it."
            )


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a `functools.partial` is of."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


class Scorer:
    """Scores groups of completions with reward functions in persistent worker processes."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        columns: Iterable[str],
        elsewhere: Mapping[str, str] | None = None,
        max_completion_tokens: int,
        num_workers: int,
        timeout_seconds: float,
        memory_gib: float,
        environment: Sequence[str] = (),
    ) -> None:
        """Check that every function can be given what it asks for, and start the workers.

        Args:
            rewards: the functions, with weights and arguments.
            columns: the names of the data columns.
            elsewhere: columns that only a part of the questions has, and which part: for error messages.
            max_completion_tokens: handed to the functions that ask for it.
            num_workers: processes.
            timeout_seconds: wall-clock limit of one completion in one function; a list gets it once per completion.
            memory_gib: address space that the calls of one worker may add to what importing the functions took.
            environment: names of environment variables that the workers are given besides reward_worker.INHERITED.

        Raises:
            ValueError: a parameter nobody can fill, an argument nobody takes, two rewards of one name, or a function
                that cannot be sent to a process.
            RuntimeError: a worker cannot load the functions.
        """
        names = [reward.name for reward in rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"rewards has {name} twice; metrics are told apart by name. Set a name for each.")
        for variable in environment:
            if variable not in os.environ:
                raise ValueError(
                    f"scoring.environment has {variable!r}; there is no such environment variable here. Export it, or remove it."
                )
        self.rewards = list(rewards)
        self.max_completion_tokens = max_completion_tokens
        self.trainer_state = SimpleNamespace(global_step=0, max_steps=0, epoch=0.0)  # as far as TRL's is known here
        self.timeout_seconds = timeout_seconds
        columns, elsewhere = list(columns), elsewhere or {}
        self._scorers = [_bind(reward, columns, elsewhere) for reward in rewards]
        self._checkers = [check for reward in rewards if (check := _bind_check(reward, columns, elsewhere)) is not None]
        with progress.busy("starting the reward workers"):
            self._pool = WorkerPool(
                [bound.pickled() for bound in [*self._scorers, *self._checkers]],
                files=[_files[name] for name in _modules(rewards) if name in _files],
                num_workers=num_workers,
                memory_gib=memory_gib,
                environment=environment,
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

    def check_rows(
        self, rows: Sequence[dict[str, Any]], *, say: Callable[[str], None] = lambda text: None
    ) -> list[str | None]:
        """Why a data row cannot be graded, or None if it can: what the functions' `check_row` attributes say of it.

        A `check_row` takes columns of the data by name, and of the reward's `args` those that it knows. What those of `rewards/`
        found is kept for the next start; see grpo/scoring/verdict_cache.py.

        Args:
            say: told how far it is, every few seconds.

        Raises:
            RewardError: a `check_row` raised an exception or returned something else than text or None.
        """
        if not self._checkers:
            return [None] * len(rows)
        calls = (canonical(checker.arguments(row)) for row in rows for checker in self._checkers)
        key = verdict_cache.key(calls, [checker.function for checker in self._checkers])
        kept = None if key is None else verdict_cache.load(key, len(rows))
        if kept is not None:
            return kept
        reasons, all_decided, size = list[str | None](), True, ROWS_PER_CHECK
        told = time.monotonic()
        while len(reasons) < len(rows):
            began = time.monotonic()
            part, decided = self._check(rows[len(reasons) : len(reasons) + size])
            reasons += part
            all_decided = all_decided and decided
            if time.monotonic() - told > SECONDS_BETWEEN_LINES and len(reasons) < len(rows):
                say(f"checking that the answers can be graded: {len(reasons):,} of {len(rows):,}")
                told = time.monotonic()
            if time.monotonic() - began < SECONDS_BETWEEN_LINES / 4:  # quick ones wait for the workers less often
                size *= 2
        if key is not None and all_decided:
            verdict_cache.save(key, reasons)
        return reasons

    def _check(self, rows: Sequence[dict[str, Any]]) -> tuple[list[str | None], bool]:
        """The first reason against each row, and whether all calls came to an end: another time a slow one may."""
        tasks = [
            _Task(checker, len(self._scorers) + c, row, checker.arguments(row), self.timeout_seconds)
            for row in rows
            for c, checker in enumerate(self._checkers)
        ]
        with _shown_with_its_sample(tasks), progress.busy("checking rows", math.inf):  # each has its time limit
            outcomes = self._pool.run([task.call for task in tasks])
        reasons = [task.reason(outcome) for task, outcome in zip(tasks, outcomes, strict=True)]
        num = len(self._checkers)
        first = [next((r for r in reasons[i * num : (i + 1) * num] if r is not None), None) for i in range(len(rows))]
        return first, all(outcome.kind == "value" for outcome in outcomes)

    def named_columns(self) -> dict[str, list[str]]:
        """The columns that each function names among its parameters, by its reward."""
        return {
            bound.reward.name: [name for name in bound.names if _names(bound.function, name)] for bound in self._scorers
        }

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
        listed = {as_messages: self._listed(group, as_messages=as_messages) for as_messages in (False, True)}
        usual: Form = "texts" if group.prompt.messages is None else "messages"
        for f, bound in enumerate(self._scorers):
            if bound.is_listed:
                own = listed[(bound.form or usual) == "messages"]
                seconds = self.timeout_seconds * len(singles)
                yield _Task(bound, f, own, bound.arguments(own), seconds, p, 0, len(singles))
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
            "trainer_state": self.trainer_state,
        }

    def _listed(self, group: Group, *, as_messages: bool) -> dict[str, Any]:
        """Everything that a function of a list can ask for: a list with one item per completion under every name, as TRL's."""
        num = len(group.completions)
        completions: list[Any] = [completion.text for completion in group.completions]
        prompts: list[Any] = [group.prompt.text] * num
        if as_messages:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
            prompts = [
                group.prompt.messages or [{"role": "user", "content": group.prompt.columns.get("question")}]
            ] * num
        return {name: [value] * num for name, value in group.prompt.columns.items()} | {
            "completions": completions,
            "prompts": prompts,
            "finish_reason": [completion.finish_reason for completion in group.completions],
            "num_tokens": [len(completion.token_ids) for completion in group.completions],
            "max_completion_tokens": [self.max_completion_tokens] * num,
            "completion_ids": [completion.token_ids for completion in group.completions],
            "trainer_state": self.trainer_state,  # not a list, nor in TRL
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
        with _shown_with_its_sample(self._tasks), progress.busy("calling rewards", math.inf):  # each has its time limit
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
        values = torch.full((len(rewards), len(places), group_size), math.nan, dtype=torch.float64)
        extras: list[list[dict[str, Any]]] = [[{} for _ in range(group_size)] for _ in places]
        metrics: dict[str, list[float]] = {}
        for task, outcome in zip(tasks, outcomes, strict=True):
            if outcome.kind == "value":
                place = slice(task.g, task.g + task.num_values)
                values[task.function, row[task.p], place] = torch.tensor(
                    task.verdicts(outcome.value), dtype=torch.float64
                )
                for own, cells in zip(extras[row[task.p]][place], task.extras(outcome.columns), strict=True):
                    own |= {task.bound.reward.name: cells} if cells else {}
            for name, logged in outcome.metrics.items():
                metrics[name] = metrics.get(name, []) + logged
        sums = weighted_sum(values, torch.tensor([reward.weight for reward in rewards], dtype=torch.float64))
        self._refuse_too_large(sums, values, tasks)
        return Scores(
            rewards=sums,
            values={reward.name: values[f] for f, reward in enumerate(rewards)},
            num_timeouts=sum(outcome.kind == "timeout" for outcome in outcomes),
            num_crashes=sum(outcome.kind == "crash" for outcome in outcomes),
            seconds=sum(outcome.seconds for outcome in outcomes),
            metrics=metrics,
            extras=extras,
        )

    def _refuse_too_large(self, sums: Tensor, values: Tensor, tasks: list[_Task]) -> None:
        """Raises RewardError if weights make more of rewards than fits."""
        for p, g in (sums.abs() > LARGEST).nonzero().tolist():
            parts = [
                abs(reward.weight) * abs(float(v))
                for reward, v in zip(self._scorer.rewards, values[:, p, g], strict=True)
            ]
            largest = max((part, f) for f, part in enumerate(parts) if not math.isnan(part))[1]
            task = next(task for task in tasks if task.function == largest)
            raise task.error(
                f"times its weight ({self._scorer.rewards[largest].weight:g}) makes the sum of a completion's rewards "
                f"{float(sums[p, g]):g}; it must lie within {LARGEST:.3g}"
            )

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *exception: object) -> None:
        with progress.busy("ending reward calls"):
            self._errand.__exit__(*exception)


@contextmanager
def _shown_with_its_sample(tasks: list[_Task]) -> Iterator[None]:
    """A bug in a function is shown with what it was called with."""
    try:
        yield
    except FunctionBug as bug:
        task = tasks[bug.call]
        raise task.error("raised an exception", f"{task.how_called}\n{bug.worker_traceback}") from None


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
        metrics={
            name: [value for each in parts for value in each.metrics.get(name, [])]
            for name in dict.fromkeys(name for each in parts for name in each.metrics)
        },
        extras=[group for each in parts for group in each.extras],
    )


def resolve_rewards(configured: Iterable[RewardConfig]) -> list[Reward]:
    """The rewards that a YAML lists. Raises ValueError as `resolve_function` does, or if a class makes no reward."""
    return [_configured(each) for each in configured]


def _configured(config: RewardConfig) -> Reward:
    function, args = resolve_function(config.function), config.args
    if inspect.isclass(function):
        named = inspect.signature(function).parameters
        own = {name: value for name, value in args.items() if name in named}
        function, args = _instance(config.function, function, own), {n: v for n, v in args.items() if n not in own}
    return Reward(function, weight=config.weight, name=config.name or "", args=args, form=config.form)


def _instance(spec: str, kind: type, args: dict[str, Any]) -> Callable[..., Any]:
    """An object of a class that a YAML names, made with those of its args that the class takes."""
    try:
        made = kind(**args)
    except TypeError as error:
        raise ValueError(
            f"rewards.*.function is {spec!r}, a class; it cannot be made from its args {args}: {error}. Set rewards.*.args."
        ) from error
    if not callable(made):
        raise ValueError(
            f"rewards.*.function is {spec!r}, a class; its objects cannot be called. Give it a method __call__, or name "
            "a function."
        )
    return made


def resolve_function(spec: str) -> Callable[..., Any]:
    """The reward function that a YAML names, or the class of such functions.

    Args:
        spec: a name in rewards/ ("accuracy"), "module:function", or "path/to/file.py:function".

    Raises:
        ValueError: there is no such function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        module = importlib.import_module("grpo.rewards")  # a user's own `rewards` is another module
        known = module.__all__
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
    form: Form | None = "completion"  # None: texts or messages, as the prompts are

    @property
    def is_listed(self) -> bool:
        return self.form != "completion"

    @property
    def logs(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in LOGS)

    def arguments(self, known: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call."""
        return {name: known[name] for name in self.names if name not in LOGS} | self.args

    def pickled(self) -> bytes:
        """The function as bytes: by value where a worker could not, or should not have to, import its module."""
        module = sys.modules.get(getattr(self.function, "__module__", None) or "")
        # pytest's own loader marks a test module, which imports torch and much else besides
        by_value = type(getattr(module, "__loader__", None)).__module__.startswith("_pytest")
        try:
            if by_value:
                cloudpickle.register_pickle_by_value(module)
            file = io.BytesIO()
            _Pickler(file).dump(self.function)
            return file.getvalue()
        except Exception as error:
            raise ValueError(
                f"reward {self.reward.name} is {self.function!r}; it runs in another process and cannot be sent there: "
                f"{error}. Define it in a module, and create what it holds on to inside of it."
            ) from error
        finally:
            if by_value:
                cloudpickle.unregister_pickle_by_value(module)


def _code_of_a_file(code: CodeType) -> tuple[Any, ...]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return make, tuple(code.co_filename if each == "<dynamic-code>" else each for each in arguments)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Lets code know its file, which cloudpickle 3.1.3 conceals: a traceback of a bug shows the line."""

    dispatch_table: ClassVar = ChainMap({CodeType: _code_of_a_file}, cloudpickle.Pickler.dispatch_table)


def _bind(reward: Reward, columns: list[str], elsewhere: Mapping[str, str]) -> _Bound:
    """Check a reward function's parameters against what there is."""
    parameters = inspect.signature(reward.function).parameters
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
            raise ValueError(
                f"rewards.*.args of {reward.name} sets {name!r}; the function has no such parameter: "
                f"{_nearest(name, list(parameters))}. Remove it or correct the name."
            )
    return _bound(reward, reward.function, [*built_in, *columns], reward.args, form, elsewhere)


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


def _bind_check(reward: Reward, columns: list[str], elsewhere: Mapping[str, str]) -> _Bound | None:
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
) -> _Bound:
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
                f"reward {reward.name} asks for {name!r}; {_nearest(name, available)}. "
                f"Rename the parameter, add the column, or set rewards.*.args.{name}."
            )
    takes_everything = _takes_everything(function)
    names = [name for name in dict.fromkeys(available) if takes_everything or name in parameters]
    return _Bound(reward, function, names, args, form)


def _names(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def reads_answer(rewards: Iterable[Reward]) -> bool:
    """Whether a function, or the check of its rows, asks for `answer` by name."""
    functions = [f for reward in rewards for f in (reward.function, getattr(reward.function, "check_row", None))]
    return any(f is not None and _names(f, "answer") for f in functions)


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
            f"score 0 inside of it. The sample:\n{shown}\n{printable(worker_traceback)}".rstrip()
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
    functions = [_unwrapped(f) for r in rewards for f in (r.function, getattr(r.function, "check_row", None)) if f]
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
        source = SourceFile(name, str(path), read_text(path, f"rewards.*.function is {spec!r}"))
        try:
            compile(source.text, source.path, "exec")
        except SyntaxError as error:
            raise ValueError(
                f"rewards.*.function is {spec!r}; the file is not valid Python: {error}. Correct it."
            ) from error
        _check_neighbours(spec, source)
        with _importing_from(source.folder):
            source.load()
        _files[name] = source
    return sys.modules[name]


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _check_neighbours(spec: str, source: SourceFile) -> None:
    """Raises ValueError if the file imports a module beside it whose name another module has by now: it would be given that."""
    for name, path in _neighbours(Path(source.folder), source.text).items():
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and (loaded is None or Path(loaded).resolve() != path.resolve()):
            raise ValueError(
                f"rewards.*.function is {spec!r}; it imports {name}, and {path} is not the only module of that name: "
                f"{loaded or 'one of Python itself'} has been imported as it. Rename one of the two."
            )


def _neighbours(folder: Path, text: str, known: Mapping[str, Path] = MappingProxyType({})) -> dict[str, Path]:
    """The modules of a folder that a source in it imports, and what those import there."""
    found = dict(known)
    for name in _imports(text) - set(known):
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                found |= _neighbours(folder, path.read_text(encoding="utf-8"), {**found, name: path})
    return found


def _imports(text: str) -> set[str]:
    """Names of the modules that a source imports, up to their first dot."""
    nodes = list(ast.walk(ast.parse(text)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    others = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in plain | others}
