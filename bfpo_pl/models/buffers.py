"""Keeps the buffers of a network in the type that the network made them in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's floating-point buffers by name, the frequencies of rotary embeddings among them."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def restore_buffers(model: nn.Module, saved: dict[str, Tensor], device: torch.device) -> None:
    """Puts buffers back that a cast of the whole network (``bf16-true``) has rounded, on the given device.

    Rounded rotary frequencies would move every far position; transformers keeps them in float32 for that reason.
    """
    for name, buffer in saved.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if module._buffers[leaf].dtype != buffer.dtype:  # type: ignore[union-attr]
            module._buffers[leaf] = buffer.to(device)
