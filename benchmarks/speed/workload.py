"""What is timed: shapes of models, and preference pairs, drawn or real, as token ids."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from bfpo_pl.batch import PairBatch
from bfpo_pl.data.collate import collate
from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.sources import ModelSource

COLUMN = "reference_log_prob"
DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
SPECIAL = 3
"""Token ids below this one are padding, beginning and end."""


@dataclass(frozen=True)
class Shape:
    """Size of a Llama with random weights and an untied head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 1024),
    "quick": Shape(256, 2, 4, 2, 704, 8000),
    "small": Shape(512, 6, 8, 4, 1408, 32000),
    "1b": Shape(2048, 16, 32, 8, 8192, 32000),
    "7b": Shape(4096, 32, 32, 8, 11008, 32000),
}


@dataclass(frozen=True)
class Lengths:
    """Ranges of token counts, ends included, from which pairs are drawn evenly."""

    prompt: tuple[int, int]
    response: tuple[int, int]

    def scaled(self, factor: float) -> Lengths:
        """All ranges times a factor."""
        prompt, response = (tuple(max(1, round(factor * end)) for end in ends) for ends in (self.prompt, self.response))
        return Lengths(prompt, response)  # type: ignore[arg-type]


LENGTHS = {
    "pku_like": Lengths((20, 60), (30, 150)),
    "ultrafeedback_like": Lengths((50, 500), (100, 400)),
}
REAL = {
    "pku_real": "pku_saferlhf_pairs/pku_discordant_clean.jsonl",
    "hh_real": "hh_rlhf_harmless/harmless_base_test.jsonl",
}
LONGEST = 1024


class RandomModel(ModelSource):
    """A Llama of a shape with random weights, made in place on a device.

    Args:
        shape: Its size.
        device: Where its weights are made.
        dtype: Their type.
    """

    def __init__(self, shape: Shape, device: str = "cpu", dtype: str = "float32") -> None:
        self.shape = shape
        self.device = device
        self.dtype = dtype

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        raise NotImplementedError("a random model has no tokenizer")

    def load_model(self) -> PreTrainedModel:
        default = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(self.device):
                model = LlamaForCausalLM(self.shape.config())
        finally:
            torch.set_default_dtype(default)
        return model.float() if self.dtype == "float32" else model


def drawn(lengths: Lengths, vocabulary: int, count: int, seed: int) -> list[PairTree]:
    """Pairs of random tokens and of lengths drawn from the ranges."""
    draw = random.Random(seed)

    def ids(ends: tuple[int, int]) -> list[int]:
        return [draw.randrange(SPECIAL, vocabulary) for _ in range(draw.randint(*ends))]

    return [_tree(ids(lengths.prompt), ids(lengths.response), ids(lengths.response)) for _ in range(count)]


def _tree(prompt: list[int], chosen: list[int], rejected: list[int]) -> PairTree:
    return PairTree(prompt, [chosen, rejected], pairs=[(0, 1)], columns={"safe": [1.0, 0.0]})


def real(name: str, data: Path, vocabulary: int, count: int, seed: int) -> list[PairTree]:
    """Random pairs of a real file, tokenised by a byte-level BPE of half the vocabulary, trained on the file.

    Raises:
        FileNotFoundError: The file is not there.
    """
    texts = list(_texts(data / REAL[name]))
    encode = _tokenizer(texts[:2000], vocabulary // 2 - SPECIAL)
    trees = []
    for prompt, chosen, rejected in random.Random(seed).sample(texts, min(len(texts), 4 * count)):
        ids = [encode.encode(text).ids for text in (prompt, chosen, rejected)]
        # Each id of the small vocabulary stands for every second one of the model's.
        first, *responses = [[SPECIAL + 2 * token for token in sequence] for sequence in ids]
        responses = [[*response, 2] for response in responses]
        if first and responses[0] != responses[1] and len(first) + max(map(len, responses)) <= LONGEST:
            trees.append(_tree(first, *responses))
    return trees[:count]


def _texts(path: Path) -> Iterator[tuple[str, str, str]]:
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "prompt" in row:
                yield row["prompt"], row["response_0"], row["response_1"]
                continue
            turn = "\n\nAssistant:"
            (prompt, _, chosen), (other, _, rejected) = (row[side].rpartition(turn) for side in ("chosen", "rejected"))
            if prompt == other:
                yield prompt + turn, chosen, rejected


def _tokenizer(texts: list[tuple[str, str, str]], size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    return core


def batch_of(trees: list[PairTree], reference: Tensor | None = None) -> PairBatch:
    """The batch of pair trees, with the reference's log-probs ``[R]`` as a column if given."""
    batch = collate([(0, tree) for tree in trees], ["pairs"], [1.0])
    if reference is None:
        return batch
    response = {**batch.annotations.response, COLUMN: reference}
    return dataclasses.replace(batch, annotations=dataclasses.replace(batch.annotations, response=response))


def work_of(trees: list[PairTree], shape: Shape) -> dict[str, float]:
    """Counts of a batch: tokens with and without padding and shared prompts, and the floating-point work they mean.

    ``useful_gflop`` is what a step on the pair tree needs with a cached reference: 2 per weight and token forward, 4
    backward, for the linear layers over tree tokens and the head over response tokens, and 3 times 4 · width per
    layer, query and visible key for attention. Recomputing logits or activations is not useful and not counted.
    """
    rows = [(len(tree.prompt_ids), len(response)) for tree in trees for response in tree.response_ids]
    prompts = [len(tree.prompt_ids) for tree in trees]
    tokens = sum(prompts) + sum(response for _, response in rows)
    responses = sum(response for _, response in rows)
    width = shape.hidden // shape.heads * shape.heads
    narrow = shape.hidden // shape.heads * shape.kv_heads
    per_layer = 2 * shape.hidden * (width + narrow) + 3 * shape.hidden * shape.intermediate
    visible = sum(prompt * (prompt + 1) / 2 for prompt in prompts)
    visible += sum(response * prompt + response * (response + 1) / 2 for prompt, response in rows)
    linear = 2.0 * shape.layers * per_layer * tokens
    attention = 4.0 * shape.layers * width * visible
    head = 2.0 * shape.hidden * shape.vocabulary * responses
    return {
        "pairs": len(trees),
        "padded_cells": len(rows) * max(prompt + response for prompt, response in rows),
        "row_tokens": sum(prompt + response for prompt, response in rows),
        "tree_tokens": tokens,
        "response_tokens": responses,
        "useful_gflop": 3 * (linear + attention + head) / 1e9,
    }
