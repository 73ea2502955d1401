"""File formats: readers that yield the rows of one file, one after the other, with their origins.

Origins are ``file:number``, counted from 1: lines of JSON lines, rows of CSV and TSV with the header as the first,
items of JSON, rows of Parquet and Arrow.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bfpo_pl.data.rows import RowError
from bfpo_pl.data.sources import RawRow, SourceError

Reader = Callable[[Path], Iterator[tuple[str, RawRow]]]
"""Yields (origin, row) of a file."""
ERRORS = (OSError, EOFError, UnicodeError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading a file that is torn, or not what its suffix says, may raise."""

_BATCH = 256
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# A number as JSON has it (thus not 007, which is rather a name), or a truth value.
_SCALAR = re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?(e[+-]?[0-9]{1,3})?|true|false", re.IGNORECASE)


class _KeyTwice(ValueError):
    """A JSON object has a key twice.

    Args:
        key: The key.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"an object has the key '{key}' twice")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that it has twice, Python's decoder would take the last value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwice(next(key for key in keys if keys.count(key) > 1))
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def format_of(file: Path) -> str | None:
    """The suffix that tells the format, one of `FORMATS`; None if there is none.

    Args:
        file: The file.
    """
    name = Path(file.name.lower())
    if name.suffix in _COMPRESSIONS:
        packed = name.with_suffix("").suffix
        return packed if packed in _TEXT else None
    return name.suffix if name.suffix in FORMATS else None


def _opened(file: Path) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    if file.stat().st_size == 0:
        return io.BytesIO()  # no rows, whatever the suffix says
    match file.suffix.lower():
        case ".gz":
            return gzip.open(file)  # type: ignore[return-value]
        case ".bz2":
            return bz2.open(file)
        case ".xz":
            return lzma.open(file)
        case ".zst":
            return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
        case _:
            return file.open("rb")


def json_lines(file: Path) -> Iterator[tuple[str, RawRow]]:
    """JSON lines: one object a line; blank lines are skipped.

    Args:
        file: The file.
    """
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not _blank(line):
                origin = f"{file}:{number}"
                yield origin, _parsed(line, origin)


def _blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def _parsed(line: bytes, origin: str) -> RawRow:
    """The JSON object of a line, or the error that describes it."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError(origin, "line", line[error.start : error.start + 8], "the line is not UTF-8")
    try:
        value = _JSON.decode(text)
    except _KeyTwice as error:
        remedy = "Only one of the two values would count; take the other out."
        return RowError(origin, "key", error.key, "a JSON object has this key twice", remedy)
    except (ValueError, RecursionError):  # ValueError: also of numbers with thousands of digits
        return RowError(origin, "line", text, "the line is not valid JSON")
    if not isinstance(value, dict):
        return RowError(origin, "line", text, "the line is not a JSON object")
    return value


def json_rows(file: Path, field: str | None = None) -> Iterator[tuple[str, RawRow]]:
    """JSON: a list of objects, an object with such a list in a field, or in truth JSON lines.

    Args:
        file: The file.
        field: The field of the object that holds the list.
    """
    if field is None and _is_json_lines(file):
        yield from json_lines(file)
        return
    with _opened(file) as opened:
        text = opened.read().decode("utf-8-sig").strip()
    if not text:
        return
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        if field is None and text[0] == "{":
            yield from json_lines(file)
            return
        raise SourceError(f"{file} is not valid JSON: {error}.") from error
    for number, item in enumerate(_items(value, file, field), start=1):
        origin = f"{file}:{number}"
        yield origin, item if isinstance(item, dict) else RowError(origin, "item", item, "it is not a JSON object")


def _is_json_lines(file: Path) -> bool:
    """Whether the first line that is not blank is a whole JSON object, and not one that holds the rows of the file."""
    with _opened(file) as lines:
        first, second = islice(chain((line for line in lines if not _blank(line)), (b"", b"")), 2)
    row = _parsed(first, "")
    return isinstance(row, dict) and (bool(second) or not any(map(_are_rows, row.values())))


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects, other than the messages of a conversation."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and "role" not in item for item in value)


