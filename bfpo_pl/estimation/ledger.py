"""Counts what a computation on tensors without contents would hold and do: live bytes, operations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bfpo_pl.estimation.operations import operations


@dataclass
class Unit:
    """Parameters whose gradients are reduced together, when the last of them is there.

    Where nothing is sharded each parameter is a unit by itself, and its gradient is final when it is there.

    Args:
        waiting: Trained parameters whose gradients are still to come.
        unsharded: Bytes of those that are there, whole.
        kept: Bytes that this device keeps of all of them, in the end.
        buffer: Bytes in which they are reduced, besides.
    """

    waiting: int
    kept: float
    buffer: float
    unsharded: float = 0.0


@dataclass
class Peaks:
    """The most bytes that were live during a phase, besides weights.

    Args:
        alone: The most of tensors that are no final gradients.
        together: The most of those and the final gradients that there were at that time.
        then: Those that are no final gradients, when ``together`` was reached.
    """

    alone: float = 0.0
    together: float = 0.0
    then: float = 0.0

    def see(self, alone: float, gradients: float) -> None:
        """Takes note of a moment."""
        self.alone = max(self.alone, alone)
        if alone + gradients > self.together:
            self.together, self.then = alone + gradients, alone


_CAST = torch.ops.aten._to_copy.default


class Ledger(TorchDispatchMode):
    """Follows every tensor that operations make until it is freed, and counts operations of matrix products.

    A tensor counts once, by its storage; views and results in place make none. Gradients that are final leave the
    count of other tensors and join that of gradients, in the size that the device keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0.0
        """Bytes of tensors that were made under this mode and are neither freed nor final gradients."""
        self.gradients = 0.0
        """Bytes of final gradients."""
        self.casts = 0.0
        """Bytes of those tensors that are weights in another type."""
        self.flops: dict[str, float] = {}
        """Operations of each phase."""
        self.peaks: dict[str, Peaks] = {}
        """The most that was live in each phase."""
        self._phase = ""
        self._sizes: dict[int, float] = {}
        self._weights: set[int] = set()
        self._handles: list[Any] = []

    def phase(self, name: str) -> Peaks:
        """Begins a phase; what happens from now on is its."""
        self._phase = name
        self.flops.setdefault(name, 0.0)
        peaks = self.peaks.setdefault(name, Peaks())
        peaks.see(self.live, self.gradients)
        return peaks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.flops[self._phase] = self.flops.get(self._phase, 0.0) + operations(func, args, kwargs, result)
        cast = func is _CAST and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor, cast)
        self.peaks[self._phase].see(self.live, self.gradients)
        return result

    def _follow(self, tensor: Tensor, cast: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = float(storage.nbytes())
        self._sizes[key] = size
        self.live += size
        self.casts += size if cast else 0.0
        weakref.finalize(storage, self._forget, key, size if cast else 0.0)

    def _forget(self, key: int, cast: float) -> None:
        self.live -= self._sizes.pop(key, 0.0)
        self.casts -= cast

    def leave_out(self, weights: Iterable[Tensor]) -> None:
        """Never counts these tensors, whatever operations return them."""
        for tensor in weights:
            key = tensor.untyped_storage()._cdata
            self._sizes[key] = 0.0
            self._weights.add(key)

    def watch_gradients(self, units: Iterable[tuple[Unit, list[nn.Parameter]]]) -> None:
        """Takes gradients over when they are final, unit by unit."""
        for unit, parameters in units:
            for parameter in parameters:
                handle = parameter.register_post_accumulate_grad_hook(self._arrival(unit))
                self._handles.append(handle)

    def _arrival(self, unit: Unit) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = parameter.grad.untyped_storage()._cdata
            unit.unsharded += self._sizes.get(key, 0.0)
            self._sizes[key] = 0.0  # no longer counted by its storage, but by its unit
            unit.waiting -= 1
            if unit.waiting:
                return
            peaks = self.peaks[self._phase]
            peaks.see(self.live + unit.buffer, self.gradients)
            self.live -= unit.unsharded
            self.gradients += unit.kept
            peaks.see(self.live, self.gradients)

        return arrived

    def close(self) -> None:
        """Lets go of the parameters that were watched."""
        for handle in self._handles:
            handle.remove()
