"""Log-probs of responses: the one thing that the rest of the code asks of a network.

Only the positions that predict a response token meet the vocabulary (:mod:`bfpo_pl.models.head`).
"""

from __future__ import annotations

from types import MethodType
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bfpo_pl.batch import PairBatch
from bfpo_pl.component import UserError, check_range
from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.attention import AttentionBackend, Padded
from bfpo_pl.models.cudnn import turn_off_cudnn_attention
from bfpo_pl.models.head import head_logits, token_log_probs


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
        attention: The attention backend, with the network prepared for it.
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
    response, offset = batch.response_token_table()
    targets = batch.tokens[batch.segment_start[batch.response_segment][response] + offset]
    values = token_log_probs(model, states, targets, chunk_size)
    # Scattered to a padded table and summed by rows: unlike index_add, the same sum on every device, every time.
    table = values.new_zeros(len(batch), batch.max_length)
    sums = table.index_put((response, offset), values).sum(dim=1)
    return sums / batch.response_lengths if reduction == "mean" else sums


METHODS = ("response_log_probs", "head_discrepancy", "attention_discrepancy")
"""Methods that `bind_log_probs` adds; a sharded network must have them registered as forward methods."""


def bind_log_probs(
    model: PreTrainedModel,
    attention: AttentionBackend,
    reduction: Literal["sum", "mean"] = "sum",
    chunk_size: int = 4096,
) -> None:
    """Gives a network the methods ``METHODS``, in place: a sharded root gathers its parameters only in its own methods.

    ``response_log_probs(batch)`` is :func:`response_log_probs` with these settings, ``response_log_probs(batch,
    reduction)`` with another reduction; ``head_discrepancy(device)`` and ``attention_discrepancy(device)`` are
    the functions of those names. The attention backend prepares the network.

    Raises:
        UserError: The network has no part below its output head where transformers says it is.
    """
    check_range(model, "chunk_size", chunk_size, 1)
    if model.base_model is model:
        raise UserError(
            f"{type(model).__name__} cannot be used: transformers says that its network below the output head is "
            f"'{model.base_model_prefix}', and it has nothing of that name. Name another model."
        )
    turn_off_cudnn_attention()
    attention = attention.prepare(model)

    def log_probs(self: PreTrainedModel, batch: PairBatch, reduction: Literal["sum", "mean"] = reduction) -> Tensor:
        return response_log_probs(self, batch, attention, reduction, chunk_size)

    def discrepancy(self: PreTrainedModel, device: torch.device) -> Tensor:
        return attention_discrepancy(self, device, attention)

    model.response_log_probs = MethodType(log_probs, model)  # type: ignore[assignment]
    model.head_discrepancy = MethodType(head_discrepancy, model)  # type: ignore[assignment]
    model.attention_discrepancy = MethodType(discrepancy, model)  # type: ignore[assignment]


@torch.no_grad()
def head_discrepancy(model: PreTrainedModel, device: torch.device) -> Tensor:
    """Largest difference between the model's own logits and `head_logits` on a few tokens, relative to their spread.

    Anything but rounding means that the model does something to its logits that `head_logits` does not know.

    Args:
        model: A causal language model.
        device: Where it computes; weights that are offloaded are elsewhere.
    """
    tokens = torch.tensor([_distinct_tokens(model, 8)], device=device)
    training = model.training
    model.eval()  # two passes are compared, which active dropout would tell apart
    try:
        own = model(input_ids=tokens, use_cache=False).logits[0]
        ours = head_logits(model, model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0])
    finally:
        model.train(training)
    own, ours = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (own, ours))
    return (own - ours).abs().max() / own.std().clamp(min=1e-6)


@torch.no_grad()
def attention_discrepancy(model: PreTrainedModel, device: torch.device, attention: AttentionBackend) -> Tensor:
    """Difference of the final hidden states under an attention backend from those of plain rows, relative to them.

    Anything but rounding means that the network attends in a way that the backend does not know, so that responses may
    have seen each other. Root mean squares: in half precision a few of many states differ by more than the rest. Of a
    backend that chooses among others, the largest difference of those it may choose.

    Args:
        model: A causal language model.
        device: Where it computes.
        attention: The attention backend, with the network prepared for it.
    """
    batch = _two_trees(model).to(device)
    training = model.training
    model.eval()
    try:
        plain = Padded().predicting_states(model.base_model, batch).double()
        routes = [route.predicting_states(model.base_model, batch).double() for route in attention.routes(device)]
    finally:
        model.train(training)
    return torch.stack([(states - plain).norm() for states in routes]).max() / plain.norm()


def _distinct_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Token ids, the same for all ranks and batches: among equal ones it would not show who sees whom."""
    vocabulary = model.config.get_text_config().vocab_size
    return [place * vocabulary // (count + 1) for place in range(1, count + 1)]


def _two_trees(model: PreTrainedModel) -> PairBatch:
    """A batch of two prompts with three responses and two, of different lengths.

    No response has a single token: nothing is predicted at it, so it could see what it would.
    """
    ids = _distinct_tokens(model, 17)
    trees = [PairTree(ids[:3], [ids[3:5], ids[5:8], ids[8:10]]), PairTree(ids[10:12], [ids[12:15], ids[15:]])]
    return collate([(0, tree) for tree in trees], ["check"], [1.0])
