import json
import pickle
import zlib
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo_pl.data import Columns, HubDataset, Source, Stream
from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.loading import Collating, Loader, TreesByStream
from bfpo_pl.data.reading import DataError
from bfpo_pl.data.rows import RowError
from bfpo_pl.data.streaming import StreamingRows
from bfpo_pl.data.streams import FixedBatches, StreamSampler
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.data.trees import PairTree


class Listed(Source):
    """Rows in memory, of which it counts how many were read."""

    streaming = True

    def __init__(self, raws):
        self.raws, self.reads, self.opens = raws, 0, 0

    def rows(self, split):
        assert split == "train"
        self.opens += 1
        for index, raw in enumerate(self.raws):
            self.reads += 1
            yield f"web:{index}", raw

    def has_split(self, split):
        return split == "train"


def raw(number, **changes):
    row = {"prompt": f"p{number}", "chosen": "yes", "rejected": "no", "chosen_safe": 1, "rejected_safe": 0}
    return {**row, **changes}


def number_of(row):
    return int(row.prompt[0].content[1:])


def encode(rows):
    """The number in the prompt as its only token; rows that say so are useless."""
    return [
        RowError(row.origin, "chosen", row.responses[0], "it is useless", "Mend it.")
        if row.responses[0] == "useless"
        else PairTree([number_of(row)], [[1], [2]], row.pairs, row.columns, row.pair_columns, row.origin)
        for row in rows
    ]


def streaming(raws, buffer=4, on_bad_row="fail", seed=5, adapter=None, **stream):
    source = raws if isinstance(raws, Source) else Listed(raws)
    settings = Stream(source, adapter or Columns(), 2, shuffle_buffer=buffer, **stream)
    return StreamingRows("web", settings, on_bad_row, seed, encode)


def at(rows, positions):
    return [tree.prompt_ids[0] for tree in rows.at(list(positions))]


