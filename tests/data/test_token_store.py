import pickle

import numpy as np
import pytest

from bfpo_pl.data import token_store
from bfpo_pl.data.adapters import Columns, Messages
from bfpo_pl.data.checked import check_rows
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.reading import Reading
from bfpo_pl.data.rows import RowError
from bfpo_pl.data.stored import StoredTrees
from bfpo_pl.data.token_store import tokenise
from bfpo_pl.data.truncation import Truncation

LONG = "these words are in both answers"


def raw(index):
    row = {"prompt": f"Open window {index}", "chosen": "a" * (index % 7 + 1), "rejected": f"No. {index}"}
    if index % 7 == 6:
        row["chosen"] = LONG
    if index % 5 == 3:
        row["chosen"], row["rejected"] = f"{LONG} one", f"{LONG} two"  # identical once they are cut
    return {**row, "chosen_safe": index % 2 == 0, "rejected_safe": 0.25, "chosen_score": index, "rejected_score": 0}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_store, "SHARD_ROWS", 4)
    monkeypatch.setattr(token_store, "_CHUNK", 3)
    monkeypatch.setattr(token_store, "_ROWS_WORTH_PROCESSES", 8)


@pytest.fixture
def encoder(kit):
    tokenizer = kit.byte_level()
    tokenizer.chat_template = kit.PLAIN
    return RowEncoder(tokenizer, truncation=Truncation(43, 28))


@pytest.fixture
def rows(tmp_path, write_jsonl):
    def read(count=21, name="rows.jsonl"):
        path = write_jsonl([raw(index) for index in range(count)], name)
        adapter = Columns(extras=["chosen_score", "rejected_score"])
        return check_rows(tmp_path / "rows", "x", LocalFiles(path), "train", adapter)

    return read


@pytest.mark.parametrize("processes", [1, 3])
def test_what_is_stored_is_what_the_encoder_gives(tmp_path, small_shards, encoder, rows, processes):
    checked, kept = rows(), np.arange(1, 21)
    expected = encoder.many(checked.rows(kept))
    counts = dict(encoder.counts)
    store = tokenise(tmp_path / "tokens", "x", checked, kept, encoder, processes)
    assert len(store) == 20
    good = [tree for tree in expected if not isinstance(tree, RowError)]
    assert 0 < len(good) < 20
    for number, tree in enumerate(expected):
        if isinstance(tree, RowError):
            continue
        prompt, responses = store[number]
        assert (prompt.dtype, prompt.tolist()) == (np.int32, tree.prompt_ids)
        assert [ids.tolist() for ids in responses] == tree.response_ids
    faults = [(n, e.field, e.value, e.reason, e.remedy) for n, e in enumerate(expected) if isinstance(e, RowError)]
    assert store.faults == faults
    assert store.counts["responses_cut"] == counts["responses_cut"] > 0
    assert (store.counts["prompts"], store.counts["responses"]) == (len(good), 2 * len(good))
    sizes = [len(tree.prompt_ids) + sum(map(len, tree.response_ids)) for tree in good]
    assert store.counts["tokens"] == sum(sizes) == store.lengths.sum()
    assert store.prompt_lengths.sum() + store.response_lengths.sum() == sum(sizes)
    again = pickle.loads(pickle.dumps(store))
    assert again[19][0].tolist() == expected[19].prompt_ids


