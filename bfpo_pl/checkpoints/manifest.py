"""What a checkpoint says of itself: its step, and size and hash of every file.

Of a sharded checkpoint it is ``manifest.json`` in its folder. Of a single file it is the comment at the end of the zip
archive that `torch.save` writes: one file, so that no kill, copy or upload can part the two. ``unzip -z`` shows it.

The hash is XXH3 with 128 bits: it finds damage at the speed of memory. It is no proof against someone who means harm;
neither would SHA-256 be beside the file that it is of.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from xxhash import xxh3_128

from bfpo_pl.runs import package_version

FORMAT = 1
"""Version of what a manifest holds."""
MANIFEST = "manifest.json"
"""Its name in the folder of a sharded checkpoint."""
WHOLE = "."
"""The name under which the manifest of a single file lists it."""

_PACKAGES = ("bfpo_pl", "torch", "lightning", "transformers", "peft")
_END = b"PK\x05\x06"  # the record that ends a zip archive, 22 bytes and a comment
_END_SIZE = 22
_LONGEST_COMMENT = 0xFFFF
_CHUNK = 16 * 2**20


class DamageError(Exception):
    """Why a checkpoint is not complete; the message ends a sentence that names it."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes, and hash, of a file."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Args:
        step: Optimizer step at which it was saved.
        epoch: Epoch at which it was saved.
        processes: Processes that saved it.
        files: Every file by name; of a single file the record is of what `torch.save` wrote, without this manifest.
        versions: Versions of the packages that wrote it.
        written: When.
        format: Version of this layout.
    """

    step: int
    epoch: int
    processes: int
    files: dict[str, FileRecord]
    versions: dict[str, str] = field(default_factory=dict)
    written: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps({"bfpo_checkpoint": asdict(self)}, indent=1)

    @staticmethod
    def of(checkpoint: dict[str, Any], processes: int, files: dict[str, FileRecord]) -> Manifest:
        """The manifest of a checkpoint that is being saved."""
        return Manifest(
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            processes=processes,
            files=files,
            versions={name: found for name in _PACKAGES if (found := package_version(name))},
            written=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Reads a manifest.

        Raises:
            DamageError: The text is none.
        """
        try:
            values = json.loads(text)["bfpo_checkpoint"]
            if values["format"] > FORMAT:
                raise DamageError(f"its manifest has format {values['format']}, and this bfpo_pl reads {FORMAT}")
            files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
            return Manifest(files=files, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamageError("its manifest cannot be read") from error


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint; None if an older version wrote it without one.

    Raises:
        DamageError: There is one that cannot be read, or a file has no end.
        OSError: Nothing can be read.
    """
    if path.is_dir():
        file = path / MANIFEST
        return Manifest.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    comment = _comment(path)
    return Manifest.from_json(comment.decode()) if b'"bfpo_checkpoint"' in comment[:32] else None


def append_manifest(file: IO[bytes], manifest: Manifest) -> None:
    """Writes a manifest as the comment of a zip archive that ends without one.

    Args:
        file: The archive, opened for reading and writing.
        manifest: Its manifest.
    """
    comment = manifest.to_json().encode()
    file.seek(-_END_SIZE, 2)
    end = file.read(_END_SIZE)
    if end[:4] != _END or end[-2:] != b"\0\0" or len(comment) > _LONGEST_COMMENT:  # pragma: no cover - a future torch
        raise RuntimeError("This version of torch.save ends a file in a way that bfpo_pl does not know.")
    file.seek(-2, 2)
    file.write(struct.pack("<H", len(comment)) + comment)


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    digest, size = xxh3_128(), 0
    for chunk in _chunks(path, path.stat().st_size):
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def archive_size(path: Path) -> int:
    """Size of a zip archive as it was before it got its comment."""
    return path.stat().st_size - len(_comment(path))


def archive_record(path: Path) -> FileRecord:
    """Size and hash of a zip archive as it was before it got its comment."""
    size = archive_size(path)
    digest = xxh3_128()
    for chunk in _chunks(path, size - 2):
        digest.update(chunk)
    digest.update(b"\0\0")  # the length of a comment that was not there
    return FileRecord(size, digest.hexdigest())


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(_CHUNK, size))):
            size -= len(chunk)
            yield chunk


def _comment(path: Path) -> bytes:
    """The comment at the end of a zip archive.

    Raises:
        DamageError: The file is no whole archive.
    """
    size = path.stat().st_size
    if size == 0:
        raise DamageError("it is empty")
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - _END_SIZE - _LONGEST_COMMENT))
        tail = file.read()
    if start[:2] != b"PK":
        raise DamageError(
            "it is not what torch.save writes, a zip archive; no other pickle is read, since that can run code"
        )
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_SIZE:
        raise DamageError("its end is missing")
    comment = tail[at + _END_SIZE :]
    if struct.unpack("<H", tail[at + _END_SIZE - 2 : at + _END_SIZE])[0] != len(comment):
        raise DamageError("its end is missing")
    return comment
