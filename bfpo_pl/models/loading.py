"""Loads networks in shards: each process reads its own part of the weights from the files, and never holds more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.filesystem import FileSystem
from transformers import PreTrainedModel

from bfpo_pl.component import RunError
from bfpo_pl.models.outline import Outline, WholeOnly, stood_in
from bfpo_pl.models.sources import ModelSource

Change = Callable[[PreTrainedModel], None]
"""Changes a network in place."""

_SAID: WeakSet[ModelSource] = WeakSet()
"""Sources of which it was said that they load whole: a policy's frozen copy comes from the same one."""


def load_in_shards(source: ModelSource, prepare: Change, place: Change, device: torch.device) -> PreTrainedModel:
    """A source's network with its weights, of which this process holds its shards alone. Every process must call.

    Where a network cannot be loaded so, it is loaded whole on every process and then sharded; the reason is logged.

    Args:
        source: Where the network comes from.
        prepare: Decides what trains and may add modules, before the network is sharded. It may draw random numbers,
            and does not read weights.
        place: Shards the network.
        device: Where its shards are kept.

    Returns:
        The network: bit for bit that of `ModelSource.load_model`, prepared and sharded.

    Raises:
        ModelSourceError: The model cannot be had.
        RunError: The files cannot be read.
    """
    outline: Outline | None = None
    try:
        outline, reason = source.outline(), ""
    except WholeOnly as why:
        reason = str(why)
    reasons = [reason for reason in _on_all(reason) if reason]
    if reasons or outline is None:  # on one process perhaps, whose files are others: all take the same way
        if source not in _SAID:
            rank_zero_info(f"{source} is loaded whole on every process, not in shards: {reasons[0]}.")
            _SAID.add(source)
        network = source.load_model()
        prepare(network)
        place(network)
        return network
    return fill(outline, prepare, place, device)


def fill(outline: Outline, prepare: Change, place: Change, device: torch.device) -> PreTrainedModel:
    """The network of an outline with its weights; see `load_in_shards`."""
    network = outline.network
    # Preparing may rename weights (an adapter wraps layers); the tensors are the same.
    names = {id(tensor): name for name, tensor in _held(network).items() if name in outline.stored}
    with stood_in(network):
        prepare(network)
    places = {name: names[id(tensor)] for name, tensor in _held(network).items() if id(tensor) in names}
    place(network)
    network._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    held = network.state_dict()
    wanted = {file_name: held[name] for name, file_name in places.items()}
    try:
        checkpoint.load(wanted, storage_reader=_SafetensorsFiles(outline.files))
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        what: Any = failure[0] if isinstance(failure, tuple) else failure
        raise RunError(f"Process {rank} could not read weights from {outline.files[0].parent}: {what}") from error
    left = [name for name, tensor in (*network.named_parameters(), *network.named_buffers()) if tensor.is_meta]
    if left:  # Lightning would make the whole network anew, without its weights
        raise AssertionError(f"Not loaded: {', '.join(left)}")
    return network


def _held(network: PreTrainedModel) -> dict[str, Tensor]:
    return network.state_dict(keep_vars=True)


class _SafetensorsFiles(HuggingFaceStorageReader):
    """Reads certain files, not all of a folder: repositories hold the same weights in other files as well."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        super().__init__(str(files[0].parent))
        self.fs = _Listing(files)


class _Listing(FileSystem):
    """A file system with certain files."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._files = [str(file) for file in files]

    def ls(self, path: Any) -> list[str]:
        return self._files


def _on_all(text: str) -> list[str]:
    """A text of every process."""
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, text)
    return gathered
