"""Groups of runs → means, intervals, differences and the front: everything that tables and figures show."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bfpo_pl.comparison.grouping import Group, differing_keys, group_of, group_runs, rename
from bfpo_pl.comparison.pareto import front_probability, on_front
from bfpo_pl.comparison.provenance import notes
from bfpo_pl.comparison.reading import LeftOut, Reading, RunRecord, last_value, step_of_extreme
from bfpo_pl.comparison.statistics import Difference, Mean, difference, holm, mean_over
from bfpo_pl.component import UserError

WORSE = "min(helpfulness, harmlessness)"
"""The worse of the two: a model that refuses all, or complies with all, scores 0."""

LOSS = "val/all/all/loss"
_PAIRS = tuple(
    (f"{split}/microworld/greedy/helpfulness", f"{split}/microworld/greedy/harmlessness") for split in ("test", "val")
)


@dataclass(frozen=True)
class Question:
    """What is asked of the runs.

    Args:
        helpfulness: Column of helpfulness. Default: the microworld's, on held-out prompts if all runs have it.
        harmlessness: Column of harmlessness.
        metrics: Further columns.
        at: ``last``, ``best:COLUMN`` or ``least:COLUMN``: the step at which metrics are taken.
        baseline: Label of the group that the others are compared with.
        names: ``label=new`` for labels.

    Raises:
        UserError: ``at`` is none of these, or only one of the pair is named.
    """

    helpfulness: str | None = None
    harmlessness: str | None = None
    metrics: tuple[str, ...] = ()
    at: str = "last"
    baseline: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kind, sign, column = self.at.partition(":")
        if self.at != "last" and not (kind in ("best", "least") and sign and column):
            raise UserError(f"--at must be last, best:COLUMN or least:COLUMN, not '{self.at}'.")
        if (self.helpfulness is None) != (self.harmlessness is None):
            raise UserError("--helpfulness and --harmlessness go together: name both columns, or neither.")

    def needs(self, column: str) -> bool:
        """Whether a column of the metrics can be of use: what only training logs is left, reward margins aside."""
        named = (*self.metrics, self.helpfulness, self.harmlessness, self.at.partition(":")[2])
        return not column.startswith("train/") or column.endswith("/reward_margin") or column in named


@dataclass
class Row:
    """A group with what came of it.

    Args:
        group: The group.
        values: For each metric, its value by seed.
        means: For each metric, its mean over seeds.
        differences: For each metric, group minus baseline; empty for the baseline and without one.
        on_front: Whether its means are on the Pareto front; None without helpfulness and harmlessness.
        front_probability: How often they are when seeds are drawn again.
    """

    group: Group
    values: dict[str, dict[Hashable, float]]
    means: dict[str, Mean]
    differences: dict[str, Difference] = field(default_factory=dict)
    on_front: bool | None = None
    front_probability: float | None = None

    @property
    def label(self) -> str:
        return self.group.label


@dataclass
class Comparison:
    """The answer.

    Args:
        title: What was compared.
        rows: The groups, the best first.
        metrics: Columns, in the order in which they are shown.
        pair: Helpfulness and harmlessness, if the runs have them.
        baseline: Label of the baseline.
        at: When metrics were taken.
        keys: What differs between the groups' configs.
        left_out: Runs and trials that are not in it.
        notes: What a reader should know before believing the figures.
    """

    title: str
    rows: list[Row]
    metrics: list[str]
    pair: tuple[str, str] | None
    baseline: str | None
    at: str
    keys: list[str]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[RunRecord]:
        return [run for row in self.rows for run in row.group.runs]


def analyse(reading: Reading, question: Question) -> Comparison:
    """Answers a question about runs.

    Args:
        reading: The runs.
        question: What is asked.

    Raises:
        UserError: A metric or a group does not exist.
    """
    pair = _pair(reading.runs, question)
    metrics = [*(pair or ()), *question.metrics]
    for metric in () if question.metrics else reading.metrics:
        if any(metric in run.series for run in reading.runs) and not (pair and _is_worse_of(pair, metric)):
            metrics.append(metric)
    metrics = list(dict.fromkeys(metrics or [LOSS]))
    _check_columns(reading.runs, [*metrics, *filter(None, [question.at.partition(":")[2]])])
    left_out, values = list(reading.left_out), {}
    for run in reading.runs:
        taken = _values(run, metrics, question.at)
        reason = taken if isinstance(taken, str) else _unusable(taken, pair or metrics[:1])
        if reason is not None or isinstance(taken, str):
            left_out.append(LeftOut(run.name, str(reason)))
        else:
            values[run.folder] = taken
    runs = [run for run in reading.runs if run.folder in values]
    if not runs:
        raise UserError(f"No run can be compared. {left_out[-1].name}: {left_out[-1].reason}.")
    groups, repeats = group_runs(runs)
    rename(groups, question.names)
    if pair:
        for each in values.values():
            each[WORSE] = min(each[pair[0]], each[pair[1]])
        metrics.insert(2, WORSE)
    rows = [_row(group, metrics, values) for group in groups]
    if question.baseline is not None:
        _compare(rows, group_of(groups, question.baseline, "--baseline"), metrics)
    if pair:
        _front(rows, pair)
        rows.sort(key=lambda row: -row.means[WORSE].mean)
    keys = differing_keys(groups)
    return Comparison(
        reading.title, rows, metrics, pair, question.baseline, question.at, keys, left_out + repeats,
        _fallback(reading.runs, pair, question) + notes(groups, question.baseline is not None),
    )  # fmt: skip


def _pair(runs: Sequence[RunRecord], question: Question) -> tuple[str, str] | None:
    if question.helpfulness and question.harmlessness:
        return question.helpfulness, question.harmlessness
    held_out, validation = _PAIRS
    if all(column in run.series for run in runs for column in held_out):
        return held_out
    return validation if any(column in run.series for run in runs for column in validation) else None


def _fallback(runs: Sequence[RunRecord], pair: tuple[str, str] | None, question: Question) -> list[str]:
    """Says that validation prompts are compared although some runs were judged on held-out ones."""
    held_out, validation = _PAIRS
    lacking = sum(not all(column in run.series for column in held_out) for run in runs)
    if question.helpfulness or pair != validation or lacking == len(runs):
        return []
    have = "has" if lacking == 1 else "have"
    return [f"{lacking} of {len(runs)} runs {have} no {' or '.join(held_out)}; validation prompts are compared."]


def _is_worse_of(pair: tuple[str, str], metric: str) -> bool:
    """Whether a metric is the microworld's minimum of the pair, which is shown anyhow, on prompts of any split."""
    own = {re.sub("^(test|val)/", "", column.rpartition("/")[0]) for column in pair}
    return metric.endswith("/both") and own == {re.sub("^(test|val)/", "", metric.removesuffix("/both"))}


