"""`bfpo export`: from every kind of checkpoint, in one process; the folder is the fit's own, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import BASE, LORA, SHARDED, SMALL, TINY, checkpoint, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import bfpo_pl
from bfpo_pl.checkpoints.shards import read_metadata
from bfpo_pl.models.trainable import LoRA

KINDS = ["file", "sharded", "lora", "sharded-lora", "bfloat16"]


def contents(folder, *but):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


def fresh(base_model):
    return AutoModelForCausalLM.from_pretrained(base_model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_gives_the_folder_that_the_fit_left(kind, runs, bfpo, tmp_path):
    folder = bfpo("export", "--run", runs[kind], "--to", tmp_path / "new")
    assert contents(folder, "README.md") == contents(runs[kind] / "export", "README.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_sft_runs_export_as_well(sft_run, bfpo, tmp_path):
    folder = bfpo("export", "--run", sft_run, "--to", tmp_path / "new")
    assert contents(folder, "README.md") == contents(sft_run / "export", "README.md")
    assert "- sft" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["file", "sharded"])
def test_an_earlier_checkpoint_has_its_own_weights(kind, runs, bfpo, tmp_path):
    step = checkpoint(runs[kind], 2)
    folder = bfpo("export", "--run", runs[kind], "--to", tmp_path / "new", "--checkpoint", step.name)
    saved = {}
    if kind == "file":
        saved = torch.load(step, weights_only=True)["state_dict"]
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], saved[f"policy.{name}"]) for name in weights)
    early, late = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, runs[kind] / "export"))
    assert not torch.equal(logits(early), logits(late))
    assert "2 optimizer steps" in (folder / "README.md").read_text()


def test_file_and_folder_of_the_same_training_are_equal(runs, bfpo, tmp_path):
    exports = [
        bfpo("export", "--run", runs[kind], "--to", tmp_path / kind, "--checkpoint", checkpoint(runs[kind], 2))
        for kind in ("file", "sharded")
    ]
    # FSDP2 on one process is the same arithmetic, so the same weights.
    assert (exports[0] / "model.safetensors").read_bytes() == (exports[1] / "model.safetensors").read_bytes()


def test_best_is_what_the_run_monitored(runs, bfpo, tmp_path):
    folder = bfpo("export", "--run", runs["file"], "--to", tmp_path / "best", "--checkpoint", "best")
    named = bfpo("export", "--run", runs["file"], "--to", tmp_path / "2", "--checkpoint", checkpoint(runs["file"], 2))
    assert contents(folder, "README.md") == contents(named, "README.md")


@pytest.mark.parametrize("kind", ["file", "bfloat16"])
def test_logits_are_those_of_the_checkpoint(kind, runs, bfpo, tmp_path):
    folder = bfpo("export", "--run", runs[kind], "--to", tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    saved = torch.load(runs[kind] / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    network = type(loaded)(loaded.config).to(loaded.dtype)
    # In bf16 rotary frequencies stay float32, as from_pretrained keeps them.
    network.model.rotary_emb = loaded.model.rotary_emb
    network.load_state_dict({name.removeprefix("policy."): tensor for name, tensor in saved.items()}, strict=True)
    assert loaded.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    assert torch.equal(logits(loaded), logits(network))


@pytest.mark.parametrize("kind", ["lora", "sharded-lora"])
def test_an_adapter_alone_is_what_peft_and_transformers_load(kind, runs, base_model, bfpo, tmp_path):
    folder = bfpo("export", "--run", runs[kind], "--to", tmp_path / "adapter", "--merge", "false")
    assert not list(folder.glob("model*"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["task_type"]) == (str(base_model), 4, "CAUSAL_LM")
    names = load_file(folder / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name and name.startswith("base_model.model.model.layers.") for name in names)

    start = logits(fresh(base_model))
    by_peft = logits(PeftModel.from_pretrained(fresh(base_model), folder))
    plain = fresh(base_model)
    plain.load_adapter(str(folder))
    by_folder = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(by_peft, logits(plain))
    assert torch.equal(by_peft, by_folder)
    assert (by_peft - start).abs().max() > 1e-3
    # What the checkpoint's own weights compute, put into a network by hand.
    network = fresh(base_model)
    LoRA(r=4).apply(network)
    step = runs["lora"] / "checkpoints/last.ckpt"
    saved = torch.load(step, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("policy."): tensor for name, tensor in saved.items()}, strict=True)
    assert torch.equal(by_peft, logits(network))
    merged = AutoModelForCausalLM.from_pretrained(runs[kind] / "export")
    torch.testing.assert_close(logits(merged), by_peft, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("strategy", [[], SHARDED], ids=["one process", "fsdp2"])
def test_a_fit_may_leave_the_adapter_alone(strategy, base_model, bfpo, tmp_path):
    more = ["--model.policy=HFModel", f"--model.policy.path={base_model}", *LORA, "--export.merge=false"]
    run = bfpo("fit", *BASE, *strategy, *SMALL, *more, f"--runs={tmp_path / 'runs'}").run_folder
    folder = bfpo("export", "--run", run, "--to", tmp_path / "new", "--merge", "false")
    assert contents(run / "export", "README.md") == contents(folder, "README.md")
    model, tokenizer = bfpo_pl.load(run)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(fresh(base_model), folder)))
    assert tokenizer.chat_template


def test_merging_is_base_plus_scaled_product(runs, base_model):
    base, merged = load_file(base_model / "model.safetensors"), load_file(runs["lora"] / "export/model.safetensors")
    saved = torch.load(runs["lora"] / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    layer = "model.layers.1.mlp.down_proj"
    a, b = (saved[f"policy.{layer}.lora_{part}.default.weight"] for part in "AB")
    assert torch.equal(merged[f"{layer}.weight"], base[f"{layer}.weight"] + b @ a * (32.0 / 4))
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_shards_generation_config_and_type(runs, bfpo, tmp_path):
    options = ("--max_shard_size", "15KB", "--dtype", "bfloat16")
    folder = bfpo("export", "--run", runs["lora"], "--to", tmp_path / "new", *options)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    loaded, full = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, runs["lora"] / "export"))
    assert loaded.dtype == torch.bfloat16
    for name, tensor in full.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16)), name
    assert GenerationConfig.from_pretrained(folder).repetition_penalty == 1.25
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1


def test_the_optimizer_is_not_read(runs, bfpo, tmp_path):
    run = shutil.copytree(runs["sharded"], tmp_path / "run", symlinks=True)
    last = run / "checkpoints/last.ckpt"
    destroyed = 0
    for index, info in read_metadata(last).storage_data.items():
        if index.fqn.startswith("optimizer"):
            with (last / info.relative_path).open("r+b") as file:
                file.seek(info.offset)
                file.write(b"\xff" * info.length)
            destroyed += 1
    assert destroyed > 20
    folder = bfpo("export", "--run", run, "--to", tmp_path / "new")
    assert contents(folder, "README.md") == contents(runs["sharded"] / "export", "README.md")


def test_the_card_says_what_was_trained_and_holds_no_home(runs, bfpo, tmp_path):
    run = shutil.copytree(runs["file"], tmp_path / "run", symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"cache": "/home/alice/cache", "template": {"class_path": "ChatTemplate"}}
    config["data"]["template"]["init_args"] = {"system": "be safe"}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    text = (bfpo("export", "--run", run, "--to", tmp_path / "new") / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert (matter["library_name"], matter["pipeline_tag"]) == ("transformers", "text-generation")
    for part in ("BFPO(b1=3.0", "Squared(tau=0.5)", "| safety | train |", "| 40 | none | 4 |", "git revision"):
        assert part in text
    assert "had this one in training: 'be safe'" in text
    assert "alice" not in text
    assert "~/cache" in text
    metrics = [line for line in text.splitlines() if line.startswith("| val/safety/all/loss ")]
    assert metrics
    assert metrics[0].split("|")[3].strip() == "4"
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["model"] == config["model"]


def test_the_fit_writes_the_same_card(runs, bfpo, tmp_path):
    folder = bfpo("export", "--run", runs["file"], "--to", tmp_path / runs["file"].name)
    assert (folder / "README.md").read_text() == (runs["file"] / "export/README.md").read_text()


def test_the_templates_stop_tokens_end_generation(base_model, bfpo, tmp_path):
    more = [
        *("--model.policy=HFModel", f"--model.policy.path={base_model}"),
        *("--data.template=ChatTemplate", "--data.template.stop_tokens=[<sep>]"),
    ]
    run = bfpo("fit", *BASE, *SMALL, *more, f"--runs={tmp_path / 'runs'}").run_folder
    folder = bfpo("export", "--run", run, "--to", tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    for exported in (folder, run / "export"):
        assert GenerationConfig.from_pretrained(exported).eos_token_id == stops


# ---- what can be wrong --------------------------------------------------------------------------------------------


def test_an_older_folder_is_replaced_only_when_told(runs, bfpo, refusal, tmp_path):
    folder = bfpo("export", "--run", runs["file"], "--to", tmp_path / "new")
    before = contents(folder)
    assert "exists already" in refusal("export", "--run", runs["sharded"], "--to", folder)
    assert contents(folder) == before
    bfpo("export", "--run", runs["lora"], "--to", folder, "--overwrite", "true")
    assert contents(folder, "README.md") == contents(runs["lora"] / "export", "README.md")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    said = refusal("export", "--run", runs["file"], "--to", tmp_path / "mine", "--overwrite", "true")
    assert "not an exported model" in said
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    (tmp_path / "mine/config.json").write_text("{}")
    said = refusal("export", "--run", runs["file"], "--to", tmp_path / "mine", "--overwrite", "true")
    assert "'thesis.txt' is no part of one" in said
    (folder / "results").mkdir()
    said = refusal("export", "--run", runs["file"], "--to", folder, "--overwrite", "true")
    assert "'results' is no part of one" in said
    (tmp_path / "mine/thesis.txt").rename(tmp_path / "thesis.txt")
    said = refusal("export", "--run", runs["file"], "--to", tmp_path / "mine", "--overwrite", "true")
    assert "it has no *.safetensors" in said
    assert (tmp_path / "mine/config.json").read_text() == "{}"


def test_a_failure_half_way_leaves_the_old_folder_and_no_other(runs, bfpo, tmp_path, monkeypatch):
    from bfpo_pl.export import folder as writing

    folder = bfpo("export", "--run", runs["file"], "--to", tmp_path / "new")
    before = contents(folder)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_settle", full)
    with pytest.raises(SystemExit):
        bfpo("export", "--run", runs["lora"], "--to", folder, "--overwrite", "true")
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_mistakes_are_said_before_anything_is_written(runs, refusal, tmp_path, monkeypatch):
    run, to = runs["file"], tmp_path / "new"
    assert "There is no run" in refusal("export", "--run", tmp_path / "none", "--to", to)
    assert "no config.yaml" in refusal("export", "--run", tmp_path, "--to", to)
    said = refusal("export", "--run", run, "--to", to, "--checkpoint", "none.ckpt")
    assert f"There is no checkpoint '{run}/checkpoints/none.ckpt'. Checkpoints in {run}/checkpoints: epoch=" in said
    assert "no adapter" in refusal("export", "--run", run, "--to", to, "--merge", "false")
    assert "max_shard_size" in refusal("export", "--run", run, "--to", to, "--max_shard_size", "much")
    assert "bfpo export" in refusal("export", "--run", run)
    assert "unrecognized" in refusal("export", "--run", run, "--to", to, "--checkpiont", "last").lower()
    empty = shutil.copytree(run, tmp_path / "empty", ignore=shutil.ignore_patterns("*.ckpt"), symlinks=True)
    assert "there is no run with a checkpoint in" in refusal("export", "--run", empty, "--to", to)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB are needed" in refusal("export", "--run", run, "--to", to)
    assert not to.exists()


def test_a_run_without_a_monitor_has_no_best(sft_run, refusal, tmp_path):
    said = refusal("export", "--run", sft_run, "--to", tmp_path / "new", "--checkpoint", "best")
    assert "has a score. The run must monitor a metric" in said


@pytest.mark.parametrize(
    ("key", "named"), [("policy", "plugins.mine.Source"), ("policy", "Gone"), ("trainable", "plugins.mine.Part")]
)
def test_a_class_that_is_missing_is_named(key, named, runs, refusal, tmp_path):
    run = shutil.copytree(runs["file"], tmp_path / "run", symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"][key] = {"class_path": named}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    said = refusal("export", "--run", run, "--to", tmp_path / "new")
    assert f"model.{key}" in said
    assert named in said
    if "." in named:
        assert "BFPO_PLUGINS" in said


def test_weights_of_another_model_are_refused(runs, refusal, tmp_path):
    run = shutil.copytree(runs["file"], tmp_path / "run", symlinks=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["policy"]["init_args"]["intermediate_size"] = 40
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    said = refusal("export", "--run", run, "--to", tmp_path / "new")
    assert "mlp.down_proj.weight is (32, 384), and (32, 40)" in said


def test_an_adapter_needs_a_base_that_can_be_named(bfpo, refusal, tmp_path):
    run = bfpo("fit", *BASE, *SMALL, *TINY, *LORA, f"--runs={tmp_path / 'runs'}").run_folder
    assert "merge=true" in refusal("export", "--run", run, "--to", tmp_path / "new", "--merge", "false")
