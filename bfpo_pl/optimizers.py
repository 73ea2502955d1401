"""An optimizer for weights of lower precision: bfloat16 keeps three digits, too few to add small updates to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.adamw import adamw

LOW = (torch.bfloat16, torch.float16)
"""Types that get a float32 copy."""

BUCKET = 2**26
"""Elements whose gradients are in float32 at once: 256 MiB."""


class AdamW32(AdamW):
    """AdamW with all its state in float32, whatever the type of the weights: for ``trainer.precision: bf16-true``.

    A weight in bfloat16 or float16 gets a float32 copy that the updates go to; the weight itself is that copy, rounded.
    Copy and moments are checkpointed and resumed in float32. For float32 weights it is exactly `torch.optim.AdamW`.
    Gradients come in the type of the weights; accumulated over batches (``accumulate_grad_batches``), they are rounded
    at each addition.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square, a step.
        eps: Added to the denominator.
        weight_decay: Decay of the weights, in units of the learning rate.
        amsgrad: Divides by the largest average so far (AMSGrad).
        maximize: Ascends instead.
        foreach: Loops over lists of tensors instead of tensors. Default: on GPUs.
        fused: One kernel for all of a step; the fastest, where the device has it.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, fused=fused)
        clip_before_the_step(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; a closure, if given, computes loss and gradients before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            self._update([p for p in trained if p.dtype not in LOW], group)
            for bucket in _buckets([p for p in trained if p.dtype in LOW]):
                self._update(bucket, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Updates parameters that are all of low precision, or none."""
        if not params:
            return
        for p in params:
            self._prepare(p, group)
        low = params[0].dtype in LOW
        states = [self.state[p] for p in params]
        masters = [state["master"] for state in states] if low else params
        adamw(
            masters,
            [p.grad.float() if low else p.grad for p in params],  # type: ignore[union-attr,misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        if low:
            for p, master in zip(params, masters, strict=True):
                p.copy_(master)

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        """Makes what a parameter's state lacks."""
        state = self.state[p]
        if p.dtype in LOW and "master" not in state:
            state["master"] = p.detach().to(torch.float32, copy=True)
        if "step" not in state:
            like = state.get("master", p)
            # torch hosts the count where its kernel reads it
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; that of weights of low precision stays in float32, which torch would cast to their type."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, p in zip(saved, _parameters(self), strict=True):
            if p.dtype not in LOW:
                self.state.get(p, {}).pop("master", None)  # else it would come back, outdated, in a later run in bf16
                continue
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[p][name] = value.to(p.device, torch.float32)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Splits parameters into lists of at most ``BUCKET`` elements, or of one parameter."""
    bucket: list[Tensor] = []
    size = 0
    for p in params:
        if bucket and size + p.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def clip_before_the_step(optimizer: Optimizer) -> None:
    """Lets Lightning clip gradients that a fused optimizer takes.

    A fused optimizer says that it can divide by a loss scale itself, and Lightning then refuses to clip, since it would
    clip scaled gradients, even under bf16-mixed, where nothing is scaled. Without that claim a scaler divides before.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


@torch.no_grad()
def warn_of_lost_updates(optimizer: Optimizer) -> None:
    """Says so if most updates of an Adam of torch would be rounded away by weights of low precision.

    An update of Adam is about as large as the learning rate; a weight w of bfloat16 changes by 2⁻⁹ |w| at least.
    """
    if not isinstance(optimizer, Adam) or isinstance(optimizer, AdamW32):
        return
    for group in optimizer.param_groups:
        low = [p for p in group["params"] if p.dtype in LOW]
        lost = sum((p.abs() * (torch.finfo(p.dtype).eps / 4) > float(group["lr"])).sum().item() for p in low)
        total = sum(p.numel() for p in low)
        if lost > total / 2:
            rank_zero_warn(
                f"Weights in {str(low[0].dtype).removeprefix('torch.')} round away most updates at the learning rate "
                f"{float(group['lr']):g}: set model.optimizer to bfpo_pl.optimizers.AdamW32 (the same with float32 "
                f"state), or trainer.precision to bf16-mixed.",
            )
            return
