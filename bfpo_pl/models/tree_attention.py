"""Attention over pair trees as an attention function of transformers: rows of responses out of one row of tokens."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import RunError

NAME = "bfpo_pair_rows"
"""Name of the attention function. Without a `TreeLayout` it is transformers' SDPA: a network can generate with it."""


class TreeLayout(ABC):
    """How the layers of a network attend over one batch, whose tokens they are given in one row.

    Args:
        batch: The pair trees; at least one response.
    """

    def __init__(self, batch: PairBatch) -> None:
        # Transformers passes a 4D mask on as it is. Any layer that applied this one would give NaN.
        self.marker = torch.full((1, 1, 1, 1), float("nan"), device=batch.tokens.device)
        self.layers = 0

    @abstractmethod
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """The attention of one layer, in which every response sees its prompt and itself, causally.

        Args:
            module: The attention layer.
            query: ``[1, heads, T, D]``.
            key: The same, with as many heads as there are for keys.
            value: Likewise.
            scores: What the layer makes of the products of queries and keys.

        Returns:
            ``[1, T, heads, D]``.
        """

    def check_used(self, backbone: nn.Module) -> None:
        """Checks, after a forward pass, that every layer attended in this layout.

        Raises:
            RunError: Some did not, so responses may have seen each other.
        """
        expected = backbone.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
        if self.layers < expected:
            raise RunError(
                f"Only {self.layers} of {expected} layers of {type(backbone).__name__} attend by transformers' "
                "attention interface. Set model.attention to Padded."
            )


@dataclass(frozen=True)
class Scores:
    """What an attention layer makes of the products of queries and keys.

    Args:
        scaling: Their factor. Default: 1/sqrt(D).
        dropout: Probability of dropping a weight.
        window: How many tokens, itself included, a token sees. Default: all before it.
        softcap: Soft cap of the scores.
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Copies:
    """Cells that hold copies of tokens: a prompt's tokens are copied for each of its responses.

    Args:
        tokens: ``[C]`` int64, the token in each cell; some token in padding.
        cells: ``[K, T]`` int64, the cells of each token, that of its prompt's first response first.
        taken: ``[K, T]`` bool, where ``cells`` holds one.
    """

    tokens: Tensor
    cells: Tensor
    taken: Tensor

    @classmethod
    def of(cls, batch: PairBatch, tokens: Tensor, response: Tensor, inside: Tensor) -> Copies:
        """Copies for the responses of a batch.

        Args:
            batch: The pair trees.
            tokens: ``[C]`` int64, the token in each cell.
            response: ``[C]`` int64, the response that each cell is for.
            inside: ``[C]`` bool, False in padding.
        """
        count, device, prompt = len(batch.tokens), tokens.device, batch.prompt_segment
        # How many responses of the same prompt come before each one: a prompt's token has a cell for each of them.
        earlier = (prompt[:, None] == prompt[None, :]).tril(-1).sum(dim=1)
        start = batch.segment_start[prompt][response]
        of_prompt = (tokens >= start) & (tokens < start + batch.segment_length[prompt][response])
        copy = torch.where(of_prompt & inside, earlier[response], 0)
        cells = torch.full((batch.most_responses, count + 1), -1, device=device)
        cells[copy, tokens.where(inside, count)] = torch.arange(len(tokens), device=device)
        cells = cells[:, :count]
        return cls(tokens, cells.clamp(min=0), cells >= 0)

    def __call__(self, states: Tensor) -> Tensor:
        """Tokens' states ``[1, heads, T, D]`` in the cells, ``[C, heads, D]``."""
        _, heads, tokens, width = states.shape
        flat = states[0].transpose(0, 1).reshape(tokens, heads * width)
        return _ToCells.apply(flat, self).view(-1, heads, width)


class TreeRows(TreeLayout):
    """One row for each response, its prompt before it, padded on the right."""

    def __init__(self, batch: PairBatch) -> None:
        super().__init__(batch)
        index, inside = batch.row_table()  # [R, L]
        self.shape = tuple(index.shape)
        row = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
        self.copies = Copies.of(batch, index.flatten(), row.flatten(), inside.flatten())
        cell = torch.arange(index.numel(), device=index.device)
        self.first = (self.copies.cells[0][index.flatten()] == cell) & inside.flatten()
        """``[R · L]``, whether a cell is its token's first."""
        self._masks: dict[int, Tensor] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        responses, length = self.shape
        windowed = scores.window is not None and scores.window < length
        query, key, value = (
            self.copies(states).unflatten(0, self.shape).transpose(1, 2)
            for states in in_compute_dtype(query, key, value)
        )
        if scores.softcap is not None:
            output = soft_capped(query, key, value, self.mask(scores.window if windowed else length), scores)  # type: ignore[arg-type]
        else:
            mask = self.mask(scores.window)[None, None] if windowed else None  # type: ignore[arg-type]
            output, _ = sdpa_attention_forward(
                module, query, key, value, mask, scores.dropout, scores.scaling, is_causal=True
            )
        heads, width = output.shape[2:]
        folded = _ToTokens.apply(output.reshape(responses * length, heads * width), self)
        return folded.view(1, -1, heads, width)

    def mask(self, window: int) -> Tensor:
        """``[L, L]``, True where a query (first) may see a key: not after it, and less than ``window`` before it."""
        if window not in self._masks:
            place = torch.arange(self.shape[1], device=self.first.device)
            distance = place[:, None] - place[None, :]
            self._masks[window] = (distance >= 0) & (distance < window)
        return self._masks[window]


