"""The tensors' vocabulary: what a batch, its annotations, its log-probs and its labels are.

Everything downstream of the data speaks in these four dataclasses. Shapes use three letters:
``R`` responses in the batch, ``P`` pairs among them, ``T`` tokens of all segments together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REFERENCE = "reference"
"""Name of the frozen model that the KL anchor is measured against; further references have other names."""


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to tensors, in dicts and nested dataclasses too; leaves plain data alone."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mapped = {f.name: _mapped(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **mapped)
    return value


def membership(index: Tensor, count: int) -> Tensor:
    """``[count, N]`` bool, which of N units belong to each of ``count`` groups, by the index ``[N]`` of their own.

    Like a one-hot code, whose check of the range would wait for the device.
    """
    return torch.arange(count, device=index.device)[:, None] == index[None, :]


@dataclass(frozen=True)
class Annotations:
    """What is known about the responses of a batch besides their tokens, as named columns.

    Args:
        pairs: ``[P, 2]`` int64, indices (chosen, rejected) into the ``R`` responses.
        response: Per-response columns, each ``[R]`` float32, for instance ``safe`` or ``score``.
        pair: Per-pair columns, each ``[P]`` float32.
    """

    pairs: Tensor
    response: dict[str, Tensor] = field(default_factory=dict)
    pair: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_pairs(cls, **columns: Tensor) -> Annotations:
        """Annotations of pairs alone, for use without a model, in a notebook or a test.

        Args:
            **columns: Per-pair columns ``[P]``, for instance ``chosen_safe`` and ``rejected_safe``.
        """
        tensors = {name: torch.as_tensor(column) for name, column in columns.items()}
        tensors = {
            name: column if column.is_floating_point() else column.to(torch.get_default_dtype())
            for name, column in tensors.items()
        }
        size = len(next(iter(tensors.values())))
        return cls(pairs=torch.arange(2 * size).view(size, 2), pair=tensors)

    def __contains__(self, name: str) -> bool:
        if name in self.pair or name in self.response:
            return True
        side, _, column = name.partition("_")
        return side in ("chosen", "rejected") and column in self.response

    def __getitem__(self, name: str) -> Tensor:
        """Returns a column by name.

        A per-pair column comes as it is, ``[P]``; ``chosen_X`` and ``rejected_X`` look the response column ``X`` up
        through the pair table, ``[P]``; the name of a response column gives that column, ``[R]``.

        Raises:
            KeyError: The batch has no such column; the message lists those it has.
        """
        if name in self.pair:
            return self.pair[name]
        side, _, column = name.partition("_")
        if side in ("chosen", "rejected") and column in self.response:
            return self.response[column][self.pairs[:, 0 if side == "chosen" else 1]]
        if name in self.response:
            return self.response[name]
        known = sorted({*self.pair, *self.response})
        raise KeyError(f"The batch has no column '{name}'. Its columns: {', '.join(known) or 'none'}.")


@dataclass(frozen=True)
class Window:
    """What the micro-batches of one optimizer step have on this process, as far as denominators need it.

    Args:
        annotations: Those of all micro-batches, one after the other.
        pair_stream: ``[P]`` int64, index of each pair's stream.
        response_stream: ``[R]`` int64, index of each response's stream.
        response_lengths: ``[R]`` int64, tokens in each response.
        size: Micro-batches that a step has; the last step of an epoch may have fewer.
    """

    annotations: Annotations
    pair_stream: Tensor
    response_stream: Tensor
    response_lengths: Tensor
    size: int

    @classmethod
    def of(cls, batches: Sequence[PairBatch], size: int | None = None) -> Window:
        """The window that some micro-batches make.

        Args:
            batches: The micro-batches, all with the same columns.
            size: Micro-batches that a step has. Default: as many as there are.
        """
        tables = [batch.annotations for batch in batches]
        counts = [len(batch) for batch in batches]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        return cls(
            annotations=Annotations(
                pairs=torch.cat([table.pairs + first for table, first in zip(tables, firsts, strict=True)]),
                response={name: torch.cat([table.response[name] for table in tables]) for name in tables[0].response},
                pair={name: torch.cat([table.pair[name] for table in tables]) for name in tables[0].pair},
            ),
            pair_stream=torch.cat([batch.pair_stream for batch in batches]),
            response_stream=torch.cat([batch.response_stream for batch in batches]),
            response_lengths=torch.cat([batch.response_lengths for batch in batches]),
            size=len(batches) if size is None else size,
        )

    def pin_memory(self) -> Window:
        """The window in page-locked memory."""
        return _mapped(self, Tensor.pin_memory)


@dataclass(frozen=True)
class PairBatch:
    """A batch of pair trees: each prompt once, then its responses, which attend to it and not to each other.

    The tokens of all segments (prompts and responses) lie in one row, ``[T]``, without padding; tables say what is
    where. How attention is computed over them is the business of an attention backend
    (:mod:`bfpo_pl.models.attention`), not of the batch.

    Args:
        tokens: ``[T]`` int64, token ids of all segments, one after the other.
        positions: ``[T]`` int64, position ids; every response of a prompt starts where the prompt ended.
        segment_start: ``[S]`` int64, where each segment starts in ``tokens``.
        segment_length: ``[S]`` int64, how many tokens each segment has.
        response_segment: ``[R]`` int64, the segment of each response.
        prompt_segment: ``[R]`` int64, the segment of each response's prompt.
        response_stream: ``[R]`` int64, index of each response's stream in ``streams``.
        pair_stream: ``[P]`` int64, index of each pair's stream in ``streams``.
        annotations: Columns of flags and scores, and the pair table.
        stream_weight: ``[K]`` float32, weight of each stream's loss in the sum over streams.
        streams: Names of the ``K`` data streams, in the order of the indices.
        origins: For each pair tree, in order, where its row came from (file and line); for messages alone.
        max_length: Tokens of the longest prompt and response together. Plain number, so that no step waits for the
            device; computed if not given.
        response_tokens: Tokens of all responses together, likewise.
        most_responses: Responses of the prompt that has most, likewise.
        key_tokens: Tokens of all responses together, each with its prompt, likewise.
        in_order: Whether the tokens are those of each prompt followed by its responses, and of nothing else, likewise.
        window: What all micro-batches of the optimizer step have, where gradients are accumulated.
    """

    tokens: Tensor
    positions: Tensor
    segment_start: Tensor
    segment_length: Tensor
    response_segment: Tensor
    prompt_segment: Tensor
    response_stream: Tensor
    pair_stream: Tensor
    stream_weight: Tensor
    annotations: Annotations
    streams: tuple[str, ...]
    origins: tuple[str, ...] = ()
    max_length: int = -1
    response_tokens: int = -1
    most_responses: int = -1
    key_tokens: int = -1
    in_order: bool = False
    window: Window | None = None

    def __post_init__(self) -> None:
        if self.response_tokens < 0:
            lengths = self.response_lengths
            whole = lengths + self.segment_length[self.prompt_segment]
            object.__setattr__(self, "response_tokens", int(lengths.sum()))
            object.__setattr__(self, "max_length", int(whole.max()) if len(whole) else 0)
            counts = self.prompt_segment.bincount()
            object.__setattr__(self, "most_responses", int(counts.max()) if len(counts) else 0)
            object.__setattr__(self, "key_tokens", int(whole.sum()))
            object.__setattr__(self, "in_order", self._is_in_order())

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.response_segment)

    @property
    def pairs(self) -> Tensor:
        """``[P, 2]`` int64, indices (chosen, rejected) into the responses."""
        return self.annotations.pairs

    @property
    def first_of_prompt(self) -> Tensor:
        """``[R]`` bool, whether a response is the first of its prompt, in a batch whose tokens are in order."""
        prompt = self.prompt_segment
        return torch.cat([torch.ones_like(prompt[:1], dtype=torch.bool), prompt[1:] != prompt[:-1]])

    def _is_in_order(self) -> bool:
        lengths, first = self.segment_length, self.first_of_prompt
        # Segments go by as: a prompt before its first response, then responses.
        segment = torch.arange(len(first), device=first.device) + first.cumsum(0)
        return (
            len(lengths) == len(first) + int(first.sum())
            and torch.equal(self.response_segment, segment)
            and torch.equal(self.prompt_segment[first], segment[first] - 1)
            and torch.equal(self.segment_start, lengths.cumsum(0) - lengths)
            and len(self.tokens) == int(lengths.sum())
        )

    @property
    def response_lengths(self) -> Tensor:
        """``[R]`` int64, tokens in each response, the end-of-sequence token among them."""
        return self.segment_length[self.response_segment]

    def row_table(self) -> tuple[Tensor, Tensor]:
        """One row for each response, its prompt before it, padded on the right to ``L = max_length``.

        Returns:
            ``[R, L]`` int64, the index in ``tokens`` of each cell, 0 in padding; and ``[R, L]``, False in padding.
        """
        prompt_length = self.segment_length[self.prompt_segment][:, None]
        column = torch.arange(self.max_length, device=self.tokens.device)[None, :]
        index = torch.where(
            column < prompt_length,
            self.segment_start[self.prompt_segment][:, None] + column,
            self.segment_start[self.response_segment][:, None] + column - prompt_length,
        )
        inside = column < prompt_length + self.response_lengths[:, None]
        return torch.where(inside, index, 0), inside

    def response_token_table(self) -> tuple[Tensor, Tensor]:
        """Response index ``[N]`` and place within its response ``[N]`` of every response token."""
        lengths = self.response_lengths
        response = torch.arange(len(lengths), device=lengths.device)
        response = response.repeat_interleave(lengths, output_size=self.response_tokens)
        first = lengths.cumsum(0) - lengths
        offset = torch.arange(self.response_tokens, device=lengths.device) - first[response]
        return response, offset

    def to(self, *args: Any, **kwargs: Any) -> PairBatch:
        """The batch with every tensor moved, with the arguments of :meth:`torch.Tensor.to`."""
        return _mapped(self, lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> PairBatch:
        """The batch in page-locked memory (called by the DataLoader)."""
        return _mapped(self, Tensor.pin_memory)


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of the responses, the model's only output to the rest of the code.

    Args:
        policy: ``[R]`` float32, log-prob of each response under the policy, in nats.
        lengths: ``[R]`` int64, tokens in each response.
        pairs: ``[P, 2]`` int64, indices (chosen, rejected) into the responses.
        references: Log-probs ``[R]`` under each named frozen model. The KL anchor is named ``reference``.
    """

    policy: Tensor
    lengths: Tensor
    pairs: Tensor
    references: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_margin(cls, margin: Tensor) -> LogProbs:
        """Log-probs that have the given margins ``[P]``, for use without a model, in a notebook or a test."""
        size = len(margin)
        policy = torch.stack([margin, torch.zeros_like(margin)], dim=1).reshape(-1)
        return cls(
            policy=policy,
            lengths=torch.ones(2 * size, dtype=torch.long),
            pairs=torch.arange(2 * size).view(size, 2),
            references={REFERENCE: torch.zeros_like(policy)},
        )

    def log_ratio(self, reference: str = REFERENCE) -> Tensor:
        """``[R]``, log π(y) − log π_ref(y) of each response against the named reference."""
        return self.policy - self.references[reference]

    def margin(self, reference: str = REFERENCE) -> Tensor:
        """``[P]``, h = log-ratio of chosen minus log-ratio of rejected."""
        return self.chosen(self.log_ratio(reference)) - self.rejected(self.log_ratio(reference))

    def chosen(self, values: Tensor) -> Tensor:
        """``[P]``, the per-response ``values`` ``[R]`` of each pair's chosen response."""
        return values[self.pairs[:, 0]]

    def rejected(self, values: Tensor) -> Tensor:
        """``[P]``, the per-response ``values`` ``[R]`` of each pair's rejected response."""
        return values[self.pairs[:, 1]]


