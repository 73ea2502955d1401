"""How a network attends over the pair trees of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import Component, RunError
from bfpo_pl.models.device_type import device_type
from bfpo_pl.models.packed_rows import no_packed_rows
from bfpo_pl.models.segment_attention import PackedSegments, SegmentLoop, device_obstacle
from bfpo_pl.models.tree_attention import NAME, TreeLayout, TreeRows, tree_obstacle


class AttentionBackend(Component, ABC):
    """How a network attends over the pair trees of a batch."""

    def prepare(self, model: PreTrainedModel) -> AttentionBackend:
        """Readies a network for this backend, once, before it is sharded.

        Returns:
            The backend to run the network with: this one, or another if the network cannot be run with this one.
        """
        return self

    def routes(self, device: torch.device) -> tuple[AttentionBackend, ...]:
        """What may run a batch on a device: this backend, or, if it chooses among others, those besides `Padded`."""
        return (self,)

    @abstractmethod
    def predicting_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        """Final hidden states at the positions that predict each response token.

        Args:
            backbone: The network without its output head.
            batch: The pair trees; at least one response.

        Returns:
            ``[N, H]``, N = ``batch.response_tokens``, in the order of the responses and of the tokens within each.
        """


class Padded(AttentionBackend):
    """One row for each response, prompt before it, padded on the right: plain causal attention, right for any model.

    No mask and no positions are passed: under causal attention the padding on the right cannot be seen from the left.
    """

    def predicting_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        index, _ = batch.row_table()
        with no_packed_rows():
            hidden = backbone(input_ids=batch.tokens[index], use_cache=False).last_hidden_state  # [R, L, H]
        response, offset = batch.response_token_table()
        prompt_length = batch.segment_length[batch.prompt_segment]
        return hidden[response, prompt_length[response] - 1 + offset]


class TreeBackend(AttentionBackend, ABC):
    """Every token once, the prompt too; attention layers find the tokens of each response by a layout.

    All linear layers see the tokens of the batch in one row without padding. Responses of a prompt cannot see each
    other. Sliding windows, soft caps, scaling and grouped heads are the model's. A network that cannot be run this way
    is run by `Padded` instead, and the log says why.
    """

    def prepare(self, model: PreTrainedModel) -> AttentionBackend:
        obstacle = tree_obstacle(model)
        if obstacle is not None:
            _say_once(f"Attention: Padded, since {type(model).__name__} cannot be run on pair trees: {obstacle}.")
            return Padded()
        model.config._attn_implementation = NAME
        return self

    @abstractmethod
    def layout(self, batch: PairBatch) -> TreeLayout:
        """How attention layers find the tokens of each response of a batch, which has at least one."""

    def predicting_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        if backbone.config._attn_implementation != NAME:  # type: ignore[union-attr]
            name = type(self).__name__
            raise RunError(f"{name} was given a network that it has not prepared; call its prepare(model) first.")
        layout = self.layout(batch)
        hidden = backbone(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=layout.marker,
            pair_rows=layout,
            use_cache=False,
        ).last_hidden_state[0]
        layout.check_used(backbone)
        self.note(layout)
        response, offset = batch.response_token_table()
        # The first token of a response is predicted at its prompt's end, each other one at the token before.
        prompt_end = batch.segment_start[batch.prompt_segment] + batch.segment_length[batch.prompt_segment] - 1
        before = batch.segment_start[batch.response_segment][response] + offset - 1
        return hidden[torch.where(offset == 0, prompt_end[response], before)]

    def note(self, layout: TreeLayout) -> None:
        """Says what is to be said of a layout after a forward pass with it."""


class Unfold(TreeBackend):
    """Every token once, the prompt too; queries, keys and values are laid out in rows for attention alone.

    Each attention layer unfolds the row of tokens to one row for each response, prompt before it, attends causally in
    them, and folds the results back. Right on every device. A network that cannot be run this way is run by `Padded`
    instead, and the log says why.
    """

    def layout(self, batch: PairBatch) -> TreeLayout:
        return TreeRows(batch)


class Segments(TreeBackend):
    """Every token once, the prompt too; each response attends in a call of its own. For the CPU.

    No padding and no second computation of a prompt in attention either, but many calls, which suits few long
    responses. On other devices, `Unfold`. A network that cannot be run this way is run by `Padded` instead, and the log
    says why.
    """

    def layout(self, batch: PairBatch) -> TreeLayout:
        device = device_type(batch.tokens.device)
        if device != "cpu":
            _say_once(f"Attention: Unfold, since Segments is for the CPU, not for {device}.")
            return TreeRows(batch)
        return SegmentLoop(batch) if batch.in_order else TreeRows(batch)


class Varlen(TreeBackend):
    """Every token once, the prompt too; one attention kernel over responses of different lengths. For CUDA.

    Queries and keys are counted apart (`torch.nn.attention.varlen`): only keys and values of a prompt are copied for
    its further responses. Needs a device of compute capability 8.0, a computation in bfloat16 or float16, heads no
    wider than 256, and neither soft caps nor attention dropout; layers that lack this attend as in `Unfold`, and the
    log says why. A network that cannot be run on pair trees is run by `Padded` instead.

    The tables and masks are tested on the CPU against an emulation of the kernel's documented semantics; the kernel
    itself has not been run on a GPU yet.
    """

    def layout(self, batch: PairBatch) -> TreeLayout:
        return PackedSegments(batch) if batch.in_order else TreeRows(batch)

    def note(self, layout: TreeLayout) -> None:
        if isinstance(layout, PackedSegments) and layout.obstacle is not None:
            _say_once(f"Attention: Unfold in place of Varlen, since {layout.obstacle}.")


class Auto(AttentionBackend):
    """The fastest that fits: `Varlen` on CUDA, `Segments` on the CPU, else `Unfold`; `Padded` where that saves nothing.

    A batch saves what its prompts share and what padding would take: it is run by `Padded` if it has more than
    ``LARGEST_SHARE`` as many tokens as the rows of `Padded` have cells. `Varlen` is used for all batches. Networks that
    cannot be run on pair trees are run by `Padded`.
    """

    LARGEST_SHARE = 0.9
    """Copies of queries, keys and values have a cost; a few per cent of the tokens do not pay for them."""
    FEWEST_TOKENS = 64
    """On average over responses, what pays for the calls of `Segments`."""

    def __init__(self) -> None:
        self._padded, self._unfold, self._segments, self._varlen = Padded(), Unfold(), Segments(), Varlen()

    def prepare(self, model: PreTrainedModel) -> AttentionBackend:
        chosen = self._unfold.prepare(model)
        return self if chosen is self._unfold else chosen

    def routes(self, device: torch.device) -> tuple[AttentionBackend, ...]:
        if device_obstacle(device) is None:
            return (self._varlen,)
        return (self._unfold, self._segments) if device_type(device) == "cpu" else (self._unfold,)

    def choice(self, batch: PairBatch) -> AttentionBackend:
        """The backend for a batch, by its device and sizes."""
        device = batch.tokens.device
        if device_obstacle(device) is None:
            return self._varlen
        if len(batch.tokens) > self.LARGEST_SHARE * len(batch) * batch.max_length:
            return self._padded
        if device_type(device) == "cpu" and len(batch.tokens) >= self.FEWEST_TOKENS * len(batch):
            return self._segments
        return self._unfold

    def predicting_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        chosen = self.choice(batch)
        _say_once(f"Attention: Auto chose {type(chosen).__name__} {self._reasons[type(chosen)]}.")
        return chosen.predicting_states(backbone, batch)

    _reasons: ClassVar[dict[type, str]] = {
        Varlen: "(prompts once, no padding) on this device",
        Segments: "(prompts once, no padding, a call for each response) for batches of long responses",
        Unfold: f"(prompts once) for batches where that leaves at most {LARGEST_SHARE:.0%} of the tokens",
        Padded: f"for batches where prompts once would leave more than {LARGEST_SHARE:.0%} of the tokens",
    }


_said: set[str] = set()


def _say_once(message: str) -> None:
    """Logs a message; policy and references would otherwise say the same."""
    if message not in _said:
        _said.add(message)
        rank_zero_info(message)
