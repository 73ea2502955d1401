"""Runs and sweeps on disk → plain records. Nothing is computed here, and no model is loaded."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bfpo_pl.component import UserError
from bfpo_pl.sweep.spec import grid, read_spec
from bfpo_pl.sweep.store import trial_id

CONFIG, METRICS, SAMPLES, STATUS, ENVIRONMENT = (
    "config.yaml",
    "metrics.csv",
    "samples.jsonl",
    "status.json",
    "environment.json",
)
SWEEP, TRIALS, TRIAL = "sweep.yaml", "trials", "trial.json"
FINISHED = "finished"

_NAMED = 4
_DEPTH = 4
"""Folders of runs are looked for so far below the one that is named."""


@dataclass(frozen=True)
class Series:
    """One metric over a run.

    Args:
        steps: Optimizer steps, in the order of the file.
        values: The metric at each.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    Args:
        folder: Its folder.
        config: Its resolved config, flat: dotted keys, lists of plain values as they are.
        series: Its metrics by column.
        environment: Versions, revision and, of a sweep's trial, the machine (``host``).
        parameters: Keys that a sweep set in it.
    """

    folder: Path
    config: dict[str, Any]
    series: dict[str, Series]
    environment: dict[str, Any]
    parameters: frozenset[str] = frozenset()

    @property
    def seed(self) -> int | None:
        """What replicates differ in: ``seed_everything``; None if the run drew its own."""
        seed = self.config.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def experiment(self) -> str:
        return str(self.config.get("experiment") or self.folder.parent.name)

    @property
    def name(self) -> str:
        """The run as people speak of it: ``<experiment>/<time>-<id>``."""
        return f"{self.folder.parent.name}/{self.folder.name}"


@dataclass(frozen=True)
class LeftOut:
    """A run or trial that is not compared.

    Args:
        name: Of the run or trial.
        reason: Why.
    """

    name: str
    reason: str


@dataclass
class Reading:
    """What was found.

    Args:
        title: What the comparison is of.
        runs: The finished runs.
        left_out: The others.
        metrics: What the sweeps optimise, if some were named.
        sweep: The sweep's folder, if one was named and nothing else.
    """

    title: str
    runs: list[RunRecord] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    sweep: Path | None = None


def read(paths: Iterable[str], wanted: Callable[[str], bool] = lambda key: True) -> Reading:
    """Reads runs, folders of runs and sweeps.

    Args:
        paths: Folders; each run is taken once, however often it is named.
        wanted: Which columns of the metrics to keep.

    Raises:
        UserError: A folder is missing, a file is broken, or there is no finished run.
    """
    named = [Path(path).expanduser() for path in paths]
    reading = Reading(_title(named))
    seen: set[Path] = set()
    for path in named:
        if not path.is_dir():
            raise UserError(f"There is no folder '{path}'. Name runs, folders of runs, or a sweep.")
        all_found = list(_runs_below(path, _DEPTH))
        if not all_found:
            raise UserError(f"'{path}' holds no run: neither it nor a folder below it has a {CONFIG} of bfpo fit.")
        for found in all_found:
            if is_sweep(found):
                _add_sweep(reading, found, seen, wanted)
            elif found.resolve() not in seen:
                seen.add(found.resolve())
                _add(reading, found, _unfinished(found), wanted)
    if len(named) == 1 and is_sweep(named[0]):
        reading.sweep = named[0]
    if not reading.runs:
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in reading.left_out[:5])
        raise UserError(f"There is no finished run to compare ({reasons or 'no trials'}).")
    return reading


def _title(folders: Sequence[Path]) -> str:
    """Names of experiments and sweeps; runs are named with their experiment."""
    names = []
    for folder in (each.resolve() for each in folders[:_NAMED]):
        names.append(f"{folder.parent.name}/{folder.name}" if (folder / CONFIG).is_file() else folder.name)
    more = f" and {len(folders) - _NAMED} more" if len(folders) > _NAMED else ""
    return ", ".join(names) + more


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / SWEEP).is_file() and (folder / TRIALS).is_dir()


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The sample answers of a run, in the order of the file; none if it kept none.

    Raises:
        UserError: A line is no JSON object.
    """
    file = folder / SAMPLES
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}, is no JSON object. Remove the line to compare the run.")
        rows.append(row)
    return rows


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / CONFIG).is_file() or is_sweep(folder):
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _runs_below(child, depth - 1)


def _add_sweep(reading: Reading, folder: Path, seen: set[Path], wanted: Callable[[str], bool]) -> None:
    spec = read_spec(folder / SWEEP)
    reading.metrics += [spec.metric] if spec.metric and spec.metric not in reading.metrics else []
    combinations = {trial_id(parameters) for parameters in grid(spec)} if spec.method == "grid" else None
    for trial in sorted((folder / TRIALS).iterdir()):
        if combinations is None or trial.name in combinations:
            _add_trial(reading, trial, seen, wanted)
        elif (trial / TRIAL).is_file():
            reading.left_out.append(
                LeftOut(f"trial {trial.name} of {folder.name}", "its values are no longer in the sweep file")
            )


