"""A tool's end of a call, in a worker process. Uses the standard library and what the tool imports.

An object that a conversation has to itself, such as an interpreter, lives nowhere between two calls: it comes and goes as bytes.
So any worker can make any call, one that dies takes nothing with it, and a run that is resumed finds it as it was.
"""

from __future__ import annotations

import inspect
import json
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
            method: of the object.
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

        if state is None:
            held = self.make(**self.given)
            _begin(held, columns)
            state = cloudpickle.dumps(held)  # one that cannot be kept even now is a mistake of its class
        else:
            held = cloudpickle.loads(state)
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
        return None, f"the call is undone; what it left cannot be kept: {_words(error)}"[:MAX_CHARS]
    if len(kept) > MAX_STATE_BYTES:
        return (
            None,
            f"the call is undone; what it left has {len(kept) >> 20} MiB, and {MAX_STATE_BYTES >> 20} can be kept",
        )
    return kept, ""


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its __str__ is the tool's own code
        return type(error).__name__


def _begin(held: Any, columns: Mapping[str, Any]) -> None:
    """Call an object's `reset`, if it has one, with the columns that it asks for.

    Raises:
        ValueError: it returned something, which nobody would read.
    """
    reset = getattr(held, "reset", None)
    if reset is None:
        return
    wanted = inspect.signature(reset).parameters.values()
    everything = any(each.kind is each.VAR_KEYWORD for each in wanted)
    names = [each.name for each in wanted]
    said = reset(**{name: value for name, value in columns.items() if everything or name in names})
    if said is not None:
        raise ValueError(
            f"{type(held).__name__}.reset returned {str(said)[:80]!r}; it is called when the prompt has been read. Return "
            "None, and put what the model is to be told into the question."
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
        return False, _words(error)[:MAX_CHARS]


def _awaited(value: Any) -> Any:
    import asyncio

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value[:MAX_CHARS]
    return "" if value is None else json.dumps(value, default=str, ensure_ascii=False)[:MAX_CHARS]
