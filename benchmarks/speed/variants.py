"""The variants that are compared, by name; which of them can run here, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bfpo_pl.batch import PairBatch
from bfpo_pl.models.attention import Varlen
from bfpo_pl.models.segment_attention import device_obstacle
from speed import trl_peer
from speed.steps import Naive, Ours, Setting, Step, attention_classes
from speed.workload import SHAPES, Lengths, RandomModel, batch_of, drawn

Factory = Callable[[Setting], Step]

OURS = "ours, cached reference"
OURS_LIVE = "ours, live reference"
PEER = "TRL, cached reference"
PEER_LIVE = "TRL, live reference"
NAIVE = "naive, live reference"
NAIVE_CACHED = "naive, cached reference"
MAIN = [OURS, OURS_LIVE, PEER, PEER_LIVE, NAIVE]

_OURS: dict[str, dict[str, str]] = {
    OURS: {},
    OURS_LIVE: {"reference": "live"},
    "ours, all logits at once": {"logits": "whole"},
    "ours, torch's checkpoint around the head": {"logits": "checkpointed"},
    "ours, frozen head": {"trainable": "all but the head"},
    "ours, frozen head, torch's checkpoint": {"trainable": "all but the head", "logits": "checkpointed"},
    "ours, down_proj alone, cached reference": {"trainable": "down_proj"},
    "ours, down_proj alone, shared reference": {"trainable": "down_proj", "reference": "shared"},
    "ours, down_proj alone, live reference": {"trainable": "down_proj", "reference": "live"},
}
_TRL: dict[str, dict[str, object]] = {
    PEER: {"reference": "cached"},
    PEER_LIVE: {},
    "TRL, cached reference, without metrics": {"reference": "cached", "metrics": False},
    "TRL as shipped for CPU, live reference": {"compact": False},
}


def backends(device: str) -> tuple[list[str], dict[str, str]]:
    """Names of the attention classes that run on a device, and why the others do not."""
    names, skipped = [], {}
    for name, kind in attention_classes().items():
        reason = _obstacle(kind, device)
        if reason is None:
            names.append(name)
        else:
            skipped[name] = reason
    return names, skipped


def _obstacle(kind: type, device: str) -> str | None:
    """Why an attention class does not run, from a try on a tiny network."""
    # flash kernels take half precision alone
    model = RandomModel(SHAPES["tiny"], device, "bfloat16" if device == "cuda" else "float32").load_model()
    trees = drawn(Lengths((5, 9), (3, 6)), SHAPES["tiny"].vocabulary, 2, seed=0)
    batch: PairBatch = batch_of(trees).to(device)
    try:
        backend = kind()
        prepared = backend.prepare(model)
        if type(prepared) is not kind:
            return f"{type(prepared).__name__} takes its place"
        if kind is Varlen and (reason := device_obstacle(torch.device(device))) is not None:
            return f"{reason}: Unfold takes its place"
        prepared.predicting_states(model.base_model, batch).float().sum().backward()
    except Exception as error:  # whatever a class of someone else's does
        return f"{type(error).__name__}: {error}"[:300]
    return None


def variants(device: str) -> tuple[dict[str, Factory], dict[str, str]]:
    """All variants that run on a device, by name, and the reasons of those that do not."""
    found: dict[str, Factory] = {}
    for name, options in _OURS.items():
        found[name] = lambda setting, options=options: Ours(setting, **options)
    names, reasons = backends(device)
    for name in names:
        if name != "Auto":  # the attention of every other variant
            found[f"ours, {name}"] = lambda setting, name=name: Ours(setting, backend=name)
    skipped = {f"ours, {name}": reason for name, reason in reasons.items()}
    found[NAIVE] = lambda setting: Naive(setting)
    found[NAIVE_CACHED] = lambda setting: Naive(setting, "cached")
    if trl_peer.available() is None:
        return found, skipped | dict.fromkeys(_TRL, "trl is not installed")
    for name, choices in _TRL.items():
        if device == "cuda" and "compact" in choices:
            skipped[name] = "on a GPU TRL scores response rows alone by itself"
        else:
            found[name] = lambda setting, choices=choices: trl_peer.TRL(setting, **choices)  # type: ignore[arg-type]
    return found, skipped
