"""Sharding plans, kept outside the models: one block per transformer layer, then the root."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from bfpo_pl.component import UserError


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


def shard(model: PreTrainedModel, mesh: DeviceMesh, methods: tuple[str, ...] = ()) -> None:
    """Shards a model's parameters over the data-parallel ranks (FSDP2), in place.

    Args:
        model: The whole model, the same on every rank.
        mesh: The strategy's mesh, with a dimension ``data_parallel``.
        methods: Names of methods besides ``forward`` that must gather the root's parameters before they run.
    """
    data_parallel = mesh["data_parallel"]
    for block in transformer_blocks(model):
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    for method in methods:
        register_fsdp_forward_method(model, method)
