"""Arguments of a trainer that it does not take, told as what they are called here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec

from grpo.config.elsewhere import ARGUMENTS

Given = ParamSpec("Given")


def explained(init: Callable[Given, None]) -> Callable[Given, None]:
    """Decorates a trainer's `__init__`: a call with the arguments of another library says what they are here.

    Raises:
        TypeError: as Python does, with the arguments that there are and what to write instead.
    """
    signature = inspect.signature(init)
    takes = [*signature.parameters][1:]
    trainer = f"grpo.{init.__qualname__.partition('.')[0]}"

    @functools.wraps(init)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            said = [*_explanations((name for name in kwargs if name not in takes), takes)] or [f"{error}."]
            raise TypeError(
                f"{trainer}(): {' '.join(said)} It takes {takes[0]} first, which is a model or a configuration, and by name "
                f"{', '.join(takes[1:])}."
            ) from None
        init(*args, **kwargs)

    return checked


def _explanations(unknown: Iterable[str], takes: list[str]) -> Iterator[str]:
    for name in unknown:
        near = difflib.get_close_matches(name, takes, n=1)
        if name in ARGUMENTS:
            yield f"{name} is an argument of TRL; here it is {ARGUMENTS[name]}."
        elif near:
            yield f"{name} is no argument. Did you mean {near[0]}?"
        else:
            yield f"{name} is no argument. Remove it; a setting goes into settings, by its name here (`grpo settings {name}`)."