def test_trees_of_a_stream(tmp_path, small_shards, encoder, rows):
    checked = rows()
    reading = Reading("mine", "train", checked, np.arange(1, 21))
    trees = StoredTrees(reading, tokenise(tmp_path / "tokens", "x", checked, reading.kept, encoder))
    expected = [tree for tree in encoder.many(checked.rows(range(1, 21))) if not isinstance(tree, RowError)]
    assert len(trees) == len(expected) == len(reading.kept)
    assert [fault.raw_index for fault in reading.faults] == [3, 8, 13, 18]
    assert reading.faults[0].origin.endswith("rows.jsonl:4")
    for ours, theirs in zip(trees.at(range(len(trees))), expected, strict=True):
        assert ours.prompt_ids.tolist() == theirs.prompt_ids
        assert [ids.tolist() for ids in ours.response_ids] == theirs.response_ids
        assert (list(ours.pairs), ours.origin) == ([(0, 1)], theirs.origin)
        assert {name: tuple(values) for name, values in ours.columns.items()} == theirs.columns
    sizes = [len(tree.prompt_ids) + sum(map(len, tree.response_ids)) for tree in expected]
    assert trees.lengths.tolist() == sizes
    assert [tree.origin for tree in trees.at([5, 0, 5])] == [expected[5].origin, expected[0].origin, expected[5].origin]


def test_supervised_rows_without_pairs(tmp_path, encoder, write_jsonl):
    turns = [{"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Yes."}]
    path = write_jsonl([{"messages": turns}] * 2)
    checked = check_rows(tmp_path / "rows", "x", LocalFiles(path), "train", Messages())
    reading = Reading("sft", "train", checked, np.arange(2))
    (tree, _) = StoredTrees(reading, tokenise(tmp_path / "tokens", "x", checked, reading.kept, encoder)).at([0, 1])
    assert (list(tree.pairs), len(tree.response_ids), tree.columns) == ([], 1, {})


def test_the_key_is_the_content(tmp_path, encoder, kit, rows):
    def folder(checked=None, kept=range(21), using=encoder):
        checked = rows() if checked is None else checked
        return tokenise(tmp_path / "tokens", "x", checked, np.array(kept), using).folder

    first = folder()
    moved = rows(name="moved.jsonl")
    assert moved.folder != rows().folder
    assert folder(moved) == first, "where rows come from does not matter"
    assert folder(kept=range(20)) != first
    assert folder(rows(22), range(21)) == first, "nor which other rows there are"
    assert folder(using=RowEncoder(encoder.tokenizer, truncation=Truncation(43, 29))) != first
    same = kit.byte_level()
    same.chat_template = kit.PLAIN
    assert folder(using=RowEncoder(same, truncation=Truncation(43, 28))) == first


def test_flags_and_scores_do_not_tokenise_again(tmp_path, encoder, write_jsonl):
    def folder(**changes):
        path = write_jsonl([{**raw(0), **changes}])
        checked = check_rows(tmp_path / "rows", "x", LocalFiles(path), "train", Columns())
        return tokenise(tmp_path / "tokens", "x", checked, np.arange(1), encoder).folder

    assert folder() == folder(chosen_safe=False)
    assert folder() != folder(chosen="other")


def test_finished_shards_are_kept(tmp_path, small_shards, encoder, rows, monkeypatch):
    done = []
    encoded = token_store._Work._encoded

    def counted(self, indices):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(indices[0])
        return encoded(self, indices)

    monkeypatch.setattr(token_store._Work, "_encoded", counted)
    checked = rows()
    with pytest.raises(KeyboardInterrupt):
        tokenise(tmp_path / "tokens", "x", checked, np.arange(21), encoder)
    done.clear()
    store = tokenise(tmp_path / "tokens", "x", checked, np.arange(21), encoder)
    assert done == [12, 16, 20]
    assert len(store) == 21
    assert store[2][0].tolist() == encoder(checked.rows([2])[0]).prompt_ids
    done.clear()
    tokenise(tmp_path / "tokens", "x", checked, np.arange(21), encoder)
    assert done == []


def test_a_shard_that_was_torn_is_made_again(tmp_path, small_shards, encoder, rows):
    checked = rows()
    store = tokenise(tmp_path / "tokens", "x", checked, np.arange(21), encoder)
    torn = store.folder / "tokens-00001.arrow"
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"tokens-00001\.arrow is damaged or gone; it is made again"):
        tokenise(tmp_path / "tokens", "x", checked, np.arange(21), encoder)
    assert torn.read_bytes() == whole
