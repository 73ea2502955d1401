"""Signals, `--resume`, and what a run's folder says of it; by the real command, in this process."""

import csv
import json
import os
import re
import shutil
import signal
import stat
import subprocess

import lightning.pytorch  # noqa: F401  # now: its log handler keeps the standard error of the time of its import
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from bfpo_pl.checkpoints.find import find_checkpoint, newest_complete
from bfpo_pl.cli import main
from bfpo_pl.export.run import checkpoint_of
from bfpo_pl.resuming import differences

MACHINE = re.compile("_second|memory|data_wait")
# Logs at steps 1, 5, 10: a stop at step 7 has sums of two steps that are not logged yet. Dropout draws at every step.
RUN = [
    "--trainer.max_steps=12",
    "--trainer.log_every_n_steps=5",
    "--trainer.val_check_interval=6",
    "--checkpoint.every_n_train_steps=4",
    "--trainer.accumulate_grad_batches=2",
    "--model.trainable=LoRA",
    "--model.trainable.dropout=0.3",
    "--model.reference=AdapterOff",
    "--model.optimizer.lr=0.01",
]
SIGTERM_AT_7 = [
    "--trainer.callbacks+=interruptions.SignalAt",
    "--trainer.callbacks.step=7",
    f"--trainer.callbacks.number={int(signal.SIGTERM)}",
]


@pytest.fixture
def fit(bfpo, base, small):
    return lambda *more: bfpo("fit", *base, *small, *RUN, *more)


@pytest.fixture
def stopped(fit, tmp_path):
    """A run that a signal stopped in step 7, and its exit code."""

    def stop(number=signal.SIGTERM, *more):
        with pytest.raises(SystemExit) as caught:
            fit(*SIGTERM_AT_7[:-1], f"--trainer.callbacks.number={int(number)}", *more)
        [folder] = (tmp_path / "runs" / "bfpo").iterdir()
        return folder, caught.value.code

    return stop


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


