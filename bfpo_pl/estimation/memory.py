"""Memory of one device: what is held all the time, and what the stages of a step add to it.

A stage holds what lies there between steps (weights, optimizer state, reference) and its own tensors. The peak is that
of the largest stage, not the sum of the largest parts:

- *reference*: the forward pass of the frozen model. The last step's gradients are still there: Lightning frees them
  after the forward passes, just before the backward pass.
- *forward*: the policy's, with everything kept for the backward pass at its end, and the last step's gradients.
- *backward*: gradients appear as activations go. Both change by the same amount with each block, so that the most is
  at one of the ends: at the head, with all activations, or at the embedding, with all gradients.
- *update*: all gradients and what the optimizer needs besides its state.
- *validation*: a forward pass without gradients over ``data.validation_batch_size`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.estimation.devices import NCCL_CONSTANT
from bfpo_pl.estimation.optimizer_state import OptimizerMemory, optimizer_memory
from bfpo_pl.estimation.plan import REPLICATED, SHARDED, Plan
from bfpo_pl.estimation.skeleton import on_meta, weight_type
from bfpo_pl.estimation.trace import Passing, Training, passing, training
from bfpo_pl.models.reference import FrozenCopy, SharedWeights
from bfpo_pl.models.sharding import transformer_blocks
from bfpo_pl.models.sources import ModelSource


@dataclass(frozen=True)
class Weights:
    """Bytes of a network's parameters, whole.

    Args:
        count: Parameters.
        trained: Those that train.
        all: Bytes of all, as they are held.
        gradients: Bytes of gradients of those that train, as they are held.
        root: Bytes of those outside transformer blocks, as they are gathered.
        block: Bytes of the largest block, as it is gathered.
        largest: Bytes of the largest trained parameter.
        types: Bytes by type.
    """

    count: int
    trained: int
    all: float
    gradients: float
    root: float
    block: float
    largest: float
    types: dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """What the stages of a step take, before they are put together.

    Args:
        policy: The policy's weights.
        frozen: Those of each frozen network beside it.
        optimizer: The optimizer's.
        step: The training step.
        reference: The forward pass of each live reference.
        validation: The forward pass of a validation batch; None without validation.
        clones: Bytes of the copies that `SharedWeights` keeps, whole.
    """

    policy: Weights
    frozen: list[Weights]
    optimizer: OptimizerMemory
    step: Training
    reference: list[Passing]
    validation: Passing | None
    clones: float


@dataclass(frozen=True)
class Part:
    """A part of a device's memory at the peak.

    Args:
        name: What it is.
        bytes: How much.
        depends: What it depends on.
    """

    name: str
    bytes: float
    depends: str


@dataclass(frozen=True)
class Memory:
    """Memory of one device.

    Args:
        parts: What there is at the peak.
        stages: The most bytes of each stage, all that is held included.
        peak: The stage that has most.
    """

    parts: list[Part]
    stages: dict[str, float]
    peak: str = field(default="")

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.stages[self.peak]


def weights_of(plan: Plan, source: ModelSource, trains: bool) -> Weights:
    """Parameters of a source's network, counted on the meta device; tied ones once.

    Args:
        plan: What it depends on.
        source: Where the network would come from.
        trains: Whether the plan's trainable part is applied.
    """
    model: PreTrainedModel = on_meta(source, plan.trainable if trains else None)
    parameters = list(model.parameters())
    sizes = {p: float(p.numel() * weight_type(p, plan.precision).itemsize) for p in parameters}
    gathered = plan.gathered.itemsize if plan.gathered else None
    blocks = [list(block.parameters()) for block in transformer_blocks(model)]
    inside = {p for block in blocks for p in block}
    types: dict[str, float] = {}
    for p in parameters:
        name = str(weight_type(p, plan.precision)).removeprefix("torch.")
        types[name] = types.get(name, 0.0) + sizes[p]
    trained = [p for p in parameters if p.requires_grad]
    return Weights(
        count=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        all=sum(sizes.values()),
        gradients=sum(sizes[p] for p in trained),
        root=sum(sizes[p] for p in parameters if p not in inside),
        block=max(sum(p.numel() * gathered if gathered else sizes[p] for p in block) for block in blocks),
        largest=max((sizes[p] for p in trained), default=0.0),
        types=types,
    )


def sizes_of(plan: Plan, batch: PairBatch, validation: PairBatch | None) -> Sizes:
    """Everything that the stages take.

    Args:
        plan: What it depends on.
        batch: The largest batch that a device is given at once.
        validation: The same of validation.
    """
    policy = weights_of(plan, plan.source, trains=True)
    trained = [p for p in on_meta(plan.source, plan.trainable).parameters() if p.requires_grad]
    return Sizes(
        policy=policy,
        frozen=[weights_of(plan, source, trains=False) for source in plan.networks],
        optimizer=optimizer_memory(plan, trained),
        step=training(plan, batch),
        reference=[passing(plan, source, batch) for source in plan.live],
        validation=None if validation is None else passing(plan, None, validation),
        clones=policy.gradients * sum(isinstance(each, SharedWeights) for each in plan.own_references),
    )


def memory_of(plan: Plan, sizes: Sizes) -> Memory:
    """Puts the stages together for one device.

    With N shards a device holds 1/N of weights, copies, gradients and state. FSDP2 gathers what runs: the root unit
    (embedding, norm, head) from the start of a forward pass to the end of the backward pass, and two blocks, the one
    that runs and the one after it. A frozen network's root stays gathered, since nothing runs backward through it.
    Replicas that do not view their gradients in buckets hold them twice; those that do never free them.

    Args:
        plan: What it depends on.
        sizes: What the stages take.
    """
    n, step, policy = plan.shards, sizes.step, sizes.policy
    gradients = policy.gradients / n
    buckets = policy.gradients if plan.layout == REPLICATED and not plan.bucket_views else 0.0
    sharded = plan.layout == SHARDED
    gathered = policy.root + 2 * policy.block if sharded else 0.0
    roots = sum(each.root for each in sizes.frozen) if sharded else 0.0
    frozen_blocks = max((2 * each.block for each in sizes.frozen), default=0.0) if sharded else 0.0
    constant = plan.kind.constant + (NCCL_CONSTANT if plan.devices > 1 and plan.kind.type == "cuda" else 0.0)
    held = [
        Part("weights of the policy", policy.all / n, _shared(plan, _types(policy))),
        Part("reference", (sum(f.all for f in sizes.frozen) + sizes.clones) / n, _shared(plan, _reference(plan))),
        Part("optimizer state", sizes.optimizer.state or 0.0, _shared(plan, sizes.optimizer.name)),
        Part("frozen roots, gathered", roots, "FSDP2 keeps embedding and head of a frozen network whole"),
        Part("buckets of gradients", buckets, "DDP; none with gradient_as_bucket_view: true"),
        Part("framework", constant, f"assumed for {plan.kind.name}"),
    ]
    rest = sum(part.bytes for part in held)
    stays = plan.accumulate > 1 or (plan.layout == REPLICATED and plan.bucket_views)
    backward = [(step.late_then, step.late_together), (step.early_then, step.early_together)]
    if stays:  # they are there from the start
        backward = [(step.late, step.late + gradients), (step.early, step.early + gradients)]
    then, together = max(backward, key=lambda each: each[1])
    own = {  # gradients, gathered, tensors
        "reference": (gradients, frozen_blocks or gathered, max((p.peak for p in sizes.reference), default=0.0)),
        "forward": (gradients, gathered, step.forward),
        "backward": (together - then, gathered, then),
        "update": (gradients, 0.0, sizes.optimizer.working),
        "validation": (gradients, gathered, sizes.validation.peak if sizes.validation else 0.0),
    }
    if sizes.clones:  # one weight at a time, while contents are exchanged
        own["reference"] = (gradients, gathered, max(own["reference"][2], policy.largest / n))
    absent = {"reference": not sizes.reference, "validation": sizes.validation is None}
    stages = {name: rest + sum(values) for name, values in own.items() if not absent.get(name)}
    peak = max(stages, key=stages.__getitem__)
    return Memory([*held, *_at_peak(plan, step, peak, own[peak])], stages, peak)


def _at_peak(plan: Plan, step: Training, peak: str, own: tuple[float, float, float]) -> list[Part]:
    gradients, gathered, tensors = own
    parts = [
        Part("gradients", gradients, _shared(plan, "trained weights")),
        Part("gathered weights", gathered, "FSDP2: embedding and head, and two blocks, whole"),
    ]
    if peak not in ("forward", "backward"):
        return [*parts, Part(f"tensors of the {peak}", tensors, _STAGES[peak])]
    casts = min(step.casts, tensors)
    kept = min(step.backbone - step.casts, tensors - casts)
    return [
        *parts,
        Part("weights cast by autocast", casts, "trainer.precision; none where blocks are gathered in it"),
        Part("activations", kept, f"tokens of a batch; activation_checkpointing: {plan.checkpointing}"),
        Part(
            "head and workspace",
            tensors - casts - kept,
            f"chunk_size ({plan.chunk_size:,}) · vocabulary; a block at work",
        ),
    ]


_STAGES = {
    "reference": "tokens of a batch; a forward pass without gradients",
    "update": "the optimizer (fused: none)",
    "validation": "data.validation_batch_size; a forward pass without gradients",
}


def _types(weights: Weights) -> str:
    return f"{weights.count:,} in {' and '.join(weights.types)}, {weights.trained:,} train"


def _shared(plan: Plan, what: str) -> str:
    return f"{what}; 1/{plan.shards} of them" if plan.shards > 1 else what


def _reference(plan: Plan) -> str:
    kinds = [type(each).__name__ for each in plan.references.values()]
    copies = any(isinstance(each, FrozenCopy) for each in plan.references.values())
    return (", ".join(kinds) or "none") + (": a network of its own" if copies else "")
