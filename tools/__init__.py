"""Tools that a model can call: typed Python functions, or classes whose objects a conversation has to itself."""

from .calculator import calculator
from .python import python

__all__ = ["calculator", "python"]
