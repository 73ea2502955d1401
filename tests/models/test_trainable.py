"""What of a network trains: patterns, adapters, everything."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bfpo_pl.component import UserError
from bfpo_pl.models.trainable import Everything, LoRA, Select, parameter_counts


@pytest.fixture
def model():
    """A Llama of two layers with a bias-free MLP of 32 x 48."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_everything(model):
    model.requires_grad_(False)
    Everything().apply(model)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert parameter_counts(model)[0] == parameter_counts(model)[1] == sum(p.numel() for p in model.parameters())


def test_a_component_matches_everywhere(model):
    Select(["down_proj"]).apply(model)
    assert trained(model) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    total = sum(p.numel() for p in model.parameters())
    assert parameter_counts(model) == (2 * 32 * 48, total)


@pytest.mark.parametrize(
    ("patterns", "want"),
    [
        (["layers.1.mlp.*"], {f"model.layers.1.mlp.{m}_proj.weight" for m in ("gate", "up", "down")}),
        (["[uq]*_proj"], {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.up_proj", "self_attn.q_proj")}),
        (["norm", "lm_head"], {"model.norm.weight", "lm_head.weight"}),
        (["model.norm.weight"], {"model.norm.weight"}),
        (["layers.?.mlp.up_proj"], {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}),
    ],
)
def test_patterns(model, patterns, want):
    Select(patterns).apply(model)
    assert trained(model) == want


@pytest.mark.parametrize("pattern", ["own_proj", "down", "layers.mlp", "layers.2.mlp.*", "mlp..down_proj", "Down_proj"])
def test_a_part_of_a_component_does_not_match(model, pattern):
    with pytest.raises(UserError) as caught:
        Select(["down_proj", pattern]).apply(model)
    message = str(caught.value)
    assert f"matches '{pattern}'." in message
    assert "LlamaForCausalLM" in message
    for name in ("down_proj", "q_proj", "embed_tokens", "lm_head"):
        assert name in message


def test_no_pattern_at_all():
    with pytest.raises(UserError, match="patterns is empty"):
        Select([])


def test_an_adapter_starts_at_zero_and_freezes_the_base(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(3, 15)[None]
    logits = model(tokens).logits.detach()
    LoRA(r=2, alpha=4.0).apply(model)
    assert torch.equal(model(tokens).logits, logits)
    names = trained(model)
    assert names
    assert all("lora_" in name for name in names)
    # Seven linear modules a layer, two factors each; the output head and the embeddings get none.
    assert len(names) == 2 * 7 * 2
    shapes = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "gate": (32, 48), "up": (32, 48)}
    each_layer = sum(2 * (a + b) for a, b in shapes.values()) + 2 * (48 + 32)
    assert parameter_counts(model)[0] == 2 * each_layer
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])


def test_an_adapter_on_chosen_modules(model):
    LoRA(r=2, target_modules=["q_proj", "v_proj"]).apply(model)
    assert {name.split(".")[-4] for name in trained(model)} == {"q_proj", "v_proj"}


def test_a_misspelt_target_is_named(model):
    with pytest.raises(UserError, match=r"LoRA: .*q_porj"):
        LoRA(target_modules=["q_porj"]).apply(model)


@pytest.mark.parametrize("arguments", [{"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_ranges(arguments):
    with pytest.raises(UserError, match=f"LoRA: {next(iter(arguments))} must lie in"):
        LoRA(**arguments)
