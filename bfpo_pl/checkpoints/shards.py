"""Reading sharded checkpoints without running code from them.

torch.distributed.checkpoint unpickles a folder's ``.metadata``, and every value in it that is not a tensor, without
`weights_only`; so whoever can write a checkpoint could run code where it is read.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"
"""The file in which torch.distributed.checkpoint lists tensors and where they lie."""
META = "meta.pt"
"""The file in which Lightning keeps what is neither weights nor optimizer state."""

_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder with a shard of each process."""
    return path.is_dir() and ((path / METADATA).exists() or (path / META).exists())


def read_metadata(path: Path) -> Metadata:
    """Which tensors a sharded checkpoint holds, and where.

    Args:
        path: Its folder.

    Raises:
        pickle.UnpicklingError: It would run code, or is damaged.
    """
    with (path / METADATA).open("rb") as file:
        found = _MetadataUnpickler(file).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"{METADATA} holds no metadata")
    return found


def first_failure(gathered: CheckpointException) -> tuple[int, BaseException]:
    """Of the errors that torch gathered from all processes, the first, and whose it is."""
    return next((rank, error) for rank, (error, _) in sorted(gathered.failures.items()))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what torch.distributed.checkpoint raises, which is no `Exception`, into an error that is one.

    Raises:
        RuntimeError: Something could not be read; the message says what, and on which process.
    """
    try:
        yield
    except CheckpointException as gathered:
        rank, first = first_failure(gathered)
        raise RuntimeError(f"{type(first).__name__} on process {rank}: {first}") from gathered


class PlainReader(FileSystemReader):
    """Reads a folder whose ``.metadata`` names nothing but what a checkpoint needs."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        read_metadata(Path(self.path))
        return super().read_metadata(*args, **kwargs)


class PlainPlanner(DefaultLoadPlanner):
    """Loads values that are no tensors only if they are plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(io.BytesIO(value.getvalue()), weights_only=True)
        super().load_bytes(read_item, value)
