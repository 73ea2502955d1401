"""`bfpo export`: a Hugging Face folder from any checkpoint of a run, in one plain process."""

from __future__ import annotations

import re
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from bfpo_pl.component import UserError
from bfpo_pl.export.card import model_card
from bfpo_pl.export.folder import check_target, require_space
from bfpo_pl.export.model import Architecture, Dtype, Form, export_policy, is_adapters, size
from bfpo_pl.export.run import Run, checkpoint_of
from bfpo_pl.export.weights import SavedPolicy


def export_run(
    run: str,
    to: str,
    checkpoint: str = "last",
    merge: bool = True,
    max_shard_size: str = "4GB",
    dtype: Dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a run's model as a Hugging Face folder that plain transformers loads: safetensors, tokenizer, chat
    template, generation config and a model card.

    One plain process, whatever strategy trained the run; checkpoints may be files or sharded folders. Only the policy's
    weights are read, not the optimizer: a sharded checkpoint takes memory for one copy of them, a file less.

    Args:
        run: The run's folder, such as runs/bfpo/20260101-120000-ab12.
        to: Folder to write; it appears whole or not at all.
        checkpoint: last, best (of the metric that checkpoint.monitor names), or the path or name of a checkpoint.
        merge: Whether an adapter (LoRA) is merged into its base model; false writes the adapter alone, as peft does.
        max_shard_size: Largest safetensors file.
        dtype: Type of the parameters. Default: as trained.
        overwrite: Whether an older export of that name is replaced.

    Returns:
        The folder.

    Raises:
        UserError: Run, checkpoint, class or disk space is missing, or the folder exists.
    """
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B)?", max_shard_size, re.IGNORECASE):
        raise UserError(f"--max_shard_size must be a size such as 500MB or 4GB, not '{max_shard_size}'.")
    recorded = Run(run)
    folder = Path(to).expanduser()
    check_target(folder, overwrite)
    path = checkpoint_of(recorded.folder, checkpoint)
    source = recorded.source()
    source.check()
    tokenizer = source.load_tokenizer()
    policy = Architecture(source, recorded.trainable(), tokenizer, recorded.template())
    saved = SavedPolicy(path)
    adapter = not merge and any(is_adapters(name) for name in saved.tensors)
    if not merge and not adapter:
        raise UserError(f"{path} holds no adapter, so there is nothing to keep apart: leave out --merge false.")
    needed = {name: tensor for name, tensor in saved.tensors.items() if is_adapters(name) or not adapter}
    require_space(folder, size(needed))
    base = source.origin[0] if source.origin else None
    card = model_card(recorded.folder, saved.step, base, adapter, folder.absolute().name)
    weights = saved.read(is_adapters if adapter else lambda name: True)
    export_policy(weights, policy, folder, Form(merge, max_shard_size, dtype), card, overwrite)
    what = "the adapter" if adapter else "the policy"
    rank_zero_info(f"Exported {what} of {path}, step {saved.step}, to {folder}")
    return folder
