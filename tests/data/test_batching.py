from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo_pl.component import UserError
from bfpo_pl.data.batching import Batching, LengthBuckets, TokenBudget
from bfpo_pl.data.streams import FixedBatches, StreamSampler


@st.composite
def mixtures(draw):
    """Some streams, the first of which drives, with the lengths of their rows."""
    names = "abc"[: draw(st.integers(1, 3))]
    sizes = {name: draw(st.integers(1, 40)) for name in names}
    quotas = {name: draw(st.integers(1, 4)) for name in names}
    seed, world = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    generator = np.random.default_rng(seed)
    lengths = {name: generator.integers(1, 50, size=size) for name, size in sizes.items()}
    return FixedBatches(sizes, quotas, "a", seed, world), lengths


batchings = st.one_of(
    st.just(Batching()),
    st.builds(LengthBuckets, window=st.integers(1, 6)),
    st.builds(TokenBudget, tokens=st.integers(1, 600)),
)


def flat(batch):
    return [key for rank in batch for key in rank]


def tokens(keys, lengths):
    return sum(int(list(lengths.values())[stream][row]) for stream, row in keys)


@settings(max_examples=150, deadline=None)
@given(mixtures(), batchings)
def test_an_epoch_has_the_rows_of_the_fixed_batches(mixture, batching):
    fixed, lengths = mixture
    batches = batching(fixed, lengths)
    first = 0
    for epoch in range(3):
        begin, end = batches.epoch(first)
        assert begin == first
        rows = [key for number in range(begin, end) for key in flat(batches.batch(number))]
        assert sorted(row for stream, row in rows if stream == 0) == list(range(fixed.orders[0].size))
        units = range(epoch * fixed.length, (epoch + 1) * fixed.length)
        assert Counter(rows) == Counter(key for unit in units for key in flat(fixed.batch(unit)))
        first = end


@settings(max_examples=150, deadline=None)
@given(mixtures(), batchings, st.sampled_from([1.0, 1, 2, 3, 50]), st.booleans(), st.data())
def test_resume_at_any_batch_gives_exactly_the_rest(mixture, batching, limit, repeat, data):
    fixed, lengths = mixture
    rank = data.draw(st.integers(0, fixed.world - 1))
    arguments = {"rank": rank, "epoch_batches": limit, "repeat": repeat}
    sampler = StreamSampler(batching(fixed, lengths), **arguments)
    whole = [list(sampler) for _ in range(4)]
    ends = np.cumsum([len(epoch) for epoch in whole]).tolist()
    consumed = data.draw(st.integers(0, ends[-1] - 1))
    resumed = StreamSampler(batching(fixed, lengths), start=lambda: consumed, **arguments)
    for epoch, end in zip(whole, ends, strict=True):
        if consumed < end:
            assert list(resumed) == epoch[consumed - end :]
            consumed = end
    if repeat:
        assert whole == [whole[0]] * 4
    assert limit == 1.0 or all(1 <= len(epoch) <= limit for epoch in whole)


@settings(max_examples=150, deadline=None)
@given(mixtures(), st.integers(1, 6))
def test_buckets_are_the_sorted_rows_of_a_window(mixture, window):
    fixed, lengths = mixture
    batches = LengthBuckets(window)(fixed, lengths)
    assert batches.length == fixed.length
    whole = fixed.orders[0].size // (fixed.quotas[0] * fixed.world)
    for epoch in range(2):
        for first in range(0, whole, window):
            numbers = [epoch * fixed.length + each for each in range(first, min(first + window, whole))]
            ours, theirs = ([flat(each.batch(number)) for number in numbers] for each in (batches, fixed))
            assert sorted(chain(*ours)) == sorted(chain(*theirs))
            spans = []
            for stream, name in enumerate(lengths):
                sizes = [[int(lengths[name][row]) for index, row in batch if index == stream] for batch in ours]
                assert {len(each) for each in sizes} == {fixed.quotas[stream] * fixed.world}
                spans.append([(min(each), max(each)) for each in sizes])
            order = sorted(range(len(numbers)), key=lambda place: [span[place] for span in spans])
            for span in spans:  # in one and the same order, every stream's batches lie one above the other
                assert all(span[a][1] <= span[b][0] for a, b in pairwise(order))
        for last in range(whole, fixed.length):
            number = epoch * fixed.length + last
            assert batches.batch(number) == fixed.batch(number)


