import numpy as np
import pytest

from bfpo_pl.component import UserError
from bfpo_pl.data.packing import DocumentPacking, OfficialPacking
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.data.trees import PairTree


class Documents:
    key = "documents"

    def __init__(self, sizes, responses=1):
        draw = np.random.default_rng(0)
        self.trees = [
            PairTree(
                draw.integers(0, 100, prompt).astype(np.int32),
                [draw.integers(0, 100, size).astype(np.int32) for _ in range(responses)],
                origin=f"row {index}",
            )
            for index, (prompt, size) in enumerate(sizes)
        ]
        self.lengths = np.array([prompt + responses * size for prompt, size in sizes])

    def __len__(self):
        return len(self.trees)

    def at(self, places):
        return [self.trees[place] for place in places]


SIZES = [(3, 4), (1, 1), (10, 30), (2, 5), (5, 3), (1, 7)]


@pytest.mark.parametrize("length", [2, 3, 7, 8, 16, 40, 72])
def test_blocks_are_the_documents_one_after_the_other(length):
    documents = Documents(SIZES)
    order = np.random.default_rng(7).permutation(len(SIZES))
    in_order = [documents.trees[place] for place in order]
    whole = np.concatenate([part for tree in in_order for part in (tree.prompt_ids, tree.response_ids[0])])
    assert len(whole) == 72
    blocks = OfficialPacking(length, seed=7)(documents, "sft")
    assert len(blocks) == 72 // length
    assert blocks.dropped_tokens == 72 % length
    assert blocks.lengths.tolist() == [length] * len(blocks)
    found = blocks.at(range(len(blocks)))
    for tree in found:
        assert (len(tree.prompt_ids), len(tree.response_ids), len(tree.response_ids[0])) == (1, 1, length - 1)
    joined = np.concatenate([part for tree in found for part in (tree.prompt_ids, *tree.response_ids)])
    assert np.array_equal(joined, whole[: len(joined)])


def test_blocks_name_the_documents_in_them():
    order = np.random.default_rng(0).permutation(len(SIZES)).tolist()
    ends = np.cumsum([sum(SIZES[place]) for place in order])
    for place, block in enumerate(OfficialPacking(8)(Documents(SIZES), "sft").at(range(9))):
        first, last = (next(i for i, end in enumerate(ends) if end > token) for token in (8 * place, 8 * place + 7))
        assert block.origin == f"row {order[first]} to row {order[last]}"


def test_rows_that_cannot_be_packed():
    with pytest.raises(UserError, match=r"have 72 tokens together, less than one block of 100\. Lower"):
        OfficialPacking(100)(Documents(SIZES), "sft")
    with pytest.raises(UserError, match="length must lie in"):
        OfficialPacking(1)
    with pytest.raises(UserError, match="length must lie in"):
        DocumentPacking(0)


def test_official_packing_puts_the_loss_on_all_tokens():
    OfficialPacking().check(ChatTemplate(loss_on="all"))
    DocumentPacking().check(ChatTemplate())
    with pytest.raises(UserError, match=r"is response\. Set data\.template\.loss_on: all"):
        OfficialPacking().check(ChatTemplate())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 12, 40, 41, 100])
@pytest.mark.parametrize("responses", [1, 2])
def test_whole_documents_fill_blocks(length, responses):
    documents = Documents(SIZES, responses)
    blocks = DocumentPacking(length, seed=7)(documents, "sft")
    order = np.random.default_rng(7).permutation(len(SIZES)).tolist()
    expected: list[list[int]] = []
    for place in order:
        held = sum(documents.lengths[each] for each in expected[-1]) if expected else length
        if held + documents.lengths[place] > length:
            expected.append([])
        expected[-1].append(place)
    assert [[tree.origin for tree in blocks.at([place])] for place in range(len(blocks))] == [
        [f"row {place}" for place in block] for block in expected
    ]
    assert blocks.lengths.tolist() == [sum(documents.lengths[place] for place in block) for block in expected]
    longer = sum(size > length for size in documents.lengths)
    assert blocks.counts == {"blocks": len(expected), "documents_longer_than_a_block": longer}
    assert max(blocks.lengths) <= max(length, documents.lengths.max())
    assert [tree.origin for tree in blocks.at([len(blocks) - 1, 0])] == [
        f"row {place}" for block in (expected[-1], expected[0]) for place in block
    ]
    assert blocks.key != DocumentPacking(length, seed=8)(documents, "sft").key


def test_no_documents_make_no_blocks():
    assert len(DocumentPacking(8)(Documents([]), "sft")) == 0
