"""Reference models: what the policy's log-probs are measured against. The loss cannot tell them apart.

A reference lives outside the module tree: it never shows in ``state_dict``, optimizer or checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import Component, UserError
from bfpo_pl.data.loading import shares
from bfpo_pl.data.packing import Trees
from bfpo_pl.models.buffers import float_buffers, restore_buffers
from bfpo_pl.models.sources import ModelSource

Loader = Callable[[ModelSource, Callable[[PreTrainedModel], None]], PreTrainedModel]
"""Gives a source's network: loaded, prepared by the second argument, with log-prob methods, sharded as the policy is.
"""


@dataclass(frozen=True)
class RunContext:
    """What a run gives to a reference that computes beforehand.

    Args:
        rows: The pair trees of each stream and split, all in memory-mapped files.
        cache: Folder of prepared data.
        policy: The policy, where it trains.
        policy_is_start: Whether its weights are those of its source.
        source: Where the policy came from.
        log_probs: Log-probs of a batch's responses under the policy, summed over tokens; for use outside a step.
        load: Loads a network, in the place and way of the policy; see `Loader`.
        strategy: Lightning's, for devices, precision and the other processes.
        reduction: Over the tokens of a response.
    """

    rows: Mapping[tuple[str, str], Trees]
    cache: Path
    policy: PreTrainedModel
    policy_is_start: bool
    source: ModelSource
    log_probs: Callable[[PairBatch], Tensor]
    load: Loader
    strategy: Strategy
    reduction: Literal["sum", "mean"]

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(getattr(self.strategy, "global_rank", 0))

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(getattr(self.strategy, "world_size", 1))

    @property
    def precision(self) -> str:
        """Lightning's name of the types that are computed in, such as ``bf16-mixed``."""
        return str(getattr(self.strategy.precision_plugin, "precision", "32-true"))

    @property
    def shares(self) -> tuple[int, int]:
        """This process's number among those that compute different rows, and how many they are."""
        return shares(self.strategy)

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over processes that compute different rows; the same on all."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values).to(self.strategy.root_device)
        total = self.strategy.reduce(tensor, reduce_op="sum").cpu().numpy()
        together = self.world // self.shares[1]
        return total if together == 1 else total // together if total.dtype.kind == "i" else total / together


class Reference(Component, ABC):
    """Gives the log-probs of responses under a frozen model."""

    starts_as_policy: bool = False
    """Whether the policy's own start is the reference, so that the first margin must be exactly 0."""

    columns: tuple[str, ...] = ()
    """Annotation columns that the reference reads."""

    start_tolerance: float = 0.0
    """Largest mean |margin| in nats before the first update, where the policy's own start is the reference."""

    def check(self) -> None:
        """Fails early, before any weight loads, if the reference cannot be had."""

    def check_strategy(self, strategy: Strategy) -> None:
        """Fails early, before any weight loads, if the reference cannot be had under a strategy."""

    @abstractmethod
    def prepare(self, policy: PreTrainedModel, source: ModelSource, load: Loader) -> None:
        """Gets ready, once, when the policy has been built and not yet changed.

        Args:
            policy: The policy with its trainable part applied.
            source: Where the policy came from.
            load: Loads a further network, in the place and way of the policy.
        """

    def fill(self, name: str, context: Callable[[], RunContext]) -> None:
        """Computes what is computed before training; called when the policy is in its place.

        Args:
            name: The reference's name.
            context: Gives what there is to compute with.
        """

    def annotate(self, batch: PairBatch) -> PairBatch:
        """Gives a batch, still on the CPU, what the reference knows of its rows."""
        return batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the reference, as plain data."""
        return {}

    def check_state(self, state: dict[str, Any]) -> None:
        """Compares what a checkpoint kept with what the reference is now; called once, before or after `fill`.

        Raises:
            RunError: They are not the same reference.
        """

    @abstractmethod
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        """``[R]``, log-prob of every response, without a gradient."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the reference's network, if it has one, to the policy's device and type of parameters."""


def has_adapter(policy: PreTrainedModel) -> bool:
    """Whether a network has an adapter of peft."""
    return any(isinstance(module, BaseTunerLayer) for module in policy.modules())


@contextmanager
def frozen(policy: PreTrainedModel) -> Iterator[None]:
    """The policy as a reference: in eval mode, its adapter, if it has one, switched off."""
    training, adapter = policy.training, has_adapter(policy)
    if adapter:
        policy.disable_adapters()
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
        if adapter:
            policy.enable_adapters()


class OtherNetwork(Reference, ABC):
    """A reference that is a network apart from the policy's.

    Args:
        source: Where it comes from. Default: the policy's own source.
    """

    def __init__(self, source: ModelSource | None = None) -> None:
        self.source = source

    @property
    def starts_as_policy(self) -> bool:  # type: ignore[override]
        return self.source is None

    def check(self) -> None:
        if self.source is not None:
            self.source.check()


