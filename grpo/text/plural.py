"""A number and what it counts, as one says it."""

from __future__ import annotations


def counted(number: int, things: str) -> str:
    """`1 row`, `0 rows`, `1,000 rows`, of things whose plural is made by an s."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"
