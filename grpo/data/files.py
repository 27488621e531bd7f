"""Where data lies -> its rows as they are written: files, globs, folders, data sets saved to disk or on the hub.

JSON, JSON lines and CSV are read row by row, and no type is guessed over the file: a date stays the text it is, an integer of
any size stays exact, and a number with a fraction remembers its digits (`Written`). Parquet, saved and hub data sets have types
of their own, which stay.
"""

from __future__ import annotations

import csv
import errno
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, cast

from grpo.system import hub_access

Row = dict[str, Any]


class Unreadable(ValueError):
    """A file is not what its name says: which file, which line, and why."""


class Written(float):
    """A number that remembers how it was written: `str(Written("0.50"))` is `0.50`.

    Everything else takes it for the float that it is; a pickle, such as a reward worker gets, holds a plain float.
    """

    text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


# ---- names -----------------------------------------------------------------------------------------------------------


def is_split(name: str) -> bool:
    """Whether `name` has splits of its own: a folder or a hub data set, unlike a file or a glob of files."""
    path = Path(name).expanduser()
    return not path.is_file() and not (glob.has_magic(name) and not path.exists())


def load_table(
    name: str,
    subset: str | None,
    split: str,
    setting: str,
    revision: str | None = None,
    *,
    split_setting: str = "the split",
) -> Iterator[Row]:
    """The rows of local files, a local folder or a data set of the hub, read as they are asked for.

    Args:
        name: a file; a glob of files, which are read in the order of their names; a folder, with its splits as `datasets`
            finds them, or as `save_to_disk` left them; or the id of a hub data set.
        subset: configuration of a folder or hub data set; files have none.
        split: of a folder or hub data set. Of files only a slice counts: `train[:100]`.
        setting: what errors blame.
        revision: branch, tag or commit of a hub data set.
        split_setting: what errors blame for the split.

    Raises:
        ValueError: there is no such thing, or it cannot be read; also while the rows are read.
    """
    path = Path(name).expanduser()
    if revision is not None and (path.exists() or not is_split(name)):
        raise ValueError(
            f"{setting} is {name!r}; it lies on this machine and has no revision {revision!r}. Remove the revision."
        )
    if path.is_file() or not is_split(name):
        files = [path] if path.is_file() else _matches(name, setting)
        rows = _sliced(chain.from_iterable(map(_file_rows(name, files, setting), files)), split, split_setting)
    elif path.is_dir():
        rows = _folder_rows(path, subset, split, setting, split_setting)
    elif path.suffix in FORMATS or name.startswith((".", "/", "~")):
        raise ValueError(f"{setting} is {name!r}; there is no such file. Correct the path, or name a hub data set.")
    else:
        rows = _hub_rows(name, subset, split, setting, revision)
    return _blaming(rows, f"{setting} is {name!r}")


def _blaming(rows: Iterable[Row], setting: str) -> Iterator[Row]:
    try:
        yield from rows
    except Unreadable as error:
        raise ValueError(f"{setting}; {error}") from error


def _matches(pattern: str, setting: str) -> list[Path]:
    expanded = str(Path(pattern).expanduser())
    files = sorted(path for path in map(Path, glob.glob(expanded, recursive=True)) if path.is_file())
    if not files:
        raise ValueError(f"{setting} is {pattern!r}; no file matches the pattern. Correct it.")
    return files


def _file_rows(name: str, files: Iterable[Path], setting: str) -> Callable[[Path], Iterator[Row]]:
    """Reads any of these files, all of which have a format that is known."""
    for path in files:
        if _format(path) is None:
            which = "" if str(path) == str(Path(name).expanduser()) else f" matches {path};"
            raise ValueError(
                f"{setting} is {name!r};{which} a local file ends in {', '.join(FORMATS)}, or one of "
                "them and .gz. Convert the file."
            )
    return lambda path: cast(Reader, _format(path))(path)


