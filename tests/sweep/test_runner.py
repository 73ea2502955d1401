"""Which trials a sweep's runner takes, and what it says of them; the trials are programs that do little."""

import os
import sys
import time

import pytest

from bfpo_pl.sweep import runner as running
from bfpo_pl.sweep.drawing import plan_of
from bfpo_pl.sweep.runner import Runner
from bfpo_pl.sweep.spec import read_spec
from bfpo_pl.sweep.store import FAILED, FINISHED, SweepFolder, Trial, trial_id

NOTHING = [sys.executable, "-c", ""]


@pytest.fixture
def runner(tmp_path):
    """A runner of a grid of two numbers."""

    def make(command=NOTHING, retry_failed=False, show=lambda trials, running: None, say=print):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"method: grid\nparameters: {{number: {{values: [0, 1]}}}}\ncommand: {command}\n")
        spec, folder = read_spec(path), SweepFolder(tmp_path / "folder")
        folder.open(spec)
        return Runner(spec, folder, plan_of(spec, folder, None), 1, 10, retry_failed, show, say)

    return make


def numbered(number, **more):
    return Trial(trial_id({"number": number}), {"number": number}, **more)


def test_a_retry_leaves_what_another_machine_has_retried(runner):
    first = runner(retry_failed=True)
    for number in (0, 1):
        first.folder.write(numbered(number, status=FAILED, attempts=1, error="a fault"))
    here = runner(retry_failed=True)
    first.folder.write(numbered(0, status=FINISHED, attempts=2))  # the other machine's
    first.folder.write(numbered(1, status=FAILED, attempts=2, error="a fault"))
    here.run()
    assert sorted((trial.status, trial.attempts) for trial in here.folder.trials()) == [(FAILED, 2), (FINISHED, 2)]


def test_a_retry_runs_what_failed_once(runner):
    failing = [sys.executable, "-c", "raise SystemExit('a fault')"]
    folder = runner(failing).folder
    folder.write(numbered(0, status=FAILED, attempts=1, error="a fault"))
    folder.write(numbered(1, status=FINISHED, attempts=1))
    runner(failing).run()
    assert {trial.attempts for trial in folder.trials()} == {1}
    runner(failing, retry_failed=True).run()
    assert sorted((trial.status, trial.attempts) for trial in folder.trials()) == [(FAILED, 2), (FINISHED, 1)]


def test_signs_of_life_do_not_wait_for_what_the_sweep_waits_for(runner, monkeypatch):
    monkeypatch.setattr(running, "BEAT_EVERY", 0.05)
    seen = []

    def show(trials, shown):
        claims = list(sweep.folder.path.glob("trials/*/claim.json"))
        if claims and not seen:
            os.utime(claims[0], (0, 0))
            end = time.monotonic() + 20
            while claims[0].stat().st_mtime == 0 and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(claims[0].stat().st_mtime)

    sweep = runner(show=show)
    sweep.run()
    assert seen[0] > 0