def endless(numbers, buffer, passes, seed=5):
    """The order as it is documented, from whole passes in memory."""
    order = []
    for each in range(passes):
        for block in range(0, len(numbers), buffer):
            rows = numbers[block : block + buffer]
            generator = np.random.default_rng([seed, zlib.crc32(b"web"), each, block // buffer])
            order += [rows[place] for place in generator.permutation(len(rows))]
    return order


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.lists(st.lists(st.integers(0, 70), max_size=9), max_size=6))
def test_a_position_has_one_row_however_it_is_asked_for(size, buffer, calls):
    expected = endless(range(size), buffer, 71)
    rows = streaming([raw(number) for number in range(size)], buffer)
    for positions in calls:
        assert at(rows, positions) == [expected[position] for position in positions]


def test_each_pass_has_every_row_and_is_shuffled_afresh():
    rows = streaming([raw(number) for number in range(10)])
    passes = [at(rows, range(first, first + 10)) for first in range(0, 50, 10)]
    assert all(sorted(each) == list(range(10)) for each in passes)
    assert all(sorted(each[:4]) == [0, 1, 2, 3] for each in passes)
    assert len({tuple(each) for each in passes}) == 5
    assert at(streaming([raw(number) for number in range(10)], seed=6), range(50)) != [
        n for each in passes for n in each
    ]
    assert at(streaming([raw(number) for number in range(10)], buffer=1), range(20)) == 2 * list(range(10))


def test_reading_goes_forward_and_tokenises_only_what_is_asked_for():
    source, encoded = Listed([raw(number) for number in range(10)]), []
    settings = Stream(source, Columns(), 2, shuffle_buffer=4)
    rows = StreamingRows("web", settings, "fail", 5, lambda taken: encoded.append(len(taken)) or encode(taken))
    assert source.reads == 0
    rows.at([1])
    assert (source.opens, source.reads, encoded) == (1, 4, [1])
    rows.at([0, 3])
    assert (source.opens, source.reads, encoded) == (1, 4, [1, 2])
    rows.at(range(2, 30))
    assert (source.opens, source.reads) == (3, 30)
    assert sum(encoded) == 3 + 28
    rows.at([1000])  # far ahead, at the beginning of a pass: those between are not read
    assert (source.opens, source.reads) == (4, 34)
    rows.at([27])  # far back: the pass that has it, up to its second block
    assert (source.opens, source.reads) == (5, 42)


@pytest.mark.parametrize("position", [0, 3, 4, 9, 10, 23, 61])
def test_resume_at_a_position(position):
    raws = [raw(number) for number in range(10)]
    assert at(streaming(raws), range(position, position + 20)) == endless(range(10), 4, 9)[position : position + 20]


def test_ranks_read_disjoint_rows():
    def batches(rank, world, quota):
        sampler = StreamSampler(FixedBatches({"web": None}, {"web": quota}, "web", world=world), rank)
        rows = streaming([raw(number) for number in range(24)], buffer=5)
        return [at(rows, [row for _, row in batch]) for batch in islice(sampler, 12)]

    whole, ranks = batches(0, 1, 4), [batches(rank, 2, 2) for rank in range(2)]
    assert whole == [[rows[at] for at in (0, 1) for rows in pair] for pair in zip(*ranks, strict=True)]
    for first in (0, 6):  # six batches of four rows are a pass
        seen = [{row for batch in rank[first : first + 6] for row in batch} for rank in ranks]
        assert seen[0] | seen[1] == set(range(24))
        assert not seen[0] & seen[1]


BAD = [
    raw(0),
    RowError("web.jsonl:2", "line", "{", "it is not JSON", "Mend the line."),
    raw(1),
    raw(2, chosen=" "),
    raw(3, chosen_safe=2),
    raw(4),
    raw(5, chosen=""),
    raw(6),
]


def test_bad_rows_are_dropped_and_counted_once():
    rows = streaming(BAD, buffer=2, on_bad_row="drop")
    assert at(rows, range(20)) == endless([0, 1, 4, 6], 2, 5)
    at(rows, [0])
    assert rows.dropped == {
        "it is not JSON": 1,
        "the text is empty": 2,
        "a safety flag must be true, false, 0, 1 or a probability in [0, 1]": 1,
    }


def test_the_first_bad_row_stops_the_run():
    rows = streaming(BAD[:1] + BAD[2:], buffer=2)
    assert sorted(at(rows, range(2))) == [0, 1]
    for _ in range(2):  # asked again, it is read again
        with pytest.raises(DataError) as caught:
            rows.at([2])
        for part in ("'web'", "web:2", "chosen = ' '", "the text is empty", "data.on_bad_row: drop"):
            assert part in str(caught.value)
    with pytest.raises(DataError, match=r"web\.jsonl:2: line = '\{': it is not JSON\. Mend the line\."):
        streaming(BAD).at([0])


def test_a_row_that_is_useless_as_tokens_gives_way_to_the_next_of_its_block():
    raws = [raw(number, chosen="useless" if number in (1, 2, 6) else "yes") for number in range(8)]
    expected = []
    for block in np.reshape(endless(range(8), 4, 6), (-1, 4)).tolist():
        good = [next(n for n in block[at:] + block[:at] if n not in (1, 2, 6)) for at in range(4)]
        expected += good
    assert at(streaming(raws, on_bad_row="drop"), range(48)) == expected
    rows = streaming(raws, on_bad_row="drop")
    assert [at(rows, [position])[0] for position in reversed(range(48))] == expected[::-1]
    assert rows.dropped == {"it is useless": 3}
    with pytest.raises(DataError, match=r"web:[126]: chosen = 'useless': it is useless\. Mend it\."):
        streaming(raws).at(range(8))


def stand_ins(size, useless, buffer, passes):
    """The order with what stands in for useless rows, by plain loops over whole passes in memory."""
    order, blocks = endless(range(size), buffer, passes + 2), []
    for each in range(passes + 2):
        whole = order[each * size : (each + 1) * size]
        blocks += [whole[first : first + buffer] for first in range(0, size, buffer)]
    given = []
    for number, block in enumerate(blocks[: passes * -(-size // buffer)]):
        later = [n for each in blocks[number + 1 :] for n in each]
        for place in range(len(block)):
            given.append(next(n for n in [*block[place:], *block[:place], *later] if n not in useless))
    return given


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_block_without_a_useful_row_takes_the_next_useful_one(data):
    size, buffer = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    useless = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    raws = [raw(number, chosen="useless" if number in useless else "yes") for number in range(size)]
    expected = stand_ins(size, useless, buffer, 3)
    assert at(streaming(raws, buffer, "drop"), range(3 * size)) == expected
    rows = streaming(raws, buffer, "drop")
    for positions in data.draw(st.lists(st.lists(st.integers(0, 3 * size - 1), max_size=4), max_size=4)):
        assert at(rows, positions) == [expected[position] for position in positions]
    start = data.draw(st.integers(0, 2 * size))  # a run that goes on from there
    assert at(streaming(raws, buffer, "drop"), range(start, start + size)) == expected[start : start + size]


@pytest.mark.parametrize("step", [1, 3, 9])
def test_a_last_block_of_one_bad_row_does_not_stop_the_run(step):
    raws = [raw(number, chosen="useless" if number == 8 else "yes") for number in range(9)]  # 2 · 4 + 1
    rows = streaming(raws, 4, "drop")
    given = [n for first in range(0, 36, step) for n in at(rows, range(first, first + step))]
    order = endless(range(9), 4, 5)
    assert given == [order[position + 1] if order[position] == 8 else order[position] for position in range(36)]
    assert rows.summary()["dropped"] == {"it is useless": 1}


def test_blocks_without_a_useful_row_are_read_once():
    source = Listed([raw(number, chosen="yes" if number == 19 else "useless") for number in range(20)])
    rows = streaming(source, 2, "drop")
    assert [at(rows, [position]) for position in range(20)] == 20 * [[19]]
    assert (source.opens, source.reads) == (1, 20)


def test_a_source_without_a_row_that_is_useful_as_tokens_is_an_error():
    rows = streaming([raw(number, chosen="useless") for number in range(9)], 4, "drop")
    for position in (0, 5, 8):
        with pytest.raises(DataError, match=r"has no row to use in its train split: .* Dropped: 9 × it is useless\."):
            rows.at([position])


def test_a_row_must_have_the_columns_of_the_first():
    adapter = Columns(chosen_safe=None, rejected_safe=None)

    class Some(Columns):
        def __call__(self, raw, origin):
            row = super().__call__(raw, origin)
            return row if number_of(row) != 2 else adapter(raw, origin)

    raws = [raw(number) for number in range(4)]
    with pytest.raises(DataError, match=r"web:2: safe = None: the column 'safe' is missing here.*web\.assume_safe"):
        streaming(raws, adapter=Some()).at([0])
    rows = streaming(raws, adapter=Some(), on_bad_row="drop")
    assert at(rows, range(9)) == endless([0, 1, 3], 4, 3)
    flags = streaming(raws, adapter=adapter, assume_safe=True).at([0])[0].columns
    assert flags == {"safe": (1.0, 1.0)}


def test_a_source_without_a_good_row_is_an_error():
    with pytest.raises(DataError, match=r"'web' has no row to use in its train split: Listed\(raws=\[\]"):
        streaming([]).at([0])
    with pytest.raises(DataError, match=r"no row to use.*1 × it is not JSON"):
        streaming(BAD[1:2], on_bad_row="drop").at([0])


@pytest.mark.parametrize("left", [8, 6])
def test_a_source_that_changes_is_an_error(left):
    source = Listed([raw(number) for number in range(10)])
    rows = streaming(source)
    rows.at(range(12))
    del source.raws[left:]
    with pytest.raises(DataError, match=f"ended after {left} good rows, and after 10 when"):
        rows.at(range(12, 20))


class Lines(Source):
    """The lines of a file, which stays open while they are read."""

    streaming = True

    def __init__(self, path):
        self.path = path

    def rows(self, split):
        with open(self.path) as file:
            for number, line in enumerate(file):
                yield f"line:{number}", json.loads(line)

    def has_split(self, split):
        return split == "train"


@pytest.mark.parametrize("kind", ["file", "hub"])
def test_workers_give_the_same_batches(tmp_path, kit, kind):
    lines = [json.dumps(raw(number, chosen="yes " * 20)) + "\n" for number in range(600)]
    for part in range(3):
        (tmp_path / f"part-{part}.jsonl").write_text("".join(lines[200 * part : 200 * (part + 1)]))
    (tmp_path / "all.txt").write_text("".join(lines))
    source = HubDataset(str(tmp_path), streaming=True) if kind == "hub" else Lines(tmp_path / "all.txt")
    encoder = RowEncoder(kit.byte_level(), ChatTemplate(kit.PLAIN))
    stream = Stream(source, Columns(), 2, shuffle_buffer=37)
    rows = StreamingRows("web", stream, "fail", 5, encoder.many)
    rows.at([0])  # the source is open when workers are forked, or sent a copy
    batches = FixedBatches({"web": None}, {"web": 8}, "web")

    def numbers(rows, workers):
        sampler = StreamSampler(batches, epoch_batches=100)
        trees, collate = TreesByStream([rows]), Collating(list)
        loader = Loader(trees, batch_sampler=sampler, collate_fn=collate, num_workers=workers)
        return [int(tree.origin.rpartition(":")[2]) for batch in loader for _, tree in batch]

    expected = endless(range(600), 37, 2)[:800]
    copy = pickle.loads(pickle.dumps(rows))
    assert numbers(rows, 2) == expected
    assert numbers(rows, 0) == expected
    assert numbers(copy, 0) == expected
