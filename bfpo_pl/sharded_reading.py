"""Reads sharded checkpoints as plain data: torch's own reader unpickles ``.metadata``, and what is no tensor, as code.

``torch.distributed.checkpoint`` (2.13) reads a folder's ``.metadata`` with ``pickle.load`` and what is no tensor with
``torch.load(weights_only=False)``: a folder from elsewhere could run anything. Here the first may name nothing but the
classes that describe a checkpoint, and the second nothing but plain data.
"""

from __future__ import annotations

import importlib
import io
import pickle
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
"""The file that makes a folder a sharded checkpoint."""

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
    except ForeignCodeError:
        raise
    except Exception as error:  # whatever damaged bytes make of an unpickler
        raise UserError(f"The checkpoint {file.parent} is damaged: its {METADATA} cannot be read ({error}).") from error
    if not described:
        raise UserError(f"The checkpoint {file.parent} is damaged: its {METADATA} describes no checkpoint.")
    for info in metadata.storage_data.values():
        if Path(str(info.relative_path)).name != str(info.relative_path):
            raise ForeignCodeError(f"it points out of its folder, to {info.relative_path}")
    return metadata


def read_tensors(folder: str | Path, wanted: Mapping[str, Tensor]) -> None:
    """Fills tensors from a sharded checkpoint, in this process alone; nothing else of the checkpoint is read.

    Args:
        folder: The checkpoint.
        wanted: Tensors on the CPU by their names in the checkpoint, of the saved shapes.
    """
    with plain_sharded_reads(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled.*")
        dcp.load(dict(wanted), storage_reader=FileSystemReader(folder), no_dist=True)


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


_PATCHING = threading.RLock()


@contextmanager
def plain_sharded_reads() -> Iterator[None]:
    """Makes every sharded read of this process one of plain data meanwhile, Lightning's among them."""
    with _PATCHING:
        reading, loading = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
        FileSystemReader.read_metadata = _read_metadata  # type: ignore[assignment,method-assign]
        DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[assignment,method-assign]
        try:
            yield
        except CheckpointException as error:  # not an Exception: commands would not see it as a mistake
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, pickle.UnpicklingError | UserError):
                raise cause from error
            why = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            raise UserError(f"The sharded checkpoint is damaged, or another model's: {why}") from error
        finally:
            FileSystemReader.read_metadata = reading  # type: ignore[method-assign]
            DefaultLoadPlanner.load_bytes = loading  # type: ignore[method-assign]
