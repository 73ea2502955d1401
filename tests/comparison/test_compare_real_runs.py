"""`bfpo compare` on what `bfpo fit` really leaves behind."""

from __future__ import annotations

import csv
import json

import pytest

EVALUATION = """
trainer:
  callbacks:
    - class_path: bfpo_pl.callbacks.microworld.MicroworldEvaluation
      init_args: {temperatures: [0.0], max_prompts: 8, samples: 4}
"""
LOSS = "val/all/all/loss"


def last_of(run, column):
    with (run / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)][-1]


def test_fits_of_two_seeds_and_two_strengths(bfpo, base, small, tmp_path):
    evaluation = tmp_path / "evaluation.yaml"
    evaluation.write_text(EVALUATION)
    runs = {}
    for seed in (0, 1):
        for tau in (0.1, 0.5):
            settings = [f"--seed_everything={seed}", f"--model.loss.tau={tau}", "--export.enabled=false"]
            # The data's seeds follow the run's, as in a sweep.
            settings += [
                f"--data.streams.safety.source.seed={seed}",
                "--trainer.max_steps=4",
                "--trainer.val_check_interval=2",
            ]
            runs[seed, tau] = bfpo("fit", *base, "-c", str(evaluation), *small, *settings).run_folder
    bfpo("compare", str(tmp_path / "runs"), "--to", str(tmp_path / "out"), "--baseline", "tau=0.1", "--metrics", LOSS)
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["left_out"] == []
    groups = {group["label"]: group for group in comparison["groups"]}
    assert sorted(groups) == ["tau=0.1", "tau=0.5"]
    for tau in (0.1, 0.5):
        found = groups[f"tau={tau}"]["metrics"][LOSS]
        assert found["values"] == {str(seed): last_of(runs[seed, tau], LOSS) for seed in (0, 1)}
    changes = [last_of(runs[seed, 0.5], LOSS) - last_of(runs[seed, 0.1], LOSS) for seed in (0, 1)]
    assert groups["tau=0.5"]["metrics"][LOSS]["difference"]["mean"] == pytest.approx(sum(changes) / 2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<div class="prompt">') == 4
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "front.png",
        "by_tau.png",
        "margins.png",
        "training.png",
    }
