"""Tensor parallelism by transformers' own plans: the weights of attention and MLP are split over a group of processes.

All processes of a group compute the same rows. Between blocks every one holds the same, whole states; within a block
each has some of the attention heads and some of the MLP's columns. Embeddings, norms and the output head are held, and
computed with, by every process of the group.
"""

from __future__ import annotations

import logging
import re
from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from bfpo_pl.component import UserError

FAMILIES = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "starcoder2",
)
"""Model types whose plan is tested: log-probs and gradients are those of one process."""

_SPLIT_DIMENSION = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
"""By the name that a plan gives to a style: the dimension of a linear layer's weight that is split."""
_SUMMED = "replicated_with_grad_allreduce"
"""A plan's name of weights that each process uses for its own heads, so that their gradients add up."""

# Gathering a weight that is split by both meshes takes two steps, of which torch warns as slow. It happens on export.
logging.getLogger("torch.distributed.tensor._redistribute").addFilter(
    lambda record: "sequential all_gather operations" not in record.getMessage()
)


def check_plan(model: PreTrainedModel, size: int) -> None:
    """Fails where a network cannot be split over a group of processes exactly.

    Args:
        model: The network; it may be on the meta device.
        size: Processes of a group.

    Raises:
        UserError: It cannot.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if config.model_type not in FAMILIES or not config.base_model_tp_plan:
        raise UserError(
            f"tensor_parallel_size is {size}, but tensor parallelism is not known to be exact for {name} (model_type "
            f"{config.model_type}). It is for: {', '.join(FAMILIES)}. Use `-c configs/strategy/fsdp2.yaml`."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            f"tensor_parallel_size is {size}, but an adapter (LoRA) is not split over processes. Use `-c configs/"
            f"strategy/fsdp2.yaml`, or another model.trainable."
        )
    planned = _planned(model)
    counts = {f"{module}'s weight": owner.weight.shape[_SPLIT_DIMENSION[style]] for module, owner, style in planned}
    if any(style == "colwise" and ".mlp." not in module for module, _, style in planned):
        heads = config.num_attention_heads
        counts = {
            "attention heads": heads,
            "key-value heads": getattr(config, "num_key_value_heads", None) or heads,
        } | counts
    for what, count in counts.items():
        if count % size:
            raise UserError(
                f"tensor_parallel_size {size} does not divide {name}'s {what} ({count}). Choose another size, or use "
                f"`-c configs/strategy/fsdp2.yaml`."
            )


def parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits a network over a group of processes, in place, before FSDP shards what each of them holds.

    Every parameter becomes a tensor of the group's mesh, whether it is split or held by all: optimizers, clipping and
    checkpoints then see one mesh.

    Args:
        model: The network, whole and the same on every process, or on the meta device.
        mesh: The group's mesh, of one dimension.

    Raises:
        UserError: It cannot be split exactly; see `check_plan`.
    """
    check_plan(model, mesh.size())
    for _, module, style in _planned(model):
        parallelize_module(module, mesh, _style(style), src_data_rank=None)  # no communication: all have the weights
    summed = _summed(model)
    replicas: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own = {name: p for name, p in module._parameters.items() if p is not None and not isinstance(p, DTensor)}
        for name, parameter in own.items():
            if id(parameter) not in replicas:  # a tied one is held twice
                replica = distribute_tensor(parameter, mesh, [Replicate()], src_data_rank=None)
                replicas[id(parameter)] = nn.Parameter(replica, requires_grad=parameter.requires_grad)
            module.register_parameter(name, replicas[id(parameter)])
        if own:
            _compute_locally(module, Partial() if module in summed else Replicate())


def _planned(model: PreTrainedModel) -> list[tuple[str, Any, str]]:
    """The linear layers to be split: name, layer, name of the style."""
    return [(name, module, style) for name, module, style in _matches(model) if style in _SPLIT_DIMENSION]


def _summed(model: PreTrainedModel) -> set[nn.Module]:
    return {module for _, module, style in _matches(model) if style == _SUMMED}


def _matches(model: PreTrainedModel) -> list[tuple[str, nn.Module, str]]:
    """The modules that the plan names, with their styles.

    Raises:
        UserError: The plan has a style that is not known here.
    """
    plan: dict[str, str] = model.config.get_text_config().base_model_tp_plan or {}
    unknown = sorted(set(plan.values()) - {*_SPLIT_DIMENSION, _SUMMED})
    if unknown:
        raise UserError(
            f"Tensor parallelism: the plan of {type(model).__name__} has styles that bfpo_pl does not know: "
            f"{', '.join(unknown)}. Use `-c configs/strategy/fsdp2.yaml`."
        )
    found = []
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        named = model.base_model.named_modules()
        found += [(name, module, style) for name, module in named if expression.fullmatch(name)]
    return found


def _style(name: str) -> ParallelStyle:
    if name == "colwise":
        return ColwiseParallel()
    if name == "colwise_gather_output":
        return ColwiseParallel(output_layouts=Replicate())
    if name == "rowwise":
        return RowwiseParallel()
    return RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())


def _compute_locally(module: nn.Module, gradients: Placement) -> None:
    """Lets a module compute with plain tensors in place of its own replicated parameters.

    Args:
        module: The module.
        gradients: What its parameters' gradients are over the group: the same on every process, or to be added up.
    """
    forward = module.forward

    @wraps(forward)
    def local_forward(*args: Any, **kwargs: Any) -> Any:
        held: dict[str, Any] = {name: p for name, p in module._parameters.items() if isinstance(p, DTensor)}
        plain: dict[str, Any] = {name: p.to_local(grad_placements=[gradients]) for name, p in held.items()}
        module._parameters.update(plain)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = local_forward
