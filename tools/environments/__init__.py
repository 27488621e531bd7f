"""Environments: classes whose objects answer a model's turns. docs/environments.md tells how to write one."""

from typing import Any

from .countdown import countdown
from .guess_number import guess_number
from .second_try import second_try
from .twenty_questions import twenty_questions

__all__ = ["countdown", "guess_number", "of_verifiers", "second_try", "twenty_questions"]


def __getattr__(name: str) -> Any:
    """The one that needs a package of its own, whose import takes seconds."""
    if name != "of_verifiers":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .verifiers_env import of_verifiers
    except ImportError as error:
        raise ValueError(
            f"environment.function is 'of_verifiers'; the package verifiers cannot be imported as it is in 0.3: {error}. "
            "pip install 'verifiers>=0.3,<0.4', or name another environment."
        ) from error
    return of_verifiers
