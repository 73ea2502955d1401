"""Checkpoints with a file from each process, as FSDP2 saves them: complete on all processes, or not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from bfpo_pl.checkpoints.atomic import part_of, publish, remove, sync_file, sync_folder, write_text
from bfpo_pl.checkpoints.file_io import reading
from bfpo_pl.checkpoints.manifest import MANIFEST, FileRecord, Manifest, file_record
from bfpo_pl.checkpoints.shards import (
    META,
    PlainPlanner,
    PlainReader,
    first_failure,
    is_sharded,
    plain_errors,
    read_metadata,
)
from bfpo_pl.checkpoints.space import SaveError, check_space, no_room, save_error, tensor_bytes
from bfpo_pl.component import UserError, causes_of


class AtomicSharded(ModelParallelStrategy):
    """A `ModelParallelStrategy` whose sharded checkpoints appear complete, and are read without running code.

    All files are written into a folder with a temporary name; when every process has synced its own, process 0 adds
    the manifest and renames the folder. A process that fails tells the others, so that none waits for it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)  # one file, through the CheckpointIO
            return
        path = Path(self.broadcast(str(filepath)))
        part = part_of(path)
        record = dict(checkpoint)  # the save takes weights and optimizer state out
        needed = self._sum(_own_bytes(checkpoint, self.global_rank))
        try:
            self._together(path, needed, lambda: _make_room(path, part, needed) if self.is_global_zero else None)
            save = super().save_checkpoint
            self._together(path, needed, lambda: save(checkpoint, part))
            files = self._together(path, needed, lambda: _synced(part, self.global_rank))
            self._together(path, needed, lambda: _finish(part, path, record, files) if self.is_global_zero else None)
        except SaveError:
            if self.is_global_zero:
                with contextlib.suppress(OSError):
                    remove(part)
            raise

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        if not is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        with reading(path), plain_errors():
            return _load(path, self.model, self.optimizers, self.lightning_module.strict_loading)  # type: ignore[arg-type]

    def _together(self, path: Path, needed: int, action: Callable[[], Any]) -> list[Any]:
        """Runs a step on every process, and what it returned on each.

        Raises:
            SaveError: It failed on some process; the same on all.
        """
        result, reason = None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            reason = _reason(error, path, needed, self.global_rank)
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, (result, reason))
        if failed := [why for _, why in outcomes if why]:
            raise SaveError(failed[0])
        return [value for value, _ in outcomes]

    def _sum(self, value: int) -> int:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return sum(values)


def _own_bytes(checkpoint: dict[str, Any], rank: int) -> int:
    """Bytes that this process writes: its shards, and on process 0 what is not sharded."""
    sharded: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    pending: list[Any] = [checkpoint]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            (sharded if isinstance(item, DTensor) else whole).append(item)
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return tensor_bytes(sharded) + (tensor_bytes(whole) if rank == 0 else 0)


def _make_room(path: Path, part: Path, needed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    check_space(path, needed)


def _synced(part: Path, rank: int) -> dict[str, FileRecord]:
    """Syncs what this process wrote; names, sizes and hashes of it."""
    names = [file for file in part.iterdir() if file.name.startswith(f"__{rank}_")]
    if rank == 0:
        names += [file for file in part.iterdir() if not file.name.startswith("__")]
    for file in names:
        sync_file(file)
    return {file.name: file_record(file) for file in names}


def _finish(part: Path, path: Path, checkpoint: dict[str, Any], files: list[dict[str, FileRecord]]) -> None:
    together = {name: record for own in files for name, record in sorted(own.items())}
    write_text(part / MANIFEST, Manifest.of(checkpoint, len(files), together).to_json() + "\n")
    sync_folder(part)
    publish(part, path)


def _reason(error: BaseException, path: Path, needed: int, rank: int) -> str:
    """What to say of an error during a save."""
    if isinstance(error, CheckpointException):
        rank, error = first_failure(error)
    for cause in causes_of(error):
        if isinstance(cause, SaveError):
            return str(cause)
        if isinstance(cause, OSError):
            return str(save_error(path, needed, cause))
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        # torch's writer of archives turns an error of the operating system into one of its own without the cause.
        return no_room(path, needed, f"process {rank} could not write its file to its end")
    return f"The checkpoint {path} could not be saved; process {rank} had {type(error).__name__}: {error}"


def _load(path: Path, module: torch.nn.Module, optimizers: list[torch.optim.Optimizer], strict: bool) -> dict[str, Any]:
    """Reads each process's part of weights and optimizer states into place; returns the rest."""
    weights = {"state_dict": get_model_state_dict(module)}
    if strict:
        _check_model(path, weights["state_dict"])
    dcp.load(weights, storage_reader=PlainReader(path), planner=PlainPlanner())
    module.load_state_dict(weights["state_dict"], strict=strict)
    for number, optimizer in enumerate(optimizers):
        name = f"optimizer_{number}"
        state = {name: get_optimizer_state_dict(module, optimizer)}
        dcp.load(state, storage_reader=PlainReader(path), planner=PlainPlanner())
        options = StateDictOptions(cpu_offload=True)
        set_optimizer_state_dict(module, optimizer, optim_state_dict=state[name], options=options)
    return torch.load(path / META, map_location="cpu", weights_only=True)


def _check_model(path: Path, own: dict[str, Any]) -> None:
    """Compares the names and shapes of a checkpoint's weights with the model's before they load.

    Raises:
        UserError: They are another model's; the message names the first that differs.
    """
    prefix = "state_dict."
    entries = read_metadata(path).state_dict_metadata.items()
    saved = {
        name.removeprefix(prefix): tuple(getattr(entry, "size", ()))
        for name, entry in entries
        if name.startswith(prefix)
    }
    here = {name: tuple(tensor.shape) for name, tensor in own.items() if isinstance(tensor, torch.Tensor)}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise UserError(
                f"The checkpoint is another model's: {name} is {saved.get(name, 'no such weight')} there and "
                f"{here.get(name, 'no such weight')} in this run's policy."
            )