def _items(value: Any, file: Path, field: str | None) -> list[Any]:
    """The list of rows in the JSON value of a file."""
    if isinstance(value, dict):
        if field is not None and isinstance(value.get(field), list):
            return value[field]
        lists = ", ".join(name for name, held in value.items() if isinstance(held, list)) or "none"
        what = "one JSON object" if field is None else f"one JSON object without a list in '{field}'"
        raise SourceError(f"{file} holds {what}. Set source.json_field to the field with the rows. Lists: {lists}.")
    if field is not None or not isinstance(value, list):
        expected = "a list of objects" if field is None else f"an object with a list in '{field}' (source.json_field)"
        raise SourceError(f"{file} holds a JSON {type(value).__name__}, not {expected}.")
    return value


def table_rows(file: Path, delimiter: str) -> Iterator[tuple[str, RawRow]]:
    """CSV with a header; columns of numbers and truth values are told from those of text.

    Args:
        file: The file.
        delimiter: What separates cells.
    """
    rows = _cells(file, delimiter)
    _, names = next(rows, (1, []))
    if "" in names or len(set(names)) < len(names):
        raise SourceError(f"The header of {file} must give every column a name of its own; it is: {', '.join(names)}.")
    scalars = _scalar_columns(file, delimiter, names)
    for number, cells in rows:
        origin = f"{file}:{number}"
        if len(cells) == len(names):
            yield origin, _typed(dict(zip(names, cells, strict=True)), scalars, origin)
        else:
            reason = f"the row has {len(cells)} cells, the header {len(names)}"
            remedy = "Quote cells that hold separators, quotes or newlines."
            yield origin, RowError(origin, "row", delimiter.join(cells), reason, remedy)


def _cells(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row that is not blank, as text, with the row's number."""
    csv.field_size_limit(2**31 - 1)  # by default 128 KiB, less than a long response
    with io.TextIOWrapper(_opened(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            yield from ((number, cells) for number, cells in enumerate(reader, start=1) if cells)
        except csv.Error as error:  # where this row ends, and the next begins, cannot be told
            raise SourceError(f"{file} cannot be read up to line {reader.line_num}: its quotes: {error}.") from error


def _scalar_columns(file: Path, delimiter: str, names: list[str]) -> set[str]:
    """The columns all of whose cells, but for empty ones, are numbers or truth values; found by a pass of its own."""
    scalars = dict(enumerate(names))
    rows = _cells(file, delimiter)
    next(rows, None)
    for _, cells in rows:
        if len(cells) == len(names):
            for index in [index for index in scalars if not _is_scalar(cells[index])]:
                del scalars[index]
        if not scalars:
            break
    return set(scalars.values())


def _is_scalar(cell: str) -> bool:
    return not cell or _SCALAR.fullmatch(cell.strip()) is not None


def _typed(row: dict[str, str], scalars: set[str], origin: str) -> RawRow:
    """The cells of a row with their types; an empty cell of numbers is None."""
    for name, cell in row.items():
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            value = cell[error.start : error.start + 8].encode(errors="surrogateescape")
            return RowError(origin, name, value, "the cell is not UTF-8")
    return {
        name: (json.loads(cell.strip().lower()) if cell else None) if name in scalars else cell
        for name, cell in row.items()
    }


def parquet_rows(file: Path) -> Iterator[tuple[str, RawRow]]:
    """Parquet.

    Args:
        file: The file.
    """
    with pq.ParquetFile(file, memory_map=True) as opened:
        yield from _numbered(opened.iter_batches(_BATCH), file)


def arrow_rows(file: Path) -> Iterator[tuple[str, RawRow]]:
    """Arrow's IPC formats, for streams and for files (Feather version 2), memory-mapped.

    Args:
        file: The file.
    """
    with pa.memory_map(str(file)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            opened = pa.ipc.open_file(source)
            yield from _numbered(map(opened.get_batch, range(opened.num_record_batches)), file)
        else:
            with pa.ipc.open_stream(source) as stream:
                yield from _numbered(stream, file)


def _numbered(batches: Iterable[pa.RecordBatch], file: Path) -> Iterator[tuple[str, RawRow]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for row in batch.slice(start, _BATCH).to_pylist():
                number += 1
                yield f"{file}:{number}", row


_TEXT: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".csv": partial(table_rows, delimiter=","),
    ".tsv": partial(table_rows, delimiter="\t"),
}
FORMATS: dict[str, Reader] = {**_TEXT, ".parquet": parquet_rows, ".arrow": arrow_rows, ".feather": arrow_rows}
"""What reads a file, by its suffix; those of text may be compressed."""
