"""`bfpo demo`, the real one with few steps: its stages, its record, its figure."""

from __future__ import annotations

import json

import pytest

from bfpo_pl.component import UserError
from bfpo_pl.demo import run_demo
from bfpo_pl.plots import Point, pareto_figure


@pytest.mark.distributed
def test_demo_with_few_steps(in_repository, tmp_path, capsys):
    further = ["--trainer.max_steps=3", "--seed=1", "--objectives", "bfpo_nll"]
    record = run_demo(["--runs", str(tmp_path), *further])
    [folder] = (tmp_path / "demo").iterdir()
    assert json.loads((folder / "results.json").read_text()) == record
    assert record["seed"] == 1
    assert record["heldout_prompts"] >= 500
    assert set(record["models"]) == {"sft", "bfpo_nll"}
    scores = record["models"]["bfpo_nll"]["greedy"]
    assert scores["benign/count"] + scores["harmful/count"] == record["heldout_prompts"]
    assert 0 <= scores["harmlessness"] <= scores["harmful/safe"] <= 1
    text = capsys.readouterr().out
    for words in (
        "held-out prompts, greedy",
        "temperature 0.5",
        "BFPO + NLL term",
        "an addition of this package",
        "malformed",
    ):
        assert words in text
    assert (folder / "pareto.png").stat().st_size > 10_000
    [config] = (folder / "bfpo_nll").glob("*/config.yaml")
    assert str(next((folder / "sft").glob("*/export"))) in config.read_text()  # it starts from the SFT export


@pytest.mark.distributed
def test_a_failing_stage_shows_the_end_of_its_log(in_repository, tmp_path):
    with pytest.raises(UserError, match=r"'sft' failed(.|\n)*layers(.|\n)*many"):
        run_demo(["--runs", str(tmp_path), "--model.policy.layers=many"])


def test_demo_outside_a_clone_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="root of a clone"):
        run_demo([])


def test_figure_is_a_png(tmp_path):
    pareto_figure({"a": [Point(0, 1), Point(0.2, 0.8)], "b": [Point(1, 1)]}, ["greedy", "t"], tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
