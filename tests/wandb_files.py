"""What a run that was kept offline has for Weights & Biases."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as wandb_records


def wandb_log(path: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB with a header of 7 bytes before each part."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_records.Record.FromString(record)
            record = b""


def wandb_records_of(run: Path, kind: str) -> list[list[Any]]:
    """Of each attempt at the run, its records of a kind."""
    paths = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    return [
        [getattr(each, kind) for each in wandb_log(path) if each.WhichOneof("record_type") == kind] for path in paths
    ]


def wandb_histories(run: Path) -> list[list[dict[str, Any]]]:
    return [
        [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in each.item} for each in rows]
        for rows in wandb_records_of(run, "history")
    ]
