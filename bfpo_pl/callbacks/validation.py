"""Runs a validation that a stop came before."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from bfpo_pl.training import ResponseModule


def is_missing(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a fit that goes on has yet to validate at the very step it goes on from.

    Args:
        trainer: The trainer, its loops restored.
        module: The module.
    """
    if trainer.global_step == 0 or not isinstance(module, ResponseModule):
        return False
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    due = fetcher is not None and trainer.enable_validation and loop.epoch_loop._should_check_val_fx(fetcher)
    return due and module.validated_step != trainer.global_step


class MissedValidation(Callback):
    """A checkpoint is saved before the validation of its step; one that was not finished is run when the fit goes on.

    Lightning takes it for done. Then its values would be missing, in metrics and in the choice of the best checkpoint.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_missing(trainer, pl_module):
            return
        rank_zero_info(f"The validation of step {trainer.global_step} was not finished; it runs now.")
        loop = trainer.fit_loop.epoch_loop
        trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        trainer.training = True
