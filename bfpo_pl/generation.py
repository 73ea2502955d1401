"""Batched generation from chat prompts, with transformers' own loop and KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bfpo_pl.models.sharding import compute_device

PromptMessages = Sequence[dict[str, str]]
"""Messages up to and with the user's last turn, each with ``role`` and ``content``."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptMessages],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    synced: bool = False,
) -> list[str]:
    """Answers every prompt.

    The caller's random state and the model's training mode are left as they were.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Conversations to be answered.
        temperature: 0 for greedy decoding.
        max_new_tokens: Tokens at which an answer is cut.
        batch_size: Prompts at once.
        seed: Seed of the sampling.
        synced: Whether ranks that hold shards of the model generate together; they must pass equally many prompts.

    Returns:
        The answers' texts, without special tokens, in the order of the prompts.
    """
    encoded: list[Any] = [
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
        for messages in prompts
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    config = sampling(model, tokenizer, temperature, max_new_tokens)
    answers = [""] * len(prompts)
    training = model.training
    model.eval()
    device = compute_device(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                ids, mask = _left_padded([encoded[index] for index in chosen], config.pad_token_id, device)
                output: Any = model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced
                )
                texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text
    finally:
        model.train(training)
    return answers


def sampling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    max_new_tokens: int,
    top_p: float = 1.0,
) -> GenerationConfig:
    """Plain sampling from the model's own distribution: no top-k, no penalty, and no top-p unless asked for.

    Args:
        model: The model, whose generation config names the tokens that end an answer.
        tokenizer: Its tokenizer.
        temperature: 0 for greedy decoding.
        max_new_tokens: Tokens at which an answer is cut.
        top_p: Only the likeliest tokens of this total probability are drawn.
    """
    own: Any = getattr(model, "generation_config", None)
    stops = getattr(own, "eos_token_id", None)
    stops = tokenizer.eos_token_id if stops is None else stops
    first_stop = stops[0] if isinstance(stops, list) else stops
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_stop
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p} if temperature > 0 else {}
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, **drawing)


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
