"""Reference models: what the policy's log-probs are measured against. The loss cannot tell them apart.

A reference lives outside the module tree: it never shows in ``state_dict``, optimizer or checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import Component, UserError
from bfpo_pl.models.buffers import float_buffers, restore_buffers
from bfpo_pl.models.sources import ModelSource


class Reference(Component, ABC):
    """Gives the log-probs of responses under a frozen model."""

    starts_as_policy: bool = False
    """Whether the policy's own start is the reference, so that the first margin must be exactly 0."""

    columns: tuple[str, ...] = ()
    """Annotation columns that the reference reads."""

    def check(self) -> None:
        """Fails early, before any weight loads, if the reference cannot be had."""

    @abstractmethod
    def prepare(self, policy: PreTrainedModel, source: ModelSource, place: Callable[[PreTrainedModel], None]) -> None:
        """Gets ready, once, when the policy has been built and not yet changed.

        Args:
            policy: The policy with its trainable part applied.
            source: Where the policy came from.
            place: Binds the log-prob method to a network and shards it as the policy is.
        """

    @abstractmethod
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        """``[R]``, log-prob of every response, without a gradient."""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the reference's network, if it has one, to the policy's device and type of parameters."""


class FrozenCopy(Reference):
    """A frozen network of its own: the policy's start, or another model.

    Args:
        source: Where it comes from. Default: the policy's own source.
    """

    def __init__(self, source: ModelSource | None = None) -> None:
        self.source = source
        self._network: PreTrainedModel | None = None

    @property
    def starts_as_policy(self) -> bool:  # type: ignore[override]
        return self.source is None

    def check(self) -> None:
        if self.source is not None:
            self.source.check()

    def prepare(self, policy: PreTrainedModel, source: ModelSource, place: Callable[[PreTrainedModel], None]) -> None:
        network = (self.source or source).load_model()
        network.requires_grad_(False)
        network.eval()
        place(network)
        self._network = network

    @torch.no_grad()
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        return self._network.response_log_probs(batch)  # type: ignore[union-attr,operator]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        if self._network is not None and (self._network.device, self._network.dtype) != (device, dtype):
            saved = float_buffers(self._network)
            self._network.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # decorated beyond mypy
            restore_buffers(self._network, saved, device)


class AdapterOff(Reference):
    """The policy with its adapter switched off: no second network. For `LoRA`."""

    starts_as_policy = True

    def prepare(self, policy: PreTrainedModel, source: ModelSource, place: Callable[[PreTrainedModel], None]) -> None:
        if not any(isinstance(module, BaseTunerLayer) for module in policy.modules()):
            raise UserError("AdapterOff: the policy has no adapter. Set model.trainable to LoRA, or use FrozenCopy.")

    @torch.no_grad()
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        policy.disable_adapters()
        training = policy.training
        policy.eval()
        try:
            return policy.response_log_probs(batch)  # type: ignore[operator]
        finally:
            policy.train(training)
            policy.enable_adapters()


class SharedWeights(Reference):
    """The policy's network with its trained weights exchanged for copies of their start: no second network.

    Frozen weights are held once, so that selective training (`Select`) pays for the trained weights alone; for
    `down_proj` of a 7B model that is about a quarter of a frozen copy. Where everything trains it saves nothing. An
    adapter needs no copies at all: `AdapterOff`.
    """

    starts_as_policy = True

    def __init__(self) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []

    def prepare(self, policy: PreTrainedModel, source: ModelSource, place: Callable[[PreTrainedModel], None]) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in policy.modules()):
            raise UserError("SharedWeights: the policy has an adapter. Set model.reference to AdapterOff.")
        # Now, before a checkpoint is restored: the reference is the start, not the place to go on from.
        self._pairs = [(p, _local(p).detach().clone()) for p in policy.parameters() if p.requires_grad]

    @torch.no_grad()
    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        training = policy.training
        policy.eval()
        self._exchange(policy)
        try:
            return policy.response_log_probs(batch)  # type: ignore[operator]
        finally:
            self._exchange(policy)
            policy.train(training)

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

    def prepare(self, policy: PreTrainedModel, source: ModelSource, place: Callable[[PreTrainedModel], None]) -> None:
        return None

    def log_probs(self, policy: PreTrainedModel, batch: PairBatch) -> Tensor:
        return batch.annotations.response[self.column]
