import json
import shutil
import subprocess
import sys

import datasets
import pytest

import bfpo_pl
from bfpo_pl.data.adapters import Messages
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety, MicroworldSFT
from bfpo_pl.data.schemas import PKUSafeRLHF, UltraFeedbackBinarized
from bfpo_pl.data.sources import HubDataset, SourceError


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
    source = HubDataset(folder)
    rows = list(source.rows("train"))
    assert rows == [
        (f"{folder}[train]:{index}", {"prompt": f"train {index}", "flag": index % 2 == 0}) for index in range(10)
    ]
    assert rows[0][1]["flag"] is True
    assert len(list(source.rows("validation"))) == 3
    assert not source.streaming
    assert "streaming" not in repr(source)


def test_a_folder_with_a_card_is_read_anew_when_it_changes(folder, tmp_path):
    """`datasets` keeps the rows of such a folder by its name alone, and would give those of another, or older ones."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}.jsonl\n---\n"
    (tmp_path / "data" / "README.md").write_text(card.format("train"))
    other = tmp_path / "other" / "data"
    shutil.copytree(folder, other)
    (other / "train.jsonl").write_text('{"prompt": "of another", "flag": true}\n')
    first, second = HubDataset(folder), HubDataset(str(other))
    assert len(list(first.rows("train"))) == 10
    assert [raw["prompt"] for _, raw in second.rows("train")] == ["of another"]
    assert first.fingerprint("train") != second.fingerprint("train")
    before = second.fingerprint("train")
    (other / "train.jsonl").write_text('{"prompt": "changed", "flag": true}\n')
    assert [raw["prompt"] for _, raw in second.rows("train")] == ["changed"]
    assert second.fingerprint("train") != before


ROWS = [
    {"messages": [{"role": "user", "content": f"q{index}"}, {"role": "assistant", "content": "a"}], "score": index / 2}
    for index in range(2500)
]


@pytest.fixture(params=["parquet", "json", "csv"])
def laid_out(request, tmp_path, monkeypatch):
    """A local dataset laid out as on the Hub, in several formats, with the rows that it must give."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = (
        ROWS if request.param != "csv" else [{"prompt": f"q{index}", "safe": index % 2 == 0} for index in range(2500)]
    )
    data = tmp_path / "name" / "data"
    data.mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows)
    for split, shard in (("train", dataset.select(range(2400))), ("test", dataset.select(range(2400, 2500)))):
        getattr(shard, f"to_{request.param}")(data / f"{split}-00000-of-00001.{request.param}")
    return str(tmp_path / "name"), rows


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_layouts_whole_and_streamed(laid_out, streaming):
    folder, rows = laid_out
    source = HubDataset(folder, streaming=streaming)
    source.prepare(["train", "validation"])
    assert list(source.rows("train")) == [(f"{folder}[train]:{index}", row) for index, row in enumerate(rows[:2400])]
    assert [raw for _, raw in source.rows("validation")] == rows[2400:]
    assert source.streaming == streaming
    assert ("streaming=True" in repr(source)) == streaming


