"""Activation checkpointing: what a transformer block keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from bfpo_pl.component import UserError

Checkpointing = Literal["none", "selective", "full"]
"""What is kept of a block: everything; what is dear to compute; its input alone."""

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def check_checkpointing(value: Any) -> Checkpointing:
    """Returns the value if it is one of the choices.

    Raises:
        UserError: It is not.
    """
    if value not in get_args(Checkpointing):
        raise UserError(
            f"activation_checkpointing must be none, selective (recomputes what is cheap) or full (recomputes all but "
            f"each block's input), not {value!r}."
        )
    return value


def checkpoint_activations(model: PreTrainedModel, how: Checkpointing) -> None:
    """Makes the blocks of a network compute activations again in the backward pass, in place. Gradients stay the same.

    Under ``selective`` the outputs of linear layers and of attention are kept and what lies between them is computed
    again: norms, rotary embeddings, activation functions, casts, the folding of pair trees.

    Args:
        model: A causal language model of transformers.
        how: What is computed again.
    """
    if how == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # positional, since transformers 5.2x renamed method and argument
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _dear(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _dear(operation: Any) -> bool:
    """Whether an operation is a linear layer's product or fused attention, of torch or of a kernel package.

    Batched products are not: they are attention's scores, whose size is quadratic.
    """
    name = str(operation)
    return operation in _PRODUCTS or (("attention" in name or "attn" in name) and "backward" not in name)
