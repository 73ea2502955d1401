"""Runs a step's own code on tensors without contents, and tells what it would hold and do.

Nothing of it depends on values: the network of the config, its attention backend, activation checkpointing, the output
head and autograd run as in training, but every tensor has a shape and a type alone. A deep network of equal blocks is
run at two small depths: what a step holds, at any of its stages, and does grows by the same amount with every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import UserError
from bfpo_pl.estimation.ledger import Ledger, Unit
from bfpo_pl.estimation.plan import SHARDED, Plan
from bfpo_pl.estimation.skeleton import blocks_alike, config_of, on_meta, with_depth, without_contents
from bfpo_pl.models.checkpointing import checkpoint_activations
from bfpo_pl.models.device_type import planned_for
from bfpo_pl.models.log_probs import bind_log_probs
from bfpo_pl.models.reference import frozen
from bfpo_pl.models.sharding import transformer_blocks
from bfpo_pl.models.sources import ModelSource

_DEPTHS = (2, 4)


@dataclass(frozen=True)
class Passing:
    """A forward pass without gradients.

    Args:
        peak: The most bytes that its tensors take.
        flops: Its operations.
    """

    peak: float
    flops: float


@dataclass(frozen=True)
class Training:
    """A forward and a backward pass. All are bytes of tensors that are no weights, but for the operations.

    Args:
        backbone: Live when the last block has run: what the backward pass needs of the blocks.
        casts: Of these, weights in autocast's type.
        forward: The most during the forward pass.
        late: The most while the head and the later half of the blocks run backward, without final gradients.
        late_together: The most there with them.
        late_then: How much of that is no final gradients.
        early: The same for the earlier half and the embedding.
        early_together: Likewise.
        early_then: Likewise.
        forward_flops: Operations of the forward pass.
        backward_flops: Of the backward pass, what checkpointing computes again among them.
    """

    backbone: float
    casts: float
    forward: float
    late: float
    late_together: float
    late_then: float
    early: float
    early_together: float
    early_then: float
    forward_flops: float
    backward_flops: float


def training(plan: Plan, batch: PairBatch) -> Training:
    """A training step of the policy, without its optimizer.

    Args:
        plan: What it depends on.
        batch: What one device is given at once.

    Raises:
        UserError: The network chooses its way by values, so that nothing is known without them.
    """

    def at(model: PreTrainedModel) -> Training:
        checkpoint_activations(model, plan.checkpointing)
        with _prepared(plan, model, plan.gathered) as (ledger, held):
            _count_gradients(plan, model, ledger, held)
            return _train(plan, model, batch, ledger)

    return _by_depth(at, plan.source, plan)


def passing(plan: Plan, source: ModelSource | None, batch: PairBatch) -> Passing:
    """A forward pass without gradients, as references and validation have.

    Args:
        plan: What it depends on.
        source: Whose network; None: the policy, its adapter switched off if it has one.
        batch: What one device is given at once.
    """

    def at(model: PreTrainedModel) -> Passing:
        with _prepared(plan, model, plan.gathered) as (ledger, _), frozen(model), torch.no_grad():
            ledger.phase("forward")
            with _autocast(plan):
                values = model.response_log_probs(batch)  # type: ignore[operator]
            del values
        return Passing(ledger.peaks["forward"].alone, ledger.flops["forward"])

    return _by_depth(at, source or plan.source, plan, trains=source is None)


def _train(plan: Plan, model: PreTrainedModel, batch: PairBatch, ledger: Ledger) -> Training:
    blocks = transformer_blocks(model)
    after: dict[str, float] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        after.update(backbone=ledger.live, casts=ledger.casts)

    def mark(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda _: ledger.phase("early") and None)

    handles = [model.base_model.register_forward_hook(note)]
    handles.append(blocks[max(0, len(blocks) // 2 - 1)].register_forward_hook(mark))
    ledger.phase("forward")
    with _autocast(plan):
        loss = model.response_log_probs(batch).sum()  # type: ignore[operator]
    late, early = ledger.phase("late"), ledger.peaks.get("early")
    loss.backward()
    early = ledger.phase("early")
    for handle in handles:
        handle.remove()
    return Training(
        backbone=after["backbone"],
        casts=after["casts"],
        forward=ledger.peaks["forward"].alone,
        late=late.alone,
        late_together=late.together,
        late_then=late.then,
        early=early.alone,
        early_together=early.together,
        early_then=early.then,
        forward_flops=ledger.flops["forward"],
        backward_flops=ledger.flops["late"] + ledger.flops["early"],
    )


def _count_gradients(plan: Plan, model: PreTrainedModel, ledger: Ledger, held: dict[nn.Parameter, float]) -> None:
    """Lets a ledger take gradients over: each by itself; in FSDP2's units, shard by shard, where they are sharded."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if plan.layout != SHARDED:
        ledger.watch_gradients((Unit(1, held[parameter], 0.0), [parameter]) for parameter in trained)
        return
    groups = [[p for p in block.parameters() if p.requires_grad] for block in transformer_blocks(model)]
    inside = {parameter for group in groups for parameter in group}
    groups.append([parameter for parameter in trained if parameter not in inside])
    units = []
    for group in groups:
        kept = sum(held[parameter] for parameter in group) / plan.shards
        buffer = sum(float(p.numel() * (plan.reduced_size or p.element_size())) for p in group)
        units.append((Unit(len(group), kept, buffer + kept), group))
    ledger.watch_gradients(units)


@contextmanager
def _prepared(
    plan: Plan, model: PreTrainedModel, gathered: torch.dtype | None
) -> Iterator[tuple[Ledger, dict[nn.Parameter, float]]]:
    """A network on the meta device made ready to run, under a ledger."""
    mode, ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger()
    held = without_contents(model, mode, plan.precision, gathered)
    model.train()
    with planned_for(plan.kind.type):
        bind_log_probs(model, plan.attention, chunk_size=plan.chunk_size)
        ledger.leave_out([*model.parameters(), *model.buffers()])
        with ledger:
            try:
                yield ledger, held
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise UserError(
                    f"bfpo estimate: {type(model).__name__} chooses its way by the values it computes ({error}), so "
                    "that nothing can be said of it without weights."
                ) from error
            finally:
                ledger.close()


@contextmanager
def _autocast(plan: Plan) -> Iterator[None]:
    with torch.autocast("cpu", plan.compute or torch.bfloat16, enabled=plan.compute is not None):
        yield


def _by_depth(run: Callable[[PreTrainedModel], Any], source: ModelSource, plan: Plan, trains: bool = True) -> Any:
    """What a function gives for a source's network; from two small depths, if its blocks are alike."""
    trainable = plan.trainable if trains else None
    config = config_of(source)
    layers = config.get_text_config().num_hidden_layers
    if layers <= _DEPTHS[1] or not blocks_alike(on_meta(source, trainable)):
        return run(on_meta(source, trainable))
    fewer, more = (run(on_meta(source, trainable, with_depth(config, depth))) for depth in _DEPTHS)
    steps = (layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])

    def reached(name: str) -> float:
        first, second = getattr(fewer, name), getattr(more, name)
        return first + steps * (second - first)

    return type(fewer)(**{field.name: reached(field.name) for field in fields(fewer)})
