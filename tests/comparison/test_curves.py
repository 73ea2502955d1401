"""Which one-parameter curves a comparison has."""

from __future__ import annotations

from pathlib import Path

from run_folders import config

from bfpo_pl.comparison.analysis import Question, analyse
from bfpo_pl.comparison.curves import one_parameter_curves
from bfpo_pl.comparison.figures import style
from bfpo_pl.comparison.reading import Reading, RunRecord, Series, flat


def comparison_of(*settings):
    runs = []
    for place, each in enumerate(settings):
        series = {"val/all/all/loss": Series([1], [float(place)])}
        runs.append(RunRecord(Path(f"runs/bfpo/{place}"), flat(config(0, **each)), series, {}))
    return analyse(Reading("title", runs), Question())


def lines_of(curves):
    return {label: [x for x, _ in points] for label, points in curves.lines.items()}


def test_a_grid_has_lines_over_each_number():
    grid = comparison_of(*({"alpha": alpha, "tau": tau} for tau in (5.0, 0.1, 0.5) for alpha in (1.0, 0.0, 0.5)))
    alpha, tau = one_parameter_curves(grid)
    assert (alpha.name, alpha.logarithmic) == ("alpha", False)  # 0 has no logarithm
    assert lines_of(alpha) == {f"tau={value}": [0.0, 0.5, 1.0] for value in ("0.1", "0.5", "5")}
    assert list(alpha.lines) == ["tau=0.1", "tau=0.5", "tau=5"]
    assert tau.logarithmic
    assert [row.label for _, row in tau.lines["alpha=0"]] == ["alpha=0 tau=0.1", "alpha=0 tau=0.5", "alpha=0 tau=5"]


def test_groups_that_differ_in_something_else_are_on_no_line():
    mixed = comparison_of(
        *({"alpha": alpha} for alpha in (0.0, 0.5, 1.0)), {"labeling": "Linear", "w": 0.5}, {"alpha": 0.5, "b1": 2.0}
    )
    (alpha,) = one_parameter_curves(mixed)
    assert list(lines_of(alpha).values()) == [[0.0, 0.5, 1.0]]


def test_two_values_are_a_line_only_if_nothing_else_differs():
    assert [curves.name for curves in one_parameter_curves(comparison_of({"tau": 0.1}, {"tau": 0.5}))] == ["tau"]
    assert one_parameter_curves(comparison_of({"tau": 0.1}, {"tau": 0.5, "b1": 2.0})) == []


def test_no_two_of_the_coloured_groups_look_alike():
    assert len({style(place) for place in range(14)}) == 14
    assert len({(style(place).colour, style(place).line) for place in range(14)}) == 14
