"""Callbacks that interrupt a run at a step, for the real command to be told by class path."""

import os
import signal
import time

import torch
from lightning.pytorch import Callback

from bfpo_pl.component import RunError


def write_time(path):
    if path is not None:
        with open(path, "w") as file:
            file.write(str(time.time()))


class SignalAt(Callback):
    """Sends this process a signal when an optimizer step has ended.

    Args:
        step: The step.
        number: The signal.
        times: How often, one right after the other.
        rank: The process.
        note: A file that notes the time.
    """

    def __init__(
        self, step: int, number: int = int(signal.SIGTERM), times: int = 1, rank: int = 0, note: str | None = None
    ) -> None:
        self.step, self.number, self.times, self.rank, self.note = step, number, times, rank, note
        self.sent = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank and not self.sent:
            self.sent = True  # during step number `step`
            write_time(self.note)
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class NaNAt(Callback):
    """Makes the loss of one process NaN in an optimizer step.

    Args:
        step: The step.
        rank: The process.
    """

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_start(self, trainer, pl_module):
        watch, step = pl_module.guard.watch, pl_module.training_step

        def training_step(*arguments):
            if trainer.global_step != self.step - 1 or trainer.global_rank != self.rank:
                return step(*arguments)
            pl_module.guard.watch = lambda loss, origins: watch(loss * float("nan"), origins)
            try:
                return step(*arguments) * float("nan")
            finally:
                pl_module.guard.watch = watch

        pl_module.training_step = training_step


class FailAt(Callback):
    """Raises in one process at a step.

    Args:
        step: The step.
        rank: The process.
        memory: An error of the GPU's allocator instead of one of a run.
        note: A file that notes the time.
    """

    def __init__(self, step: int, rank: int = 0, memory: bool = False, note: str | None = None) -> None:
        self.step, self.rank, self.memory, self.note = step, rank, memory, note

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            write_time(self.note)
            if self.memory:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 20.00 GiB. Of the allocated memory …"
                )
            raise RunError(f"the planted failure of rank {self.rank}")


class FailAtValidation(Callback):
    """Raises in the first validation, once.

    Args:
        once: A file that notes that it did.
    """

    def __init__(self, once: str) -> None:
        self.once = once

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not os.path.exists(self.once):
            write_time(self.once)
            raise RunError("the planted failure of a validation")


class SleepAt(Callback):
    """Takes long over the first micro-batch of a step.

    Args:
        step: The step.
        seconds: How long.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds, self.slept = step, seconds, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and not self.slept:
            self.slept = True
            time.sleep(self.seconds)


class LastStep(Callback):
    """Notes the last step that ended in the run's folder, for whoever kills the process."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero:
            part = os.path.join(trainer.default_root_dir, "last_step.part")
            with open(part, "w") as file:
                file.write(str(trainer.global_step))
            os.replace(part, part.removesuffix("part") + "txt")
