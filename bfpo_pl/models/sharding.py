"""Sharding plans, kept outside the models: one block per transformer layer, then the root."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from bfpo_pl.component import UserError
from bfpo_pl.models.tensor_parallel import parallelize


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's repeated layers, found by the class names that transformers keeps whole, or as its longest list.

    Raises:
        UserError: The model has no such layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        longest = max(lists, key=len, default=nn.ModuleList())
        blocks = list(longest)
    if not blocks:
        raise UserError(f"No repeated transformer layers found in {type(model).__name__}; it cannot be sharded.")
    return blocks


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    methods: tuple[str, ...] = (),
    precision: str = "32-true",
    offload: OffloadPolicy | None = None,
) -> None:
    """Splits a model over the tensor-parallel ranks and shards it over the data-parallel ones (FSDP2), in place.

    Gradients are reduced in float32 at least. Under ``bf16-mixed`` blocks are gathered in bfloat16: half the traffic,
    and nothing of a block's weights is left after it has run, whereas autocast's own casts would be kept, unsharded,
    for the backward pass. Embeddings, head and the states between blocks are autocast's, as on one process.

    Args:
        model: The whole model, the same on every rank.
        mesh: The strategy's mesh, with dimensions ``data_parallel`` and ``tensor_parallel``.
        methods: Names of methods besides ``forward`` that must gather the root's parameters before they run.
        precision: The trainer's precision.
        offload: What is kept on the CPU. Default: nothing.
    """
    data_parallel = mesh["data_parallel"]
    if "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
        parallelize(model, mesh["tensor_parallel"])
    gathered = torch.bfloat16 if precision == "bf16-mixed" else None
    reduced = torch.float32 if precision in ("bf16-mixed", "bf16-true") else None
    block_policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
    kept: dict[str, Any] = {"mesh": data_parallel, "offload_policy": offload or OffloadPolicy()}
    for block in transformer_blocks(model):
        fully_shard(block, mp_policy=block_policy, **kept)
        if gathered is not None:
            block.register_forward_pre_hook(_cast_without_autocast, with_kwargs=True)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduced), **kept)
    for method in methods:
        register_fsdp_forward_method(model, method)


def compute_device(model: PreTrainedModel) -> torch.device:
    """Where a network computes: where its weights are, unless they are sharded and offloaded to the CPU."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def _cast_without_autocast(block: nn.Module, args: Any, kwargs: Any) -> Any:
    """Casts what a block of bfloat16 is given where autocast does not, as in generation."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    device = next(block.parameters()).device.type
    return None if torch.is_autocast_enabled(device) else tree_map_only(Tensor, cast, (args, kwargs))
