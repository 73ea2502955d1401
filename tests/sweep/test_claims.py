"""Which process has taken a trial, and whether it lives."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bfpo_pl.sweep.claims import STALE
from bfpo_pl.sweep.store import CLAIM, FAILED, FINISHED, RUNNING, STOPPED, SweepFolder, Trial

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for on Linux alone")
ROOT = Path(__file__).parents[2]
TAKE = """
import sys
from pathlib import Path
from bfpo_pl.sweep.store import SweepFolder, Trial

folder = SweepFolder(Path(sys.argv[1]))
with folder.locked():
    assert folder.take(Trial("t", {}))
print("taken", flush=True)
if "stay" in sys.argv:
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    return SweepFolder(tmp_path / "sweep")


@pytest.fixture
def trial():
    return Trial("t", {})


@pytest.fixture
def taken(folder):
    """Lets a process of its own take the trial."""
    processes = []

    def take(*words, before=()):
        process = subprocess.Popen(
            [*before, sys.executable, "-c", TAKE, str(folder.path), *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "taken\n"
        return process

    yield take
    for process in processes:
        process.communicate()


def claim_of(folder, trial, **owner):
    """A claim as earlier versions wrote it, with what is given in the place of that."""
    path = folder.folder(trial) / CLAIM
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "processes": [os.getppid()]} | owner))
    return path


def age(claim):
    old = time.time() - STALE - 5
    os.utime(claim, (old, old))


@linux
def test_a_trial_is_taken_by_one_process_and_free_when_that_has_died(folder, trial, taken):
    process = taken("stay")
    age(folder.folder(trial) / CLAIM)  # on one machine the process counts: it may only be suspended
    with folder.locked():
        assert folder.is_taken(trial)
        assert not folder.take(trial)
    process.kill()
    process.wait()
    (found,) = folder.trials()
    with folder.locked():
        assert not folder.is_taken(found)
        assert folder.take(found)
    assert [(each.status, each.attempts) for each in folder.trials()] == [(RUNNING, 2)]


@linux
def test_a_trial_is_taken_while_its_own_process_outlives_the_sweeps(folder, trial):
    with folder.locked():
        folder.take(trial)
    folder.started(trial, os.getppid())
    again = SweepFolder(folder.path)
    assert again.is_taken(trial)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    folder.started(trial, dead.pid)
    dead.wait()
    assert not again.is_taken(trial)  # what this process has left behind is no sign that another has it


@linux
@pytest.mark.parametrize("number", [os.getpid, os.getppid])
def test_a_number_that_was_given_to_another_process_is_not_the_owner(folder, trial, number):
    with folder.locked():
        folder.take(trial)
    path = folder.folder(trial) / CLAIM
    claim = json.loads(path.read_text())
    path.write_text(json.dumps(claim | {"processes": [number()], "started": ["1"]}))
    assert not SweepFolder(folder.path).is_taken(trial)


@linux
@pytest.mark.parametrize("change", [{"boot": "before"}, {"namespace": "pid:[1]"}, {"host": "elsewhere"}])
def test_where_processes_cannot_be_looked_for_signs_of_life_decide(folder, trial, change, taken):
    taken().wait()
    path = folder.folder(trial) / CLAIM
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert folder.is_taken(trial)
    age(path)
    assert not folder.is_taken(trial)


def test_a_container_with_the_name_of_this_machine(folder, trial, taken):
    own = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("no namespace can be made here")
    taken(before=own).wait()
    path = folder.folder(trial) / CLAIM
    claim = json.loads(path.read_text())
    assert claim["host"] == socket.gethostname()
    assert claim["processes"] == [1]  # a number that some process of this machine has as well
    assert folder.is_taken(trial)
    age(path)
    assert not folder.is_taken(trial)


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_a_claim_of_an_earlier_version(folder, trial, host):
    claim = claim_of(folder, trial, host=host)
    assert folder.is_taken(trial)
    age(claim)
    assert not folder.is_taken(trial)


def test_signs_of_life(folder, trial):
    with folder.locked():
        folder.take(trial)
    claim = folder.folder(trial) / CLAIM
    os.utime(claim, (0, 0))
    folder.beat()
    assert time.time() - claim.stat().st_mtime < 60
    claim_of(folder, trial)
    age(claim)
    before = claim.stat().st_mtime
    folder.beat()
    assert claim.stat().st_mtime == before  # another's


@pytest.mark.parametrize(("mine", "recorded"), [(FAILED, RUNNING), (STOPPED, RUNNING), (FINISHED, FINISHED)])
def test_what_another_process_has_taken_since_is_its_own(folder, trial, mine, recorded):
    with folder.locked():
        folder.take(trial)
    claim = claim_of(folder, trial)
    said = claim.read_text()
    folder.started(trial, os.getpid())
    trial.status = mine
    folder.release(trial)
    assert claim.read_text() == said
    assert [found.status for found in folder.trials()] == [recorded]


def test_what_has_finished_stays_finished(folder, trial):
    with folder.locked():
        folder.take(trial)
    SweepFolder(folder.path).write(Trial("t", {}, status=FINISHED, metric=0.5))  # by the process that had it before
    trial.status = FAILED  # its run is another process's
    folder.release(trial)
    assert [(found.status, found.metric) for found in folder.trials()] == [(FINISHED, 0.5)]
    assert not (folder.folder(trial) / CLAIM).exists()
