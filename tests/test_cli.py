"""The real command, in this process, on a tiny model: what it accepts, what it leaves behind, what it refuses."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bfpo_pl
from bfpo_pl.cli import main as bfpo_main

DPO = ["-c", "configs/base.yaml", "-c", "configs/experiment/dpo.yaml"]


def weights(run_folder):
    return load_file(run_folder / "export" / "model.safetensors")


def refused(capsys, call, *args):
    """The message of a call that must end as a user's mistake: exit code 2, one message, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.startswith("bfpo: error: ")
    return text


def metrics_rows(run_folder):
    with (run_folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_abbreviated_option_is_refused(bfpo, base, small, capsys):
    """`--trainer.max_step` for max_steps would otherwise train with it, silently."""
    text = refused(capsys, bfpo, "fit", *base, *small, "--trainer.max_step=3")
    assert "--trainer.max_step=3" in text


def test_ctrl_c_before_training_is_one_line(bfpo, base, small, capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("bfpo_pl.cli.load_plugins", interrupted)
    with pytest.raises(SystemExit) as caught:
        bfpo("fit", *base, *small)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "bfpo: interrupted before training began.\n"


def test_fit_leaves_a_complete_record(bfpo, base, small):
    run = bfpo("fit", *base, *small, "--trainer.val_check_interval=2")
    folder = run.run_folder
    assert folder.parent.name == "bfpo"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["labeling"] == {
        "class_path": "bfpo_pl.BFPO",
        "init_args": {"b1": 3.0, "alpha": 0.5, "b3": None},
    }
    assert str(folder) not in (folder / "config.yaml").read_text()  # repeating the config makes a new folder
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["git"] is None or len(environment["git"]["commit"]) == 40
    assert json.loads((folder / "data.json").read_text())["safety"]["train"]["rows"] == 40
    rows = metrics_rows(folder)
    train = [row for row in rows if row["train/all/all/loss"]]
    assert [row["step"] for row in train] == ["1", "2"]
    for name in ("safety/unsafe_safe/margin", "helpfulness/safe_safe/reward_chosen", "all/all/accuracy_helpfulness"):
        assert any(row[f"train/{name}"] for row in train)
    speed = next(row for row in rows if row["train/pairs_per_second"])
    assert float(speed["train/tokens_per_second"]) > float(speed["train/pairs_per_second"]) > 0
    assert float(speed["train/grad_norm"]) > 0
    assert float(speed["train/peak_memory_gb"]) > 0.1
    assert any(row["val/safety/all/loss"] for row in rows)
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    for name, tensor in run.model.policy.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert tokenizer.chat_template


def test_first_step_starts_at_margin_zero_and_the_closed_form_loss(bfpo, base, small):
    """At h = 0 the loss of a pair is (g/tau)²: by hand from the flags that the rows carry."""
    run = bfpo("fit", *base, *small, "--trainer.max_steps=1")
    [row] = [row for row in metrics_rows(run.run_folder) if row["train/all/all/loss"]]
    assert float(row["train/safety/all/margin"]) == 0.0
    assert float(row["train/all/all/accuracy"]) == 0.5
    expected = {"safe_safe": 0.5, "safe_unsafe": 1.0, "unsafe_safe": -1.0, "unsafe_unsafe": -0.5}
    for quadrant, target in expected.items():
        if row.get(f"train/safety/{quadrant}/target"):
            assert float(row[f"train/safety/{quadrant}/target"]) == pytest.approx(target)
            assert float(row[f"train/safety/{quadrant}/loss"]) == pytest.approx((target / 0.5) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "labeling", "loss"),
    [
        (["--model.labeling=HelpfulnessOnly"], "HelpfulnessOnly()", "Squared(tau=0.5)"),
        (
            ["--model.loss=Logistic", "--model.loss.beta=0.1", "--model.loss.label_smoothing=0.1"],
            "BFPO(b1=3.0, b3=0.5, alpha=0.5)",
            "Logistic(beta=0.1, label_smoothing=0.1)",
        ),
        (["--model.labeling.alpha=0.25"], "BFPO(b1=3.0, b3=0.5, alpha=0.25)", "Squared(tau=0.5)"),
        (["--model.labeling=bfpo_pl.labeling.SafetyFirst"], "SafetyFirst()", "Squared(tau=0.5)"),
        (["--model.loss.init_args.tau=0.01"], "BFPO(b1=3.0, b3=0.5, alpha=0.5)", "Squared(tau=0.01)"),
    ],
)
def test_swaps_by_short_name_or_full_path(bfpo, base, small, overrides, labeling, loss):
    run = bfpo("fit", *base, *small, *overrides)
    assert (repr(run.model.labeling), repr(run.model.loss)) == (labeling, loss)
    config = yaml.safe_load((run.run_folder / "config.yaml").read_text())
    assert config["model"]["loss"]["class_path"] == f"bfpo_pl.{type(run.model.loss).__name__}"


def test_a_swapped_class_takes_over_no_argument(bfpo, base, small, tmp_path, capsys):
    """Logistic and Hinge both have a beta; the config's must not slip into the class named on the command line."""
    text = refused(capsys, bfpo, "fit", *DPO, *small, "--model.loss=Hinge")
    assert "required: beta" in text
    assert "--model.loss.beta" in text
    run = bfpo("fit", *DPO, *small, "--model.loss=RobustLogistic", "--model.loss.beta=0.2")
    assert repr(run.model.loss) == "RobustLogistic(beta=0.2, label_smoothing=0.1)"
    text = refused(capsys, bfpo, "fit", *DPO, *small, "--model.policy=HFModel")  # TinyModel's arguments do not linger
    assert "required: path" in text
    optimizer = "--model.optimizer=torch.optim.RMSprop"
    run = bfpo("fit", *DPO, *small, optimizer)
    assert run.trainer.optimizers[0].defaults["lr"] == 0.01  # its own default, not AdamW's 3e-4
    over = tmp_path / "over.yaml"
    over.write_text("model: {loss: {class_path: Hinge}}\n")
    assert "required: beta" in refused(capsys, bfpo, "fit", *DPO, "-c", str(over), *small)
    over.write_text("model: {loss: {class_path: Logistic}}\n")  # the same class again keeps its arguments
    assert bfpo("fit", *DPO, "-c", str(over), *small).model.loss.beta == 0.3


def test_base_alone_says_what_is_missing(bfpo, small, capsys):
    text = refused(capsys, bfpo, "fit", "-c", "configs/base.yaml", *small)
    assert "model.labeling" in text
    assert "model.loss" in text
    assert "configs/experiment/bfpo.yaml" in text


def test_an_experiment_without_base_does_not_train_at_torchs_learning_rate(bfpo, small, capsys):
    files = ["-c", "configs/experiment/bfpo.yaml", "-c", "configs/data/microworld.yaml"]
    text = refused(capsys, bfpo, "fit", *files, "--model.policy=TinyModel", *small)
    assert "model.optimizer" in text
    assert "configs/base.yaml" in text


@pytest.mark.parametrize(
    ("command", "does"),
    [
        ("fit", ""),
        ("sft", "Trains a policy to give the responses"),
        ("reference", "Computes the log-probs of a fit's"),
        ("compare", "Compares runs"),
    ],
)
def test_help_of_a_command_names_it_and_says_what_it_does(in_repository, capsys, command, does):
    with pytest.raises(SystemExit) as stopped:
        bfpo_main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith(f"usage: bfpo {command} ")
    assert does in shown
    assert "cli.py" not in shown.split("options:")[0]


def test_help_of_a_component_and_the_list_of_components(bfpo, capsys):
    with pytest.raises(SystemExit) as caught:
        bfpo("fit", "--model.labeling.help=BFPO", "-c", "configs/base.yaml")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "g = b3 · (b1 · s_chosen − s_rejected) − alpha" in text
    assert "both safe 1/2; safe chosen, unsafe rejected 1; both unsafe −1/2" in text
    assert "alpha: Shift of the labels, in [0, b3 · (b1 − 1)]" in text
    assert "--model.labeling.alpha (float, default 0.5)" in text
    with pytest.raises(SystemExit):
        bfpo("fit", "--data.streams.mine.source.help=LocalFiles")
    text = " ".join(capsys.readouterr().out.split())
    assert "--data.streams.<stream>.source.path (str | list[str], required)" in text
    bfpo("components", "Squared")
    assert "(h − g/tau)²" in capsys.readouterr().out
    bfpo("components")
    text = capsys.readouterr().out
    for name in ("BFPO", "SafetyFirst", "Squared", "RobustLogistic", "FrozenCopy", "AdapterOff", "LocalFiles", "LoRA"):
        assert name in text
    assert "plugins.safedpo" in text


def test_repeating_a_run_is_bit_for_bit_the_same(bfpo, base, small):
    first = bfpo("fit", *base, *small, "--seed_everything=3")
    second = bfpo("fit", "-c", str(first.run_folder / "config.yaml"))
    assert second.run_folder != first.run_folder
    assert weights(first.run_folder).keys() == weights(second.run_folder).keys()
    for name, tensor in weights(first.run_folder).items():
        assert torch.equal(weights(second.run_folder)[name], tensor), name
    other = bfpo("fit", *base, *small, "--seed_everything=4")
    assert not torch.equal(*(weights(run.run_folder)["model.embed_tokens.weight"] for run in (first, other)))


def test_a_checkpoint_resumes_and_never_overrides_the_command_line(bfpo, base, small):
    first = bfpo(
        "fit",
        *base,
        *small,
        "--trainer.max_steps=4",
        "--trainer.limit_train_batches=2",
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.save_top_k=-1",
    )
    checkpoints = sorted((first.run_folder / "checkpoints").glob("*step=2*"))
    assert checkpoints
    resumed = bfpo(
        "fit",
        *base,
        *small,
        "--trainer.max_steps=4",
        f"--ckpt_path={checkpoints[0]}",
        "--trainer.limit_train_batches=2",
    )
    assert resumed.trainer.global_step == 4
    for name, tensor in weights(first.run_folder).items():
        assert torch.equal(weights(resumed.run_folder)[name], tensor), name
    swapped = bfpo(
        "fit", *base, *small, "--model.labeling=SafetyFirst", f"--ckpt_path={checkpoints[0]}", "--trainer.max_steps=3"
    )
    assert repr(swapped.model.labeling) == "SafetyFirst()"
    environment = json.loads((resumed.run_folder / "environment.json").read_text())
    assert environment["parent_checkpoint"] == str(checkpoints[0])


def test_validate_a_run_also_under_another_labeling_or_loss(bfpo, base, small, capsys):
    fitted = bfpo("fit", *base, *small, "--trainer.val_check_interval=2")
    checkpoint = f"--ckpt_path={fitted.run_folder / 'checkpoints' / 'last.ckpt'}"
    config = ["-c", str(fitted.run_folder / "config.yaml")]
    capsys.readouterr()
    same = bfpo("validate", *config, checkpoint).trainer.callback_metrics
    shown = capsys.readouterr().out
    assert "unsafe_safe" in shown
    assert f"{float(same['val/safety/safe_safe/margin']):.4g}" in shown
    for name, value in fitted.trainer.callback_metrics.items():
        if name.startswith("val/"):
            assert float(same[name]) == float(value), name
    other = bfpo("validate", *config, checkpoint, "--model.labeling=HelpfulnessOnly").trainer.callback_metrics
    assert float(other["val/all/all/target"]) == 0.5
    assert float(other["val/all/all/margin"]) == float(same["val/all/all/margin"])
    logistic = ["--model.loss=Logistic", "--model.loss.beta=0.1"]
    assert float(bfpo("validate", *config, checkpoint, *logistic).trainer.callback_metrics["val/all/all/loss"]) < 1


def test_sft_export_is_the_next_policy(bfpo, base, small, tmp_path):
    export = tmp_path / "sft"
    sft = bfpo(
        "sft", "-c", "configs/sft.yaml", *(item for item in small if "streams" not in item), "--trainer.max_steps=3",
        "--data.streams.sft.source.count=64", "--data.streams.sft.batch_size=8", f"--export.folder={export}",
    )  # fmt: skip
    losses = [float(row["train/all/all/loss"]) for row in metrics_rows(sft.run_folder) if row["train/all/all/loss"]]
    assert losses[-1] < losses[0]
    small = [item for item in small if "model.policy" not in item]
    run = bfpo("fit", *base, *small, "--model.policy=HFModel", f"--model.policy.path={export}", "--trainer.max_steps=1")
    assert run.model.policy.config.hidden_size == 32
    assert [row["train/all/all/margin"] for row in metrics_rows(run.run_folder) if row["train/all/all/margin"]] == [
        "0.0"
    ]


def test_an_export_never_replaces_something_else(bfpo, base, small, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    text = refused(capsys, bfpo, "fit", *base, *small, f"--export.folder={tmp_path}")
    assert "export.folder" in text
    assert (tmp_path / "thesis.tex").read_text() == "precious"


CALLBACK = "--trainer.callbacks=bfpo_pl.callbacks.microworld.MicroworldEvaluation"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--model.labeling=Nope"], ["model.labeling", "Nope", "SafetyFirst"]),
        (["--model.loss=Sqared"], ["model.loss", "Sqared", "Squared"]),
        (["--model.labeling.alpha=2"], ["BFPO", "alpha", "[0, 1]", "2"]),
        (["--model.labeling.b1=1"], ["BFPO", "b1", "(1,"]),
        (["--model.labeling.help=Foo"], ["no component 'Foo' for model.labeling", "SafetyFirst"]),
        (["--model.schedule.warmup=-1"], ["WarmupCosine", "warmup", "-1"]),
        (["--model.trainable=LoRA", "--model.trainable.r=0"], ["LoRA", "r must lie in [1"]),
        (["--model.auxiliary=SafeChosenNLL", "--model.auxiliary.weight=-1"], ["SafeChosenNLL", "weight"]),
        (["--model.chunk_size=0"], ["chunk_size"]),
        (["--model.activation_checkpointing=true"], ["activation_checkpointing", "none", "selective", "full"]),
        (["--model.optimizer.lr=-1"], ["model.optimizer", "learning rate", "-1"]),
        (["--model.policy.layers=0"], ["TinyModel", "layers"]),
        (["--model.policy=HFModel", "--model.policy.path=./nowhere"], ["no folder './nowhere'", "export/"]),
        (["--data.num_workers=-1"], ["num_workers", "-1"]),
        (["--data.streams.extra.batch_size=3"], ["source", "adapter", "data.streams"]),
        pytest.param(
            *(["--trainer.accelerator=gpu"], ["gpu"]),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        (["--trainer.devices=0"], ["devices"]),
        (["--seed_everything=-3"], ["-3"]),
        (["--experiment=../elsewhere"], ["experiment", "'../elsewhere'", "one folder"]),
        (["--ckpt_path=last"], ["no run with a checkpoint in", "runs/bfpo"]),
        (["--ckpt_path=best"], ["no run with a checkpoint in"]),
        (["--checkpoint.keep_last=0"], ["checkpoint.keep_last", "0", "enable_checkpointing"]),
        (["--checkpoint.dirpath=s3://bucket/x"], ["checkpoint.dirpath", "mount"]),
        (["--ckpt_path=configs"], ["'configs' is a folder", "none"]),
        (["--data.streams.safety.source.path=x"], ["data.streams.safety.source", "'path'", "configs/data/jsonl.yaml"]),
        (["--ckpt_path=README.md"], ["checkpoint", "not what torch.save writes", "can run code"]),
        ([CALLBACK, "--trainer.callbacks.split=foo"], ["MicroworldEvaluation", "heldout", "'foo'"]),
        ([CALLBACK, "--trainer.callbacks.max_prompts=0"], ["MicroworldEvaluation", "max_prompts"]),
        (["--model.loss.tau=0"], ["Squared", "tau", "(0,"]),
        (["--model.loss.tau=much"], ["tau", "much"]),
        (["--model.loss.beta=1"], ["beta", "not accepted"]),
        (["--ckpt_path=none.ckpt"], ["no checkpoint 'none.ckpt'"]),
        (["-c", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--model.trainable=Select", "--model.trainable.patterns=[down_projj]"], ["down_projj", "down_proj"]),
        (["--model.references={margin: FromColumn}"], ["chosen_reference_log_prob", "'safety'"]),
        (["--model.reference=AdapterOff"], ["AdapterOff", "LoRA"]),
        (["--data.streams.helpfulness.assume_safe=false"], ["chosen_safe", "'helpfulness'", "assume_safe"]),
        (["--data.driver=nothing"], ["nothing", "safety, helpfulness"]),
    ],
)
def test_mistakes_get_one_clear_message(bfpo, base, small, overrides, words, capsys):
    text = refused(capsys, bfpo, "fit", *base, *small, *overrides)
    for word in words:
        assert word in text


def test_a_traceback_is_there_for_who_wants_it(bfpo, base, small, monkeypatch):
    monkeypatch.setenv("BFPO_TRACEBACK", "1")
    with pytest.raises(bfpo_pl.UserError):
        bfpo("fit", *base, *small, "--model.labeling.alpha=2")


def test_a_bug_keeps_its_traceback(bfpo, base, small, monkeypatch):
    """Only mistakes of the user are reduced to one message."""
    monkeypatch.setattr(bfpo_pl.BFPO, "__call__", lambda self, annotations: [].missing)
    with pytest.raises(AttributeError):
        bfpo("fit", *base, *small)


def test_a_checkpoint_of_another_model_is_named(bfpo, base, small, capsys):
    run = bfpo("fit", *base, *small)
    checkpoint = f"--ckpt_path={run.run_folder / 'checkpoints' / 'last.ckpt'}"
    text = refused(capsys, bfpo, "fit", *base, *small, checkpoint, "--model.policy.layers=1", "--trainer.max_steps=4")
    assert "another model's: policy.model.layers.1" in text


def test_a_checkpoint_with_nothing_left_to_train_says_so(bfpo, base, small, capsys):
    run = bfpo("fit", *base, *small)
    text = refused(capsys, bfpo, "fit", *base, *small, f"--ckpt_path={run.run_folder / 'checkpoints' / 'last.ckpt'}")
    assert "step 2 and trainer.max_steps is 2" in text


def test_text_that_the_tokenizer_does_not_know_stops_the_run(bfpo, base, small, tmp_path, capsys):
    """The embedded model is the default: own data without a model of one's own would train on <unk>."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        json.dumps(ROW | {"prompt": "Where is Ulm?", "chosen": "On the Danube.", "rejected": "No idea."}) + "\n"
    )
    small = [item for item in small if "streams" not in item]
    source = f"--data.streams.safety.source.path={file}"
    text = refused(capsys, bfpo, "fit", *base, "-c", "configs/data/jsonl.yaml", *small, source)
    assert "of the tokens are <unk>" in text
    assert "model.policy" in text


def test_validation_that_has_no_rows_or_never_runs_is_said(bfpo, base, small, caplog, capsys):
    none = "--data.streams.safety.source.validation_count=0"
    assert "no validation rows" in refused(capsys, bfpo, "validate", *base, *small, none)
    with caplog.at_level("INFO"):
        bfpo("fit", *base, *small)
    assert "Validation never ran on its 12 rows" in caplog.text


def test_overrides_win_wherever_they_stand(bfpo, base, small):
    run = bfpo("fit", "--model.loss.tau=0.7", *base, *small)
    assert run.model.loss.tau == 0.7


def test_a_single_callback_and_no_checkpoints(bfpo, base, small, capsys):
    run = bfpo(
        "fit", *base, *small, CALLBACK, "--trainer.enable_checkpointing=false", "--data.validation_streams=[safety]"
    )
    assert not (run.run_folder / "checkpoints").exists()
    assert any(type(callback).__name__ == "MicroworldEvaluation" for callback in run.trainer.callbacks)


def test_sft_refuses_rejected_responses(bfpo, small, capsys):
    small = [item for item in small if "max_steps" not in item]
    assert "rejected" in refused(capsys, bfpo, "sft", "-c", "configs/base.yaml", *small)


def test_the_learning_rate_that_is_logged_is_the_one_that_was_used(bfpo, base, small):
    run = bfpo("fit", *base, *small, "--trainer.max_steps=4", "--model.schedule.warmup=2")
    rates = [float(row["train/lr"]) / 3e-4 for row in metrics_rows(run.run_folder) if row["train/lr"]]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


def test_malformed_yaml_names_file_and_line(bfpo, tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model:\n  labeling: [BFPO\n  loss: x\n")
    text = refused(capsys, bfpo, "fit", "-c", "configs/base.yaml", "-c", str(bad))
    assert str(bad) in text
    assert "line 3" in text
    bad.write_text("model:\n  labelling: BFPO\n")
    assert "labelling" in refused(capsys, bfpo, "fit", "-c", "configs/base.yaml", "-c", str(bad))


def test_no_command_and_unknown_command(bfpo, capsys):
    text = refused(capsys, bfpo, "fitt")
    assert "no command 'fitt'" in text
    assert "validate" in text


ROW = {
    "prompt": "how do i open the window ?",
    "chosen": "to open",
    "rejected": "sorry",
    "chosen_safe": 1,
    "rejected_safe": True,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": "to open"}, ["rejected"]),
        ({"chosen": "  "}, ["chosen"]),
        ({"chosen_safe": "yes"}, ["chosen_safe", "yes"]),
        ({"rejected_safe": 1.5}, ["rejected_safe", "1.5"]),
    ],
)
def test_bad_rows_stop_the_run_with_file_and_line(bfpo, base, small, tmp_path, change, words, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, ROW | {"prompt": "other"}, ROW | change)))
    small = [item for item in small if "streams" not in item]
    text = refused(
        capsys, bfpo, "fit", *base, "-c", "configs/data/jsonl.yaml", *small,
        f"--data.streams.safety.source.path={file}",
    )  # fmt: skip
    for word in (f"{file}:3", "on_bad_row", *words):
        assert word in text


def test_own_pairs_train_from_a_jsonl_file(bfpo, small, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(ROW | {"prompt": f"how do i {verb} the window ?"}) + "\n" for verb in ("open", "paint"))
    )
    small = [item for item in small if "streams" not in item]
    run = bfpo(
        "fit", "-c", "configs/base.yaml", "-c", "configs/experiment/bfpo.yaml", "-c", "configs/data/jsonl.yaml",
        *small, f"--data.streams.safety.source.path={file}",
    )  # fmt: skip
    assert run.trainer.global_step == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_starts_at_margin_zero_and_keeps_soft_flags(bfpo, base, small, precision):
    """The log-probs are float32 in either case, and a flag of 0.9 is not rounded to bf16's 0.8984."""
    soft = ["--data.streams.safety.source.flag_noise=0.1", "--data.streams.safety.source.soft_flags=true"]
    run = bfpo("fit", *base, *small, *soft, f"--trainer.precision={precision}", "--trainer.val_check_interval=2")
    first = next(row for row in metrics_rows(run.run_folder) if row["train/all/all/loss"])
    assert float(first["train/all/all/margin"]) == 0.0
    assert all(buffer.dtype == torch.float32 for buffer in run.model.policy.buffers())
    batch = next(iter(run.datamodule.train_dataloader())).to(run.model.device)
    flags = batch.annotations["chosen_safe"][batch.pair_stream == 0]
    assert set(flags.tolist()) <= set(torch.tensor([0.1, 0.9]).tolist())
    assert run.model.objective(batch).log_probs.policy.dtype == torch.float32
    # Lightning would round the flags to bf16 on the way; the metrics show that the module saw them whole.
    targets = run.model.labeling(batch.annotations).target
    assert float(run.trainer.precision_plugin.convert_input(batch).annotations["chosen_safe"].sum()) == float(
        batch.annotations["chosen_safe"].sum()
    )
    assert targets.dtype == torch.float32


def test_a_run_that_must_stop_says_why_and_names_the_rows(bfpo, base, small, monkeypatch, capsys):
    """A loss that is not finite: exit code 1, one message with the rows of that step, and no export."""
    monkeypatch.setattr(bfpo_pl.Squared, "__call__", lambda self, log_probs, label: log_probs.margin() * torch.nan)
    with pytest.raises(SystemExit) as caught:
        bfpo("fit", *base, *small)
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert "bfpo: error: The loss was NaN or infinite (rows of this step: MicroworldSafety[train]:" in text
    assert "at optimizer step 0; the update was not applied" in text
    assert "Traceback" not in text
