"""`bfpo reference`: computes the log-probs of references beforehand, for all runs that will ask for them."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from bfpo_pl.callbacks.export import ExportHF
from bfpo_pl.component import UserError
from bfpo_pl.models.precomputed import Precomputed
from bfpo_pl.models.reference import FromColumn, FrozenCopy, Reference
from bfpo_pl.module import PreferenceModule
from bfpo_pl.parsing import BFPOCLI


class ReferenceModule(PreferenceModule):
    """Computes the log-probs of a fit's reference models, once for all runs on these rows, and trains nothing."""

    def configure_optimizers(self) -> None:
        return None


class ReferenceCLI(BFPOCLI):
    """Reads the command line of a fit, and ends where its first step would be."""

    def after_instantiate_classes(self) -> None:
        references = self.model.references
        self.model.references = {
            name: _precomputed(reference) for name, reference in references.items() if type(reference) is not FromColumn
        }
        if not self.model.references:
            raise UserError("bfpo reference: this config needs no reference model, or has its log-probs in the data.")
        if self.config[self.subcommand].get("ckpt_path"):
            raise UserError("bfpo reference: a reference is where training starts; leave out --ckpt_path.")
        super().after_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        for name in ("limit_train_batches", "limit_val_batches", "num_sanity_val_steps", "enable_checkpointing"):
            self.config_init[self.subcommand].trainer[name] = False if name == "enable_checkpointing" else 0
        trainer = super().instantiate_trainer(**kwargs)
        unused = (ExportHF, ModelCheckpoint)
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, unused)]  # type: ignore[attr-defined]
        return trainer

    def after_fit(self) -> None:
        self.run_record.finish(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        warnings.filterwarnings("ignore", ".*configure_optimizers` returned `None`.*")
        super()._run_subcommand(subcommand)
        rank_zero_info("A fit with `-c configs/reference/precomputed.yaml` finds them.")


def _precomputed(reference: Reference) -> Precomputed:
    """The same frozen network, with its log-probs computed beforehand."""
    if isinstance(reference, Precomputed):
        return reference
    return Precomputed(reference.source if isinstance(reference, FrozenCopy) else None)
