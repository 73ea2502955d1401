"""What is decided once an optimizer step, on all ranks alike: whether the update applies, whether the run stops."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from bfpo_pl.component import RunError


class NonFiniteError(RunError):
    """A loss or a gradient was NaN or infinite; the update was not applied."""


class Stopped(RunError):
    """A signal stopped the run after a step; its checkpoint is saved.

    Args:
        number: The signal.
        step: The last optimizer step.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"Stopped by {signal.Signals(number).name} after step {step}. The same command with --resume auto goes on."
        )
        self.number = number
        self.exit_code = 128 + number


class UpdateGuard:
    """Keeps updates that come from a NaN or an infinity away from the weights, and agrees on stopping.

    Flags are gathered on the device, without waiting for it, and read once an optimizer step, before the update.

    Args:
        max_skipped: Steps that are left out, and counted, before the run stops.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        self.max_skipped = max_skipped
        self.skipped = 0
        """Steps left out so far."""
        self.norm: Tensor | None = None
        """Norm of the last step's gradient over all ranks, before clipping; a scalar, sharded if gradients are."""
        self.signals: tuple[int, ...] = (int(signal.SIGTERM), int(signal.SIGINT))
        """The signals that may ask for a stop, the same on every rank; if several come, the first here counts."""
        self.requested = 0
        """The one that asks this process to stop; 0 for none."""
        self.agreed = 0
        """The signal for which all processes stop after this step; 0 for none."""
        self._bad_loss: Tensor | None = None
        self._origins: list[str] = []

    def watch(self, loss: Tensor, origins: Iterable[str]) -> None:
        """Notes whether a loss is finite, and whose rows it came from.

        Args:
            loss: A scalar.
            origins: The rows.
        """
        bad = ~torch.isfinite(loss.detach())
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        self._origins.extend(origins)

    def decide(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        step: int,
        mean_over_ranks: Callable[[Tensor], Tensor],
        check_gradients: bool = True,
        norm_over_shards: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Lets the update pass, or takes the gradients away, so that the optimizer leaves every weight as it is.

        Args:
            named: The parameters with their names.
            step: Number of the optimizer step.
            mean_over_ranks: The mean of a tensor over processes.
            check_gradients: False where a loss scaler looks for infinities itself.
            norm_over_shards: From the norm of this process's shards to that of the whole gradient, where gradients do
                not know that they are sharded.

        Raises:
            NonFiniteError: A loss or a gradient was not finite on some rank, and no more steps may be skipped.
        """
        bad_loss, origins = self._bad_loss, self._origins
        self._bad_loss, self._origins = None, []
        self.norm = _total_norm([p.grad for _, p in named if p.grad is not None])
        if norm_over_shards is not None:
            self.norm = norm_over_shards(self.norm)
        norm = self.norm.full_tensor() if isinstance(self.norm, DTensor) else self.norm
        bad_norm = ~torch.isfinite(norm.detach()) if check_gradients else torch.zeros_like(norm, dtype=torch.bool)
        bad_loss = torch.zeros_like(bad_norm) if bad_loss is None else bad_loss.to(bad_norm.device)
        stops = [torch.full_like(norm, float(self.requested == number)) for number in self.signals]
        flags = torch.stack([bad_loss.to(norm.dtype), bad_norm.to(norm.dtype), *stops])
        # One look at the device for all of them, and one for what only a failure needs.
        loss_flag, norm_flag, *stop_flags = mean_over_ranks(flags).tolist()
        self.agreed = next((n for n, flag in zip(self.signals, stop_flags, strict=True) if flag), 0)
        if not loss_flag and not norm_flag:
            return
        here = bool(bad_loss)
        what = _what_is_wrong(loss_flag > 0, here, origins, named)
        message = f"{what} at optimizer step {step}; the update was not applied."
        self.skipped += 1
        if self.skipped > self.max_skipped:
            allowed = f" {self.max_skipped} such steps were skipped before." if self.max_skipped else ""
            raise NonFiniteError(
                f"{message}{allowed} Usual causes: a learning rate that is too high, a row that is out of the "
                "ordinary, float16. model.max_nonfinite_steps lets the run skip some."
            )
        for _, parameter in named:
            parameter.grad = None
        skipped = f"{message} {self.skipped} of at most {self.max_skipped} such steps are skipped."
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        if rank and here:  # nobody else knows the rows
            warnings.warn(f"Process {rank}: {skipped}", stacklevel=2)
        rank_zero_warn(skipped)


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients; a sharded scalar, if all are sharded alike."""
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(layout, []).append(gradient)
    if len(groups) <= 1:
        return torch.nn.utils.get_total_norm(gradients)
    squares = []
    for layout, some in groups.items():  # tensor parallelism: some are split over a group that holds others whole
        norm = torch.nn.utils.get_total_norm([_local(gradient) for gradient in some])
        square = norm.to(torch.promote_types(norm.dtype, torch.float32)).square()
        for dimension, placement in enumerate(layout[1] if layout else ()):
            if not placement.is_replicate():
                torch.distributed.all_reduce(square, group=layout[0].get_group(dimension))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _what_is_wrong(
    in_a_loss: bool, here: bool, origins: Sequence[str], named: Sequence[tuple[str, nn.Parameter]]
) -> str:
    if in_a_loss:
        rows = ", ".join(origins) if here else "none on this process; another one has them and names them"
        return f"The loss was NaN or infinite (rows of this step: {rows})"
    bad = [name for name, p in named if p.grad is not None and not _local(p.grad).isfinite().all()]
    where = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "") if bad else "another process"
    return (
        f"The gradient was NaN or infinite though every loss was finite (of {where}; rows of this step: "
        f"{', '.join(origins)})"
    )


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
