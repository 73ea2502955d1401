"""Attention over pair trees as an attention function of transformers: rows of responses out of one row of tokens."""

from __future__ import annotations

import inspect
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
"""Name of the attention function. Without `TreeRows` it is transformers' SDPA: a network can generate with it."""


class TreeRows:
    """Where each token of a batch stands in the rows of its responses, and what passes it on to the attention layers.

    Args:
        batch: The pair trees; at least one response.
    """

    def __init__(self, batch: PairBatch) -> None:
        index, inside = batch.row_table()  # [R, L]
        responses, length = index.shape
        device = index.device
        prompt = batch.prompt_segment
        # How many responses of the same prompt come before each one: a prompt's token is in the row of each of them.
        earlier = (prompt[:, None] == prompt[None, :]).tril(-1).sum(dim=1)
        column = torch.arange(length, device=device)[None, :]
        copy = torch.where(column < batch.segment_length[prompt][:, None], earlier[:, None], 0)
        cell = torch.arange(responses * length, device=device).view(responses, length)
        outside = len(batch.tokens)
        cells = torch.full((batch.most_responses, outside + 1), -1, device=device)
        cells[copy.where(inside, 0), index.where(inside, outside)] = cell
        cells = cells[:, :outside]
        self.shape = (responses, length)
        self.tokens = index.flatten()
        """``[R · L]``, the token in each cell; some token in padding."""
        self.taken = cells >= 0
        self.cells = cells.clamp(min=0)
        """``[K, T]``, the cells of each token, those of the first response's row first; where ``taken`` alone."""
        self.first = (self.cells[0][index] == cell).flatten() & inside.flatten()
        """``[R · L]``, whether a cell is its token's first."""
        # Transformers passes a 4D mask on as it is. Any layer that applied this one would give NaN.
        self.marker = torch.full((1, 1, 1, 1), float("nan"), device=device)
        self.layers = 0
        self._masks: dict[int, Tensor] = {}

    def check_used(self, backbone: nn.Module) -> None:
        """Checks, after a forward pass, that every layer attended in these rows.

        Raises:
            RunError: Some did not, so responses may have seen each other.
        """
        expected = backbone.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
        if self.layers < expected:
            raise RunError(
                f"Only {self.layers} of {expected} layers of {type(backbone).__name__} attend by transformers' "
                "attention interface. Set model.attention to Padded."
            )

    def mask(self, window: int) -> Tensor:
        """``[L, L]``, True where a query (first) may see a key: not after it, and less than ``window`` before it."""
        if window not in self._masks:
            place = torch.arange(self.shape[1], device=self.tokens.device)
            distance = place[:, None] - place[None, :]
            self._masks[window] = (distance >= 0) & (distance < window)
        return self._masks[window]


class _ToRows(torch.autograd.Function):
    """Tokens ``[T, D]`` to cells ``[R · L, D]``. Its backward pass adds up copies in one order, every time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: TreeRows) -> Tensor:
        ctx.rows = rows
        return tokens.index_select(0, rows.tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        rows, (gradient,) = ctx.rows, outputs
        total = gradient.index_select(0, rows.cells[0]).masked_fill_(~rows.taken[0][:, None], 0.0)
        for cells, taken in zip(rows.cells[1:], rows.taken[1:], strict=True):
            total += gradient.index_select(0, cells).masked_fill_(~taken[:, None], 0.0)
        return total, None


class _ToTokens(torch.autograd.Function):
    """Cells ``[R · L, D]`` to tokens ``[T, D]``, each from its first cell."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rows: TreeRows) -> Tensor:
        ctx.rows = rows
        return cells.index_select(0, rows.cells[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        rows, (gradient,) = ctx.rows, outputs
        return gradient.index_select(0, rows.tokens).masked_fill_(~rows.first[:, None], 0.0), None


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
    pair_rows: TreeRows | None = None,
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
        pair_rows: The rows to attend in.
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
        return _soft_capped(query, key, value, attention_mask, scaling, dropout, softcap), None
    for name in ("s_aux", "position_bias", "cache", "head_mask"):
        if kwargs.get(name) is not None:
            raise RunError(f"{type(module).__name__} passes '{name}', unknown to pair rows: set attention to Padded.")
    pair_rows.layers += 1
    responses, length = pair_rows.shape
    windowed = sliding_window is not None and sliding_window < length
    query, key, value = (_unfolded(states, pair_rows) for states in (query, key, value))
    if softcap is not None:
        mask = pair_rows.mask(sliding_window if windowed else length)  # type: ignore[arg-type]
        output = _soft_capped(query, key, value, mask, scaling, dropout, softcap)
    else:
        mask = pair_rows.mask(sliding_window)[None, None] if windowed else None  # type: ignore[arg-type,assignment]
        output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=True)
    heads, width = output.shape[2:]
    folded = _ToTokens.apply(output.reshape(responses * length, heads * width), pair_rows)
    return folded.view(1, -1, heads, width), None


def _unfolded(states: Tensor, rows: TreeRows) -> Tensor:
    """Queries, keys or values ``[1, heads, T, D]`` in the rows of responses, ``[R, heads, L, D]``."""
    _, heads, tokens, width = states.shape
    cells = _ToRows.apply(states[0].transpose(0, 1).reshape(tokens, heads * width), rows)
    return cells.view(*rows.shape, heads, width).transpose(1, 2)


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, dropout: float, softcap: float
) -> Tensor:
    """Attention with soft-capped scores, which SDPA has not: ``[B, L, heads, D]``. The mask is boolean."""
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = functional.dropout(weights.to(value.dtype), p=dropout)
    return (weights @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, pair_rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

_LAYERS = {"full_attention", "sliding_attention"}


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
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    if not model._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None:
        return "its attention is more than scaled dot products"
    if implementation not in ("sdpa", "eager", NAME):
        return f"its source asks for attn_implementation: {implementation}"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "it takes no position ids"
    return None
