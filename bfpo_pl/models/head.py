"""The output head: from hidden states to the log-probs of target tokens, without a ``[tokens, vocabulary]`` tensor.

Tokens meet the vocabulary a chunk at a time, and the backward pass computes a chunk's logits again. A frozen head gets
no second pass: what its states' gradient needs is formed beside the log-probs, in the forward pass.
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


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its output head: ``cap · tanh(scale · x / cap)``.

    Args:
        scale: Factor (Cohere, Granite).
        cap: Soft cap (Gemma); none by default.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitTransform:
        """The transform that a model's config asks for."""
        config = config.get_text_config()
        scale = getattr(config, "logit_scale", None)  # Cohere
        scaling = getattr(config, "logits_scaling", None)  # Granite
        return cls(
            scale=(1.0 if scale is None else scale) / (1.0 if scaling is None else scaling),
            cap=getattr(config, "final_logit_softcapping", None),  # Gemma
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Transformed logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def apply_(self, logits: Tensor) -> Tensor:
        """The same, in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

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
        return _HeadLogProbs.apply(states, head.weight, head.bias, targets, transform, chunk_size)
    dtype = _compute_dtype(states)
    weight, bias = _cast(head.weight, dtype), _cast(head.bias, dtype)
    values = []
    with torch.autocast(states.device.type, enabled=False):
        for chunk, chunk_targets in zip(states.split(chunk_size), targets.split(chunk_size), strict=True):
            logits = _logits(_cast(chunk, dtype), weight, bias, transform)
            values.append(_chosen(logits, chunk_targets)[0])
    return torch.cat(values)


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is exactly a linear layer, whose weight may be used without calling it."""
    # By type, not isinstance: adapters, quantised layers and layers sharded by themselves derive from Linear.
    hooked = any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks))
    return type(head) is nn.Linear and not hooked and not isinstance(head.weight, DTensor)


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


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Transformed logits ``[n, V]`` of a chunk, in float32 at least."""
    logits = functional.linear(states, weight, bias)
    return transform.apply_(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _chosen(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs ``[n]`` of the targets and the normalisers ``[n]``."""
    normalisers = logits.logsumexp(dim=1)
    return logits.gather(1, targets[:, None])[:, 0] - normalisers, normalisers


def _logit_gradient(
    logits: Tensor, normalisers: Tensor, targets: Tensor, factors: Tensor | None, transform: LogitTransform
) -> Tensor:
    """Gradient ``[n, V]`` of ``Σ factor · log-prob`` by the head's own logits. Overwrites ``logits``.

    Args:
        logits: Transformed logits ``[n, V]``.
        normalisers: ``[n]``.
        targets: ``[n]`` int64.
        factors: ``[n]``; all 1 by default.
        transform: What made the transformed logits.
    """
    slope = transform.slope(logits)
    gradient = logits.sub_(normalisers[:, None]).exp_().neg_()
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(normalisers)[:, None])
    if factors is not None:
        gradient.mul_(factors[:, None])
    return gradient if isinstance(slope, float) and slope == 1.0 else gradient.mul_(slope)


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
        values, normalisers = [], []
        direction = torch.empty_like(states, dtype=dtype) if direct else None
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), chunk_size):
                chosen = targets[start : start + chunk_size]
                logits = _logits(_cast(states[start : start + chunk_size], dtype), cast_weight, cast_bias, transform)
                value, normaliser = _chosen(logits, chosen)
                values.append(value)
                normalisers.append(normaliser)
                if direction is not None:
                    gradient = _logit_gradient(logits, normaliser, chosen, None, transform)
                    torch.mm(gradient.to(dtype), cast_weight, out=direction[start : start + chunk_size])
                del logits  # before the next chunk's come
        ctx.transform, ctx.chunk_size, ctx.dtype = transform, chunk_size, dtype
        ctx.states_dtype = states.dtype
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(states, weight, bias, targets, torch.cat(normalisers))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = outputs
        with torch.autocast(factors.device.type, enabled=False):
            if len(ctx.saved_tensors) == 1:
                (direction,) = ctx.saved_tensors
                by_states = (direction * factors[:, None]).to(ctx.states_dtype)
                return by_states, None, None, None, None, None
            gradients = _recomputed_gradients(ctx, factors)
        return *gradients, None, None, None


def _recomputed_gradients(ctx: Any, factors: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by states, weight and bias, from logits that are computed again, chunk by chunk."""
    states, weight, bias, targets, normalisers = ctx.saved_tensors
    needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    cast_weight, cast_bias = _cast(weight, ctx.dtype), _cast(bias, ctx.dtype)
    by_states = torch.empty_like(states) if needs_states else None
    by_weight: Tensor | None = None
    by_bias: Tensor | None = None
    for start in range(0, len(states), ctx.chunk_size):
        rows = slice(start, start + ctx.chunk_size)
        chunk = _cast(states[rows], ctx.dtype)
        logits = _logits(chunk, cast_weight, cast_bias, ctx.transform)
        gradient = _logit_gradient(logits, normalisers[rows], targets[rows], factors[rows], ctx.transform)
        if needs_bias:
            summed = gradient.sum(dim=0)
            by_bias = summed if by_bias is None else by_bias.add_(summed)
        gradient = gradient.to(ctx.dtype)
        del logits
        if by_states is not None:
            by_states[rows] = gradient @ cast_weight
        if needs_weight:
            product = gradient.T @ chunk
            if by_weight is None:
                # Several chunks add up in float32 at least, whatever the type of each one's product.
                several = len(states) > ctx.chunk_size
                by_weight = product.to(torch.promote_types(product.dtype, torch.float32)) if several else product
            else:
                by_weight.add_(product)
    return by_states, _like(by_weight, weight), _like(by_bias, bias)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
