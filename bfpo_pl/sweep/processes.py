"""How a trial runs: in a process of its own, forked from one that has imported everything, or as any program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from multiprocessing.process import BaseProcess
from pathlib import Path

from bfpo_pl.sweep.expansion import ENV, bfpo_arguments, runnable

PRELOADED = "bfpo_pl.sweep.preload"
"""What the process that others are forked from imports."""


class Running(ABC):
    """The process of a trial."""

    pid: int

    @abstractmethod
    def code(self) -> int | None:
        """Its exit code; None while it runs. Below 0, the signal that ended it."""

    @abstractmethod
    def stop(self) -> None:
        """Asks it to save and end."""


class _Program(Running):
    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        if words[0] != ENV and "=" not in words[0]:  # which env would take for a variable
            words = [ENV, *words]  # a program that is not there is a trial that fails, with env's message in its log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
            )
        self.pid = self._process.pid

    def code(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)


class _Forked(Running):
    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        whole = dict(os.environ) | environment  # the process forked from may be older than what is in it
        self._process: BaseProcess = context.Process(target=run_bfpo, args=(arguments, str(log), whole))
        self._process.start()
        self.pid = self._process.pid or 0

    def code(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        self._process.terminate()


def start(words: list[str], further: list[str], log: Path, environment: dict[str, str]) -> Running:
    """Starts a trial.

    Args:
        words: Its command line. One of `bfpo` runs in a forked process where the system can, which saves the seconds
            that its imports take.
        further: Arguments of `bfpo fit` and `bfpo sft` that place the run in the trial's folder.
        log: Where its output goes, after what is there.
        environment: Environment variables to set.
    """
    own = bfpo_arguments(words)
    if own is None:
        return _Program(runnable(words), log, environment)
    if own[:1] in (["fit"], ["sft"]):
        own = [*own, *further]
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return _Program([sys.executable, "-m", "bfpo_pl.cli", *own], log, environment)
    return _Forked(own, log, environment)


def run_bfpo(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Runs a `bfpo` command in this process, as if it had been typed.

    Args:
        arguments: What follows ``bfpo``.
        log: File for its output.
        environment: All environment variables.
    """
    os.setsid()  # Ctrl-C in the terminal is the sweep's to hand on
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # read from the variable before the fork
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    sys.argv = ["bfpo", *arguments]
    from bfpo_pl import cli

    sys.modules["__main__"] = cli  # what Lightning's launcher starts again for further devices
    cli.main(arguments)


def _stop_with_the_sweep() -> None:
    """Saves and ends this process if the one that runs the sweep is killed."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os.kill(os.getpid(), signal.SIGTERM)
