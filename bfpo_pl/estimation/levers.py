"""Which settings would lower the peak, and by how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import UserError
from bfpo_pl.estimation.batches import Workload, half_of
from bfpo_pl.estimation.memory import memory_of, sizes_of
from bfpo_pl.estimation.plan import REPLICATED, SHARDED, Plan
from bfpo_pl.models.precomputed import Precomputed
from bfpo_pl.models.reference import AdapterOff, FrozenCopy, Reference, SharedWeights
from bfpo_pl.models.trainable import Everything, LoRA

_SMALLEST_CHUNK = 512


@dataclass(frozen=True)
class Lever:
    """A setting to change.

    Args:
        what: The setting and its new value.
        total: Bytes at the peak with it.
        changes: Whether it changes what is learnt, and not only how it is computed.
    """

    what: str
    total: float
    changes: bool = False


def levers(plan: Plan, work: Workload, total: float) -> list[Lever]:
    """Settings that lower the peak, each changed by itself, those that lower it most first.

    Args:
        plan: What memory depends on.
        work: The batches.
        total: Bytes at the peak as things are.
    """
    found = []
    for what, changed, batch, validation, changes in _candidates(plan, work):
        try:
            lowered = memory_of(changed, sizes_of(changed, batch, validation)).total
        except UserError:  # not for this network
            continue
        if lowered < 0.99 * total:
            found.append(Lever(what, lowered, changes))
    return sorted(found, key=lambda lever: lever.total)


def _candidates(plan: Plan, work: Workload) -> Iterator[tuple[str, Plan, PairBatch, PairBatch | None, bool]]:
    batch, validation = work.largest, work.validation
    for how in ("selective", "full"):
        if plan.checkpointing != how and plan.checkpointing != "full":
            yield f"model.activation_checkpointing: {how}", replace(plan, checkpointing=how), batch, validation, False
    if any(isinstance(each, FrozenCopy | SharedWeights) for each in plan.references.values()):
        kept = {name: _computed_before(each) for name, each in plan.references.items()}
        yield "-c configs/reference/precomputed.yaml", replace(plan, references=kept), batch, validation, False
    if plan.layout == REPLICATED:
        yield "-c configs/strategy/fsdp2.yaml", replace(plan, layout=SHARDED), batch, validation, False
    if plan.devices == 1:
        several = replace(plan, layout=SHARDED, devices=8)
        yield "-c configs/strategy/fsdp2.yaml --trainer.devices=8", several, batch, validation, False
    elif plan.layout == SHARDED:
        doubled = replace(plan, devices=2 * plan.devices)
        yield f"twice as many devices ({doubled.devices})", doubled, batch, validation, False
    if len(batch) > 2:
        update = f"trainer.accumulate_grad_batches: {2 * plan.accumulate} and half of every stream's batch_size"
        halved = replace(plan, accumulate=2 * plan.accumulate)
        yield update, halved, half_of(batch), validation, False
    if validation is not None and len(validation) > 2:
        smaller = half_of(half_of(validation)) if len(validation) > 4 else half_of(validation)
        yield "a quarter of data.validation_batch_size", plan, batch, smaller, False
    if plan.chunk_size > _SMALLEST_CHUNK:
        chunk = max(_SMALLEST_CHUNK, plan.chunk_size // 4)
        yield f"model.chunk_size: {chunk}", replace(plan, chunk_size=chunk), batch, validation, False
    if plan.precision == "32-true" and plan.kind.type == "cuda":
        yield "trainer.precision: bf16-mixed", replace(plan, precision="bf16-mixed"), batch, validation, False
    if isinstance(plan.trainable, Everything) and "reference" in plan.references:
        adapter = replace(plan, trainable=LoRA(), references={**plan.references, "reference": AdapterOff()})
        yield "-c configs/model/lora.yaml (trains an adapter alone)", adapter, batch, validation, True


def _computed_before(reference: Reference) -> Reference:
    return Precomputed() if isinstance(reference, FrozenCopy | SharedWeights) else reference
