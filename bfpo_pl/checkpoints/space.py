"""How much a checkpoint takes, whether there is room for it, and what to say when there is not."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from bfpo_pl.component import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveError(RunError):
    """A checkpoint could not be saved; those before it are as they were."""


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples that this process holds; shared storage counts once."""
    storages: dict[int, int] = {}
    pending = [tree]
    while pending:
        item = pending.pop()
        if isinstance(item, DTensor):
            item = item.to_local()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return sum(storages.values())


def check_space(path: Path, needed: int) -> None:
    """Fails before anything is written if a checkpoint would not fit.

    Args:
        path: Where it goes.
        needed: Its size in bytes.

    Raises:
        SaveError: There is less room than that.
    """
    usage = shutil.disk_usage(_existing(path))
    if usage.total and needed > usage.free:  # some mounts tell no size
        raise SaveError(no_room(path, needed))


def save_error(path: Path, needed: int, error: OSError) -> SaveError:
    """What to say of an error of the operating system during a save."""
    if error.errno in _FULL:
        return SaveError(no_room(path, needed, str(error.strerror)))
    reason = error.strerror or error
    return SaveError(f"The checkpoint {path} could not be saved: {reason}. Older ones are as they were.")


def no_room(path: Path, needed: int, reason: str = "") -> str:
    """The message that there is no room for a checkpoint."""
    folder = _existing(path)
    free = shutil.disk_usage(folder).free
    return (
        f"No room for the checkpoint {path}: it needs {shown(needed)}, and {shown(free)} are free in {folder}"
        f"{f' ({reason})' if reason else ''}. Older checkpoints are as they were. Make room, keep fewer "
        f"(checkpoint.keep_last, checkpoint.save_top_k), or begin elsewhere (--runs) from the newest by --ckpt_path."
    )


def shown(size: int) -> str:
    """Bytes, for people to read."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _existing(path: Path) -> Path:
    folder = path.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    return folder
