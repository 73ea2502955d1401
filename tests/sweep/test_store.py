"""Who may run a trial, and what the folder of a sweep keeps."""

import json
import subprocess
import threading

import pytest

from bfpo_pl.component import RunError, UserError
from bfpo_pl.sweep.spec import read_spec
from bfpo_pl.sweep.store import CLAIM, FAILED, FINISHED, RUNNING, SweepFolder, Trial, trial_id


def test_ids_do_not_depend_on_the_order_of_the_keys():
    assert trial_id({"a": 1, "b": 2}) == trial_id({"b": 2, "a": 1}) != trial_id({"a": 2, "b": 1})


@pytest.fixture
def folder(tmp_path):
    return SweepFolder(tmp_path / "sweep")


def test_a_trial_is_taken_once(folder):
    trial = Trial("t", {"a": 1})
    with folder.locked():
        assert folder.take(trial)
        assert not SweepFolder(folder.path).take(Trial("t", {"a": 1}))
    trial.status = FINISHED
    folder.release(trial)
    (found,) = folder.trials()
    assert (found.status, found.attempts, found.parameters) == (FINISHED, 1, {"a": 1})
    assert not (folder.folder(trial) / CLAIM).exists()


def test_a_trial_that_ended_since_it_was_read_is_not_taken_again(folder):
    other = SweepFolder(folder.path)
    with folder.locked():
        folder.take(Trial("t", {}))
    (seen,) = other.trials()  # running
    mine = folder.trials()[0]
    mine.status = FINISHED
    folder.release(mine)
    with other.locked():
        assert not other.take(seen)
    assert [trial.status for trial in folder.trials()] == [FINISHED]


def test_a_trial_does_not_end_while_another_process_looks_for_one(folder):
    trial = Trial("t", {})
    with folder.locked():
        folder.take(trial)
    trial.status = FINISHED
    ending = threading.Thread(target=folder.release, args=(trial,), daemon=True)
    with SweepFolder(folder.path).locked():
        ending.start()
        ending.join(timeout=0.5)
        assert (folder.folder(trial) / CLAIM).exists()
        assert [found.status for found in folder.trials()] == [RUNNING]
    ending.join(timeout=20)
    assert not (folder.folder(trial) / CLAIM).exists()
    assert [found.status for found in folder.trials()] == [FINISHED]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.yaml").write_text("a: 1\n")

    def read(values, command="[bfpo, fit, -c, part.yaml]"):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"method: grid\nparameters:\n  seed_everything: {{values: {values}}}\ncommand: {command}\n")
        return read_spec(path)

    return read


def test_a_sweep_may_grow_but_not_become_another(folder, spec):
    folder.open(spec([1]))
    folder.open(spec([1, 2]))
    with pytest.raises(UserError, match=r"is the folder of another sweep.*--name NEW"):
        folder.open(spec([1], "[bfpo, sft]"))


DRAWN = """
method: {method}
metric: {{name: {metric}, goal: {goal}}}
parameters: {{x: {{min: 0.0, max: {most}}}, kind: {{values: {values}}}}}
"""


@pytest.fixture
def drawn(tmp_path):
    def read(method="random", metric="loss", goal="minimize", most=1.0, values=("a", "b")):
        path = tmp_path / "drawn.yaml"
        path.write_text(
            DRAWN.format(method=method, metric=metric, goal=goal, most=most, values=f"[{', '.join(values)}]")
        )
        return read_spec(path)

    return read


@pytest.mark.parametrize("method", ["random", "bayes"])
@pytest.mark.parametrize(("change", "key"), [({"values": "abc"}, "kind"), ({"most": 2.0}, "x")])
def test_what_is_drawn_from_cannot_change(folder, drawn, method, change, key):
    folder.open(drawn(method))
    folder.open(drawn(method))
    with pytest.raises(UserError, match=rf"what a {method} sweep draws from cannot change.* for {key}\. .*--name"):
        folder.open(drawn(method, **change))


@pytest.mark.parametrize("change", [{"metric": "accuracy"}, {"goal": "maximize"}])
def test_what_bayes_learns_from_cannot_change(folder, drawn, change):
    folder.open(drawn("bayes"))
    with pytest.raises(UserError, match=r"were drawn to minimize loss, and .* would (minimize accuracy|maximize loss)"):
        folder.open(drawn("bayes", **change))


def test_a_folder_of_an_earlier_version_is_taken_as_it_is(folder, drawn):
    folder.open(drawn("bayes"))
    record = folder.path / "sweep.json"
    before = json.loads(record.read_text())
    record.write_text(json.dumps({"identity": before["identity"], "files": {}}))
    changed = drawn("bayes", metric="accuracy", most=2.0)
    folder.open(changed)
    with pytest.raises(UserError, match="draws from cannot change"):  # known from now on
        folder.open(drawn("bayes", metric="accuracy"))


def test_another_metric_is_read_from_the_trials_that_have_finished(folder, drawn):
    folder.open(drawn())
    run = folder.path / "trials/t/exp/run"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,loss,accuracy\n1,0.5,0.25\n2,,0.75\n")
    folder.write(Trial("t", {}, status=FINISHED, metric=0.5, run="exp/run"))
    folder.write(Trial("u", {}, status=FAILED))
    folder.open(drawn(goal="maximize"))
    assert [trial.metric for trial in folder.trials()] == [0.5, None]
    folder.open(drawn(metric="accuracy"))
    assert [trial.metric for trial in folder.trials()] == [0.75, None]
    folder.open(drawn(metric="none"))
    assert [trial.metric for trial in folder.trials()] == [None, None]


def test_a_config_that_changed_is_refused(folder, spec, tmp_path):
    folder.open(spec([1]))
    (tmp_path / "part.yaml").write_text("a: 2\n")
    with pytest.raises(UserError, match=r"part\.yaml changed since trials"):
        folder.open(spec([1]))


def test_a_folder_that_cannot_be_written(tmp_path, spec):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"The sweep's folder .* cannot be written: .* the same command goes on"):
        SweepFolder(tmp_path / "file").open(spec([1]))


def test_a_full_disk(tmp_path_factory):
    small = tmp_path_factory.mktemp("full")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        folder = SweepFolder(small / "sweep")
        trial = Trial("t", {})
        folder.write(trial)
        with pytest.raises(OSError, match="No space left"), (small / "filler").open("wb") as file:
            file.write(b"0" * 100_000)
        trial.status = FINISHED
        with pytest.raises(RunError, match="No space left on device"):
            folder.write(trial)
        (found,) = folder.trials()
        assert found.status == "pending"  # what was there is whole
    finally:
        subprocess.run(["umount", str(small)], check=True)
