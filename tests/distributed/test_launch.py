"""What a launch decides before its processes can talk to each other."""

import os

import pytest

from bfpo_pl.runs import RUN_VARIABLE, new_run_folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv(RUN_VARIABLE, "")  # restored afterwards, whatever a test sets
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_a_process_that_lightning_starts_gets_its_launchers_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_VARIABLE, f"{os.getppid()}:{tmp_path}/launchers:own")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(new_run_folder(tmp_path, "x")) == f"{tmp_path}/launchers:own"


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_second_run_of_a_process_gets_a_folder_of_its_own(tmp_path, monkeypatch, rank):
    first = new_run_folder(tmp_path, "x")
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)  # Lightning's launcher sets it in its own process
    assert os.environ[RUN_VARIABLE] == f"{os.getpid()}:{first}"
    assert new_run_folder(tmp_path, "x") != first


def test_a_process_started_by_another_launcher_does_not_inherit(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_VARIABLE, f"{os.getppid() + 1}:{tmp_path}/stale")
    monkeypatch.setenv("LOCAL_RANK", "1")
    folder = new_run_folder(tmp_path, "x")
    assert folder.parent == tmp_path / "x"
