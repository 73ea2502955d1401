"""Where runs come from: code, versions and machines; and what of it a reader should know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bfpo_pl.comparison.grouping import Group
from bfpo_pl.comparison.reading import RunRecord
from bfpo_pl.redaction import redacted_text

PACKAGES = ("bfpo_pl", "torch", "lightning", "transformers")


def origins(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The different origins of runs, each with the number of its runs; what a run does not say is None.

    Args:
        runs: The runs.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        git, packages = (run.environment.get(key) or {} for key in ("git", "packages"))
        origin = {
            "commit": git.get("commit"),
            "changed": git.get("changed"),
            "host": run.environment.get("host"),
            "platform": run.environment.get("platform"),
            "packages": {name: packages.get(name) for name in PACKAGES},
        }
        found.setdefault(json.dumps(origin, sort_keys=True), {**origin, "runs": 0})["runs"] += 1
    return list(found.values())


def notes(groups: Sequence[Group], paired: bool) -> list[str]:
    """What makes groups less comparable than they look.

    Args:
        groups: The groups.
        paired: Whether differences from a baseline are taken.
    """
    said = []
    found = origins([run for group in groups for run in group.runs])
    commits = sorted({(origin["commit"] or "unknown")[:10] for origin in found})
    if len(commits) > 1:
        said.append(f"the runs are of {len(commits)} revisions of the code: {', '.join(commits[:6])}.")
    changed = sum(origin["runs"] for origin in found if origin["changed"])
    if changed:
        said.append(f"{changed} {'run' if changed == 1 else 'runs'} ran with uncommitted changes of the code.")
    for name in PACKAGES[1:]:
        versions = sorted({origin["packages"][name] or "unknown" for origin in found})
        if len(versions) > 1:
            said.append(f"the runs used {len(versions)} versions of {name}: {', '.join(versions)}.")
    if len({frozenset(group.replicates) for group in groups}) > 1:
        over = "; differences are over the seeds that two groups share" if paired else ""
        said.append(f"the groups do not have the same seeds{over}.")
    return said


def place(folder: Path) -> str:
    """A folder for others to read: relative to the working directory where it lies below."""
    here = Path.cwd().resolve()
    return redacted_text(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
