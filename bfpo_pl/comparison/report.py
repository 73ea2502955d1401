"""The report page: one HTML file that needs nothing beside it and loads nothing."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from bfpo_pl.comparison.analysis import Comparison, Row
from bfpo_pl.comparison.figures import Drawn, coloured, restriction
from bfpo_pl.comparison.grouping import short_names
from bfpo_pl.comparison.pareto import RESAMPLES
from bfpo_pl.comparison.provenance import place
from bfpo_pl.comparison.samples import SideBySide, side_by_side
from bfpo_pl.comparison.statistics import Difference
from bfpo_pl.comparison.tables import columns_text, difference_text, front_text, mean_text, metric_names
from bfpo_pl.redaction import names_secret, redacted_text
from bfpo_pl.runs import package_version

TEMPLATE = "report.html.j2"
FEW = 5
"""So many groups are columns of the table of settings; more are its rows."""


def report(comparison: Comparison, figures: Sequence[Drawn]) -> str:
    """The page as text. What models wrote, and what configs hold, is escaped.

    Args:
        comparison: What was computed.
        figures: What was drawn.
    """
    environment = Environment(
        loader=PackageLoader("bfpo_pl.comparison", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    return environment.get_template(TEMPLATE).render(
        comparison=comparison,
        names=metric_names(comparison),
        columns=columns_text(comparison),
        seeds=_seeds(comparison),
        when=_when(comparison.at),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=package_version("bfpo_pl") or "",
        notes=comparison.notes,
        resamples=RESAMPLES,
        figures=figures,
        samples=_samples(comparison),
        restriction=restriction(comparison),
        keys=_keys(comparison),
        few=FEW,
        key_names=short_names(comparison.keys),
        typed=_typed,
        count=_count,
        mean_text=mean_text,
        front_text=front_text,
        difference_parts=_difference_parts,
        image=_image,
        config_value=_config_value,
        place=place,
    )


def _samples(comparison: Comparison) -> SideBySide:
    split = comparison.pair[0].partition("/")[0] if comparison.pair else "val"
    return side_by_side(coloured(comparison), split)


def _keys(comparison: Comparison) -> list[str]:
    """What differs, without the experiment's name where that is the label."""
    named = all(row.label == row.group.config.get("experiment") for row in comparison.rows)
    return [key for key in comparison.keys if not (named and key == "experiment")]


def _seeds(comparison: Comparison) -> str:
    counts = {len(row.group.replicates) for row in comparison.rows}
    low, high = min(counts), max(counts)
    return f"{_count(low, 'seed')} each" if low == high else f"{low} to {_count(high, 'seed')} each"


def _when(at: str) -> str:
    kind, _, column = at.partition(":")
    where = {"best": "largest", "least": "smallest"}.get(kind)
    return f"at the step where {column} is {where}" if where else "at their last step"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _difference_parts(difference: Difference | None, seeds: int) -> tuple[str, str]:
    value, _, rest = difference_text(difference, seeds).partition(",")
    return value, rest.strip()


def _config_value(row: Row, key: str) -> str:
    return "<redacted>" if names_secret(key) else redacted_text(row.group.shown(key))


def _typed(key: str) -> str:
    """A key as one types it on the command line."""
    return key.removesuffix(".class_path").replace(".init_args", "")


def _image(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
