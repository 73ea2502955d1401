import zlib
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from bfpo_pl.component import UserError
from bfpo_pl.data import Columns, LocalFiles
from bfpo_pl.data.streams import FixedBatches, SequentialSampler, Stream, StreamOrder, StreamSampler

SIZES = {"safety": 22, "help": 7, "more": 100}
QUOTAS = {"safety": 4, "help": 3, "more": 2}


def sampler(rank=0, world=1, quotas=QUOTAS, **kwargs):
    return StreamSampler(FixedBatches(SIZES, quotas, "safety", seed=3, world=world), rank, **kwargs)


def epochs(it, count):
    return [batch for _ in range(count) for batch in it]


def test_an_order_is_one_permutation_after_the_other():
    order = StreamOrder("help", 7, seed=0)
    rows = order.rows(0, 28)
    passes = [rows[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(taken) == list(range(7)) for taken in passes)
    assert len({tuple(taken) for taken in passes}) == 4
    assert all(order.rows(a, b) == rows[a:b] for a in range(28) for b in range(a, 28))
    assert StreamOrder("help", 7, seed=1).rows(0, 28) != rows
    assert StreamOrder("other", 7, seed=0).rows(0, 28) != rows


def test_batches_are_cut_from_the_seeded_permutations():
    def order(name, passes):
        generators = [np.random.default_rng([3, zlib.crc32(name.encode()), number]) for number in range(passes)]
        return [row for generator in generators for row in generator.permutation(SIZES[name]).tolist()]

    safety, helpful, more = (order(name, 6) for name in SIZES)
    expected = []
    for number in range(12):
        epoch, within = divmod(number, 6)
        own = safety[22 * epoch + 4 * within : 22 * epoch + min(4 * within + 4, 22)]
        others = helpful[3 * number : 3 * number + 3], more[2 * number : 2 * number + 2]
        expected.append([(index, row) for index, rows in enumerate((own, *others)) for row in rows])
    assert epochs(sampler(), 2) == expected


def test_the_driver_sets_the_epoch_and_the_others_go_on():
    batches = epochs(sampler(), 3)
    assert len(sampler()) == 6
    assert len(batches) == 18
    for epoch in range(3):
        driver = [row for batch in batches[6 * epoch : 6 * epoch + 6] for stream, row in batch if stream == 0]
        assert sorted(driver) == list(range(22))
    assert [sum(stream == 0 for stream, _ in batch) for batch in batches[:6]] == [4, 4, 4, 4, 4, 2]
    helpful = [row for batch in batches for stream, row in batch if stream == 1]
    assert len(helpful) == 18 * 3
    assert all(sorted(helpful[at : at + 7]) == list(range(7)) for at in range(0, 49, 7))
    more = [row for batch in batches for stream, row in batch if stream == 2]
    assert len(set(more)) == 36


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_out_the_global_batches(world):
    ranks = [epochs(sampler(rank, world), 3) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    whole = epochs(sampler(quotas={name: quota * world for name, quota in QUOTAS.items()}), 3)
    for number, union in enumerate(whole):
        parts = [batches[number] for batches in ranks]
        assert Counter(key for part in parts for key in part) == Counter(union)
        driver = [row for part in parts for stream, row in part if stream == 0]
        assert len(driver) == len(set(driver))
        assert all(sum(stream == 1 for stream, _ in part) == 3 for part in parts)


def test_a_rank_may_get_none_of_the_drivers_rows():
    batches = FixedBatches({"a": 5}, {"a": 2}, "a", world=2)
    ranks = [list(StreamSampler(batches, rank)) for rank in range(2)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[2, 1], [2, 0]]


def test_resume_at_every_position():
    whole = epochs(sampler(), 4)
    for start in range(len(whole)):
        consumed = [start]
        resumed = sampler(start=lambda consumed=consumed: consumed[0])
        assert len(resumed) == 6
        seen = []
        while len(seen) < len(whole) - start:
            taken = list(resumed)
            seen += taken
            consumed[0] += len(taken)
        assert seen == whole[start:]


def test_shorter_epochs():
    short = sampler(epoch_batches=4)
    assert epochs(short, 3) == epochs(sampler(), 2)
    assert epochs(sampler(epoch_batches=2, repeat=True), 2) == 2 * epochs(sampler(), 1)[:2]
    assert [len(list(sampler(epoch_batches=share))) for share in (1.0, 0.7, 0.5, 0.01)] == [6, 4, 3, 1]
    assert [len(list(sampler(epoch_batches=number))) for number in (100, 6, 1)] == [6, 6, 1]


def test_the_seed_alone_decides():
    assert epochs(sampler(), 1) == epochs(sampler(), 1)
    assert epochs(sampler(), 1) != epochs(StreamSampler(FixedBatches(SIZES, QUOTAS, "safety", seed=4)), 1)
    with pytest.raises(ValueError, match="rank"):
        sampler(rank=2, world=2)


def streaming(driver, **kwargs):
    sizes = {"stream": None, "help": 7}
    return [
        StreamSampler(FixedBatches(sizes, {"stream": 3, "help": 2}, driver, world=2), rank, **kwargs)
        for rank in range(2)
    ]


def test_a_driver_that_streams_has_one_endless_epoch():
    ranks = streaming("stream")
    with pytest.raises(TypeError):
        len(ranks[0])
    for rank, batches in enumerate(ranks):
        taken = list(islice(batches, 50))
        positions = [row for batch in taken for stream, row in batch if stream == 0]
        assert positions == list(range(rank, 300, 2))
        assert all(sum(stream == 1 for stream, _ in batch) == 2 for batch in taken)
        resumed = StreamSampler(batches.batches, rank, start=lambda: 17)
        assert list(islice(resumed, 33)) == taken[17:]
    whole = list(islice(streaming("stream")[0], 12))
    assert epochs(streaming("stream", epoch_batches=4)[0], 3) == whole
    assert epochs(streaming("stream", epoch_batches=4, repeat=True)[0], 2) == 2 * whole[:4]


def test_a_stream_beside_the_driver_goes_on_over_epochs():
    batches = epochs(streaming("help")[0], 3)
    assert len(batches) == 6
    assert [row for batch in batches for stream, row in batch if stream == 0] == list(range(0, 36, 2))


def test_a_share_of_an_endless_epoch_is_refused():
    with pytest.raises(UserError, match=r"limit_train_batches = 0\.5 .* whole number"):
        streaming("stream", epoch_batches=0.5)
    with pytest.raises(UserError, match="overfit_batches"):
        streaming("stream", repeat=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("weight", -1.0),
        ("fraction", 0.0),
        ("fraction", 1.5),
        ("take", "last"),
        ("take_seed", -1),
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("duplicates", "count"),
        ("shuffle_buffer", 0),
    ],
)
def test_what_a_stream_cannot_be(name, value):
    source, adapter = LocalFiles("rows.jsonl"), Columns()
    with pytest.raises(UserError, match=f"Stream: {name} must .* not {value!r}"):
        Stream(**{"source": source, "adapter": adapter, "batch_size": 1, name: value})
    Stream(
        source, adapter, 1, fraction=1.0, take="random", validation_fraction=0.0, duplicates="drop", shuffle_buffer=1
    )


def test_validation_goes_in_order():
    assert list(SequentialSampler([(0, 5), (2, 1)], 2)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)], [(2, 0)]]
    ranks = [SequentialSampler([(0, 5), (2, 1)], 2, rank, 2) for rank in range(2)]
    assert [list(rank) for rank in ranks] == [[[(0, 0), (0, 2)], [(0, 4)], [(2, 0)]], [[(0, 1), (0, 3)], [], []]]
    assert {len(rank) for rank in ranks} == {3}
