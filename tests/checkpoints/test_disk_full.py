"""Saves for which there is no room: on file systems that really are too small, or under a limit of the kernel."""

import resource
import subprocess

import pytest
import torch

from bfpo_pl.checkpoints.check import problem
from bfpo_pl.checkpoints.file_io import write_file
from bfpo_pl.checkpoints.find import newest_complete
from bfpo_pl.checkpoints.space import SaveError, shown, tensor_bytes
from bfpo_pl.cli import main


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a size in KiB."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.fixture
def limited():
    """Lets no file of this process grow over a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def checkpoint(kib, tensors=1, step=1):
    size = kib * 1024 // 4 // tensors
    return {"global_step": step, "state_dict": {str(i): torch.randn(size) for i in range(tensors)}}


def test_what_does_not_fit_is_not_begun(small_disk):
    folder = small_disk(512)
    write_file(checkpoint(300), folder / "step=1.ckpt")
    with pytest.raises(SaveError) as error:
        write_file(checkpoint(300, step=2), folder / "step=2.ckpt")
    for part in ("step=2.ckpt", "needs 300 KiB", "KiB are free in", str(folder), "keep_last", "--runs"):
        assert part in str(error.value)
    assert [item.name for item in folder.iterdir()] == ["step=1.ckpt"]
    assert problem(folder / "step=1.ckpt", verify=True) is None


def test_a_disk_that_fills_while_it_is_written(small_disk):
    """The tensors would fit, the file does not: many small ones take more room than their bytes."""
    folder = small_disk(128)
    write_file(checkpoint(20), folder / "step=1.ckpt")
    many = checkpoint(40, tensors=512)
    assert tensor_bytes(many) == 40 * 1024
    with pytest.raises(SaveError, match=r"needs 40 KiB, and .* are free in .*No space left on device"):
        write_file(many, folder / "step=2.ckpt")
    assert [item.name for item in folder.iterdir()] == ["step=1.ckpt"]


def test_a_file_that_may_not_grow_leaves_the_one_of_its_name(tmp_path, limited):
    path = tmp_path / "a.ckpt"
    write_file(checkpoint(100), path)
    before = path.read_bytes()
    limited(50 * 1024)
    with pytest.raises(SaveError, match="File too large"):
        write_file(checkpoint(100, step=2), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_is_no_plain_data_leaves_nothing_behind(tmp_path):
    with pytest.raises((AttributeError, TypeError, RuntimeError), match=r"pickle|lambda"):
        write_file({"state_dict": {}, "extra": lambda: None}, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_disk_is_full_stops_and_goes_on_elsewhere(arguments, small_disk, tmp_path, capsys):
    folder = small_disk(900)
    with pytest.raises(SystemExit) as error:
        main(["fit", *arguments, f"--runs={folder}"])
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "No room for the checkpoint" in said
    assert str(folder) in said
    (run,) = folder.glob("bfpo/*")
    names = {item.name for item in (run / "checkpoints").iterdir()}
    assert names == {"epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt", "index.json", "last.ckpt"}
    newest = newest_complete(run, verify=True)
    assert (newest.step, newest.passed_over) == (4, ())
    resumed = main(["fit", *arguments, f"--ckpt_path={run}", f"--runs={tmp_path / 'elsewhere'}"])
    assert resumed.trainer.global_step == 6


def test_size_is_counted_by_storage():
    tensor = torch.zeros(1000)
    assert tensor_bytes({"a": tensor, "b": [tensor[10:20], (tensor.view(10, 100),)], "c": 1}) == 4000
    assert shown(1536) == "1.5 KiB"
    assert shown(3 * 2**40) == "3072.0 GiB"
