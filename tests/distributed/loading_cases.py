"""Loads networks in shards and whole, on two processes of torchrun, and compares every number.

    torchrun --nproc_per_node=2 loading_cases.py FOLDER

``FOLDER/cases.json`` lists cases: family, type of the files, type to load in, trainable part. Rank 0 writes what was
found to ``FOLDER/found.json``.
"""

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import networks

from bfpo_pl.models import loading
from bfpo_pl.models.attention import Unfold
from bfpo_pl.models.log_probs import METHODS, bind_log_probs
from bfpo_pl.models.sharding import shard
from bfpo_pl.models.sources import HFModel
from bfpo_pl.models.trainable import Everything, LoRA, Select

PARTS = {"everything": Everything(), "select": Select(["down_proj"]), "lora": LoRA(r=3)}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(mesh):
    def change(network):
        bind_log_probs(network, Unfold(), chunk_size=7)
        shard(network, mesh, METHODS)

    return change


def compare(folder, mesh, name, file, dtype, part):
    """Names of what differs between the two ways, and how the network was loaded."""
    source = HFModel(str(folder / f"{name}-{file}"), dtype=dtype)
    networks_of, values, draws = [], [], []
    routes = []
    for route in ("shards", "whole"):
        torch.manual_seed(11)
        if route == "shards":
            fill = loading.fill
            loading.fill = lambda *arguments: routes.append("shards") or fill(*arguments)  # noqa: B023
            network = loading.load_in_shards(source, PARTS[part].apply, place(mesh), torch.device("cpu"))
            loading.fill = fill
        else:
            network = source.load_model()
            PARTS[part].apply(network)
            place(mesh)(network)
        draws.append(torch.rand(3))
        networks_of.append(network)
        with torch.no_grad():
            values.append(network.response_log_probs(networks.batch_of(networks.trees_of(2, 1, 3))))
    one, other = networks_of
    differ = [] if torch.equal(*values) else ["log-probs"]
    differ += [] if torch.equal(*draws) else ["random state"]
    differ += [] if type(one) is type(other) and one.training == other.training else ["class or mode"]
    differ += [] if one.generation_config.to_dict() == other.generation_config.to_dict() else ["generation config"]
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        differ += [] if ours.keys() == theirs.keys() else [kind]
        for key in sorted(ours.keys() & theirs.keys()):  # the same order on both: gathering is collective
            same = ours[key].dtype == theirs[key].dtype and ours[key].requires_grad == theirs[key].requires_grad
            same = same and isinstance(ours[key], DTensor) == isinstance(theirs[key], DTensor)
            if not (same and torch.equal(whole(ours[key]), whole(theirs[key]))):
                differ.append(key)
    plain = source.load_model().state_dict()
    held = {key.replace(".base_layer.", "."): whole(value) for key, value in one.state_dict().items()}
    differ += [f"{key} of the files" for key in plain if not torch.equal(plain[key], held[key])]
    return {"differ": differ, "shards": bool(routes), "parameters": len(dict(one.named_parameters()))}


def main(folder):
    cases = json.loads((folder / "cases.json").read_text())
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("data_parallel",))
    if rank == 0:
        for name, file in dict.fromkeys((case[0], case[1]) for case in cases):
            model = networks.build(name, torch.float32).to(getattr(torch, file))
            model.save_pretrained(folder / f"{name}-{file}", max_shard_size="12KB")
    distributed.barrier()
    found = {}
    for case in cases:
        outcomes = [None] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, compare(folder, mesh, *case))
        found[" ".join(case)] = {
            "differ": sorted({key for outcome in outcomes for key in outcome["differ"]}),
            "shards": all(outcome["shards"] for outcome in outcomes),
            "parameters": outcomes[0]["parameters"],
            "files": len(list((folder / f"{case[0]}-{case[1]}").glob("*.safetensors"))),
        }
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
