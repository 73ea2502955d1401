"""Run folders as `bfpo fit` leaves them, written directly: input for what reads runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def config(
    seed: int,
    labeling: str = "BFPO",
    experiment: str = "bfpo",
    policy: str = "runs/models/sft",
    tau: float = 0.5,
    **labeling_arguments: Any,
) -> dict[str, Any]:
    """A resolved config with the parts that matter to a comparison."""
    arguments = {"b1": 3.0, "alpha": 0.5, "b3": None} if labeling == "BFPO" else {}
    evaluation = {"split": "validation", "split_seed": seed, "temperatures": [0.0, 0.5]}
    source = {"count": 6400, "seed": seed, "split_seed": seed, "flag_noise": 0.0}
    return {
        "seed_everything": seed,
        "trainer": {
            "max_steps": 300,
            "logger": [{"class_path": "WandbLogger", "init_args": {"id": f"id{seed}{labeling}"}}],
            "callbacks": [{"class_path": "bfpo_pl.callbacks.microworld.MicroworldEvaluation", "init_args": evaluation}],
        },
        "model": {
            "policy": {"class_path": "bfpo_pl.models.sources.HFModel", "init_args": {"path": policy}},
            "labeling": {"class_path": f"bfpo_pl.{labeling}", "init_args": {**arguments, **labeling_arguments}},
            "loss": {"class_path": "bfpo_pl.Squared", "init_args": {"tau": tau}},
        },
        "data": {
            "streams": {"safety": {"source": {"class_path": "MicroworldSafety", "init_args": source}}},
            "seed": None,
        },
        "experiment": experiment,
        "runs": f"runs/{seed}",
        "ckpt_path": None,
    }


def write_run(
    folder: Path,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    samples: Sequence[Mapping[str, Any]] = (),
    status: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a run's folder.

    Args:
        folder: The run's folder, such as ``runs/bfpo/20260101-000000-0000``.
        config: Its resolved config.
        rows: Of metrics.csv; each has ``step``.
        samples: Of samples.jsonl.
        status: Of status.json. Default: finished.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    columns = ["step", *sorted({key for row in rows for key in row} - {"step"})]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    status = {"state": "finished", "step": int(rows[-1]["step"]), "reason": None} if status is None else status
    (folder / "status.json").write_text(json.dumps(status))
    environment = {"git": {"commit": "0123456789abcdef", "changed": False}, "platform": "Linux", "packages": {}}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def final(helpfulness: float, harmlessness: float, step: int = 300, split: str = "val") -> dict[str, float]:
    """A row with the microworld's two headlines and a loss."""
    prefix = f"{split}/microworld/greedy"
    return {
        "step": step,
        f"{prefix}/helpfulness": helpfulness,
        f"{prefix}/harmlessness": harmlessness,
        "val/all/all/loss": 1.0 - helpfulness / 2,
    }


def write_trial(
    folder: Path, status: str = "finished", run: str | None = None, error: str | None = None, **parameters: Any
) -> Path:
    """Writes the record of a sweep's trial.

    Args:
        folder: The trial's folder, such as ``runs/sweeps/alpha/trials/0123456789``.
        status: What became of it.
        run: Its run's folder, relative to the trial's.
        error: Why it failed.
        parameters: What the sweep set in it.
    """
    folder.mkdir(parents=True)
    record = {"id": folder.name, "parameters": parameters, "status": status, "error": error, "run": run}
    (folder / "trial.json").write_text(json.dumps({**record, "attempts": 1, "host": "machine"}))
    return folder
