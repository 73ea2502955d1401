"""Arrow files on disk: written whole or not at all, memory-mapped when read, shared by whoever starts at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn

from bfpo_pl.component import RunError

CACHE_VARIABLE = "BFPO_CACHE"
"""Environment variable that names the folder of prepared data."""
SHARD_ROWS = 8192
"""Rows in one file of a store."""
_MANIFEST = "manifest.json"


def default_cache() -> Path:
    """The folder of prepared data: ``$BFPO_CACHE``, or ``bfpo_pl`` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bfpo_pl"


def write_shard(path: Path, batch: pa.RecordBatch) -> None:
    """Writes a record batch as one Arrow stream file; whoever sees the name sees the whole file.

    Args:
        path: The file.
        batch: Its rows; the schema's metadata is kept.
    """

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)

    write_whole(path, write)


def read_shard(path: Path) -> pa.RecordBatch:
    """The rows of a shard, memory-mapped: pages come from the file when they are looked at.

    Args:
        path: The file.
    """
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        return reader.read_next_batch()


def joined(parts: list[np.ndarray], dtype: Any = np.int32) -> np.ndarray:
    """The arrays of all shards, one after the other.

    Args:
        parts: Those of each shard.
        dtype: Type of the result if there is no shard.
    """
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Declares a store complete.

    Args:
        folder: The store.
        manifest: What is known about it, as plain data; the sizes of its files are added.
    """
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.arrow"))}
    text = json.dumps({**manifest, "files": files})
    write_whole(folder / _MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None if the store is not complete or a file of it is not as it was.

    Args:
        folder: The store.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return None if "files" not in manifest or _damaged(folder, manifest) else manifest


def _damaged(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """Files that are not there, or not as large as they were."""
    paths = {folder / name: size for name, size in manifest["files"].items()}
    return [path for path, size in paths.items() if not path.is_file() or path.stat().st_size != size]


@contextmanager
def sole_builder(folder: Path) -> Iterator[None]:
    """Lets one process of all that share the disk build a store; the others wait.

    Args:
        folder: The store; it is made, and what is torn in it is removed.

    Raises:
        RunError: The folder cannot be written.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(folder.name + ".lock"))
        lock.acquire()
    try:
        _remove_torn(folder)
        yield
    finally:
        lock.release()


def _remove_torn(folder: Path) -> None:
    """Removes what an interrupted write left, and files that were damaged after they were complete."""
    for left in folder.glob("*.tmp-*"):
        left.unlink()
    path = folder / _MANIFEST
    if path.is_file() and read_manifest(folder) is None:
        with suppress(json.JSONDecodeError, KeyError):
            for damaged in _damaged(folder, json.loads(path.read_text(encoding="utf-8"))):
                rank_zero_warn(f"{damaged} is damaged or gone; it is made again.")
                damaged.unlink(missing_ok=True)
        path.unlink()


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Says what to do when a folder cannot be written."""
    try:
        yield
    except OSError as error:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        raise RunError(
            f"Prepared data cannot be written to {folder}: {error.strerror or error} ({free:.1f} GiB free there). Set "
            f"data.cache to a folder with room, or the environment variable {CACHE_VARIABLE}."
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that whoever sees its name sees the whole of it; makes its folder.

    Args:
        path: The file.
        write: Writes it, under another name.

    Raises:
        RunError: The folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with _writable(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
