"""`grpo check` is `python -m grpo.check`."""

from grpo.check.__main__ import main

__all__ = ["main"]
