"""Networks without their weights: what they hold already, and why some can only be loaded whole."""

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file

from bfpo_pl.models.outline import WholeOnly, stood_in
from bfpo_pl.models.sources import HFModel, ModelSourceError, TinyModel
from bfpo_pl.models.trainable import LoRA


def saved(folder, name="llama", size="12KB"):
    model = networks.build(name, torch.float32)
    model.save_pretrained(folder, max_shard_size=size)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma3"])
def test_weights_are_on_the_meta_device_and_buffers_are_right(tmp_path, name):
    saved(tmp_path, name)
    source = HFModel(str(tmp_path))
    before = torch.random.get_rng_state()
    outline = source.outline()
    assert torch.equal(before, torch.random.get_rng_state())
    plain = source.load_model()
    assert all(parameter.is_meta for parameter in outline.network.parameters())
    buffers = dict(outline.network.named_buffers())
    assert buffers.keys() == dict(plain.named_buffers()).keys()
    assert len(buffers) > 1
    for key, buffer in plain.named_buffers():
        assert buffer.dtype == buffers[key].dtype
        assert torch.equal(buffer, buffers[key]), key
    assert len(outline.files) > 3
    assert outline.stored == {key for file in outline.files for key in load_file(file)}
    tied = outline.network.get_input_embeddings().weight is outline.network.get_output_embeddings().weight
    assert tied == (name != "llama")


def test_files_of_a_cached_repository_are_found(tmp_path, monkeypatch):
    """A folder of the Hub's cache may hold other files with the same weights."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    model = saved(snapshot)
    save_file({"unrelated": torch.ones(1)}, snapshot / "consolidated.safetensors")
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    outline = HFModel("some/model").outline()
    assert {file.name for file in outline.files} == {file.name for file in snapshot.glob("model-*.safetensors")}
    assert outline.stored == model.state_dict().keys()


def change_files(folder, change):
    """Rewrites a model of one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("llama", lambda w: {k: v for k, v in w.items() if "norm" not in k}, "its files lack 5 of its weights"),
        (
            "llama",
            lambda w: {k.removeprefix("model."): v for k, v in w.items()},
            "its files lack 20 of its weights, model.embed",
        ),
        ("qwen2-tied", lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"] + 1}, "twice"),
        ("gpt-neox", lambda w: w, "other names"),
    ],
    ids=["missing", "renamed", "tied twice", "converted on loading"],
)
def test_why_only_whole(tmp_path, name, change, reason):
    saved(tmp_path, name, "1GB")
    change_files(tmp_path, change)
    with pytest.raises(WholeOnly, match=reason):
        HFModel(str(tmp_path)).outline()


def test_why_only_whole_without_files():
    with pytest.raises(WholeOnly, match="TinyModel makes its weights itself"):
        TinyModel(hidden_size=8, layers=1, heads=2, intermediate_size=8).outline()
    with pytest.raises(WholeOnly, match="trust_remote_code"):
        HFModel("some/model", trust_remote_code=True).outline()


def test_weights_that_the_model_does_not_know_do_not_matter(tmp_path):
    """As those of old Llama repositories, which hold rotary frequencies."""
    saved(tmp_path, "llama", "1GB")
    change_files(tmp_path, lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in HFModel(str(tmp_path)).outline().stored


def test_a_torn_file_is_said(tmp_path):
    saved(tmp_path, "llama", "1GB")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelSourceError, match="could not be loaded"):
        HFModel(str(tmp_path)).outline()


def test_stand_ins_have_no_size_and_go(tmp_path):
    saved(tmp_path, "qwen2-tied")
    network = HFModel(str(tmp_path)).outline().network
    before = {name: (id(parameter), parameter.shape) for name, parameter in network.named_parameters()}
    with stood_in(network):
        for parameter in network.parameters():
            assert parameter.device.type == "cpu"
            assert parameter.untyped_storage().nbytes() == parameter.element_size()
        assert network.lm_head.weight is network.model.embed_tokens.weight
        torch.manual_seed(5)
        LoRA(r=2).apply(network)
    after = {name.replace(".base_layer.", "."): p for name, p in network.named_parameters() if "lora_" not in name}
    assert {name: (id(parameter), parameter.shape) for name, parameter in after.items()} == before
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in after.values())
    plain = HFModel(str(tmp_path)).load_model()
    torch.manual_seed(5)
    LoRA(r=2).apply(plain)
    adapters = {name: p for name, p in plain.named_parameters() if "lora_" in name}
    assert len(adapters) == 28
    for name, parameter in adapters.items():
        assert torch.equal(network.get_parameter(name), parameter)
        assert network.get_parameter(name).requires_grad
