"""Which groups lie on a line along which one number of the config varies, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import dataclass

from bfpo_pl.comparison.analysis import Comparison, Row
from bfpo_pl.comparison.grouping import Group, settings, short_names, telling_keys

_DECADE = 10.0


@dataclass(frozen=True)
class Curves:
    """Lines over one key.

    Args:
        key: The key, such as ``model.labeling.init_args.alpha``.
        name: The same in short.
        lines: For each setting of the other keys, in short, its points: the number and the group, by the number.
        logarithmic: Whether the numbers are positive and span more than a decade.
    """

    key: str
    name: str
    lines: dict[str, list[tuple[float, Row]]]
    logarithmic: bool


def one_parameter_curves(comparison: Comparison) -> list[Curves]:
    """The curves that a comparison has: for each key with different numbers, lines of groups that differ in it alone.

    One line has at least three numbers; shorter ones of two are drawn beside it. Where only one key differs, two are
    enough.

    Args:
        comparison: The groups.
    """
    found = []
    names = short_names(comparison.keys)
    parameters = frozenset().union(*(run.parameters for run in comparison.runs))
    for key in comparison.keys:
        rows = [row for row in comparison.rows if _number(row.group, key) is not None]
        others = [each for each in comparison.keys if each not in (key, "experiment")]
        lines: dict[str, list[Row]] = {}
        for row in rows:
            rest = json.dumps([row.group.config.get(each, "–") for each in others], default=str)
            lines.setdefault(rest, []).append(row)
        least = 2 if others == [] else 3
        lengths = {rest: len({_number(row.group, key) for row in line}) for rest, line in lines.items()}
        if max(lengths.values(), default=0) < least:
            continue
        kept = [line for rest, line in lines.items() if lengths[rest] > 1]
        told = telling_keys([line[0].group for line in kept], others, parameters)
        kept.sort(key=lambda line: [_order(line[0].group, each) for each in told])
        labelled: dict[str, list[tuple[float, Row]]] = {}
        for label, line in zip(settings([line[0].group for line in kept], told), kept, strict=True):
            points = [(_number(row.group, key) or 0.0, row) for row in line]
            labelled[label] = sorted(points, key=lambda point: point[0])
        numbers = [x for points in labelled.values() for x, _ in points]
        logarithmic = min(numbers) > 0 and max(numbers) > _DECADE * min(numbers)
        found.append(Curves(key, names[key], labelled, logarithmic))
    return found


def _number(group: Group, key: str) -> float | None:
    value = group.config.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _order(group: Group, key: str) -> tuple[bool, float, str]:
    number = _number(group, key)
    return number is None, number or 0.0, group.shown(key)
