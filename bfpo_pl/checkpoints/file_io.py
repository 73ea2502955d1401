"""Checkpoints in one file: the plugin through which Lightning writes and reads them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from xxhash import xxh3_128

from bfpo_pl.checkpoints.atomic import discard, part_of, publish
from bfpo_pl.checkpoints.consolidate import consolidated
from bfpo_pl.checkpoints.manifest import WHOLE, FileRecord, Manifest, append_manifest
from bfpo_pl.checkpoints.space import check_space, save_error, tensor_bytes
from bfpo_pl.component import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint to a temporary name beside its own, syncs it, and renames it.

    Lightning's own serializes into memory first, and moves the file from the system's temporary folder, which is no
    single step if that is another disk. Reads folders that FSDP2 wrote as well, whole. Addresses with ``://`` are left
    to Lightning's.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint, on every process the one that process 0 names."""
        path = _of_rank_zero(path)
        with reading(path):
            if not _is_remote(path) and Path(path).is_dir():
                return consolidated(Path(path))
            return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        if _is_remote(path):
            super().remove_checkpoint(path)
        else:
            discard(Path(path))


class _Hashing:
    """A stream that hashes what passes, and remembers why it could not be written.

    torch's writer turns an error of the operating system into one of its own that does not tell the cause.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = xxh3_128()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
                raise
            self.digest.update(data)
            self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: the writer flushes once, at the end."""

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.size, self.digest.hexdigest())


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint to one file, with its manifest, in one step.

    Args:
        checkpoint: Plain data and tensors.
        path: Its file.

    Raises:
        SaveError: It could not be written, for lack of room or otherwise. What was there before is as it was.
    """
    needed = tensor_bytes(checkpoint)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        check_space(path, needed)
        _write(checkpoint, part)
        publish(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise save_error(path, needed, error) from error
        raise


def _write(checkpoint: dict[str, Any], part: Path) -> None:
    with part.open("w+b") as file:
        stream = _Hashing(file)
        try:
            torch.save(checkpoint, stream)  # type: ignore[arg-type]
        except Exception as error:
            raise stream.error or error from None
        append_manifest(file, Manifest.of(checkpoint, 1, {WHOLE: stream.record}))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def reading(path: Any) -> Iterator[None]:
    """Names the checkpoint in errors that say only that something in it cannot be read.

    Raises:
        UserError: Something cannot be read.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}. "
            f"`bfpo checkpoints {Path(path).parent} --verify` looks through all that are there."
        ) from error


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def _of_rank_zero(path: Any) -> Any:
    """The path that process 0 was given: which checkpoint is the newest is not for each process to say."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return path
    paths = [path]
    torch.distributed.broadcast_object_list(paths, src=0)
    return paths[0]
