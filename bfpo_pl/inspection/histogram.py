"""Histograms of lengths: in a line of a terminal, and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bfpo_pl.inspection.lengths import WHOLE_ROW, Lengths
from bfpo_pl.plots import COLOURS

_BLOCKS = " ▁▂▃▄▅▆▇█"  # the first stands for no value at all
_BINS = 40
_COLOURS = {
    "prompt": "#777777",
    "chosen": COLOURS[0],
    "response": COLOURS[0],
    "rejected": COLOURS[1],
    WHOLE_ROW: COLOURS[2],
}


def line(values: np.ndarray, width: int) -> str:
    """A histogram as one line of blocks, from the least value to the largest.

    Args:
        values: ``[N]``, whole numbers.
        width: Most characters.
    """
    low, high = int(values.min()), int(values.max())
    counts, _ = np.histogram(values, bins=min(width, high - low + 1), range=(low - 0.5, high + 0.5))
    heights = np.ceil(counts / counts.max() * (len(_BLOCKS) - 1)).astype(int)
    return "".join(_BLOCKS[height] for height in heights)


def figure(splits: Mapping[tuple[str, str], Lengths], path: Path) -> None:
    """Draws the lengths of all splits and writes a PNG: a line of panels for each, of prompts, responses and rows.

    Args:
        splits: Lengths by stream and split.
        path: Where to.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    kinds = {"prompt": ("prompt",), "response": ("chosen", "rejected", "response"), WHOLE_ROW: (WHOLE_ROW,)}
    whole = Figure(figsize=(8.0, 1.0 + 1.75 * len(splits)), dpi=150, layout="constrained")
    panels = whole.subplots(len(splits), len(kinds), squeeze=False, sharex="col")
    edges = {}
    for kind, parts in kinds.items():
        largest = max(int(each.parts[part].max()) for each in splits.values() for part in parts if part in each.parts)
        step = max(1, -(-(largest + 1) // _BINS))
        edges[kind] = np.arange(0, largest + step + 1, step) - 0.5
    for ((stream, split), lengths), row in zip(splits.items(), panels, strict=True):
        row[0].set_ylabel(f"{stream}, {split}\n% of {len(lengths.parts[WHOLE_ROW]):,} rows")
        for (kind, parts), axes in zip(kinds.items(), row, strict=True):
            for part in (part for part in parts if part in lengths.parts):
                _draw(axes, lengths.parts[part], edges[kind], part)
            axes.set_xlim(0, 1.02 * edges[kind][-1])
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    for kind, top, bottom in zip(kinds, panels[0], panels[-1], strict=True):
        top.set_title(kind, fontsize=11)
        bottom.set_xlabel("tokens")
    sides = [part for part in ("chosen", "rejected") if any(part in each.parts for each in splits.values())]
    if sides:
        handles = [Line2D([], [], color=_COLOURS[side], linewidth=2, label=side) for side in sides]
        whole.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.savefig(path)


def _draw(axes: Any, values: np.ndarray, edges: np.ndarray, part: str) -> None:
    shares = np.histogram(values, bins=edges)[0] / len(values) * 100
    filled = part != "rejected"
    axes.stairs(shares, edges, fill=filled, alpha=0.45 if filled else None, color=_COLOURS[part], linewidth=0)
    axes.stairs(shares, edges, color=_COLOURS[part], linewidth=1.4 if part == "rejected" else 0.8)
