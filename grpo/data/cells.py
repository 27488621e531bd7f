"""A cell of a row: by what name it is found, and its text.

The text of a cell is the text that trains:

    text                      itself
    number of JSON            as it is written: 0.50, 1e400, 4611686018427387905
    integer, decimal          exact
    other float               its shortest digits; a whole number without `.0`, because tables keep integers as floats beside a
                              missing one
    true, false               as JSON writes them, in every format
    date, time                ISO 8601: 1945-05-08, 1945-05-08T00:00:00
    list of numbers           as JSON writes it: [3, 4], [[1, 0], [0, 1]]
    null, NaN                 missing: no question, and an answer that no reward can grade
    list of messages          a conversation, where it is the question (data.template chat renders it)
    anything else             refused, with the column, the row and what to do
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from grpo.data.files import Written


class NothingThere(LookupError):
    """A row has no such column, or a cell has nothing of that name in it."""

    def __init__(self, cell: Any, path: list[str]) -> None:
        super().__init__(cell, path)
        self.cell = cell  # the last that was found; the row itself, where no column was
        self.path = path  # of this cell


def look_up(row: Mapping[str, Any], address: str) -> Any:
    """The cell of a column, or what lies deeper in it: `reward_model.ground_truth`, `messages.-1.content`; None: it is missing.

    A column that has the very name comes first.

    Raises:
        NothingThere: there is no such column, or nothing of that name in it.
    """
    if address in row:
        return row[address]
    cell: Any = row
    for depth, key in enumerate(keys := address.split(".")):
        if isinstance(cell, Mapping) and key in cell:
            cell = cell[key]
        elif is_list(cell) and re.fullmatch(r"-?\d+", key) and -len(cell) <= int(key) < len(cell):
            cell = cell[int(key)]
        else:
            raise NothingThere(cell, keys[:depth])
        if is_missing(cell):
            return None
    return cell


def cell_of(row: Mapping[str, Any], address: str, setting: tuple[str, str], where: str) -> Any:
    """What `look_up` finds.

    Args:
        setting: which names the column, and as what, for the error.
        where: the row is, for the error.

    Raises:
        ValueError: there is nothing of that name.
    """
    try:
        return look_up(row, address)
    except NothingThere as error:
        raise ValueError(_nothing_there(error.cell, error.path, setting, where)) from None


def _nothing_there(cell: Any, path: list[str], setting: tuple[str, str], where: str) -> str:
    if not path:
        return f"{said(setting)}; {where} has the columns {', '.join(map(str, cell))}. Name one of them."
    inside = ".".join(path)
    if isinstance(cell, Mapping):
        return f"{said(setting)}; {inside} of {where} has {', '.join(map(str, cell))}. Name one of them."
    if is_list(cell):
        return f"{said(setting)}; {inside} of {where} is a list of {len(cell)}. Name one by its number: {inside}.0."
    return f"{said(setting)}; {inside} of {where} is {described(cell)}, and there is nothing in it. Name {inside}."


def said(setting: tuple[str, str]) -> str:
    return f"{setting[0]} is {setting[1]!r}"


def is_missing(cell: Any) -> bool:
    """None, NaN, and what tables have for them."""
    if cell is None or isinstance(cell, (str, list, dict)):
        return cell is None
    try:
        return bool(cell != cell)  # NaN and NaT
    except (TypeError, ValueError):  # pandas' NA is neither; an array is many
        return type(cell).__name__ == "NAType"


def is_conversation(cell: Any) -> bool:
    """A list of messages, each with a role and a content."""
    return (
        is_list(cell)
        and len(cell) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in cell)
    )


def text_in(cell: Any, column: str, setting: tuple[str, str], where: str) -> str:
    """
    Raises:
        ValueError: the cell has no text of its own, or one that is no Unicode.
    """
    text = text_of(cell)
    if text is None:
        raise ValueError(
            f"{said(setting)}; {column} of {where} is {described(cell)}, not a text. {_remedy(cell, column, setting)}"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{said(setting)}; {column} of {where} holds {text[error.start]!r}, half of a character. Correct it, or "
                "drop the row."
            ) from error
    return text


def text_of(cell: Any) -> str | None:
    """The text of a cell, as the head of this module has it; None: it has none."""
    if isinstance(cell, str):
        return str(cell)
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, (int, Written)):
        return str(cell)
    if isinstance(cell, Decimal):
        return format(cell, "f")
    if isinstance(cell, (date, time)):  # a datetime is a date
        return cell.isoformat()
    if hasattr(cell, "dtype") and hasattr(cell, "tolist"):  # numpy and torch
        return _array_text(cell)
    if isinstance(cell, float):
        return _float_text(repr(float(cell)))
    return _list_text(cell) if is_list(cell) else None


def _float_text(digits: str) -> str:
    return digits.removesuffix(".0")


def _array_text(cell: Any) -> str | None:
    """Of a number or an array of numbers; those of half and single precision have their own shortest digits."""
    if getattr(cell, "ndim", 0) == 0 and str(cell.dtype) in ("float16", "float32"):
        return _float_text(str(cell))
    plain = cell.tolist()
    return None if hasattr(plain, "dtype") else text_of(plain)


def _list_text(cell: Sequence[Any]) -> str | None:
    """Of a list of numbers, or of such lists."""
    parts = [None if isinstance(item, str) else text_of(item) for item in cell]
    known = [part for part in parts if part is not None]
    return f"[{', '.join(known)}]" if len(known) == len(parts) and parts else None


def is_list(cell: Any) -> bool:
    return isinstance(cell, (list, tuple))


def described(cell: Any) -> str:
    if isinstance(cell, Mapping):
        return f"a dictionary with {', '.join(map(str, cell))}" if cell else "an empty dictionary"
    if is_conversation(cell):
        return f"a conversation of {len(cell)} messages"
    if is_list(cell):
        return (
            f"a list of {len(cell)} ({', '.join(sorted({type(item).__name__ for item in cell}))})"
            if cell
            else "an empty list"
        )
    return f"{type(cell).__name__} data"


def _remedy(cell: Any, column: str, setting: tuple[str, str]) -> str:
    if isinstance(cell, Mapping) and cell:
        inside = f"{column}.{next(iter(cell))}"
    elif is_conversation(cell):
        inside = f"{column}.0.content"
    elif is_list(cell) and cell:
        inside = f"{column}.0"
    else:
        return "Name another column, or convert this one to text."
    return f"Name what is inside, such as {inside}, in {setting[0]}, or convert the column to text."