@dataclass(frozen=True)
class Label:
    """What a labeling function asks of the policy, for each unit (a pair; a response in unary methods).

    All in the sense chosen minus rejected.

    Args:
        target: ``[N]`` g. Its sign says who wins, its size how clearly; 0 counts in no accuracy.
        weight: ``[N]`` ≥ 0, multiplies the unit's loss; 0 drops the unit. Default: 1.
        offset: ``[N]``, subtracted from the scaled margin before the loss looks at it. Default: 0.
        probability: ``[N]`` in [0, 1], how probable it is that chosen wins. Default: 1, 1/2 or 0 by the sign of g.
    """

    target: Tensor
    weight: Tensor | None = None
    offset: Tensor | None = None
    probability: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """``[N]``, ``weight`` or ones."""
        return torch.ones_like(self.target) if self.weight is None else self.weight

    @property
    def offsets(self) -> Tensor:
        """``[N]``, ``offset`` or zeros."""
        return torch.zeros_like(self.target) if self.offset is None else self.offset

    @property
    def probabilities(self) -> Tensor:
        """``[N]``, ``probability``, or 1, 1/2, 0 by the sign of the target."""
        return (1 + torch.sign(self.target)) / 2 if self.probability is None else self.probability


@dataclass(frozen=True)
class Requirements:
    """What a labeling function or a loss needs; checked against the data and the model before weights load.

    Args:
        columns: Names of annotation columns, for instance ``chosen_safe``.
        references: Names of frozen reference models.
    """

    columns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    def __or__(self, other: Requirements) -> Requirements:
        columns = dict.fromkeys((*self.columns, *other.columns))
        references = dict.fromkeys((*self.references, *other.references))
        return Requirements(tuple(columns), tuple(references))
