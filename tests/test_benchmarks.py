"""The benchmark of the training step, at sizes that say nothing of speed: every section runs and has its fields."""

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bfpo_pl.optimizers import AdamW32

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step as benchmark  # noqa: E402
from speed import machine, measure, plan, report, summary, trl_peer, variants, workload  # noqa: E402
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


# ---- a run that is stopped, and GPUs, as far as that goes without one ---------------------------------------------


def sections(*names):
    return [plan.Section(name, name, {}) for name in names]


@pytest.fixture
def processes(monkeypatch):
    """Processes that take so many seconds each on a clock of their own; gives the tasks that were started."""
    clock, started = [0.0], []

    def run(task, options, environment, timeout=None):
        seconds = {"endless": 1e9}.get(task, 100.0)
        started.append(task)
        clock[0] += min(seconds, timeout)
        if seconds > timeout:
            return {"error": f"stopped after {timeout:.0f} s", "stopped": True}
        return {"error": "no memory"} if task == "large" else {"ok": task}

    monkeypatch.setattr(benchmark.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(benchmark, "in_a_new_process", run)
    return started


def test_a_section_that_the_end_of_the_time_stops_runs_in_the_next_call(processes, tmp_path):
    work, partial = sections("a", "b", "large", "c"), tmp_path / "partial.json"
    found, whole = benchmark.run(work, {}, partial, 350.0)
    assert not whole
    assert set(found) == {"a", "b", "large"}
    found, whole = benchmark.run(work, {}, partial, 350.0)
    assert whole
    assert found["c"]["ok"] == "c"
    assert found["large"]["error"] == "no memory"
    assert processes == ["a", "b", "large", "c", "c"]


def test_a_section_that_takes_more_than_a_call_fails(processes, tmp_path):
    found, whole = benchmark.run(sections("endless", "a"), {}, tmp_path / "partial.json", 350.0)
    assert not whole
    assert "stopped after 350 s" in found["endless"]["error"]
    found, whole = benchmark.run(sections("endless", "a"), {}, tmp_path / "partial.json", 350.0)
    assert whole
    assert processes == ["endless", "a"]


def test_a_gpus_plan_gives_each_side_its_kinds_of_checkpointing_and_goes_round():
    known = list(plan.ON_CUDA)
    keys = [section.key for section in plan.on_cuda("7b", known)[1:]]
    half = len(keys) // 2
    assert [key.rpartition("/")[0] for key in keys[:half]] == [key.rpartition("/")[0] for key in keys[half:]]
    kinds = {name: {s.options["checkpointing"] for s in plan.on_cuda("7b", [name])[1:]} for name in known}
    assert kinds[variants.OURS] == kinds[variants.PEER] | {"selective"} == {"none", "selective", "full"}
    assert {s.options["optimizer"] for s in plan.on_cuda("1b", known)} == {"AdamW32"}


@pytest.fixture(scope="module")
def on_a_gpu():
    """What a GPU's run would give, from the CPU: every section of its plan in this process, but for TRL's."""
    names = [name for name in plan.ON_CUDA if not name.startswith("TRL")]
    found = {}
    for section in plan.on_cuda("7b", names):
        options = {**section.options, **TINY, "precision": "bf16-true", "batches": 1, "rounds": 1, "repeats": 1}
        options |= {"tokens": 16, "response_tokens": 16}
        found[section.key] = getattr(measure, f"task_{section.task}")(options)
    return {
        "sections": found,
        "skipped": {},
        "trl": "not installed",
        "precision": "bf16-true",
        "optimizer": "AdamW32",
        "bf16_is_native": True,
        "seconds": 1.0,
        "machine": machine.describe(),
        "environment": {"packages": {"torch": "2", "transformers": "5"}, "git": None, "started": "2026-01-01T00:00"},
    }


def test_a_gpus_results_are_put_together(on_a_gpu):
    found = summary._compared(on_a_gpu["sections"])["ultrafeedback_like"]
    assert len(found["kinds"]) == 9
    ours = [each for each in found["kinds"].values() if each["name"] == variants.OURS]
    assert {each["checkpointing"] for each in ours} == {"none", "selective", "full"}
    assert found["variants"][variants.OURS]["minimum"] == min(each["minimum"] for each in ours)
    assert all(len(times) == 2 for each in ours for times in each["seconds"])  # of two attempts
    differences = {label: each["log_prob_difference"] for label, each in found["kinds"].items()}
    assert max(differences.values()) < 0.01, differences
    table = report._gpu_table(on_a_gpu)
    assert "Optimizer of all: AdamW32" in table
    assert f"| {variants.NAIVE}, full checkpointing |" in table
    assert "both sides with full checkpointing" in table


def test_log_probs_of_another_process_are_compared(on_a_gpu):
    """Each variant has a process of its own there, in which it can be compared with nothing."""
    wrong = copy.deepcopy(on_a_gpu)
    for key, section in wrong["sections"].items():
        if key.startswith(f"compare/{variants.NAIVE_CACHED}"):
            section["variants"][variants.NAIVE_CACHED]["log_probs"][0] *= 1.5
    found = summary._compared(wrong["sections"])["ultrafeedback_like"]["variants"]
    assert found[variants.NAIVE_CACHED]["log_prob_difference"] > 0.1


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_takes_our_optimizer_and_checkpointing():
    setting = {**TINY, "variants": [variants.PEER], "rounds": 1, "precision": "bf16-true", "optimizer": "AdamW32"}
    for kind in plan.ON_CUDA[variants.PEER]:
        (found,) = measure.task_compare({**setting, "checkpointing": kind})["variants"].values()
        assert found["first_loss"] == pytest.approx(START_LOSS, rel=0.05)
        assert found["checkpointing"] == kind
    step = trl_peer.TRL(Setting(workload.SHAPES["tiny"], "bf16-true", "cpu", "full", "AdamW32"), "cached")
    assert isinstance(step.optimizer.optimizer, AdamW32)
