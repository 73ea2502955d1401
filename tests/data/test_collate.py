import dataclasses
import pickle

import numpy as np
import pytest
import torch

from bfpo_pl.data.collate import Collator, collate
from bfpo_pl.data.trees import PairTree

PAIR = PairTree([1, 2, 3], [[4, 5], [6]], ((0, 1),), {"safe": (1.0, 0.0)}, {"gap": (0.5,)}, "a:1")
TREE = PairTree([7], [[8], [9, 9], [10]], ((2, 0), (1, 0)), {"safe": (0.25, 1.0, 0.0)}, {"gap": (1.0, 2.0)}, "b:1")
SINGLE = PairTree([1], [[2, 3]], origin="c:1")


def test_layout_by_hand():
    batch = collate([(0, PAIR), (1, TREE)], ["safety", "help"], [1.0, 0.5])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 1]
    assert batch.segment_start.tolist() == [0, 3, 5, 6, 7, 8, 10]
    assert batch.segment_length.tolist() == [3, 2, 1, 1, 1, 2, 1]
    assert batch.response_segment.tolist() == [1, 2, 4, 5, 6]
    assert batch.prompt_segment.tolist() == [0, 0, 3, 3, 3]
    assert batch.response_stream.tolist() == [0, 0, 1, 1, 1]
    assert batch.pairs.tolist() == [[0, 1], [4, 2], [3, 2]]
    assert batch.pair_stream.tolist() == [0, 1, 1]
    assert batch.stream_weight.tolist() == [1.0, 0.5]
    assert batch.response_lengths.tolist() == [2, 1, 1, 2, 1]
    assert (batch.streams, batch.origins) == (("safety", "help"), ("a:1", "b:1"))
    assert batch.annotations["chosen_safe"].tolist() == [1.0, 0.0, 1.0]
    assert batch.annotations["rejected_safe"].tolist() == [0.0, 0.25, 0.25]
    assert batch.annotations["gap"].tolist() == [0.5, 1.0, 2.0]
    integers = [batch.tokens, batch.positions, batch.segment_start, batch.pairs, batch.pair_stream]
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert {batch.stream_weight.dtype, batch.annotations["safe"].dtype} == {torch.float32}


def test_no_pairs_and_no_rows():
    batch = collate([(0, SINGLE)], ["sft"], [1.0])
    assert batch.pairs.shape == (0, 2)
    assert batch.response_segment.tolist() == [1]
    empty = Collator(("a",), (1.0,), ("safe",), ("gap",))([])
    assert empty.pairs.shape == (0, 2)
    assert empty.response_segment.shape == empty.tokens.shape == (0,)
    assert empty.annotations["chosen_safe"].shape == empty.annotations["gap"].shape == (0,)


def test_a_column_must_be_everywhere():
    with pytest.raises(ValueError, match="c:1: the row has no column 'safe'"):
        collate([(0, PAIR), (1, SINGLE)], ["a", "b"], [1, 1])
    batch = collate([(0, PAIR), (1, SINGLE)], ["a", "b"], [1, 1], columns=[], pair_columns=[])
    assert batch.annotations.response == {}


def test_pickles():
    collator = pickle.loads(pickle.dumps(Collator(("a", "b"), (1.0, 1.0), ("safe",), ("gap",))))
    batch = pickle.loads(pickle.dumps(collator([(0, PAIR), (1, TREE)])))
    assert batch.pairs.tolist() == [[0, 1], [4, 2], [3, 2]]


@pytest.mark.parametrize("ks", [(), (1,), (2, 2), (3, 1, 2)], ids=str)
def test_plain_numbers_of_a_batch_are_those_that_its_tables_give(ks):
    generator = np.random.default_rng(0)
    trees = [
        PairTree([5] * int(generator.integers(1, 9)), [[7] * int(generator.integers(1, 9)) for _ in range(k)])
        for k in ks
    ]
    batch = collate([(0, tree) for tree in trees], ["only"], [1.0])
    names = ("max_length", "response_tokens", "most_responses", "key_tokens", "in_order")
    again = dataclasses.replace(
        batch, max_length=-1, response_tokens=-1, most_responses=-1, key_tokens=-1, in_order=False
    )
    assert [getattr(batch, name) for name in names] == [getattr(again, name) for name in names]


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        (PairTree([], [[5, 6], [7]], ((0, 1),), origin="rows.jsonl, line 3"), "the prompt, .*, has no token"),
        (PairTree([5], [[6], []], ((0, 1),), origin="rows.jsonl, line 3"), "a response has no token"),
    ],
)
def test_what_has_no_token_is_refused(tree, what):
    """Attention backends would disagree on it."""
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 3: {what}"):
        collate([(0, PairTree([5], [[7]])), (0, tree)], ["only"], [1.0])
