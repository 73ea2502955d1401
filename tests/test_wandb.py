"""A real offline W&B run, read back from the file that it wrote."""

from __future__ import annotations

import json
import struct
import time

import pytest
import wandb
from google.protobuf.message import DecodeError

JUDGED = [
    *("-c", "configs/logger/wandb_offline.yaml"),
    "--trainer.val_check_interval=2",
    "--trainer.callbacks=bfpo_pl.callbacks.microworld.MicroworldEvaluation",
    "--trainer.callbacks.max_prompts=8",
]


def records(path):
    """All records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records in one or more fragments)."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last fragment
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def whole(folder):
    """All records of a run's only .wandb file, the last of which W&B's own process may write a little later."""
    [file] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 60
    while True:
        try:
            read = list(records(file))
        except DecodeError:  # half of a record
            read = []
        if any(record.WhichOneof("record_type") == "exit" for record in read):
            return file, read
        assert time.monotonic() < end, "the run has no end"
        time.sleep(0.1)


def flat(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def offline_run(bfpo, base, small, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    bfpo("fit", *base, "-c", "configs/logger/wandb_offline.yaml", *small)  # must not swallow the run that follows
    return bfpo("fit", *base, *JUDGED, "--trainer.logger.tags=[tiny,test]", "--export.artifact=true", *small)


def test_offline_run_holds_config_metrics_and_the_sample_table(offline_run):
    file, read = whole(offline_run.run_folder)
    config, history = {}, []
    names = set()
    for record in read:
        if record.WhichOneof("record_type") == "config":
            config |= flat(record.config.update)
        elif record.WhichOneof("record_type") == "history":
            history.append(flat(record.history.item))
        elif record.WhichOneof("record_type") == "run":
            names.add((record.run.project, record.run.display_name))
            config |= flat(record.run.config.update)
    assert names == {("bfpo_pl", offline_run.run_folder.name)}
    assert config["model"]["labeling"]["class_path"] == "bfpo_pl.BFPO"
    assert config["model"]["loss"]["init_args"] == {"tau": 0.5}
    assert config["environment"]["packages"]["torch"]
    steps = [row for row in history if "train/all/all/loss" in row]
    assert len(steps) == 2
    [judged] = [row for row in history if "val/microworld/greedy/harmlessness" in row]
    assert judged["trainer/global_step"] == 2
    assert any("train/lr" in row for row in history)
    [table] = [row for row in history if "samples/greedy/path" in row]
    assert table["samples/greedy/_type"] == "table-file"
    media = json.loads((file.parent / "files" / table["samples/greedy/path"]).read_text())
    assert media["columns"][:4] == ["step", "decoding", "prompt", "class"]
    assert len(media["data"]) == 8


def test_group_job_type_tags_summaries_and_plot(offline_run):
    file, read = whole(offline_run.run_folder)
    [run] = [record.run for record in read if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_group, run.job_type, list(run.tags)) == ("bfpo", "fit", ["tiny", "test"])
    metrics = {record.metric.name: record.metric for record in read if record.WhichOneof("record_type") == "metric"}
    loss = metrics["val/all/all/loss"]
    assert (loss.step_metric, loss.summary.min, loss.summary.last) == ("trainer/global_step", True, True)
    assert metrics["val/microworld/greedy/both"].summary.max
    summary = {}
    for record in read:
        if record.WhichOneof("record_type") == "summary":
            summary |= flat(record.summary.update)
        elif record.WhichOneof("record_type") == "history":
            summary |= flat(record.history.item)
    assert summary["val/microworld/pareto_table/ncols"] == 4
    assert summary["val/microworld/pareto_table/nrows"] == 2
    [media] = (file.parent / "files").glob("media/table/val/microworld/pareto_table*.json")
    points = json.loads(media.read_text())
    assert points["columns"] == ["helpfulness", "harmlessness", "decoding", "step"]
    assert [row[2:] for row in points["data"]] == [["greedy", 2], ["t0.5", 2]]


def test_the_plot_of_a_run_that_goes_on_keeps_its_points(bfpo, base, small, offline_run):
    checkpoint = f"--ckpt_path={offline_run.run_folder / 'checkpoints' / 'last.ckpt'}"
    later = bfpo("fit", *base, *JUDGED, *small, checkpoint, "--trainer.max_steps=4")
    file, _ = whole(later.run_folder)
    tables = sorted(
        (file.parent / "files").glob("media/table/val/microworld/pareto_table*.json"), key=lambda f: f.stat().st_mtime
    )
    points = json.loads(tables[-1].read_text())["data"]
    assert [row[2:] for row in points] == [["greedy", 2], ["t0.5", 2], ["greedy", 4], ["t0.5", 4]]


def test_an_export_is_kept_as_an_artifact_if_asked(offline_run):
    _, read = whole(offline_run.run_folder)
    kept = [record.artifact for record in read if record.WhichOneof("record_type") == "artifact"]
    [artifact] = [each for each in kept if each.type == "model"]
    assert artifact.name == f"{offline_run.run_folder.name}-export"
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_the_key_is_in_no_file_of_the_run(offline_run):
    for path in offline_run.run_folder.rglob("*"):
        if path.is_file():
            assert b"0123456789abcdef0123456789abcdef01234567" not in path.read_bytes(), path


def test_a_run_of_wandbs_agent_logs_to_the_sweep_without_being_told(bfpo, base, small, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    agent = {"SWEEP_ID": "q1w2e3r4", "RUN_ID": "a1b2c3d4", "PROJECT": "ours", "RUN_GROUP": "tau", "MODE": "offline"}
    for name, value in agent.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it reads the environment once in a process
    _, read = whole(bfpo("fit", *base, *small).run_folder)
    [run] = [record.run for record in read if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.sweep_id, run.project, run.run_group) == ("a1b2c3d4", "q1w2e3r4", "ours", "tau")
    assert any(record.WhichOneof("record_type") == "history" for record in read)
    assert not (bfpo("fit", *base, *small, "--trainer.logger=false").run_folder / "wandb").exists()
    wandb.teardown()
