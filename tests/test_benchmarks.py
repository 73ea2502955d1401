"""The benchmark of the training step, at sizes that say nothing of speed: every section runs and has its fields."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from speed import measure, plan, report, summary, trl_peer, variants, workload  # noqa: E402
from speed.steps import START_LOSS, Ours, Setting  # noqa: E402

TINY = {"shape": "tiny", "precision": "float32", "device": "cpu", "lengths": [[3, 9], [2, 8]], "pairs": 2, "batches": 2}
NAMES = [variants.OURS, variants.OURS_LIVE, variants.NAIVE, "ours, Padded", "ours, all logits at once"]


def compared(names):
    return measure.task_compare({**TINY, "variants": names, "rounds": 1})


@pytest.fixture(scope="module")
def results():
    """What a quick run would give, without its processes."""
    known = measure.task_variants({"device": "cpu"})
    names = [name for name in known["variants"] if not name.startswith("TRL")]
    found = {}
    for section in plan.quick("float32", names, "tiny"):
        options = {**section.options, "lengths": TINY["lengths"], "repeats": 1}
        found[section.key] = getattr(measure, f"task_{section.task}")(options)
    return {"sections": found, "skipped": known["skipped"], "trl_settings": trl_peer.SWITCHED_ON}


def test_a_quick_run_has_all_fields(results):
    short = summary.of(results)
    assert short["failed"] == {}
    assert short["gemm_peak_gflops"] > 0
    assert short["share_of_peak"]["pku_like"][variants.OURS] > 0
    assert short["speed"]["pku_like"]["live reference, against the naive step"]["minimum"] > 0
    assert math.isfinite(short["fit"]["r_squared"])
    assert results["sections"][f"memory/{variants.OURS}"]["variants"][variants.OURS]["resident_mb"] > 0
    json.dumps(results)


def test_tables_of_what_there_is(results):
    tables = {
        "times": report._times({"pku_like": results["sections"]["compare/pku_like"]}),
        "ideas": report._ideas({"pku_like": compared(NAMES)}),
        "memory": report._memory(results["sections"]),
    }
    assert all(variants.OURS in table for table in tables.values())
    assert "ours, Padded" in tables["ideas"]
    assert "of all variants agree" in report._checks([results["sections"]["compare/pku_like"]])


def test_all_variants_start_at_the_same_loss_and_log_probs():
    names = [name for name in measure.task_variants({"device": "cpu"})["variants"] if not name.startswith("TRL")]
    found = compared(names)["variants"]
    assert set(NAMES) < set(found)
    for variant in found.values():
        assert variant["first_loss"] == pytest.approx(START_LOSS, rel=1e-3)
        assert variant["log_prob_difference"] < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_does_the_same_work():
    known = measure.task_variants({"device": "cpu"})["variants"]
    names = [variants.OURS, *(name for name in known if name.startswith("TRL"))]
    assert len(names) == 5
    for name, variant in compared(names)["variants"].items():
        assert variant["first_loss"] == pytest.approx(START_LOSS, rel=1e-4), name
        assert variant["log_prob_difference"] < 1e-5, name


def test_what_cannot_run_is_named_with_a_reason(monkeypatch):
    monkeypatch.setattr(trl_peer, "available", lambda: None)
    assert measure.task_variants({"device": "cpu"})["skipped"][variants.PEER] == "trl is not installed"


def test_counts_of_a_batch():
    shape = workload.Shape(hidden=4, layers=1, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
    tree = workload._tree([5, 6], [7, 8, 2], [9])
    work = workload.work_of([tree], shape)
    assert [work[key] for key in ("padded_cells", "row_tokens", "tree_tokens", "response_tokens")] == [10, 8, 6, 4]
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k and v, o, MLP
    visible = (1 + 2) + (3 + 4 + 5) + 3
    assert work["useful_gflop"] * 1e9 == pytest.approx(3 * (2 * weights * 6 + 4 * 4 * visible + 2 * 4 * 10 * 4))


def test_real_pairs_become_trees(tmp_path):
    folder = tmp_path / "pku_saferlhf_pairs"
    folder.mkdir()
    rows = [{"prompt": f"ask {i}", "response_0": "yes " * i + "a", "response_1": "no " * i + "b"} for i in range(1, 20)]
    text = "\n".join(map(json.dumps, rows))
    (folder / "pku_discordant_clean.jsonl").write_text(text)
    trees = workload.real("pku_real", tmp_path, 1024, 4, seed=0)
    assert len(trees) == 4
    assert all(max(max(ids) for ids in (tree.prompt_ids, *tree.response_ids)) < 1024 for tree in trees)
    assert all(response[-1] == 2 for tree in trees for response in tree.response_ids)


def test_a_step_changes_the_weights():
    step = Ours(Setting(workload.SHAPES["tiny"]))
    before = [p.detach().clone() for p in step.parameters]
    step(step.prepare(workload.drawn(workload.Lengths((3, 5), (2, 4)), 1024, 2, seed=0)))
    assert not all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
