"""The output head: from hidden states to the log-probs of target tokens, without a ``[tokens, vocabulary]`` tensor.

Tokens meet the vocabulary a chunk at a time, and the backward pass computes a chunk's logits again; but for the last
chunk, whose gradient by the logits the forward pass leaves behind: a batch of one chunk meets the vocabulary once. A
frozen head gets no second pass at all: what its states' gradient needs is formed beside the log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bfpo_pl.models.device_type import device_type

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its output head: ``cap · tanh(scale · x / cap)``.

    Args:
        scale: Factor (Cohere, Granite).
        cap: Soft cap (Gemma, RecurrentGemma, xLSTM); none by default.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitTransform:
        """The transform that a model's config asks for."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        scaling = getattr(config, "logits_scaling", None)  # Granite
        caps = [cap for name in _CAPS if (cap := getattr(config, name, None)) is not None]
        return cls(
            scale=(1.0 if scale is None else scale) / (1.0 if scaling is None else scaling),
            cap=caps[0] if caps else None,
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Derivative of the transformed logits by those of the head, from the transformed ones."""
        if self.cap is None:
            return self.scale
        return (transformed / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits ``[N, V]`` from final hidden states ``[N, H]``, scaled and soft-capped as the model's config says."""
    return LogitTransform.of(model.config)(model.get_output_embeddings()(states))


def token_log_probs(model: PreTrainedModel, states: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Log-prob of each target token from the hidden state that predicts it, chunk by chunk.

    Args:
        model: The causal language model whose output head is used.
        states: ``[N, H]``, final hidden states.
        targets: ``[N]`` int64, token ids.
        chunk_size: Rows that meet the vocabulary at once.

    Returns:
        ``[N]`` in float32, or in float64 for a float64 model.
    """
    head = model.get_output_embeddings()
    if not _is_plain(head):
        return _checkpointed_log_probs(model, states, targets, chunk_size)
    transform = LogitTransform.of(model.config)
    if torch.is_grad_enabled():
        return _HeadLogProbs.apply(states, _local(head.weight), _local(head.bias), targets, transform, chunk_size)
    dtype = _compute_dtype(states)
    weight, bias = _cast(_local(head.weight), dtype), _cast(_local(head.bias), dtype)
    values = []
    with torch.autocast(states.device.type, enabled=False):
        for rows in _chunks(len(states), chunk_size):
            logits = functional.linear(_cast(states[rows], dtype), weight, bias)
            values.append(_scored(logits, targets[rows], transform, differentiate=False))
    return torch.cat(values)


def _chunks(rows: int, chunk_size: int) -> list[slice]:
    """Chunks of rows; the first has what is left over, so that the last, which is kept, is a whole one."""
    ends = range(rows, 0, -chunk_size)
    return [slice(max(0, end - chunk_size), end) for end in reversed(ends)] or [slice(0, 0)]


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is exactly a linear layer, whose weight may be used without calling it."""
    # By type, not isinstance: adapters, quantised layers and layers sharded by themselves derive from Linear.
    hooked = any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks))
    split = isinstance(head.weight, DTensor) and not _is_whole(head.weight)
    return type(head) is nn.Linear and not hooked and not split


def _is_whole(tensor: DTensor) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _local(tensor: Any) -> Any:
    """A tensor that every process holds whole (tensor parallelism), as a plain one; each has the whole gradient."""
    return tensor.to_local(grad_placements=tensor.placements) if isinstance(tensor, DTensor) else tensor


