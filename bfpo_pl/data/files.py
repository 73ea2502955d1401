"""Local files of rows: named one by one, by folder or by pattern, in any mixture of formats."""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bfpo_pl.component import UserError
from bfpo_pl.data.formats import ERRORS, FORMATS, Reader, format_of, json_rows
from bfpo_pl.data.sources import RawRow, Source, SourceError, is_saved, load_saved, rows_of


class LocalFiles(Source):
    """Local files: JSON lines, JSON, CSV, TSV, Parquet, Arrow, Feather; text formats compressed or not.

    The suffix tells the format: ``.jsonl`` ``.ndjson`` ``.json`` ``.csv`` ``.tsv`` ``.parquet`` ``.arrow``
    ``.feather``, those of text followed by ``.gz``, ``.bz2``, ``.xz`` or ``.zst`` where they are compressed. CSV and
    TSV begin with a row of names; a column whose cells are all numbers or true/false is read as such, any other as
    text. Files are read as a stream and may be larger than the memory, but for JSON that is one list or object.

    Args:
        path: Training rows: a file, a folder (all files of these formats in it, not in folders below; or one that
            ``save_to_disk`` of `datasets` wrote), or a pattern with ``*``, ``?`` and ``**``; or a list of these. Files
            of a folder or a pattern are read in the order of their names.
        validation_path: Validation rows, named in the same ways; null for none.
        json_field: Where a ``.json`` file holds one object: the field with the list of rows.
    """

    def __init__(
        self, path: str | list[str], validation_path: str | list[str] | None = None, json_field: str | None = None
    ) -> None:
        self.path, self.validation_path, self.json_field = path, validation_path, json_field
        for name in ("path", "validation_path"):
            if getattr(self, name) in ("", []):
                raise UserError(f"LocalFiles: {name} names no file.")

    def has_split(self, split: str) -> bool:
        return self._given(split) is not None

    def rows(self, split: str) -> Iterator[tuple[str, RawRow]]:
        for place in self._places(split):
            if place.is_dir():
                for number, row in enumerate(rows_of(self._saved(place, split)), start=1):
                    yield f"{place}:{number}", row
            else:
                yield from self._rows_of_file(place)

    def fingerprint(self, split: str) -> str | None:
        """A digest of the names of the files, without the folders they are in, and of their bytes.

        Args:
            split: ``train`` or ``validation``.
        """
        digest = hashlib.blake2b(f"{split} {self.json_field!r}".encode(), digest_size=20)
        for place in self._places(split):
            for file in _saved_files(place) if place.is_dir() else [place]:
                try:
                    with file.open("rb") as opened:
                        content = hashlib.file_digest(opened, "blake2b").hexdigest()
                except OSError as error:
                    raise _unreadable(file, error) from error
                digest.update(f"\n{file.name!r} {content}".encode())
        return digest.hexdigest()

    def _given(self, split: str) -> list[str] | None:
        given = {"train": self.path, "validation": self.validation_path}.get(split)
        return [given] if isinstance(given, str) else given

    def _places(self, split: str) -> list[Path]:
        """The files, and the folders that `datasets` saved, of a split, in order.

        Raises:
            SourceError: One is not there, or is of no known format, or is named twice.
        """
        given = self._given(split)
        if given is None:
            raise SourceError(f"{self.describe()} has no {split} split. Set source.validation_path.")
        places = [place for text in given for place in _places_of(text)]
        for place in places:
            if not place.is_dir() and format_of(place) is None:
                raise SourceError(f"LocalFiles cannot tell the format of {place} by its suffix. Known: {_known()}.")
        for place, count in Counter(place.resolve() for place in places).items():
            if count > 1:
                raise SourceError(f"LocalFiles: {place} is named {count} times; its rows would be read as often.")
        return places

    def _rows_of_file(self, file: Path) -> Iterator[tuple[str, RawRow]]:
        try:
            yield from self._reader(file)(file)
        except SourceError:
            raise
        except ERRORS as error:
            raise _unreadable(file, error) from error

    def _reader(self, file: Path) -> Reader:
        suffix = format_of(file) or ""
        return partial(json_rows, field=self.json_field) if suffix == ".json" else FORMATS[suffix]

    @staticmethod
    def _saved(folder: Path, split: str) -> Any:
        argument = "source.path" if split == "train" else "source.validation_path"
        return load_saved(folder, split, f"{argument} to one of its folders, for instance {folder / 'test'}")


def _places_of(text: str) -> list[Path]:
    """What one path, folder or pattern stands for."""
    path = Path(text).expanduser()
    if path.is_dir():
        return [path] if is_saved(path) else _files_in(path)
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if not Path(name).is_dir())
    if not found:
        what = f"no file matches {path}" if glob.has_magic(str(path)) else f"there is no file {path}"
        raise SourceError(f"LocalFiles: {what} (looked from {Path.cwd()}).")
    return found


def _files_in(folder: Path) -> list[Path]:
    """The files of known formats in a folder, by name; hidden ones and folders left out."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    found = [entry for entry in entries if format_of(entry) is not None]
    if not found:
        names = ", ".join(entry.name for entry in entries[:10]) + (", …" if len(entries) > 10 else "")
        raise SourceError(
            f"LocalFiles: the folder {folder} has no file of a known format ({_known()}); it has: "
            f"{names or 'no file'}. Files in folders below are found by {folder}/**/*.jsonl, for instance."
        )
    return found


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved dataset, without those that `datasets` adds when it is used."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(("cache-", ".")))


def _known() -> str:
    return " ".join(FORMATS) + "; text also with .gz .bz2 .xz .zst"


def _unreadable(file: Path, error: Exception) -> SourceError:
    return SourceError(f"LocalFiles cannot read {file}: {type(error).__name__}: {error}")
