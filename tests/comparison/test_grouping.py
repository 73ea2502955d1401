"""Which runs are replicates, and what groups are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import config

from bfpo_pl.comparison.grouping import differing_keys, group_runs, rename, short_names, shown
from bfpo_pl.comparison.reading import RunRecord, flat
from bfpo_pl.component import UserError


def record(number=0, parameters=(), **settings):
    written = config(**settings)
    name = f"20260101-{number:06}-0000"
    return RunRecord(Path("runs") / written["experiment"] / name, flat(written), {}, {}, frozenset(parameters))


def labels(*runs):
    return [group.label for group in group_runs(runs)[0]]


def test_seeds_loggers_and_places_make_no_group():
    groups, left_out = group_runs([record(seed=seed) for seed in range(4)])
    assert [list(group.replicates) for group in groups] == [[0, 1, 2, 3]]
    assert left_out == []
    assert groups[0].label == "bfpo"


def test_any_other_setting_makes_one():
    assert labels(record(seed=0, tau=0.1), record(seed=0, tau=0.5)) == ["tau=0.1", "tau=0.5"]


def test_paths_that_differ_by_the_seed_in_them_are_replicates():
    runs = [record(seed=seed, policy=f"/data/v0.1/sft-{seed}/export") for seed in (0, 1, 10)]
    assert [list(group.replicates) for group in group_runs(runs)[0]] == [[0, 1, 10]]
    runs = [record(seed=seed, policy=f"models/seed{seed}", experiment=f"bfpo_seed{seed}") for seed in (1, 2)]
    assert len(group_runs(runs)[0]) == 1


def test_paths_with_the_seed_in_them_do_not_tell_groups_apart():
    """Trials of a sweep are read in no order of seeds, and not all groups have all of them."""
    runs = [record(seed=seed, tau=0.1, policy=f"models/sft/{seed}") for seed in (0, 1, 2)]
    runs += [record(seed=seed, tau=0.5, policy=f"models/sft/{seed}") for seed in (2, 0)]
    runs += [record(seed=1, tau=1.0, policy="models/sft/1")]
    groups, _ = group_runs(runs)
    assert [list(group.replicates) for group in groups] == [[0, 1, 2], [0, 2], [1]]
    assert differing_keys(groups) == ["model.loss.init_args.tau"]
    assert groups[2].config["model.policy.init_args.path"] == "models/sft/{seed}"
    # Those of one seed alone keep what they say, and other models stay others.
    alone = group_runs([record(seed=1, tau=tau, policy="models/sft/1") for tau in (0.1, 0.5)])[0]
    assert alone[0].config["model.policy.init_args.path"] == "models/sft/1"
    other = [record(seed=seed, tau=0.1, policy=f"models/base/{seed}") for seed in (1, 0)]
    labels = [group.label for group in group_runs([*runs[:3], *other])[0]]
    assert labels == ["path=models/sft/{seed}", "path=models/base/{seed}"]


def test_paths_that_differ_otherwise_are_not():
    assert len(group_runs([record(seed=0, policy="models/a"), record(seed=1, policy="models/b")])[0]) == 2
    # A grid of two models and two seeds: the models' numbers are not the seeds.
    grid = [record(seed=seed, policy=f"models/{model}") for model in (0, 1) for seed in (0, 1)]
    groups = group_runs(grid)[0]
    assert sorted(group.label for group in groups) == ["path=models/0", "path=models/1"]
    assert [list(group.replicates) for group in groups] == [[0, 1], [0, 1]]


def test_a_repeat_of_a_seed_is_no_replicate():
    groups, left_out = group_runs([record(1, seed=0), record(2, seed=0), record(3, seed=1)])
    assert [run.folder.name[9:15] for run in groups[0].runs] == ["000002", "000003"]
    assert [each.name for each in left_out] == ["bfpo/20260101-000001-0000"]
    assert "repeats" in left_out[0].reason


def test_labels_say_only_what_tells_groups_apart():
    objectives = [record(seed=0, labeling="HelpfulnessOnly"), *(record(seed=0, alpha=alpha) for alpha in (0.5, 1.0))]
    assert labels(*objectives) == ["labeling=HelpfulnessOnly", "labeling=BFPO alpha=0.5", "labeling=BFPO alpha=1"]
    # One BFPO alone needs no argument.
    assert labels(record(seed=0, labeling="Linear", w=0.5), record(seed=0)) == ["labeling=Linear", "labeling=BFPO"]


def test_experiments_name_groups_where_they_alone_tell_them_apart():
    assert labels(record(seed=0, experiment="bfpo"), record(seed=0, labeling="Linear", experiment="linear")) == [
        "bfpo",
        "linear",
    ]
    same = [record(seed=0, experiment=name) for name in ("one", "two")]
    assert labels(*same) == ["one", "two"]


def test_what_a_sweep_sets_comes_before_what_follows_from_it():
    runs = [record(seed=0, tau=tau, b1=1 + tau, parameters=["model.loss.tau"]) for tau in (0.1, 1.0)]
    assert labels(*runs) == ["tau=0.1", "tau=1"]


def test_short_names_are_as_long_as_needed():
    keys = ["model.loss.init_args.tau", "data.streams.safety.weight", "data.streams.helpfulness.weight"]
    assert list(short_names(keys).values()) == ["tau", "safety.weight", "helpfulness.weight"]


def test_values_are_short():
    assert [shown(value) for value in (None, True, 1e-6, 0.50, "bfpo_pl.BFPO", "Qwen/Qwen3-0.6B")] == [
        "null",
        "true",
        "1e-06",
        "0.5",
        "BFPO",
        "Qwen/Qwen3-0.6B",
    ]
    assert len(shown("/a/very/long/path" * 9)) == 32


def test_groups_can_be_renamed():
    groups, _ = group_runs([record(seed=0, tau=0.1), record(seed=0, tau=0.5)])
    rename(groups, ["tau=0.1=sharp"])
    assert [group.label for group in groups] == ["sharp", "tau=0.5"]
    with pytest.raises(UserError, match=r"no group 'tau=9'.*'sharp'; 'tau=0.5'"):
        rename(groups, ["tau=9=x"])
    with pytest.raises(UserError, match="more than one"):
        rename(groups, ["sharp=tau=0.5"])
    rename(groups, ["tau=0.5=a = b"])
    assert [group.label for group in groups][1] == "a = b"


def test_differing_keys_include_those_that_a_group_lacks():
    groups, _ = group_runs([record(seed=0), record(seed=0, labeling="HelpfulnessOnly")])
    arguments = [f"model.labeling.init_args.{name}" for name in ("b1", "alpha", "b3")]
    assert differing_keys(groups) == ["model.labeling.class_path", *arguments]
