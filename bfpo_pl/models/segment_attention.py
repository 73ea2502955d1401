"""Attention over pair trees without rows of padding: each response's queries over its prompt's and its own keys.

A prompt attends together with its first response. Every further response has queries of its own tokens alone, and keys
of its prompt and itself: its last query stands at its last key.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from bfpo_pl.batch import PairBatch
from bfpo_pl.models.device_type import device_type, is_planned
from bfpo_pl.models.tree_attention import Copies, Scores, TreeLayout, TreeRows, in_compute_dtype, soft_capped

_ARGUMENTS = {"scale", "window_size", "enable_gqa"}
"""What the kernel is given besides tensors and sizes; torch added them one after the other."""


class SegmentLoop(TreeLayout):
    """One call of SDPA for each response, on slices of the token row. For the CPU, where lengths are at hand.

    Args:
        batch: The pair trees, in order (:attr:`~bfpo_pl.batch.PairBatch.in_order`); at least one response.
    """

    def __init__(self, batch: PairBatch) -> None:
        super().__init__(batch)
        prompts = batch.segment_length[batch.prompt_segment]
        first = batch.first_of_prompt
        self.prompts: list[int] = prompts.where(~first, 0).tolist()
        """For each response, tokens of the prompt that its queries lack; 0 for those that come with their prompt."""
        self.queries: list[int] = (batch.response_lengths + prompts.where(first, 0)).tolist()
        """For each response, how many queries it has."""
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        query, key, value = in_compute_dtype(query, key, value)
        outputs: list[Tensor] = []
        first_key, first_value = key, value
        slices = zip(*(states.split(self.queries, dim=2) for states in (query, key, value)), strict=True)
        for prompt, (q, k, v) in zip(self.prompts, slices, strict=True):
            if prompt:
                k = torch.cat([first_key[:, :, :prompt], k], dim=2)
                v = torch.cat([first_value[:, :, :prompt], v], dim=2)
            else:
                first_key, first_value = k, v
            outputs.append(self._attend(q, k, v, scores))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()  # as transformers' own: some layers view it

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of one response, ``[1, heads, queries, D]``."""
        queries, keys = query.shape[2], key.shape[2]
        window = keys if scores.window is None else min(scores.window, keys)
        if scores.softcap is not None:
            return soft_capped(query, key, value, self.mask(queries, keys, window), scores).transpose(1, 2)
        causal = queries == keys == window
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if causal else self.mask(queries, keys, window),
            dropout_p=scores.dropout,
            is_causal=causal,
            scale=scores.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def mask(self, queries: int, keys: int, window: int) -> Tensor:
        """``[queries, keys]``, True where a query may see a key; the last query stands at the last key."""
        name = (queries, keys, window)
        if name not in self._masks:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
            self._masks[name] = (distance >= 0) & (distance < window)
        return self._masks[name]


class PackedSegments(TreeLayout):
    """One call of a kernel for sequences of different lengths, with queries and keys counted apart.

    Layers that the kernel cannot run attend in :class:`~bfpo_pl.models.tree_attention.TreeRows`; ``obstacle`` then says
    why.

    Args:
        batch: The pair trees, in order (:attr:`~bfpo_pl.batch.PairBatch.in_order`); at least one response.
    """

    def __init__(self, batch: PairBatch) -> None:
        super().__init__(batch)
        device = batch.tokens.device
        start = batch.segment_start[torch.where(batch.first_of_prompt, batch.prompt_segment, batch.response_segment)]
        prompts, responses = batch.segment_length[batch.prompt_segment], batch.response_lengths
        lengths = prompts + responses
        ends = lengths.cumsum(0)
        response = torch.arange(len(batch), device=device)
        response = response.repeat_interleave(lengths, output_size=batch.key_tokens)
        offset = torch.arange(batch.key_tokens, device=device) - (ends - lengths)[response]
        prompt_start, own_start = batch.segment_start[batch.prompt_segment], batch.segment_start[batch.response_segment]
        in_prompt = offset < prompts[response]
        tokens = offset + torch.where(in_prompt, prompt_start[response], (own_start - prompts)[response])
        self.copies = Copies.of(batch, tokens, response, torch.ones_like(in_prompt))
        """The keys of each response, its prompt's before its own, one response after the other."""
        self.query_ends = functional.pad(start, (0, 1), value=len(batch.tokens)).int()
        """``[R + 1]``, where the queries of each response start in the token row, and its length."""
        self.key_ends = functional.pad(ends, (1, 0)).int()
        """``[R + 1]``, the same for keys, in the cells of ``copies``."""
        self.length = batch.max_length
        self.obstacle: str | None = None
        self._batch = batch
        self._rows: TreeRows | None = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        query, key, value = in_compute_dtype(query, key, value)
        obstacle = varlen_obstacle(query, value, scores)
        if obstacle is not None:
            self.obstacle = obstacle
            self._rows = self._rows or TreeRows(self._batch)
            return self._rows.attend(module, query, key, value, scores)
        # The kernel's window counts the tokens to the left of a token, without itself.
        left = -1 if scores.window is None or scores.window >= self.length else scores.window - 1
        output: Tensor = varlen_attn(  # type: ignore[assignment]
            query[0].transpose(0, 1),
            self.copies(key),
            self.copies(value),
            self.query_ends,
            self.key_ends,
            self.length,
            self.length,
            scale=scores.scaling,
            window_size=(left, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[None]


def device_obstacle(device: torch.device) -> str | None:
    """Why the kernel for sequences of different lengths cannot run on a device; None if it can."""
    if (kind := device_type(device)) != "cuda":
        return f"its kernel runs on CUDA devices alone, not on {kind}"
    if lacking := _ARGUMENTS - set(inspect.signature(varlen_attn).parameters):
        return f"this torch's kernel lacks {', '.join(sorted(lacking))}, which torch 2.13 has"
    if is_planned():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"its kernel needs compute capability 8.0, and the device has {major}.{minor}"


def varlen_obstacle(query: Tensor, value: Tensor, scores: Scores) -> str | None:
    """Why the kernel for sequences of different lengths cannot run a layer; None if it can.

    Args:
        query: ``[1, heads, T, D]``, in the type of the computation.
        value: Likewise.
        scores: What the layer makes of the products of queries and keys.
    """
    width = query.shape[-1]
    if (obstacle := device_obstacle(query.device)) is not None:
        return obstacle
    if {query.dtype, value.dtype} - {torch.bfloat16, torch.float16} or query.dtype != value.dtype:
        return f"its kernel computes in bfloat16 or float16, not in {query.dtype}".replace("torch.", "")
    if width > 256 or width % 8 or value.shape[-1] != width:
        return f"its kernel takes heads of a width up to 256 that 8 divides, not {width} ({value.shape[-1]} for values)"
    if scores.softcap is not None:
        return "its kernel has no soft cap"
    if scores.dropout > 0:
        return "its kernel has no dropout"
    return None
