"""What is measured: sections, each one task in a fresh process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from speed import machine
from speed.variants import MAIN, NAIVE, NAIVE_CACHED, OURS, OURS_LIVE, PEER, PEER_LIVE

MEMORY = [OURS, OURS_LIVE, PEER, PEER_LIVE, NAIVE, "ours, all logits at once", "ours, Padded"]
MEMORY += ["ours, frozen head", "ours, down_proj alone, shared reference", "ours, down_proj alone, live reference"]
GROWTH = [OURS, PEER, NAIVE_CACHED]
WEIGHED = ["pairs", "length"]
"""Axes along which memory is measured, too."""
SHARED = "ours, down_proj alone, shared reference"
ON_CUDA = {
    OURS: ("selective", "full", "none"),
    PEER: ("full", "none"),
    OURS_LIVE: ("selective", "full", "none"),
    PEER_LIVE: ("full", "none"),
    NAIVE_CACHED: ("full",),
    NAIVE: ("full",),
    SHARED: ("selective",),
}
"""Variants on a GPU, with the kinds of activation checkpointing that each is tried with."""


@dataclass(frozen=True)
class Section:
    """One measurement.

    Args:
        key: Its place in the results, components joined by ``/``.
        task: Name of a function ``task_…`` of `speed.measure`.
        options: What the task is given.
        environment: Variables of its process.
    """

    key: str
    task: str
    options: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def work(self) -> str:
        """The same for sections that do the same."""
        return json.dumps([self.task, self.options, self.environment], sort_keys=True)


def _timed(key: str, task: str, **options: Any) -> Section:
    return Section(key, task, options, machine.HEAP_KEPT)


def _weighed(key: str, **options: Any) -> Section:
    return Section(key, "memory", options, machine.HEAP_RETURNED)


def on_cpu(precision: str, names: list[str], shape: str, data: str | None) -> list[Section]:
    """Everything; the bars are for the shape ``small``: hidden 512, 6 layers, vocabulary 32,000."""
    base: dict[str, Any] = {"shape": shape, "precision": precision, "device": "cpu", "data": data}
    pku, feedback = {**base, "lengths": "pku_like", "pairs": 4}, {**base, "lengths": "ultrafeedback_like", "pairs": 2}
    real = {**base, "pairs": 2}
    some = [name for name in MAIN if name in names]
    peers = [name for name in names if name in MAIN or not name.startswith("ours")]
    ideas = [OURS, *(name for name in names if name not in peers)]
    plan = [
        _timed("gemm", "gemm", **base, tokens=1024, response_tokens=768, repeats=10),
        _timed("compare/pku_like", "compare", **pku, variants=peers, batches=2, rounds=3),
        _timed("compare/ultrafeedback_like", "compare", **feedback, variants=peers, batches=2, rounds=3),
        _timed("ideas/pku_like", "compare", **pku, variants=ideas, batches=1, rounds=3),
        _timed("ideas/ultrafeedback_like", "compare", **feedback, variants=ideas, batches=1, rounds=3),
        _timed("compare/pku_real", "compare", **real, lengths="pku_real", variants=some, batches=2, rounds=2),
        _timed("compare/hh_real", "compare", **real, lengths="hh_real", variants=some, batches=2, rounds=2),
    ]
    for name in MEMORY:
        if name in names:
            plan.append(_weighed(f"memory/{name}", **feedback, variants=[name], batches=1))
    plan.append(_timed("fit", "fit", **{**pku, "pairs": 6}, variants=[OURS], batches=30, rounds=2))
    plan.append(_timed("profile", "profile", **pku, variants=[OURS], batches=1))
    return plan + _growth({**base, "batches": 1, "lengths": "pku_like", "pairs": 2}, names)


def _growth(base: dict[str, Any], names: list[str]) -> list[Section]:
    """Points along five axes through one base point, which is measured once."""
    base = {**base, "variants": [name for name in GROWTH if name in names]}
    points: dict[str, dict[str, dict[str, Any]]] = {
        "pairs": {str(pairs): {"pairs": pairs} for pairs in (1, 2, 4, 8)},
        "length": {"0.5": {"factor": 0.5}, "1": {}, "2": {"factor": 2}},
        "vocabulary": {
            "8000": {"changes": {"vocabulary": 8000}},
            "32000": {},
            "96000": {"changes": {"vocabulary": 96000}},
        },
        "prompt share": {
            f"{prompt / (prompt + response):.2f}": {"lengths": [[prompt, prompt], [response, response]]}
            for prompt, response in ((40, 230), (150, 175), (400, 50))
        },
        "hidden": {
            "256": {"changes": {"hidden": 256, "layers": 3, "heads": 4, "kv_heads": 2, "intermediate": 704}},
            "512": {},
            "768": {"changes": {"hidden": 768, "layers": 8, "heads": 12, "kv_heads": 6, "intermediate": 2112}},
        },
    }
    plan = []
    for axis, options in points.items():
        for point, changes in options.items():
            plan.append(_timed(f"growth/{axis}/{point}/time", "compare", **{**base, **changes}, rounds=2))
            if axis in WEIGHED:
                plan.append(_weighed(f"growth/{axis}/{point}/memory", **{**base, **changes}))
    return plan


def quick(precision: str, names: list[str], shape: str) -> list[Section]:
    """A look at everything in at most 90 seconds: a smaller model, one round, and only the main variants."""
    base: dict[str, Any] = {"shape": shape, "precision": precision, "device": "cpu", "lengths": "pku_like", "pairs": 2}
    some = [name for name in MAIN if name in names]
    return [
        _timed("gemm", "gemm", **base, tokens=256, response_tokens=256, repeats=3),
        _timed("compare/pku_like", "compare", **base, variants=some, batches=1, rounds=1),
        *[_weighed(f"memory/{name}", **base, variants=[name], batches=1) for name in (OURS, PEER) if name in names],
        _timed("fit", "fit", **base, variants=[OURS], batches=5, rounds=1),
    ]


def on_cuda(shape: str, names: list[str], optimizer: str = "AdamW32") -> list[Section]:
    """The main variants at a large shape, each in a process of its own, since two such models may not fit.

    Every variant is run with each kind of activation checkpointing that may suit it; which fits and which is fastest,
    the results say. Attempts go round all variants, so that a slow moment of the machine does not fall on one alone.
    """
    base: dict[str, Any] = {"shape": shape, "precision": "bf16-true", "device": "cuda", "optimizer": optimizer}
    base |= {"lengths": "ultrafeedback_like", "pairs": 8, "batches": 2, "rounds": 3}
    plan = [Section("gemm", "gemm", {**base, "tokens": 8192, "response_tokens": 4096, "repeats": 20})]
    for attempt in range(3 if shape == "1b" else 2):
        for name, kinds in ON_CUDA.items():
            for kind in kinds if name in names else ():
                options = {**base, "variants": [name], "checkpointing": kind}
                plan.append(Section(f"compare/{name}, {kind} checkpointing/{attempt}", "compare", options))
    return plan
