"""Every kind of damage to a checkpoint file, found before weights load, and what is taken instead."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from bfpo_pl.checkpoints.check import checkpoint_step, problem
from bfpo_pl.checkpoints.file_io import AtomicCheckpointIO, write_file
from bfpo_pl.checkpoints.find import find_checkpoint, newest_complete
from bfpo_pl.checkpoints.manifest import archive_size, read_manifest
from bfpo_pl.cli import main
from bfpo_pl.component import UserError


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def cut_one_byte(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def hole(path):
    """Bytes in the middle are missing, the end is there."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 512 :])


def garbage(path):
    path.write_bytes(b"\0" * path.stat().st_size)


def half_written(path):
    path.rename(path.with_name(path.name + ".part"))


def missing(path):
    path.unlink()


DAMAGE = [
    (cut, "its end is missing"),
    (cut_one_byte, "its end is missing"),
    (empty, "it is empty"),
    (hole, "its size is"),
    (garbage, "not what torch.save writes"),
    (half_written, "it is not there"),
    (missing, "it is not there"),
]


def flip(path):
    """One bit in the middle: sizes and structure stay."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def found(runs, asked, **kwargs):
    return find_checkpoint(str(asked), runs / "bfpo", **kwargs)


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_the_newest_complete_one_before_it_is_taken_loudly(damage, reason, runs, folder, saved):
    damage(saved[6])
    assert reason in problem(saved[6])
    for asked in (saved[6], folder / "last.ckpt"):
        with pytest.warns(UserWarning, match=r"is not complete: .* is taken instead, 2 steps before it") as warned:
            assert found(runs, asked) == str(saved[4])
        (message,) = [str(w.message) for w in warned if "instead" in str(w.message)]
        assert all(part in message for part in (str(saved[6]), str(saved[4]), reason))
    if damage is missing:
        assert found(runs, "last") == found(runs, folder) == str(saved[4])  # nothing tells that there was another
        return
    for asked in ("last", folder, folder.parent):
        with pytest.warns(UserWarning, match=r"Not complete: .*step=6.* is taken, 2 steps before the newest"):
            assert found(runs, asked) == str(saved[4])
    newest = newest_complete(folder.parent)
    assert (newest.path, newest.step) == (saved[4], 4)
    assert len(newest.passed_over) == 1


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_where_nothing_before_it_is_complete_it_stops_with_the_reason(damage, reason, runs, folder, saved):
    damage(saved[2])  # the newer ones are no way back from it
    said = "no checkpoint '" if damage in (missing, half_written) else reason
    with pytest.raises(UserError, match=said) as error:
        found(runs, saved[2])
    assert saved[2].name in str(error.value)
    assert saved[6].name in str(error.value)  # what there is instead
    for step in (4, 6):
        cut(saved[step])
    with pytest.raises(UserError, match="no complete checkpoint") as error:
        found(runs, "last")
    assert str(error.value).count("its end is missing") >= 2


def test_sizes_that_look_the_same_are_said_in_bytes(saved):
    data, size = saved[6].read_bytes(), archive_size(saved[6])
    saved[6].write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 4 :])
    assert problem(saved[6]) == f"its size is {size - 4:,} bytes and should be {size:,}"


def test_two_damaged_ones_are_both_named(runs, folder, saved):
    cut(saved[6])
    empty(saved[4])
    with pytest.warns(UserWarning, match="4 steps before it") as warned:
        assert found(runs, saved[6]) == str(saved[2])
    assert "step=4.ckpt: it is empty" in str(warned[0].message)


def test_a_flipped_bit_is_found_by_its_hash(runs, folder, saved):
    flip(saved[6])
    assert problem(saved[6]) is None
    assert "hash differs" in problem(saved[6], verify=True)
    assert problem(saved[4], verify=True) is None
    assert found(runs, "last") == str(saved[6])
    with pytest.warns(UserWarning, match="hash differs"):
        assert found(runs, "last", verify=True) == str(saved[4])


def test_a_copied_run_without_its_link_still_has_a_last(runs, folder, saved):
    (folder / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match="taken instead"):
        assert found(runs, folder / "last.ckpt") == str(saved[6])


def test_a_file_without_a_manifest_loads_with_a_warning(runs, saved):
    checkpoint = torch.load(saved[6], weights_only=True)
    torch.save(checkpoint, saved[6])  # as another version wrote it
    assert read_manifest(saved[6]) is None
    assert checkpoint_step(saved[6]) == 6
    with pytest.warns(UserWarning, match="has no manifest"):
        assert found(runs, saved[6]) == str(saved[6])
    renamed = saved[6].rename(saved[6].with_name("mine.ckpt"))
    assert checkpoint_step(renamed) == 6
    with zipfile.ZipFile(renamed) as archive:
        middle = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(renamed.read_bytes())
    data[middle.header_offset + middle.file_size // 2 + 200] ^= 1
    renamed.write_bytes(data)
    assert problem(renamed) is None
    assert "checksum differs" in problem(renamed, verify=True)
    cut(renamed)
    assert "its end is missing" in problem(renamed)


def test_the_manifest_says_what_the_file_is(saved):
    manifest = read_manifest(saved[6])
    inside = torch.load(saved[6], weights_only=True)
    assert (manifest.step, manifest.processes) == (6, 1) == (inside["global_step"], 1)
    assert manifest.versions["torch"] == torch.__version__
    with zipfile.ZipFile(saved[6]) as archive:
        assert json.loads(archive.comment)["bfpo_checkpoint"]["step"] == 6
        assert archive.testzip() is None


def refused(capsys, *args):
    with pytest.raises(SystemExit) as error:
        main([*args])
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_the_command_goes_on_from_the_older_one_exactly(finished, arguments, runs, folder, saved):
    cut(saved[6])
    with pytest.warns(UserWarning, match="4 steps before it|2 steps before it"):
        resumed = main(["fit", *arguments, f"--ckpt_path={folder / 'last.ckpt'}", f"--runs={runs}"])
    assert resumed.trainer.global_step == 6
    weights, whole = resumed.model.policy.state_dict(), finished.model.policy.state_dict()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    record = json.loads((resumed.run_folder / "environment.json").read_text())
    assert record["parent_checkpoint"] == str(saved[4])
    # A new run's last is now the newest of the experiment.
    assert found(runs, "last") == str(resumed.run_folder / "checkpoints" / saved[6].name)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_command_stops_where_there_is_nothing_to_take(command, arguments, runs, folder, saved, capsys):
    for path in saved.values():
        cut(path)
    text = refused(capsys, command, *arguments, "--ckpt_path=last", f"--runs={runs}")
    assert "has no complete checkpoint" in text
    assert len(list(runs.glob("bfpo/*"))) == 1  # it failed before there was a run


def test_the_command_verifies(arguments, runs, saved, capsys):
    flip(saved[2])
    text = refused(capsys, "validate", *arguments, f"--ckpt_path={saved[2]}", "--verify", f"--runs={runs}")
    assert "hash differs" in text


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_poisoned_checkpoint_is_refused(arguments, runs, saved, tmp_path, capsys):
    trap = tmp_path / "trap"
    checkpoint = torch.load(saved[6], weights_only=True)
    write_file({**checkpoint, "extra": Payload(trap)}, saved[6])
    text = refused(capsys, "validate", *arguments, f"--ckpt_path={saved[6]}", f"--runs={runs}")
    assert "without running code" in text
    saved[4].write_bytes(pickle.dumps({"state_dict": Payload(trap)}))
    with pytest.warns(UserWarning, match="not what torch.save writes"):
        assert found(runs, saved[4]) == str(saved[2])
    assert not trap.exists()


def test_what_passes_the_check_and_cannot_be_read_is_named(saved):
    saved[6].write_bytes(saved[6].read_bytes().replace(b"data.pkl", b"data.pkX"))
    assert problem(saved[6]) is None
    with pytest.raises(UserError, match=f"{saved[6].name} cannot be read"):
        AtomicCheckpointIO().load_checkpoint(saved[6])