class _ToCells(torch.autograd.Function):
    """Tokens ``[T, D]`` to cells ``[C, D]``. Its backward pass adds up copies in one order, every time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return tokens.index_select(0, copies.tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        copies, (gradient,) = ctx.copies, outputs
        total = gradient.index_select(0, copies.cells[0]).masked_fill_(~copies.taken[0][:, None], 0.0)
        if len(copies.cells) > 1:  # rounded once, after the sum
            total = total.to(torch.promote_types(gradient.dtype, torch.float32))
        for cells, taken in zip(copies.cells[1:], copies.taken[1:], strict=True):
            total += gradient.index_select(0, cells).masked_fill_(~taken[:, None], 0.0)
        return total.to(gradient.dtype), None


class _ToTokens(torch.autograd.Function):
    """Cells ``[C, D]`` to tokens ``[T, D]``, each from its first cell."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: TreeRows) -> Tensor:
        ctx.rows = rows
        return cells.index_select(0, rows.copies.cells[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        rows, (gradient,) = ctx.rows, outputs
        return gradient.index_select(0, rows.copies.tokens).masked_fill_(~rows.first[:, None], 0.0), None


def in_compute_dtype(*states: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values in autocast's type, where it is on: SDPA would cast them, copies and all."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in states)


def pair_rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pair_rows: TreeLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers, called by each attention layer.

    Args:
        module: The attention layer.
        query: ``[1, heads, T, D]`` with pair rows, else ``[B, heads, L, D]``.
        key: The same, with as many heads as there are for keys.
        value: Likewise.
        attention_mask: Mask without pair rows; not read with them.
        scaling: Factor of the scores. Default: 1/sqrt(D).
        dropout: Probability of dropping a weight.
        sliding_window: How many tokens, itself included, a token sees. Default: all before it.
        softcap: Soft cap of the scores.
        pair_rows: The layout to attend in.
        **kwargs: What else layers pass on.

    Returns:
        ``[1, T, heads, D]`` (``[B, L, heads, D]``) and no weights.
    """
    if pair_rows is None:
        if softcap is None:
            kwargs["sliding_window"] = sliding_window
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
        return soft_capped(query, key, value, attention_mask, Scores(scaling, dropout, softcap=softcap)), None
    for name in ("s_aux", "position_bias", "cache", "head_mask"):
        if kwargs.get(name) is not None:
            raise RunError(f"{type(module).__name__} passes '{name}', unknown to pair rows: set attention to Padded.")
    pair_rows.layers += 1
    scores = Scores(scaling, dropout, sliding_window, softcap)
    return pair_rows.attend(module, query, key, value, scores), None


def soft_capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention with soft-capped scores, which SDPA has not: ``[B, L, heads, D]``. The mask is boolean."""
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    products = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    weights = functional.softmax(products, dim=-1, dtype=torch.promote_types(products.dtype, torch.float32))
    weights = functional.dropout(weights.to(value.dtype), p=scores.dropout)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, pair_rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

_LAYERS = {"full_attention", "sliding_attention"}


_CAPACITIES = ("expert_capacity", "capacity_factor", "moe_capacity_factor", "expert_capacity_factor")
_OWN_ATTENTION = ("doge", "nemotron")  # dynamic masks; classes of its own
_NOISES = ("router_jitter_noise", "input_jitter_noise", "moe_jitter_eps")


def tree_obstacle(model: PreTrainedModel) -> str | None:
    """Why a network cannot attend in rows of its own responses; None if it can."""
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    implementation = model.config._attn_implementation
    if getattr(model, "_is_stateful", False):
        return "it carries a recurrent state, which cannot branch after the prompt"
    if others:
        return f"it has layers of the type {', '.join(others)}"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "it reads distances off the order of the tokens (ALiBi)"
    if any(getattr(config, name, None) for name in _CAPACITIES):
        return "its experts drop tokens over their capacity, so what becomes of one depends on the other trees"
    if any(getattr(config, name, None) for name in _NOISES):
        return "its experts add noise while training, which the responses of a prompt would share"
    if not model._supports_attention_backend or config.model_type in _OWN_ATTENTION:
        return "its attention does not go through transformers' attention interface"
    if not model._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None:
        return "its attention is more than scaled dot products"
    if implementation not in ("sdpa", "eager", NAME):
        return f"its source asks for attn_implementation: {implementation}"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no position ids"
    return None
