"""Which rows are taken, by what stands in their columns: `data.where`, `data.eval_where`, and a source's own.

Compared is the text of a cell, as cells.py has it, with that of a value. What JSON takes for a number is compared by its value:
0.5 is 0.50 and the text "5e-1", 3 is a decimal's 3.00; "007", "1_000" and "nan" are texts. True and False, as pandas writes them
to CSV, are true and false. Where several columns are named, a row has one of the values of each.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from decimal import Context, Decimal
from typing import Any

from grpo.config import DataConfig, SourceConfig
from grpo.config.where import values_of
from grpo.data.cells import NothingThere, is_list, is_missing, look_up, said, text_in
from grpo.data.files import refuse_row

MOST_SHOWN = 8
"""Values that an error names."""
MOST_SIGNS = 40
"""Of each of them."""

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
"""A text that is one, as JSON has them; a larger exponent leaves it a text, since it is written out to be compared."""
MOST_DIGITS = 1_000
"""Of a number; a longer text is compared as it is."""
EXACT = Context(prec=2 * MOST_DIGITS)
"""Rounds none of them."""

Row = Mapping[str, Any]


class Selection:
    """Rows to keep, and what there was in those that were read.

    Sources without a `where` of their own share one: a value has to be in a row of any of them.
    """

    def __init__(
        self, where: Mapping[str, Any] | None, setting: str, left_out: Counter[str], *, is_shared: bool = False
    ) -> None:
        """
        Args:
            setting: `where` is the value of, for errors.
            left_out: counts the rows that are not kept, by reason.
            is_shared: several sources are read by it, and who reads the last calls `check_values`.
        """
        self.where = where or {}
        self.setting: tuple[str, Any] = (setting, _Shown(self.where))
        self.left_out = left_out
        self.is_shared = is_shared
        self.wanted = {
            column: {_text(value, column, self.setting, setting) for value in values_of(values)}
            for column, values in self.where.items()
        }
        self.found: dict[str, Counter[str]] = {column: Counter() for column in self.where}

    @classmethod
    def of(
        cls, data: DataConfig, *, held_out: bool, left_out: Counter[str] | None = None, is_shared: bool = False
    ) -> Selection:
        """What `data` says of training or of held-out questions."""
        name = "eval_where" if held_out else "where"
        counts = Counter[str]() if left_out is None else left_out
        return cls(getattr(data, name), f"data.{name}", counts, is_shared=is_shared)

    def of_source(self, source: SourceConfig, prefix: str) -> Selection:
        """A source's own, which takes the place of this one; this one where it has none."""
        return self if source.where is None else Selection(source.where, f"{prefix}where", self.left_out)

    def kept(self, rows: Iterable[Row], name: str) -> Iterator[tuple[int, Row]]:
        """The rows that are kept, each with its number among all.

        Args:
            name: what errors call the rows.

        Raises:
            ValueError: one is no row, or its cell has no text; no row has a column, or one of its values, or none is kept.
        """
        found = {column: Counter[str]() for column in self.where}
        first: Row | None = None
        num_rows = num_kept = 0
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                refuse_row(row, f"row {number} of {name}")
            first = row if first is None else first
            num_rows += 1
            reason = self._why_not(row, found, f"row {number} of {name}") if found else None
            if reason is None:
                num_kept += 1
                yield number, row
            else:
                self.left_out[reason] += 1
        for column, counts in found.items():
            self.found[column].update(counts)
        if first is not None and num_kept == 0:
            self._refuse(found, first, f"{num_rows:,} rows of {name}")
        if not self.is_shared:
            self.check_values()

    def check_values(self) -> None:
        """Raises ValueError: there is a value that no row has."""
        for column, counts in self.found.items():
            lacking = self.wanted[column] - counts.keys()
            if lacking and counts:
                it, value = ("it", "value") if len(lacking) == 1 else ("them", "values")
                raise ValueError(
                    f"{said(self.setting)}; no row has {_listed(lacking, len(lacking))} in {column}. "
                    f"{_values(counts, min(lacking))} Correct {it}, or remove the {value}."
                )

    def _why_not(self, row: Row, found: dict[str, Counter[str]], place: str) -> str | None:
        """The first reason not to keep a row; None: it is kept. Counts in `found` what it has.

        Args:
            place: which row it is, for errors.
        """
        why = None
        for column, counts in found.items():
            try:
                cell = look_up(row, column)
            except NothingThere:
                cell = None
            if _has_nothing(cell):
                why = why or f"{column} is missing, which {self.setting[0]} asks for"
                continue
            text = _text(cell, column, self.setting, place)
            counts[text] += 1
            if text not in self.wanted[column]:
                why = why or f"{column} has none of the values of {self.setting[0]}"
        return why

    def _refuse(self, found: dict[str, Counter[str]], first: Row, rows: str) -> None:
        """Say why none of a source's rows is kept."""
        own = " Or give the source a where of its own; {} keeps all of its rows." if self.is_shared else ""
        for column, counts in found.items():
            if not counts:
                raise ValueError(
                    f"{said(self.setting)}; none of the {rows} has anything in {column}{_there(first, column)}. Name another "
                    f"column.{own}"
                )
            if not self.wanted[column] & counts.keys():
                raise ValueError(
                    f"{said(self.setting)}; none of the {rows} has one of these values in {column}. "
                    f"{_values(counts, min(self.wanted[column]))} Correct it.{own}"
                )
        numbers = ", ".join(
            f"{sum(counts[text] for text in self.wanted[column]):,} by {column}" for column, counts in found.items()
        )
        raise ValueError(
            f"{said(self.setting)}; a row has to be so in all of these columns, and none of the {rows} is: {numbers}. Name more "
            f"values, or fewer columns.{own}"
        )


