"""Records of a run: its folder, its config, the versions and the revision it ran with."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from bfpo_pl.component import UserError
from bfpo_pl.redaction import redacted_command

RUN_VARIABLE = "BFPO_RUN_DIR"
"""Hands the launching process's run folder down to the processes that it starts, as ``<its id>:<folder>``."""

PACKAGES = (
    "bfpo_pl",
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "jsonargparse",
    "datasets",
    "peft",
    "safetensors",
    "tokenizers",
    "wandb",
    "numpy",
)


def new_run_folder(root: str | Path, experiment: str) -> Path:
    """Path of a new run: ``<root>/<experiment>/<time>-<id>``. Processes that Lightning starts get the run's own.

    Processes started otherwise (torchrun, Slurm) each make a name, and `RunRecord` gives all of them rank 0's.

    Args:
        root: Folder of all runs.
        experiment: Name of the experiment.
    """
    if started_by_another():
        return Path(os.environ[RUN_VARIABLE].partition(":")[2])
    return hand_down(Path(root) / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


def hand_down(folder: Path) -> Path:
    """Makes a run's folder known to the processes that this one starts; returns it as an absolute path."""
    if not started_by_another():
        os.environ[RUN_VARIABLE] = f"{os.getpid()}:{folder.absolute()}"
    return folder.absolute()


def started_by_another() -> bool:
    """Whether this process is one that another process of the same command started (Lightning's launcher)."""
    launcher, _, inherited = os.environ.get(RUN_VARIABLE, "").partition(":")
    return bool(inherited) and launcher == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0"


def check_writable(folder: Path, named: str) -> None:
    """Fails before any weight loads if runs cannot be recorded.

    Args:
        folder: Folder of all runs, or that of one; it is made.
        named: What names it, for the message.

    Raises:
        UserError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{named}: a run cannot be recorded there ({error.strerror}). Name a folder that can be written."
        ) from error


def newest_first(experiment: Path) -> list[Path]:
    """The folders of an experiment's runs, by the time in their names and then by that of their last change.

    Args:
        experiment: The folder of the runs.
    """
    folders = [folder for folder in experiment.iterdir() if folder.is_dir()] if experiment.is_dir() else []
    return sorted(folders, key=lambda folder: (folder.name[:15], folder.stat().st_mtime_ns), reverse=True)


def recorded(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The command and the whole config of a run, without secrets; None if its record is not there or not whole.

    Args:
        folder: The run's folder.
    """
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return (text.partition("\n")[0].removeprefix("# bfpo "), config) if isinstance(config, dict) else None


def began(folder: Path) -> float | None:
    """When a run first started, in seconds since the epoch; None if its ``environment.json`` does not say.

    Args:
        folder: The run's folder.
    """
    try:
        started = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["started"]
        return datetime.strptime(started, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def environment() -> dict[str, Any]:
    """Versions, machine, git revision and command line of this process; plain data, without secrets."""
    import torch

    return {
        "command": redacted_command(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git": git_revision(Path.cwd()),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the working directory and whether it has uncommitted changes; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def package_version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
