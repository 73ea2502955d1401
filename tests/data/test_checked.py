import json
import multiprocessing
import pickle

import numpy as np
import pytest

from bfpo_pl.component import RunError, UserError
from bfpo_pl.data import arrow, checked
from bfpo_pl.data.adapters import Adapter, Columns
from bfpo_pl.data.checked import CheckedRows, check_rows
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.rows import Row
from bfpo_pl.data.schemas import PKUSafeRLHF
from bfpo_pl.data.sources import Source


def raw(index, **changes):
    row = {"prompt": f"p{index}", "chosen": f"a{index}", "rejected": f"b{index}"}
    return {**row, "chosen_safe": True, "rejected_safe": 0.25, **changes}


class Plain(Source):
    """Rows that are in memory; nothing tells whether they are those of before."""

    def __init__(self, rows):
        self.given = rows
        self.reads = 0

    def has_split(self, split):
        return True

    def rows(self, split):
        self.reads += 1
        for index, row in enumerate(self.given):
            yield f"plain:{index}", row


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(checked, "SHARD_ROWS", 4)
    monkeypatch.setattr(checked, "_CHUNK", 3)


def test_rows_come_back_as_the_adapter_made_them(tmp_path, small_shards):
    rows = [raw(index, chosen=f"é\u0000 {index} 👍") for index in range(11)]
    rows[3] = {**rows[3], "chosen_safe": "yes"}
    rows[5] = {
        **rows[5],
        "prompt": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "v"},
            {"role": "user", "content": "w"},
        ],
    }
    extras = [{**row, "chosen_score": index, "rejected_score": -index, "gap": 0.5} for index, row in enumerate(rows)]
    adapter = Columns(extras=["chosen_score", "rejected_score", "gap"])
    stored = check_rows(tmp_path, "x", Plain(extras), "train", adapter)
    expected = [adapter(row, f"plain:{index}") for index, row in enumerate(extras) if index != 3]
    assert len(stored) == 10
    assert stored.raw_rows == 11
    assert stored.rows(range(10)) == expected
    assert stored.rows([1, 4, 9]) == [expected[1], expected[4], expected[9]]
    assert [stored.origin(index) for index in (0, 3, 9)] == ["plain:0", "plain:4", "plain:10"]
    assert stored.numbers("raw_index").tolist() == [0, 1, 2, *range(4, 11)]
    (fault,) = stored.faults
    assert (fault.raw_index, fault.origin, fault.field, fault.value) == (3, "plain:3", "chosen_safe", "'yes'")
    tables = stored.tables("columns", stored.counts("responses"))
    assert tables["safe"].tolist() == [1.0, 0.25] * 10
    assert tables["score"].tolist() == [float(x) for i in (0, 1, 2, *range(4, 11)) for x in (i, -i)]
    assert stored.tables("pair_columns", stored.counts("pairs") // 2)["gap"].tolist() == [0.5] * 10
    assert stored.flat("pairs").tolist() == [0, 1] * 10
    again = pickle.loads(pickle.dumps(stored))
    assert again.rows([7]) == [expected[7]]


def test_a_column_that_some_rows_lack_is_nan_there(tmp_path, small_shards):
    rows = [raw(0), {key: raw(1)[key] for key in ("prompt", "chosen", "rejected")}, raw(2)]

    class Bare(Columns):
        def __call__(self, row, origin):
            return Row.pair(
                row["prompt"], row["chosen"], row["rejected"], row.get("chosen_safe"), row.get("rejected_safe")
            )

    stored = check_rows(tmp_path, "x", Plain(rows), "train", Bare())
    safe = stored.tables("columns", stored.counts("responses"))["safe"]
    assert np.isnan(safe).tolist() == [False, False, True, True, False, False]


def test_nothing_is_read_twice_unless_it_changed(tmp_path, write_jsonl, monkeypatch):
    path = write_jsonl([raw(0), raw(1)])
    reads = []
    opened = LocalFiles.rows

    def counted(self, split):
        reads.append(split)
        return opened(self, split)

    monkeypatch.setattr(LocalFiles, "rows", counted)

    def stored(adapter=None, **kwargs):
        return check_rows(tmp_path / "cache", "x", LocalFiles(path), "train", adapter or Columns(), **kwargs)

    first = stored()
    assert (stored().folder, len(reads)) == (first.folder, 1)
    assert stored(Columns(extras=[])).folder == first.folder
    assert stored(Columns(chosen="rejected", rejected="chosen")).folder != first.folder
    assert stored(assume_safe=True).folder != first.folder
    assert len(reads) == 3
    write_jsonl([raw(0), raw(7)])
    assert stored().rows([1])[0].responses == ("a7", "b7")
    torn = first.folder / "rows-00000.arrow"
    write_jsonl([raw(0), raw(1)])
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged"):
        stored()
    assert stored().rows([1])[0].responses == ("a1", "b1")
    assert len(reads) == 5


def test_rows_of_an_unknown_source_are_read_each_time_and_kept_by_content(tmp_path):
    source = Plain([raw(0), raw(1)])
    first, again = (check_rows(tmp_path, "x", source, "train", Columns()) for _ in range(2))
    assert (source.reads, first.folder) == (2, again.folder)
    source.given = [raw(0), raw(2)]
    assert check_rows(tmp_path, "x", source, "train", Columns()).rows([1])[0].responses == ("a2", "b2")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("reading")) == []


