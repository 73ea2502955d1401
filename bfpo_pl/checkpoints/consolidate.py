"""A sharded checkpoint as one process needs it: all in one dict, as a single file would hold it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bfpo_pl.checkpoints.shards import META, PlainPlanner, PlainReader, plain_errors, read_metadata

_OPTIMIZER = "optimizer_"


def consolidated(path: Path) -> dict[str, Any]:
    """Gathers the shards of all processes, in this process's memory.

    Args:
        path: The folder of a sharded checkpoint.

    Returns:
        The checkpoint as a strategy that does not shard saves it: optimizer states are by the parameters' numbers.
    """
    metadata = read_metadata(path)
    flat: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        flat[name] = None
        if isinstance(entry, TensorStorageMetadata):
            flat[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings(), plain_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(flat, storage_reader=PlainReader(path), planner=PlainPlanner(), no_dist=True)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        set_element(nested, (metadata.planner_data or {}).get(name, (name,)), value)
    checkpoint = torch.load(path / META, map_location="cpu", weights_only=True)
    numbers = sorted(int(key.removeprefix(_OPTIMIZER)) for key in nested if key.startswith(_OPTIMIZER))
    states = [_by_number(nested[f"{_OPTIMIZER}{number}"]) for number in numbers]
    return checkpoint | {"state_dict": nested["state_dict"]} | ({"optimizer_states": states} if states else {})


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the numbers of its parameters, in the order of its groups, instead of their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {
        "state": {number[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": groups,
    }
