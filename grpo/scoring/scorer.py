"""Groups -> Scores: calls the reward functions in worker processes that can be killed.

A reward function is a plain function; the names of its parameters say what it is given.

    accuracy(completion, answer) -> float | None           one completion: a number, or None for "can't tell"
    accuracy(completions, answer, **kwargs) -> list        the completions of one group, as TRL calls it: every argument
                                                           is a list with one item per completion

It can ask for `completion`, `prompt`, `finish_reason`, `num_tokens`, `max_completion_tokens`, `completion_ids`, `turns`,
`environment_reward` (None where nobody can tell, or there is no environment), any column of the data, and the keys of its `args`;
as in TRL also for `trainer_state`, `log_metric` and `log_extra`. `**kwargs` is given everything. It may be `async`. Three endings
are kept apart: a value, "can't tell" (None, a timeout, a crash), and a bug in the function, which stops the run and shows the
sample.

Which of the two it is, and whether completions come as texts or as messages, is its form. `Reward.form` says it, or else the
parameters do: one named `completions` or `prompts`, or annotated with a list of lists, makes it a function of a group, and
`completions: list[str]` and `list[list[...]]` mean texts and messages. Where nothing says it, a group's completions are
messages if the prompts are conversations, as in TRL.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from grpo.config import as_text
from grpo.data.rows import canonical
from grpo.scoring import verdict_cache
from grpo.scoring.answers import verdicts_of
from grpo.scoring.binding import BoundFunction, Task, asks_for, bind, bind_check
from grpo.scoring.reward import LARGEST, Form, Reward, changed_variables, loaded_files, modules_of, nearest
from grpo.scoring.worker import FunctionBug, Logged, Outcome
from grpo.scoring.worker_pool import Errand, WorkerPool
from grpo.system import progress
from grpo.types import Completion, Group, Scores

ROWS_PER_CHECK = 256  # at first, between two looks at the clock
QUICK_SECONDS = 0.75


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
        verdict: str | Sequence[str] | None = None,
    ) -> None:
        """Check that every function can be given what it asks for, and start the workers.

        Args:
            rewards: the functions, with weights and arguments.
            columns: the names of the data columns.
            elsewhere: columns that only a part of the questions has, and which part: for error messages.
            max_completion_tokens: handed to the functions that ask for it, less a completion's results of tools.
            num_workers: processes.
            timeout_seconds: wall-clock limit of one completion in one function; a list gets it once per completion.
            memory_gib: address space that the calls of one worker may add to what importing the functions took.
            environment: names of environment variables that the workers are given besides worker_pool.INHERITED.
            verdict: names of the functions that say what is right, as scoring.verdict.

        Raises:
            ValueError: a parameter nobody can fill, an argument nobody takes, two rewards of one name, a verdict that is none
                of them, or a function that cannot be sent to a process.
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
        self.verdicts = verdicts_of(verdict, names)
        self.max_completion_tokens = max_completion_tokens
        self.trainer_state = SimpleNamespace(global_step=0, max_steps=0, epoch=0.0)  # as far as TRL's is known here
        self.timeout_seconds = timeout_seconds
        columns, elsewhere = list(columns), elsewhere or {}
        for reward in rewards:
            _check_only(reward, [*columns, *elsewhere])
        own_variables = [name for reward in rewards for name in getattr(reward.function, "environment", ())]
        self._scorers = [bind(reward, columns, elsewhere) for reward in rewards]
        self._checkers = [check for reward in rewards if (check := bind_check(reward, columns, elsewhere)) is not None]
        with progress.busy("starting the reward workers"):
            self._pool = WorkerPool(
                [_unused() if bound.in_process else bound.pickled() for bound in [*self._scorers, *self._checkers]],
                files=[loaded_files[name] for name in modules_of(rewards) if name in loaded_files],
                num_workers=num_workers,
                memory_gib=memory_gib,
                environment=[*environment, *own_variables],
            )
        for bound in self._scorers:
            if bound.in_process:
                bound.function.load()  # type: ignore[attr-defined] # before a step waits for it

    def parts(self, scores: Scores) -> list[tuple[float, Tensor]]:
        """The weight and the values (P, G) of each function that has a weight now; NaN where it gave no verdict."""
        return [(reward.weight, scores.values[reward.name]) for reward in self.rewards if reward.weight]

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
        self, rows: Sequence[dict[str, Any]], *, add: Callable[[int], None] = lambda number: None
    ) -> list[str | None]:
        """Why a data row cannot be graded, or None if it can: what the functions' `check_row` attributes say of it.

        A `check_row` takes columns of the data by name, and of the reward's `args` those that it knows. What those of `rewards/`
        found is kept for the next start; see grpo/scoring/verdict_cache.py.

        Args:
            add: told how many more rows have been checked.

        Raises:
            RewardError: a `check_row` raised an exception or returned something else than text or None.
        """
        if not self._checkers:
            return [None] * len(rows)
        calls = (canonical(checker.arguments(row)) for row in rows for checker in self._asked_about(row))
        key = verdict_cache.key(calls, [checker.function for checker in self._checkers])
        kept = None if key is None else verdict_cache.load(key, len(rows))
        if kept is not None:
            return kept
        reasons, all_decided, size = list[str | None](), True, ROWS_PER_CHECK
        while len(reasons) < len(rows):
            began = time.monotonic()
            part, decided = self._check(rows[len(reasons) : len(reasons) + size])
            reasons += part
            all_decided = all_decided and decided
            add(len(part))
            if time.monotonic() - began < QUICK_SECONDS:  # such rows wait for the workers less often
                size *= 2
        if key is not None and all_decided:
            verdict_cache.save(key, reasons)
        return reasons

    def _check(self, rows: Sequence[dict[str, Any]]) -> tuple[list[str | None], bool]:
        """The first reason against each row, and whether all calls came to an end: another time a slow one may."""
        number = {id(checker): len(self._scorers) + c for c, checker in enumerate(self._checkers)}
        tasks = [
            Task(checker, number[id(checker)], row, checker.arguments(row), self.timeout_seconds, p)
            for p, row in enumerate(rows)
            for checker in self._asked_about(row)
        ]
        with (
            _shown_with_its_sample(tasks.__getitem__),
            progress.busy("checking rows", math.inf),
        ):  # each has its time limit
            outcomes = self._pool.run([task.call for task in tasks])
        first: list[str | None] = [None] * len(rows)
        for task, outcome in zip(tasks, outcomes, strict=True):
            reason = task.reason(outcome)
            first[task.p] = first[task.p] if first[task.p] is not None else reason
        return first, all(outcome.kind == "value" for outcome in outcomes)

    def _asked_about(self, row: Mapping[str, Any]) -> list[BoundFunction]:
        """The functions that check the row."""
        return [checker for checker in self._checkers if checker.reward.is_asked(row)]

    def check_routes(self, rows: Sequence[Mapping[str, Any]], what: str) -> list[str]:
        """What `only` of the rewards leaves without a reward, in words.

        Raises:
            ValueError: a reward is asked about none of the rows, or no row has a reward with a weight.
        """
        for number, reward in enumerate(self.rewards):
            if reward.only and not any(map(reward.is_asked, rows)):
                there = {name: sorted({str(as_text(row.get(name))) for row in rows})[:5] for name in reward.only}
                raise ValueError(
                    f"rewards.{number}.only of {reward.name} is {dict(reward.only)}; not one of the {len(rows):,} {what} is so: "
                    f"their values are {there}. Correct rewards.{number}.only, or remove the reward."
                )
        weighty = [reward for reward in self.rewards if reward.weight != 0]
        if not weighty:  # as in distillation, whose rewards are only watched
            return []
        left = sum(not any(reward.is_asked(row) for reward in weighty) for row in rows)
        if left and left == len(rows):
            raise ValueError(
                f"rewards.*.only: not one of the {left:,} {what} has a reward with a weight. Add one for them."
            )
        return [f"{left:,} of the {what} have no reward (rewards.*.only): nothing is learned from them"] if left else []

    def named_columns(self) -> dict[str, list[str]]:
        """The columns that each function names among its parameters, by its reward."""
        return {
            bound.reward.name: [name for name in bound.names if asks_for(bound.function, name)]
            for bound in self._scorers
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
        """What is to be said before the functions are used: what their `notice` attributes return, and what will surprise."""
        texts = [reward.function.notice() for reward in self.rewards if hasattr(reward.function, "notice")]
        own = [
            f"reward {reward.name} changes {', '.join(names)}; it runs in worker processes, each with its own copy, so yours "
            "stays as it is. Return numbers with log_metric instead (docs/rewards.md)"
            for reward in self.rewards
            if (names := changed_variables(reward.function)) and not getattr(reward.function, "in_process", False)
        ]
        return [*(text for text in texts if text is not None), *own]

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

    def tasks(self, p: int, group: Group) -> Iterator[Task]:
        """The calls for group number p, in all functions."""
        singles = [self._single(group, completion) for completion in group.completions]
        listed = {as_messages: self._listed(group, as_messages=as_messages) for as_messages in (False, True)}
        usual: Form = "texts" if group.prompt.messages is None else "messages"
        for f, bound in enumerate(self._scorers):
            if not bound.reward.is_asked(group.prompt.columns):
                continue
            if bound.is_listed:
                own = listed[(bound.form or usual) == "messages"]
                seconds = max(self.timeout_seconds * len(singles), getattr(bound.function, "least_seconds", 0.0))
                yield Task(bound, f, own, bound.arguments(own), seconds, p, 0, len(singles))
            else:
                for g, single in enumerate(singles):
                    yield Task(bound, f, single, bound.arguments(single), self.timeout_seconds, p, g)

    def _single(self, group: Group, completion: Completion) -> dict[str, Any]:
        """Everything that a function of one completion can ask for."""
        return group.prompt.columns | {
            "completion": completion.text,
            "prompt": group.prompt.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.own_ids),
            "max_completion_tokens": self._limit_of(completion),
            "completion_ids": completion.token_ids,
            "turns": completion.messages,
            "environment_reward": None if completion.episode is None else completion.episode.reward,
            "trainer_state": self.trainer_state,
        }

    def _limit_of(self, completion: Completion) -> int:
        """Of its own tokens, which `num_tokens` counts: what results of tools have left of the limit."""
        return self.max_completion_tokens - len(completion.token_ids) + len(completion.own_ids)

    def _listed(self, group: Group, *, as_messages: bool) -> dict[str, Any]:
        """Everything that a function of a list can ask for: a list with one item per completion under every name, as TRL's."""
        num = len(group.completions)
        completions: list[Any] = [completion.text for completion in group.completions]
        prompts: list[Any] = [group.prompt.text] * num
        if as_messages:
            completions = [completion.messages for completion in group.completions]
            prompts = [
                group.prompt.messages or [{"role": "user", "content": group.prompt.columns.get("question")}]
            ] * num
        return {name: [value] * num for name, value in group.prompt.columns.items()} | {
            "completions": completions,
            "prompts": prompts,
            "finish_reason": [completion.finish_reason for completion in group.completions],
            "num_tokens": [len(completion.own_ids) for completion in group.completions],
            "max_completion_tokens": [self._limit_of(completion) for completion in group.completions],
            "completion_ids": [completion.token_ids for completion in group.completions],
            "turns": [completion.messages for completion in group.completions],
            "environment_reward": [each.episode and each.episode.reward for each in group.completions],
            "trainer_state": self.trainer_state,  # not a list, nor in TRL
        }


