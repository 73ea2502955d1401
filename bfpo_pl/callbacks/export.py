"""Ends a fit with a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from bfpo_pl.checkpoints.find import checkpoints_folder
from bfpo_pl.component import RunError, UserError
from bfpo_pl.export.card import model_card
from bfpo_pl.export.folder import check_target
from bfpo_pl.export.model import Architecture, Form, export_policy, is_adapters
from bfpo_pl.export.weights import POLICY
from bfpo_pl.training import ResponseModule
from bfpo_pl.wandb_views import log_export, wandb_loggers


class ExportHF(Callback):
    """Writes the trained policy, its tokenizer and a model card as a Hugging Face folder at the end of a fit.

    Args:
        folder: Where to; an older export there is replaced. Default: ``export`` in the run's folder.
        enabled: Whether to export at all.
        max_shard_size: Largest safetensors file.
        merge: Whether an adapter is merged into its base model; otherwise it is written alone, as peft does.
        artifact: Whether a W&B logger keeps the export as an artifact, which uploads all of it.
    """

    def __init__(
        self,
        folder: str | None = None,
        enabled: bool = True,
        max_shard_size: str = "4GB",
        merge: bool = True,
        artifact: bool = False,
    ) -> None:
        self.folder = folder
        self.enabled = enabled
        self.form = Form(merge, max_shard_size)
        self.artifact = artifact

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.folder and self.enabled:
            try:
                check_target(Path(self.folder), replace=True)
            except UserError as error:
                raise UserError(f"export.folder: {error}") from error

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ResponseModule)
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        run = Path(trainer.default_root_dir)
        folder = Path(self.folder) if self.folder else run / "export"
        template = getattr(getattr(trainer, "datamodule", None), "template", None)
        try:
            self._export(pl_module, run, folder, template, trainer.global_step, trainer.is_global_zero)
        except (UserError, OSError) as error:
            raise RunError(
                f"The fit is done, but its export failed: {error} The checkpoints are in {checkpoints_folder(run)}: "
                f"`bfpo export --run {run} --to FOLDER`."
            ) from error
        if self.artifact and trainer.is_global_zero:
            for logger in wandb_loggers(trainer):
                log_export(logger, folder, f"{run.resolve().name}-export")
        trainer.strategy.barrier("export")

    def _export(self, module: ResponseModule, run: Path, folder: Path, template: Any, step: int, writes: bool) -> None:
        """Gathers the weights over all ranks, which must all call, and writes them on the one that writes."""
        assert module.policy is not None
        adapted = any(is_adapters(name) for name, _ in module.policy.named_parameters())
        alone = adapted and not self.form.merge
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=alone)
        # Of what the strategy wraps: only that knows how the weights are sharded.
        wrapped: Any = module if module._trainer is None else module.trainer.strategy.model
        held = get_model_state_dict(wrapped, options=options)
        weights: dict[str, Any] = {name.removeprefix(POLICY): held[name] for name in held if name.startswith(POLICY)}
        if not writes:
            return
        base = module.source.origin[0] if module.source.origin else None
        title = run.resolve().name if self.folder is None else folder.resolve().name
        card = model_card(run, step, base, alone, title)
        policy = Architecture(module.source, module.trainable, module.tokenizer, template)
        export_policy(weights, policy, folder, self.form, card, replace=True)
        rank_zero_info(f"Exported the policy to {folder}")
