"""Which kind of device a computation is for: its tensors', or one that an estimate plans for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_planned: ContextVar[str | None] = ContextVar("planned", default=None)


def device_type(device: torch.device) -> str:
    """The kind of device, such as ``cpu`` or ``cuda``, that code should choose its way by.

    Args:
        device: Where the tensors are.
    """
    return _planned.get() or device.type


def is_planned() -> bool:
    """Whether the kind of device is one that nothing runs on here."""
    return _planned.get() is not None


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Lets code choose its way as on a kind of device, on tensors without contents that are elsewhere.

    Args:
        kind: ``cpu`` or ``cuda``; of compute capability 8.0 at least.
    """
    token = _planned.set(kind)
    try:
        yield
    finally:
        _planned.reset(token)
