"""Ends a fit with a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from bfpo_pl.component import UserError
from bfpo_pl.training import ResponseModule


class ExportHF(Callback):
    """Writes the trained policy and its tokenizer as a Hugging Face folder at the end of a fit, an adapter merged in.

    Args:
        folder: Where to; an older export there is replaced. Default: ``export`` in the run's folder.
        enabled: Whether to export at all.
        max_shard_size: Largest safetensors file.
    """

    def __init__(self, folder: str | None = None, enabled: bool = True, max_shard_size: str = "4GB") -> None:
        self.folder = folder
        self.enabled = enabled
        self.max_shard_size = max_shard_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(self.folder) if self.folder else None
        if folder and folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise UserError(f"export.folder: '{folder}' holds something that is not an exported model; name another.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ResponseModule)
        if self.enabled and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "export"
            template = getattr(getattr(trainer, "datamodule", None), "template", None)
            jinja = None if template is None else template.source(pl_module.tokenizer)
            export(pl_module, folder, trainer.is_global_zero, self.max_shard_size, jinja)
            trainer.strategy.barrier("export")


def export(
    module: ResponseModule,
    folder: Path,
    writes: bool,
    max_shard_size: str = "4GB",
    chat_template: str | None = None,
) -> None:
    """Gathers the policy's weights over all ranks and writes them as a Hugging Face folder, on the rank that writes.

    Args:
        module: A module whose policy is built. Every rank must call, since sharded weights are gathered.
        folder: Where to; an older one of that name is replaced.
        writes: Whether this rank writes.
        max_shard_size: Largest safetensors file.
        chat_template: The jinja template that training used. Default: the tokenizer's own.
    """
    policy = module.policy
    assert policy is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # Of what the strategy wraps: only that knows how the weights are sharded.
    wrapped: Any = module if module._trainer is None else module.trainer.strategy.model
    held = get_model_state_dict(wrapped, options=options)
    weights = {name.removeprefix("policy."): held[name] for name in held if name.startswith("policy.")}
    if not writes:
        return
    network = _plain_network(module, policy, weights)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(part, max_shard_size=max_shard_size)
    tokenizer = copy.copy(module.tokenizer)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    rank_zero_info(f"Exported the policy to {folder}")


def _plain_network(module: ResponseModule, policy: PreTrainedModel, weights: dict[str, Any]) -> PreTrainedModel:
    """A network of the policy's class on the CPU, with the gathered weights and any adapter merged into them."""
    source = module.source.unquantised()
    network = source.load_model().to(policy.dtype)  # type: ignore[arg-type]
    adapted = any(isinstance(layer, BaseTunerLayer) for layer in policy.modules())
    if adapted:
        module.trainable.apply(network)
    if source is not module.source:  # the base as its files hold it, with the adapter that was trained over fewer bits
        weights = {**network.state_dict(), **{name: weights[name] for name in weights if "lora_" in name}}
    network.load_state_dict(weights, strict=True, assign=False)
    if not adapted:
        return network
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in network.state_dict().items()
        if not any(f".{part}." in f".{name}." for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"))
    }
    plain = source.load_model().to(policy.dtype)  # type: ignore[arg-type]
    plain.load_state_dict(merged, strict=True)
    return plain
