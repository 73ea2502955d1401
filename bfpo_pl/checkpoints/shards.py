"""Reads sharded checkpoints as plain data: torch's own reader unpickles ``.metadata``, and what is no tensor, as code.

``torch.distributed.checkpoint`` (2.13) reads a folder's ``.metadata`` with ``pickle.load`` and what is no tensor with
``torch.load(weights_only=False)``: a folder from elsewhere could run anything. Here the first may name nothing but the
classes that describe a checkpoint, and the second nothing but plain data.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.default_planner import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from bfpo_pl.component import UserError

METADATA = ".metadata"
"""The file in which torch.distributed.checkpoint lists tensors and where they lie."""
META = "meta.pt"
"""The file in which Lightning keeps what is neither weights nor optimizer state."""

_DESCRIBING = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}
"""All that the metadata of a checkpoint is made of, by module."""


class ForeignCodeError(pickle.UnpicklingError):
    """A checkpoint that would run code, or read files elsewhere, if it were loaded."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds nothing but what describes a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIBING.get(module, ()):
            raise ForeignCodeError(f"its {METADATA} names {module}.{name}")
        return getattr(importlib.import_module(module), name)


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder with a shard of each process."""
    return path.is_dir() and ((path / METADATA).exists() or (path / META).exists())


def read_metadata(folder: str | Path) -> Metadata:
    """What a sharded checkpoint holds: names, shapes, types and places of its tensors.

    Args:
        folder: The checkpoint.

    Raises:
        ForeignCodeError: The file would run code, or points to files elsewhere.
        UserError: It is torn, or describes no checkpoint.
        OSError: There is no such file.
    """
    return _unpickled(Path(folder) / METADATA)


def _unpickled(file: Path) -> Metadata:
    try:
        metadata = _PlainUnpickler(io.BytesIO(file.read_bytes())).load()
        described = isinstance(metadata, Metadata) and isinstance(metadata.storage_data, dict)
    except (ForeignCodeError, OSError):
        raise
    except Exception as error:  # whatever damaged bytes make of an unpickler
        raise UserError(f"The checkpoint {file.parent} is damaged: its {METADATA} cannot be read ({error}).") from error
    if not described:
        raise UserError(f"The checkpoint {file.parent} is damaged: its {METADATA} describes no checkpoint.")
    for info in metadata.storage_data.values():
        if Path(str(info.relative_path)).name != str(info.relative_path):
            raise ForeignCodeError(f"it points out of its folder, to {info.relative_path}")
    return metadata


def first_failure(gathered: CheckpointException) -> tuple[int, BaseException]:
    """Of the errors that torch gathered from all processes, the first, and whose it is."""
    return next((rank, error) for rank, (error, _) in sorted(gathered.failures.items()))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what torch.distributed.checkpoint raises, which is no `Exception`, into an error that is one.

    Raises:
        pickle.UnpicklingError: Something would run code.
        RuntimeError: Something could not be read; the message says what, and on which process.
    """
    try:
        yield
    except CheckpointException as gathered:
        rank, first = first_failure(gathered)
        if isinstance(first, pickle.UnpicklingError | UserError):
            raise first from gathered
        raise RuntimeError(f"{type(first).__name__} on process {rank}: {first}") from gathered


def _read_metadata(reader: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    metadata = _unpickled(Path(reader._get_metadata_path(kwargs.get("rank"))))
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def _load_bytes(planner: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], loaded)
    else:
        planner.state_dict[name] = loaded


class PlainReader(FileSystemReader):
    """Reads a folder whose ``.metadata`` names nothing but what a checkpoint needs."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_metadata(self, *args, **kwargs)


class PlainPlanner(DefaultLoadPlanner):
    """Loads values that are no tensors only if they are plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        _load_bytes(self, read_item, value)


def read_tensors(folder: str | Path, wanted: Mapping[str, Tensor]) -> None:
    """Fills tensors from a sharded checkpoint, in this process alone; nothing else of the checkpoint is read.

    Args:
        folder: The checkpoint.
        wanted: Tensors on the CPU by their names in the checkpoint, of the saved shapes.

    Raises:
        UserError: It is damaged, or another model's.
    """
    try:
        with plain_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.distributed is disabled.*")
            dcp.load(dict(wanted), storage_reader=PlainReader(folder), planner=PlainPlanner(), no_dist=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"The checkpoint {folder} is damaged, or another model's: {why}") from error


def tensors_described(metadata: Metadata, prefix: str) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint whose names begin with a prefix, without it.

    Args:
        metadata: What `read_metadata` gives.
        prefix: The prefix.
    """
    return {
        name.removeprefix(prefix): described
        for name, described in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(described, TensorStorageMetadata)
    }


_PATCHING = threading.RLock()


@contextlib.contextmanager
def plain_sharded_reads() -> Iterator[None]:
    """Makes every sharded read of this process one of plain data meanwhile: for strategies that are Lightning's own."""
    with _PATCHING:
        reading, loading = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
        FileSystemReader.read_metadata = _read_metadata  # type: ignore[assignment,method-assign]
        DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[assignment,method-assign]
        try:
            with plain_errors():
                yield
        finally:
            FileSystemReader.read_metadata = reading  # type: ignore[method-assign]
            DefaultLoadPlanner.load_bytes = loading  # type: ignore[method-assign]
