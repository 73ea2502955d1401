"""Checkpoints with a payload are refused by every command that reads one, and the payload does not run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bfpo_pl.checkpoints.shards import ForeignCodeError, plain_sharded_reads, read_metadata
from bfpo_pl.component import UserError

WITHOUT_CODE = "cannot be read without running code from it, so it is refused"


def commands(run, checkpoint, tmp_path):
    """Every command that reads a checkpoint, by name."""
    config, runs = ("-c", str(run / "config.yaml")), f"--runs={tmp_path / 'more'}"
    fit = ("--trainer.max_steps=4", "--export.enabled=false")
    return {
        "fit": ("fit", *config, runs, *fit, f"--ckpt_path={checkpoint}"),
        "validate": ("validate", *config, runs, f"--ckpt_path={checkpoint}"),
        "export": ("export", f"--run={run}", f"--to={tmp_path / 'exported'}", f"--checkpoint={checkpoint}"),
        "generate": ("generate", f"--model={run}", "--checkpoint=last", "--prompt=open the window"),
    }


NAMES = ("fit", "validate", "export", "generate")


@pytest.mark.parametrize("command", NAMES)
def test_a_file(command, file_run, copied, payload, refused, tmp_path):
    run = copied(file_run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"innocent": payload}, checkpoint)
    assert WITHOUT_CODE in refused(*commands(run, checkpoint, tmp_path)[command])


@pytest.mark.parametrize("command", NAMES)
def test_the_metadata_of_a_folder(command, sharded_run, copied, payload, refused, tmp_path):
    run = copied(sharded_run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    metadata = read_metadata(checkpoint)
    metadata.planner_data["innocent"] = payload
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    said = refused(*commands(run, checkpoint, tmp_path)[command])
    assert WITHOUT_CODE in said
    assert f"names {os.mkdir.__module__}.mkdir" in said


@pytest.mark.parametrize("command", NAMES)
def test_meta_pt_of_a_folder(command, sharded_run, copied, payload, refused, tmp_path):
    run = copied(sharded_run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint / "meta.pt", weights_only=True)
    torch.save(content | {"innocent": payload}, checkpoint / "meta.pt")
    assert WITHOUT_CODE in refused(*commands(run, checkpoint, tmp_path)[command])


def poison_bytes(checkpoint, name, payload):
    """Lets an entry that is no tensor be a payload; torch reads those with weights_only=False."""
    metadata = read_metadata(checkpoint)
    [(index, info)] = [item for item in metadata.storage_data.items() if item[0].fqn == name]
    written = io.BytesIO()
    torch.save(payload, written)
    with (checkpoint / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(written.getvalue())
        file.write(written.getvalue())
    del metadata.storage_data[index]
    metadata.storage_data[dcp.metadata.MetadataIndex(name)] = info
    metadata.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("name", "why"),
    [("optimizer_0.param_groups.0.lr", WITHOUT_CODE), ("state_dict.policy.model.norm.weight", "is another model's")],
)
def test_an_entry_of_a_folder_that_is_no_tensor(name, why, sharded_run, copied, payload, refused, tmp_path):
    run = copied(sharded_run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    poison_bytes(checkpoint, name, payload)
    assert why in refused(*commands(run, checkpoint, tmp_path)["fit"])


def test_a_shard_of_a_folder(sharded_run, copied, payload, refused, tmp_path):
    run = copied(sharded_run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    metadata = read_metadata(checkpoint)
    written = io.BytesIO()
    torch.save(payload, written)
    [info] = [i for index, i in metadata.storage_data.items() if index.fqn == "state_dict.policy.model.norm.weight"]
    with (checkpoint / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(written.getvalue())
        file.write(written.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    for name in NAMES:
        assert WITHOUT_CODE in refused(*commands(run, checkpoint, tmp_path)[name])
    assert not (tmp_path / "exported").exists()


def test_the_payload_would_run_without_the_guard(sharded_run, copied, payload):
    checkpoint = copied(sharded_run) / "checkpoints" / "last.ckpt"
    name = "optimizer_0.param_groups.0.lr"
    poison_bytes(checkpoint, name, payload)
    with pytest.raises(pickle.UnpicklingError), plain_sharded_reads():
        dcp.load({name: 0.0}, checkpoint_id=checkpoint, no_dist=True)
    assert not payload.trace.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({name: 0.0}, checkpoint_id=checkpoint, no_dist=True)
    assert payload.trace.exists()


def test_metadata_that_points_elsewhere(sharded_run, copied):
    checkpoint = copied(sharded_run) / "checkpoints" / "last.ckpt"
    metadata = read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = "../../other.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ForeignCodeError, match=r"\.\./\.\./other"):
        read_metadata(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", pickle.dumps({"not": "metadata"})])
def test_damaged_metadata(content, sharded_run, copied):
    checkpoint = copied(sharded_run) / "checkpoints" / "last.ckpt"
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        read_metadata(checkpoint)


def test_a_torn_shard_is_said_to_be_damaged(sharded_run, copied, refused, tmp_path):
    run = copied(sharded_run)
    checkpoint = run / "checkpoints" / "last.ckpt"
    shard = checkpoint / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    for older in (run / "checkpoints").glob("*step=1.ckpt"):
        shutil.rmtree(older)
    assert "its file __0_0.distcp is shorter" in refused(*commands(run, checkpoint, tmp_path)["fit"])


def test_letting_checkpoints_run_code_is_refused(file_run, refused, tmp_path):
    checkpoint = file_run / "checkpoints" / "last.ckpt"
    said = refused(*commands(file_run, checkpoint, tmp_path)["fit"], "--weights_only=false")
    assert "would let a checkpoint run code" in said