def assert_equal_weights(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def metrics(folder):
    """Every value that is of the training, not of the machine, by step and name."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = [(row["step"], key, value) for row in rows for key, value in row.items() if value and key != "step"]
    return sorted(item for item in named if not MACHINE.search(item[1]))


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(stopped, capfd, number, code):
    before = signal.getsignal(number)
    folder, found = stopped(number)
    assert found == code
    assert signal.getsignal(number) == before
    assert (status(folder)["state"], status(folder)["step"]) == ("stopped", 7)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 7
    assert not (folder / "export").exists()
    assert f"Stopped by {signal.Signals(number).name} after step 7" in capfd.readouterr().err


def test_a_stopped_run_goes_on_in_its_folder_as_if_it_had_not_stopped(stopped, fit, tmp_path):
    """Weights bit for bit, with dropout; every metric, those of steps on both sides of the stop among them."""
    folder, _ = stopped()
    whole = fit("--resume=auto").run_folder  # without the callback it is another config, so a new run
    assert whole != folder
    resumed = fit(*SIGTERM_AT_7, "--resume=auto")
    assert resumed.run_folder == folder
    assert_equal_weights(folder, whole)
    assert metrics(folder) == metrics(whole)
    assert [state["state"] for state in (status(folder), status(whole))] == ["finished", "finished"]
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["resumed"]) == 1
    assert "epoch=" in environment["resumed"][0]["parent_checkpoint"]
    assert len(list((tmp_path / "runs" / "bfpo").iterdir())) == 2


def test_a_second_interrupt_stops_at_once(fit, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        fit(*SIGTERM_AT_7[:-1], f"--trainer.callbacks.number={int(signal.SIGINT)}", "--trainer.callbacks.times=2")
    signal.signal(signal.SIGINT, before)  # Lightning ignores further ones, and leaves it so
    assert caught.value.code == 130
    [folder] = (tmp_path / "runs" / "bfpo").iterdir()
    assert (status(folder)["state"], status(folder)["step"]) == ("stopped", 6)
    assert sorted(path.name for path in (folder / "checkpoints").glob("*step*")) == ["epoch=0-step=4.ckpt"]


def test_a_run_without_checkpoints_says_that_none_is_saved(stopped):
    with pytest.warns(UserWarning, match="No checkpoint is saved"):
        folder, code = stopped(signal.SIGTERM, "--trainer.enable_checkpointing=false")
    assert code == 143
    assert not (folder / "checkpoints").exists()


# ---- Slurm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [("4711", None), ("4712", ("4700", "3"))])
def test_slurm_is_asked_to_queue_the_job_anew(stopped, tmp_path, monkeypatch, job):
    """By the signal that announces the end of a job's time; `scontrol` is a script that notes its arguments."""
    noted = tmp_path / "scontrol.txt"
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {noted}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    identity, array = job
    slurm = {"JOB_ID": identity, "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    if array:
        slurm |= {"ARRAY_JOB_ID": array[0], "ARRAY_TASK_ID": array[1]}
    for name, value in (slurm | {"NTASKS_PER_NODE": "1", "NODELIST": "localhost"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder, code = stopped(signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1
    assert status(folder)["state"] == "stopped"
    assert noted.read_text() == f"requeue {'_'.join(array) if array else identity}\n"


def test_sigusr1_means_nothing_without_slurm(fit):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        run = fit(*SIGTERM_AT_7[:-1], f"--trainer.callbacks.number={int(signal.SIGUSR1)}")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [1]
    assert status(run.run_folder)["state"] == "finished"


# ---- which run goes on --------------------------------------------------------------------------------------------


def refused(capsys, call, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_a_finished_run_has_nothing_to_go_on_with(bfpo, base, small, tmp_path):
    run = bfpo("fit", *base, *small)
    before = {path: path.stat().st_mtime_ns for path in run.run_folder.rglob("*")}
    for resume in ("auto", str(run.run_folder)):
        with pytest.raises(SystemExit) as caught:
            bfpo("fit", *base, *small, f"--resume={resume}")
        assert caught.value.code == 0
    assert {path: path.stat().st_mtime_ns for path in run.run_folder.rglob("*")} == before
    assert len(list((tmp_path / "runs" / "bfpo").iterdir())) == 1


def test_a_run_of_another_config_is_refused_by_name(stopped, fit, bfpo, base, small, capsys):
    folder, _ = stopped()
    text = refused(capsys, fit, *SIGTERM_AT_7, f"--resume={folder}", "--model.loss.tau=0.25")
    assert "model.loss.init_args.tau is 0.5 there and 0.25 here" in text
    assert f"--ckpt_path={folder}" in text
    text = refused(capsys, fit, f"--resume={folder.parent}")
    assert "is not the folder of a run" in text
    text = refused(capsys, bfpo, "sft", "-c", "configs/sft.yaml", f"--resume={folder}")
    assert "is one of `bfpo fit`, not of `bfpo sft`" in text
    text = refused(capsys, fit, "--resume=auto", f"--ckpt_path={folder}")
    assert "not both" in text
    text = refused(capsys, bfpo, "validate", *base, *small, "--resume=auto")
    assert "`bfpo validate` takes --ckpt_path" in text


def test_a_run_that_is_running_is_left_alone(stopped, fit, capsys):
    folder, _ = stopped()
    with FileLock(folder / "run.lock"):
        text = refused(capsys, fit, *SIGTERM_AT_7, "--resume=auto")
    assert f"{folder} is still running: process {status(folder)['process']} on" in text
    assert status(folder)["state"] == "stopped"


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_in_its_folder(fit, tmp_path):
    run = fit("--trainer.max_steps=2", "--checkpoint.save_last=false", "--checkpoint.every_n_train_steps=100")
    folder = run.run_folder
    whole = metrics(folder)
    (folder / "status.json").write_text(json.dumps({"state": "running", "process": 1, "host": "gone"}))
    (folder / "metrics.csv").write_text((folder / "metrics.csv").read_text() + "2,0.25,0.1")
    run = fit(
        "--trainer.max_steps=2", "--checkpoint.save_last=false", "--checkpoint.every_n_train_steps=100", "--resume=auto"
    )
    assert run.run_folder == folder
    assert metrics(folder) == whole


def test_a_run_killed_after_its_last_step_is_exported(fit, capsys):
    run = fit("--trainer.max_steps=4")
    folder = run.run_folder
    whole = weights(folder)
    shutil.rmtree(folder / "export")
    (folder / "status.json").write_text(json.dumps({"state": "running"}))
    assert fit("--trainer.max_steps=4", "--resume=auto").run_folder == folder
    assert "Validation never ran" not in capsys.readouterr().err
    assert status(folder)["state"] == "finished"
    assert weights(folder).keys() == whole.keys()
    assert all(torch.equal(weights(folder)[name], value) for name, value in whole.items())


def test_a_validation_that_a_kill_came_before_runs_when_the_fit_goes_on(fit, tmp_path):
    """The checkpoint of step 4 is there, and nothing of the validation that was due after it."""
    settings = ["--trainer.val_check_interval=8", "--trainer.max_steps=6", "--checkpoint.monitor=val/all/all/loss"]
    whole = fit(*settings).run_folder
    plant = ["--trainer.callbacks+=interruptions.FailAtValidation", f"--trainer.callbacks.once={tmp_path / 'failed'}"]
    with pytest.raises(SystemExit):
        fit(*settings, *plant)
    resumed = fit(*settings, *plant, "--resume=auto").run_folder
    assert resumed != whole
    assert len(list((tmp_path / "runs" / "bfpo").iterdir())) == 2
    assert metrics(resumed) == metrics(whole)
    assert any(step == "4" and name.startswith("val/") for step, name, _ in metrics(whole))
    scores = [json.loads((folder / "checkpoints/index.json").read_text()) for folder in (whole, resumed)]
    assert scores[0] == scores[1]
    assert_equal_weights(resumed, whole)


def test_the_last_validation_runs_when_a_kill_came_before_it(fit, tmp_path):
    """Nothing is left to train, and still the end of the run is as if it had not been stopped."""
    settings = ["--trainer.val_check_interval=12", "--trainer.max_steps=6", "--checkpoint.every_n_train_steps=6"]
    settings += ["--checkpoint.monitor=val/all/all/loss"]
    whole = fit(*settings).run_folder
    plant = ["--trainer.callbacks+=interruptions.FailAtValidation", f"--trainer.callbacks.once={tmp_path / 'failed'}"]
    with pytest.raises(SystemExit):
        fit(*settings, *plant)
    resumed = fit(*settings, *plant, "--resume=auto").run_folder
    assert len(list((tmp_path / "runs" / "bfpo").iterdir())) == 2
    assert metrics(resumed) == metrics(whole)
    assert {step for step, name, _ in metrics(whole) if name.startswith("val/")} == {"6"}
    scores = [json.loads((folder / "checkpoints/index.json").read_text()) for folder in (whole, resumed)]
    assert scores[0] == scores[1]
    assert None not in scores[1]["checkpoints"].values()
    assert_equal_weights(resumed, whole)
    assert status(resumed)["state"] == "finished"


def test_a_run_in_its_last_validation_is_left_alone(fit, capsys):
    """It has made its last step, and another process is about to end it."""
    folder = fit("--trainer.max_steps=4").run_folder
    (folder / "status.json").write_text(json.dumps({"state": "running", "process": 17, "host": "elsewhere"}))
    before = (folder / "export" / "model.safetensors").stat().st_mtime_ns
    with FileLock(folder / "run.lock"):
        text = refused(capsys, fit, "--trainer.max_steps=4", "--resume=auto")
    assert f"{folder} is still running: process 17 on elsewhere" in text
    assert status(folder)["state"] == "running"
    assert (folder / "export" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("step", [5, 7])
def test_a_run_whose_time_was_up_goes_on(fit, step):
    """The time is up amid a step of two micro-batches, in the last of an epoch and within one."""
    whole = fit().run_folder
    limit = ["--trainer.callbacks+=interruptions.SleepAt", f"--trainer.callbacks.step={step}"]
    limit += ["--trainer.callbacks.seconds=6", "--trainer.max_time=00:00:00:05"]
    run = fit(*limit)
    folder, last = run.run_folder, run.trainer.global_step
    batches = run.trainer.fit_loop.epoch_loop.total_batch_idx + 1
    assert 0 < last <= step
    assert batches == 2 * last
    assert (status(folder)["state"], status(folder)["step"]) == ("stopped", last)
    assert status(folder)["reason"] == f"trainer.max_time was over after step {last}."
    while status(folder)["state"] == "stopped":  # again only where the machine is very slow
        before = status(folder)["step"]
        assert fit(*limit, "--resume=auto").run_folder == folder
        assert status(folder)["step"] > before
    assert status(folder)["reason"] is None
    trained = [[row for row in metrics(each) if row[1].startswith("train/")] for each in (folder, whole)]
    assert trained[0] == trained[1]
    assert_equal_weights(folder, whole)


def test_how_long_a_start_may_take_is_not_part_of_which_run_it_is():
    ours = {"runs": "a", "trainer": {"max_time": "00:00:00:05", "max_steps": 12}}
    assert differences(ours, {"trainer": {"max_time": {"hours": 1}, "max_steps": 12}}) == []
    changed = differences(ours, {"trainer": {"max_time": None, "max_steps": 13}})
    assert changed == ["trainer.max_steps is 12 there and 13 here"]


def test_the_same_wandb_run_goes_on(stopped, fit, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    logger = ["-c", "configs/logger/wandb_offline.yaml"]
    folder, _ = stopped(signal.SIGTERM, *logger)
    run = fit(*SIGTERM_AT_7, *logger, "--resume=auto")
    assert run.run_folder == folder
    files = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{status(folder)['wandb_id']}.wandb"}


def test_a_run_whose_config_names_the_folder_of_its_checkpoints_goes_on_from_there(stopped, fit, tmp_path, capsys):
    dirpath = f"--checkpoint.dirpath={tmp_path / 'fast'}"
    folder, _ = stopped(signal.SIGTERM, dirpath)
    [newest] = (tmp_path / "fast").glob("*step=7.ckpt")
    assert checkpoint_of(folder, "last") == checkpoint_of(folder, newest.name) == newest
    assert find_checkpoint(str(folder), folder.parent) == str(newest)
    main(["checkpoints", str(folder)])
    assert newest.name in capsys.readouterr().out
    times = newest.stat()
    os.utime(newest, (0, 0))  # as if an older run with the same setting had left it
    found = newest_complete(folder)
    assert (found.step, [passed.path for passed in found.passed_over]) == (4, [newest])
    os.utime(newest, (times.st_atime, times.st_mtime))
    resumed = fit(*SIGTERM_AT_7, dirpath, "--resume=auto")
    assert resumed.run_folder == folder
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["resumed"][0]["parent_checkpoint"] == str(newest)


# ---- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded(fit, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        fit("--trainer.callbacks+=interruptions.FailAt", "--trainer.callbacks.step=3")
    assert caught.value.code == 1
    assert "the planted failure of rank 0" in capsys.readouterr().err
    [folder] = (tmp_path / "runs" / "bfpo").iterdir()
    assert (status(folder)["state"], status(folder)["reason"]) == ("failed", "the planted failure of rank 0")


def test_out_of_memory_says_which_settings_to_lower(fit, capsys):
    with pytest.raises(SystemExit) as caught:
        fit(
            "--trainer.callbacks+=interruptions.FailAt", "--trainer.callbacks.step=2", "--trainer.callbacks.memory=true"
        )
    assert caught.value.code == 1
    text = capsys.readouterr().err
    for part in ("Tried to allocate 20.00 GiB", "batch_size", "activation_checkpointing", "chunk_size", "fsdp2.yaml"):
        assert part in text
    assert "Of the allocated memory" not in text


@pytest.mark.parametrize("root", ["/proc/runs", "{file}/runs"])
def test_a_folder_that_cannot_be_written_is_refused_before_weights_load(
    base, small, tmp_path, capsys, in_repository, root
):
    (tmp_path / "file").touch()
    root = root.format(file=tmp_path / "file")
    text = refused(capsys, main, ["fit", *base, *small, f"--runs={root}"])
    assert f"--runs={root}: a run cannot be recorded there" in text
    assert "parameters train" not in text


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "status.json"])
def test_a_record_that_cannot_be_written_ends_with_one_message_and_the_lock_let_go(stopped, fit, capsys, name):
    folder, _ = stopped()
    (folder / f"{name}.part").mkdir()  # where the file would be written
    text = refused(capsys, fit, *SIGTERM_AT_7, "--resume=auto")
    assert f"The run folder {folder} cannot be written: Is a directory" in text
    assert status(folder)["state"] != "finished"
    with FileLock(folder / "run.lock", timeout=0):
        (folder / f"{name}.part").rmdir()
    assert fit(*SIGTERM_AT_7, "--resume=auto").run_folder == folder
    assert status(folder)["state"] == "finished"


def test_a_run_on_a_disk_mounted_for_reading_is_refused_before_weights_load(
    base, small, tmp_path, capsys, in_repository
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        run = main(["fit", *base, *small, f"--runs={disk}"]).run_folder
        (run / "status.json").write_text('{"state": "running"}')
        subprocess.run([mount, "-o", "remount,ro", disk], check=True)
        text = refused(capsys, main, ["fit", *base, *small, f"--runs={disk}", "--resume=auto"])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert f"{run}: a run cannot be recorded there (Read-only file system)" in text
    assert "parameters train" not in text


def test_the_config_does_not_name_the_run_that_goes_on(stopped):
    folder, _ = stopped()
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume"] is None
