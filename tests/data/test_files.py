import bz2
import csv
import gzip
import json
import lzma
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from bfpo_pl.component import UserError
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.rows import RowError
from bfpo_pl.data.sources import SourceError

ROWS = [
    {"prompt": "👍🏽 ملاحظة", "chosen": 'say "a",\n\tb\r\n', "chosen_safe": True, "score": 0.5},
    {"prompt": "nul\x00byte", "chosen": "c" * 200_000, "chosen_safe": False, "score": -3},
]


def read(path, **kwargs):
    return list(LocalFiles(str(path), **kwargs).rows("train"))


def values(path, **kwargs):
    return [row for _, row in read(path, **kwargs)]


def numbers(rows):
    return [int(origin.rpartition(":")[2]) for origin, _ in rows]


def write(path, rows=ROWS):
    """Writes rows in the format of the suffix, with the writer of a library of its own where there is one."""
    match path.name.split(".")[1]:
        case "jsonl" | "ndjson":
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        case "json":
            data = json.dumps(rows, ensure_ascii=False).encode()
        case "csv" | "tsv":
            with (path.parent / "written").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0], delimiter="\t" if ".tsv" in path.name else ",")
                writer.writeheader()
                writer.writerows(rows)
            data = (path.parent / "written").read_bytes()
            (path.parent / "written").unlink()
        case "parquet":
            return pq.write_table(pa.Table.from_pylist(rows), path)
        case "feather":
            return feather.write_feather(pa.Table.from_pylist(rows), path)
        case "arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                return stream.write_table(table)
    match path.suffix:
        case ".gz":
            data = gzip.compress(data)
        case ".bz2":
            data = bz2.compress(data)
        case ".xz":
            data = lzma.compress(data)
        case ".zst":
            with pa.output_stream(str(path), compression="zstd") as file:
                return file.write(data)
    return path.write_bytes(data)


SUFFIXES = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "feather", "arrow"]
PACKED = ["jsonl.gz", "jsonl.bz2", "jsonl.xz", "jsonl.zst", "json.gz", "csv.gz", "tsv.zst"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, *PACKED])
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    write(path)
    rows = read(path)
    assert [row for _, row in rows] == ROWS
    assert [type(row["chosen_safe"]) for _, row in rows] == [bool, bool]
    first = 2 if suffix.startswith(("csv", "tsv")) else 1
    assert [origin for origin, _ in rows] == [f"{path}:{first}", f"{path}:{first + 1}"]


def test_suffixes_in_capitals(tmp_path):
    write(tmp_path / "rows.jsonl.gz")
    assert values((tmp_path / "rows.jsonl.gz").rename(tmp_path / "ROWS.JSONL.GZ")) == ROWS


def test_an_arrow_file_as_well_as_a_stream(tmp_path):
    table = pa.Table.from_pylist([{"a": index} for index in range(2500)])
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    rows = read(tmp_path / "rows.arrow")
    assert [row["a"] for _, row in rows] == list(range(2500))
    assert numbers(rows) == list(range(1, 2501))


def test_splits(write_jsonl):
    path = write_jsonl([{"a": 1}])
    source = LocalFiles(path)
    assert source.has_split("train")
    assert not source.has_split("validation")
    with pytest.raises(SourceError, match=r"no validation split. Set source\.validation_path"):
        list(source.rows("validation"))
    assert list(LocalFiles("absent", path).rows("validation")) == [(f"{path}:1", {"a": 1})]
    assert not source.streaming
    for nothing in ("", []):
        with pytest.raises(UserError, match="names no file"):
            LocalFiles(path, nothing)


