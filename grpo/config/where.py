"""Which rows of the data are taken: the form of `data.where`, `data.eval_where` and a source's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grpo.config.sections import DataConfig


def values_of(wanted: Any) -> list[Any]:
    """The values of a column that are taken: one may stand for itself, without a list."""
    return wanted if isinstance(wanted, list) else [wanted]


def check_where(data: DataConfig) -> None:
    """Raises ValueError: a column has no values, or one that no cell can have as its text; or all sources have a where of their
    own."""
    for setting, where in _named(data):
        for column, wanted in (where or {}).items():
            values = values_of(wanted)
            wrong = [value for value in values if not isinstance(value, (str, int, float))]
            if not values:
                raise ValueError(
                    f"{setting} is {where!r}; {column} has no values, and no row would be left. Name those to keep, or remove "
                    f"{column}."
                )
            if wrong:
                raise ValueError(
                    f"{setting} is {where!r}; {wrong[0]!r} is of type {type(wrong[0]).__name__}, and {column} has a text, a "
                    "number, true or false, or a list of these. Correct it; a date stands in quotation marks, and rows that have "
                    "nothing in a column are never kept."
                )

    for setting, where, listed in (("where", data.where, data.name), ("eval_where", data.eval_where, data.eval_name)):
        if where is not None and isinstance(listed, list) and all(source.where is not None for source in listed):
            name = "eval_name" if setting == "eval_where" else "name"
            raise ValueError(
                f"data.{setting} is {where!r}; all sources of data.{name} have a where of their own, which takes its place, and "
                "it has no effect. Remove it."
            )


def _named(data: DataConfig) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    yield "data.where", data.where
    yield "data.eval_where", data.eval_where
    for setting, sources in (("data.name", data.name), ("data.eval_name", data.eval_name)):
        if isinstance(sources, list):
            yield from ((f"{setting}.{number}.where", source.where) for number, source in enumerate(sources))
