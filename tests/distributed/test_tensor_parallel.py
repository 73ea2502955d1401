"""Tensor parallelism on two and on four gloo processes, by the real command and network by network, against one."""

import json
import re
from functools import partial

import pytest
import torch
from commands import (
    ACCUMULATED,
    EVALUATION,
    HERE,
    MIXED,
    SELECT,
    TRUE,
    Run,
    alone,
    at,
    chain,
    command,
    only_run,
    outcomes,
    streams,
    torchrun,
)
from transformers import AutoModelForCausalLM

from bfpo_pl.models.sources import TinyModel

pytestmark = pytest.mark.distributed

MACHINE = re.compile("_second|memory|data_wait")
"""Metrics that are of the machine, not of the training."""
TINY = {"hidden_size": 32, "layers": 2, "intermediate_size": 64, "seed": 0}
FAMILIES = [
    *("llama", "mistral", "qwen2-tied", "qwen2-untied", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2"),
    *("cohere", "cohere2", "granite", "glm", "starcoder2"),
]


def difference(ours, theirs):
    """Largest difference between two sets of weights."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def moved(weights):
    """How far weights are from the policy's start."""
    start = TinyModel(**TINY).load_model().state_dict()
    return difference(weights, {name: start[name] for name in weights})


def metrics_difference(ours, theirs):
    """Largest difference between two sets of metrics, relative where they are above 1."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[name] - value) / max(1.0, abs(value)) for name, value in theirs.items())


def networks_split(folder, cases, processes):
    (folder / "cases.json").write_text(json.dumps(cases))
    log = torchrun([str(HERE / "tensor_parallel_cases.py"), str(folder)], folder, processes)
    assert "sequential all_gather" not in log
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def networks_of_two(tmp_path_factory):
    return networks_split(tmp_path_factory.mktemp("families"), FAMILIES, 2)


@pytest.fixture(scope="module")
def networks_of_four(tmp_path_factory):
    return networks_split(tmp_path_factory.mktemp("families"), ["qwen2-tied", "qwen3", "phi3"], 4)


def check_network(outcomes):
    for outcome in outcomes:
        assert outcome["log_probs"] <= 1e-11
        assert outcome["gradients"] <= 1e-10
        assert outcome["same_names"]
        assert outcome["norm"] <= 1e-10 < outcome["size"]
        assert outcome["replicas"] == [], "what every process of a group holds is the same on each, bit for bit"
        assert outcome["split"] >= 8
        assert outcome["fused_head"]
        assert outcome["differ"] == [], "loaded in shards, gathered for an export: the weights of the files"
        assert outcome["in_shards"]


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_gradients_and_loading_of_a_family(name, networks_of_two):
    check_network(networks_of_two[name])
    assert networks_of_two[name][0]["held"] < 0.6  # embeddings and head, whole on both, are much of a tiny network


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "phi3"])
def test_log_probs_gradients_and_loading_in_two_groups(name, networks_of_four):
    check_network(networks_of_four[name])
    assert networks_of_four[name][0]["held"] < 0.35


# ---- by the real command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, single: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """Runs on two processes that compute the same rows (tensor parallelism), and what became of those to be refused."""
    folder = tmp_path_factory.mktemp("split")

    def fit(method: str, name: str, *more: str) -> list[str]:
        return ["fit", *command(method, "fsdp2_tp", folder / name), *more]

    one_file = "--trainer.strategy.save_distributed_checkpoint=false"
    precomputed = ["--model.reference=Precomputed", "--model.reference.batch_tokens=300"]
    jobs = {
        "sgd": fit("sgd", "sgd", *EVALUATION),
        "validated": [
            *("validate", *command("sgd", "fsdp2_tp", folder / "validated")),
            at(single["sgd"].folder, 10),
        ],
        "sgd-accumulated": fit("sgd", "sgd-accumulated", *ACCUMULATED),
        "adamw": fit("adamw", "adamw", one_file),
        "adamw-accumulated": fit("adamw", "adamw-accumulated", *ACCUMULATED),
        "adamw-resumed": fit("adamw", "adamw-resumed", one_file, at(folder / "adamw/*/*")),
        "adamw-accumulated-resumed": fit(
            "adamw", "adamw-accumulated-resumed", *ACCUMULATED, at(folder / "adamw-accumulated/*/*")
        ),
        "from-one": fit("adamw", "from-one", at(single["adamw"].folder)),
        "precomputed": fit("adamw", "precomputed", *precomputed, f"--data.cache={folder / 'cache'}"),
        "copied-select": fit("adamw", "copied-select", *SELECT),
        "shared-select": fit("adamw", "shared-select", *SELECT, "--model.reference=SharedWeights"),
        "mixed": fit("sgd", "mixed", *MIXED),
        "true": fit("sgd", "true", *TRUE),
    }
    refused = {"lora": fit("lora", "lora"), "one-head": fit("sgd", "one-head", "--model.policy.heads=1")}
    done, log = outcomes(jobs | refused, folder, torchrun)
    assert not [done[name] for name in jobs if done[name] != "ok"], done
    runs = {name: only_run(folder / name, log) for name in jobs}
    going_on = at(folder / "adamw-accumulated/*/*")
    alone_jobs = {
        "to-one": ["fit", *command("adamw", "single", folder / "to-one", *ACCUMULATED, going_on)],
        "mixed-alone": ["fit", *command("sgd", "single", folder / "mixed-alone", *MIXED)],
        "true-alone": ["fit", *command("sgd", "single", folder / "true-alone", *TRUE)],
    }
    return runs | chain(alone_jobs, folder, alone), {name: done[name] for name in refused}


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs on four processes: two groups of two, each with rows of its own."""
    folder = tmp_path_factory.mktemp("groups")

    def fit(method: str, name: str, *more: str) -> list[str]:
        rows = streams(2, "safety", "helpfulness") if method == "sgd" else streams(2, "safety")
        arguments = command(method, "fsdp2_tp", folder / name, "--trainer.devices=4", *rows)
        return ["fit", *arguments, *more]

    precomputed = ["--model.reference=Precomputed", "--model.reference.batch_tokens=300"]
    jobs = {
        "sgd-accumulated": fit("sgd", "sgd-accumulated", *ACCUMULATED, *EVALUATION),
        "adamw-accumulated": fit("adamw", "adamw-accumulated", *ACCUMULATED),
        "adamw-accumulated-resumed": fit(
            "adamw", "adamw-accumulated-resumed", *ACCUMULATED, at(folder / "adamw-accumulated/*/*")
        ),
        "adamw": fit("adamw", "adamw"),
        "precomputed": fit("adamw", "precomputed", *precomputed, f"--data.cache={folder / 'cache'}"),
    }
    return chain(jobs, folder, partial(torchrun, processes=4))


def check_agreement(run, other, tolerance):
    found = difference(run.weights, other.weights)
    print(f"weights differ by {found:.2e}, moved {moved(run.weights):.2e}")
    assert found <= tolerance
    assert moved(run.weights) > 1e-3
    ours, theirs = run.metrics("train/"), other.metrics("train/")
    assert list(ours) == list(theirs) == list(range(1, 11))
    for step, values in theirs.items():
        assert ours[step].keys() == values.keys()
        for name, value in values.items():
            if not MACHINE.search(name):
                assert ours[step][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (step, name)
    assert sum(values["train/grad_norm"] > 0.5 for values in ours.values()) >= 5, "gradients are clipped"


def check_resumed(run, whole):
    assert run.folder != whole.folder
    assert difference(run.weights, whole.weights) == 0.0
    ours, theirs = run.metrics("train/"), whole.metrics("train/")
    assert list(ours) == [6, 7, 8, 9, 10]
    for step, values in ours.items():
        for name, value in values.items():
            assert MACHINE.search(name) or value == theirs[step][name], (step, name)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("sgd", 1e-6), ("adamw", 1e-5), ("sgd-accumulated", 1e-6), ("adamw-accumulated", 1e-5)],
)
@pytest.mark.long
def test_ten_steps_agree_with_one_process(name, tolerance, single, split):
    check_agreement(split[0][name], single[name], tolerance)


