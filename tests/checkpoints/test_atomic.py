"""What a process leaves that is killed in the midst of writing, linking or deleting; really killed, at each step."""

import os
import signal
import time
import warnings

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from bfpo_pl.checkpoints import atomic, file_io, keep
from bfpo_pl.checkpoints.atomic import discard, publish, recover, write_text
from bfpo_pl.checkpoints.file_io import AtomicCheckpointIO, write_file
from bfpo_pl.checkpoints.find import newest_complete
from bfpo_pl.checkpoints.manifest import read_manifest
from bfpo_pl.cli import main

pytestmark = pytest.mark.distributed  # they fork, which is safe only where no other test has left threads

PATIENCE = 120
"""Seconds after which a process that was to be killed has gone wrong."""


def killed(action):
    """Does something in a process of its own, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    deadline = time.monotonic() + PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            raise AssertionError("the process hangs")
        time.sleep(0.01)
    assert os.WTERMSIG(ended[1]) == signal.SIGKILL


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def checkpoint(step):
    return {"global_step": step, "state_dict": {"weight": torch.full((1000,), float(step))}}


def weight(path):
    return torch.load(path, weights_only=True)["state_dict"]["weight"][0].item()


@pytest.mark.parametrize("name", ["append_manifest", "publish"])
@pytest.mark.parametrize("target", ["step=1.ckpt", "step=2.ckpt"])
def test_a_kill_during_a_save_leaves_what_was_there(name, target, tmp_path, monkeypatch):
    write_file(checkpoint(1), tmp_path / "step=1.ckpt")
    monkeypatch.setattr(file_io, name, die)
    killed(lambda: write_file(checkpoint(2), tmp_path / target))
    monkeypatch.undo()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["step=1.ckpt", f"{target}.part"]
    newest = newest_complete(tmp_path, verify=True)
    assert (newest.step, weight(newest.path)) == (1, 1.0)
    write_file(checkpoint(2), tmp_path / target)
    assert weight(newest_complete(tmp_path, verify=True).path) == 2.0
    assert not list(tmp_path.glob("*.part"))


def test_a_kill_right_after_the_rename_leaves_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "sync_folder", die)
    killed(lambda: write_file(checkpoint(2), tmp_path / "step=2.ckpt"))
    assert read_manifest(tmp_path / "step=2.ckpt").step == 2
    assert newest_complete(tmp_path, verify=True).step == 2


def folder_of(path, text):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch):
    path = folder_of(tmp_path / "a.ckpt", "old")
    part = folder_of(tmp_path / "a.ckpt.part", "new")
    renames = iter([type(path).rename, die])
    monkeypatch.setattr("pathlib.Path.rename", lambda self, target: next(renames)(self, target))
    killed(lambda: publish(part, path))
    monkeypatch.undo()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.ckpt.old", "a.ckpt.part"]
    recover(tmp_path, "*.ckpt")
    assert [item.name for item in tmp_path.iterdir()] == ["a.ckpt"]
    assert (path / "file").read_text() == "old"
    publish(folder_of(tmp_path / "a.ckpt.part", "new"), path)
    assert (path / "file").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_is_never_seen_half_deleted(tmp_path, monkeypatch):
    path = folder_of(tmp_path / "a.ckpt", "old")
    monkeypatch.setattr("shutil.rmtree", die)
    killed(lambda: discard(path))
    assert [item.name for item in tmp_path.iterdir()] == ["a.ckpt.part"]


def test_a_small_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    write_text(tmp_path / "index.json", "one")
    monkeypatch.setattr(os, "replace", die)
    killed(lambda: write_text(tmp_path / "index.json", "two"))
    assert (tmp_path / "index.json").read_text() == "one"


@pytest.mark.parametrize("name", ["point", "discard", "_save_together", "problem"])
def test_a_run_killed_while_it_keeps_order_goes_on_in_its_folder(name, arguments, tmp_path, monkeypatch):
    """Killed at its third checkpoint: before it is saved, linked to, or the oldest deleted."""
    folder = tmp_path / "checkpoints"
    fit = [*arguments, f"--runs={tmp_path}", f"--checkpoint.dirpath={folder}", "--checkpoint.keep_last=2"]
    fit += ["--checkpoint.monitor=null", "--trainer.val_check_interval=null", "--trainer.max_steps=8"]
    whole, calls = getattr(keep, name), []
    counts = {"point": 3, "discard": 1, "_save_together": 3, "problem": 4}

    def third(*args, **kwargs):
        calls.append(args)
        return die() if len(calls) == counts[name] else whole(*args, **kwargs)

    monkeypatch.setattr(keep, name, third)
    killed(lambda: main(["fit", *fit]))
    monkeypatch.undo()
    newest = newest_complete(folder, verify=True)
    assert newest.step == (4 if name == "_save_together" else 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = main(["fit", *fit, f"--ckpt_path={newest.path}"])
    assert resumed.trainer.global_step == 8
    names = sorted(item.name for item in folder.iterdir())
    assert names == ["epoch=0-step=6.ckpt", "epoch=0-step=8.ckpt", "index.json", "last.ckpt"]


def test_the_command_writes_through_ours_unless_another_is_named(arguments, tmp_path):
    short = [*arguments, f"--runs={tmp_path}", "--trainer.max_steps=2"]
    ours = main(["fit", *short, "--trainer.plugins=lightning.pytorch.plugins.environments.LightningEnvironment"])
    assert type(ours.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    assert read_manifest(ours.run_folder / "checkpoints" / "last.ckpt").step == 2
    theirs = main(["fit", *short, "--trainer.plugins=lightning.pytorch.plugins.io.TorchCheckpointIO"])
    assert type(theirs.trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert read_manifest(theirs.run_folder / "checkpoints" / "last.ckpt") is None
