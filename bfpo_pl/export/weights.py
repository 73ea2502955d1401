"""The policy's weights in a checkpoint, read in one plain process, whatever strategy saved it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bfpo_pl.checkpoints.shards import read_metadata, read_tensors, tensors_described
from bfpo_pl.component import UserError

POLICY = "policy."
"""Prefix of the policy's weights in a module's state."""
_SHARDED = f"state_dict.{POLICY}"


class SavedPolicy:
    """The policy in a checkpoint: known by names, shapes and types until it is read. The optimizer is never read.

    Args:
        checkpoint: A file, or the folder of a sharded checkpoint.

    Raises:
        UserError: It holds no policy, or is damaged.
        pickle.UnpicklingError: It would run code.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._mapped: dict[str, Tensor] = {}
        state = checkpoint_state(checkpoint)
        if checkpoint.is_dir():
            described = tensors_described(read_metadata(checkpoint), _SHARDED)
            with torch.device("meta"):
                self.tensors = {
                    name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in described.items()
                }
        else:
            saved = state.get("state_dict", {})
            self._mapped = {name.removeprefix(POLICY): t for name, t in saved.items() if name.startswith(POLICY)}
            self.tensors = self._mapped
        self.step = int(state.get("global_step", 0))
        if not self.tensors:
            raise UserError(
                f"The checkpoint {checkpoint} holds no policy; it is no checkpoint of bfpo fit or bfpo sft."
            )

    def read(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Weights by name, on the CPU. Those of a file stay on the disk until they are used.

        Args:
            wanted: Which names to read.
        """
        names = [name for name in self.tensors if wanted(name)]
        if not self.checkpoint.is_dir():
            return {name: self._mapped[name] for name in names}
        weights = {name: torch.empty_like(self.tensors[name], device="cpu") for name in names}
        read_tensors(self.checkpoint, {_SHARDED + name: tensor for name, tensor in weights.items()})
        return weights


def checkpoint_state(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint holds besides sharded tensors, as plain data; the tensors of a file are mapped, not read.

    Args:
        checkpoint: A file, or the folder of a sharded checkpoint.

    Raises:
        UserError: It is damaged.
        pickle.UnpicklingError: It would run code.
    """
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, FileNotFoundError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"The checkpoint {checkpoint} is damaged or not complete: {why}") from error
    if not isinstance(state, dict):
        raise UserError(f"{checkpoint} is no checkpoint of Lightning.")
    return state
