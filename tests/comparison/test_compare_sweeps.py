"""`bfpo compare` on the folders of sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from run_folders import config, final, write_run, write_trial

from bfpo_pl.cli import main
from bfpo_pl.comparison.analysis import Question, analyse
from bfpo_pl.comparison.curves import one_parameter_curves
from bfpo_pl.comparison.reading import read
from bfpo_pl.sweep.store import trial_id

HELD_OUT = ["test/microworld/greedy/helpfulness", "test/microworld/greedy/harmlessness"]
BOTH = "val/microworld/greedy/both"
RUN = "bfpo/20260101-000000-0000"
ALPHA, NOISE, SEED = "model.labeling.alpha", "data.streams.safety.source.flag_noise", "seed_everything"


def write_sweep(folder, metric=BOTH, **values):
    """The sweep's file; returns where the trial with some of the values lies."""
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    parameters = {key: {"values": each} for key, each in values.items()}
    said = {"method": "grid", "metric": {"name": metric, "goal": "maximize"}, "parameters": parameters}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**said, "command": ["bfpo", "fit", "${args}"]}))
    return lambda **own: folder / "trials" / trial_id(own)


def finish(trial, rows, run=RUN, seed=0, parameters=(ALPHA, SEED), **settings):
    write_trial(trial, run=run, **dict.fromkeys(parameters))
    write_run(trial / run, config(seed, **settings), rows)


def written(folder):
    return json.loads((folder / "comparison.json").read_text())


def test_a_sweep_is_read_by_its_trials(tmp_path):
    sweep = tmp_path / "labeling"
    trial = write_sweep(sweep, "val/all/all/loss", **{ALPHA: [0.0, 0.5, 1.0], SEED: [0, 1, 2]})
    for alpha in (0.0, 0.5, 1.0):
        for seed in (0, 1):
            rows = [final(0.9 - alpha / 2, 0.5 + alpha / 2)]
            finish(trial(**{ALPHA: alpha, SEED: seed}), rows, seed=seed, alpha=alpha)
    failed, running = (trial(**{ALPHA: alpha, SEED: 2}) for alpha in (0.0, 0.5))
    write_trial(failed, "failed", error="Out of memory:\n the machine has no more")
    write_trial(running, "running")
    main(["compare", str(sweep)])
    comparison = written(sweep / "report")
    assert sorted(group["label"] for group in comparison["groups"]) == ["alpha=0", "alpha=0.5", "alpha=1"]
    assert [len(group["runs"]) for group in comparison["groups"]] == [2, 2, 2]
    assert comparison["groups"][0]["metrics"]["val/all/all/loss"]["n"] == 2  # the sweep's metric is shown, too
    assert {each["name"]: each["reason"] for each in comparison["left_out"]} == {
        f"trial {failed.name} of labeling": "failed: Out of memory: the machine has no more",
        f"trial {running.name} of labeling": "running",
    }
    assert (sweep / "report" / "by_alpha.png").stat().st_size > 10_000


def test_the_minimum_is_shown_once_though_the_sweep_takes_it_on_validation_prompts(tmp_path):
    """As in the ablations: judged on held-out prompts at the end, tuned by the validation prompts' minimum."""
    trial = write_sweep(tmp_path / "sweep", **{SEED: [0]})
    finish(trial(**{SEED: 0}), [{**final(0.9, 0.8), BOTH: 0.8}, final(0.7, 0.6, split="test")])
    main(["compare", str(tmp_path / "sweep")])
    comparison = written(tmp_path / "sweep" / "report")
    (group,) = comparison["groups"]
    assert [origin["host"] for origin in comparison["origins"]] == ["machine"]
    assert list(group["metrics"]) == [*HELD_OUT, "min(helpfulness, harmlessness)"]


