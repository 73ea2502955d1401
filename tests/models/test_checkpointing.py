"""Activation checkpointing: the same gradients, what is computed again and what is not."""

import pytest
import torch
from networks import batch_of, build, gradients, trees_of
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from bfpo_pl.component import UserError
from bfpo_pl.models.attention import Auto, Padded, Unfold
from bfpo_pl.models.checkpointing import check_checkpointing, checkpoint_activations
from bfpo_pl.models.log_probs import response_log_probs
from bfpo_pl.models.trainable import Select

TREES = trees_of(2, 3, 2)
LINEAR = {"aten.mm.default", "aten.addmm.default"}


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def part(model, trainable):
    if trainable == "select":
        Select(["down_proj"]).apply(model)
    if trainable == "lora":
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.add_adapter(LoraConfig(r=2, lora_dropout=0.25, target_modules="all-linear", init_lora_weights=False))
    return model.double()


def outcome(name, how, backend, trainable="everything"):
    """Gradients of a weighted sum of log-probs, and the operations of forward and backward pass."""
    model = part(build(name), trainable).train()
    checkpoint_activations(model, how)
    attention, batch = backend.prepare(model), batch_of(TREES)
    torch.manual_seed(7)  # the adapter's dropout
    with Operations() as forward:
        values = response_log_probs(model, batch, attention)
    torch.manual_seed(8)
    with Operations() as backward:
        found = gradients(model, (torch.linspace(-1.0, 1.5, len(values), dtype=values.dtype) * values).sum())
    return found, forward.counts, backward.counts


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize(
    ("name", "backend", "trainable"),
    [
        ("llama", Unfold(), "everything"),
        ("llama", Padded(), "select"),
        ("llama", Auto(), "lora"),
        ("mistral", Unfold(), "lora"),
        ("gemma2", Unfold(), "select"),
        ("qwen2-tied", Auto(), "everything"),
        ("phi3", Padded(), "everything"),
        ("gpt2", Padded(), "everything"),
    ],
    ids=str,
)
def test_gradients_are_the_same(only_float64, name, backend, trainable, how):
    right, _, _ = outcome(name, "none", backend, trainable)
    found, _, _ = outcome(name, how, backend, trainable)
    assert max(((found[n] - g).norm() / g.norm().clamp(min=1e-30)).item() for n, g in right.items()) < 1e-12
    assert any(g.norm() > 0 for g in right.values())


def count(counts, names):
    return sum(number for name, number in counts.items() if name in names)


def attention_calls(counts):
    return sum(number for name, number in counts.items() if "attention" in name and "backward" not in name)


def test_selective_repeats_no_product_and_no_attention():
    _, _, plain = outcome("llama", "none", Unfold())
    _, forward, selective = outcome("llama", "selective", Unfold())
    _, _, full = outcome("llama", "full", Unfold())
    assert attention_calls(forward) == 2
    assert attention_calls(selective) == attention_calls(plain) == 0
    assert attention_calls(full) == 2
    assert count(selective, LINEAR) == count(plain, LINEAR)
    assert count(full, LINEAR) >= count(plain, LINEAR) + 2 * 6
    assert selective["aten.rsqrt.default"] == full["aten.rsqrt.default"] == 4
    assert "aten.rsqrt.default" not in plain


def saved_bytes(how):
    """Bytes that the graph of a forward pass holds, weights not counted."""
    model = build("llama", torch.float32).train()
    checkpoint_activations(model, how)
    attention, batch, held = Unfold().prepare(model), batch_of(trees_of(*[2] * 12)), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_log_probs(model, batch, attention)
    return sum(held.values())


def test_full_keeps_least():
    assert saved_bytes("full") < 0.7 * saved_bytes("none")


@pytest.mark.parametrize("value", [True, False, "all", None])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match=r"activation_checkpointing must be none, selective .* or full .*, not"):
        check_checkpointing(value)
