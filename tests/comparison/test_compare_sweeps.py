"""`bfpo compare` on the folders of sweeps."""

from __future__ import annotations

import json

import yaml
from run_folders import config, final, write_run, write_trial

from bfpo_pl.cli import main

HELD_OUT = ["test/microworld/greedy/helpfulness", "test/microworld/greedy/harmlessness"]
BOTH = "val/microworld/greedy/both"
RUN = "bfpo/20260101-000000-0000"


def write_sweep(folder, **said):
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"method": "grid", "metric": {"name": BOTH}, **said}))


def test_a_sweep_is_read_by_its_trials(tmp_path):
    sweep = tmp_path / "labeling"
    for place, (alpha, seed) in enumerate((alpha, seed) for alpha in (0.0, 0.5, 1.0) for seed in (0, 1)):
        own = sweep / "trials" / f"t{place}"
        run = "runs/bfpo/20260101-000000-0000"
        write_trial(own, "finished", run, **{"model.labeling.alpha": alpha, "seed_everything": seed})
        write_run(own / run, config(seed, alpha=alpha), [final(0.9 - alpha / 2, 0.5 + alpha / 2)])
    write_trial(sweep / "trials" / "t8", "failed", error="Out of memory:\n the machine has no more")
    write_trial(sweep / "trials" / "t9", "running")
    (sweep / "sweep.yaml").write_text(yaml.safe_dump({"method": "grid", "metric": {"name": "val/all/all/loss"}}))
    main(["compare", str(sweep)])
    comparison = json.loads((sweep / "report" / "comparison.json").read_text())
    assert sorted(group["label"] for group in comparison["groups"]) == ["alpha=0", "alpha=0.5", "alpha=1"]
    assert [len(group["runs"]) for group in comparison["groups"]] == [2, 2, 2]
    assert comparison["groups"][0]["metrics"]["val/all/all/loss"]["n"] == 2  # the sweep's metric is shown, too
    left_out = {each["name"]: each["reason"] for each in comparison["left_out"]}
    assert left_out == {"trial t8": "failed: Out of memory: the machine has no more", "trial t9": "running"}
    assert (sweep / "report" / "by_alpha.png").stat().st_size > 10_000


def test_the_minimum_is_shown_once_though_the_sweep_takes_it_on_validation_prompts(tmp_path):
    """As in the ablations: judged on held-out prompts at the end, tuned by the validation prompts' minimum."""
    write_sweep(tmp_path / "sweep")
    own = write_trial(tmp_path / "sweep/trials/t0", run=RUN)
    write_run(own / RUN, config(0), [{**final(0.9, 0.8), BOTH: 0.8}, final(0.7, 0.6, split="test")])
    main(["compare", str(tmp_path / "sweep")])
    comparison = json.loads((tmp_path / "sweep/report/comparison.json").read_text())
    (group,) = comparison["groups"]
    assert [origin["host"] for origin in comparison["origins"]] == ["machine"]
    assert list(group["metrics"]) == [*HELD_OUT, "min(helpfulness, harmlessness)"]
