"""Sweeps over programs that are not bfpo's: what is run, how often, and what a failure does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bfpo_pl.cli import main
from bfpo_pl.sweep.store import FAILED, FINISHED, RUNNING, SweepFolder

TRIAL = Path(__file__).parent / "trial.py"


PRINT = """
import os
print({name[6:]: value for name, value in os.environ.items() if name[6:] in ("RUN_GROUP", "JOB_TYPE", "PROJECT")})
"""


@pytest.mark.parametrize(
    ("options", "project", "mine", "expected"),
    [
        ([], "safety", {}, {"RUN_GROUP": "sweep", "JOB_TYPE": "trial", "PROJECT": "safety"}),
        (["--name=second"], None, {}, {"RUN_GROUP": "second", "JOB_TYPE": "trial"}),
        ([], "safety", {"RUN_GROUP": "g", "PROJECT": "p"}, {"RUN_GROUP": "g", "JOB_TYPE": "trial", "PROJECT": "p"}),
    ],
)
def test_what_wandb_is_told(tmp_path, monkeypatch, options, project, mine, expected):
    for name in ("RUN_GROUP", "JOB_TYPE", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name, value in mine.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "print.py").write_text(PRINT)
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"method: grid\nparameters: {{a: {{value: 1}}}}\ncommand: [{sys.executable}, {tmp_path / 'print.py'}]\n"
        + (f"project: {project}\n" if project else "")
    )
    main(["sweep", str(path), f"--runs={tmp_path}", *options])
    [log] = tmp_path.glob("sweeps/*/trials/*/log.txt")
    assert ast.literal_eval(log.read_text()) == expected


RUN = """
import pathlib, sys
[claim] = pathlib.Path(sys.argv[1]).glob("runs/sweeps/sweep/trials/*/claim.json")
run = claim.parent / "exp" / "run"
run.mkdir(parents=True)
(run / "status.json").write_text('{"state": "finished"}')
(run / "metrics.csv").write_text("step,val/all/all/loss,val/all/all/margin\\n1,0.5,2.0\\n")
"""
"""Leaves in its trial's folder what a run of bfpo's leaves."""


@pytest.fixture
def measured(tmp_path):
    """Runs a sweep whose trials leave a metrics.csv."""

    def call(method, metric):
        (tmp_path / "run.py").write_text(RUN)
        path = tmp_path / "sweep.yaml"
        path.write_text(
            f"method: {method}\nmetric: {{name: {metric}, goal: minimize}}\nrun_cap: 3\nparameters: {{a: {{values: "
            f"[1, 2, 3]}}}}\ncommand: [{sys.executable}, {tmp_path / 'run.py'}, {tmp_path}]\n"
        )
        return main(["sweep", str(path), f"--runs={tmp_path / 'runs'}"])

    return call


def test_a_mistaken_metric_is_said_once(measured, capsys):
    assert [trial.metric for trial in measured("grid", "val/all/all/los")] == [None] * 3
    said = capsys.readouterr().out
    assert said.count("metrics.csv has no column val/all/all/los; near it: val/all/all/loss, ") == 1


def test_bayes_stops_where_there_is_nothing_to_learn_from(measured, tmp_path, capsys):
    pytest.importorskip("optuna")
    with pytest.raises(SystemExit) as ended:
        measured("bayes", "val/all/all/los")
    assert ended.value.code == 1
    assert "has no column val/all/all/los; near it: val/all/all/loss, " in capsys.readouterr().err
    assert [trial.status for trial in SweepFolder(tmp_path / "runs/sweeps/sweep").trials()] == [FINISHED]


def test_a_metric_that_is_there(measured, capsys):
    assert [trial.metric for trial in measured("grid", "val/all/all/loss")] == [0.5] * 3
    assert "no column" not in capsys.readouterr().out


@pytest.fixture
def sweep(tmp_path):
    def call(*arguments, further=(), numbers=range(6)):
        path = tmp_path / "sweep.yaml"
        command = [sys.executable, str(TRIAL), str(tmp_path), *further, "${args}"]
        path.write_text(f"method: grid\nparameters: {{number: {{values: {list(numbers)}}}}}\ncommand: {command}\n")
        return main(["sweep", str(path), f"--runs={tmp_path / 'runs'}", *arguments])

    return call


def starts(folder):
    return {int(file.name.partition("-")[2]): file.read_text().count("once") for file in folder.glob("started-*")}


def test_every_trial_runs_once(sweep, tmp_path, capsys):
    trials = sweep("--workers=3")
    assert [trial.status for trial in trials] == [FINISHED] * 6
    assert starts(tmp_path) == dict.fromkeys(range(6), 1)
    assert "6/6 done, 0 running, 0 failed" in capsys.readouterr().out
    sweep("--workers=3")
    assert starts(tmp_path) == dict.fromkeys(range(6), 1)  # finished trials are not run again
    sweep("--workers=3", numbers=range(8))
    assert starts(tmp_path) == dict.fromkeys(range(8), 1)  # the sweep grew


def test_a_failure_is_recorded_and_does_not_stop_the_rest(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep("--workers=2", further=["--fail=2"])
    assert ended.value.code == 1
    trials = SweepFolder(tmp_path / "runs/sweeps/sweep").trials()
    assert sorted(trial.status for trial in trials) == [FAILED] + [FINISHED] * 5
    (failed,) = (trial for trial in trials if trial.status == FAILED)
    assert failed.parameters == {"number": 2}
    assert failed.error == "exit code 1: the planted failure"
    said = capsys.readouterr().err
    assert "1 of 6 trials failed; the last: exit code 1: the planted failure" in said
    assert "log.txt" in said
    with pytest.raises(SystemExit):
        sweep("--workers=2", further=["--fail=2"])
    assert starts(tmp_path)[2] == 1
    with pytest.raises(SystemExit):
        sweep("--workers=2", "--retry_failed=true", further=["--fail=2"])
    assert starts(tmp_path)[2] == 2


def test_a_limit_of_failures_stops_the_sweep(sweep, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep("--max_failures=2", numbers=["x", "y", "z", "w"], further=["--sleep=nonsense"])
    assert "2 of 2 trials failed and the sweep gave up" in capsys.readouterr().err
    assert len(SweepFolder(tmp_path / "runs/sweeps/sweep").trials()) == 2


@pytest.mark.distributed
def test_two_sweeps_of_one_folder_share_its_trials(sweep, tmp_path):
    command = [
        sys.executable,
        "-m",
        "bfpo_pl.cli",
        "sweep",
        str(tmp_path / "sweep.yaml"),
        f"--runs={tmp_path / 'runs'}",
    ]
    sweep("--trials=1", further=["--sleep=0.3"], numbers=range(12))  # writes the file
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    assert starts(tmp_path) == dict.fromkeys(range(12), 1)


@pytest.mark.parametrize("option", ["workers", "trials", "max_failures"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_below_one(sweep, tmp_path, capsys, option, number):
    with pytest.raises(SystemExit) as ended:
        sweep(f"--{option}={number}")
    assert ended.value.code == 2
    assert f"--{option} must be at least 1, not {number}." in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_program_that_is_not_there_is_a_failure_of_its_trial(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text("method: grid\nparameters: {a: {values: [1, 2]}}\ncommand: [./none.sh]\n")
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(path), f"--runs={tmp_path}"])
    assert ended.value.code == 1
    assert re.search(
        r"2 of 2 trials failed; the last: exit code 127: .*\./none\.sh.*: No such file", capsys.readouterr().err
    )
    folder = SweepFolder(tmp_path / "sweeps/sweep")
    assert [trial.status for trial in folder.trials()] == [FAILED] * 2
    assert not list(folder.path.glob("trials/*/claim.json"))


FILL = """
import pathlib, sys
started = pathlib.Path(sys.argv[1]) / f"started-{sys.argv[2][-1]}"
if sys.argv[2] == "--number=1" and not started.exists():
    with pathlib.Path(sys.argv[3], "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
with started.open("a") as file:
    file.write("once")
"""


def test_a_disk_that_fills_up(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (tmp_path / "fill.py").write_text(FILL)
        path = tmp_path / "sweep.yaml"
        command = [sys.executable, str(tmp_path / "fill.py"), str(tmp_path), "${args}", str(disk)]
        path.write_text(f"method: grid\nparameters: {{number: {{values: [0, 1, 2]}}}}\ncommand: {command}\n")
        for _ in range(2):  # it stays full
            with pytest.raises(SystemExit) as ended:
                main(["sweep", str(path), f"--runs={disk}"])
            assert ended.value.code == 1
            said = capsys.readouterr().err
            assert "cannot be written: No space left on device" in said
            assert "the same command goes on once it can" in said
        folder = SweepFolder(disk / "sweeps/sweep")
        assert sorted(trial.status for trial in folder.trials()) == [FINISHED, RUNNING]
        (disk / "filler").unlink()
        assert [trial.status for trial in main(["sweep", str(path), f"--runs={disk}"])] == [FINISHED] * 3
        assert starts(tmp_path) == {0: 1, 1: 2, 2: 1}  # that the second had ended could not be recorded
    finally:
        subprocess.run(["umount", str(disk)], check=True)
