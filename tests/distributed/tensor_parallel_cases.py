"""Networks of many families split over two processes, against the same networks on one.

    torchrun --nproc_per_node=2 tensor_parallel_cases.py FOLDER

``FOLDER/cases.json`` lists families. With four processes there are two groups, over which FSDP shards. Rank 0 writes
what was found to ``FOLDER/found.json``.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Cohere2Config, GemmaConfig, GlmConfig, Starcoder2Config

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import networks

from bfpo_pl.guard import UpdateGuard
from bfpo_pl.models import head, loading
from bfpo_pl.models.attention import Padded, Segments, Unfold
from bfpo_pl.models.checkpointing import checkpoint_activations
from bfpo_pl.models.log_probs import METHODS, bind_log_probs
from bfpo_pl.models.sharding import shard
from bfpo_pl.models.sources import HFModel

networks.CONFIGS |= {
    "gemma": GemmaConfig(**networks.GROUPED, head_dim=8),
    "glm": GlmConfig(**networks.GROUPED, head_dim=8, attention_bias=True),
    "starcoder2": Starcoder2Config(**networks.GROUPED),
    "cohere2": Cohere2Config(**networks.GROUPED, sliding_window=4, logit_scale=0.25),
    "qwen2-untied": networks.Qwen2Config(**networks.GROUPED),
}
BACKENDS = {"llama": Segments(), "qwen3": Padded()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(mesh, attention):
    def change(network):
        bind_log_probs(network, attention, chunk_size=7)
        shard(network, mesh, METHODS)

    return change


def replicas_differ(tensors, mesh):
    """Names of the tensors that a group holds whole, and not the same on each of its processes."""
    group, wrong = mesh["tensor_parallel"].get_group(), []
    for name, tensor in sorted(tensors.items()):
        if tensor.placements[-1].is_replicate():
            parts = [None] * mesh["tensor_parallel"].size()
            distributed.all_gather_object(parts, tensor.to_local().clone(), group=group)
            wrong += [] if all(torch.equal(part, parts[0]) for part in parts) else [name]
    return wrong


@contextmanager
def only_float64():
    """Transformers computes norms and rotary angles in float32 whatever the model's type; here that is float64 too."""
    float32, to_float = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = float32, to_float


@only_float64()
def training(mesh, name):
    """Largest differences of log-probs, gradients and their norm from those of one process."""
    trees = networks.trees_of(2, 1, 3)
    plain = networks.build(name)
    want = networks.naive_log_probs(plain, trees, "sum")
    direction = torch.linspace(-1.0, 1.5, len(want), dtype=want.dtype)
    (direction * want).sum().backward()

    model = networks.build(name).train()
    checkpoint_activations(model, "full" if name == "mistral" else "selective" if name == "gemma2" else "none")
    place(mesh, BACKENDS.get(name, Unfold()))(model)
    routes, checkpointed = [], head._checkpointed_log_probs
    head._checkpointed_log_probs = lambda *arguments: routes.append(1) or checkpointed(*arguments)
    got = model.response_log_probs(networks.batch_of(trees))
    (direction * got).sum().backward()
    head._checkpointed_log_probs = checkpointed
    guard = UpdateGuard()
    named = list(model.named_parameters())
    guard.decide(named, 0, lambda values: values)
    right = dict(plain.named_parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in right.values()])
    gradients = {key: p.grad for key, p in named}
    return {
        "log_probs": (got - want).abs().max().item(),
        "gradients": max((whole(gradients[key]) - right[key].grad).abs().max().item() for key in sorted(right)),
        "same_names": right.keys() == gradients.keys(),
        "norm": abs(guard.norm.item() - norm.item()),
        "size": norm.item(),
        "replicas": replicas_differ(gradients, mesh),
        "split": sum(p.grad.placements[-1].is_shard() for _, p in named),
        "held": sum(p.to_local().numel() for _, p in named) / sum(p.numel() for p in right.values()),
        "fused_head": not routes,
    }


def loading_in_shards(folder, mesh, name):
    """Names of weights that are not those of the files, and whether each process read its own shards."""
    source = HFModel(str(folder / name))
    fill, filled = loading.fill, []
    loading.fill = lambda *arguments: filled.append(1) or fill(*arguments)
    loaded = loading.load_in_shards(source, lambda network: None, place(mesh, Unfold()), torch.device("cpu"))
    loading.fill = fill
    stored = source.load_model().state_dict()
    gathered = get_model_state_dict(loaded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    differ = [key for key, value in loaded.state_dict().items() if not torch.equal(whole(value), stored[key])]
    if distributed.get_rank() == 0:
        differ += [f"{key} gathered" for key in stored if not torch.equal(stored[key], gathered[key])]
    return {"differ": differ, "in_shards": bool(filled)}


def main(folder):
    cases = json.loads((folder / "cases.json").read_text())
    distributed.init_process_group("gloo")
    world = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    if distributed.get_rank() == 0:
        for name in cases:
            networks.build(name, torch.float32).save_pretrained(folder / name, max_shard_size="12KB")
    distributed.barrier()
    found = {}
    for name in cases:
        found[name] = [None] * world
        distributed.all_gather_object(found[name], training(mesh, name) | loading_in_shards(folder, mesh, name))
    if distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
