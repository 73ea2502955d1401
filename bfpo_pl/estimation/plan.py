"""What an estimate depends on, out of a run's config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from torch.optim import Optimizer

from bfpo_pl.component import UserError
from bfpo_pl.estimation.devices import DeviceKind
from bfpo_pl.estimation.skeleton import COMPUTE, TYPES
from bfpo_pl.models.attention import AttentionBackend
from bfpo_pl.models.checkpointing import Checkpointing
from bfpo_pl.models.reference import AdapterOff, FrozenCopy, Reference, SharedWeights
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import TrainablePart
from bfpo_pl.training import ResponseModule

SINGLE, REPLICATED, SHARDED = "single", "replicated", "sharded"
_PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Plan:
    """What memory and time of a step depend on, besides its batch.

    Args:
        source: Where the policy comes from.
        trainable: What of it trains.
        references: The frozen models, by name.
        optimizer: Makes the optimizer of parameters.
        attention: The attention backend.
        chunk_size: Response tokens that meet the vocabulary at once.
        checkpointing: Activation checkpointing.
        precision: The trainer's.
        accumulate: Batches of an update.
        layout: ``single``; ``replicated``, every device holds all; or ``sharded`` over the devices.
        bucket_views: Whether gradients of replicas lie in the buckets that they are exchanged in.
        devices: How many there are, over all machines.
        kind: What kind they are of.
    """

    source: ModelSource
    trainable: TrainablePart
    references: dict[str, Reference]
    optimizer: Callable[[Iterable[Any]], Optimizer]
    attention: AttentionBackend
    chunk_size: int
    checkpointing: Checkpointing
    precision: str
    accumulate: int
    layout: str
    bucket_views: bool
    devices: int
    kind: DeviceKind

    @property
    def shards(self) -> int:
        """In how many parts weights, gradients and optimizer state are held."""
        return self.devices if self.layout == SHARDED else 1

    @property
    def compute(self) -> torch.dtype | None:
        """Type that autocast computes in; None without autocast."""
        return COMPUTE.get(self.precision)

    @property
    def gathered(self) -> torch.dtype | None:
        """Type that sharded blocks are gathered in, where it is not their own."""
        return torch.bfloat16 if self.layout == SHARDED and self.precision == "bf16-mixed" else None

    @property
    def reduced_size(self) -> int | None:
        """Bytes of each element in which sharded gradients are summed; None: as they are."""
        return 4 if self.precision.startswith("bf16") else None

    @property
    def half(self) -> bool:
        """Whether matrix products are computed in half precision."""
        return self.compute is not None or TYPES.get(self.precision) in (torch.bfloat16, torch.float16)

    @property
    def networks(self) -> list[ModelSource]:
        """Sources of the frozen networks that are held beside the policy."""
        copies = [each for each in self.references.values() if isinstance(each, FrozenCopy)]
        return [each.source or self.source for each in copies]

    @property
    def own_references(self) -> list[Reference]:
        """References that the policy's network computes itself, in every step."""
        return [each for each in self.references.values() if isinstance(each, SharedWeights | AdapterOff)]

    @property
    def live(self) -> list[ModelSource | None]:
        """Whose forward pass every live reference is; None: the policy's."""
        return [*self.networks, *[None for _ in self.own_references]]


def plan_of(module: ResponseModule, trainer: Namespace, kind: DeviceKind) -> Plan:
    """The plan of a module and of the trainer's config.

    Args:
        module: The module, not built.
        trainer: The section ``trainer`` of the config.
        kind: The devices' kind.

    Raises:
        UserError: The strategy is one of which nothing is known, or the number of devices is left open.
    """
    devices = _devices(trainer)
    layout, views = _layout(trainer.strategy, devices)
    precision = str(trainer.precision or "32-true")
    return Plan(
        source=module.source,
        trainable=module.trainable,
        references=dict(getattr(module, "references", {})),
        optimizer=module.optimizer,
        attention=module.attention,
        chunk_size=module.chunk_size,
        checkpointing=module.activation_checkpointing,
        precision=_PRECISIONS.get(precision, precision),
        accumulate=int(trainer.accumulate_grad_batches or 1),
        layout=layout,
        bucket_views=views,
        devices=devices,
        kind=kind,
    )


def _devices(trainer: Namespace) -> int:
    given, nodes = trainer.devices, int(trainer.num_nodes or 1)
    if isinstance(given, list | tuple):
        return len(given) * nodes
    if isinstance(given, str) and "," in given:
        return len([each for each in given.split(",") if each.strip()]) * nodes
    try:
        count = int(given)
    except (TypeError, ValueError):
        count = -1
    if count < 1:
        raise UserError(
            f"bfpo estimate: trainer.devices is {given!r}, and this machine's devices are not those to plan for: say "
            "how many each machine has, for instance --trainer.devices=8."
        )
    return count * nodes


def _layout(strategy: Any, devices: int) -> tuple[str, bool]:
    """How a strategy lays out what is held, and whether gradients lie in buckets."""
    given = strategy if isinstance(strategy, str) else strategy.get("class_path", "")
    arguments = {} if isinstance(strategy, str) else strategy.get("init_args", Namespace())
    name = given.rpartition(".")[2]
    if any("offload" in key and value for key, value in dict(arguments).items()):
        raise UserError("bfpo estimate: what offloading to the host's memory takes is not known here; leave it out.")
    if int(arguments.get("tensor_parallel_size") or 1) > 1 if name != "ModelParallelStrategy" else _tensor(arguments):
        raise UserError("bfpo estimate: tensor parallelism is not estimated; set tensor_parallel_size to 1.")
    if name in ("FSDP1", "FSDP2", "ModelParallelStrategy", "FSDPStrategy") or name.startswith("fsdp"):
        sharding = str(arguments.get("sharding_strategy") or "FULL_SHARD").rpartition(".")[2].upper()
        if sharding != "FULL_SHARD":
            raise UserError(
                f"bfpo estimate: trainer.strategy.sharding_strategy is {sharding}, and only FULL_SHARD is estimated, "
                "which shards weights, gradients and optimizer state over all devices; set that."
            )
        return SHARDED, False
    if name.startswith(("ddp", "DDP")):
        return REPLICATED, bool(arguments.get("gradient_as_bucket_view"))
    if name in ("auto", "SingleDeviceStrategy"):
        return (SINGLE, False) if devices == 1 else (REPLICATED, False)
    raise UserError(f"bfpo estimate: knows auto, DDP and FSDP strategies (configs/strategy/*.yaml), not '{given}'.")


def _tensor(arguments: Any) -> bool:
    size = arguments.get("tensor_parallel_size")
    return size == "auto" or int(size or 1) > 1
