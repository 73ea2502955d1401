"""The folder that a fit leaves: plain transformers must load it and compute what the policy computed."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from bfpo_pl.callbacks.export import ExportHF
from bfpo_pl.data.collate import collate
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.rows import Row
from bfpo_pl.labeling import BFPO
from bfpo_pl.losses import Squared
from bfpo_pl.microworld import build_tokenizer
from bfpo_pl.microworld.world import vocabulary
from bfpo_pl.models.reference import AdapterOff
from bfpo_pl.models.sources import HFModel, TinyModel
from bfpo_pl.models.trainable import LoRA, Select
from bfpo_pl.module import PreferenceModule
from bfpo_pl.schedules import Constant
from bfpo_pl.sft import SFTModule

TOKENS = torch.tensor([[1, 9, 14, 30, 3, 8, 25, 40, 2]])


def tiny():
    return TinyModel(hidden_size=32, layers=2, heads=4, intermediate_size=48, seed=4)


def batches():
    """Three batches of one row in the microworld's words."""
    words = vocabulary()
    encoder = RowEncoder(build_tokenizer())
    row = Row.pair(" ".join(words[:4]), " ".join(words[5:9]), " ".join(words[10:12]), True, False)
    return [collate([(0, encoder(row))], ("safety",), (1.0,))] * 3


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


def fit(module, folder, **export):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ExportHF(**export)],
    )
    trainer.fit(module, DataLoader(batches(), batch_size=None, collate_fn=lambda batch: batch))
    return folder / "export"


def preference(source, **arguments):
    return PreferenceModule(source, BFPO(), Squared(tau=0.1), optimizer=adam, schedule=Constant(), **arguments)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("trainable", [None, Select(["down_proj"])], ids=["everything", "selected"])
def test_a_full_export_is_bit_equal(tmp_path, trainable):
    module = preference(tiny(), trainable=trainable)
    folder = fit(module, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(module.policy))
    assert not torch.equal(logits(loaded), logits(tiny().load_model()))
    want = module.policy.state_dict()
    got = loaded.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert not list(folder.parent.glob("*.part"))


def test_the_tokenizer_comes_along(tmp_path):
    folder = fit(preference(tiny()), tmp_path)
    loaded, own = AutoTokenizer.from_pretrained(folder), build_tokenizer()
    assert loaded.get_vocab() == own.get_vocab()
    assert loaded.chat_template == own.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (own.pad_token_id, own.eos_token_id)


def test_tied_embeddings_stay_tied(tmp_path):
    folder = fit(preference(tiny()), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in set(file.keys())


def test_untied_embeddings_stay_apart(tmp_path):
    config = Qwen3Config(
        vocab_size=len(build_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    module = preference(HFModel(str(tmp_path / "start")))
    folder = fit(module, tmp_path, max_shard_size="15KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(module.policy))


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_an_adapter_is_merged(tmp_path, target_modules):
    module = preference(tiny(), trainable=LoRA(r=2, alpha=4.0, target_modules=target_modules), reference=AdapterOff())
    folder = fit(module, tmp_path)
    assert not list(folder.glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    start = tiny().load_model()
    assert loaded.state_dict().keys() == start.state_dict().keys()
    torch.testing.assert_close(logits(loaded), logits(module.policy), atol=1e-5, rtol=1e-5)
    assert (logits(loaded) - logits(start)).abs().max() > 1e-3
    assert not any("lora" in key for key in json.loads((folder / "config.json").read_text()))
    # The module itself is as it was: its adapter is not merged.
    assert any("lora_B" in name for name, _ in module.policy.named_parameters())


def test_the_export_of_sft_is_the_next_runs_policy(tmp_path):
    sft = SFTModule(tiny(), optimizer=adam, schedule=Constant())
    folder = fit(sft, tmp_path / "sft")
    source = HFModel(str(folder))
    source.check()
    assert torch.equal(logits(source.load_model()), logits(sft.policy))
    assert source.load_tokenizer().get_vocab() == build_tokenizer().get_vocab()
    aligned = preference(source)
    second = fit(aligned, tmp_path / "bfpo")
    reference = aligned.references["reference"]._network
    assert torch.equal(logits(reference), logits(sft.policy))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(second)), logits(aligned.policy))
    assert not torch.equal(logits(aligned.policy), logits(sft.policy))


def test_an_older_export_is_replaced(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale.safetensors").write_text("old")
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export.part").mkdir()
    (tmp_path / "export.part" / "half.txt").write_text("left behind")
    folder = fit(preference(tiny()), tmp_path)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"stale.safetensors", "half.txt"}


def test_no_export_when_switched_off(tmp_path):
    assert not fit(preference(tiny()), tmp_path, enabled=False).exists()


def test_the_export_has_the_chat_template_of_the_training(bfpo, base, small, in_repository):
    own = TinyModel().load_tokenizer().chat_template
    template = own + "{# another #}"
    run = bfpo("fit", *base, *small, f"--data.template.chat_template={template}")
    exported = AutoTokenizer.from_pretrained(run.run_folder / "export")
    assert (exported.chat_template, run.model.tokenizer.chat_template) == (template, own)
