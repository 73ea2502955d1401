"""Writes a policy as a Hugging Face folder, without a second copy of its weights; for command and callback."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bfpo_pl.component import UserError
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.export.folder import replaced_folder, require_space
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import TrainablePart

CARD = "README.md"
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Form:
    """How a policy is written.

    Args:
        merge: Whether an adapter is merged into the base model; otherwise it is written by itself, as peft does.
        max_shard_size: Largest safetensors file, such as ``4GB``.
        dtype: Type of the parameters. Default: the one they have.
    """

    merge: bool = True
    max_shard_size: str = "4GB"
    dtype: Dtype | None = None


@dataclass(frozen=True)
class Architecture:
    """What a policy is besides its weights.

    Args:
        source: Where its base model comes from.
        trainable: What of it trained.
        tokenizer: Its tokenizer.
        template: How training made tokens of conversations: its jinja template goes with the tokenizer, and its stop
            tokens into the generation config. Default: as the base model has them.
    """

    source: ModelSource
    trainable: TrainablePart
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None = None


def is_adapters(name: str) -> bool:
    """Whether a weight of this name is an adapter's, and not the base model's."""
    return "lora_" in name


def export_policy(
    weights: dict[str, Tensor], policy: Architecture, folder: Path, form: Form, card: str, replace: bool
) -> None:
    """Writes model, tokenizer, chat template, generation config and card; the folder appears whole or not at all.

    Args:
        weights: The policy's weights by name, on the CPU; with ``form.merge`` false those of the adapter suffice. They
            are used up: the dictionary is empty afterwards.
        policy: What the weights belong to.
        folder: Where to.
        form: How.
        card: Text of the model card.
        replace: Whether an older folder of that name may be replaced.

    Raises:
        UserError: The weights are another model's, there is not enough space, or the folder exists.
    """
    adapted = any(is_adapters(name) for name in weights)
    stored = policy.source.unquantised()
    if stored is not policy.source:
        policy = replace_field(policy, source=stored)
        weights = _over_stored_base(weights, policy) if form.merge else weights
    network = policy.source.skeleton()
    if adapted and form.merge:
        weights = merged(weights, policy)
    elif adapted:
        _name_base(network, policy)
        for name in [name for name in weights if not is_adapters(name)]:
            del weights[name]
    _check_names(weights, network)
    if not adapted or form.merge:
        _share_tied(weights, network)
    if form.dtype is not None:
        kind = getattr(torch, form.dtype)
        weights = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    network.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))  # type: ignore[arg-type]
    require_space(folder, size(weights))
    tokenizer = copy.copy(policy.tokenizer)
    if policy.template is not None:
        tokenizer.chat_template = policy.template.source(policy.tokenizer)
        add_stop_tokens(network, tokenizer, policy.template.stop_tokens)
    with replaced_folder(folder, replace) as part:
        network.save_pretrained(part, state_dict=weights, max_shard_size=form.max_shard_size)
        tokenizer.save_pretrained(part)
        (part / CARD).write_text(card, encoding="utf-8")
    weights.clear()


def add_stop_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Lets tokens at which training ended responses end generation as well, besides those that do already.

    Args:
        network: The model whose generation config it is.
        tokenizer: Its tokenizer.
        tokens: The tokens.
    """
    config: Any = network.generation_config
    if not tokens or config is None:
        return
    given = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    known = [] if given is None else [given] if isinstance(given, int) else list(given)
    config.eos_token_id = list(dict.fromkeys([*known, *(tokenizer.convert_tokens_to_ids(token) for token in tokens)]))


def size(weights: Mapping[str, Tensor]) -> int:
    """Bytes of tensors, those that share their storage counted once."""
    storages: dict[int, int] = {}
    for tensor in weights.values():
        key = id(tensor) if tensor.is_meta else tensor.data_ptr()
        storages[key] = max(storages.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(storages.values())


def merged(weights: dict[str, Tensor], policy: Architecture) -> dict[str, Tensor]:
    """A base model's weights with an adapter merged in, by peft itself, layer by layer.

    Args:
        weights: The base model's and the adapter's, by name. The dictionary is emptied, so that what is merged does not
            stay in memory twice; the tensors are not changed.
        policy: What they belong to.

    Raises:
        UserError: They are another model's.
    """
    network = policy.source.skeleton()
    policy.trainable.apply(network)
    _check_names(weights, network)
    network.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=True, assign=True)
    weights.clear()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)  # into new tensors; those in place may be the policy's own
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if not is_adapters(name)
    }


def _over_stored_base(weights: dict[str, Tensor], policy: Architecture) -> dict[str, Tensor]:
    """An adapter that was trained over a quantised base, with the base as its files hold it, by name."""
    network = policy.source.load_model()
    policy.trainable.apply(network)
    return {name: weights[name] if is_adapters(name) else tensor for name, tensor in network.state_dict().items()}


def _name_base(network: PreTrainedModel, policy: Architecture) -> None:
    """Puts the adapter on the skeleton, with the base model that its config must name."""
    origin = policy.source.origin
    if origin is None:
        raise UserError(
            f"{policy.source} is loaded from no Hub id or folder, which an adapter's config must name as its base. "
            f"Export with the adapter merged: merge=true."
        )
    policy.trainable.apply(network)
    for config in network.peft_config.values():
        config.base_model_name_or_path, config.revision = origin  # type: ignore[attr-defined]
        config.inference_mode = True


def _check_names(weights: Mapping[str, Tensor], network: PreTrainedModel) -> None:
    expected = network.state_dict()
    if weights and all(is_adapters(name) for name in weights):
        expected = {name: tensor for name, tensor in expected.items() if is_adapters(name)}
    for name in sorted(weights.keys() | expected.keys()):
        have = tuple(weights[name].shape) if name in weights else "missing"
        want = tuple(expected[name].shape) if name in expected else "missing"
        if have != want:
            raise UserError(
                f"The weights are not those of the run's policy: {name} is {have}, and {want} in "
                f"{type(network).__name__} as the run's config describes it."
            )


def _share_tied(weights: dict[str, Tensor], network: PreTrainedModel) -> None:
    """Lets names of one parameter share one tensor, as a sharded checkpoint's do not; it is then written once."""
    first: dict[int, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            if not torch.equal(weights[known], weights[name]):
                raise UserError(f"{name} and {known} are one parameter of the model, but differ in these weights.")
            weights[name] = weights[known]