def test_malformed_lines_are_reported_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    huge = b"1" * 5000
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\n[1]\n{"a": \xff}\n{"a": 2}\r\n{"a": ' + huge + b'}\n{"a": "\\u0000"}\n{"a": "trunc'
    )
    rows = read(path)
    assert numbers(rows) == [1, 3, 4, 5, 6, 7, 8]
    assert [row for _, row in rows if not isinstance(row, RowError)] == [{"a": 1}, {"a": 2}, {"a": "\x00"}]
    invalid = "the line is not valid JSON"
    reasons = [row.reason for _, row in rows if isinstance(row, RowError)]
    assert reasons == ["the line is not a JSON object", "the line is not UTF-8", invalid, invalid]
    assert str(rows[-1][1]).startswith(f"{path}:8: line = ")


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", *PACKED])
def test_an_empty_file_has_no_rows(suffix, tmp_path):
    (tmp_path / f"rows.{suffix}").touch()
    assert read(tmp_path / f"rows.{suffix}") == []


def test_files_with_a_header_or_a_schema_alone_have_no_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n")
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(" [] \n")
    (tmp_path / "bom.jsonl").write_text("\ufeff\n")
    assert read(tmp_path) == []


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow", "jsonl.gz", "jsonl.xz", "jsonl.zst", "jsonl.bz2"])
def test_torn_and_mistaken_files_are_named(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    write(path, [{"a": os.urandom(9000).hex()} for _ in range(3)])
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(SourceError, match=f"cannot read .*rows.{suffix}: "):
        read(path)
    path.write_bytes(b"something else, of some length")
    with pytest.raises(SourceError, match=f"cannot read .*rows.{suffix}: "):
        read(path)


# ------------------------------------------------------------------ JSON


def test_json_lists_in_a_field(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": [{"a": 1}, "text", {"a": 2}], "other": []}, indent=1))
    rows = read(path, json_field="data")
    assert [rows[0][1], rows[2][1]] == [{"a": 1}, {"a": 2}]
    assert rows[1][1].reason == "it is not a JSON object"
    with pytest.raises(SourceError, match=r"one JSON object\. Set source\.json_field .* Lists: data, other"):
        read(path)
    with pytest.raises(SourceError, match="without a list in 'version'"):
        read(path, json_field="version")
    path.write_text('\n{"data": [{"a": 1}], "other": []}\n')
    assert values(path, json_field="data") == [{"a": 1}]
    with pytest.raises(SourceError, match=r"one JSON object\. Set source\.json_field .* Lists: data, other"):
        read(path)
    path.write_text('[{"a": 1}]')
    with pytest.raises(SourceError, match="holds a JSON list, not an object with a list in 'data'"):
        read(path, json_field="data")
    path.write_text('"text"')
    with pytest.raises(SourceError, match="holds a JSON str, not a list of objects"):
        read(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('\ufeff{"a": 1}\r\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('\n{"a": 1}', [{"a": 1}]),
        ('{"a": ["b"], "c": []}\n', [{"a": ["b"], "c": []}]),
        ('{"a": [{"role": "user"}]}', [{"a": [{"role": "user"}]}]),
        ('{"a": [{"b": 1}]}\n\n{"a": 2}', [{"a": [{"b": 1}]}, {"a": 2}]),
        ('{"a": 1]\n{"a": 2}', ["the line is not valid JSON", {"a": 2}]),
        ('{"a": 1}\n{"a": "trunc', [{"a": 1}, "the line is not valid JSON"]),
        ('\ufeff[{"a": 1}]', [{"a": 1}]),
    ],
)
def test_json_files_that_are_json_lines(text, expected, tmp_path):
    (tmp_path / "rows.json").write_text(text, encoding="utf-8", newline="")
    rows = values(tmp_path / "rows.json")
    assert [row.reason if isinstance(row, RowError) else row for row in rows] == expected


def test_broken_json_says_where(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n {"a": ]')
    with pytest.raises(SourceError, match=r"rows.json is not valid JSON: .*line 2 column 8"):
        read(path)
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(SourceError, match=r"cannot read .*rows.json: UnicodeDecodeError"):
        read(path)


# ------------------------------------------------------------------ CSV


def test_csv_types_are_those_of_whole_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'flag,number,text,mixed,code,empty\ntrue,1,1,true,007,\nFALSE,2.5,two,yes,012,\n,-3e2,"",1,1,\n 0 ,,4,2,0,\n',
        encoding="utf-8-sig",
    )
    assert values(path) == [
        {"flag": True, "number": 1, "text": "1", "mixed": "true", "code": "007", "empty": None},
        {"flag": False, "number": 2.5, "text": "two", "mixed": "yes", "code": "012", "empty": None},
        {"flag": None, "number": -300.0, "text": "", "mixed": "1", "code": "1", "empty": None},
        {"flag": 0, "number": None, "text": "4", "mixed": "2", "code": "0", "empty": None},
    ]


def test_csv_rows_of_another_width_are_reported(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\r\n1,"x\r\ny"\r\n\r\n2\r\n3,x,y\r\n4,\xff\r\n5,"q ""q"""\r\n6,z\x00')
    rows = read(path)
    assert numbers(rows) == [2, 4, 5, 6, 7, 8]
    good = [row for _, row in rows if not isinstance(row, RowError)]
    assert good == [{"a": 1, "b": "x\r\ny"}, {"a": 5, "b": 'q "q"'}, {"a": 6, "b": "z\x00"}]
    errors = [row for _, row in rows if isinstance(row, RowError)]
    assert [(error.field, error.reason) for error in errors] == [
        ("row", "the row has 1 cells, the header 2"),
        ("row", "the row has 3 cells, the header 2"),
        ("b", "the cell is not UTF-8"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,a\n1,2\n", "must give every column a name of its own; it is: a, a"),
        ("a,\n1,2\n", "must give every column a name of its own"),
        ('a,b\n1,"never closed\n2,x\n', "rows.csv cannot be read up to line 3: its quotes"),
        ('a,b\n1,"closed" and more\n2,x\n', "rows.csv cannot be read up to line 2: its quotes"),
    ],
)
def test_csv_files_that_are_refused(text, message, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "rows.csv")


# ------------------------------------------------------------------ which files


def test_folders_patterns_and_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    for name in ("b.jsonl", "a.csv", ".hidden.jsonl", "below/c.json", "README.md"):
        (tmp_path / name).write_text(f"file\n{name}\n" if name.endswith("csv") else json.dumps({"file": name}))

    def files(path):
        return [row["file"] for _, row in LocalFiles(path).rows("train")]

    assert files(str(tmp_path)) == ["a.csv", "b.jsonl"]
    assert files(".") == ["a.csv", "b.jsonl"]
    assert files("*.[cj]s*") == ["a.csv", "b.jsonl"]
    assert files("**/*.js*") == ["b.jsonl", "below/c.json"]
    assert files(["below", "b.jsonl", "?.csv"]) == ["below/c.json", "b.jsonl", "a.csv"]
    with pytest.raises(SourceError, match=r"b.jsonl is named 2 times"):
        files(["*.jsonl", str(tmp_path / "b.jsonl")])
    with pytest.raises(SourceError, match=r"format of README.md by its suffix. Known: \.jsonl"):
        files(["a.csv", "*.md"])
    os.rename("b.jsonl", "b[1].jsonl")
    assert files("b[1].jsonl") == ["b.jsonl"]


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=f"there is no file absent.jsonl .looked from {tmp_path}"):
        read("absent.jsonl")
    with pytest.raises(SourceError, match=rf"no file matches absent/\*.jsonl .looked from {tmp_path}"):
        read("absent/*.jsonl")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "table.xlsx").touch()
    with pytest.raises(SourceError, match=r"has no file of a known format .* it has: notes.txt, table.xlsx"):
        read(tmp_path)
    with pytest.raises(SourceError, match=r"has no file of a known format .* it has: no file"):
        read((tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_folders_that_datasets_saved_keep_their_order(tmp_path):
    dataset = datasets.Dataset.from_list([{"a": index, "m": [{"role": "user"}]} for index in range(5)])
    dataset.shuffle(seed=1).select(range(3)).save_to_disk(tmp_path / "saved", num_shards=2)
    order = list(dataset.shuffle(seed=1)["a"])[:3]
    assert order != sorted(order)
    rows = read(tmp_path / "saved")
    assert rows == [
        (f"{tmp_path / 'saved'}:{number}", {"a": a, "m": [{"role": "user"}]}) for number, a in enumerate(order, start=1)
    ]
    splits = {"train": dataset, "validation": dataset.select([4]), "test": dataset.select([2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    source = LocalFiles(str(tmp_path / "splits"), str(tmp_path / "splits"))
    assert [len(list(source.rows(split))) for split in ("train", "validation")] == [5, 1]
    assert values(tmp_path / "splits" / "test")[0]["a"] == 2
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "odd")
    with pytest.raises(
        SourceError, match=r"has no split 'train'; it has: test\. Set source.path to one of its folders"
    ):
        read(tmp_path / "odd")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(SourceError, match="saved cannot be read"):
        read(tmp_path / "saved")


# ------------------------------------------------------------------ fingerprints, memory


def test_fingerprints_follow_names_and_bytes(tmp_path):
    def of(folder, **kwargs):
        return LocalFiles(str(tmp_path / folder), **kwargs).fingerprint("train")

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a.jsonl", "b.jsonl"):
            write(tmp_path / folder / name, [{"name": name}])
    before = of("one")
    assert before == of("two") == of("one")
    (tmp_path / "one" / "notes.txt").write_text("not read")
    assert of("one") == before
    assert of("one", json_field="data") != before
    write(tmp_path / "two" / "b.jsonl", [{"name": "c.jsonl"}])
    assert of("two") != before
    (tmp_path / "one" / "b.jsonl").rename(tmp_path / "one" / "c.jsonl")
    assert of("one") != before
    # The bytes of one file may not move to the next unnoticed.
    (tmp_path / "two" / "a.jsonl").write_text("12")
    (tmp_path / "two" / "b.jsonl").write_text("3")
    before = of("two")
    (tmp_path / "two" / "a.jsonl").write_text("1")
    (tmp_path / "two" / "b.jsonl").write_text("23")
    assert of("two") != before


def test_fingerprints_of_saved_folders(tmp_path):
    def of(rows, name):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        return LocalFiles(str(tmp_path / name)).fingerprint("train")

    before = of([{"a": 1}], "one")
    assert of([{"a": 2}], "two") != before
    list(LocalFiles(str(tmp_path / "one")).rows("train"))
    assert LocalFiles(str(tmp_path / "one")).fingerprint("train") == before


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow"])
def test_files_are_not_held_in_memory(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    rows = [{"a": f"text {os.urandom(4_000).hex()}", "b": index} for index in range(4_000)]  # 32 MB
    if suffix == "json":  # JSON lines, in truth
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write(path, rows)
    pool = pa.default_memory_pool()
    del rows
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    count = 0
    for _ in LocalFiles(str(path)).rows("train"):
        count += 1
        most = max(most, pool.bytes_allocated() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4_000
    assert peak < 9e6
    assert most < 20e6  # the decoder's own pages; 50 MB where the file is read instead of mapped


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_key_that_comes_twice_makes_a_bad_row(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_text('{"a": 1, "b": 2, "a": 3}\n{"a": 1, "b": {"a": 1}}\n{"m": [{"role": 1, "role": 2}]}\n')
    first, good, nested = values(path)
    assert good == {"a": 1, "b": {"a": 1}}
    assert (first.origin, first.field, first.value) == (f"{path}:1", "key", "'a'")
    assert (nested.origin, nested.value) == (f"{path}:3", "'role'")
    assert first.reason == nested.reason == "a JSON object has this key twice"
    (tmp_path / "list.json").write_text('[{"a": 1, "a": 2}]')
    with pytest.raises(SourceError, match=r"list\.json is not valid JSON: an object has the key 'a' twice"):
        values(tmp_path / "list.json")
