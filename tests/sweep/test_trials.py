"""Sweeps over real `bfpo fit` runs: a crash, a NaN, kills, and a stop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bfpo_pl.cli import main
from bfpo_pl.sweep.results import last_value
from bfpo_pl.sweep.store import FAILED, FINISHED, STOPPED, SweepFolder

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed
METRIC = "val/all/all/loss"


def write(path, small, parameters, steps):
    further = ["--trainer.val_check_interval=1000000", "--checkpoint.every_n_train_steps=5", "--export.enabled=false"]
    configs = ["-c", str(ROOT / "configs/base.yaml"), "-c", str(ROOT / "configs/experiment/bfpo.yaml")]
    command = ["${env}", "bfpo", "fit", *configs, *small, *further, f"--trainer.max_steps={steps}"]
    command += [f"--trainer.val_check_interval={steps}", "${args}"]
    spec = {
        "method": "grid",
        "metric": {"name": METRIC, "goal": "minimize"},
        "parameters": {key: {"values": values} for key, values in parameters.items()},
        "command": command,
    }
    path.write_text(yaml.safe_dump(spec))
    return path


def trials_of(folder):
    return {tuple(trial.parameters.values()): trial for trial in SweepFolder(folder).trials()}


def test_a_crash_and_a_nan_are_recorded_with_their_reasons(tmp_path, small, capsys):
    path = write(tmp_path / "faults.yaml", small, {"model.optimizer.lr": [1e-3, 1e30], "model.loss.tau": [0.5, -1]}, 6)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(path), f"--runs={tmp_path}", "--workers=2"])
    assert ended.value.code == 1
    found = trials_of(tmp_path / "sweeps/faults")
    good = found.pop((0.5, 1e-3))
    folder = tmp_path / "sweeps/faults/trials" / good.id
    assert good.status == FINISHED
    assert good.metric == last_value(folder / good.run, METRIC) > 0
    assert json.loads((folder / good.run / "status.json").read_text())["state"] == "finished"
    assert {trial.status for trial in found.values()} == {FAILED}
    assert "tau" in found[-1, 1e-3].error
    assert "exit code 2" in found[-1, 1e-3].error
    assert "NaN or infinite" in found[0.5, 1e30].error
    assert "3 of 4 trials failed" in capsys.readouterr().err


@pytest.fixture
def started(tmp_path, small):
    """Starts a sweep of two runs in a process of its own."""
    path = write(tmp_path / "kills.yaml", small, {"model.loss.tau": [0.3, 0.5]}, 30)

    def start(runs):
        command = [sys.executable, "-m", "bfpo_pl.cli", "sweep", str(path), f"--runs={runs}", "--workers=2"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)

    return start


def wait_for(condition, process):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "it never came so far"
        assert process.poll() is None, "the sweep ended before it was to be killed"
        time.sleep(0.05)


def results(folder):
    """What became of each trial, and its metric."""
    return {key: (trial.status, trial.metric) for key, trial in trials_of(folder).items()}


def compared(folder):
    """What `bfpo compare` says of a sweep."""
    main(["compare", str(folder)])
    return (folder / "report/comparison.csv").read_text()


@pytest.mark.long
def test_a_sweep_that_was_killed_twice_ends_like_one_that_was_not(tmp_path, started):
    assert started(tmp_path / "whole").wait(timeout=400) == 0
    killed = tmp_path / "killed"

    def checkpoints(count):
        return lambda: len(list(killed.glob("sweeps/kills/trials/*/*/*/checkpoints/*step=*.ckpt"))) >= count

    for count in (1, 3):
        process = started(killed)
        wait_for(checkpoints(count), process)
        claims = [json.loads(file.read_text()) for file in killed.glob("sweeps/kills/trials/*/claim.json")]
        os.killpg(process.pid, signal.SIGKILL)
        for trial in claims[0]["processes"][1:]:  # the other one sees that its sweep has gone, saves, and ends
            os.kill(trial, signal.SIGKILL)
        process.wait()
    assert started(killed).wait(timeout=400) == 0
    expected = results(tmp_path / "whole/sweeps/kills")
    assert {status for status, _ in expected.values()} == {FINISHED}
    assert results(killed / "sweeps/kills") == expected
    assert compared(killed / "sweeps/kills") == compared(tmp_path / "whole/sweeps/kills")
    trials = trials_of(killed / "sweeps/kills").values()
    assert max(trial.attempts for trial in trials) >= 2
    for trial in trials:
        runs = list((killed / "sweeps/kills/trials" / trial.id).glob("*/*/config.yaml"))
        assert len(runs) == 1  # each went on in its own folder


def test_a_stop_lets_the_trials_save(tmp_path, started):
    process = started(tmp_path / "stopped")
    folder = tmp_path / "stopped/sweeps/kills"
    wait_for(lambda: any(folder.glob("trials/*/*/*/checkpoints/*step=*.ckpt")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert STOPPED in {trial.status for trial in trials_of(folder).values()}
    assert not list(folder.glob("trials/*/claim.json"))


def test_trials_share_the_prepared_data(tmp_path, small, monkeypatch):
    monkeypatch.setenv("BFPO_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "shared.yaml", small, {"model.loss.tau": [0.3, 0.4, 0.5]}, 2)
    spec = yaml.safe_load(path.read_text())
    spec["command"][-1:] = ["--model.reference=Precomputed", "${args}"]
    path.write_text(yaml.safe_dump(spec))
    main(["sweep", str(path), f"--runs={tmp_path}", "--workers=2"])
    cache = tmp_path / "cache"
    assert len(list(cache.glob("tokens/*/manifest.json"))) == 3  # two streams, one with validation: once for all
    logs = [file.read_text() for file in sorted((tmp_path / "sweeps/shared/trials").glob("*/log.txt"))]
    computed = [int(re.search(r"and of ([\d,]+) computed in", log)[1].replace(",", "")) for log in logs]
    assert sorted(computed)[:2] == [0, 0]  # the reference's log-probs, too: by the first trial
    assert max(computed) > 100
