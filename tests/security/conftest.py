"""Runs to attack, and a payload that leaves a trace if it ever runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


class Payload:
    """Unpickled as code, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def payload(tmp_path) -> Payload:
    return Payload(tmp_path / "the-payload-ran")


@pytest.fixture
def refused(payload, capsys) -> Callable[..., str]:
    """Calls the command, which must refuse with exit code 2 and one line; returns the line."""
    from bfpo_pl.cli import main

    def call(*args: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(args))
        assert stopped.value.code == 2
        assert not payload.trace.exists(), "the payload ran"
        lines = capsys.readouterr().err.strip().splitlines()
        said = [line for line in lines if line.startswith("bfpo: error:")]
        assert len(said) == 1, lines
        return said[0]

    return call


def _finished_run(tmp_path_factory, name: str, *more: str) -> Path:
    from bfpo_pl.cli import main

    small = [
        *("-c", str(REPOSITORY / "configs/base.yaml"), "-c", str(REPOSITORY / "configs/experiment/bfpo.yaml")),
        *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--checkpoint.every_n_train_steps=1"),
        *("--model.policy.hidden_size=32", "--model.policy.layers=2", "--model.policy.heads=2"),
        *("--data.streams.safety.source.count=40", "--data.streams.safety.source.validation_count=12"),
        *("--data.streams.safety.batch_size=4", "--data.streams.helpfulness.source.count=40"),
        *("--data.streams.helpfulness.batch_size=4", f"--runs={tmp_path_factory.mktemp(name)}"),
    ]
    return main(["fit", *small, *more]).run_folder


@pytest.fixture(scope="session")
def file_run(tmp_path_factory) -> Path:
    """A run whose checkpoints are files."""
    return _finished_run(tmp_path_factory, "file")


@pytest.fixture(scope="session")
def sharded_run(tmp_path_factory) -> Path:
    """A run whose checkpoints are folders, made by FSDP2 on one process."""
    return _finished_run(
        tmp_path_factory, "sharded", "-c", str(REPOSITORY / "configs/strategy/fsdp2.yaml"), "--trainer.devices=1"
    )


@pytest.fixture
def copied(tmp_path) -> Callable[[Path], Path]:
    """Copies a run, to be poisoned, without manifests: these tell what is damaged, and who poisons can change them."""

    def copy(run: Path) -> Path:
        folder = Path(shutil.copytree(run, tmp_path / "runs" / "x" / run.name, symlinks=True))
        for manifest in folder.glob("checkpoints/*/manifest.json"):
            manifest.unlink()
        return folder

    return copy