def _add_trial(reading: Reading, trial: Path, seen: set[Path], wanted: Callable[[str], bool]) -> None:
    if not (trial / TRIAL).is_file():
        return
    record = _json(trial / TRIAL)
    name = f"trial {record.get('id', trial.name)} of {trial.parent.parent.name}"
    status, run = record.get("status"), record.get("run")
    folder = trial / run if run else None
    if folder is not None and folder.resolve() in seen:
        return
    if status != FINISHED:
        error = " ".join(str(record.get("error") or "").split())[:300]
        reading.left_out.append(LeftOut(name, f"{status or 'without a status'}{': ' + error if error else ''}"))
    elif folder is None:
        reading.left_out.append(LeftOut(name, "it left no run; programs other than bfpo fit leave none to compare"))
    elif not (folder / CONFIG).is_file():
        reading.left_out.append(LeftOut(name, f"its run '{run}' is not there"))
    else:
        seen.add(folder.resolve())
        machine = {"host": record.get("host")}
        _add(reading, folder, None, wanted, frozenset(record.get("parameters") or {}), machine)


def _add(
    reading: Reading,
    folder: Path,
    reason: str | None,
    wanted: Callable[[str], bool],
    parameters: frozenset[str] = frozenset(),
    machine: dict[str, Any] | None = None,
) -> None:
    name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
    if reason is None and not (folder / METRICS).is_file():
        reason = f"it has no {METRICS}"
    if reason is not None:
        reading.left_out.append(LeftOut(name, reason))
        return
    environment = {**(_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).is_file() else {}), **(machine or {})}
    series = read_series(folder / METRICS, wanted)
    reading.runs.append(RunRecord(folder.resolve(), _config(folder / CONFIG), series, environment, parameters))


def _unfinished(folder: Path) -> str | None:
    """Why a run is not finished; None if it is."""
    if not (folder / STATUS).is_file():
        return f"it has no {STATUS}, so it cannot be told whether it finished"
    status = _json(folder / STATUS)
    if status.get("state") == FINISHED:
        return None
    reason = " ".join(str(status.get("reason") or "").split())[:300]
    step = f" at step {status['step']}" if status.get("step") is not None else ""
    return f"{status.get('state')}{step}{': ' + reason if reason else ''}"


def read_series(file: Path, wanted: Callable[[str], bool]) -> dict[str, Series]:
    """Reads the metrics of a run; empty cells are no values.

    Args:
        file: ``metrics.csv``.
        wanted: Which columns to keep.

    Raises:
        UserError: A cell is no number, or there is no column ``step``.
    """
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        if "step" not in header:
            raise UserError(f"{file} has no column 'step'; it is not the file of metrics of a run.")
        place = header.index("step")
        columns = [(i, key, Series()) for i, key in enumerate(header) if i != place and wanted(key)]
        for number, row in enumerate(rows, 2):
            try:
                step = int(float(row[place]))
                for i, _, series in columns:
                    if i < len(row) and row[i]:
                        series.values.append(float(row[i]))
                        series.steps.append(step)
            except (ValueError, IndexError) as error:
                raise UserError(f"{file}, line {number}: {error}. The file is broken; leave the run out.") from error
    return {key: series for _, key, series in columns if series.steps}


def last_value(series: Series | None, until: int | None = None) -> float | None:
    """The last value of a metric, or the last one not after a step; None if there is none."""
    if series is None:
        return None
    pairs = zip(reversed(series.steps), reversed(series.values), strict=True)
    return next((value for step, value in pairs if until is None or step <= until), None)


def step_of_extreme(series: Series | None, sign: int) -> int | None:
    """The first step at which a metric is largest (``sign`` 1) or smallest (-1); None if it has no finite value."""
    if series is None:
        return None
    pairs = [(sign * v, -step) for step, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
    return -max(pairs)[1] if pairs else None


def _config(file: Path) -> dict[str, Any]:
    return flat(_yaml(file))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain data with dotted keys; lists of plain values stay lists, other lists get indexes.

    Args:
        config: Dictionaries, lists and plain values.
        prefix: Key of the whole.
    """
    items: Iterable[tuple[Any, Any]] | None = None
    if isinstance(config, dict):  # an empty one says nothing
        items = config.items()
    elif isinstance(config, list) and any(isinstance(each, dict | list) for each in config):
        items = enumerate(config)
    if items is None:
        return {prefix: config}
    result: dict[str, Any] = {}
    for key, value in items:
        result.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return result


def _yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        loaded = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file} must hold keys and values.")
    return loaded


def _json(file: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{file} must hold a JSON object.")
    return loaded
