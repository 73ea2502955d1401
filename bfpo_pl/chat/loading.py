"""Finds the model that a chat is with: a run's export or checkpoint, an exported folder, an adapter, a Hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bfpo_pl.component import UserError
from bfpo_pl.export.model import Architecture, add_stop_tokens, is_adapters, merged
from bfpo_pl.export.run import CONFIG, Run, checkpoint_of
from bfpo_pl.export.weights import SavedPolicy
from bfpo_pl.models.buffers import float_buffers, restore_buffers
from bfpo_pl.models.sources import HFModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ChatModel:
    """A model to talk with.

    Args:
        name: What it was asked for as.
        model: The model, in eval mode.
        tokenizer: Its tokenizer, with a chat template.
        system: The system message that its training added to conversations without one, as far as that is known.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None


def load_chat_model(name: str, checkpoint: str | None, dtype: Dtype, device: str, trust_remote_code: bool) -> ChatModel:
    """Loads a model by what one types for it.

    Args:
        name: A run's folder, a folder in Hugging Face's format (an adapter's as well), or a Hub id.
        checkpoint: A checkpoint of the run. Default: the run's export, or its last checkpoint where it has none.
        dtype: Type of the parameters; ``auto`` is the one they are saved in.
        device: Where to.
        trust_remote_code: Whether a repository's own code may run.

    Raises:
        UserError: There is no such model, or it has no chat template.
    """
    folder = Path(name).expanduser()
    system = None
    if (folder / CONFIG).is_file():
        run = Run(folder)
        system = run.template().system
        exported = folder / "export"
        written = any((exported / file).is_file() for file in ("config.json", "adapter_config.json"))
        if checkpoint is None and written:
            model, tokenizer = _from_folder(str(exported), dtype, trust_remote_code)
        else:
            model, tokenizer = _from_checkpoint(run, checkpoint_of(folder, checkpoint or "last"))
            if dtype != "auto":
                model = _cast(model, getattr(torch, dtype))
    elif checkpoint is not None:
        raise UserError(f"--checkpoint is for runs, and '{name}' is no run's folder: it has no {CONFIG}.")
    else:
        model, tokenizer = _from_folder(name, dtype, trust_remote_code)
    if tokenizer.chat_template is None:
        raise UserError(f"The tokenizer of '{name}' has no chat template, so it cannot chat.")
    return ChatModel(name, model.eval().to(_device(device)), tokenizer, system)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def _from_folder(name: str, dtype: Dtype, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file():
        return load_adapter(folder, dtype, trust_remote_code)
    source = HFModel(name, dtype=dtype, trust_remote_code=trust_remote_code)
    source.check()
    return source.load_model(), source.load_tokenizer()


def load_adapter(
    folder: Path, dtype: Dtype = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model with an adapter on it, and the tokenizer.

    Args:
        folder: The adapter's folder, which names the base model.
        dtype: Type of the base model's parameters; ``auto`` is the one they are saved in.
        trust_remote_code: Whether the base model's own code may run.

    Raises:
        UserError: The base model is not there, or the adapter is a file that can run code.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"The adapter '{folder}' has no adapter_model.safetensors. Other weight formats can run code when they "
            f"load and are refused."
        )
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    source = HFModel(base, revision, dtype, trust_remote_code=trust_remote_code)
    source.check()
    model = source.load_model()
    model.load_adapter(str(folder), use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _from_checkpoint(run: Run, checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy of a checkpoint, any adapter merged in."""
    source, template = run.source(), run.template()
    source.check()
    tokenizer = source.load_tokenizer()
    weights = SavedPolicy(checkpoint).read()
    if any(map(is_adapters, weights)):
        weights = merged(weights, Architecture(source, run.trainable(), tokenizer))
    model = source.load_model()
    model = _cast(model, next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(f"The weights of {checkpoint} are not those of the run's policy: {error}") from error
    tokenizer.chat_template = template.source(tokenizer)
    add_stop_tokens(model, tokenizer, template.stop_tokens)
    return model, tokenizer


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    buffers = float_buffers(model)
    model = model.to(dtype)  # type: ignore[arg-type]
    restore_buffers(model, buffers, model.device)
    return model
