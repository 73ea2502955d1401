"""Every backend with every output head and every trainable part, on one family, in float64."""

import peft
import pytest
import torch
from exactness import differences, emulate_varlen
from networks import build, trees_of
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
