"""The file of data.chat_template, read without torch."""

from __future__ import annotations

from pathlib import Path

import jinja2
from jinja2.ext import Extension

from grpo.config import read_text


class _Generation(Extension):
    """The tags of transformers around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


SYNTAX = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
"""Compiles what transformers does."""


def read_chat_template(path: str | None) -> str | None:
    """The Jinja text in the file that data.chat_template names; None without one.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is not valid Jinja.
    """
    if path is None:
        return None
    setting = f"data.chat_template is {path!r}"
    if not Path(path).is_file():
        raise ValueError(
            f"{setting}; there is no file {Path(path).resolve()}. Name a file with the Jinja text of a chat template."
        )
    text = read_text(Path(path), setting)
    try:
        SYNTAX.compile(text)
    except jinja2.TemplateSyntaxError as error:
        said = f"{error.message}".rstrip(".")
        raise ValueError(f"{setting}; line {error.lineno} is not valid Jinja: {said}. Correct the file.") from None
    return text
