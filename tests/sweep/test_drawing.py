"""What Optuna draws for random and bayes sweeps, and that a sweep that was killed goes on with it."""

import math
from collections import Counter

import pytest

from bfpo_pl.component import UserError
from bfpo_pl.sweep.drawing import plan_of
from bfpo_pl.sweep.spec import read_spec
from bfpo_pl.sweep.store import FAILED, FINISHED, SweepFolder

pytest.importorskip("optuna", reason="random and bayes sweeps need Optuna (bfpo_pl[sweep])")

DRAWN = """
method: {method}
metric: {{name: val/all/all/loss, goal: minimize}}
parameters:
  x: {{min: -3.0, max: 3.0}}
  n: {{min: 1, max: 4}}
  lr: {{distribution: log_uniform_values, min: 1.0e-5, max: 1.0e-1}}
  q: {{distribution: q_uniform, min: 0.0, max: 1.0, q: 0.25}}
  kind: {{values: [a, b]}}
  fixed: {{value: 7}}
"""


@pytest.fixture
def begin(tmp_path):
    def open_sweep(method, name="sweep", limit=40):
        path = tmp_path / "sweep.yaml"
        path.write_text(DRAWN.format(method=method))
        spec, folder = read_spec(path), SweepFolder(tmp_path / name)
        folder.open(spec)
        return folder, plan_of(spec, folder, limit)

    return open_sweep


def draw(folder, plan, count, objective=lambda values: 0.0):
    for _ in range(count):
        trial = plan.next_trial(folder.trials())
        trial.status, trial.metric = FINISHED, objective(trial.parameters)
        plan.tell(trial)
        folder.write(trial)


def test_values_lie_where_they_should(begin):
    folder, plan = begin("random")
    draw(folder, plan, 40)
    found = [trial.parameters for trial in folder.trials()]
    assert plan.next_trial(folder.trials()) is None
    assert all(-3 <= each["x"] <= 3 and 1e-5 <= each["lr"] <= 1e-1 and each["fixed"] == 7 for each in found)
    assert {each["q"] for each in found} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert set(Counter(each["n"] for each in found)) == {1, 2, 3, 4}
    assert {each["kind"] for each in found} == {"a", "b"}
    middle = sorted(math.log10(each["lr"]) for each in found)[20]
    assert -4 < middle < -2  # even in the logarithm: the middle of [-5, -1] is -3


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_sweep_that_is_opened_again_draws_what_it_would_have_drawn(begin, method):
    def objective(values):
        return (values["x"] - 1) ** 2

    whole, plan = begin(method, "whole")
    draw(whole, plan, 15, objective)
    parts, plan = begin(method, "parts")
    draw(parts, plan, 6, objective)
    parts, plan = begin(method, "parts")
    draw(parts, plan, 9, objective)
    assert [trial.parameters for trial in parts.trials()] == [trial.parameters for trial in whole.trials()]


def test_bayes_learns_from_the_trials(begin):
    def objective(values):
        return (values["x"] - 1) ** 2

    means = {}
    for method in ("random", "bayes"):
        folder, plan = begin(method, method)
        draw(folder, plan, 40, objective)
        late = folder.trials()[20:]
        means[method] = sum(objective(trial.parameters) for trial in late) / len(late)
    assert means["bayes"] < 0.5 * means["random"]


def test_bayes_learns_from_a_trial_that_failed_at_first(begin):
    def finished(folder):
        study = plan_of(read_spec(folder.path / "sweep.yaml"), folder, 40)._study
        return [(each.params["x"], each.value) for each in study.trials if each.state.name == "COMPLETE"]

    folder, plan = begin("bayes")
    trial = plan.next_trial([])
    trial.status = FAILED
    plan.tell(trial)
    folder.write(trial)
    assert finished(folder) == []
    trial.status, trial.metric = FINISHED, 0.25
    for _ in range(2):  # a sweep may be killed between telling and recording
        _, plan = begin("bayes")
        plan.tell(trial)
    assert finished(folder) == [(trial.parameters["x"], 0.25)]
    following = plan.next_trial(folder.trials())
    following.status, following.metric = FINISHED, 0.5
    plan.tell(following)
    assert finished(folder)[1:] == [(following.parameters["x"], 0.5)]


def test_no_end(begin):
    with pytest.raises(UserError, match="random has no end; set run_cap in the file, or --trials"):
        begin("random", limit=None)
