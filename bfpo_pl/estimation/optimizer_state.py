"""What an optimizer holds: found out by letting it step, not from a table of names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from bfpo_pl.estimation.ledger import Ledger
from bfpo_pl.estimation.plan import Plan
from bfpo_pl.estimation.skeleton import weight_type

_TINY = (64, 64)


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer takes on one device.

    Args:
        state: Bytes that it holds between steps; None if it could not be found out.
        working: The most bytes that a step takes besides.
        name: The optimizer's class.
    """

    state: float | None
    working: float
    name: str


def optimizer_memory(plan: Plan, trained: Iterable[Tensor]) -> OptimizerMemory:
    """Lets the config's optimizer take one step on this device's shards of the trained parameters.

    The step runs on tensors without contents; an optimizer that reads values steps for real, on one small parameter of
    each type, and what it holds is taken to grow with the number of elements.

    Args:
        plan: What it depends on.
        trained: The trained parameters, whole; only shapes and types are read.
    """
    types = [(tuple(p.shape), weight_type(p, plan.precision)) for p in trained]
    shards = [((math.ceil(shape[0] / plan.shards), *shape[1:]) if shape else shape, kind) for shape, kind in types]
    if not shards:
        return OptimizerMemory(0.0, 0.0, "none")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            parameters = [nn.Parameter(torch.empty(shape, dtype=kind)) for shape, kind in shards]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        return _stepped(plan, parameters)
    except Exception:  # what it may read, or call, nobody knows: it steps for real below
        return _small_step(plan, shards)


def _small_step(plan: Plan, shards: list[tuple[tuple[int, ...], torch.dtype]]) -> OptimizerMemory:
    state, working, name = 0.0, 0.0, "unknown"
    for kind in {kind for _, kind in shards}:
        parameter = nn.Parameter(torch.ones(_TINY, dtype=kind))
        parameter.grad = torch.ones_like(parameter)
        elements = [math.prod(shape) for shape, each in shards if each == kind]
        try:
            found = _stepped(plan, [parameter])
        except Exception as error:  # a library for GPUs alone, say
            return OptimizerMemory(None, 0.0, f"{type(error).__name__}: {error}")
        state += (found.state or 0.0) * sum(elements) / parameter.numel()
        working = max(working, found.working * max(elements) / parameter.numel())
        name = found.name
    return OptimizerMemory(state, working, name)


def _stepped(plan: Plan, parameters: list[nn.Parameter]) -> OptimizerMemory:
    optimizer = plan.optimizer(iter(parameters))
    _as_on(plan.kind.type, optimizer)
    ledger = Ledger()
    ledger.leave_out([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    with ledger:
        ledger.phase("step")
        optimizer.step()
    state = ledger.live
    return OptimizerMemory(state, ledger.peaks["step"].alone - state, type(optimizer).__name__)


def _as_on(kind: str, optimizer: Optimizer) -> None:
    """Takes the way that torch takes on GPUs if it is not told: all tensors at once, with temporaries of all."""
    for group in optimizer.param_groups:
        if kind == "cuda" and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
