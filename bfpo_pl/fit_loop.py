"""Lightning's loop of a fit, for one that goes on."""

from __future__ import annotations

from lightning.pytorch.loops import _FitLoop


class GoingOn(_FitLoop):
    """The loop of a fit that goes on in its own folder: it starts and ends even where its last step was made before.

    Lightning's returns at once then. What was still to come, the validation of the last step, the export and what
    callbacks do at the end of training, would be left out.

    Args:
        loop: The loop whose place it takes, before a fit.
    """

    def __init__(self, loop: _FitLoop) -> None:
        super().__init__(loop.trainer, loop.min_epochs, loop.max_epochs)
        self.epoch_loop = loop.epoch_loop

    @property
    def skip(self) -> bool:
        """Whether to return at once: where nothing has been trained and nothing will be."""
        if self.trainer.global_step == 0 or self.max_batches == 0:
            return super().skip
        return self.trainer.limit_train_batches == 0
