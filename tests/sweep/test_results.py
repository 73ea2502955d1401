"""Why a trial failed."""

import pytest

from bfpo_pl.resuming import FAILED, RUNNING, write_status
from bfpo_pl.sweep.results import before_attempt, reason, run_folder


@pytest.fixture
def attempt(tmp_path):
    """An attempt at a trial: what it adds to the log, and says in its run's status."""

    def fail(said, code=1, run=None, **status):
        log = tmp_path / "log.txt"
        before = before_attempt(tmp_path, log)
        with log.open("a") as file:
            file.write(said)
        if run is not None:
            folder = tmp_path / "exp" / run
            folder.mkdir(parents=True, exist_ok=True)
            write_status(folder, **status)
        return reason(run_folder(tmp_path), log, code, before)

    return fail


def test_the_log_of_this_attempt(attempt):
    assert attempt("starts\nbfpo: error: no such file\n", 2) == "exit code 2: no such file"
    assert attempt("starts\nKilled\n", -9) == "ended by signal 9: Killed"
    assert attempt("", -9) == "ended by signal 9: it said nothing"


def test_the_status_of_this_attempt(attempt):
    run = "20260101-000000-aaaa"
    assert attempt("ends\n", 1, run, state=FAILED, reason="the loss is NaN") == "the loss is NaN"
    assert attempt("bfpo: error: no checkpoint\n", 2) == "exit code 2: no checkpoint"  # before it reached its run
    assert attempt("Killed\n", -9, run, state=RUNNING) == "ended by signal 9: Killed"
    assert attempt("", 1, run, state=FAILED, reason="the disk is full") == "the disk is full"
    assert attempt("", 1, "20260101-000001-bbbb", state=FAILED, reason="another run") == "another run"
