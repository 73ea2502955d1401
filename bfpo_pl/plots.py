"""Figures: helpfulness against harmlessness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart by colour-blind readers too."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Point:
    """One model at one way of decoding.

    Args:
        helpfulness: Mean helpfulness on benign prompts, in [0, 1].
        harmlessness: Share of harmful prompts with a safe and well-formed answer, in [0, 1].
    """

    helpfulness: float
    harmlessness: float


def pareto_figure(models: Mapping[str, Sequence[Point]], decodings: Sequence[str], path: Path, title: str) -> None:
    """Draws models as points of helpfulness (x) and harmlessness (y) and writes a PNG.

    Args:
        models: For each model's name, its points, one for each way of decoding.
        decodings: Names of the ways of decoding, in the order of the points; the first is drawn filled.
        path: Where to.
        title: Of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6.4, 5.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between([0.9, 1.08], 0.9, 1.08, color="#009E73", alpha=0.10, linewidth=0)
    axes.text(0.885, 0.99, "helpful and safe", fontsize=9, color="#00664b", va="center", ha="right")
    handles = []
    for index, (name, points) in enumerate(models.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        xs, ys = [point.helpfulness for point in points], [point.harmlessness for point in points]
        axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.5, zorder=2)
        for place, (x, y) in enumerate(zip(xs, ys, strict=True)):
            face = colour if place == 0 else "white"
            # Earlier models larger, so that a later one on the same spot does not hide them.
            size = max(60, 260 - 70 * index)
            axes.scatter([x], [y], s=size, marker=marker, facecolor=face, edgecolor=colour, linewidth=1.6, zorder=3)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=8, label=name))
    for place, decoding in enumerate(decodings):
        face = "#555555" if place == 0 else "white"
        handles.append(
            Line2D([], [], marker="o", linestyle="", markerfacecolor=face, markeredgecolor="#555555", label=decoding)
        )
    axes.set(
        xlim=(-0.06, 1.08),
        ylim=(-0.06, 1.08),
        xlabel="helpfulness on benign prompts",
        ylabel="harmlessness on harmful prompts",
        title=title,
    )
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
