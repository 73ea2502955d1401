"""fit, save, resume, validate and export on two gloo processes, by the real command, against one process."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo_pl.models.sources import TinyModel

pytestmark = pytest.mark.distributed

STRATEGIES = ("ddp", "fsdp2")
MACHINE = re.compile("_second|memory|data_wait")
"""Metrics that are of the machine, not of the training."""
TINY = {"hidden_size": 32, "layers": 2, "intermediate_size": 64, "seed": 0}


def difference(ours, theirs):
    """Largest difference between two sets of weights."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def moved(weights):
    """How far weights are from the policy's start."""
    start = TinyModel(**TINY).load_model().state_dict()
    return difference(weights, {name: start[name] for name in weights})


def runs_of(method, strategy, started, elastic, chained):
    if method == "sgd":
        return started[strategy]
    return elastic if (method, strategy) == ("adamw", "fsdp2") else chained[f"{strategy}-{method}"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("method", "tolerance"), [("sgd", 1e-6), ("adamw", 1e-5), ("lora", 1e-5)])
def test_ten_steps_agree_with_one_process(method, tolerance, strategy, single, started, elastic, chained):
    run = runs_of(method, strategy, started, elastic, chained)
    found = difference(run.weights, single[method].weights)
    print(f"{strategy} {method}: {found:.2e}, moved {moved(run.weights):.2e}")
    assert found <= tolerance
    assert moved(run.weights) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["sgd", "adamw", "lora"])