def test_long_rows_meet_long_rows_and_ranks_are_balanced():
    fixed = FixedBatches({"a": 24, "b": 12}, {"a": 2, "b": 1}, "a", seed=1, world=2)
    lengths = {"a": np.arange(24) * 10, "b": np.arange(12)[::-1] * 7 + 1}
    batches = LengthBuckets(6)(fixed, lengths)
    epochs = [[batches.batch(number) for number in range(first, first + 6)] for first in (0, 6, 12)]
    places = [[ranks[0][0][1] // 4 for ranks in epoch] for epoch in epochs]
    assert all(sorted(each) == list(range(6)) for each in places)
    assert len({tuple(each) for each in places}) == 3
    for epoch, order in zip(epochs, places, strict=True):
        assert epoch == [
            [
                [(0, 4 * place), (0, 4 * place + 2), (1, 11 - 2 * place)],
                [(0, 4 * place + 1), (0, 4 * place + 3), (1, 10 - 2 * place)],
            ]
            for place in order
        ]


@settings(max_examples=150, deadline=None)
@given(mixtures(), st.integers(1, 600))
def test_a_budget_is_filled_with_whole_units(mixture, budget):
    fixed, lengths = mixture
    batches = TokenBudget(budget)(fixed, lengths)
    expected = []
    for epoch in range(3):
        held = None
        for unit in range(epoch * fixed.length, (epoch + 1) * fixed.length):
            ranks = fixed.batch(unit)
            joined = held and [have + more for have, more in zip(held, ranks, strict=True)]
            if joined and max(tokens(rank, lengths) for rank in joined) <= budget:
                held = joined
            else:
                expected += [held] if held else []
                held = ranks
        expected.append(held)
    assert [batches.batch(number) for number in range(len(expected))] == expected
    _, first_epoch = batches.epoch(0)
    largest = [max(tokens(rank, lengths) for rank in batch) for batch in expected[:first_epoch]]
    assert batches.oversized == [(number, size) for number, size in enumerate(largest) if size > budget]


def test_a_budget_by_hand():
    fixed = FixedBatches({"a": 5}, {"a": 1}, "a", seed=0)
    order = [row for number in range(5) for _, row in flat(fixed.batch(number))]
    lengths = np.zeros(5, dtype=np.int64)
    lengths[order] = [40, 60, 10, 101, 1]
    batches = TokenBudget(100)(fixed, {"a": lengths})
    numbers = range(*batches.epoch(0))
    assert [[row for _, row in flat(batches.batch(number))] for number in numbers] == [
        order[:2],
        order[2:3],
        order[3:4],
        order[4:],
    ]
    assert batches.oversized == [(2, 101)]
    assert batches.epoch(3) == (0, 4)
    assert [batches.epoch(number, limit=3) for number in range(4)] == [(0, 3), (0, 3), (0, 3), (3, 4)]
    sampler = StreamSampler(batches)
    with pytest.raises(TypeError):
        len(sampler)
    with pytest.raises(UserError, match="whole number"):
        StreamSampler(batches, epoch_batches=0.5)


def test_what_cannot_be():
    for bad in (lambda: LengthBuckets(0), lambda: TokenBudget(0)):
        with pytest.raises(UserError, match="must lie in"):
            bad()
    fixed = FixedBatches({"a": 4, "web": None}, {"a": 1, "web": 1}, "a")
    lengths = {"a": np.ones(4, dtype=np.int64)}
    assert Batching()(fixed, lengths) is fixed
    for batching in (LengthBuckets(), TokenBudget(10)):
        with pytest.raises(UserError, match=rf"{type(batching).__name__} .*'web'.*streams\.web\.source\.streaming"):
            batching(fixed, lengths)
    assert [repr(each) for each in (Batching(), LengthBuckets(8), TokenBudget(100))] == [
        "Batching()",
        "LengthBuckets(window=8)",
        "TokenBudget(tokens=100)",
    ]