def test_an_empty_source(tmp_path):
    stored = check_rows(tmp_path, "x", Plain([]), "train", Columns())
    assert (len(stored), stored.raw_rows, stored.rows([])) == (0, 0, [])
    assert stored.numbers("prompt_key").tolist() == []


def _build(arguments):
    folder, path = arguments
    return str(check_rows(folder, "x", LocalFiles(path), "train", Columns()).folder)


def test_processes_that_start_at_once_share_one_store(tmp_path, write_jsonl):
    path = write_jsonl([raw(index) for index in range(300)])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.map(_build, [(tmp_path / "cache", path)] * 8)
    assert len(set(folders)) == 1
    assert len(CheckedRows(tmp_path / "cache" / folders[0].rpartition("/")[2])) == 300


def test_an_interrupted_write_leaves_nothing_that_counts(tmp_path, small_shards, monkeypatch):
    rows = [raw(index) for index in range(10)]

    class Dies(Plain):
        def fingerprint(self, split):
            return "same"

        def rows(self, split):
            for index, item in enumerate(super().rows(split)):
                if index == 9 and self.given is not rows:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        check_rows(tmp_path, "x", Dies(list(rows)), "train", Columns())
    assert list(tmp_path.glob("*/*.arrow"))
    assert not list(tmp_path.glob("*/manifest.json"))
    assert len(check_rows(tmp_path, "x", Dies(rows), "train", Columns())) == 10


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written to .*file.*Set data\.cache.*BFPO_CACHE"):
        check_rows(tmp_path / "file" / "rows", "x", Plain([raw(0)]), "train", Columns())


def test_the_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BFPO_CACHE", str(tmp_path))
    assert arrow.default_cache() == tmp_path
    monkeypatch.delenv("BFPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert arrow.default_cache() == tmp_path / "xdg" / "bfpo_pl"


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrow.os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device \([\d.]+ GiB free there\)"):
        check_rows(tmp_path, "x", Plain([raw(0)]), "train", Columns())
    assert not list(tmp_path.glob("**/*.tmp-*"))
    monkeypatch.undo()
    assert (
        json.loads(
            (check_rows(tmp_path, "x", Plain([raw(0)]), "train", Columns()).folder / "manifest.json").read_text()
        )["raw_rows"]
        == 1
    )


class Hidden(Adapter):
    """Holds its argument where its repr does not show it."""

    def __init__(self, suffix):
        self._suffix = suffix

    def __call__(self, row, origin):
        return Row.pair(row["prompt"], row["chosen"] + self._suffix, row["rejected"], 1, 0, origin)


class Wrapping(Adapter):
    """Another adapter's rows as they are."""

    def __init__(self, adapter):
        self.adapter = adapter

    def __call__(self, row, origin):
        return self.adapter(row, origin)


@pytest.mark.parametrize("wrap", [lambda adapter: adapter, Wrapping])
def test_all_that_an_adapter_holds_decides_its_rows(tmp_path, write_jsonl, wrap):
    source = LocalFiles(write_jsonl([raw(0)]))

    def chosen(suffix):
        (row,) = check_rows(tmp_path / "cache", "x", source, "train", wrap(Hidden(suffix))).rows([0])
        return row.responses[0]

    assert (chosen("1"), chosen("2"), chosen("1")) == ("a01", "a02", "a01")


def test_the_code_of_a_wrapped_adapter_decides_too(tmp_path, write_jsonl):
    source = LocalFiles(write_jsonl([raw(0)]))
    plain = checked._code(source, *checked._components(Wrapping(Columns())))
    assert plain == checked._code(source, *checked._components(Wrapping(Wrapping(Columns()))))
    assert plain != checked._code(source, *checked._components(Wrapping(PKUSafeRLHF()))), "which is in another file"


def test_an_adapter_that_fails_names_the_row(tmp_path):
    class Careless(Columns):
        def __call__(self, row, origin):
            return super().__call__({**row, "prompt": row["missing"]}, origin)

    rows = [raw(0, missing="p"), raw(1)]
    with pytest.raises(UserError, match=r"plain:1: Careless fails on this row: KeyError: 'missing'"):
        check_rows(tmp_path, "x", Plain(rows), "train", Careless())


def test_texts_with_separators_are_told_apart(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    stored = check_rows(
        tmp_path, "x", Plain([raw(0, prompt=turns), raw(0, prompt="a\0assistant\0b\0user\0c")]), "train", Columns()
    )
    assert len(set(stored.numbers("prompt_hash").tolist())) == 2


def test_a_complete_store_is_only_read(tmp_path, write_jsonl, monkeypatch):
    source = LocalFiles(write_jsonl([raw(0)]))
    first = check_rows(tmp_path / "cache", "x", source, "train", Columns())
    monkeypatch.setattr(checked, "sole_builder", None)  # as on a disk that cannot be written
    assert check_rows(tmp_path / "cache", "x", source, "train", Columns()).folder == first.folder
    monkeypatch.undo()
    (first.folder / "manifest.json").write_text("{}")
    assert len(check_rows(tmp_path / "cache", "x", source, "train", Columns())) == 1
