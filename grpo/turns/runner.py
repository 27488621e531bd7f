"""A tool's end of a call, in a worker process. Uses the standard library and what the tool imports.

An object that a conversation has to itself, such as an interpreter, lives nowhere between two calls: it comes and goes as bytes.
So any worker can make any call, one that dies takes nothing with it, and a run that is resumed finds it as it was.
"""

from __future__ import annotations

import inspect
import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_CHARS = 100_000
"""Of a result; what is longer is cut off before it leaves the worker."""

MAX_STATE_BYTES = 2**24
"""Of an object between two calls: the trainer's process holds one for each completion under way."""


@dataclass(frozen=True)
class Runner:
    """Makes calls of one function, or of the methods of objects of one class.

    Args:
        make: the function, or what makes an object: its class.
        given: arguments that are not the model's: of the function, or of `make`.
        is_object: whether `make` makes an object.
    """

    make: Callable[..., Any]
    given: dict[str, Any] = field(default_factory=dict)
    is_object: bool = False

    @property
    def name(self) -> str:
        return str(getattr(self.make, "__name__", type(self.make).__name__))

    def __call__(
        self, method: str, arguments: dict[str, Any], state: bytes | None, columns: Mapping[str, Any]
    ) -> tuple[bool, str, bytes | None]:
        """Make a call.

        Args:
            method: of the object; `reset`: make an object for a question, and tell what its `reset` says.
            arguments: those that the model chose.
            state: the object as a call before left it; None: it is made anew, and its `reset` is given the columns that it asks
                for.
            columns: of the question.

        Returns:
            Whether it went well; the result as text, or the error's; the object as it is now, or as it was if it cannot be kept.
        """
        if not self.is_object:
            well, text = _answered(self.make, {**self.given, **arguments})
            return well, text, None
        import cloudpickle

        if method == "reset":
            _, said = begin(self.make, self.given, columns)
            return True, observation(said), None
        if state is None:
            held, said = begin(self.make, self.given, columns)
            check_told(held, said, columns)
            state = cloudpickle.dumps(held)  # one that cannot be kept even now is a mistake of its class
        else:
            try:
                held = cloudpickle.loads(state)
            except MemoryError:
                raise
            except Exception as error:  # of what a model had it hold, say
                return False, f"the object cannot be read again: {words(error)}"[:MAX_CHARS], state
        well, text = _answered(getattr(held, method), arguments)
        kept, wrong = _kept(held)
        return (well, text, kept) if kept is not None else (False, wrong, state)


def _kept(held: Any) -> tuple[bytes | None, str]:
    """An object as bytes; or why what a model had it do has left one that cannot be kept."""
    import cloudpickle

    try:
        kept = cloudpickle.dumps(held)
    except MemoryError:
        raise
    except Exception as error:
        return None, f"the call is undone; what it left cannot be kept: {words(error)}"[:MAX_CHARS]
    if len(kept) > MAX_STATE_BYTES:
        return (
            None,
            f"the call is undone; what it left has {len(kept) >> 20} MiB, and {MAX_STATE_BYTES >> 20} can be kept",
        )
    return kept, ""


def words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ is the tool's own code
        return type(error).__name__


OBSERVATION = "observation"
"""Column of a row whose question holds what a `reset` had to say."""


def begin(make: Callable[..., Any], given: Mapping[str, Any], columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """Make an object, and call its `reset`, if it has one, with the columns that it asks for, or with all of them as `row`.

    The random numbers that both draw follow from the question, so that it says the same of it each time.

    Returns:
        The object, and what its `reset` returned.
    """
    row = without_observation(columns)
    seed(repr((row.get("question"), row.get("answer"))))
    held = make(**given)
    reset = getattr(held, "reset", None)
    if reset is None:
        return held, None
    parameters = inspect.signature(reset).parameters
    if "row" in parameters and "row" not in row:
        return held, reset(row=row)
    everything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return held, reset(**{name: value for name, value in row.items() if everything or name in parameters})


def seed(value: int | str) -> None:
    """Seed the random numbers of Python, and the global ones of numpy where a module has imported it."""
    random.seed(value)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(random.Random(value).getrandbits(32))


def without_observation(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it was before what `reset` said was put behind its question."""
    row = {name: value for name, value in columns.items() if name != OBSERVATION}
    if said := columns.get(OBSERVATION):
        row["question"] = str(row["question"]).removesuffix(said).removesuffix(GAP)
        if row.get(MESSAGES):
            *turns, last = row[MESSAGES]
            row[MESSAGES] = [*turns, {**last, "content": row["question"]}]
    return row


MESSAGES = "question_messages"
"""As grpo/data/rows.py has it, which a worker does not import."""

GAP = "\n\n"
"""Between a question and an observation."""


def texts_of(said: Any) -> tuple[str, ...]:
    """What an object has to say to the model: a text, or messages of the user; nothing: ().

    Raises:
        ValueError: it is something else.
    """
    if said is None:
        return ()
    if isinstance(said, str):
        return (said[:MAX_CHARS],)
    items = list(said) if isinstance(said, (list, tuple)) else [said]
    texts = [
        each.get("content") if isinstance(each, Mapping) and each.get("role") == "user" else each for each in items
    ]
    if not all(isinstance(each, str) for each in texts):
        raise ValueError(
            f"it returned {str(said)[:200]!r}; what is said to a model is a text, or a list of messages of the role user, "
            '[{"role": "user", "content": "Higher."}]. Return one of these, or None.'
        )
    return tuple(str(each)[:MAX_CHARS] for each in texts)


def observation(said: Any) -> str:
    """What a `reset` said, as one text; empty: nothing."""
    return "\n".join(texts_of(said)).encode(errors="replace").decode()


def check_told(held: Any, said: Any, columns: Mapping[str, Any]) -> None:
    """Raises ValueError: a `reset` says what the prompt, which has been read by then, does not."""
    if (text := observation(said)) not in (columns.get(OBSERVATION) or ""):
        raise ValueError(
            f"{type(held).__name__}.reset returned {text[:80]!r}, which is not what it returned when the prompt was made, or the "
            "first question's had returned None. Let it return the same for the same row (random.random() does, which is seeded "
            "by the row), and None for all rows or for none."
        )


def _answered(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[bool, str]:
    """Whether a call went well, and its result, or what it raised, as text."""
    try:
        value = function(**arguments)
        if hasattr(value, "__await__"):
            value = _awaited(value)
        return True, _as_text(value)
    except MemoryError:  # the worker's own to handle: it is replaced
        raise
    except Exception as error:
        return False, words(error)[:MAX_CHARS]


def _awaited(value: Any) -> Any:
    import asyncio

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value[:MAX_CHARS]
    return "" if value is None else json.dumps(value, default=_plain, ensure_ascii=False)[:MAX_CHARS]


def _plain(value: Any) -> Any:
    """What JSON can hold of an object: an array's or a scalar's numbers, else its text, if that tells more than where it lies."""
    if hasattr(value, "tolist"):
        return value.tolist()
    is_mute = type(value).__str__ is object.__str__ and type(value).__repr__ is object.__repr__
    if is_mute or inspect.isgenerator(value):
        raise TypeError(f"it returned an object of the type {type(value).__name__}, of which a model can read nothing")
    return str(value)
