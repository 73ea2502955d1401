"""A folder that appears whole under its name, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from bfpo_pl.checkpoints.atomic import sync_file, sync_folder
from bfpo_pl.component import UserError

_SPARE = 2**24
"""Bytes left for what is small: configs, tokenizer, card."""

_WRITTEN = (
    *("README.md", "config.json", "adapter_config.json", "generation_config.json"),
    *("*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "vocab-*", "merges.txt", "*.model", "*.tiktoken", "chat_template.*"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),
)
"""Names of files that `save_pretrained` of models and tokenizers writes, and the card."""
_WRITTEN_FOLDERS = ("additional_chat_templates",)


def check_target(folder: Path, replace: bool) -> None:
    """Fails early if a folder may not be written.

    Args:
        folder: The folder.
        replace: Whether an older export of that name may be replaced.

    Raises:
        UserError: It exists and is not to be replaced, or holds something that is not an exported model.
    """
    if not (folder.exists() or folder.is_symlink()):
        return
    empty = folder.is_dir() and not any(folder.iterdir())
    if not empty and (other := _foreign(folder)):
        raise UserError(f"'{folder}' holds something that is not an exported model ({other}); name another folder.")
    if not replace:
        raise UserError(f"'{folder}' exists already. Name another folder, or replace it: --overwrite true.")


def _foreign(folder: Path) -> str:
    """What keeps a folder from being taken for an exported model and removed with all that is in it; else empty."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is a link or a file"
    names = {path.name: path.is_file() for path in folder.iterdir()}
    for name, is_file in sorted(names.items()):
        known = any(fnmatch(name, pattern) for pattern in _WRITTEN) if is_file else name in _WRITTEN_FOLDERS
        if not known:
            return f"'{name}' is no part of one"
    if not names.keys() & {"config.json", "adapter_config.json"}:
        return "it has no config.json and no adapter_config.json"
    if not any(name.endswith(".safetensors") for name in names):
        return "it has no *.safetensors"
    return ""


def require_space(folder: Path, needed: int) -> None:
    """Fails if the disk has no room for a folder.

    Args:
        folder: The folder to be written.
        needed: Bytes.

    Raises:
        UserError: It has not; the message says how much is needed and free.
    """
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed + _SPARE:
        raise UserError(
            f"The disk of '{parent}' has {free / 1e9:.3g} GB free, and {(needed + _SPARE) / 1e9:.3g} GB are needed. "
            f"Make room, or name a folder on another disk."
        )


@contextmanager
def replaced_folder(folder: Path, replace: bool) -> Iterator[Path]:
    """Gives a temporary folder beside the named one, which takes its name once everything in it is on the disk.

    Args:
        folder: The folder; its parents are made.
        replace: Whether an older export of that name may be replaced.

    Raises:
        UserError: It may not be written.
    """
    folder = folder.absolute()
    check_target(folder, replace)
    part, aside = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        _settle(part)
        check_target(folder, replace)  # somebody may have been faster
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        part.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _settle(folder: Path) -> None:
    """Gives files the rights of other new files (safetensors' are the owner's alone) and waits for the disk."""
    sample = folder / ".rights"
    sample.touch()
    rights = sample.stat().st_mode
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(rights)
            sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)
