"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).parent.parent

SMALL_MODEL = [
    "--model.policy.hidden_size=32",
    "--model.policy.layers=2",
    "--model.policy.heads=2",
    "--model.policy.intermediate_size=64",
]
SMALL_RUN = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
SMALL_SAFETY = [
    "--data.streams.safety.source.count=40",
    "--data.streams.safety.source.validation_count=12",
    "--data.streams.safety.batch_size=4",
]
SMALL_HELPFULNESS = ["--data.streams.helpfulness.source.count=40", "--data.streams.helpfulness.batch_size=4"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Prepared data of all tests goes to one temporary folder, for the processes that tests start, too."""
    before = os.environ.get("BFPO_CACHE")
    os.environ["BFPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["BFPO_CACHE"]
    else:
        os.environ["BFPO_CACHE"] = before


@pytest.fixture
def float64():
    """Makes float64 the default dtype, so that tensors written as literals are exact to 1e-15."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def in_repository(monkeypatch):
    """Runs the test in the repository's root, where configs/ and plugins/ are."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def bfpo(tmp_path, in_repository):
    """Calls the real command in this process, with its run folders in ``tmp_path / "runs"``."""
    from bfpo_pl.cli import main

    def call(*args: str):
        runs = [f"--runs={tmp_path / 'runs'}"] if args[0] in ("fit", "validate", "sft", "reference") else []
        return main([*args, *runs])

    return call


@pytest.fixture
def small():
    """Overrides that make a run of base.yaml tiny."""
    return [*SMALL_RUN, *SMALL_MODEL, *SMALL_SAFETY, *SMALL_HELPFULNESS]


@pytest.fixture
def small_safety():
    """The same for experiments with the safety stream alone."""
    return [*SMALL_RUN, *SMALL_MODEL, *SMALL_SAFETY]


@pytest.fixture
def base():
    """Arguments that name base.yaml and BFPO's experiment."""
    return ["-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml"]
