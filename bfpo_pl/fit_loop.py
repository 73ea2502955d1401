"""Lightning's loop of a fit, where that stops amid a step or leaves the end of a run out."""

from __future__ import annotations

from lightning.pytorch.loops import _FitLoop


class WholeSteps(_FitLoop):
    """The loop of a fit whose optimizer steps are whole, however it was stopped.

    It stops between steps only, also where the time is up amid one (`max_time`): gradients that were accumulated are in
    no checkpoint. And where it goes on from the end of an epoch, the next begins; Lightning's would first train on one
    batch alone.

    Args:
        loop: The loop whose place it takes, before a fit.
    """

    def __init__(self, loop: _FitLoop) -> None:
        super().__init__(loop.trainer, loop.min_epochs, loop.max_epochs)
        self.epoch_loop = loop.epoch_loop

    @property
    def _can_stop_early(self) -> bool:
        return super()._can_stop_early and not self._should_accumulate()

    def reset(self) -> None:
        """Takes over the state of a checkpoint, if there is one."""
        super().reset()
        epoch = self.epoch_progress.current
        if self.restarting and epoch.completed == epoch.ready and self.epoch_loop._num_ready_batches_reached():
            self.epoch_loop.restarting = False


class GoingOn(WholeSteps):
    """The loop of a fit that goes on in its own folder: it starts and ends even where its last step was made before.

    Lightning's returns at once then. What was still to come, the validation of the last step, the export and what
    callbacks do at the end of training, would be left out.
    """

    @property
    def skip(self) -> bool:
        """Whether to return at once: where nothing has been trained and nothing will be."""
        if self.trainer.global_step == 0 or self.max_batches == 0:
            return super().skip
        return self.trainer.limit_train_batches == 0