@pytest.mark.parametrize("name", ["adamw", "adamw-accumulated"])
@pytest.mark.long
def test_resume_equals_the_uninterrupted_run_bit_for_bit(name, split):
    runs, _ = split
    checkpoint = runs[name].checkpoint(5)
    assert checkpoint.is_dir() == (name == "adamw-accumulated"), "one of them in one file, one sharded"
    check_resumed(runs[f"{name}-resumed"], runs[name])


@pytest.mark.long
def test_checkpoints_go_from_one_process_to_two_and_back(single, split):
    runs, _ = split
    assert difference(runs["from-one"].weights, single["adamw"].weights) <= 1e-5
    assert difference(runs["to-one"].weights, single["adamw-accumulated"].weights) <= 1e-5
    assert list(runs["to-one"].metrics("train/")) == [6, 7, 8, 9, 10]


@pytest.mark.long
def test_validation_agrees_with_one_process(single, split):
    (ours,) = split[0]["validated"].metrics("val/").values()
    theirs = {name: v for name, v in single["sgd"].metrics("val/")[10].items() if "microworld" not in name}
    assert len(ours) > 20
    assert metrics_difference(ours, theirs) <= 1e-5
    during, other = split[0]["sgd"].metrics("val/all"), single["sgd"].metrics("val/all")
    assert list(during) == list(other) == [5, 10]
    assert max(metrics_difference(during[step], other[step]) for step in other) <= 1e-4