def _sliced(rows: Iterable[Row], split: str, split_setting: str) -> Iterable[Row]:
    """The part of files' rows that `split` says; without brackets all of them, whatever its name."""
    if "[" not in split and "+" not in split:
        return rows
    from datasets import ReadInstruction

    whole = list(rows)
    base = split.partition("[")[0]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base: len(whole)})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"{split_setting} is {split!r}; it is no part of {len(whole):,} rows: {error}. Correct it."
        ) from error
    return [row for part in parts for row in whole[part.from_ : part.to]]


# ---- folders and the hub ---------------------------------------------------------------------------------------------


def _folder_rows(path: Path, subset: str | None, split: str, setting: str, split_setting: str) -> Iterable[Row]:
    datasets = hub_access.data_sets()
    said = f"{setting} is {str(path)!r}"
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = _loaded(lambda: datasets.load_from_disk(str(path)), path, f"{said}; it cannot be read")
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_known_split(split, saved, path, split_setting)]
        return _sliced(data_set_rows(saved), split, split_setting)
    builder = _loaded(
        lambda: datasets.load_dataset_builder(str(path), subset),
        path,
        f"{said} (subset {subset!r}); the folder is no data set",
        "Name a folder of data files of one format (train.jsonl, test.jsonl, ...), or the files themselves with a pattern.",
    )
    files = {str(name): [Path(file) for file in listed] for name, listed in (builder.config.data_files or {}).items()}
    name = _known_split(split, files, path, split_setting)
    if all(_format(file) for file in files[name]):
        return _sliced(
            chain.from_iterable(map(_file_rows(str(path), files[name], setting), files[name])), split, split_setting
        )
    load = partial(datasets.load_dataset, str(path), subset, split=split)
    return data_set_rows(_loaded(load, path, f"{said}; it cannot be read"))


def _known_split(split: str, known: Mapping[str, Any], path: Path, split_setting: str) -> str:
    """The name of a split without its slice."""
    name = split.partition("[")[0]
    if name not in known:
        raise ValueError(
            f"{split_setting} is {split!r}; {path} has only {', '.join(map(str, known))}. Set {split_setting} to one of them."
        )
    return name


def _hub_rows(name: str, subset: str | None, split: str, setting: str, revision: str | None) -> Iterator[Row]:
    datasets = hub_access.data_sets()
    options = {} if revision is None else {"revision": revision}
    asked = f"subset {subset!r}, split {split!r}" + (f", revision {revision!r}" if revision else "")
    said = f"{setting} is {name!r} ({asked})"
    reason = hub_access.unreachable()
    no_such = "there is no such local file and the hub gave no such data set"
    try:
        with hub_access.hub_or_cache():
            table = _loaded(
                lambda: datasets.load_dataset(name, subset, split=split, **options),
                Path(name),
                f"{said}; {no_such if reason is None else f'{reason}, and the copy in the cache has no such data'}",
                f"Correct the name, or set {setting} to a .jsonl or .parquet file; for a private or gated one, log in "
                "(`hf auth login`).",
            )
    except Unreadable as error:
        if reason is None or hub_access.has_data_set(name):
            raise
        raise Unreadable(hub_access.no_data_set(said, name, setting, reason)) from error
    return data_set_rows(table)


def _loaded(load: Callable[[], Any], path: Path, problem: str, remedy: str = "Correct the file.") -> Any:
    """What `datasets` loads.

    Raises:
        Unreadable: the data cannot be read.
        ValueError: the folder where it prepares data, by default in the user's home, cannot be written to.
    """
    try:
        return load()
    except Exception as error:
        cause = error.__cause__ or error  # of many errors datasets says that one occurred
        place = Path(getattr(cause, "filename", None) or "")
        if getattr(cause, "errno", None) in NOT_WRITABLE and path not in (place, *place.parents):
            raise ValueError(
                f"HF_HOME is {os.environ.get('HF_HOME', '~/.cache/huggingface')!r}; data sets are prepared in a folder there, "
                f"which cannot be written to: {cause}. Make room, or set HF_HOME (or HF_DATASETS_CACHE) to a folder that can be."
            ) from error
        raise Unreadable(f"{problem}: {cause}. {remedy}") from error


NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def data_set_rows(table: Any) -> Iterator[Row]:
    """The rows of a `datasets.Dataset`, many at a time; numbers of half and single precision with their own shortest digits."""
    datasets = sys.modules.get("datasets")  # which takes a second to import; who has a Dataset has imported it
    if (
        datasets is None
        or not isinstance(table, datasets.Dataset)
        or table.format["type"] not in (None, "pandas", "polars", "arrow")
    ):
        return iter(table)
    table = table.with_format(None)
    short = {name: each for name, feature in table.features.items() if (each := _shortened(feature)) is not None}
    return (_with(row, short) for batch in table.iter(batch_size=1000) for row in _transposed(batch))


def _transposed(batch: Mapping[str, list[Any]]) -> Iterator[Row]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _with(row: Row, conversions: Mapping[str, Callable[[Any], Any]]) -> Row:
    for name, convert in conversions.items():
        row[name] = convert(row[name])
    return row


def _shortened(feature: Any) -> Callable[[Any], Any] | None:
    """What gives 0.1 of a float32 as 0.1; Python's float of it is 0.10000000149011612. None: the column has no such numbers."""
    import numpy

    kinds = {"float16": numpy.float16, "float32": numpy.float32}
    kind = kinds.get(getattr(feature, "dtype", ""))
    return None if kind is None else lambda cell: None if cell is None else Written(str(kind(cell)).removesuffix(".0"))


