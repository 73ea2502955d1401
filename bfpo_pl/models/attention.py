"""How a network attends over the pair trees of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import Component, RunError
from bfpo_pl.models.packed_rows import no_packed_rows
from bfpo_pl.models.tree_attention import NAME, TreeRows, tree_obstacle


class AttentionBackend(Component, ABC):
    """How a network attends over the pair trees of a batch."""

    def prepare(self, model: PreTrainedModel) -> AttentionBackend:
        """Readies a network for this backend, once, before it is sharded.

        Returns:
            The backend to run the network with: this one, or another if the network cannot be run with this one.
        """
        return self

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


class Unfold(AttentionBackend):
    """Every token once, the prompt too; queries, keys and values are laid out in rows for attention alone.

    All linear layers see the tokens of the batch in one row without padding. Each attention layer unfolds that row to
    one row for each response, prompt before it, attends causally in them, and folds the results back: responses of a
    prompt cannot see each other. Sliding windows, soft caps, scaling and grouped heads are the model's. A network that
    cannot be run this way is run by `Padded` instead, and the log says why.
    """

    def prepare(self, model: PreTrainedModel) -> AttentionBackend:
        obstacle = tree_obstacle(model)
        if obstacle is not None:
            _say_once(f"Attention: Padded, since {type(model).__name__} cannot be run on pair trees: {obstacle}.")
            return Padded()
        model.config._attn_implementation = NAME
        return self

    def predicting_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        if backbone.config._attn_implementation != NAME:  # type: ignore[union-attr]
            raise RunError("Unfold was given a network that it has not prepared; call its prepare(model) first.")
        rows = TreeRows(batch)
        hidden = backbone(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=rows.marker,
            pair_rows=rows,
            use_cache=False,
        ).last_hidden_state[0]
        rows.check_used(backbone)
        response, offset = batch.response_token_table()
        # The first token of a response is predicted at its prompt's end, each other one at the token before.
        prompt_end = batch.segment_start[batch.prompt_segment] + batch.segment_length[batch.prompt_segment] - 1
        before = batch.segment_start[batch.response_segment][response] + offset - 1
        return hidden[torch.where(offset == 0, prompt_end[response], before)]


class Auto(AttentionBackend):
    """`Unfold` for batches where it saves enough, else `Padded`; `Padded` for networks that cannot unfold.

    A batch saves what its prompts share and what padding would take: it is unfolded if it has at most ``LARGEST_SHARE``
    as many tokens as the rows of `Padded` have cells.
    """

    LARGEST_SHARE = 0.9
    """Unfolding costs copies of queries, keys and values; a few per cent of the tokens do not pay for them."""

    def __init__(self) -> None:
        self._unfold = Unfold()
        self._padded = Padded()

    def prepare(self, model: PreTrainedModel) -> AttentionBackend:
        chosen = self._unfold.prepare(model)
        if chosen is not self._unfold:
            return chosen
        _say_once(
            f"Attention of {type(model).__name__}: Unfold (prompts once, no padding) for batches where that leaves at "
            f"most {self.LARGEST_SHARE:.0%} of the tokens, else Padded."
        )
        return self

    def predicting_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        unfolds = len(batch.tokens) <= self.LARGEST_SHARE * len(batch) * batch.max_length
        return (self._unfold if unfolds else self._padded).predicting_states(backbone, batch)


_said: set[str] = set()


def _say_once(message: str) -> None:
    """Logs a message; policy and references would otherwise say the same."""
    if message not in _said:
        _said.add(message)
        rank_zero_info(message)
