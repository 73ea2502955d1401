"""Files and folders that appear under their name complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

PART = ".part"
"""Ends the name of what is still being written, or is being deleted. Nothing ever reads it."""
ASIDE = ".old"
"""Ends the name of a folder for the moment in which a newer one of the same name takes its place."""

_POINTER = "checkpoint: "


def part_of(path: Path) -> Path:
    """The temporary name of a file or folder; beside it, since only then a rename is atomic."""
    return path.with_name(path.name + PART)


def sync_file(path: Path) -> None:
    """Waits until a file's contents are on the disk, not only in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Waits until a folder's names are on the disk, without which a rename may be undone by a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def publish(part: Path, path: Path) -> None:
    """Gives what was written and synced its name.

    A file of that name is replaced in one step. A folder cannot be: it steps aside first, and `recover` brings it back
    if the process ends in between.
    """
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(path.name + ASIDE)
        remove(aside)
        path.rename(aside)
        part.rename(path)
        sync_folder(path.parent)
        discard(aside)
    else:
        if part.is_dir():
            path.unlink(missing_ok=True)  # a folder does not replace a file, nor a link
        os.replace(part, path)
        sync_folder(path.parent)


def discard(path: Path) -> None:
    """Deletes a file or folder; a folder is never seen under its name with a part of its files."""
    if path.is_dir() and not path.is_symlink():
        part = part_of(path)
        remove(part)
        path.rename(part)
        path = part
    remove(path)


def remove(path: Path) -> None:
    """Deletes a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(folder: Path, pattern: str) -> None:
    """Tidies up after a process that was killed while it wrote or deleted.

    Args:
        folder: Where it wrote; no other process may be writing there.
        pattern: Glob of the names that it gives.
    """
    for part in folder.glob(pattern + PART):
        remove(part)
    for aside in folder.glob(pattern + ASIDE):
        path = aside.with_name(aside.name.removesuffix(ASIDE))
        if path.exists():
            discard(aside)
        else:
            aside.rename(path)


def write_text(path: Path, text: str) -> None:
    """Writes a small file in one step."""
    part = part_of(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def point(link: Path, target: Path) -> None:
    """Makes ``link`` lead to a file or folder beside it, in one step.

    A relative symbolic link, so that a run folder can be moved. Where the file system has none (some mounted object
    stores), a file of one line, which `follow` understands.
    """
    part = part_of(link)
    remove(part)
    try:
        part.symlink_to(target.name)
    except (OSError, NotImplementedError):
        write_text(link, f"{_POINTER}{target.name}\n")
        return
    publish(part, link)


def follow(path: Path) -> Path:
    """Where a link or a pointer file leads, whether or not there is something; any other path itself."""
    if path.is_symlink():
        return path.parent / os.readlink(path)
    if path.is_file() and path.stat().st_size < 1024:
        text = path.read_bytes()
        if text.startswith(_POINTER.encode()):
            return path.parent / text.decode().removeprefix(_POINTER).strip()
    return path


def leads_elsewhere(path: Path) -> bool:
    """Whether a path is a link or a pointer file."""
    return follow(path) != path