# ---- files -----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Generator[tuple[int, str], None, None]:
    """The lines of a text file, packed by gzip or not, with their numbers from 1.

    Raises:
        Unreadable: a line is no UTF-8, or the file cannot be read to its end.
    """
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                yield number, str(line, "utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"{path}, line {number}: the byte 0x{error.object[error.start]:02x} is no UTF-8 (Latin-1, UTF-16?). "
            "Save the file as UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
        raise Unreadable(f"{path} cannot be read beyond line {number}: {error}. Correct the file.") from error


def _opened(path: Path) -> io.BufferedIOBase:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(io.BufferedIOBase, gzip.open(path) if packed else path.open("rb"))


def json_rows(path: Path) -> Iterator[Row]:
    """One object per line; or one document: a list of objects, or an object of columns.

    Raises:
        Unreadable: it is neither.
    """
    with closing(_lines(path)) as lines:
        filled = ((number, line) for number, line in lines if not line.isspace())
        number, line = next(filled, (1, ""))
        if not line:
            return
        if not _is_row(line):
            yield from _document_rows(path, "".join([line, *(more for _, more in lines)]), number)
            return
        for place, text in chain([(number, line)], filled):
            yield _object(_decoded(path, text, place), path, f"line {place}")


def _is_row(line: str) -> bool:
    """Whether a file's first line is to be read by itself: an object that ends with it, or one that is wrong before its end."""
    if line.lstrip().startswith("["):
        return False
    try:
        _DECODER.decode(line.rstrip())
    except json.JSONDecodeError as error:
        return error.pos < len(line.rstrip())
    except (ValueError, RecursionError):
        return True
    return True


def _document_rows(path: Path, text: str, first_line: int) -> Iterator[Row]:
    document = _decoded(path, text, first_line)
    if isinstance(document, dict):
        yield from _columns_rows(document)
        return
    for number, item in enumerate(document):
        yield {"text": item} if isinstance(item, str) else _object(item, path, f"item {number}")


def _columns_rows(document: Row) -> Iterator[Row]:
    """Of `{"question": [...], "answer": [...]}`, or of pandas' `{"question": {"0": ...}, ...}`; any other object is a row."""
    columns = [list(each.values()) if isinstance(each, dict) else each for each in document.values()]
    if all(isinstance(each, list) for each in columns) and len({len(each) for each in columns}) == 1:
        yield from (dict(zip(document, values, strict=True)) for values in zip(*columns, strict=True))
    else:
        yield document


def _object(value: Any, path: Path, where: str) -> Row:
    if not isinstance(value, dict):
        raise Unreadable(
            f"{path}, {where}: {json.dumps(value)[:80]} is no row; a row is an object, such as "
            '{"question": "1+1?", "answer": "2"}. Correct it.'
        )
    return value


def _decoded(path: Path, text: str, first_line: int) -> Any:
    try:
        return _DECODER.decode(text.rstrip())
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise Unreadable(
            f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}. Correct the line."
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a column twice, an integer of thousands of digits, or nested too deep
        raise Unreadable(f"{path}, line {first_line}: {error}. Correct the line.") from error


def _whole_number(text: str) -> int | Written:
    return Written(text) if text == "-0" else int(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return row


_DECODER = json.JSONDecoder(
    parse_int=_whole_number, parse_float=Written, parse_constant=Written, object_pairs_hook=_without_doubles
)


def csv_rows(path: Path, *, delimiter: str = ",") -> Iterator[Row]:
    """The cells as text, under the names in the first line; an empty cell is missing (None).

    Raises:
        Unreadable: a name stands twice, or a row has more or fewer cells than there are names.
    """
    csv.field_size_limit(2**31 - 1)
    with closing(_lines(path)) as lines:
        reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
        try:
            names: list[str] = next(filter(None, reader), [])
            _check_header(path, names)
            for cells in filter(None, reader):  # an empty line has none
                _check_cells(path, reader.line_num, names, cells)
                yield {name: cell or None for name, cell in zip(names, cells, strict=True)}
        except csv.Error as error:
            raise Unreadable(f"{path}, line {reader.line_num}: not CSV: {error}. Correct the line.") from error


def _check_header(path: Path, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise Unreadable(f"{path}, line 1: the column {name!r} is there twice. Rename one of them.")


def _check_cells(path: Path, line: int, names: list[str], cells: list[str]) -> None:
    if len(cells) != len(names):
        raise Unreadable(
            f"{path}, line {line}: {len(cells)} cells under {len(names)} column names. Quote a cell that holds a delimiter."
        )


def parquet_rows(path: Path) -> Iterator[Row]:
    """Raises Unreadable: it is no parquet file."""
    datasets = hub_access.data_sets()
    load = partial(datasets.load_dataset, "parquet", data_files=str(path), split="train")
    return data_set_rows(_loaded(load, path, f"{path} cannot be read as parquet"))


Reader = Callable[[Path], Iterator[Row]]

FORMATS: dict[str, Reader] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".gz": json_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".parquet": parquet_rows,
}


def _format(path: Path) -> Reader | None:
    """By the end of the name, that of the packed file where it is packed."""
    inner = Path(path.stem).suffix
    return FORMATS.get(inner if path.suffix == ".gz" and inner in FORMATS else path.suffix)


def refuse_row(row: Any, where: str) -> NoReturn:
    """Say what is wrong with rows handed over by a program."""
    raise ValueError(
        f"{where} is of type {type(row).__name__}; a row is a dictionary from column names to values. Pass a datasets.Dataset, a "
        "pandas.DataFrame or a list of dictionaries."
    )


def given_rows(given: Any, setting: str) -> Iterator[Row]:
    """The rows of what a program hands over: a Dataset, a DataFrame, or anything that iterates over dictionaries.

    Raises:
        ValueError: it is a DatasetDict or a dictionary of columns, or no rows at all.
    """
    if isinstance(given, Mapping):
        import datasets

        is_split_up = isinstance(given, (datasets.DatasetDict, datasets.IterableDatasetDict))
        raise ValueError(
            f"{setting} is a {type(given).__name__} with the keys {', '.join(map(str, given))}; it takes rows. "
            + (
                f"Pass one split of it: {next(iter(given), '...')!r}."
                if is_split_up
                else "Pass datasets.Dataset.from_dict(...) of it."
            )
        )
    if callable(getattr(given, "to_dict", None)) and hasattr(given, "iloc"):  # pandas is no dependency
        return iter(given.to_dict("records"))
    if isinstance(given, (str, bytes)) or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise ValueError(
            f"{setting} is {given!r}; it takes rows. Pass a datasets.Dataset, a pandas.DataFrame or a list of "
            "dictionaries; a file is named with data.name."
        )
    return data_set_rows(given)