def _check_columns(runs: Sequence[RunRecord], columns: Iterable[str]) -> None:
    known = sorted({key for run in runs for key in run.series})
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, 3, 0.4) or known[:3]
            raise UserError(f"No run has the metric '{column}'. Near it: {', '.join(near) or 'none at all'}.")


def _values(run: RunRecord, metrics: Sequence[str], at: str) -> dict[str, float] | str:
    """A run's metrics, without those that it lacks; or why there are none."""
    kind, _, column = at.partition(":")
    step = None
    if column:
        step = step_of_extreme(run.series.get(column), 1 if kind == "best" else -1)
        if step is None:
            return f"it has no value of {column}"
    taken = {key: last_value(run.series.get(key), step) for key in metrics}
    return {key: value for key, value in taken.items() if value is not None}


def _unusable(values: dict[str, float], needed: Sequence[str]) -> str | None:
    for key in needed:
        if key not in values:
            return f"it has no value of {key}"
        if not math.isfinite(values[key]):
            return f"{key} is {values[key]}"
    return None


def _row(group: Group, metrics: Sequence[str], values: dict) -> Row:
    by_seed: dict[str, dict[Hashable, float]] = {
        key: {
            seed: values[run.folder][key]
            for seed, run in group.replicates.items()
            if math.isfinite(values[run.folder].get(key, math.nan))
        }
        for key in metrics
    }
    return Row(group, by_seed, {key: mean_over(list(each.values())) for key, each in by_seed.items()})


def _compare(rows: Sequence[Row], baseline: Group, metrics: Sequence[str]) -> None:
    base = next(row for row in rows if row.group is baseline)
    others = [row for row in rows if row is not base]
    for key in metrics:
        differences = [difference(row.values[key], base.values[key]) for row in others]
        corrected = holm([each.p for each in differences])
        for row, each, p in zip(others, differences, corrected, strict=True):
            row.differences[key] = Difference(each.mean, each.half_width, each.p, each.n, each.paired, p)


def _front(rows: Sequence[Row], pair: tuple[str, str]) -> None:
    means = np.array([[row.means[key].mean for row in rows] for key in pair])
    both = [
        {seed: (row.values[pair[0]][seed], row.values[pair[1]][seed]) for seed in row.values[pair[0]]} for row in rows
    ]
    for row, front, share in zip(rows, on_front(*means), front_probability(both), strict=True):
        row.on_front, row.front_probability = bool(front), float(share)
