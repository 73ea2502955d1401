"""Checked rows: a split of a source, read through its adapter once, kept on disk and memory-mapped."""

from __future__ import annotations

import hashlib
import inspect
import secrets
import shutil
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from bfpo_pl.component import Component, UserError
from bfpo_pl.data import formats
from bfpo_pl.data import rows as rows_module
from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.arrow import SHARD_ROWS, joined, read_manifest, read_shard, sole_builder, write_manifest, write_shard
from bfpo_pl.data.progress import telling
from bfpo_pl.data.rows import Message, Row, RowError
from bfpo_pl.data.sources import Source

_CHUNK = 256  # rows that are Python objects at once: more of them keep the garbage collector busy
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_COLUMNS = pa.map_(pa.string(), pa.list_(pa.float64()))
_SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(_MESSAGE)),
        ("responses", pa.list_(pa.string())),
        ("pairs", pa.list_(pa.int32())),
        ("columns", _COLUMNS),
        ("pair_columns", _COLUMNS),
        ("origin", pa.string()),
        ("raw_index", pa.int64()),
        ("prompt_hash", pa.uint64()),
        ("prompt_key", pa.uint64()),
        ("response_hashes", pa.list_(pa.uint64())),
    ]
)


@dataclass(frozen=True)
class Fault:
    """Why a row is not used, as plain data.

    Args:
        raw_index: Its number among the rows of the source.
        origin: Where it came from.
        field: The field at fault.
        value: Its value, abbreviated.
        reason: What is wrong; rows are counted by it.
        remedy: What to do about it.
    """

    raw_index: int
    origin: str
    field: str
    value: str
    reason: str
    remedy: str

    @classmethod
    def of(cls, error: RowError, raw_index: int) -> Fault:
        """What an error says of a row."""
        return cls(raw_index, error.origin, error.field, error.value, error.reason, error.remedy)


def check_rows(
    folder: Path, label: str, source: Source, split: str, adapter: Adapter, assume_safe: bool = False
) -> CheckedRows:
    """Reads a split through an adapter, or finds what was read before and has not changed.

    Args:
        folder: Where the rows of all sources are kept.
        label: What is read, for progress.
        source: Where raw rows come from.
        split: ``train`` or ``validation``.
        adapter: What reads them.
        assume_safe: Take responses without safety flags to be safe; flags that are there still must be valid.
    """

    def raw_rows() -> Iterator[Row | Fault]:
        return _adapted(source, split, adapter, assume_safe)

    known, code = source.fingerprint(split), _code(source, *_components(adapter))
    if known is None or code is None:
        return _read_anew(folder, label, raw_rows)
    # The source's own words are in the rows, as their origins.
    key = _digest([known, repr(source), split, repr(_state(adapter)), code, repr(assume_safe)])
    if read_manifest(folder / key) is not None:
        return CheckedRows(folder / key)
    with sole_builder(folder / key):
        if read_manifest(folder / key) is None:
            _write(folder / key, label, raw_rows())
    return CheckedRows(folder / key)