class Scoring:
    """Scores groups while others are still being sampled.

    A context manager: what is not scored yet when it is left, as after an error, is given up.
    """

    def __init__(self, scorer: Scorer, errand: Errand, num_groups: int) -> None:
        self._scorer = scorer
        self._errand = errand
        self._tasks: list[Task] = []
        self._sizes: list[int | None] = [None] * num_groups  # completions of each group; None: still to come
        self._unreported: dict[int, range] = {}  # the tasks of each group that `finished` has not told of
        self._handed: list[int] = []  # the tasks that are the errand's calls, in its order
        self._call_of: dict[int, int] = {}  # by such a task, the number of its call
        self._made: dict[int, Outcome] = {}  # by task, the calls made in this process

    def add(self, p: int, group: Group) -> None:
        """Hand group number p to the workers, and return at once.

        Raises:
            RewardError: a function raised an exception on a group that was added before.
        """
        assert self._sizes[p] is None, f"group {p} came twice"
        self._sizes[p] = len(group.completions)
        tasks = list(self._scorer.tasks(p, group))
        self._unreported[p] = range(len(self._tasks), len(self._tasks) + len(tasks))
        handed = [place for place, task in enumerate(tasks, len(self._tasks)) if not task.bound.in_process]
        self._tasks += tasks
        self._call_of |= {place: len(self._handed) + call for call, place in enumerate(handed)}
        self._handed += handed
        with _shown_with_its_sample(self._handed_task):
            self._errand.add([self._tasks[place].call for place in handed])
        for place in self._unreported[p]:
            if self._tasks[place].bound.in_process:
                self._made[place] = _call_here(self._tasks[place])

    def _handed_task(self, call: int) -> Task:
        return self._tasks[self._handed[call]]

    def result(self) -> Scores:
        """Wait for what is not scored yet; see `Scorer.score`."""
        assert None not in self._sizes, "a group never came"
        with (
            _shown_with_its_sample(self._handed_task),
            progress.busy("calling rewards", math.inf),
        ):  # each has its time limit
            outcomes = self._errand.result()
        made = self._made | dict(zip(self._handed, outcomes, strict=True))
        return self._scores(range(len(self._sizes)), self._tasks, [made[place] for place in range(len(self._tasks))])

    def finished(self) -> list[tuple[int, Scores]]:
        """The groups that are scored by now, each once, with their scores (1, G); does not wait."""
        done = [p for p, tasks in self._unreported.items() if all(self._outcome(task) is not None for task in tasks)]
        own = {p: self._unreported.pop(p) for p in done}
        return [
            (
                p,
                self._scores(
                    [p], [self._tasks[t] for t in own[p]], [made for t in own[p] if (made := self._outcome(t))]
                ),
            )
            for p in done
        ]

    def _outcome(self, place: int) -> Outcome | None:
        """Of a task, if it has ended."""
        return self._made.get(place) or self._errand.made.get(self._call_of.get(place, -1))

    def _scores(self, places: Sequence[int], tasks: list[Task], outcomes: list[Outcome]) -> Scores:
        """Of the groups at these places."""
        rewards = self._scorer.rewards
        row = {p: number for number, p in enumerate(places)}
        group_size = next((self._sizes[p] for p in places), 0) or 0
        values = torch.full((len(rewards), len(places), group_size), math.nan, dtype=torch.float64)
        is_due = torch.zeros(len(rewards), len(places), dtype=torch.bool)
        for task in tasks:  # until one of its calls ends with a value
            is_due[task.function, row[task.p]] = True
        extras: list[list[dict[str, Any]]] = [[{} for _ in range(group_size)] for _ in places]
        metrics: dict[str, list[float]] = {}
        for task, outcome in zip(tasks, outcomes, strict=True):
            if outcome.kind == "value":
                is_due[task.function, row[task.p]] &= rewards[task.function].is_due
                place = slice(task.g, task.g + task.num_values)
                values[task.function, row[task.p], place] = torch.tensor(
                    task.verdicts(outcome.value), dtype=torch.float64
                )
                for own, cells in zip(extras[row[task.p]][place], task.extras(outcome.columns), strict=True):
                    own |= {task.bound.reward.name: cells} if cells else {}
            for name, logged in outcome.metrics.items():
                metrics[name] = metrics.get(name, []) + logged
        weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
        sums = weighted_sum(values, weights, is_due)
        self._refuse_too_large(sums, values, tasks)
        return Scores(
            rewards=sums,
            values={reward.name: values[f] for f, reward in enumerate(rewards)},
            num_timeouts=sum(outcome.kind == "timeout" for outcome in outcomes),
            num_crashes=sum(outcome.kind == "crash" for outcome in outcomes),
            seconds=sum(outcome.seconds for outcome in outcomes),
            metrics=metrics,
            extras=extras,
            verdicts=self._scorer.verdicts,
            is_due={reward.name: is_due[f] for f, reward in enumerate(rewards)},
        )

    def _refuse_too_large(self, sums: Tensor, values: Tensor, tasks: list[Task]) -> None:
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
def _shown_with_its_sample(task_of: Callable[[int], Task]) -> Iterator[None]:
    """A bug in a function is shown with what it was called with; args: the task of a call by its number."""
    try:
        yield
    except FunctionBug as bug:
        task = task_of(bug.call)
        what = f"raised an exception: {_where_and_what(bug.worker_traceback)}"
        raise task.error(what, f"{task.how_called}\n{bug.worker_traceback}") from None