def test_values_of_mixed_types_are_decoded(tmp_path, monkeypatch):
    """`datasets` keeps columns of mixed types as JSON texts within its files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"safe": True, "extra": {"a": 1}}, {"safe": "False", "extra": {"b": [None]}}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [raw["safe"] for _, raw in HubDataset(str(tmp_path / "data")).rows("train")] == [True, "False"]


def test_streaming_writes_no_copy(folder, tmp_path):
    source = HubDataset(folder, streaming=True)
    source.prepare(["train", "validation"])
    assert len(list(source.rows("train"))) == 10
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    HubDataset(folder).prepare([])
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    HubDataset(folder).prepare(["train"])
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_folders_that_datasets_saved(tmp_path):
    dataset = datasets.Dataset.from_list([{"a": index} for index in range(5)])
    datasets.DatasetDict({"train": dataset.shuffle(seed=1), "test": dataset.select([4])}).save_to_disk(tmp_path / "two")
    for streaming in (False, True):
        source = HubDataset(str(tmp_path / "two"), streaming=streaming)
        assert [raw["a"] for _, raw in source.rows("train")] == list(dataset.shuffle(seed=1)["a"])
        assert [raw for _, raw in source.rows("validation")] == [{"a": 4}]
    with pytest.raises(SourceError, match=r"has no split 'train_prefs'; it has: train, test\. Set source.splits"):
        list(HubDataset(str(tmp_path / "two"), splits={"train": "train_prefs"}).rows("train"))
    dataset.save_to_disk(tmp_path / "one")
    source = HubDataset(str(tmp_path / "one"))
    assert [raw["a"] for _, raw in source.rows("train")] == [0, 1, 2, 3, 4]
    with pytest.raises(SourceError, match=r"has no splits, so that it has no 'test'"):
        list(source.rows("validation"))
    with pytest.raises(SourceError, match="written by save_to_disk and has no revision: leave it out"):
        list(HubDataset(str(tmp_path / "one"), revision="main").rows("train"))


def test_hub_fingerprints(folder, tmp_path):
    source = HubDataset(folder)
    before = source.fingerprint("train")
    assert before == HubDataset(folder).fingerprint("train")
    assert before != source.fingerprint("validation")
    assert HubDataset(folder, streaming=True).fingerprint("train") is None
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "another", "flag": true}\n')
    assert HubDataset(folder).fingerprint("train") != before
    saved = []
    for value in (1, 1, 2):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.Dataset.from_list([{"a": value}]).save_to_disk(tmp_path / "saved")
        saved.append(HubDataset(str(tmp_path / "saved")).fingerprint("train"))
    assert saved[0] == saved[1] != saved[2]


def test_hub_dataset_errors_say_what_to_do(folder, tmp_path):
    with pytest.raises(SourceError, match=r"source\.splits"):
        list(HubDataset(folder, splits={"train": "train_prefs"}).rows("train"))
    with pytest.raises(SourceError, match="no such folder"):
        list(HubDataset(str(tmp_path / "absent")).rows("train"))
    with pytest.raises(SourceError, match=r"has no validation split\. Name it in source\.splits"):
        list(HubDataset(folder, splits={"train": "train"}).rows("validation"))
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


def test_streams_that_break_off_say_where(folder, tmp_path):
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write('{"prompt": trunc')
    with pytest.raises(SourceError, match=r"HubDataset cannot read .*, split 'train': ArrowInvalid"):
        list(HubDataset(folder, streaming=True).rows("train"))


def test_microworld_fingerprints():
    before = MicroworldSafety(20, 5, flag_noise=0.1).fingerprint("train")
    assert before == MicroworldSafety(20, 5, flag_noise=0.1).fingerprint("train")
    others = [MicroworldSafety(20, 5), MicroworldSafety(20, 5, flag_noise=0.1, seed=1), MicroworldHelpfulness(20, 5)]
    others += [MicroworldSFT(20, 5), MicroworldSafety(20, 5, flag_noise=0.1, split_seed=1)]
    found = {source.fingerprint("train") for source in others}
    assert len(found | {before, MicroworldSafety(20, 5, flag_noise=0.1).fingerprint("validation")}) == 7


def test_microworld_fingerprints_follow_the_generator(tmp_path):
    """The same in another process, until the generator's text changes."""
    shutil.copytree(bfpo_pl.__path__[0], tmp_path / "bfpo_pl")
    code = """
from bfpo_pl.data.microworld_sources import MicroworldSFT
print(MicroworldSFT(3).fingerprint("train"))
with open("bfpo_pl/microworld/world.py", "a") as file:
    file.write("# changed")
print(MicroworldSFT(3).fingerprint("train"))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = run.stdout.split()
    assert before == MicroworldSFT(3).fingerprint("train") != after
