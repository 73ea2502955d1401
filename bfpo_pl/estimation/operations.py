"""Operations of matrix products and of attention; everything else is small beside them, and not counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # defines its operators
from torch import Tensor
from torch.utils.flop_counter import flop_registry

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Products of attention that are quadratic in the length: Q·Kᵀ and P·V; in the backward pass Q·Kᵀ once more, since P is
not kept, and the gradients of V, P, Q and K."""


def operations(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """How many multiplications and additions an operator takes; 0 for all but products and attention.

    Products ``[n, k] × [k, m]`` take 2·n·k·m, as torch's own counter has it.

    Args:
        func: The operator.
        args: Its arguments.
        kwargs: Those by name.
        result: What it returned.
    """
    packet = func._overloadpacket
    own = _ATTENTION.get(packet)
    if own is not None:  # torch counts pairs that a causal kernel skips
        return own(*args, **kwargs)
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


def attention_operations(heads: int, width: int, value_width: int, pairs: float, products: int) -> float:
    """Operations of attention over pairs of a query and a key that it sees.

    Each product multiplies and adds along the width of a head (or sums over keys), 2 operations for each pair and each
    element; half of them go along the width of queries and keys, half along that of values, or nearly so.

    Args:
        heads: Heads of queries.
        width: Elements of a query's or key's head.
        value_width: Elements of a value's head.
        pairs: Pairs of a query and a key, over the batch.
        products: How many products.
    """
    return products * heads * pairs * (width + value_width)


def seen_pairs(queries: float, keys: float, causal: bool) -> float:
    """Pairs that are computed: of q queries that end with the last of k keys, the i-th from the end sees k − i.

    Args:
        queries: Their number.
        keys: Their number.
        causal: Whether a query sees keys up to its own place alone; kernels skip the others. Under a mask they do not.
    """
    return queries * keys - queries * (queries - 1) / 2 if causal else queries * keys


def _flash_for_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> float:
    return _dense(query, key, value, causal, FORWARD_PRODUCTS)


def _flash_for_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalisers: Tensor,
    dropout: float,
    causal: bool,
    **_: Any,
) -> float:
    return _dense(query, key, value, causal, BACKWARD_PRODUCTS)


def _dense(query: Tensor, key: Tensor, value: Tensor, causal: bool, products: int) -> float:
    batch, heads, queries, width = query.shape
    pairs = batch * seen_pairs(queries, key.shape[2], causal)
    return attention_operations(heads, width, value.shape[3], pairs, products)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *_: Any, **__: Any
) -> float:
    return _ragged(query, value, query_ends, key_ends, FORWARD_PRODUCTS)


def _varlen_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> float:
    query_ends, key_ends = [each for each in rest if isinstance(each, Tensor) and each.dtype == torch.int32][:2]
    return _ragged(query, value, query_ends, key_ends, BACKWARD_PRODUCTS)


def _ragged(query: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, products: int) -> float:
    queries, keys = query_ends.diff().tolist(), key_ends.diff().tolist()
    pairs = sum(seen_pairs(q, k, True) for q, k in zip(queries, keys, strict=True))
    return attention_operations(query.shape[1], query.shape[2], value.shape[2], pairs, products)


_ATTENTION: dict[Any, Callable[..., float]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_for_cpu_backward,
    torch.ops.torch_attn._varlen_attn: _varlen,
    torch.ops.torch_attn._varlen_attn_backward: _varlen_backward,
}