def _call_here(task: Task) -> Outcome:
    """A call in this process, as of a model that is on its GPU; nothing limits its time."""
    logged = Logged()
    began = time.monotonic()
    try:
        with progress.busy(f"calling the reward {task.bound.reward.name}", math.inf):
            value = task.bound.function(**task.arguments, **{name: getattr(logged, name) for name in task.bound.logs})
    except torch.OutOfMemoryError:  # of the GPU, which sampling shares: fewer sequences at once may fit
        raise
    except Exception:
        raise task.error("raised an exception", f"{task.how_called}\n{traceback.format_exc()}") from None
    return Outcome("value", value, time.monotonic() - began, logged.metrics, logged.columns)


def _unused() -> bytes:
    """What a worker knows in the place of a function that is called elsewhere."""
    return pickle.dumps(None)


def _check_only(reward: Reward, columns: Sequence[str]) -> None:
    """Raises ValueError: `only` goes by a column that the data does not have."""
    for name in reward.only:
        if name not in columns:
            raise ValueError(
                f"rewards.*.only of {reward.name} goes by the column {name!r}; {nearest(name, columns)} Correct the name, or "
                "add the column to the data."
            )


def weighted_sum(values: Tensor, weights: Tensor, is_due: Tensor) -> Tensor:
    """The reward of each completion: sum over functions of weight * value, where NaN stands for "can't tell".

    A function that can't tell for any completion of a group does not apply to that prompt (a code checker on a maths
    question): it is left out of that group's sum, unless its verdict is due. If it can't tell for some, the sum of those
    completions is NaN. A group to which no function applies is NaN throughout. Functions of weight 0 have no part in any of
    this; where no other is left, as in distillation, the reward is 0.

    Args:
        values: (F, P, G).
        weights: (F,).
        is_due: (F, P) whether the function applies even if it can't tell of any: all its calls failed, or it would know.

    Returns:
        (P, G).
    """
    values, is_due, weights = values[weights != 0], is_due[weights != 0], weights[weights != 0, None, None]
    applies = ~values.isnan().all(dim=-1, keepdim=True) | is_due[..., None]  # (F, P, 1)
    total = (weights * values.where(applies, 0.0)).sum(dim=0)
    return total.where(applies.any(dim=0) if len(values) else torch.tensor(True), math.nan)


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
        verdicts=parts[0].verdicts,
        is_due=_joined([each.is_due for each in parts]),
    )


def _joined(parts: Sequence[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    known = [each for each in parts if each is not None]
    return {name: torch.cat([each[name] for each in known]) for name in known[0]} if len(known) == len(parts) else None


def _where_and_what(worker_traceback: str) -> str:
    """KeyError: 'gold' (my_rewards.py, line 4): the last lines of a traceback, for a sentence."""
    *_, last = worker_traceback.rstrip().splitlines() or [""]
    places = re.findall(r'File "([^"]+)", line (\d+)', worker_traceback)
    return f"{last} ({Path(places[-1][0]).name}, line {places[-1][1]})" if places else last
