"""A network without its weights, and the files that hold them: what is needed to load it in shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel


class WholeOnly(Exception):  # no error: it says why another way is taken
    """A network that cannot be loaded in shards, but whole on every process; its text says why."""


@dataclass(frozen=True)
class Outline:
    """A network whose weights are on the meta device; whatever no file holds has its values already.

    Args:
        network: The network, in eval mode, its weights tied as they will be.
        files: The safetensors files that hold all its weights.
        stored: The weights' names there, which are those of its ``state_dict``; of tied weights one is there.
    """

    network: PreTrainedModel
    files: tuple[Path, ...]
    stored: frozenset[str]

    @classmethod
    def of(cls, network: PreTrainedModel, files: Sequence[Path]) -> Outline:
        """The outline of a network that `from_pretrained` has put on the meta device as a whole, in place.

        Args:
            network: The network.
            files: The safetensors files that `from_pretrained` has read it from.

        Raises:
            WholeOnly: The files do not hold its weights as they are.
        """
        if getattr(network, "_weight_conversions", None):
            raise WholeOnly("its weights are stored under other names or in another form")
        stored = frozenset(name for file in files for name in names_in(file))
        held = network.state_dict(keep_vars=True)
        shared = {id(held[name]) for name in held if name in stored}
        lacking = [name for name, tensor in held.items() if name not in stored and id(tensor) not in shared]
        if lacking:
            raise WholeOnly(f"its files lack {len(lacking)} of its weights, {lacking[0]} the first")
        tied: dict[str, str] = getattr(network, "all_tied_weights_keys", {})
        if any(target in stored and source in stored for target, source in tied.items()):
            raise WholeOnly("its files hold weights twice that are to be tied, and may differ")
        _fill_buffers(network)
        return cls(network, tuple(files), stored)


def names_in(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file; only its header is read."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _fill_buffers(network: PreTrainedModel) -> None:
    """Computes the buffers that no file holds, such as rotary frequencies, as `from_pretrained` does."""
    for name, buffer in list(network.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for tensor in network.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # they will come from files
    for module in network.modules():
        setattr(module, "_is_hf_initialized", False)  # noqa: B010  # nn.Module's annotations know tensors alone
    network.initialize_weights()


@contextmanager
def stood_in(network: nn.Module) -> Iterator[None]:
    """Gives a network, meanwhile, stand-ins on the CPU for its meta tensors: views of one number, of no size.

    An adapter that is added makes its own weights where the network's are; on the meta device it would make none.
    """
    stand_ins: dict[int, Tensor] = {}
    originals: dict[int, Tensor] = {}
    for table, name, tensor in _tensors(network):
        if tensor.is_meta:
            if id(tensor) not in stand_ins:
                view: Tensor = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                view = nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
                stand_ins[id(tensor)], originals[id(view)] = view, tensor
            table[name] = stand_ins[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in _tensors(network):
            if id(tensor) in originals:
                table[name] = originals[id(tensor)].requires_grad_(tensor.requires_grad)


def _tensors(network: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Parameters and buffers with the tables that hold them, tied ones as often as they are held."""
    tables = [table for module in network.modules() for table in (module._parameters, module._buffers)]
    return [(table, name, tensor) for table in tables for name, tensor in list(table.items()) if tensor is not None]
