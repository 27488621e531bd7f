"""Environments: classes whose objects answer a model's turns. docs/environments.md tells how to write one."""

from .countdown import countdown
from .guess_number import guess_number
from .second_try import second_try
from .twenty_questions import twenty_questions

__all__ = ["countdown", "guess_number", "second_try", "twenty_questions"]
