"""Keys of responses, and the store of their log-probs: on disk, damaged, and asked for what it has not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import batch_of, trees_of

from bfpo_pl.data.trees import PairTree
from bfpo_pl.models.log_prob_store import LogProbStore, batch_keys, response_keys, tree_keys

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


def test_a_batch_has_the_keys_of_its_trees_whatever_the_type_of_their_ids():
    trees = trees_of(2, 1, 3, 2)
    arrays = [
        PairTree(np.array(t.prompt_ids, np.int32), [np.array(ids, np.int32) for ids in t.response_ids], t.pairs)
        for t in trees
    ]
    keys = tree_keys(trees)
    assert len(set(keys.tolist())) == 8
    assert np.array_equal(batch_keys(batch_of(trees)), keys)
    assert np.array_equal(batch_keys(batch_of(arrays)), keys)
    assert np.array_equal(tree_keys(arrays), keys)
    assert batch_keys(batch_of([])).shape == (0,)


@given(IDS, IDS, IDS, IDS)
def test_keys_are_equal_only_for_equal_prompts_and_responses(prompt, response, other_prompt, other_response):
    same = (prompt, response) == (other_prompt, other_response)
    assert (response_keys(prompt, [response]) == response_keys(other_prompt, [other_response])) == same
    moved = response_keys([*prompt, response[0]], [response[1:]])
    assert response_keys(prompt, [response]) != moved


def filled(folder, count=10):
    store = LogProbStore(folder)
    keys = np.arange(count, dtype=np.uint64)[::-1] * np.uint64(2**60)
    store.add(keys[:6], np.linspace(-9.1, -1, 6), np.arange(1, 7))
    store.write()
    store.add(keys[6:8], np.linspace(-20.3, -11, count - 6)[:2], np.arange(7, 9))
    store.add(keys[8:], np.linspace(-20.3, -11, count - 6)[2:], np.arange(9, count + 1))
    store.write()
    return keys, np.concatenate([np.linspace(-9.1, -1, 6), np.linspace(-20.3, -11, count - 6)])


def test_what_was_added_is_found_now_and_by_others(tmp_path):
    keys, sums = filled(tmp_path)
    for store in (LogProbStore(tmp_path),):
        known, found, lengths = store.find(np.concatenate([keys, [np.uint64(3)]]))
        assert known.tolist() == [True] * 10 + [False]
        assert np.array_equal(found[:10], sums)
        assert lengths[:10].tolist() == list(range(1, 11))
    assert len(LogProbStore(tmp_path)) == 10
    assert len(LogProbStore(tmp_path / "elsewhere")) == 0
    assert not LogProbStore(tmp_path / "elsewhere").find(keys)[0].any()


def test_what_is_not_written_is_in_memory_alone(tmp_path):
    store = LogProbStore(tmp_path)
    store.add(np.array([4], np.uint64), np.array([-2.5]), np.array([3]))
    assert store.find(np.array([4], np.uint64))[1].tolist() == [-2.5]
    assert len(LogProbStore(tmp_path)) == 0
    store.write()
    store.write()  # nothing new
    assert len(LogProbStore(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "no file of ours"])
def test_a_damaged_part_is_removed_and_the_others_stay(tmp_path, damage):
    keys, sums = filled(tmp_path)
    path = sorted(tmp_path.glob("*.arrow"))[0]
    content = bytearray(path.read_bytes())
    (place,) = (content.find(value.tobytes()) for value in [next(s for s in sums if s.tobytes() in content)])
    content[place] ^= 1
    path.write_bytes(
        {
            "a flipped bit": bytes(content),
            "cut": bytes(content[: len(content) // 2]),
            "empty": b"",
            "no file of ours": b"nonsense" * 100,
        }[damage]
    )
    with pytest.warns(UserWarning, match="is damaged; what was in it is computed again"):
        store = LogProbStore(tmp_path)
    known, found, _ = store.find(keys)
    assert len(store) == known.sum()
    assert known.sum() in (4, 6)
    assert np.array_equal(found[known], sums[known])
    assert not path.exists()
