"""An estimate: memory, time, what they assume, and whether a run fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bfpo_pl.estimation.batches import Workload
from bfpo_pl.estimation.duration import Duration, duration_of
from bfpo_pl.estimation.levers import Lever, levers
from bfpo_pl.estimation.memory import Memory, memory_of, sizes_of
from bfpo_pl.estimation.plan import REPLICATED, Plan
from bfpo_pl.models.precomputed import Precomputed
from bfpo_pl.models.reference import AdapterOff, FromColumn, FrozenCopy, SharedWeights
from bfpo_pl.models.trainable import LoRA

MARGIN = 0.05
"""Share of the estimate that is left free: memory that is split in pieces, kernels' own workspaces."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Args:
        plan: What was estimated.
        memory: Memory of one device.
        duration: Time.
        assumptions: What is taken for granted, in sentences.
        levers: Settings that lower the peak; empty if nobody asked and the run fits.
    """

    plan: Plan
    memory: Memory
    duration: Duration
    assumptions: list[str]
    levers: list[Lever]

    @property
    def needed(self) -> float:
        """Bytes of one device, the margin among them."""
        return self.memory.total * (1 + MARGIN)

    @property
    def fits(self) -> bool:
        """Whether they are there."""
        return self.needed <= self.plan.kind.memory

    def as_dict(self) -> dict[str, Any]:
        """Plain data, in bytes, operations and seconds."""
        plan, time = self.plan, self.duration
        return {
            "device": plan.kind.name,
            "devices": plan.devices,
            "layout": plan.layout,
            "precision": plan.precision,
            "device_bytes": plan.kind.memory,
            "total_bytes": self.memory.total,
            "needed_bytes": self.needed,
            "fits": self.fits,
            "peak": self.memory.peak,
            "parts": [asdict(part) for part in self.memory.parts],
            "stages": self.memory.stages,
            "time": {**asdict(time), "batch_seconds": time.batch_seconds, "epoch_seconds": time.epoch_seconds},
            "assumptions": self.assumptions,
            "levers": [asdict(lever) for lever in self.levers],
        }


def estimate(plan: Plan, work: Workload, utilisation: float, all_levers: bool = False) -> Estimate:
    """Estimates a run.

    Args:
        plan: What it depends on.
        work: Its batches.
        utilisation: Share of the devices' rate that a step reaches.
        all_levers: Looks for settings that lower the peak even if the run fits.
    """
    sizes = sizes_of(plan, work.largest, work.validation)
    memory = memory_of(plan, sizes)
    duration = duration_of(plan, work, utilisation)
    found = Estimate(plan, memory, duration, _assumptions(plan, work, sizes.optimizer.state, sizes.optimizer.name), [])
    if found.fits and not all_levers:
        return found
    return Estimate(plan, memory, duration, found.assumptions, levers(plan, work, memory.total))


def _assumptions(plan: Plan, work: Workload, state: float | None, optimizer: str) -> list[str]:
    said = [f"Lengths: {work.assumption}."]
    if plan.kind.type == "cuda":
        said.append(
            "The context of CUDA, and buffers of NCCL where there are several devices, take 1 GiB each; nothing else "
            "uses the devices; kernels keep what those of a CPU keep."
        )
    if plan.layout == REPLICATED:
        said.append(f"Every one of the {plan.devices} devices holds everything: the strategy does not shard.")
    if state is None:
        said.append(f"What the optimizer holds is not known and not counted ({optimizer}).")
    known = (FrozenCopy, SharedWeights, AdapterOff, FromColumn, Precomputed)
    for name, reference in plan.references.items():
        if not isinstance(reference, known):
            said.append(f"What the reference '{name}' ({type(reference).__name__}) holds is not known and not counted.")
        if isinstance(reference, Precomputed):
            said.append(f"The log-probs of '{name}' have been computed before; computing them is not counted.")
    if isinstance(plan.trainable, LoRA) and plan.trainable.dropout:
        said.append("Masks of the adapter's dropout are counted as other activations are.")
    return said
