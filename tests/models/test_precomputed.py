"""Log-probs that are computed before training: those of a live reference, kept for all runs on the same rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from bfpo_pl.component import RunError
from bfpo_pl.data.arrow import read_shard
from bfpo_pl.models import precomputed as precomputed_module
from bfpo_pl.models import weights as weights_module
from bfpo_pl.models.log_prob_store import LogProbStore
from bfpo_pl.models.reference import FrozenCopy
from bfpo_pl.models.rotary import length_of_other_angles
from bfpo_pl.models.sources import HFModel, TinyModel
from bfpo_pl.models.weights import files_digest

RESPONSES = 2 * (40 + 12 + 40)  # of the rows of `small`, both splits


@pytest.fixture
def small(small, tmp_path):
    return [*small, f"--data.cache={tmp_path / 'cache'}"]


@pytest.fixture
def fit(bfpo, base, small):
    """Fits with kept log-probs; gives the CLI object."""

    def call(*overrides, command="fit", reference="Precomputed", sizes=True):
        sized = small if sizes else [each for each in small if not each.startswith("--model.policy.")]
        return bfpo(command, *base, *sized, f"--model.reference={reference}", *overrides)

    return call


def weights(cli):
    return load_file(cli.run_folder / "export" / "model.safetensors")


def difference(one, other):
    return max((weights(one)[name] - value).abs().max().item() for name, value in weights(other).items())


def stores(tmp_path):
    return [path for path in (tmp_path / "cache" / "reference").iterdir() if path.is_dir()]


def rewrite(tmp_path, change):
    """Changes the log-probs that the only store has kept."""
    (store,) = stores(tmp_path)
    for path in list(store.glob("*.arrow")):
        batch = read_shard(path)
        keys, sums, lengths = (batch[name].to_numpy().copy() for name in ("key", "log_prob", "length"))
        path.unlink()
        changed = LogProbStore(store)
        changed.add(keys, change(sums), lengths)
        changed.write()


def computed(cli):
    return cli.model.references["reference"].computed


MEAN = ["--model.logp_reduction=mean"]
LORA = ["--model.trainable=LoRA", "--model.trainable.r=4"]
SELECT = ["--model.trainable=Select", "--model.trainable.patterns=[down_proj]"]


@pytest.mark.parametrize(
    ("more", "live"),
    [([], "FrozenCopy"), (MEAN, "FrozenCopy"), (SELECT, "SharedWeights"), (LORA, "AdapterOff")],
    ids=["everything", "mean", "select", "lora"],
)
def test_training_is_that_with_a_live_reference(fit, more, live):
    steps = ["--trainer.max_steps=12", *more]
    kept, alive = fit(*steps), fit(*steps, reference=live)
    assert computed(kept) == RESPONSES
    assert difference(kept, alive) < 2e-6
    start = TinyModel(32, 2, 2, 64, seed=0).load_model().state_dict()
    moved = max((value - start[name]).abs().max().item() for name, value in weights(kept).items() if name in start)
    assert moved > 1e-3 or more == LORA


def test_other_runs_find_what_one_has_computed(fit, tmp_path):
    """Neither learning rate, loss, labeling, order of rows, name nor batch size is in the key."""
    assert computed(fit(command="reference")) == RESPONSES
    for more in (
        ["--model.optimizer.lr=1e-2"],
        ["--model.loss=Logistic", "--model.loss.beta=0.3"],
        ["--model.labeling=HelpfulnessOnly", "--experiment=other", "--data.seed=7"],
        ["--data.streams.safety.batch_size=8", "--model.logp_reduction=mean"],
        [*SELECT],
        [*LORA],
        ["--data.streams.safety.fraction=0.5"],  # other token files, the same rows
    ):
        assert computed(fit(*more)) == 0, more
    assert len(stores(tmp_path)) == 1


@pytest.mark.parametrize(
    "more",
    [["--model.policy.seed=1"], ["--trainer.precision=bf16-mixed"], ["--trainer.precision=bf16-true"]],
    ids=str,
)
def test_another_network_or_type_is_another_store(fit, tmp_path, more):
    fit(command="reference")
    assert computed(fit(*more)) == RESPONSES
    assert len(stores(tmp_path)) == 2


def test_rows_that_are_new_are_computed_and_no_others(fit):
    fit(command="reference")
    assert computed(fit("--data.streams.safety.source.count=43")) == 6


def test_a_run_that_goes_on_computes_what_is_gone_under_the_start(fit, tmp_path):
    whole = fit("--trainer.max_steps=6", "--checkpoint.every_n_train_steps=3", "--checkpoint.save_top_k=-1")
    (checkpoint,) = whole.run_folder.glob("checkpoints/*step=3.ckpt")
    again = fit("--trainer.max_steps=6", f"--ckpt_path={checkpoint}")
    assert computed(again) == 0
    assert difference(again, whole) == 0
    shutil.rmtree(tmp_path / "cache" / "reference")
    anew = fit("--trainer.max_steps=6", f"--ckpt_path={checkpoint}")
    assert computed(anew) == RESPONSES
    assert difference(anew, whole) < 1e-6


def test_validation_of_a_checkpoint(fit, bfpo, base, small):
    run = fit()
    found = {}
    for reference in ("Precomputed", "FrozenCopy"):
        arguments = [f"--model.reference={reference}", f"--ckpt_path={run.run_folder}/checkpoints/last.ckpt"]
        found[reference] = bfpo("validate", *base, *small, *arguments).trainer.callback_metrics
    for name, value in found["FrozenCopy"].items():
        torch.testing.assert_close(found["Precomputed"][name], value, atol=1e-4, rtol=1e-4)
    assert "val/all/all/margin" in found["Precomputed"]


def test_kept_values_of_another_network_stop_the_run(fit, tmp_path, capsys):
    fit(command="reference")
    rewrite(tmp_path, lambda sums: sums * 0.9)
    with pytest.raises(SystemExit) as stopped:
        fit()
    assert stopped.value.code == 1
    assert "are not those of this reference" in capsys.readouterr().err
    assert computed(fit("--model.reference.verify=0", "--model.reference.start_tolerance=100")) == 0


def test_in_half_precision_too_where_all_are_off_by_little(fit, tmp_path, capsys):
    half = "--trainer.precision=bf16-mixed"
    fit(half, command="reference")
    assert computed(fit(half)) == 0
    rewrite(tmp_path, lambda sums: sums * 1.015)
    with pytest.raises(SystemExit):
        fit(half)
    assert "are not those of this reference" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_knows_the_values_that_its_run_trained_with(fit, tmp_path, capsys, command):
    fit()
    checkpoint = next(tmp_path.glob("runs/*/*/checkpoints/last.ckpt"))
    again = (f"--ckpt_path={checkpoint}", *(["--trainer.max_steps=4"] * (command == "fit")))
    fit(*again, command=command)
    rewrite(tmp_path, lambda sums: sums + 3)
    with pytest.raises(SystemExit) as stopped:
        fit(*again, command=command)
    assert stopped.value.code == 1
    assert "in the checkpoint's run" in capsys.readouterr().err
    fit(*again, "--model.reference.source=TinyModel", "--model.reference.source.layers=1", command=command)


def test_a_checkpoint_that_is_restored_after_the_values_were_found_is_compared_too(fit):
    """Sharded strategies do it in that order."""
    reference = fit().model.references["reference"]
    state = reference.state()
    assert len(state["log_probs"]) > RESPONSES / 2
    reference.check_state(state)
    reference.check_state({"store": "another", "log_probs": {"7": 1.0}})
    changed = {key: value + 0.5 for key, value in state["log_probs"].items()}
    with pytest.raises(RunError, match=r"responses differ by 0\.5 nats"):
        reference.check_state({**state, "log_probs": changed})


def test_a_policy_that_is_not_where_the_reference_is_stops_the_run(fit, tmp_path, capsys):
    fit(command="reference")
    rewrite(tmp_path, lambda sums: sums + 4 * (np.arange(len(sums)) % 2))
    with pytest.raises(SystemExit):
        fit("--model.reference.verify=0")
    assert "mean size is 4" in capsys.readouterr().err


def test_the_mean_margin_at_the_start_is_printed(fit, caplog):
    with caplog.at_level("INFO"):
        fit("--trainer.precision=bf16-mixed")
    assert "Before the first update the mean |margin| is" in caplog.text


FEW = "--model.reference.batch_tokens=200"


def interrupt(monkeypatch, after, error):
    """Stops the computation after so many batches."""
    plain, calls = precomputed_module.Precomputed._values, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(precomputed_module.Precomputed, "_values", staticmethod(interrupted))


def test_what_was_computed_before_an_interruption_is_kept(fit, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        interrupt(patched, 3, KeyboardInterrupt)
        with pytest.raises(BaseException):  # noqa: B017, PT011  # Lightning ends a run in its own way
            fit(FEW, command="reference")
    (folder,) = stores(tmp_path)
    kept = len(LogProbStore(folder))
    assert 0 < kept < RESPONSES
    assert computed(fit(FEW, command="reference")) == RESPONSES - kept


def test_a_process_that_is_killed_has_written_what_was_computed_before_the_last_seconds(fit, monkeypatch, tmp_path):
    """Nothing that a killed process does not come to: what the end of the computation writes is left out."""
    monkeypatch.setattr(precomputed_module, "_SECONDS_BETWEEN_PARTS", 0.0)
    parts, plain = [], LogProbStore.write
    monkeypatch.setattr(LogProbStore, "write", lambda store: (plain(store), parts.append(len(store))))
    fit(FEW, command="reference")
    assert len(parts) > 5
    assert parts[:-1] == sorted(set(parts))
    assert parts[-1] == parts[-2] == RESPONSES


def test_two_runs_at_once_compute_once(base, small, tmp_path, in_repository):
    command = [str(Path(sys.executable).with_name("bfpo")), "reference", *base, *small, f"--runs={tmp_path / 'runs'}"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    logs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    done = sorted(f"and of {count} computed" for log in logs for count in (0, RESPONSES) if f"and of {count} " in log)
    assert done == ["and of 0 computed", f"and of {RESPONSES} computed"], logs


def test_a_reference_of_another_source_and_name(fit, bfpo, base, small, tmp_path):
    sizes = [each.replace("policy", "reference.source") for each in small if "policy" in each]
    source = ["--model.reference.source=TinyModel", *sizes]
    steps = ["--trainer.max_steps=5", *source, "--model.reference.source.seed=5"]
    kept, alive = fit(*steps), fit(*steps, reference="FrozenCopy")
    assert computed(kept) == RESPONSES
    assert difference(kept, alive) < 2e-6


def test_rows_that_stream_are_refused(fit, capsys, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = {"prompt": "help me rob the chair .", "chosen": "sorry , i can not help .", "rejected": "use wheel ."}
    row = {**texts, "chosen_safe": True, "rejected_safe": True}
    (folder / "train.jsonl").write_text(9 * (json.dumps(row) + "\n"))
    stream = "--data.streams.safety"
    with pytest.raises(SystemExit) as stopped:
        fit(
            f"{stream}.source=HubDataset",
            f"{stream}.source.path={folder}",
            f"{stream}.source.splits={{train: train}}",
            f"{stream}.source.streaming=true",
            f"{stream}.adapter=Columns",
            "--data.on_bad_row=drop",
        )
    assert stopped.value.code == 2
    assert "Set data.streams.safety.source.streaming: false" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [8, 64])
def test_a_network_whose_angles_depend_on_the_batch_is_refused_where_rows_are_long(fit, tmp_path, capsys, limit):
    source = TinyModel(32, 2, 2, 64, seed=0)
    source.load_model().save_pretrained(tmp_path / "model")
    source.load_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    settings = {"max_position_embeddings": limit, "rope_parameters": rope}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    model = ["--model.policy=HFModel", f"--model.policy.path={tmp_path / 'model'}"]
    if limit == 64:
        assert computed(fit(*model, command="reference", sizes=False)) == RESPONSES
        return
    with pytest.raises(SystemExit) as stopped:
        fit(*model, command="reference", sizes=False)
    assert stopped.value.code == 2
    assert "in batches with a row of more than 8 tokens LlamaForCausalLM turns all" in capsys.readouterr().err


def test_when_angles_depend_on_the_batch():
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0, "original_max_position_embeddings": 8}
    assert length_of_other_angles(Phi3Config(**sizes, max_position_embeddings=64, rope_parameters=long)) == 8
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert length_of_other_angles(LlamaConfig(max_position_embeddings=16, rope_parameters=dynamic)) == 16
    for fine in (LlamaConfig(), GPT2Config(), Gemma3TextConfig()):
        assert length_of_other_angles(fine) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ckpt_path=missing.ckpt"], "missing.ckpt"),
        (["--model.reference=FromColumn"], "has its log-probs in the data"),
        (["--model.reference.batch_tokens=0"], "batch_tokens must lie in"),
    ],
)
def test_mistakes(fit, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        fit(*more, command="reference")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- digests of weights -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    TinyModel(32, 2, 2, 64, seed=0).load_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_of_a_folder_is_the_same_network_and_a_changed_weight_is_not(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    memory = tmp_path / "memory"
    digest = HFModel(str(folder)).weights_digest(memory)
    assert HFModel(str(tmp_path / "copy")).weights_digest(memory) == digest
    assert HFModel(str(folder), dtype="bfloat16").weights_digest(memory) != digest
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert HFModel(str(tmp_path / "copy")).weights_digest(memory) != digest
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.1}))
    assert HFModel(str(folder)).weights_digest(memory) != digest


def test_several_files_are_all_read(tmp_path):
    TinyModel(32, 2, 2, 64, seed=0).load_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    digest = HFModel(str(tmp_path / "model")).weights_digest(tmp_path / "memory")
    tensors = load_file(files[-1])
    tensors[next(iter(tensors))].view(-1)[0] += 1e-3
    save_file(tensors, files[-1], metadata={"format": "pt"})
    assert HFModel(str(tmp_path / "model")).weights_digest(tmp_path / "memory") != digest


def test_files_are_read_once(folder, tmp_path, monkeypatch):
    files, memory = list(folder.glob("*.safetensors")), tmp_path / "memory"
    digest = files_digest(files, memory)
    with monkeypatch.context() as patched:
        patched.setattr(weights_module, "_CHUNK", None)  # reading a file needs it
        assert files_digest(files, memory) == digest
    files[0].touch()
    assert files_digest(files, memory) == digest  # read again, the same
    with monkeypatch.context() as patched:
        patched.setattr(weights_module, "_CHUNK", "nonsense")
        files[0].touch()
        with pytest.raises(TypeError):
            files_digest(files, memory)


def test_networks_in_memory_differ_by_seed_and_shape(tmp_path):
    sources = [TinyModel(32, 2, 2, 64, seed=0), TinyModel(32, 2, 2, 64, seed=1), TinyModel(32, 3, 2, 64, seed=0)]
    digests = [source.weights_digest(tmp_path) for source in sources]
    assert len(set(digests)) == 3
    assert TinyModel(32, 2, 2, 64, seed=0).weights_digest(tmp_path) == digests[0]


def test_values_are_those_of_the_network(fit, tmp_path):
    """Against a frozen copy asked row by row, each by itself."""
    cli = fit(command="reference")
    network = FrozenCopy(TinyModel(32, 2, 2, 64, seed=0))
    network.prepare(cli.model.policy, cli.model.source, cli.model.load)
    (folder,) = stores(tmp_path)
    store = LogProbStore(folder)
    rows = precomputed_module._Rows(cli.datamodule.rows)
    assert len(rows) == RESPONSES // 2
    for number in (0, 17, 63, len(rows) - 1):
        trees = rows.trees(np.array([number]))
        batch = precomputed_module.collate([(0, trees[0])], ["only"], [1.0])
        want = network.log_probs(cli.model.policy, batch).double().numpy()
        known, sums, lengths = store.find(precomputed_module.batch_keys(batch))
        assert known.all()
        np.testing.assert_allclose(sums, want, atol=1e-4)
        assert lengths.tolist() == batch.response_lengths.tolist()
