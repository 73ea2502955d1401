"""Which trial is next: the combinations of a grid, or what Optuna draws."""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from typing import Any

from bfpo_pl.component import UserError
from bfpo_pl.sweep.spec import Parameter, SweepSpec, grid
from bfpo_pl.sweep.store import FINISHED, SweepFolder, Trial, trial_id

RETRIED = "retry of"
"""Attribute of a trial in Optuna's study: the number of the one that failed before with the same values."""


class Plan(ABC):
    """The trials of a sweep, in the order in which they are to run."""

    total: int
    """How many there are in all."""

    @abstractmethod
    def next_trial(self, known: list[Trial]) -> Trial | None:
        """A trial that is not recorded yet; None if all are. Only while the folder is locked.

        Args:
            known: Those that are recorded.
        """

    def tell(self, trial: Trial) -> None:  # noqa: B027
        """Learns what became of a trial."""

    def includes(self, trial: Trial) -> bool:
        """Whether a recorded trial is one of this sweep file's."""
        return True


class Grid(Plan):
    """All combinations.

    Args:
        spec: The sweep.
        limit: Most trials; the first of the grid.
    """

    def __init__(self, spec: SweepSpec, limit: int | None) -> None:
        self._combinations = {trial_id(parameters): parameters for parameters in grid(spec)}
        if limit is not None:
            self._combinations = dict(list(self._combinations.items())[:limit])
        self.total = len(self._combinations)

    def next_trial(self, known: list[Trial]) -> Trial | None:
        there = {trial.id for trial in known}
        return next((Trial(name, values) for name, values in self._combinations.items() if name not in there), None)

    def includes(self, trial: Trial) -> bool:
        return trial.id in self._combinations


class Drawn(Plan):
    """What Optuna draws: at random, or by its tree-structured Parzen estimator from the trials so far.

    Args:
        spec: The sweep.
        folder: The sweep's folder, which keeps Optuna's journal.
        limit: Number of trials.

    Raises:
        UserError: Optuna is not installed, or no number of trials is given.
    """

    def __init__(self, spec: SweepSpec, folder: SweepFolder, limit: int | None) -> None:
        if limit is None:
            raise UserError(f"{spec.path}: method {spec.method} has no end; set run_cap in the file, or --trials.")
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise UserError(f"method {spec.method} needs Optuna: pip install 'bfpo_pl[sweep]'.") from error
        optuna.logging.set_verbosity(logging.WARNING)
        self.total, self._spec, self._seed = limit, spec, zlib.crc32(spec.identity().encode())
        self._study = optuna.create_study(
            study_name=spec.name,
            storage=JournalStorage(JournalFileBackend(str(folder.path / "optuna.journal"))),
            direction="maximize" if spec.maximize else "minimize",
            load_if_exists=True,
        )

    def next_trial(self, known: list[Trial]) -> Trial | None:
        if len(known) >= self.total:
            return None
        import optuna

        seed = self._seed + len(known)  # a sweep that was killed draws what it would have drawn
        bayes = self._spec.method == "bayes"
        self._study.sampler = (
            optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            if bayes
            else optuna.samplers.RandomSampler(seed=seed)
        )
        drawn = self._study.ask()
        values = {key: _drawn_value(drawn, key, parameter) for key, parameter in self._spec.parameters.items()}
        return Trial(f"{len(known):05d}-{trial_id(values)}", values, drawn=drawn.number)

    def tell(self, trial: Trial) -> None:
        if trial.drawn is None:
            return
        from optuna.trial import TrialState

        good = trial.status == FINISHED and trial.metric is not None
        if good and self._study.get_trials(deepcopy=False)[trial.drawn].state == TrialState.FAIL:
            self._add(trial)
            return
        self._study.tell(
            trial.drawn,
            trial.metric if good else None,
            state=TrialState.COMPLETE if good else TrialState.FAIL,
            skip_if_finished=True,
        )

    def _add(self, trial: Trial) -> None:
        """Adds a trial that failed before and has now finished: Optuna changes none that has ended."""
        from optuna.trial import create_trial

        known = self._study.get_trials(deepcopy=False)
        if any(each.user_attrs.get(RETRIED) == trial.drawn for each in known):
            return
        drawn = next(each for each in known if each.number == trial.drawn)
        again = create_trial(
            params=drawn.params,
            distributions=drawn.distributions,
            value=trial.metric,
            user_attrs={RETRIED: trial.drawn},
        )
        self._study.add_trial(again)


def plan_of(spec: SweepSpec, folder: SweepFolder, limit: int | None) -> Plan:
    """The plan of a sweep file.

    Args:
        spec: The sweep.
        folder: Its folder.
        limit: Most trials; the file's run_cap by default.
    """
    limit = spec.run_cap if limit is None else limit
    return Grid(spec, limit) if spec.method == "grid" else Drawn(spec, folder, limit)


def _drawn_value(drawn: Any, key: str, parameter: Parameter) -> Any:
    if len(parameter.values) == 1:
        return parameter.values[0]
    if parameter.values:
        return parameter.values[drawn.suggest_categorical(key, list(range(len(parameter.values))))]
    if parameter.distribution == "int_uniform":
        return drawn.suggest_int(key, int(parameter.low), int(parameter.high))
    log = parameter.distribution == "log_uniform_values"
    return drawn.suggest_float(key, parameter.low, parameter.high, log=log, step=parameter.step)
