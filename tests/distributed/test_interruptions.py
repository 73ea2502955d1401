"""Signals, failing processes and launchers, on two processes by the real command."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BOUND = 60
"""Seconds in which all processes must have ended after one has failed or been told to stop."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
AUTO = "--resume=auto"


def environment(**more):
    kept = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "PL_GLOBAL_SEED")}
    path = os.pathsep.join([str(HERE), str(ROOT / "tests/support"), str(ROOT)])
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": scripts, **more}


def ended(arguments, folder, **more):
    """Exit code and output of a command that may fail; and, where something was planted, the seconds since then."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, timeout=600, env=environment(**more), check=False
    )
    planted = folder / "planted.txt"
    return (
        done.returncode,
        done.stdout + done.stderr,
        time.time() - float(planted.read_text()) if planted.exists() else 0.0,
    )


def started_by(launcher, arguments):
    """A command line of two processes of torchrun, or of `bfpo`, which starts the second itself."""
    script = ["-m", "bfpo_pl.cli", "fit", *arguments]
    return [*TORCHRUN, *script] if launcher == "torchrun" else [sys.executable, *script]


def plant(what, step, rank, folder):
    """Arguments that plant a callback, which notes when it acts."""
    settings = {"step": step, "rank": rank, "note": folder / "planted.txt"}
    named = [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    return [f"--trainer.callbacks+=interruptions.{what}", *named]


def status(run):
    return json.loads((run.folder / "status.json").read_text())


def assert_equal_weights(ours, theirs):
    assert ours.weights.keys() == theirs.weights.keys()
    for name, value in theirs.weights.items():
        assert torch.equal(ours.weights[name], value), name


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [
        ("bfpo", "ddp"),
        pytest.param("torchrun", "fsdp2", marks=pytest.mark.long),
        pytest.param("torchrun", "ddp", marks=pytest.mark.long),
        pytest.param("bfpo", "fsdp2", marks=pytest.mark.long),
    ],
)
def test_one_process_is_signalled_and_all_stop_after_the_same_step(
    launcher, strategy, tmp_path, started, command, only_run
):
    """The second one is; then the run goes on, and ends where the undisturbed one does, bit for bit."""
    arguments = [*command("sgd", strategy, tmp_path / "runs", *plant("SignalAt", 4, 1, tmp_path)), AUTO]
    code, log, seconds = ended(started_by(launcher, arguments), tmp_path)
    run = only_run(tmp_path / "runs", log)
    assert code == (1 if launcher == "torchrun" else 143), log[-3000:]  # torchrun has one code for all failures
    assert seconds < BOUND
    assert "bfpo: error" not in log
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 4)
    assert run.checkpoint(4).is_dir() == (strategy == "fsdp2")
    code, log, _ = ended(started_by(launcher, arguments), tmp_path)
    assert code == 0, log[-3000:]
    assert only_run(tmp_path / "runs", log).folder == run.folder
    assert "step=4.ckpt" in log
    assert status(run)["state"] == "finished"
    assert_equal_weights(run, started[strategy])
    assert list(run.metrics("train/")) == list(range(1, 11))


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("torchrun", 1),
        pytest.param("bfpo", 0, marks=pytest.mark.long),
        pytest.param("torchrun", 0, marks=pytest.mark.long),
        pytest.param("bfpo", 1, marks=pytest.mark.long),
    ],
)
def test_a_process_that_fails_ends_the_others_and_its_reason_is_on_the_screen(launcher, rank, tmp_path, command):
    arguments = command("sgd", "fsdp2", tmp_path / "runs", *plant("FailAt", 4, rank, tmp_path))
    code, log, seconds = ended(started_by(launcher, arguments), tmp_path)
    assert code != 0
    assert seconds < BOUND
    assert f"bfpo: error: the planted failure of rank {rank}" in log
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", f"runs={tmp_path}"], capture_output=True, text=True, check=False).stdout
    assert left == "", "no process is left"


def test_a_process_that_is_killed_is_named_and_nothing_else_is_said(tmp_path, command):
    planted = [*plant("SignalAt", 4, 1, tmp_path), f"--trainer.callbacks.number={int(signal.SIGKILL)}"]
    code, log, seconds = ended(started_by("bfpo", command("sgd", "ddp", tmp_path / "runs", *planted)), tmp_path)
    assert code == 1, log[-3000:]
    assert seconds < BOUND
    assert re.search(r"Process 1 \(pid \d+\) was killed by SIGKILL; if it was not you", log)
    assert "bfpo: error: Another process of this run ended, so this one cannot go on" in log
    assert "Traceback" not in log


def test_a_nan_of_one_process_is_skipped_on_both_and_its_rows_are_named(tmp_path, command, only_run):
    planted = ["--trainer.callbacks+=interruptions.NaNAt", "--trainer.callbacks.step=4", "--trainer.callbacks.rank=1"]
    arguments = command("sgd", "ddp", tmp_path / "runs", *planted, "--model.max_nonfinite_steps=1")
    code, log, _ = ended(started_by("bfpo", arguments), tmp_path)
    assert code == 0, log[-3000:]
    assert "none on this process; another one has them and names them) at optimizer step 3" in log
    assert len(re.findall(r"Process 1: The loss was NaN or infinite \(rows of this step: .*:\d+.*\)", log)) == 1
    run = only_run(tmp_path / "runs", log)
    assert all(value.isfinite().all() for value in run.weights.values())
    assert status(run)["step"] == 10
    assert run.metrics("train/skipped") == {step: {"train/skipped_steps": 1.0} for step in range(4, 11)}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_busy_port_is_named(tmp_path, command):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        torchelastic = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = ["fit", *command("sgd", "ddp", tmp_path / "runs")]
        code, log, _ = ended([sys.executable, "-m", "bfpo_pl.cli", *arguments], tmp_path, **world, **torchelastic)
    assert code == 1
    assert f"Processes cannot meet at 127.0.0.1:{port}, which another program uses" in log
    assert "Traceback" not in log


@pytest.mark.long
def test_a_busy_port_does_not_keep_the_processes_that_bfpo_started(tmp_path, command):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(busy.getsockname()[1])}
        code, log, _ = ended(started_by("bfpo", command("sgd", "ddp", tmp_path / "runs")), tmp_path, **where)
    assert code == 1
    assert "(the other processes have 2 s to end, too)" in log
    assert "Processes cannot meet at 127.0.0.1:" in log


@pytest.mark.long
def test_two_machines_of_torchrun_train_as_two_processes_of_one(tmp_path, started, command, only_run):
    """Two agents over the loopback device, each with one process, by the script that docs/scale.md shows."""
    where = {"NODES": "2", "DEVICES": "1", "MEET": f"127.0.0.1:{free_port()}"}
    arguments = command("sgd", "fsdp2", tmp_path / "runs")
    launch = [str(ROOT / "configs/launch/torchrun.sh"), *[a for a in arguments if "devices" not in a]]
    nodes = [
        subprocess.Popen(
            launch, cwd=tmp_path, env=environment(**where), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    logs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "".join(logs)[-4000:]
    run = only_run(tmp_path / "runs", "".join(logs))
    assert run.config["trainer"]["num_nodes"] == 2
    assert_equal_weights(run, started["fsdp2"])


SRUN = """#!{python}
import os, subprocess, sys
command = [argument for argument in sys.argv[1:] if not argument.startswith("--kill-on-bad-exit")]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": "0", "SLURM_NODEID": str(i)}})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.long
def test_slurms_script_is_queued_anew_and_goes_on(tmp_path, started, command, only_run):
    """`srun` and `scontrol` are stand-ins: two "nodes" here with one task each, and a note of what is asked."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    scripts = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/asked.txt\n',
        "bfpo": f'#!/bin/sh\nexec {sys.executable} -m bfpo_pl.cli "$@"\n',
    }
    for name, text in scripts.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755 | stat.S_IXUSR)
    slurm = {"JOB_ID": "4711", "JOB_NAME": "bfpo", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2"}
    slurm = {f"SLURM_{name}": value for name, value in (slurm | {"NODELIST": "localhost"}).items()}
    slurm |= {"MASTER_PORT": str(free_port()), "PATH": f"{bin_folder}{os.pathsep}{environment()['PATH']}"}
    plants = [*plant("SignalAt", 4, 1, tmp_path), f"--trainer.callbacks.number={int(signal.SIGUSR1)}"]
    arguments = [a for a in command("sgd", "fsdp2", tmp_path / "runs", *plants) if "devices" not in a]
    script = [str(ROOT / "configs/launch/slurm.sh"), *arguments]
    code, log, _ = ended(script, tmp_path, **slurm)
    run = only_run(tmp_path / "runs", log)
    assert code == 128 + signal.SIGUSR1, log[-3000:]
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 4)
    assert (tmp_path / "asked.txt").read_text() == "requeue 4711\n"
    code, log, _ = ended(script, tmp_path, **slurm)
    assert code == 0, log[-3000:]
    assert status(run)["state"] == "finished"
    assert_equal_weights(only_run(tmp_path / "runs", log), started["fsdp2"])
    assert load_file(run.folder / "export" / "model.safetensors").keys() == started["fsdp2"].weights.keys()
