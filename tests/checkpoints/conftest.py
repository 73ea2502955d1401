"""A real run with three checkpoints, which tests damage."""

import shutil
from pathlib import Path

import pytest

from bfpo_pl.cli import main

REPOSITORY = Path(__file__).parents[2]


def fit_arguments(small):
    return [
        *("-c", str(REPOSITORY / "configs/base.yaml"), "-c", str(REPOSITORY / "configs/experiment/bfpo.yaml")),
        *small,
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=2",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.keep_last=3",
        "--checkpoint.monitor=val/all/all/loss",
        "--export.enabled=false",
    ]


SMALL = [
    *("--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--model.policy.hidden_size=32", "--model.policy.layers=2", "--model.policy.heads=2"),
    "--model.policy.intermediate_size=64",
    *("--data.streams.safety.source.count=40", "--data.streams.safety.source.validation_count=12"),
    *("--data.streams.safety.batch_size=4", "--data.streams.helpfulness.source.count=40"),
    "--data.streams.helpfulness.batch_size=4",
]


@pytest.fixture(scope="session")
def arguments():
    """The command line of the run, after its subcommand."""
    return fit_arguments(SMALL)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache, arguments):
    """The folder of all runs, in which one with checkpoints at steps 2, 4 and 6 lies."""
    runs = tmp_path_factory.mktemp("finished")
    return main(["fit", *arguments, f"--runs={runs}"])


@pytest.fixture
def runs(finished, tmp_path):
    """A copy of it, links kept, to damage."""
    return Path(shutil.copytree(finished.run_folder.parents[1], tmp_path / "copied", symlinks=True))


@pytest.fixture
def folder(runs):
    """The copied run's folder of checkpoints."""
    (found,) = runs.glob("bfpo/*/checkpoints")
    return found


@pytest.fixture
def saved(folder):
    """The checkpoints by step."""
    return {int(path.stem.rpartition("=")[2]): path for path in folder.glob("epoch=*.ckpt")}
