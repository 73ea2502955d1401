"""Turns signals into an orderly stop: after the step at hand, on every process, with a checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed

from bfpo_pl.checkpoints.keep import RunCheckpoints
from bfpo_pl.redaction import redacted_text
from bfpo_pl.training import ResponseModule


class OrderlyStop(Callback):
    """Stops a fit after the optimizer step at hand when a process gets SIGTERM or SIGINT, and saves a checkpoint.

    The handler only sets a flag. Processes exchange their flags once a step, with what else they look at before an
    update, so that one of them is enough and all stop after the same step. A second SIGINT stops at once, without a
    checkpoint. Under Slurm the signal that announces the end of the time (``#SBATCH --signal=SIGUSR1@120``) does the
    same, and then asks Slurm to queue the job anew.
    """

    def __init__(self) -> None:
        self._module: ResponseModule | None = None
        self._before: dict[int, Any] = {}
        self._requeue_signal = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ResponseModule)
        self._module = pl_module
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = int(environment.requeue_signal or signal.SIGUSR1)
            pl_module.guard.signals = (self._requeue_signal, int(signal.SIGTERM), int(signal.SIGINT))
        if threading.current_thread() is threading.main_thread():
            for number in pl_module.guard.signals:
                self._before[number] = signal.signal(number, self._note)
        if trainer.received_sigterm:  # while the model was built
            pl_module.guard.requested = int(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        assert self._module is not None
        guard = self._module.guard
        if guard.requested and number == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        guard.requested = number
        name = signal.Signals(number).name
        again = " (Ctrl-C again: at once, without)" if number == signal.SIGINT else ""
        # print() may be what the signal interrupted
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint{again}\n".encode())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves; the module raises `Stopped` once the step's metrics are written."""
        assert isinstance(pl_module, ResponseModule)
        agreed = pl_module.guard.agreed
        if not agreed:
            return
        checkpoints = [each for each in trainer.checkpoint_callbacks if isinstance(each, RunCheckpoints)]
        for each in checkpoints[:1]:
            each.save_now(trainer)
        if not checkpoints:
            rank_zero_warn("No checkpoint is saved: this run has none (trainer.enable_checkpointing is false).")
        if agreed == self._requeue_signal and trainer.is_global_zero:
            requeue()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def requeue() -> None:
    """Asks Slurm to queue this job anew; says so if it does not."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    if not shutil.which("scontrol"):
        rank_zero_warn(f"Slurm's job {job} is not queued anew: there is no `scontrol` on this machine.")
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        rank_zero_warn(f"Slurm's job {job} is not queued anew: scontrol says: {done.stderr.strip()}")
    else:
        rank_zero_info(f"Slurm queues job {job} anew; `--resume auto` in its script goes on from here.")


def end_children(trainer: Trainer | None, patience: float = 30.0) -> None:
    """After a failure of process 0: lets the processes that it started end, and ends those that do not.

    Under NCCL they would wait for it until a time limit of half an hour. Says which of them a signal killed.

    Args:
        trainer: The trainer whose launcher started them, if any.
        patience: Seconds that they have, all together, to end by themselves; two of them are enough where processes
            never met.
    """
    launcher = getattr(getattr(trainer, "strategy", None), "launcher", None)
    started: list[subprocess.Popen] = getattr(launcher, "procs", None) or []
    processes = dict(enumerate(started, start=1))
    started.clear()  # Lightning's observer watches this list, and would kill this process before it says why it ends
    error = sys.exc_info()[1]
    if not (distributed.is_available() and distributed.is_initialized()):
        patience = min(patience, 2.0)
    if _running(processes, 1.0) and patience > 1.0:
        text = redacted_text(str(error)).partition("\n")[0]
        sys.stderr.write(f"{type(error).__name__}: {text} (the other processes have {patience:.0f} s to end, too)\n")
    waiting = _running(processes, patience - 1.0)
    if isinstance(error, Exception):  # after Ctrl-C it is Lightning that kills them
        for rank, process in processes.items():
            if process.returncode is not None and process.returncode < 0:
                sys.stderr.write(_killed(rank, process))
    for rank, process in waiting.items():
        sys.stderr.write(f"Process {rank} (pid {process.pid}) still waits for this one; it is ended.\n")
        process.kill()
        process.wait()


def _running(processes: dict[int, subprocess.Popen], seconds: float) -> dict[int, subprocess.Popen]:
    """The processes that still run after some seconds; returns earlier if none does."""
    deadline = time.monotonic() + seconds
    while running := {rank: process for rank, process in processes.items() if process.poll() is None}:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return running


def _killed(rank: int, process: subprocess.Popen) -> str:
    number = -process.returncode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    memory = "; if it was not you, the machine may be out of memory (`dmesg` says so)" if name == "SIGKILL" else ""
    return f"Process {rank} (pid {process.pid}) was killed by {name}{memory}.\n"