def test_trials_whose_values_left_the_file_are_left_out(tmp_path):
    """As in the sweep's own table."""
    sweep = tmp_path / "sweep"
    trial = write_sweep(sweep, **{ALPHA: [0.0, 0.5]})
    for alpha in (0.0, 0.5):
        finish(trial(**{ALPHA: alpha}), [final(0.9, 0.8)], alpha=alpha)
    write_sweep(sweep, **{ALPHA: [0.5, 1.0]})
    main(["compare", str(sweep)])
    comparison = written(sweep / "report")
    assert [group["runs"][0]["folder"] for group in comparison["groups"]] == [str(trial(**{ALPHA: 0.5}) / RUN)]
    gone = f"trial {trial(**{ALPHA: 0.0}).name} of sweep"
    assert comparison["left_out"] == [{"name": gone, "reason": "its values are no longer in the sweep file"}]


def test_programs_leave_nothing_to_compare(tmp_path, capsys):
    trial = write_sweep(tmp_path / "sweep", **{SEED: [0]})(**{SEED: 0})
    write_trial(trial)
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "sweep")])
    said = " ".join(capsys.readouterr().err.split())
    assert f"trial {trial.name} of sweep: it left no run; programs other than bfpo fit leave none to compare" in said


def test_two_sweeps_are_compared_as_one(tmp_path, monkeypatch):
    """Noisy flags and soft ones, as in the ablations; the second sweep repeats a run of the first."""
    monkeypatch.chdir(tmp_path)
    noisy = [(noise, seed, False) for noise in (0.0, 0.2, 0.4) for seed in (0, 1)]
    soft = [(noise, seed, True) for noise in (0.2, 0.4) for seed in (1, 0)] + [(0.0, 0, False)]
    for day, (name, cells) in enumerate((("noise", noisy), ("soft_flags", soft)), 1):
        objectives = {"BFPO": "bfpo", "SafetyFirst": "safety_first"}
        trial = write_sweep(
            Path("runs/sweeps", name), **{"config": list(objectives), NOISE: [0.0, 0.2, 0.4], SEED: [0, 1]}
        )
        for labeling, experiment in objectives.items():
            for noise, seed, is_soft in cells:
                own, run = (
                    trial(**{"config": labeling, NOISE: noise, SEED: seed}),
                    f"{experiment}/2026010{day}-000000-0000",
                )
                said = config(seed, labeling, experiment, policy=f"runs/models/sft/{seed}")
                said["data"]["streams"]["safety"]["source"]["init_args"] |= {"flag_noise": noise, "soft_flags": is_soft}
                write_trial(own, run=run, **dict.fromkeys(("config", NOISE, SEED)))
                write_run(own / run, said, [final(0.9 - noise, 0.8 + day / 10)])
    main(["compare", "runs/sweeps/noise", "runs/sweeps/soft_flags"])
    (report,) = Path("runs/compare").iterdir()
    comparison = written(report)
    assert comparison["title"] == "noise, soft_flags"
    assert len(comparison["groups"]) == 10
    assert {len(group["runs"]) for group in comparison["groups"]} == {2}
    reasons = [each["reason"] for each in comparison["left_out"]]
    assert sorted(reasons) == [
        f"repeats config and seed of {name}/20260102-000000-0000" for name in objectives.values()
    ]
    for folder in Path("runs/sweeps").iterdir():
        assert not (folder / "report").exists()
    curves = one_parameter_curves(analyse(read(["runs/sweeps/noise", "runs/sweeps/soft_flags"]), Question()))
    assert {
        curve.name: {label: [x for x, _ in points] for label, points in curve.lines.items()} for curve in curves
    } == {
        "flag_noise": {
            "labeling=BFPO soft_flags=false": [0.0, 0.2, 0.4],
            "labeling=BFPO soft_flags=true": [0.2, 0.4],
            "labeling=SafetyFirst soft_flags=false": [0.0, 0.2, 0.4],
            "labeling=SafetyFirst soft_flags=true": [0.2, 0.4],
        }
    }
    assert (report / "by_flag_noise.png").is_file()
