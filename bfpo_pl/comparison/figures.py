"""Figures of a comparison, as PNG files; told apart by colour-blind readers, with legends beside the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, ScalarFormatter

from bfpo_pl.comparison.analysis import LOSS, WORSE, Comparison, Row
from bfpo_pl.comparison.curves import Curves, one_parameter_curves
from bfpo_pl.comparison.statistics import Mean, mean_over
from bfpo_pl.comparison.tables import metric_names
from bfpo_pl.plots import COLOURS, MARKERS

FIGURES = ("front.png", "by_*.png", "margins.png", "training.png")
"""Names of all figures."""

MOST_COLOURS = 12
"""More groups than this cannot be told apart by colour and marker: the others are drawn grey."""

QUADRANTS = {  # chosen, rejected
    "safe_safe": "both safe",
    "safe_unsafe": "chosen safe, rejected unsafe",
    "unsafe_safe": "chosen unsafe, rejected safe",
    "unsafe_unsafe": "both unsafe",
}
_WIDTH = 9.0  # inches; a report is 900 pixels wide
_GREY = "#8a8a8a"
_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
_LEAST_SPAN = 0.1  # of shares; smaller differences are not worth a whole axis
_FAINT = "#b5b5b5"
_CHARACTERS = 126  # of a legend's row
_LEGEND_ROW = 0.19  # inches
_LARGE = 3.0  # margins beyond this would flatten those of the squared loss, which stay within 1 or so
_TICKS = [sign * size for sign in (-1, 1) for size in (0, 0.5, 1, 3, 10, 30, 100, 300)]
_FEW_POINTS = 4  # so few values of a course are marked: what lies between was not measured
_FEW = 6  # bands of more lines than this are fainter


@dataclass(frozen=True)
class Drawn:
    """A figure that was written.

    Args:
        path: The PNG.
        heading: What it shows.
        caption: How to read it.
    """

    path: Path
    heading: str
    caption: str


@dataclass(frozen=True)
class Style:
    """How one group is drawn."""

    colour: str
    marker: str
    line: Literal["-", "--", ":"]


def style(place: int) -> Style:
    """The style of the group at a place; colours repeat after seven, with another marker and line."""
    again = place // len(COLOURS)
    marker = MARKERS[(place + 3 * again) % len(MARKERS)]
    return Style(COLOURS[place % len(COLOURS)], marker, _LINES[again % len(_LINES)])


def draw_all(comparison: Comparison, folder: Path) -> list[Drawn]:
    """Draws every figure that the runs have data for.

    Args:
        comparison: What to draw.
        folder: Where to; it exists.
    """
    figures = []
    if comparison.pair:
        figures.append(_front(comparison, folder / "front.png"))
    for curves in one_parameter_curves(comparison):
        figures.append(_one_parameter(comparison, curves, folder / f"by_{curves.name.replace('/', '_')}.png"))
    figures += [each for each in (_margins(comparison, folder), _training(comparison, folder)) if each]
    return figures


def coloured(comparison: Comparison) -> list[Row]:
    """The groups that get a colour: all, or of many the baseline, the front and the best."""
    first = [row for row in comparison.rows if row.label == comparison.baseline]
    front = [row for row in comparison.rows if row.on_front]
    chosen = list({id(row): row for row in [*first, *front, *comparison.rows]}.values())[:MOST_COLOURS]
    return [row for row in comparison.rows if any(row is each for each in chosen)]


def restriction(comparison: Comparison) -> str:
    """Says in a caption that not all groups are shown; empty if they are."""
    shown, all_of_them = len(coloured(comparison)), len(comparison.rows)
    which = "baseline, front and best" if comparison.baseline else "the front and the best"
    return "" if shown == all_of_them else f" Of {all_of_them} groups, {shown} are shown: {which}."


def _front(comparison: Comparison, path: Path) -> Drawn:
    assert comparison.pair
    figure = Figure(figsize=(_WIDTH, 6.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    front = sorted((row for row in comparison.rows if row.on_front), key=lambda row: _point(comparison, row))
    xs, ys = zip(*(_point(comparison, row) for row in front), strict=True)
    axes.step(xs, ys, where="pre", color="#555555", linewidth=1.2, linestyle="--", zorder=1)
    chosen, handles = coloured(comparison), []
    numbered = len(chosen) < len(comparison.rows)
    for place, row in enumerate(comparison.rows):
        own = next((style(i) for i, each in enumerate(chosen) if each is row), Style(_FAINT, "o", "-"))
        face = _faded(own.colour, row.front_probability or 0.0)
        helpful, harmless = (row.means[key] for key in comparison.pair)
        axes.errorbar(
            [helpful.mean],
            [harmless.mean],
            xerr=[helpful.half_width or 0.0],
            yerr=[harmless.half_width or 0.0],
            color=own.colour,
            marker=own.marker,
            markersize=max(7.0, 11.0 - place) if own.colour != _FAINT else 6.0,  # none hides another on the same spot
            markerfacecolor=face,
            markeredgewidth=1.6,
            elinewidth=1.1,
            zorder=3 if own.colour != _FAINT else 2,
        )
        if numbered:
            where = (helpful.mean, harmless.mean)
            axes.annotate(
                str(place + 1), where, xytext=(6, 5), textcoords="offset points", fontsize=7.5, color="#444444"
            )
        if any(each is row for each in chosen):
            label = f"{place + 1}  {row.label}" if numbered else row.label
            handles.append(_handle(own, label, face))
    handles.append(Line2D([], [], color="#555555", linestyle="--", label="Pareto front of the means"))
    axes.set_xlim(*_limits([row.means[comparison.pair[0]] for row in comparison.rows]))
    axes.set_ylim(*_limits([row.means[comparison.pair[1]] for row in comparison.rows]))
    axes.set(xlabel="helpfulness", ylabel="harmlessness")
    _finish(figure, [axes], handles)
    figure.savefig(path)
    caption = (
        f"Means over seeds with 95 % intervals (Student's t); {comparison.pair[0]} and {comparison.pair[1]}. "
        "The fuller a marker, the more often its group is on the front when seeds are drawn again (white: never)."
    )
    if numbered:
        caption += " Numbers are rows of the table; groups without a colour are grey."
    return Drawn(path, "Helpfulness against harmlessness", caption)


def _one_parameter(comparison: Comparison, curves: Curves, path: Path) -> Drawn:
    names = metric_names(comparison)
    keys = [*comparison.pair, WORSE] if comparison.pair else comparison.metrics[:3]
    figure = Figure(figsize=(_WIDTH, 3.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False, sharex=True)[0]
    lines = list(curves.lines.items())[:MOST_COLOURS]
    for axes, key in zip(panels, keys, strict=True):
        for place, (_, points) in enumerate(lines):
            own = style(place)
            usable = [(x, row.means[key]) for x, row in points if row.means[key].n]
            _band(axes, [x for x, _ in usable], [mean for _, mean in usable], own, own.marker)
        axes.set_title(names[key], fontsize=10)
        axes.set_xlabel(curves.name)
        if curves.logarithmic:
            axes.set_xscale("log")
        means = [row.means[key] for _, points in lines for _, row in points if row.means[key].n]
        if _are_shares(means):
            axes.set_ylim(*_limits(means))
    handles = [_handle(style(i), label or "all else equal", None) for i, (label, _) in enumerate(lines)]
    _finish(figure, panels, handles if len(lines) > 1 else [])
    figure.savefig(path)
    rest = f" Of {len(curves.lines)} lines, {len(lines)} are shown." if len(lines) < len(curves.lines) else ""
    caption = f"Mean over seeds and 95 % interval, over {curves.key}; nothing else differs along a line.{rest}"
    return Drawn(path, f"Over {curves.name}", caption)


def _margins(comparison: Comparison, folder: Path) -> Drawn | None:
    keys = {f"train/all/{quadrant}/reward_margin": title for quadrant, title in QUADRANTS.items()}
    known = {key: title for key, title in keys.items() if any(key in run.series for run in comparison.runs)}
    if not known:
        return None
    figure = Figure(figsize=(_WIDTH, 6.2), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    chosen = coloured(comparison)
    for axes, (key, title) in zip(panels, keys.items(), strict=True):
        drawn = [_over_steps(axes, row, key, style(place)) for place, row in enumerate(chosen)]
        axes.set_title(title, fontsize=10)
        if any(drawn):
            axes.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
            if max(map(abs, axes.get_ylim())) > _LARGE:
                axes.set_yscale("symlog", linthresh=1.0, linscale=1.0)
                axes.yaxis.set_major_locator(FixedLocator(_TICKS))
                axes.yaxis.set_major_formatter(ScalarFormatter())
        else:
            axes.text(0.5, 0.5, "no such pairs", transform=axes.transAxes, ha="center", va="center", color=_GREY)
            axes.set_yticks([])
    _label_outside(panels, 2, "optimizer step", "reward margin")
    _finish(figure, panels, [_handle(style(i), row.label, None, line=True) for i, row in enumerate(chosen)])
    path = folder / "margins.png"
    figure.savefig(path)
    caption = (
        "Reward of the chosen minus that of the rejected response in training batches, mean and 95 % interval over "
        "seeds. Above 0 the model prefers the more helpful response; where margins are large, the axis is logarithmic "
        "beyond 1 and -1. Pairs are sorted by the flags that training saw: "
        "where flags are noisy, wrong ones among them." + restriction(comparison)
    )
    return Drawn(path, "Reward margins by safety of the pair", caption)


def _training(comparison: Comparison, folder: Path) -> Drawn | None:
    pair = comparison.pair or ()
    keys = {LOSS: "validation loss", **{_in_training(key): key.rpartition("/")[2] for key in pair}}
    if any(_in_training(key) != key for key in pair):
        keys = {key: title if key == LOSS else f"{title} on validation prompts" for key, title in keys.items()}
    keys = {key: title for key, title in keys.items() if any(key in run.series for run in comparison.runs)}
    if not keys:
        return None
    figure = Figure(figsize=(_WIDTH, 3.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    chosen = coloured(comparison)
    for axes, (key, title) in zip(panels, keys.items(), strict=True):
        for place, row in enumerate(chosen):
            _over_steps(axes, row, key, style(place))
        if key != LOSS:
            _limit_bands(axes, [row.means[each] for row in chosen for each in pair])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
    _finish(figure, panels, [_handle(style(i), row.label, None, line=True) for i, row in enumerate(chosen)])
    path = folder / "training.png"
    figure.savefig(path)
    caption = (
        "Mean and 95 % interval over seeds, at the steps that all runs of a group have. Losses of different "
        "labelings or loss functions have different zeros; compare their courses, not their heights."
        + restriction(comparison)
    )
    return Drawn(path, "Training", caption)


def _in_training(key: str) -> str:
    """The column that follows a metric of held-out prompts during training: that of validation prompts."""
    return f"val/{key.removeprefix('test/')}" if key.startswith("test/") else key


def _over_steps(axes: Axes, row: Row, key: str, own: Style) -> bool:
    """Draws a metric of a group over training; false if the group has none."""
    courses = []
    for run in row.group.runs:
        series = run.series.get(key)
        if series:
            courses.append({step: v for step, v in zip(series.steps, series.values, strict=True) if v == v})
    if not courses:
        return False
    steps = sorted(set.intersection(*(set(course) for course in courses)))
    _band(axes, steps, [mean_over([course[step] for course in courses]) for step in steps], own)
    return bool(steps)


def _band(axes: Axes, xs: Sequence[float], means: Sequence[Mean], own: Style, marker: str = "") -> None:
    single = marker or ("o" if len(xs) <= _FEW_POINTS else "")
    axes.plot(xs, [mean.mean for mean in means], own.line, color=own.colour, marker=single, markersize=5, linewidth=1.6)
    low = [mean.mean - (mean.half_width or 0.0) for mean in means]
    high = [mean.mean + (mean.half_width or 0.0) for mean in means]
    alpha = 0.15 if len(axes.lines) <= _FEW else 0.07
    axes.fill_between(xs, low, high, color=own.colour, alpha=alpha, linewidth=0)


def _point(comparison: Comparison, row: Row) -> tuple[float, float]:
    assert comparison.pair
    return row.means[comparison.pair[0]].mean, row.means[comparison.pair[1]].mean


def _faded(colour: str, share: float) -> tuple[float, float, float]:
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _handle(own: Style, label: str, face: Any, line: bool = False) -> Line2D:
    return Line2D(
        [],
        [],
        color=own.colour,
        marker="" if line else own.marker,
        linestyle=own.line if line or face is None else "",
        markersize=8,
        markerfacecolor=own.colour if face is None else face,
        label=label,
    )


def _limits(means: Sequence[Mean]) -> tuple[float, float]:
    """Limits that show all intervals; of shares, only what of them lies in [0, 1]."""
    low = min(mean.mean - (mean.half_width or 0.0) for mean in means)
    high = max(mean.mean + (mean.half_width or 0.0) for mean in means)
    if _are_shares(means):
        low, high = max(low, 0.0), min(high, 1.0)
        low = max(0.0, min(low, (low + high - _LEAST_SPAN) / 2))
        high = min(1.0, max(high, low + _LEAST_SPAN))
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _limit_bands(axes: Axes, means: Sequence[Mean]) -> None:
    """Keeps bands of shares from stretching the axis far beyond [0, 1]."""
    if _are_shares(means):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.04), min(high, 1.04))


def _are_shares(means: Sequence[Mean]) -> bool:
    return all(0.0 <= mean.mean <= 1.0 for mean in means if mean.n)


def _label_outside(panels: Sequence[Axes], columns: int, x: str, y: str) -> None:
    for place, axes in enumerate(panels):
        if place >= len(panels) - columns:
            axes.set_xlabel(x)
        if place % columns == 0:
            axes.set_ylabel(y)


def _finish(figure: Figure, panels: Sequence[Axes], handles: Sequence[Line2D]) -> None:
    for axes in panels:
        axes.grid(color="#e2e2e2", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        rows = math.ceil(len(handles) / max(1, min(5, _CHARACTERS // (longest + 6))))
        columns = math.ceil(len(handles) / rows)
        figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - 2))  # or it takes the panels' room
        figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