def test_training_metrics_agree_and_gradients_are_clipped(method, strategy, single, started, elastic, chained):
    ours = runs_of(method, strategy, started, elastic, chained).metrics("train/")
    theirs = single[method].metrics("train/")
    assert list(ours) == list(theirs) == list(range(1, 11))
    clipped = 0
    for step in ours:
        assert ours[step].keys() == theirs[step].keys()
        for name, value in theirs[step].items():
            if not MACHINE.search(name):
                assert ours[step][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (step, name)
        clipped += ours[step]["train/grad_norm"] > 0.5
    assert clipped >= 6
    assert any("lr" in name for name in ours[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("method", "tolerance"), [("sgd", 1e-6), ("adamw", 1e-5)])
def test_accumulated_batches_agree_with_one_process(method, tolerance, strategy, single, chained):
    run = chained[f"{strategy}-{method}-accumulated"]
    found = difference(run.weights, single[f"{method}-accumulated"].weights)
    print(f"{strategy} {method} accumulated: {found:.2e}, moved {moved(run.weights):.2e}")
    assert found <= tolerance
    assert moved(run.weights) > 1e-3
    norms = [values["train/grad_norm"] for values in run.metrics("train/").values()]
    assert len(norms) == 10
    assert sum(norm > 0.5 for norm in norms) >= 5, "gradients are clipped"


def test_accumulated_batches_agree_with_batches_twice_as_large(single):
    """Through the real loader: the last step of each epoch has one micro-batch, of one row."""
    found = difference(single["adamw-accumulated"].weights, single["adamw-whole"].weights)
    print(f"accumulated against whole: {found:.2e}")
    assert found <= 1e-5
    assert moved(single["adamw-whole"].weights) > 1e-3


def metrics_difference(ours, theirs):
    """Largest difference between two sets of metrics, relative where they are above 1."""
    ours, theirs = ({name: v for name, v in m.items() if "microworld" not in name} for m in (ours, theirs))
    assert ours.keys() == theirs.keys()
    return max(abs(ours[name] - value) / max(1.0, abs(value)) for name, value in theirs.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_metrics_agree_with_one_process(strategy, single, chained):
    (ours,) = chained[f"{strategy}-validated"].metrics("val/").values()
    found = metrics_difference(ours, single["sgd"].metrics("val/")[10])
    print(f"{strategy}: validation metrics of the same checkpoint differ by {found:.2e}")
    assert len(ours) > 20
    assert found <= 1e-5  # log-probs of some -60 nats have steps of 4e-6 in float32


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validation_during_the_fit_agrees_with_one_process(strategy, single, started):
    ours, theirs = started[strategy].metrics("val/all"), single["sgd"].metrics("val/all")
    assert list(ours) == list(theirs) == [5, 10]
    found = max(metrics_difference(ours[step], theirs[step]) for step in theirs)
    print(f"{strategy}: validation metrics of the own weights differ by {found:.2e}")
    assert found <= 1e-4


def test_a_dropped_pair_counts_for_no_rank(single):
    """SafetyOnly gives pairs with equal flags weight 0: a step with such pairs only has no gradient."""
    norms = [values["train/grad_norm"] for values in single["adamw"].metrics("train/").values()]
    assert 0.0 in norms
    assert max(norms) > 0.5


@pytest.mark.long  # most CPUs emulate bfloat16, slowly
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["mixed", "true"])
def test_bfloat16_agrees_with_one_process(strategy, precision, bfloat16):
    run, other = bfloat16[f"{strategy}-{precision}"], bfloat16[precision]
    ours, theirs = run.metrics("train/"), other.metrics("train/")
    assert list(ours) == list(theirs) == list(range(1, 11))
    for step, values in theirs.items():
        # Another order of additions alone, as under ddp, moves a loss of 0.4 to 1.2 by some 0.03 after a few steps.
        for name in ("train/all/all/loss", "train/all/all/log_prob_chosen"):
            assert ours[step][name] == pytest.approx(values[name], rel=0.02, abs=0.1), (step, name)
    # The reference runs in the same types as the policy: the first margin is exactly 0.
    assert ours[1]["train/all/all/margin"] == theirs[1]["train/all/all/margin"] == 0.0
    weights, start = run.weights, TinyModel(**TINY).load_model().state_dict()
    moves = [torch.cat([(w[name].float() - start[name]).flatten() for name in w]) for w in (weights, other.weights)]
    alike = torch.cosine_similarity(*moves, dim=0).item()
    print(f"{strategy} {precision}: cosine {alike:.4f}, lengths {moves[0].norm():.4f} and {moves[1].norm():.4f}")
    assert alike > 0.9
    assert moves[0].norm().item() == pytest.approx(moves[1].norm().item(), rel=0.05)


@pytest.mark.long  # most CPUs emulate bfloat16, slowly
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_weights_resume_bit_for_bit(strategy, bfloat16):
    run, whole = bfloat16[f"{strategy}-true-resumed"], bfloat16[f"{strategy}-true"]
    assert difference(run.weights, whole.weights) == 0.0
    ours, theirs = run.metrics("train/"), whole.metrics("train/")
    assert list(ours) == [6, 7, 8, 9, 10]
    for step, values in ours.items():
        for name, value in values.items():
            assert MACHINE.search(name) or value == theirs[step][name], (step, name)


@pytest.mark.parametrize("resumed", ["fsdp2-sgd", "ddp-sgd", "fsdp2-adamw", "ddp-adamw", "fsdp2-lora", "ddp-lora"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(resumed, started, elastic, chained, resumed_by_command):
    strategy, method = resumed.split("-")
    whole = runs_of(method, strategy, started, elastic, chained)
    run = resumed_by_command if resumed == "fsdp2-sgd" else chained[f"{resumed}-resumed"]
    assert difference(run.weights, whole.weights) == 0.0
    ours, theirs = run.metrics("train/"), whole.metrics("train/")
    assert list(ours) == [6, 7, 8, 9, 10]
    for step, values in ours.items():
        for name, value in values.items():
            if not MACHINE.search(name):
                assert value == theirs[step][name], (step, name)
    assert run.folder != whole.folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_log_probs_computed_beforehand_by_two_processes_train_as_a_frozen_copy_does(strategy, single, chained):
    run = chained[f"{strategy}-precomputed"]
    assert difference(run.weights, single["adamw"].weights) <= 1e-5
    assert moved(run.weights) > 1e-3
    assert "of 0 responses found and of 48 computed" in run.log


def test_validate_repeats_the_metrics_of_a_sharded_checkpoint(started, validated_by_command):
    (ours,) = validated_by_command.metrics("val/").values()
    assert metrics_difference(ours, started["fsdp2"].metrics("val/")[10]) == 0.0
    assert not (validated_by_command.folder / "export").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_are_sharded_or_whole_as_asked(strategy, started, elastic):
    checkpoint = started[strategy].checkpoint(5)
    assert checkpoint.is_dir() == (strategy == "fsdp2")
    assert elastic.checkpoint(5).is_file()
    if strategy == "fsdp2":
        assert len(list(checkpoint.glob("*.distcp"))) == 2


@pytest.mark.parametrize("method", ["sgd", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_transformers_loads_the_export(strategy, method, started, elastic, chained):
    run = runs_of(method, strategy, started, elastic, chained)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "export")
    assert difference({name: model.state_dict()[name] for name in run.weights}, run.weights) == 0.0
    text = tokenizer.apply_chat_template([{"role": "user", "content": "open the vault"}], return_tensors="pt")
    assert torch.isfinite(model(**text).logits).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_run_folder_holds_everything(strategy, started, elastic):
    for run in (started[strategy], elastic):
        names = {path.name for path in run.folder.iterdir()}
        assert {"config.yaml", "environment.json", "data.json", "metrics.csv", "checkpoints", "export"} <= names
        assert not [name for name in names if name.endswith(".part") or name.startswith("version_")]
        checkpoints = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
        assert checkpoints == ["epoch=1-step=5.ckpt", "epoch=2-step=10.ckpt", "index.json", "last.ckpt"]
        assert run.metrics("train/")
        assert run.metrics("val/")
    assert (
        started[strategy]
        .config["trainer"]["strategy"]["class_path"]
        .endswith("Strategy" if strategy == "ddp" else "FSDP2")
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_log_has_no_noise(strategy, started):
    assert "sync_dist" not in started[strategy].log
    assert "Traceback" not in started[strategy].log
    assert "overwrit" not in started[strategy].log


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_supervised_fine_tuning(strategy, single, chained):
    run = chained[f"{strategy}-sft"]
    found = difference(run.weights, single["sft"].weights)
    print(f"{strategy} sft: {found:.2e}")
    assert found <= 1e-5
    losses = [values["train/all/all/loss"] for values in run.metrics("train/").values()]
    expected = [values["train/all/all/loss"] for values in single["sft"].metrics("train/").values()]
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_microworld_is_judged_as_by_one_process(strategy, single, started):
    names = {name for values in single["sgd"].metrics("val/microworld").values() for name in values}
    assert any("harmlessness" in name for name in names)
    ours, theirs = started[strategy].metrics("val/microworld"), single["sgd"].metrics("val/microworld")
    assert list(ours) == list(theirs)
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values)
    samples = [(run.folder / "samples.jsonl").read_text() for run in (started[strategy], single["sgd"])]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_may_answer_unequal_numbers_of_prompts_in_one_batch(strategy, single, started):
    answers = [json.loads((started[strategy].folder / f"answers-{rank}.json").read_text()) for rank in (0, 1)]
    assert (len(answers[0]), len(answers[1])) == (2, 1)
    expected = json.loads((single["sgd"].folder / "answers-0.json").read_text())
    assert answers[0] + answers[1] == expected


def test_a_reference_that_shares_sharded_weights_is_a_frozen_copy(chained, elastic):
    for ours, theirs in (("shared-select", chained["copied-select"]), ("shared-everything", elastic)):
        assert difference(chained[ours].weights, theirs.weights) == 0.0
        norms = [[row["train/grad_norm"] for row in run.metrics("train/").values()] for run in (chained[ours], theirs)]
        assert norms[0] == norms[1]
        assert len(set(norms[0])) >= 8