def _checkpointed_log_probs(model: PreTrainedModel, states: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """The same for a head of any kind: called as a module, and once more in the backward pass."""

    def chunk_log_probs(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
        logits = head_logits(model, chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(1, chunk_targets[:, None])[:, 0] - logits.logsumexp(dim=1)

    chunks = zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk_log_probs(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(chunk_log_probs, *chunk, use_reentrant=False) for chunk in chunks])


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Type of the head's matrix products: autocast's, where it is on; it leaves float64 alone."""
    device = states.device.type
    if states.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return states.dtype


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


def _scored(logits: Tensor, targets: Tensor, transform: LogitTransform, differentiate: bool) -> Tensor:
    """Log-probs ``[n]`` of targets, in float32 at least.

    Args:
        logits: The head's own logits ``[n, V]``.
        targets: ``[n]`` int64.
        transform: What the model does to them.
        differentiate: Overwrites ``logits`` with the gradient of minus the log-probs by them.
    """
    values = []
    # Few rows at a time: what is in float32 besides the logits stays small, and on a CPU in its cache.
    rows = max(1, _BLOCK[device_type(logits.device) == "cpu"] // logits.shape[1])
    for block, chosen in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        wide = transform(wide)
        probabilities = wide.softmax(dim=1)
        # The likeliest token's probability is 1 over the sum of exponentials.
        normalisers = wide.amax(dim=1, keepdim=True) - probabilities.amax(dim=1, keepdim=True).log()
        values.append((wide.gather(1, chosen) - normalisers)[:, 0])
        if differentiate:
            probabilities.scatter_add_(1, chosen, -torch.ones_like(normalisers))
            slope = transform.slope(wide)
            if not isinstance(slope, float) or slope != 1.0:
                probabilities.mul_(slope)
            block.copy_(probabilities)
    return torch.cat(values)


_BLOCK = {True: 2**20, False: 2**26}
"""Logits whose probabilities are computed at once, on a CPU and elsewhere."""


class _HeadLogProbs(torch.autograd.Function):
    """Log-probs ``[N]`` of targets, with the gradients by states, weight and bias; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_size: int,
    ) -> Tensor:
        dtype = _compute_dtype(states)
        by_states, by_weight, by_bias = ctx.needs_input_grad[:3]
        direct = by_states and not by_weight and not by_bias
        cast_weight, cast_bias = _cast(weight, dtype), _cast(bias, dtype)
        values = []
        direction = torch.empty_like(states, dtype=dtype) if direct else None
        with torch.autocast(states.device.type, enabled=False):
            for rows in _chunks(len(states), chunk_size):
                logits = None  # the chunk's before goes first
                logits = functional.linear(_cast(states[rows], dtype), cast_weight, cast_bias)
                values.append(_scored(logits, targets[rows], transform, direct or rows.stop == len(states)))
                if direction is not None:
                    torch.mm(logits, cast_weight, out=direction[rows])
        ctx.transform, ctx.chunk_size, ctx.dtype = transform, chunk_size, dtype
        ctx.states_dtype = states.dtype
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(states, weight, bias, targets)
            # The backward pass, which comes next, starts with this chunk and needs as much room for it in any case.
            ctx.last = logits
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = outputs
        with torch.autocast(factors.device.type, enabled=False):
            if len(ctx.saved_tensors) == 1:
                (direction,) = ctx.saved_tensors
                by_states = (direction * -factors[:, None]).to(ctx.states_dtype)
                return by_states, None, None, None, None, None
            gradients = _gradients(ctx, -factors)
        return *gradients, None, None, None


def _gradients(ctx: Any, factors: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by states, weight and bias, chunk by chunk; all but the last chunk's logits are computed again.

    Args:
        ctx: The context of the forward pass.
        factors: ``[N]``, gradient by minus the log-probs.
    """
    states, weight, bias, targets = ctx.saved_tensors
    needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    cast_weight, cast_bias = _cast(weight, ctx.dtype), _cast(bias, ctx.dtype)
    by_states = torch.empty_like(states) if needs_states else None
    by_weight: Tensor | None = None
    by_bias: Tensor | None = None
    chunks = _chunks(len(states), ctx.chunk_size)
    for rows in reversed(chunks):
        chunk, factor = _cast(states[rows], ctx.dtype), factors[rows, None]
        gradient, ctx.last = ctx.last, None
        if gradient is None:
            gradient = functional.linear(chunk, cast_weight, cast_bias)
            _scored(gradient, targets[rows], ctx.transform, differentiate=True)
        # The factors scale states and their gradient, which are smaller than the logits'.
        if by_states is not None:
            by_states[rows] = (gradient @ cast_weight) * factor
        scaled = (chunk * factor).to(ctx.dtype)
        if needs_bias:
            summed = (factor.to(ctx.dtype).T @ gradient)[0].to(torch.promote_types(ctx.dtype, torch.float32))
            by_bias = summed if by_bias is None else by_bias.add_(summed)
        if needs_weight:
            by_weight = _added_product(by_weight, gradient.T, scaled, len(chunks) > 1)
        del gradient
    return by_states, _like(by_weight, weight), _like(by_bias, bias)


def _added_product(total: Tensor | None, left: Tensor, right: Tensor, several: bool) -> Tensor:
    """``total + left @ right``, in place; several add up in float32 at least, whatever the type of each product."""
    if total is not None:
        return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)
    product = left @ right
    return product.to(torch.promote_types(product.dtype, torch.float32)) if several else product


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