@pytest.mark.long
def test_the_microworld_is_judged_as_by_one_process(single, split):
    ours, theirs = split[0]["sgd"].metrics("val/microworld"), single["sgd"].metrics("val/microworld")
    assert list(ours) == list(theirs)
    for step, values in theirs.items():
        assert values
        assert ours[step] == pytest.approx(values)


@pytest.mark.long
def test_references_agree(single, split):
    runs, _ = split
    assert difference(runs["precomputed"].weights, single["adamw"].weights) <= 1e-5
    assert difference(runs["shared-select"].weights, runs["copied-select"].weights) == 0.0
    assert moved(runs["shared-select"].weights) > 1e-3


@pytest.mark.long
def test_the_export_is_of_whole_weights(split):
    run = split[0]["sgd"]
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    assert model.num_parameters() == TinyModel(**TINY).load_model().num_parameters()
    assert difference({name: model.state_dict()[name] for name in run.weights}, run.weights) == 0.0


@pytest.mark.parametrize("precision", ["mixed", "true"])
@pytest.mark.long
def test_bfloat16_agrees_with_one_process(precision, split):
    run, other = split[0][precision], split[0][f"{precision}-alone"]
    ours, theirs = run.metrics("train/"), other.metrics("train/")
    assert ours[1]["train/all/all/margin"] == theirs[1]["train/all/all/margin"] == 0.0
    for step, values in theirs.items():
        for name in ("train/all/all/loss", "train/all/all/log_prob_chosen"):
            assert ours[step][name] == pytest.approx(values[name], rel=0.02, abs=0.1), (step, name)
    start = TinyModel(**TINY).load_model().state_dict()
    moves = [torch.cat([(w[name].float() - start[name]).flatten() for name in w]) for w in (run.weights, other.weights)]
    assert torch.cosine_similarity(*moves, dim=0).item() > 0.9


@pytest.mark.long
def test_what_is_not_exact_is_refused_before_anything_loads(split):
    _, refused = split
    assert "an adapter (LoRA) is not split over processes" in refused["lora"]
    assert "tensor_parallel_size 2 does not divide LlamaForCausalLM's attention heads (1)" in refused["one-head"]


@pytest.mark.long
@pytest.mark.parametrize(("name", "tolerance"), [("sgd-accumulated", 1e-6), ("adamw-accumulated", 1e-5)])
def test_two_groups_agree_with_one_process(name, tolerance, single, groups):
    check_agreement(groups[name], single[name], tolerance)


@pytest.mark.long
def test_two_groups_resume_validate_and_compute_beforehand(single, groups):
    check_resumed(groups["adamw-accumulated-resumed"], groups["adamw-accumulated"])
    assert difference(groups["precomputed"].weights, single["adamw"].weights) <= 1e-5
    assert list(groups["sgd-accumulated"].metrics("val/microworld")) == [5, 10]
    assert len(list(groups["adamw"].checkpoint(5).glob("*.distcp"))) == 4
    ours, theirs = groups["adamw"].metrics("val/"), single["adamw"].metrics("val/")
    assert list(ours) == list(theirs) == [5, 10]
    assert max(metrics_difference(ours[step], theirs[step]) for step in theirs) <= 1e-4
