"""Which checkpoints of a folder a run keeps, and what each scored; the folder's own record, which survives a kill."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from bfpo_pl.checkpoints.atomic import write_text

INDEX = "index.json"
"""Its name in the folder of checkpoints."""


@dataclass
class Index:
    """The checkpoints that a run made, oldest first.

    Args:
        monitor: The metric that scores are of.
        mode: Whether ``min`` or ``max`` is best.
        scores: By name of the checkpoint; None where no validation told its value.
    """

    monitor: str | None = None
    mode: str = "min"
    scores: dict[str, float | None] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> Index:
        """The index of a folder, without what is no longer there; an empty one if it has none that can be read."""
        try:
            values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            scores = {str(name): score for name, score in values["checkpoints"].items() if (folder / name).exists()}
            return Index(values["monitor"], values["mode"], scores)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return Index()

    def write(self, folder: Path) -> None:
        """Writes the index in one step."""
        values = {"monitor": self.monitor, "mode": self.mode, "checkpoints": self.scores}
        write_text(folder / INDEX, json.dumps(values, indent=1) + "\n")

    def ranked(self) -> list[str]:
        """The names of those with a score, best first; of equal ones the newer first."""
        scored = [(name, score) for name, score in reversed(self.scores.items()) if score is not None]
        sign = 1 if self.mode == "min" else -1
        return [name for name, score in sorted(scored, key=lambda item: sign * item[1]) if math.isfinite(score)]