class FrozenCopy(OtherNetwork):
    """A frozen network of its own: the policy's start, or another model.

    Args:
        source: Where it comes from. Default: the policy's own source.
    """

    def __init__(self, source: ModelSource | None = None) -> None:
        super().__init__(source)
        self._network: PreTrainedModel | None = None

    def check_strategy(self, strategy: Strategy) -> None:
        _refuse_fsdp1(self, strategy, "a second network, which it would not shard: every GPU would hold it whole")

    @property
    def network(self) -> PreTrainedModel | None:
        """The network, once it is prepared."""
        return self._network

    def prepare(self, policy: PreTrainedModel, source: ModelSource, load: Loader) -> None:
        self._network = load(self.source or source, _freeze)

    @torch.no_grad()
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        return self._network.response_log_probs(batch)  # type: ignore[union-attr,operator]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._network is not None and (self._network.device, self._network.dtype) != (device, dtype):
            saved = float_buffers(self._network)
            # Sharded weights are in their place, which may be the CPU.
            where = self._network.device if isinstance(self._network, FSDPModule) else device
            self._network.to(device=where, dtype=dtype)  # type: ignore[call-arg]  # decorated beyond mypy
            restore_buffers(self._network, saved, device)


def _refuse_fsdp1(reference: Reference, strategy: Strategy, what: str) -> None:
    if isinstance(strategy, FSDPStrategy):
        raise UserError(
            f"{type(reference).__name__} under FSDP1 would be {what}. Compute the reference's log-probs beforehand "
            f"(`-c configs/reference/precomputed.yaml`), or train an adapter and switch it off (`-c configs/model/"
            f"lora.yaml`), or use `-c configs/strategy/fsdp2.yaml`."
        )


def _freeze(network: PreTrainedModel) -> None:
    network.requires_grad_(False)
    network.eval()


class AdapterOff(Reference):
    """The policy with its adapter switched off: no second network. For `LoRA`."""

    starts_as_policy = True

    def prepare(self, policy: PreTrainedModel, source: ModelSource, load: Loader) -> None:
        if not has_adapter(policy):
            raise UserError("AdapterOff: the policy has no adapter. Set model.trainable to LoRA, or use FrozenCopy.")

    @torch.no_grad()
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        with frozen(policy):
            return policy.response_log_probs(batch)  # type: ignore[operator]


class SharedWeights(Reference):
    """The policy's network with its trained weights exchanged for copies of their start: no second network.

    Frozen weights are held once, so that selective training (`Select`) pays for the trained weights alone; for
    `down_proj` of a 7B model that is about a quarter of a frozen copy. Where everything trains it saves nothing. An
    adapter needs no copies at all: `AdapterOff`.
    """

    starts_as_policy = True

    def __init__(self) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []

    def check_strategy(self, strategy: Strategy) -> None:
        _refuse_fsdp1(self, strategy, "an exchange of weights, which it keeps in a form of its own")

    def prepare(self, policy: PreTrainedModel, source: ModelSource, load: Loader) -> None:
        if has_adapter(policy):
            raise UserError("SharedWeights: the policy has an adapter. Set model.reference to AdapterOff.")
        # Now, before a checkpoint is restored: the reference is the start, not the place to go on from.
        self._pairs = [(p, _local(p).detach().clone()) for p in policy.parameters() if p.requires_grad]

    @torch.no_grad()
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        self._exchange(policy)
        try:
            with frozen(policy):
                return policy.response_log_probs(batch)  # type: ignore[operator]
        finally:
            self._exchange(policy)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self._pairs = [(p, start.to(_local(p))) for p, start in self._pairs]

    def _exchange(self, policy: PreTrainedModel) -> None:
        """Puts the copies' contents into the trained weights, and theirs into the copies."""
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else the next forward would use what was gathered before
        for parameter, start in self._pairs:
            local = _local(parameter)
            held = local.clone()
            local.copy_(start)
            start.copy_(held)
        torch.clear_autocast_cache()  # it holds casts of the contents from before


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, a view of its storage."""
    part = parameter.detach()
    return part.to_local() if isinstance(part, DTensor) else part


class FromColumn(Reference):
    """Log-probs that the data carries, computed before, one number a response.

    Args:
        column: Name of the response column, in nats, under the same token reduction as the policy's.
    """

    def __init__(self, column: str = "reference_log_prob") -> None:
        self.column = column
        self.columns = (f"chosen_{column}", f"rejected_{column}")

    def prepare(self, policy: PreTrainedModel, source: ModelSource, load: Loader) -> None:
        return None

    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        return batch.annotations.response[self.column]
