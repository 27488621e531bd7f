"""A parser of arguments whose errors are a line, and not a page of options above it."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, which prints the whole usage before each error."""

    def error(self, message: str) -> NoReturn:
        """Raises SystemExit: 2."""
        said = message if message.endswith(".") else f"{message}."
        self.exit(2, f"error: {self.prog}: {said} `{self.prog} --help` lists the options.\n")
