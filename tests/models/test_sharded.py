"""Pair trees and the fused head in a network that FSDP2 shards, with activation checkpointing."""

import pytest
import torch
from networks import batch_of, build, naive_log_probs, trees_of
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bfpo_pl.models import head as head_module
from bfpo_pl.models.attention import Unfold
from bfpo_pl.models.log_probs import METHODS, bind_log_probs
from bfpo_pl.models.sharding import shard


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone: parameters are sharded tensors, gathered and scattered as on many."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "head"),
    [(name, head) for name in ("llama", "qwen2-tied", "gemma2") for head in ("trained", "frozen")]
    + [("llama", "sharded by itself")],
)
def test_gradients(only_float64, monkeypatch, mesh, name, head):
    trees = trees_of(2, 1, 3)
    plain = build(name)
    want = naive_log_probs(plain, trees, "sum")
    direction = torch.linspace(-1.0, 1.5, len(want), dtype=want.dtype)
    (direction * want).sum().backward()

    model = build(name).train()
    if head == "frozen":
        model.get_output_embeddings().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
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
