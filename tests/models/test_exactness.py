"""Backends, heads and trainable parts in float64: all of them on one family, and every family with every part."""

import peft
import pytest
import torch
from exactness import differences, emulate_varlen
from networks import CONFIGS, build, trees_of
from torch import nn
from transformers import LlamaForCausalLM

from bfpo_pl.models.attention import Auto, Padded, Segments, Unfold, Varlen
from bfpo_pl.models.trainable import Everything, LoRA, Select

BACKENDS = {kind.__name__: kind for kind in (Padded, Unfold, Segments, Varlen, Auto)}
PARTS = {
    "everything": Everything,
    "down_proj": lambda: Select(["down_proj"]),
    "lora": lambda: LoRA(r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
}
HEADS = ("plain", "tied", "bias", "cap", "scale", "frozen", "adapter")


class TransformedLlama(LlamaForCausalLM):
    """A Llama that scales and soft-caps its logits by its config, with the formulas of Granite and Gemma."""

    def forward(self, *arguments, **kwargs):
        output = super().forward(*arguments, **kwargs)
        logits = output.logits / getattr(self.config, "logits_scaling", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        output.logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return output


def network(head, part):
    """A tiny Llama with an output head of a kind, of which a part trains."""
    model = build("llama")
    model.__class__ = TransformedLlama
    generator = torch.Generator().manual_seed(1)
    if head == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    elif head == "bias":
        bias = torch.randn(model.lm_head.out_features, generator=generator, dtype=torch.float64)
        model.lm_head.bias = nn.Parameter(bias)
    elif head == "cap":
        model.config.final_logit_softcapping = 3.0
    elif head == "scale":
        model.config.logits_scaling = 3.0
    PARTS[part]().apply(model)
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    elif head == "adapter":
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]), adapter_name="head")
        model.set_adapter(["default", "head"] if part == "lora" else ["head"])
        if part != "lora":  # peft freezes what is outside its adapters
            for name, parameter in model.named_parameters():
                trains = part == "everything" or "down_proj" in name
                parameter.requires_grad_("lora_" in name or (trains and "lm_head" not in name))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # one of two starts at 0, which would hide the other's gradient
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients(only_float64, monkeypatch, backend, head, part):
    if backend == "Varlen":
        emulate_varlen(monkeypatch)
    model = network(head, part)
    loss, relative = differences(model, BACKENDS[backend](), trees_of(2, 1, 3, 2), chunk_size=7)
    assert {"everything": 15, "down_proj": 2, "lora": 6}[part] <= len(relative)
    assert max(loss, *relative.values()) < 1e-10


LAST_OF_MLP = {"phi": "fc2", "opt": "fc2", "gpt2": "mlp.c_proj", "gpt-neox": "dense_4h_to_h"}
FAMILY_PARTS = {
    "last of each MLP": lambda name: Select([LAST_OF_MLP.get(name, "down_proj")]),
    "embedding": lambda name: Select([EMBEDDINGS.get(name, "embed_tokens")]),
    "lora": lambda name: LoRA(r=2, target_modules="all-linear"),
}
EMBEDDINGS = {"gpt2": "wte", "gpt-neox": "embed_in"}
PAIRWISE = [
    (name, part, backend)
    for place, name in enumerate(CONFIGS)
    for part, backend in zip(FAMILY_PARTS, list(BACKENDS)[place % 3 :], strict=False)
]
"""Each family with each part, once; the backends take turns over both."""


def test_the_pairwise_list_has_all_pairs():
    assert {(name, part) for name, part, _ in PAIRWISE} == {(name, part) for name in CONFIGS for part in FAMILY_PARTS}
    assert {backend for _, _, backend in PAIRWISE} == set(BACKENDS)


@pytest.mark.parametrize(("name", "part", "backend"), PAIRWISE)
def test_every_family_with_every_part(only_float64, monkeypatch, name, part, backend):
    if backend == "Varlen":
        emulate_varlen(monkeypatch)
    model = build(name)
    FAMILY_PARTS[part](name).apply(model)
    model.double()
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    loss, relative = differences(model, BACKENDS[backend](), trees_of(2, 1, 3, 2), chunk_size=5)
    assert relative
    assert max(loss, *relative.values()) < 1e-10
