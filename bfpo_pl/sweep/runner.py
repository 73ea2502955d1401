"""Runs the trials of a sweep, some at a time, until all are done, too many have failed, or a signal says stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo_pl.runs import usable_cores
from bfpo_pl.sweep.drawing import Plan
from bfpo_pl.sweep.expansion import expanded
from bfpo_pl.sweep.processes import Running, start
from bfpo_pl.sweep.results import Before, before_attempt, last_value, missing_column, reason, run_folder
from bfpo_pl.sweep.spec import SweepSpec
from bfpo_pl.sweep.store import FAILED, FINISHED, PENDING, RUNNING, STOPPED, SweepFolder, Trial, elapsed

STOP_CODES = {128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGUSR1, -signal.SIGTERM, -signal.SIGINT}
"""Exit codes of a run that was asked to stop."""

LOOK_EVERY = 0.2
SEARCH_EVERY = 2.0
"""Seconds between searches for a trial while nothing ends here: each reads all records, which may lie on a network."""
SHOW_EVERY = 10.0
BEAT_EVERY = 10.0
"""Seconds between signs of life."""


@dataclass
class _Slot:
    trial: Trial
    process: Running
    since: float
    before: Before


class Runner:
    """Runs trials side by side.

    Args:
        spec: The sweep.
        folder: Its folder.
        plan: Its trials.
        workers: Trials at a time.
        max_failures: Failed trials after which no more are started.
        retry_failed: Whether trials that failed before are run once more.
        show: Called whenever something has changed, with all recorded trials.
        say: Called with what is to be said once.
    """

    def __init__(
        self,
        spec: SweepSpec,
        folder: SweepFolder,
        plan: Plan,
        workers: int,
        max_failures: int,
        retry_failed: bool,
        show: Callable[[list[Trial], dict[str, float]], None],
        say: Callable[[str], None],
    ) -> None:
        self.spec, self.folder, self.plan = spec, folder, plan
        self.workers, self.max_failures, self.show, self.say = workers, max_failures, show, say
        self.signal: int | None = None
        self.no_metric: str | None = None
        """Where the first run that has finished lacks the sweep's metric."""
        failed = [trial for trial in folder.trials() if retry_failed and trial.status == FAILED]
        self._again = {trial.id: trial.attempts for trial in failed}  # as often as now: another machine may retry, too
        self._slots: dict[int, _Slot] = {}
        self._failed = 0

    def run(self) -> list[Trial]:
        """Runs what is left to run; returns all recorded trials."""
        shown = searched = -math.inf
        with self._signals(), self._signs_of_life():
            try:
                while True:
                    changed = self._reap()
                    if changed or time.monotonic() - searched > SEARCH_EVERY:
                        changed |= self._fill()
                        if not self._slots and (self._stops or not self._is_work_left()):
                            break
                        searched = time.monotonic()
                    if changed or time.monotonic() - shown > SHOW_EVERY:
                        self._tell()
                        shown = time.monotonic()
                    time.sleep(LOOK_EVERY)
            finally:
                self._end()
        self._tell()
        return self.folder.trials()

    def _tell(self) -> None:
        running = {slot.trial.id: elapsed(slot.since) for slot in self._slots.values()}
        self.show([trial for trial in self.folder.trials() if self.plan.includes(trial)], running)

    @property
    def gives_up(self) -> bool:
        """Whether too many trials failed."""
        return self._failed >= self.max_failures

    @property
    def learns_nothing(self) -> bool:
        """Whether the trials are drawn from a metric that they do not have."""
        return self.spec.method == "bayes" and self.no_metric is not None

    @property
    def _stops(self) -> bool:
        return bool(self.signal) or self.gives_up or self.learns_nothing

    def _fill(self) -> bool:
        """Starts trials in the free places."""
        changed = False
        for place in range(self.workers):
            if place in self._slots or self._stops:
                continue
            with self.folder.locked():
                trial = self._take()
            if trial is None:
                break
            self._start(place, trial)
            changed = True
        return changed

    def _take(self) -> Trial | None:
        """A trial that was left, or the plan's next."""
        known = [trial for trial in self.folder.trials() if self.plan.includes(trial)]
        for trial in known:
            again = trial.status == FAILED and self._again.get(trial.id) == trial.attempts
            left = trial.status in (PENDING, STOPPED, RUNNING) or again
            if left and not self.folder.is_taken(trial) and self.folder.take(trial):
                return trial
        drawn = self.plan.next_trial(known)
        return drawn if drawn is not None and self.folder.take(drawn) else None

    def _is_work_left(self) -> bool:
        """Whether some trial runs elsewhere, or in a process that outlived its sweep: it may yet become free."""
        with self.folder.locked():
            return any(trial.status == RUNNING and self.plan.includes(trial) for trial in self.folder.trials())

    def _start(self, place: int, trial: Trial) -> None:
        folder = self.folder.folder(trial).absolute()
        further = [f"--runs={folder}", "--resume=auto"]
        environment = self._for_wandb() | _share(place, self.workers)
        words = expanded(self.spec, trial.parameters)
        log = folder / "log.txt"
        before = before_attempt(folder, log)
        process = start(words, further, log, environment)
        self.folder.started(trial, process.pid)
        self._slots[place] = _Slot(trial, process, time.monotonic(), before)

    def _for_wandb(self) -> dict[str, str]:
        """What W&B is to know of a trial; what the user has set comes first."""
        said = {"WANDB_RUN_GROUP": self.folder.path.name, "WANDB_JOB_TYPE": "trial"}
        if self.spec.project is not None:
            said["WANDB_PROJECT"] = self.spec.project
        return {name: os.environ.get(name, value) for name, value in said.items()}

    def _reap(self) -> bool:
        """Records the trials that ended."""
        ended = [(place, code) for place, slot in self._slots.items() if (code := slot.process.code()) is not None]
        for place, code in ended:
            slot = self._slots.pop(place)
            trial, folder = slot.trial, self.folder.folder(slot.trial)
            trial.seconds = round(trial.seconds + elapsed(slot.since), 1)
            run = run_folder(folder)
            trial.run = None if run is None else str(run.relative_to(folder))
            if code == 0:
                trial.status, trial.metric = FINISHED, self._metric(run, folder)
            elif self.signal and code in STOP_CODES:
                trial.status = STOPPED
            else:
                trial.status, trial.error = FAILED, reason(run, folder / "log.txt", code, slot.before)
                self._failed += 1
            if trial.status != STOPPED:
                self.plan.tell(trial)
            self.folder.release(trial)
        return bool(ended)

    def _metric(self, run: Path | None, folder: Path) -> float | None:
        """A finished trial's metric. If it has no such column, this is said once: the name may be mistaken."""
        metric = self.spec.metric
        if metric is None:
            return None
        value = None if run is None else last_value(run, metric)
        if value is None and self.no_metric is None:
            if run is not None:
                self.no_metric = missing_column(run, metric)
            elif self.spec.method == "bayes":  # elsewhere any program may run
                self.no_metric = f"{folder} has no run of bfpo's, and so no {metric}."
            if self.no_metric is not None:
                self.say(self.no_metric)
        return value

    def _end(self) -> None:
        """Asks what still runs to save and end, and waits for it."""
        if not self._slots:
            return
        self.signal = self.signal or signal.SIGTERM
        for slot in self._slots.values():
            slot.process.stop()
        while self._slots:
            self._reap()
            time.sleep(LOOK_EVERY)

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Shows others that this process lives, whatever it waits for: starting a first trial may take minutes."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_EVERY):
                self.folder.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns SIGTERM and Ctrl-C into an orderly end."""

        def note(number: int, _: Any) -> None:
            self.signal = number
            for slot in self._slots.values():
                slot.process.stop()

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _share(place: int, workers: int) -> dict[str, str]:
    """The part of the machine that a place may use: its threads, and its GPUs where there are some."""
    import torch

    threads = str(max(1, usable_cores() // workers))
    share = {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    count = torch.cuda.device_count()
    if count and workers > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        each = max(1, len(named) // workers)
        first = place * each % len(named)
        share["CUDA_VISIBLE_DEVICES"] = ",".join(named[first : first + each])
    return share
