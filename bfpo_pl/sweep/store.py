"""The folder of a sweep: its trials, what became of each, and which process has taken it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from bfpo_pl.checkpoints.atomic import write_text
from bfpo_pl.component import RunError, UserError
from bfpo_pl.sweep.claims import beat, is_alive, is_own, read_claim, read_record, write_claim
from bfpo_pl.sweep.results import last_value
from bfpo_pl.sweep.spec import SweepSpec

PENDING, RUNNING, FINISHED, FAILED, STOPPED = "pending", "running", "finished", "failed", "stopped"
TRIAL, CLAIM = "trial.json", "claim.json"


@dataclass
class Trial:
    """One command of a sweep.

    Args:
        id: Its name: a digest of its parameters, or its number where they were drawn.
        parameters: Its values, by dotted key.
        status: ``pending``, ``running``, ``finished``, ``failed`` or ``stopped``.
        attempts: How often it was started.
        error: Why it failed.
        run: Its run's folder, relative to the trial's.
        metric: The sweep's metric, of its last row that has one.
        seconds: What its attempts took together.
        drawn: Its number in Optuna's study, where it was drawn.
    """

    id: str
    parameters: dict[str, Any]
    status: str = PENDING
    attempts: int = 0
    error: str | None = None
    run: str | None = None
    metric: float | None = None
    seconds: float = 0.0
    drawn: int | None = None
    host: str | None = None


def trial_id(parameters: dict[str, Any]) -> str:
    """A name for a combination of values, the same in every sweep and on every machine."""
    text = json.dumps(parameters, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


@dataclass
class SweepFolder:
    """The folder of a sweep, which several processes and machines may share.

    Args:
        path: The folder.
        mine: Ids of the trials that this process has taken.
    """

    path: Path
    mine: set[str] = field(default_factory=set)

    def open(self, spec: SweepSpec) -> None:
        """Makes the folder, or checks that it is the same sweep's.

        Raises:
            UserError: It is another sweep's: another command, method, or keys; of a random or bayes sweep, other
                values; of a bayes sweep, another metric. Or a config that trials ran with has changed since.
            RunError: It cannot be written.
        """
        with self._writing(), self.locked():
            record = self._read(self.path / "sweep.json") or {}
            metric = {"name": spec.metric, "goal": "maximize" if spec.maximize else "minimize"}
            self._check(record, spec, metric)
            if record.get("metric", metric)["name"] != spec.metric:
                self._read_metric_anew(spec.metric)
            write_text(self.path / "sweep.yaml", spec.text)
            files = {**record.get("files", {}), **spec.files()}
            content = {"identity": spec.identity(), "files": files, "ranges": spec.ranges(), "metric": metric}
            write_text(self.path / "sweep.json", json.dumps(content, indent=2) + "\n")

    def _check(self, record: dict[str, Any], spec: SweepSpec, metric: dict[str, Any]) -> None:
        """Refuses a sweep that is not the recorded one. What an earlier version did not record is not compared."""
        anew = "Give this one a name of its own: --name NEW."
        if record.get("identity", spec.identity()) != spec.identity():
            raise UserError(
                f"{self.path} is the folder of another sweep: the command, method or keys of {spec.path} have "
                f"changed. {anew}"
            )
        if changed := _changed(record.get("ranges", {}), spec.ranges()):
            raise UserError(
                f"{self.path} is the folder of another sweep: what a {spec.method} sweep draws from cannot change, and "
                f"{spec.path} has other values for {', '.join(changed)}. {anew}"
            )
        before = record.get("metric", metric)
        if spec.method == "bayes" and before != metric:
            raise UserError(
                f"{self.path} is the folder of another sweep: its trials were drawn to {before['goal']} "
                f"{before['name']}, and {spec.path} would {metric['goal']} {metric['name']}. {anew}"
            )
        if changed := _changed(record.get("files", {}), spec.files()):
            raise UserError(
                f"{', '.join(changed)} changed since trials of {self.path} ran with it; new trials would not be "
                f"comparable. Put it back, or start a sweep of its own: --name NEW."
            )

    def _read_metric_anew(self, metric: str | None) -> None:
        """Finished trials get the value of the metric that the file names now."""
        for trial in self.trials():
            if trial.status == FINISHED and trial.run is not None:
                trial.metric = None if metric is None else last_value(self.folder(trial) / trial.run, metric)
                self.write(trial)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process at a time look for trials and take them."""
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / "sweep.lock"):
            yield

    def folder(self, trial: Trial) -> Path:
        """Where a trial's run and log lie."""
        return self.path / "trials" / trial.id

    def trials(self) -> list[Trial]:
        """All trials that are recorded, by id."""
        files = sorted(self.path.glob(f"trials/*/{TRIAL}"))
        return [Trial(**content) for content in map(self._read, files) if content is not None]

    def write(self, trial: Trial) -> None:
        """Records a trial.

        Raises:
            RunError: It cannot be written, for instance because the disk is full.
        """
        with self._writing():
            self.folder(trial).mkdir(parents=True, exist_ok=True)
            write_text(self.folder(trial) / TRIAL, json.dumps(vars(trial), indent=2) + "\n")

    def take(self, trial: Trial) -> bool:
        """Takes a trial for this process, unless another one that lives has it. Only while locked."""
        if self._is_alive(trial):
            return False
        record = self._read(self.folder(trial) / TRIAL)
        if record is not None and (record["status"], record["attempts"]) != (trial.status, trial.attempts):
            return False  # another process ran it since the caller read the record
        trial.status, trial.attempts, trial.error, trial.host = RUNNING, trial.attempts + 1, None, socket.gethostname()
        self.write(trial)
        self._claim(trial)
        self.mine.add(trial.id)
        return True

    def started(self, trial: Trial, process: int) -> None:
        """Notes the process of a trial: while that lives, the trial is not free, whatever became of this one."""
        if self._is_mine(trial):
            self._claim(trial, process)

    def _claim(self, trial: Trial, *further: int) -> None:
        with self._writing():
            write_claim(self.folder(trial) / CLAIM, *further)

    def _is_mine(self, trial: Trial) -> bool:
        """Whether no other process has taken the trial since this one did."""
        claim = read_claim(self.folder(trial) / CLAIM)
        return claim is None or is_own(claim)

    def release(self, trial: Trial) -> None:
        """Records what became of a trial that this process had taken.

        If it gave no sign of life for long, another process may have taken the trial since. Then only an end that both
        would reach counts: what has finished stays finished, and anything else is the other's to record.
        """
        with self._writing(), self.locked():  # or one that looks for trials sees the old record, and no claim
            record = self._read(self.folder(trial) / TRIAL)
            ended = record is not None and record["status"] == FINISHED
            mine = self._is_mine(trial)
            if trial.status == FINISHED or (mine and not ended):
                self.write(trial)
            if mine:
                (self.folder(trial) / CLAIM).unlink(missing_ok=True)
        self.mine.discard(trial.id)

    def beat(self) -> None:
        """A sign of life for all trials of this process."""
        for name in tuple(self.mine):
            beat(self.path / "trials" / name / CLAIM)

    def is_taken(self, trial: Trial) -> bool:
        """Whether a process that lives, this or another, runs the trial."""
        return trial.id in self.mine or self._is_alive(trial)

    def _is_alive(self, trial: Trial) -> bool:
        return is_alive(self.folder(trial) / CLAIM, self.path / ".clock")

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        return read_record(path, "Delete its folder to run the trial again.")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"The sweep's folder {self.path} cannot be written: {error.strerror or error}. What is recorded there "
                f"stays; the same command goes on once it can."
            ) from error


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys of what was recorded before that are otherwise now."""
    return [key for key, value in now.items() if before.get(key, value) != value]


def elapsed(since: float) -> float:
    """Seconds since a time of `time.monotonic`, rounded."""
    return round(time.monotonic() - since, 1)