def _text(cell: Any, column: str, setting: tuple[str, Any], place: str) -> str:
    """By which a cell and a value are compared: its text, and for all spellings of a number or a truth value the same.

    Args:
        place: where the cell is, for errors.
    """
    text = text_in(cell, column, setting, place)
    if text in ("True", "False"):
        return text.lower()
    if len(text) > MOST_DIGITS or not NUMBER.fullmatch(text):
        return text
    number = Decimal(text)
    return format(EXACT.normalize(number), "f") if number else "0"


def _has_nothing(cell: Any) -> bool:
    """Missing, or a list or an array without items."""
    return is_missing(cell) or (is_list(cell) and not cell) or getattr(cell, "size", None) == 0


class _Shown:
    """A `where` as errors print it: long texts and long lists of values are cut."""

    def __init__(self, where: Mapping[str, Any]) -> None:
        self.where = where

    def __repr__(self) -> str:
        cut = reprlib.Repr()
        cut.maxlist, cut.maxstring, cut.maxlong = MOST_SHOWN, MOST_SIGNS, MOST_SIGNS
        return f"{{{', '.join(f'{column!r}: {cut.repr(values)}' for column, values in self.where.items())}}}"


def _there(row: Row, column: str) -> str:
    """What a row has that has no such column."""
    try:
        look_up(row, column)
    except NothingThere as error:
        inside = f" in {'.'.join(error.path)}" if error.path else ""
        return f"; the first has {', '.join(map(str, error.cell))}{inside}" if isinstance(error.cell, Mapping) else ""
    return ""


def _values(counts: Counter[str], near: str) -> str:
    """Which there are: all, or those like the one that was asked for, and then the most frequent."""
    shown = difflib.get_close_matches(near, counts, n=3) if len(counts) > MOST_SHOWN else []
    shown = list(dict.fromkeys([*shown, *(text for text, _ in counts.most_common(MOST_SHOWN))]))[:MOST_SHOWN]
    return f"Its values are {_listed(shown, len(counts))}."


def _listed(texts: Collection[str], num: int) -> str:
    """The first of them in order, each cut, and how many of `num` are not named."""
    shown = sorted(texts, key=_in_order)[:MOST_SHOWN]
    rest = num - len(shown)
    others = f", and {rest:,} other{'s' * (rest > 1)}" if rest else ""
    return ", ".join(repr(text[:MOST_SIGNS]) for text in shown) + others


def _in_order(text: str) -> tuple[bool, float, str]:
    """Numbers by their size, then texts."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
