"""Whether a checkpoint is complete, and what is wrong if not; without reading its weights."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from bfpo_pl.checkpoints.manifest import (
    WHOLE,
    DamageError,
    FileRecord,
    Manifest,
    archive_record,
    archive_size,
    file_record,
    read_manifest,
)
from bfpo_pl.checkpoints.shards import META, METADATA, read_metadata
from bfpo_pl.checkpoints.space import shown
from bfpo_pl.component import UserError

_STEP = re.compile(r"step=(\d+)")


def problem(path: Path, verify: bool = False) -> str | None:
    """Why a checkpoint cannot be loaded; None if nothing is wrong with it.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        verify: Whether to read all of it and compare hashes, too; sizes always are.

    Returns:
        The end of a sentence that names the checkpoint.

    Raises:
        ForeignCodeError: It would run code if it were read.
    """
    try:
        if not path.exists():
            return "it is not there"
        if path.is_dir():
            _check_folder(path, verify)
        else:
            _check_file(path, verify)
    except DamageError as damage:
        return str(damage)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def checkpoint_step(path: Path) -> int | None:
    """The optimizer step of a checkpoint, without loading weights; None if it cannot be told.

    From its manifest, else from its name, else from within.
    """
    try:
        if manifest := read_manifest(path):
            return manifest.step
    except (DamageError, OSError):
        pass
    if found := _STEP.search(path.name):
        return int(found[1])
    try:
        inside: dict[str, Any] = torch.load(
            path / META if path.is_dir() else path, map_location="cpu", mmap=True, weights_only=True
        )
        return int(inside["global_step"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        return None


def _check_file(path: Path, verify: bool) -> None:
    manifest = read_manifest(path)
    if manifest is None:
        _check_archive(path, verify)
        return
    record = manifest.files.get(WHOLE)
    if record is None:
        raise DamageError("its manifest is another checkpoint's")
    own = archive_size(path)
    if own != record.size:
        raise DamageError(f"its size is {_differ(own, record.size)}")
    if verify and archive_record(path) != record:
        raise DamageError("its contents are not what was written: the hash differs")


def _check_folder(path: Path, verify: bool) -> None:
    manifest = read_manifest(path)
    names = [METADATA, META] + ([] if manifest is None else sorted(manifest.files))
    for name in names:
        if not (path / name).is_file():
            raise DamageError(f"its file {name} is missing")
    if manifest is not None:
        _check_files(path, manifest, verify)
    try:
        metadata = read_metadata(path)
    except UserError as error:
        raise DamageError(f"its file {METADATA} cannot be read") from error
    if manifest is None:
        _check_shards(path, metadata.storage_data)
        _check_archive(path / META, verify)


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    for name, record in manifest.files.items():
        size = (path / name).stat().st_size
        if size != record.size:
            raise DamageError(f"the size of its file {name} is {_differ(size, record.size)}")
        if verify and file_record(path / name) != FileRecord(record.size, record.xxh3_128):
            raise DamageError(f"the contents of its file {name} are not what was written: the hash differs")


def _differ(size: int, expected: int) -> str:
    """Two sizes that differ, in bytes where they would look the same."""
    if shown(size) == shown(expected):
        return f"{size:,} bytes and should be {expected:,}"
    return f"{shown(size)} and should be {shown(expected)}"


def _check_shards(path: Path, storage: dict[Any, Any]) -> None:
    """That the shards of a folder without a manifest are as long as its metadata says."""
    ends: dict[str, int] = {}
    for entry in storage.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, end in ends.items():
        if not (path / name).is_file():
            raise DamageError(f"its file {name} is missing")
        if (path / name).stat().st_size < end:
            raise DamageError(f"its file {name} is shorter than {shown(end)}")


def _check_archive(path: Path, verify: bool) -> None:
    """That a zip archive without a manifest has all its entries; with ``verify``, by its own checksums, unharmed."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() if verify else None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DamageError(f"it is no complete archive ({error})") from error
    if bad:
        raise DamageError(f"its entry {bad} is not what was written: the checksum differs")
