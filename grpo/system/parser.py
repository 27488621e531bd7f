"""A parser of arguments whose errors are a line, and not a page of options above it."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, which prints the whole usage before each error, and proposes nothing."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser; what was given is kept for an error's words."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises SystemExit: 2."""
        if message.startswith("the following arguments are required"):  # as one that was misspelt is
            message = next(
                (f"unrecognized arguments: {word}" for word in self._given if self._is_unknown(word)), message
            )
        said = re.sub(r"invalid int value: (.*)", r"\1 is no whole number", message)
        said = re.sub(r"invalid \w+ value: (.*)", r"\1 is no number", said)  # the name is that of a function of ours
        said = said if said.endswith((".", "?")) else f"{said}."
        found = re.match(r"unrecognized arguments: ((\S+?)(=\S*)?)( |\Z)", message)
        if found is not None and (proposed := self._proposed(*found.group(1, 2))):
            said += f" {proposed}"
        self.exit(2, f"error: {self.prog}: {said} `{self.prog} --help` lists the options.\n")

    def _is_unknown(self, word: str) -> bool:
        name = word.partition("=")[0]
        return bool(re.fullmatch(r"--[a-z][\w-]*", name)) and not any(
            option.startswith(name) for option in self._option_string_actions
        )

    def _proposed(self, word: str, name: str) -> str:
        """What a word may have been meant for that no option takes: an option, or a setting without --set before it."""
        options = list(self._option_string_actions)
        if name.startswith("-"):
            near = difflib.get_close_matches(name, options, n=1)
            return f"Did you mean {near[0]}?" if near else ""
        is_setting = "--set" in options and re.fullmatch(r"\w+(\.\w+)+=.*", word)
        return f"Settings follow --set: --set {word}." if is_setting else ""
