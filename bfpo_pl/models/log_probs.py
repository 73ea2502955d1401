"""Log-probs of responses: the one thing that the rest of the code asks of a network.

Only the positions that predict a response token meet the vocabulary, a chunk at a time, and each chunk's logits are
computed again in the backward pass; a ``[tokens, vocabulary]`` tensor never exists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import Component, check_range


class AttentionBackend(Component, ABC):
    """How a network attends over the pair trees of a batch."""

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
        prompt_length = batch.segment_length[batch.prompt_segment][:, None]
        response_length = batch.response_lengths[:, None]
        column = torch.arange(batch.max_length, device=batch.tokens.device)[None, :]
        index = torch.where(
            column < prompt_length,
            batch.segment_start[batch.prompt_segment][:, None] + column,
            batch.segment_start[batch.response_segment][:, None] + column - prompt_length,
        )
        index = torch.where(column < prompt_length + response_length, index, 0)
        hidden = backbone(input_ids=batch.tokens[index], use_cache=False).last_hidden_state  # [R, L, H]
        response, offset = token_table(batch)
        return hidden[response, prompt_length[response, 0] - 1 + offset]


def token_table(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Response index ``[N]`` and place within its response ``[N]`` of every response token."""
    lengths = batch.response_lengths
    response = torch.arange(len(lengths), device=lengths.device)
    response = response.repeat_interleave(lengths, output_size=batch.response_tokens)
    first = lengths.cumsum(0) - lengths
    offset = torch.arange(batch.response_tokens, device=lengths.device) - first[response]
    return response, offset


def response_log_probs(
    model: PreTrainedModel,
    batch: PairBatch,
    attention: AttentionBackend,
    reduction: Literal["sum", "mean"] = "sum",
    chunk_size: int = 4096,
) -> Tensor:
    """Log-prob of every response given its prompt, in nats.

    Args:
        model: A causal language model of transformers.
        batch: The pair trees.
        attention: The attention backend.
        reduction: Over the tokens of a response: their sum, or their mean. The paper sums.
        chunk_size: Response tokens that meet the vocabulary at once.

    Returns:
        ``[R]`` in float32 (float64 for a float64 model), accumulated in that type.
    """
    if len(batch) == 0:
        # A rank without rows still takes part in the collectives of sharded layers.
        dummy = model.base_model(input_ids=batch.tokens.new_zeros(1, 1), use_cache=False).last_hidden_state
        return token_log_probs(model, dummy[0], dummy.new_zeros(1, dtype=torch.long), chunk_size)[:0]
    states = attention.predicting_states(model.base_model, batch)
    response, offset = token_table(batch)
    targets = batch.tokens[batch.segment_start[batch.response_segment][response] + offset]
    values = token_log_probs(model, states, targets, chunk_size)
    # Scattered to a padded table and summed by rows: unlike index_add, the same sum on every device, every time.
    table = values.new_zeros(len(batch), batch.max_length)
    sums = table.index_put((response, offset), values).sum(dim=1)
    return sums / batch.response_lengths if reduction == "mean" else sums


def token_log_probs(model: PreTrainedModel, states: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """``[N]``, log-prob of each target token from the hidden state ``[N, H]`` that predicts it, chunk by chunk."""

    def chunk_log_probs(chunk: Tensor, chunk_targets: Tensor) -> Tensor:
        logits = head_logits(model, chunk)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(1, chunk_targets[:, None])[:, 0] - logits.logsumexp(dim=1)

    chunks = zip(states.split(chunk_size), targets.split(chunk_size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([chunk_log_probs(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(chunk_log_probs, *chunk, use_reentrant=False) for chunk in chunks])


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits ``[N, V]`` from final hidden states ``[N, H]``, scaled and soft-capped as the model's config says."""
    logits = model.get_output_embeddings()(states)
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


METHODS = ("response_log_probs", "head_discrepancy")
"""Methods that `bind_log_probs` adds; a sharded network must have them registered as forward methods."""


def bind_log_probs(
    model: PreTrainedModel,
    attention: AttentionBackend,
    reduction: Literal["sum", "mean"] = "sum",
    chunk_size: int = 4096,
) -> None:
    """Gives a network the methods ``METHODS``, in place: a sharded root gathers its parameters only in its own methods.

    ``response_log_probs(batch)`` is :func:`response_log_probs` with these settings; ``head_discrepancy(tokens)`` is
    :func:`head_discrepancy`.
    """
    check_range(model, "chunk_size", chunk_size, 1)

    def log_probs(self: PreTrainedModel, batch: PairBatch) -> Tensor:
        return response_log_probs(self, batch, attention, reduction, chunk_size)

    model.response_log_probs = MethodType(log_probs, model)  # type: ignore[assignment]
    model.head_discrepancy = MethodType(head_discrepancy, model)  # type: ignore[assignment]


@torch.no_grad()
def head_discrepancy(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Largest difference between the model's own logits and `head_logits` on tokens ``[T]``, relative to their spread.

    Anything but rounding means that the model does something to its logits that `head_logits` does not know.
    """
    training = model.training
    model.eval()  # two passes are compared, which active dropout would tell apart
    try:
        own = model(input_ids=tokens[None], use_cache=False).logits[0]
        ours = head_logits(model, model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0])
    finally:
        model.train(training)
    own, ours = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (own, ours))
    return (own - ours).abs().max() / own.std().clamp(min=1e-6)
