"""Sharded checkpoints of two processes: damaged, saved without room, read by one process, and the reverse."""

import os
import pickle
import shutil

import pytest
import torch

from bfpo_pl.checkpoints.check import checkpoint_step, problem
from bfpo_pl.checkpoints.consolidate import consolidated
from bfpo_pl.checkpoints.file_io import AtomicCheckpointIO, write_file
from bfpo_pl.checkpoints.find import find_checkpoint, newest_complete
from bfpo_pl.checkpoints.manifest import read_manifest
from bfpo_pl.checkpoints.shards import ForeignCodeError
from bfpo_pl.component import UserError

pytestmark = pytest.mark.distributed


def checkpoints(folder, name):
    return {checkpoint_step(path): path for path in folder.glob(f"{name}/*/*/checkpoints/epoch*.ckpt")}


def same(ours, theirs):
    """Largest difference of two trees of the same shape."""
    if isinstance(theirs, torch.Tensor):
        return (ours.double() - theirs.double()).abs().max().item() if theirs.numel() else 0.0
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        return max((same(ours[key], value) for key, value in theirs.items()), default=0.0)
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        return max((same(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    assert ours == theirs
    return 0.0


def test_a_gathered_checkpoint_is_what_a_single_file_would_hold(checkpoint_jobs):
    folder, done, _ = checkpoint_jobs
    assert done["sharded"] == done["whole"] == "ok"
    gathered = consolidated(checkpoints(folder, "sharded")[10])
    whole = torch.load(checkpoints(folder, "whole")[10], weights_only=True)
    for part in ("state_dict", "optimizer_states"):
        assert same(gathered[part], whole[part]) == 0.0
    assert gathered["global_step"] == whole["global_step"] == 10
    assert len(gathered["optimizer_states"][0]["state"]) == len(
        gathered["optimizer_states"][0]["param_groups"][0]["params"]
    )


@pytest.mark.parametrize("name", ["one-to-two", "two-to-one", "sharded-to-ddp"])
def test_a_checkpoint_goes_on_under_another_number_of_processes(name, checkpoint_jobs):
    folder, done, _ = checkpoint_jobs
    assert done[name] == "ok"
    ended, whole = checkpoints(folder, name)[10], checkpoints(folder, "one")[10]
    ended, whole = (consolidated(p) if p.is_dir() else torch.load(p, weights_only=True) for p in (ended, whole))
    found = same(ended["state_dict"], whole["state_dict"])
    print(f"{name}: {found:.2e}")
    assert found <= 1e-5
    assert same(ended["optimizer_states"], whole["optimizer_states"]) <= 1e-5
    assert list(checkpoints(folder, name)) == [10]  # nothing was trained again


def test_all_processes_stop_when_one_has_no_room(checkpoint_jobs):
    folder, done, log = checkpoint_jobs
    reasons = {
        "process-1-has-no-room": "process 1 could not write its file to its end",
        "writer-has-no-room": "File too large",
    }
    for name, reason in reasons.items():
        assert "SystemExit: 1" in done[name]
        assert list(checkpoints(folder, name)) == [5]
        assert problem(checkpoints(folder, name)[5], verify=True) is None
        assert not list(folder.glob(f"{name}/*/*/checkpoints/*.part"))
        (run,) = folder.glob(f"{name}/*/*")
        said = [line for line in log.splitlines() if line.startswith("bfpo: error: No room") and str(run) in line]
        assert len(said) == 2  # each process says so
        assert all(f"({reason})" in line and "step=10.ckpt" in line for line in said)


def test_a_disk_without_room_for_another_sharded_checkpoint(checkpoint_jobs, small_disk):
    if small_disk is None:
        pytest.skip("no file system can be mounted here")
    _, done, log = checkpoint_jobs
    assert "SystemExit: 1" in done["small-disk"]
    assert f"No room for the checkpoint {small_disk}" in log
    (run,) = small_disk.glob("*/*")
    newest = newest_complete(run, verify=True)
    assert (newest.step, newest.passed_over) == (5, ())


def test_a_sharded_checkpoint_of_another_model_is_named(checkpoint_jobs):
    _, done, log = checkpoint_jobs
    assert "SystemExit: 2" in done["another-model"]
    assert "another model's: policy.model.layers.1" in log


@pytest.fixture
def saved(checkpoint_jobs, tmp_path):
    """A copy of the sharded run's checkpoints, by step, to damage."""
    source = next(checkpoint_jobs[0].glob("sharded/*/*/checkpoints"))
    copy = shutil.copytree(source, tmp_path / "bfpo" / "20260101-000000-aaaa" / "checkpoints", symlinks=True)
    return {checkpoint_step(path): path for path in copy.glob("epoch*.ckpt")}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def delete(path):
    path.unlink()


def garbage(path):
    path.write_bytes(b"\x80\x04garbage".ljust(path.stat().st_size, b"."))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("__1_0.distcp", delete, "its file __1_0.distcp is missing"),
        ("__0_0.distcp", cut, "the size of its file __0_0.distcp"),
        (".metadata", delete, "its file .metadata is missing"),
        (".metadata", cut, "the size of its file .metadata"),
        (".metadata", garbage, "its file .metadata cannot be read"),
        ("meta.pt", delete, "its file meta.pt is missing"),
        ("meta.pt", cut, "the size of its file meta.pt"),
        ("manifest.json", cut, "its manifest cannot be read"),
    ],
)
def test_damage_to_a_sharded_checkpoint(name, damage, reason, saved, tmp_path):
    damage(saved[10] / name)
    last = saved[10].parent / "last.ckpt"
    for asked in (saved[10], last):
        with pytest.warns(UserWarning, match="5 steps before it") as warned:
            assert find_checkpoint(str(asked), tmp_path) == str(saved[5])
        assert reason in str(warned[0].message)
        assert str(saved[10]) in str(warned[0].message)
    with pytest.warns(UserWarning, match="5 steps before the newest"):
        assert find_checkpoint("last", tmp_path / "bfpo") == str(saved[5])
    damage(saved[5] / name)
    with pytest.raises(UserError, match=reason):
        find_checkpoint(str(last), tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_checkpoint("last", tmp_path / "bfpo")


def test_a_half_written_sharded_checkpoint(saved, tmp_path):
    saved[10].rename(saved[10].with_name(saved[10].name + ".part"))
    with pytest.warns(UserWarning, match="it was being written when its process ended"):
        assert find_checkpoint("last", tmp_path / "bfpo") == str(saved[5])
    with pytest.warns(UserWarning, match="it is not there"):
        assert find_checkpoint(str(saved[10].parent / "last.ckpt"), tmp_path) == str(saved[5])


def test_a_folder_that_stepped_aside_is_still_found(saved, tmp_path):
    saved[10].rename(saved[10].with_name(saved[10].name + ".old"))
    newest = newest_complete(saved[5].parent)
    assert (newest.step, newest.path.name) == (10, saved[10].name + ".old")


def test_a_flipped_bit_in_a_shard(saved, tmp_path):
    shard = saved[10] / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert problem(saved[10]) is None
    with pytest.warns(UserWarning, match=r"__1_0.distcp are not what was written: the hash differs"):
        assert find_checkpoint(str(saved[10]), tmp_path, verify=True) == str(saved[5])


def test_a_folder_without_a_manifest(saved, tmp_path):
    (saved[10] / "manifest.json").unlink()
    assert read_manifest(saved[10]) is None
    with pytest.warns(UserWarning, match="has no manifest"):
        assert find_checkpoint(str(saved[10]), tmp_path) == str(saved[10])
    renamed = saved[10].rename(saved[10].with_name("mine.ckpt"))
    assert checkpoint_step(renamed) == 10
    cut(renamed / "__1_0.distcp")
    assert "__1_0.distcp is shorter than" in problem(renamed)
    (renamed / "__1_0.distcp").unlink()
    assert "__1_0.distcp is missing" in problem(renamed)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_sharded_checkpoints_do_not_run_code(saved, tmp_path):
    trap = tmp_path / "trap"
    (saved[10] / "manifest.json").unlink()
    metadata = pickle.loads((saved[10] / ".metadata").read_bytes())
    # A value that is no tensor: torch's own planner unpickles it without weights_only.
    name = "optimizer_0.param_groups.0.lr"
    (entry,) = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    torch.save(Payload(trap), tmp_path / "value")
    shard = saved[10] / entry.relative_path
    at = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + (tmp_path / "value").read_bytes())
    object.__setattr__(entry, "offset", at)
    object.__setattr__(entry, "length", (tmp_path / "value").stat().st_size)
    (saved[10] / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        AtomicCheckpointIO().load_checkpoint(saved[10])
    metadata.planner_data = Payload(trap)
    (saved[10] / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ForeignCodeError, match=r"\.metadata names posix\.mkdir"):
        find_checkpoint(str(saved[10]), tmp_path)
    assert not trap.exists()


def test_all_processes_load_the_checkpoint_that_process_0_found(tmp_path):
    """A newest checkpoint is looked for by each process at another moment; they must not begin from different ones."""
    for step in (1, 2):
        write_file({"global_step": step, "state_dict": {}}, tmp_path / f"step={step}.ckpt")

    def load(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        found = AtomicCheckpointIO().load_checkpoint(tmp_path / f"step={rank + 1}.ckpt")
        (tmp_path / f"found-{rank}").write_text(str(found["global_step"]))

    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                load(rank)
            finally:
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    assert [(tmp_path / f"found-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
