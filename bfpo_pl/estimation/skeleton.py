"""Networks without weights: shapes, types and code as in training, from a config alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bfpo_pl.component import UserError
from bfpo_pl.models.sharding import transformer_blocks
from bfpo_pl.models.sources import (
    HFModel,
    ModelSource,
    TinyModel,
    _expanded,
    _explained,
    _zero_dropout_modules,
    _zero_dropout_settings,
)
from bfpo_pl.models.trainable import TrainablePart

TYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Type of the weights by the trainer's precision, where it is not their source's."""
COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Type that autocast computes in, by the trainer's precision."""


def config_of(source: ModelSource) -> PreTrainedConfig:
    """The config of a source's network; nothing else of it is read.

    Args:
        source: Where the network would come from.

    Raises:
        UserError: The config cannot be had, or says nothing of the sizes in memory.
    """
    if isinstance(source, TinyModel):
        return on_meta(source, None).config
    if not isinstance(source, HFModel):
        raise UserError(
            f"bfpo estimate: {type(source).__name__} has no config that can be read without its weights. Estimates are "
            f"made for HFModel and TinyModel."
        )
    path = _expanded(source.path)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"bfpo estimate: the folder '{source.path}' has no config.json; is it a run? Use its export/.")
    with _explained(source.path):
        config = AutoConfig.from_pretrained(path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"bfpo estimate: the weights of '{source.path}' are quantised, and what they take is not known here."
        )
    return config


def on_meta(source: ModelSource, trainable: TrainablePart | None, config: PreTrainedConfig | None = None) -> Any:
    """A source's network on the meta device, with what of it trains; in the types that its source gives.

    Args:
        source: Where the network would come from.
        trainable: What of it trains; None: nothing does.
        config: Another config than the source's own.
    """
    with torch.device("meta"):
        if isinstance(source, TinyModel) and config is None:
            model = source.load_model()
        else:
            model = _from_config(source, copy.deepcopy(config or config_of(source)))
        if trainable is None:
            model.requires_grad_(False)
        else:
            trainable.apply(model)
    return model


def _from_config(source: ModelSource, config: PreTrainedConfig) -> PreTrainedModel:
    dtype: Any = getattr(source, "dtype", "float32")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    settings = {"attn_implementation": source.attn_implementation} if isinstance(source, HFModel) else {}
    trust = getattr(source, "trust_remote_code", False)
    if getattr(source, "disable_dropout", False):
        _zero_dropout_settings(config)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=dtype, **settings)
    if getattr(source, "disable_dropout", False):
        _zero_dropout_modules(model)
    return model


def blocks_alike(model: PreTrainedModel) -> bool:
    """Whether all transformer blocks have the same parameters, by name, shape and whether they train."""
    signs = [
        [(name, parameter.shape, parameter.requires_grad) for name, parameter in block.named_parameters()]
        for block in transformer_blocks(model)
    ]
    return all(sign == signs[0] for sign in signs)


def with_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The config with another number of layers; lists with an entry for each layer are cut.

    Args:
        config: A network's config.
        depth: Layers; no more than it has.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers and layers > 1:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return config


def weight_type(parameter: torch.Tensor, precision: str) -> torch.dtype:
    """Type that a weight has in training: its source's, or the one that the trainer's precision converts it to."""
    return TYPES.get(precision, parameter.dtype) if parameter.is_floating_point() else parameter.dtype


def without_contents(
    model: PreTrainedModel, mode: FakeTensorMode, precision: str, gathered: torch.dtype | None = None
) -> dict[nn.Parameter, float]:
    """Puts tensors without contents, but with a device, in the place of a network's meta tensors, in place.

    Args:
        model: A network on the meta device.
        mode: The mode that the tensors belong to.
        precision: The trainer's.
        gathered: Type that sharded blocks are gathered in; None: their own.

    Returns:
        Bytes of each parameter as it is held between steps, whole.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(weight_type(parameter, precision))
    held = {name: float(p.numel() * p.element_size()) for name, p in model.named_parameters()}
    if gathered is not None:
        for block in transformer_blocks(model):
            for parameter in block.parameters():
                parameter.data = parameter.data.to(gathered)
    made: dict[int, nn.Parameter] = {}  # to_empty would untie weights that are tied
    with mode:
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                if id(weight) not in made:
                    empty = torch.empty_like(weight, device="cpu")
                    made[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
    return {parameter: held[name] for name, parameter in model.named_parameters()}
