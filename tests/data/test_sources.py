import gzip
import json

import datasets
import pytest

from bfpo_pl.data.adapters import Messages, PKUSafeRLHF, UltraFeedbackBinarized
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety, MicroworldSFT
from bfpo_pl.data.rows import RowError
from bfpo_pl.data.sources import HubDataset, JsonLines, SourceError


def test_json_lines_name_file_and_line(write_jsonl):
    path = write_jsonl([{"a": 1}, {"a": "ü\r\n\x00👍"}])
    source = JsonLines(path)
    assert list(source.rows("train")) == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": "ü\r\n\x00👍"})]
    assert source.has_split("train")
    assert not source.has_split("validation")
    with pytest.raises(SourceError, match="validation_path"):
        list(source.rows("validation"))
    assert list(JsonLines("absent", path).rows("validation")) == list(source.rows("train"))


def test_malformed_lines_are_reported_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n[1]\n{"a": \xff}\n{"a": 2}\n{"a": "trunc')
    rows = list(JsonLines(str(path)).rows("train"))
    assert [origin.rpartition(":")[2] for origin, _ in rows] == ["1", "3", "4", "5", "6"]
    good = [row for _, row in rows if not isinstance(row, RowError)]
    assert good == [{"a": 1}, {"a": 2}]
    reasons = [row.reason for _, row in rows if isinstance(row, RowError)]
    assert reasons == ["the line is not a JSON object", "the line is not UTF-8", "the line is not valid JSON"]


def test_gzip_empty_and_missing_files(tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert [row for _, row in JsonLines(str(packed)).rows("train")] == [{"a": 1}]
    (tmp_path / "empty.jsonl").touch()
    assert list(JsonLines(str(tmp_path / "empty.jsonl")).rows("train")) == []
    with pytest.raises(SourceError, match="there is no file"):
        list(JsonLines(str(tmp_path / "absent.jsonl")).rows("train"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A local dataset of ten training rows and three test rows."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for split, size in (("train", 10), ("test", 3)):
        rows = [{"prompt": f"{split} {index}", "flag": index % 2 == 0} for index in range(size)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(data)


def test_hub_dataset_reads_a_local_folder(folder):
    source = HubDataset(folder, fraction=0.29)
    rows = list(source.rows("train"))
    assert [raw["prompt"] for _, raw in rows] == ["train 0", "train 1"]
    assert rows[1][0] == f"{folder}[train]:1"
    assert rows[0][1]["flag"] is True
    assert len(list(source.rows("validation"))) == 3


def test_hub_dataset_reads_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    ).to_parquet(tmp_path / "data" / "train.parquet")
    source = HubDataset(str(tmp_path / "data"), splits={"train": "train"})
    assert not source.has_split("validation")
    ((origin, raw),) = source.rows("train")
    assert Messages()(raw, origin).responses == ("a",)


def test_hub_dataset_errors_say_what_to_do(folder, tmp_path):
    with pytest.raises(SourceError, match=r"source\.splits"):
        list(HubDataset(folder, splits={"train": "train_prefs"}).rows("train"))
    with pytest.raises(SourceError, match="no such folder"):
        list(HubDataset(str(tmp_path / "absent")).rows("train"))
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], not 1.5"):
        HubDataset(folder, fraction=1.5)
    with pytest.raises(ValueError, match="may name train and validation"):
        HubDataset(folder, splits={"test": "test"})


@pytest.mark.parametrize(
    ("source", "adapter"),
    [
        (MicroworldSafety(6, 3), PKUSafeRLHF()),
        (MicroworldHelpfulness(6, 3), UltraFeedbackBinarized()),
        (MicroworldSFT(6, 3), Messages()),
    ],
)
def test_microworld_rows_go_through_the_same_readers(source, adapter):
    rows = [adapter(raw, origin) for origin, raw in source.rows("train")]
    assert len(rows) == 6
    assert rows == [adapter(raw, origin) for origin, raw in source.rows("train")]
    assert len(list(source.rows("validation"))) == 3
    assert not type(source)(6, 0).has_split("validation")


def test_microworld_settings_reach_the_generator():
    def columns(source):
        return [PKUSafeRLHF()(raw, origin).columns["safe"] for origin, raw in source.rows("train")]

    assert set(columns(MicroworldSafety(20, 0, unsafe_helpful_share=1.0))) == {(0.0, 1.0)}
    soft = {value for pair in columns(MicroworldSafety(20, 0, flag_noise=0.1, soft_flags=True)) for value in pair}
    assert soft == {0.1, 0.9}
    with pytest.raises(ValueError, match=r"unsafe_helpful_share must lie in \[0, 1\]"):
        MicroworldSafety(unsafe_helpful_share=1.5)
