"""Pair trees and the fused head in a network that FSDP2 shards, with activation checkpointing and in bfloat16."""

import pytest
import torch
from networks import batch_of, build, naive_log_probs, trees_of
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from bfpo_pl.models import head as head_module
from bfpo_pl.models.attention import Unfold
from bfpo_pl.models.checkpointing import checkpoint_activations
from bfpo_pl.models.log_probs import METHODS, bind_log_probs
from bfpo_pl.models.sharding import shard


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone: parameters are sharded tensors, gathered and scattered as on many."""
    if distributed.is_initialized():  # by a run under FSDP2 in this process, which keeps its group to the end
        distributed.destroy_process_group()
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize(
    ("name", "head"),
    [(name, head) for name in ("llama", "qwen2-tied", "gemma2") for head in ("trained", "frozen")]
    + [("llama", "sharded by itself")],
)
def test_gradients(only_float64, monkeypatch, mesh, name, head, how):
    trees = trees_of(2, 1, 3)
    plain = build(name)
    want = naive_log_probs(plain, trees, "sum")
    direction = torch.linspace(-1.0, 1.5, len(want), dtype=want.dtype)
    (direction * want).sum().backward()

    model = build(name).train()
    if head == "frozen":
        model.get_output_embeddings().requires_grad_(False)
    checkpoint_activations(model, how)
    bind_log_probs(model, Unfold(), chunk_size=7)
    if head == "sharded by itself":
        fully_shard(model.lm_head, mesh=mesh)
    shard(model, mesh, METHODS)
    routes = []
    checkpointed = head_module._checkpointed_log_probs
    monkeypatch.setattr(
        head_module, "_checkpointed_log_probs", lambda *arguments: routes.append(1) or checkpointed(*arguments)
    )
    got = model.response_log_probs(batch_of(trees))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    (direction * got).sum().backward()
    assert len(routes) == (head == "sharded by itself")
    right = dict(plain.named_parameters())
    compared = 0
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        found, expected = parameter.grad.full_tensor(), right[parameter_name].grad
        assert ((found - expected).norm() / expected.norm()).item() < 1e-10, parameter_name
        compared += 1
    assert compared >= len(right) - 1


def test_the_offload_policy_reaches_every_unit(mesh):
    policy = CPUOffloadPolicy(pin_memory=False)
    model = build("llama")
    shard(model, mesh, offload=policy)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(units) == 3
    assert all(unit._get_fsdp_state()._fsdp_param_group.offload_policy is policy for unit in units)
    assert all(parameter.to_local().device.type == "cpu" for parameter in model.parameters())


def step_in_bfloat16(mesh, precision, how="none", name="llama"):
    """A network in float32 under autocast, sharded for a precision: gradients, and bytes held for the backward pass."""
    model = build(name, torch.float32).train()
    checkpoint_activations(model, how)
    bind_log_probs(model, Unfold(), chunk_size=7)
    if mesh is not None:
        shard(model, mesh, METHODS, precision)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        values = model.response_log_probs(batch_of(trees_of(2, 1, 3)))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.dtype == torch.bfloat16}
    (torch.linspace(-1.0, 1.5, len(values)) * values).sum().backward()
    grads = {n: p.grad.full_tensor() if mesh is not None else p.grad for n, p in model.named_parameters()}
    return values.detach(), grads, sum(held.values())


def test_bfloat16_equals_autocast_where_nothing_more_is_rounded(mesh, monkeypatch):
    """A network whose weights are bfloat16 numbers is the same, bit for bit."""
    whole = build
    monkeypatch.setitem(globals(), "build", lambda name, dtype: whole(name, torch.bfloat16).to(dtype))
    values, right, _ = step_in_bfloat16(None, "")
    found_values, found, _ = step_in_bfloat16(mesh, "bf16-mixed")
    assert torch.equal(found_values, values)
    for key, gradient in right.items():
        tolerance = 0.01 if "norm" in key else 0.0  # the gradients of norms are rounded as well
        torch.testing.assert_close(found[key], gradient, atol=0.0, rtol=tolerance)


@pytest.mark.parametrize("how", ["none", "selective"])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma2"])
def test_bfloat16_is_as_good_as_autocast_of_the_whole_network(mesh, name, how):
    """Norms and biases of the blocks are rounded, too: that adds no more than autocast's own rounding."""
    exact = build(name, torch.float32)
    bind_log_probs(exact, Unfold())
    exact_values = exact.response_log_probs(batch_of(trees_of(2, 1, 3)))
    (torch.linspace(-1.0, 1.5, len(exact_values)) * exact_values).sum().backward()
    errors = []
    for values, gradients, _ in (
        step_in_bfloat16(None, "", how, name),
        step_in_bfloat16(mesh, "bf16-mixed", how, name),
    ):
        squares = [((gradients[n] - p.grad).norm() ** 2).item() for n, p in exact.named_parameters()]
        errors.append(((values - exact_values).norm().item(), sum(squares) ** 0.5))
    assert all(g.dtype == torch.float32 for g in gradients.values())
    assert all(0 < ours < 2 * autocast for autocast, ours in zip(*errors, strict=True)), errors


def test_bfloat16_weights_are_not_held_for_the_backward_pass(mesh):
    _, _, with_autocast_alone = step_in_bfloat16(mesh, "32-true")
    _, _, held = step_in_bfloat16(mesh, "bf16-mixed")
    blocks = sum(p.numel() for p in build("llama").model.layers.parameters())
    assert with_autocast_alone - held > 0.9 * 2 * blocks


def test_bfloat16_blocks_run_without_autocast(mesh):
    model = build("llama", torch.float32)
    tokens = torch.arange(3, 11)[None]
    plain = model(tokens).logits
    shard(model, mesh, precision="bf16-mixed")
    with torch.no_grad():
        logits = model(tokens).logits
    assert ((logits - plain).norm() / plain.norm()).item() < 0.05