def _read_anew(folder: Path, label: str, raw_rows: Callable[[], Iterator[Row | Fault]]) -> CheckedRows:
    """Reads rows of which nothing tells whether they are the ones read before; equal ones share one place."""
    temporary = folder / f"reading-{secrets.token_hex(8)}"
    try:
        with sole_builder(temporary):
            digest = _write(temporary, label, raw_rows())
        with sole_builder(folder / digest):
            if read_manifest(folder / digest) is None:
                shutil.rmtree(folder / digest)
                temporary.replace(folder / digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.with_name(temporary.name + ".lock").unlink()
    return CheckedRows(folder / digest)


def _adapted(source: Source, split: str, adapter: Adapter, assume_safe: bool) -> Iterator[Row | Fault]:
    for index, (origin, raw) in enumerate(source.rows(split)):
        if isinstance(raw, RowError):
            yield Fault.of(raw, index)
            continue
        try:
            yield adapt(raw, origin, adapter, assume_safe)
        except RowError as error:
            yield Fault.of(error, index)
        except Exception as error:  # an adapter that does not expect such a row
            kind = type(adapter).__name__
            raise UserError(f"{origin}: {kind} fails on this row: {type(error).__name__}: {error}") from error


def adapt(raw: Any, origin: str, adapter: Adapter, assume_safe: bool) -> Row:
    """A raw row as an adapter reads it, with the flags that it lacks if all its responses are taken to be safe.

    Args:
        raw: The raw row.
        origin: Where it came from.
        adapter: What reads it.
        assume_safe: Take responses without safety flags to be safe.

    Raises:
        RowError: It cannot be used.
    """
    if not assume_safe:
        return adapter(raw, origin)
    lacking = {name: True for name in adapter.flag_fields if raw.get(name) is None}
    row = adapter({**raw, **lacking} if lacking else raw, origin)
    if "safe" in row.columns:
        return row
    return replace(row, columns={**row.columns, "safe": (1.0,) * len(row.responses)})


def _write(folder: Path, label: str, raw_rows: Iterator[Row | Fault]) -> str:
    """Writes the shards of a store; gives a digest of its rows."""
    digest, faults, count, number = hashlib.blake2b(digest_size=16), [], 0, 0
    for old in folder.glob("*.arrow"):
        old.unlink()
    numbered, waiting = enumerate(raw_rows), []
    with telling(f"checking {label}", None) as advance:
        while chunk := list(islice(numbered, _CHUNK)):
            faults += [asdict(item) for _, item in chunk if isinstance(item, Fault)]
            waiting.append(_batch([(index, item) for index, item in chunk if isinstance(item, Row)]))
            digest.update(waiting[-1].serialize())
            count = chunk[-1][0] + 1
            advance(len(chunk))
            if sum(map(len, waiting)) >= SHARD_ROWS:
                write_shard(folder / f"rows-{number:05d}.arrow", pa.concat_batches(waiting))
                waiting, number = [], number + 1
    if any(map(len, waiting)):
        write_shard(folder / f"rows-{number:05d}.arrow", pa.concat_batches(waiting))
    digest.update(str(faults).encode())
    write_manifest(folder, {"raw_rows": count, "faults": faults})
    return digest.hexdigest()


def _batch(items: list[tuple[int, Row]]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for index, row in items:
        columns["prompt"].append([{"role": turn.role, "content": turn.content} for turn in row.prompt])
        columns["responses"].append(row.responses)
        columns["pairs"].append([index for pair in row.pairs for index in pair])
        columns["columns"].append(list(row.columns.items()))
        columns["pair_columns"].append(list(row.pair_columns.items()))
        columns["origin"].append(row.origin)
        columns["raw_index"].append(index)
        # With lengths, since a text may hold any character.
        turns = [f"{turn.role}:{len(turn.content)}:{turn.content}" for turn in row.prompt]
        columns["prompt_hash"].append(text_hash("".join(turns)))
        columns["prompt_key"].append(text_hash(normalised(row.prompt)))
        columns["response_hashes"].append([text_hash(text) for text in row.responses])
    arrays = [pa.array(columns[field.name], type=field.type) for field in _SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def text_hash(text: str) -> int:
    """A 64-bit hash of a text, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def normalised(prompt: Sequence[Message]) -> str:
    """What two prompts have in common that differ in nothing but case, white space and forms of the same characters.

    System messages are left out.
    """
    turns = (unicodedata.normalize("NFKC", turn.content) for turn in prompt if turn.role != "system")
    return "\0".join(" ".join(text.casefold().split()) for text in turns)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _components(adapter: Adapter) -> Iterator[Component]:
    """An adapter and the components that it holds, such as another adapter that it wraps."""
    yield adapter
    for value in vars(adapter).values():
        if isinstance(value, Adapter):
            yield from _components(value)
        elif isinstance(value, Component):
            yield value


def _state(value: Any) -> Any:
    """All that a component holds, what its repr leaves out as well, as plain data."""
    if isinstance(value, Component):
        return [type(value).__qualname__, {name: _state(held) for name, held in sorted(vars(value).items())}]
    return value


def _code(*components: Component) -> str | None:
    """The source text that reads the rows; None if it cannot be had (an adapter typed into a notebook)."""
    mine = {rows_module.__file__, formats.__file__, __file__}
    parents = [parent for component in components for parent in type(component).__mro__]
    try:
        files = sorted(mine | {inspect.getfile(kind) for kind in parents if kind.__module__ not in ("builtins", "abc")})
        return _digest([Path(file).read_text(encoding="utf-8") for file in files])
    except (OSError, TypeError):
        return None


class CheckedRows:
    """Rows on disk, in the order of the source, and what is wrong with those that are not among them.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        assert manifest is not None, folder
        self.raw_rows: int = manifest["raw_rows"]
        """Rows of the source, good and bad."""
        self.faults = [Fault(**fault) for fault in manifest["faults"]]
        """What is wrong with the bad ones, in order."""
        self._names = [name for name in sorted(manifest["files"]) if name.startswith("rows-")]
        self.offsets = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._offsets: list[int] = self.offsets.tolist()  # many times faster to look a single index up in

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedRows, (self.folder,)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def _shards(self) -> list[pa.RecordBatch]:
        return [read_shard(self.folder / name) for name in self._names]

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        number = bisect_right(self._offsets, index) - 1
        return self._shards[number], index - self._offsets[number]

    def origin(self, index: int) -> str:
        """Where a row came from."""
        shard, place = self._place(index)
        return shard.column("origin")[place].as_py()

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[Row]:
        """Rows by index.

        Args:
            indices: Their indices, in ascending order.
        """
        wanted, found = np.asarray(indices), []
        for number, shard in enumerate(self._shards):
            low, high = np.searchsorted(wanted, self.offsets[number : number + 2])
            if low < high:
                taken = shard.take(pa.array(wanted[low:high] - self.offsets[number]))
                found += _rows(taken)
        return found

    def numbers(self, column: str) -> np.ndarray:
        """A column of one number a row: ``raw_index``, ``prompt_hash`` or ``prompt_key``."""
        return joined([shard.column(column).to_numpy() for shard in self._shards], np.uint64)

    def flat(self, column: str) -> np.ndarray:
        """All numbers of a column of lists: ``pairs`` or ``response_hashes``."""
        return joined([shard.column(column).flatten().to_numpy() for shard in self._shards], np.int32)

    def counts(self, column: str) -> np.ndarray:
        """How many items a column of lists has in each row."""
        return joined([shard.column(column).value_lengths().to_numpy() for shard in self._shards], np.int32)

    def tables(self, column: str, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of every named column, one after the other over all rows; NaN where a row lacks the column.

        Args:
            column: ``columns`` or ``pair_columns``.
            sizes: How many numbers each row has.
        """
        first = np.concatenate([[0], np.cumsum(sizes)])
        tables: dict[str, np.ndarray] = {}
        for number, shard in enumerate(self._shards):
            low, high = self.offsets[number], self.offsets[number + 1]
            own, entries = sizes[low:high], shard.column(column)
            keys = entries.keys.to_numpy(zero_copy_only=False)
            owner = np.repeat(np.arange(high - low), np.diff(entries.offsets.to_numpy()))
            for name in sorted(set(keys.tolist())):
                mask = keys == name
                values = entries.items.filter(pa.array(mask)).flatten().to_numpy()
                has = np.zeros(high - low, dtype=bool)
                has[owner[mask]] = True
                table = tables.setdefault(name, np.full(first[-1], np.nan))
                table[first[low] : first[high]][np.repeat(has, own)] = values
        return tables


def _rows(batch: pa.RecordBatch) -> list[Row]:
    turns = batch.column("prompt").flatten()
    roles, contents = (part.to_pylist() for part in turns.flatten())
    messages = iter([Message(role, content) for role, content in zip(roles, contents, strict=True)])
    counts = batch.column("prompt").value_lengths().to_pylist()
    names = ("responses", "pairs", "columns", "pair_columns", "origin")
    return [
        Row(
            prompt=tuple(islice(messages, count)),
            responses=tuple(responses),
            pairs=tuple(zip(pairs[::2], pairs[1::2], strict=True)),
            columns={name: tuple(values) for name, values in columns},
            pair_columns={name: tuple(values) for name, values in pair_columns},
            origin=origin,
        )
        for count, responses, pairs, columns, pair_columns, origin in zip(
            counts, *(batch.column(name).to_pylist() for name in names), strict=True
        )
    ]
