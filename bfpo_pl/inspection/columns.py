"""What a labeling needs and streams do not have."""

from __future__ import annotations

from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.labeling import LabelingFunction


def lacking(data: AlignmentData, labeling: LabelingFunction) -> list[str]:
    """For each stream that lacks a column which the labeling needs, what is missing and what to do.

    Args:
        data: The data, set up.
        labeling: The labeling.
    """
    lines = []
    for stream in data.streams:
        has = data.columns_of(stream)
        missing = [column for column in labeling.requires.columns if column not in has]
        if missing:
            flags = set(missing) <= {"chosen_safe", "rejected_safe"}
            remedy = f", or set data.streams.{stream}.assume_safe: true if all its responses are safe" if flags else ""
            lines.append(
                f"{labeling} needs {' and '.join(missing)}, which the stream '{stream}' lacks (its columns: "
                f"{', '.join(sorted(has)) or 'none'}). Name the columns in its adapter{remedy}."
            )
    return lines
