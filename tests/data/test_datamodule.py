import json
import warnings

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer, seed_everything

from bfpo_pl.component import UserError
from bfpo_pl.data import preparation, streaming
from bfpo_pl.data.adapters import Columns, Messages
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.data.files import LocalFiles
from bfpo_pl.data.microworld_sources import MicroworldHelpfulness, MicroworldSafety, MicroworldSFT
from bfpo_pl.data.reading import DataError
from bfpo_pl.data.schemas import PKUSafeRLHF, UltraFeedbackBinarized
from bfpo_pl.data.sources import HubDataset
from bfpo_pl.data.streams import Stream
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.data.truncation import Truncation
from bfpo_pl.microworld import build_tokenizer


def safety(count=20, validation=6, batch_size=4, **kwargs):
    return Stream(MicroworldSafety(count, validation), PKUSafeRLHF(), batch_size, **kwargs)


def helpfulness(count=10, batch_size=3, **kwargs):
    return Stream(MicroworldHelpfulness(count), UltraFeedbackBinarized(), batch_size, **kwargs)


def ready(streams, stage="fit", tokenizer=None, **kwargs):
    data = AlignmentData(streams, **kwargs)
    data.tokenizer = tokenizer or build_tokenizer()
    data.setup(stage)
    return data


def test_two_streams_in_every_batch():
    data = ready({"safety": safety(weight=2.0), "help": helpfulness(assume_safe=True)})
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch in batches:
        assert batch.pair_stream.tolist() == [0] * 4 + [1] * 3
        assert (batch.streams, batch.stream_weight.tolist()) == (("safety", "help"), [2.0, 1.0])
        assert batch.annotations["chosen_safe"][4:].tolist() == [1.0, 1.0, 1.0]
        assert set(batch.annotations.response) == {"safe"}
    assert data.columns == {"safe", "chosen_safe", "rejected_safe"}
    assert "chosen_score" in data.columns_of("help")
    (validation,) = data.val_dataloader()
    assert validation.pair_stream.tolist() == [0] * 6
    assert validation.origins[0] == "MicroworldSafety[validation]:0"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_one_optimizer_step_know_each_other(workers):
    data = ready({"safety": safety(18), "help": helpfulness(assume_safe=True)}, num_workers=workers)
    plain = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.accumulated = lambda: 2
    batches = list(loader)
    assert [batch.origins for batch in batches] == [batch.origins for batch in plain]
    assert [len(batch.pairs) for batch in batches] == [7, 7, 7, 7, 5]
    assert [plain[i].window for i in range(5)] == [None] * 5
    for group in ([0, 1], [2, 3], [4]):
        for index in group:
            window = batches[index].window
            assert window.size == 2
            for column in ("chosen_safe", "rejected_safe"):
                expected = torch.cat([plain[i].annotations[column] for i in group])
                assert torch.equal(window.annotations[column], expected)
            assert torch.equal(window.pair_stream, torch.cat([plain[i].pair_stream for i in group]))
            assert torch.equal(window.response_lengths, torch.cat([plain[i].response_lengths for i in group]))


def test_streams_without_flags():
    data = ready({"safety": safety(), "help": helpfulness()})
    assert data.columns == set()
    assert "chosen_safe" in data.columns_of("safety")
    assert "chosen_safe" not in data.columns_of("help")
    assert next(iter(data.train_dataloader())).annotations.response == {}
    assert set(next(iter(data.val_dataloader())).annotations.response) == {"safe"}


def test_supervised_rows():
    data = ready({"sft": Stream(MicroworldSFT(10, 4), Messages(), 5)}, validation_batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert (len(batch.response_segment), batch.pairs.shape) == (5, (0, 2))
    assert [len(batch.origins) for batch in data.val_dataloader()] == [3, 1]


def test_driver_and_validation_streams():
    streams = {"safety": safety(), "help": helpfulness(30, assume_safe=True)}
    data = ready(streams, driver="help", validation_streams=["help", "safety"], validation_batch_size=200)
    assert len(list(data.train_dataloader())) == 10
    assert [set(batch.pair_stream.tolist()) for batch in data.val_dataloader()] == [{1}, {1}, {0}]
    only = ready({"safety": safety(validation=0)})
    assert only.val_dataloader() == []
    for wrong in ({"driver": "absent"}, {"validation_streams": ["absent"]}):
        with pytest.raises(DataError, match=r"no stream 'absent'\. Streams: safety, help"):
            AlignmentData(streams, **wrong)
    with pytest.raises(DataError, match="name at least one"):
        AlignmentData({})


def test_the_stage_decides_what_is_read():
    data = ready({"safety": safety(), "help": helpfulness()}, "validate")
    assert list(data.report) == ["safety"]
    assert list(data.report["safety"]) == ["validation"]
    assert "chosen_safe" in data.columns_of("help"), "a stream that is not read stands in nobody's way"


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_safe": True, "rejected_safe": 0}


@pytest.fixture
def bad_file(write_jsonl):
    bad = [{"chosen_safe": "yes"}, {"chosen": "b"}, {"prompt": " "}, {"chosen_safe": "no"}, {"rejected_safe": 7}]
    return write_jsonl([GOOD, *({**GOOD, **change} for change in bad), {"prompt": "only"}, GOOD, GOOD])


def plain_tokenizer(kit):
    tokenizer = kit.byte_level()
    tokenizer.chat_template = kit.PLAIN
    return tokenizer


def test_bad_rows_are_reported_together(bad_file, kit):
    with pytest.raises(DataError) as caught:
        ready({"mine": Stream(LocalFiles(bad_file), Columns(), 2)}, tokenizer=plain_tokenizer(kit))
    message = str(caught.value)
    assert "6 rows cannot be used" in message
    assert "mine, train: 3 of 9: a safety flag must be" in message
    assert "mine, train: 1 of 9: the chosen and the rejected response are identical" in message
    assert f"{bad_file}:2: chosen_safe = 'yes': a safety flag must be" in message
    assert f"{bad_file}:6: rejected_safe = 7" in message
    assert f"{bad_file}:7" not in message, "the first five are shown"
    assert "data.on_bad_row: drop" in message


def test_bad_rows_are_dropped_and_counted(bad_file, kit):
    data = ready(
        {"mine": Stream(LocalFiles(bad_file), Columns(), 2)}, tokenizer=plain_tokenizer(kit), on_bad_row="drop"
    )
    report = json.loads(json.dumps(data.report))["mine"]["train"]
    assert report["rows"] == 3
    assert sum(report["dropped"].values()) == 6
    assert report["quadrants"] == {"safe_safe": 0, "safe_unsafe": 3, "unsafe_safe": 0, "unsafe_unsafe": 0}
    assert sorted(next(iter(data.train_dataloader())).origins)[0].startswith(bad_file)


def test_flags_missing_in_some_rows(write_jsonl, kit):
    path = write_jsonl([GOOD, {**GOOD, "chosen_safe": None, "rejected_safe": None}])
    with pytest.raises(DataError, match=r"(?s):2: chosen_safe = None.*set assume_safe: true in the stream"):
        ready({"mine": Stream(LocalFiles(path), Columns(), 2)}, tokenizer=plain_tokenizer(kit))
    data = ready({"mine": Stream(LocalFiles(path), Columns(), 2, assume_safe=True)}, tokenizer=plain_tokenizer(kit))
    assert sorted(next(iter(data.train_dataloader())).annotations["rejected_safe"].tolist()) == [0.0, 1.0]


def test_streams_without_rows_and_cuts(write_jsonl, kit):
    with pytest.raises(DataError, match="Stream 'mine' has no row to use in its train split"):
        ready({"mine": Stream(LocalFiles(write_jsonl([])), Columns(), 2)}, tokenizer=plain_tokenizer(kit))
    long = {**GOOD, "prompt": "p" * 100, "chosen": "a" * 100}
    source = LocalFiles(write_jsonl([GOOD, long]))
    data = ready({"mine": Stream(source, Columns(), 2)}, tokenizer=plain_tokenizer(kit), truncation=Truncation(70, 40))
    assert data.report["mine"]["train"]["prompts_cut"] == 1
    assert data.report["mine"]["train"]["responses_cut"] == 1


def test_pairs_that_truncation_makes_identical(write_jsonl, kit, monkeypatch):
    said = []
    monkeypatch.setattr(preparation, "rank_zero_info", said.append)
    answers = ("seven words are in this first answer", "seven words are in this other answer")
    long = {**GOOD, "chosen": answers[0], "rejected": answers[1]}
    path = write_jsonl([GOOD, long, {**long, "chosen": "no"}, {**GOOD, "chosen_safe": "yes"}])

    def of(**kwargs):
        stream = Stream(LocalFiles(path), Columns(), 2)
        return ready({"mine": stream}, tokenizer=plain_tokenizer(kit), truncation=Truncation(34, 30), **kwargs)

    data = of(on_bad_row="drop")
    report = data.report["mine"]["train"]
    reason = "the chosen and the rejected response are identical once truncation cuts them"
    assert report["rows"] == sum(report["quadrants"].values()) == 2
    assert report["dropped"].pop(f"{reason} (data.truncation.max_length = 34)") == 1
    assert len(report["dropped"]) == 1
    origins = {origin for batch in data.train_dataloader() for origin in batch.origins}
    assert origins == {f"{path}:1", f"{path}:3"}
    assert said[0] == "mine, train: cut 1 of 4 responses and 0 of 2 prompts to fit max_length 34"
    assert said[1].startswith("mine, train: dropped 2 rows: 1 × a safety flag must")
    assert len(said) == 2

    path = write_jsonl([GOOD, long], "cut.jsonl")
    with pytest.raises(DataError, match=rf"mine, train: 1 of 2: {reason}") as caught:
        of()
    assert f"{path}:2: rejected = 'seven words" in str(caught.value)
    assert "Raise data.truncation.max_length" in str(caught.value)
    path = write_jsonl([long], "all.jsonl")
    with pytest.raises(DataError, match="no row to use"):
        of(on_bad_row="drop")


def test_nothing_is_said_where_nothing_is_cut(monkeypatch):
    said = []
    monkeypatch.setattr(preparation, "rank_zero_info", said.append)
    ready({"safety": safety()})
    assert said == []


def test_special_tokens_in_texts_are_counted_of_the_rows_that_are_used(write_jsonl, kit, monkeypatch):
    said = []
    monkeypatch.setattr(preparation, "rank_zero_info", said.append)
    typed = {**GOOD, "prompt": "Hello<|im_end|>\n<|im_start|>assistant"}
    stopped = {**GOOD, "chosen": "one</s>two"}
    alike = {**GOOD, "prompt": typed["prompt"], "chosen": "one</s>two", "rejected": "one"}
    stream = Stream(LocalFiles(write_jsonl([GOOD, typed, stopped, alike])), Columns(), 2)
    data = ready({"mine": stream}, tokenizer=plain_tokenizer(kit), on_bad_row="drop", template=ChatTemplate(kit.ZEPHYR))
    report = data.report["mine"]["train"]
    assert (report["rows"], sum(report["dropped"].values())) == (3, 1)
    assert (report["stop_token_in_text"], report["special_token_in_prompt"]) == (1, 1)
    assert said[:2] == [
        "mine, train: 1 responses hold a stop token in their own text, and end there",
        "mine, train: 1 rows have special tokens in the text of their prompt, which the model reads as such",
    ]
    tokenizer = plain_tokenizer(kit)
    tokenizer.split_special_tokens = True
    assert ready({"mine": stream}, tokenizer=tokenizer).report["mine"]["train"]["special_token_in_prompt"] == 0


@pytest.mark.parametrize("adapter", [Columns(), PKUSafeRLHF()])
def test_flag_fields_that_no_row_has_can_be_taken_as_safe(adapter, write_jsonl, kit):
    pku = {"response_0": "a", "response_1": "b", "better_response_id": 0}
    raw = {"prompt": "p", "chosen": "a", "rejected": "b", **pku}
    rows = [raw, {**raw, adapter.flag_fields[0]: False}]

    def of(rows, assume_safe):
        stream = Stream(LocalFiles(write_jsonl(rows)), adapter, 2, assume_safe=assume_safe)
        return ready({"mine": stream}, tokenizer=plain_tokenizer(kit))

    data = of(rows, True)
    assert data.report["mine"]["train"]["quadrants"]["safe_safe"] == 1
    assert data.report["mine"]["train"]["quadrants"]["unsafe_safe"] == 1
    with pytest.raises(DataError, match="assume_safe: true in the stream"):
        of(rows, False)
    with pytest.raises(DataError, match="a safety flag must be"):
        of([raw, {**raw, adapter.flag_fields[0]: "yes"}], True)


def test_has_pairs():
    pairs = {"safety": safety()}
    assert not AlignmentData(pairs).has_pairs
    assert ready(pairs).has_pairs
    supervised = {"sft": Stream(MicroworldSFT(10), Messages(), 5)}
    assert not ready(supervised).has_pairs
    assert ready({**supervised, **pairs}).has_pairs


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(UserError, match="AlignmentData: num_workers must lie in"):
        AlignmentData({"safety": safety()}, num_workers=-1)


def test_the_same_batches_for_any_number_of_workers():
    def batches(workers):
        data = ready({"safety": safety(), "help": helpfulness(assume_safe=True)}, num_workers=workers, seed=5)
        loader = data.train_dataloader()
        return [batch for _ in range(2) for batch in loader]

    for ours, theirs in zip(batches(0), batches(2), strict=True):
        assert ours.origins == theirs.origins
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.annotations["safe"], theirs.annotations["safe"])


def test_the_seed_is_the_runs(monkeypatch):
    def first(**kwargs):
        return next(iter(ready({"safety": safety()}, **kwargs).train_dataloader())).origins

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    zero = first()
    seed_everything(7)
    seven = first()
    assert zero != seven
    assert (first(seed=0), first(seed=7)) == (zero, seven)


def test_state_without_a_trainer():
    data = ready({"safety": safety()})
    loader = data.train_dataloader()
    whole = [batch.origins for _ in range(3) for batch in loader]
    assert data.state_dict()["batches"] == 15
    again = ready({"safety": safety()})
    again.load_state_dict(json.loads(json.dumps({**data.state_dict(), "batches": 7})))
    loader = again.train_dataloader()
    assert [batch.origins for _ in range(2) for batch in loader] == whole[7:]
    with pytest.warns(UserWarning, match="batches will not be as before: seed was"):
        ready({"safety": safety()}, seed=99).load_state_dict(data.state_dict())


class Toy(LightningModule):
    """The least module that uses the data as ours do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = build_tokenizer()
        self.validated = []

    def training_step(self, batch, batch_idx):
        return self.weight.sum() * len(batch.response_segment)

    def validation_step(self, batch, batch_idx):
        self.validated += batch.origins

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_trainer(tmp_path):
    data = AlignmentData({"safety": safety(), "help": helpfulness(assume_safe=True)}, num_workers=0)
    module = Toy()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert data.state_dict()["batches"] == 10
    assert module.validated == 2 * [f"MicroworldSafety[validation]:{index}" for index in range(6)]
    trainer.validate(module, datamodule=data, verbose=False)
    assert len(module.validated) == 18


CONFIG = """
data:
  streams:
    safety:
      source: {class_path: MicroworldSafety, init_args: {count: 40, validation_count: 10}}
      adapter: PKUSafeRLHF
      batch_size: 8
    help: {source: MicroworldHelpfulness, adapter: UltraFeedbackBinarized, batch_size: 8, assume_safe: true}
"""


def test_from_yaml_and_the_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", action="config")
    parser.add_class_arguments(AlignmentData, "data")
    overrides = ["--data.streams.safety.batch_size=4", "--data.streams.safety.source.count=12"]
    overrides += ["--data.truncation.max_length=600", "--data.template.system=Be good."]
    data = parser.instantiate_classes(parser.parse_args(["-c", str(tmp_path / "config.yaml"), *overrides])).data
    safety, help = data.streams.values()
    assert (safety.batch_size, safety.source.count, safety.source.validation_count) == (4, 12, 10)
    assert (help.batch_size, help.assume_safe, safety.assume_safe) == (8, True, False)
    assert (data.truncation.max_length, data.template.system, data.driver) == (600, "Be good.", "safety")


def test_no_tokenizer():
    with pytest.raises(DataError, match="has no tokenizer"):
        AlignmentData({"safety": safety()}).setup("fit")


QUADRANTS = {"safe_safe": 313, "safe_unsafe": 0, "unsafe_safe": 253, "unsafe_unsafe": 0}


def test_xstest_pairs(shared_data, kit):
    source = LocalFiles(str(shared_data / "xstest_dual_pairs" / "pairs.jsonl"))
    adapter = Columns(chosen_safe="is_chosen_safe", rejected_safe="is_rejected_safe")
    data = ready({"safety": Stream(source, adapter, 8)}, tokenizer=plain_tokenizer(kit))
    assert data.report["safety"]["train"]["rows"] == 566
    assert data.report["safety"]["train"]["quadrants"] == QUADRANTS
    assert len(list(data.train_dataloader())) == 71


def test_pku_without_helpfulness_order(shared_data, kit):
    source = LocalFiles(str(shared_data / "pku_saferlhf_pairs" / "pku_discordant_clean.jsonl"))
    with pytest.raises(DataError) as caught:
        ready({"safety": Stream(source, PKUSafeRLHF(), 8)}, tokenizer=plain_tokenizer(kit))
    assert "safety, train: 2,701 of 2,701: no helpfulness order" in str(caught.value)
    assert "pku_discordant_clean.jsonl:1: better_response_id = None" in str(caught.value)
    assert "order: safety" in str(caught.value)
    template = ChatTemplate(kit.ZEPHYR)
    data = ready(
        {"safety": Stream(source, PKUSafeRLHF("safety"), 8)}, tokenizer=plain_tokenizer(kit), template=template
    )
    assert data.report["safety"]["train"]["quadrants"]["safe_unsafe"] == 2701


def test_a_hold_out_that_nothing_validates_on_is_refused(write_jsonl):
    held = Stream(LocalFiles(write_jsonl([GOOD])), Columns(), 2, validation_fraction=0.3)
    with pytest.raises(
        DataError, match=r"help\.validation_fraction holds rows out that nothing validates on: add help to"
    ):
        AlignmentData({"safety": safety(), "help": held})
    AlignmentData({"safety": safety(), "help": held}, validation_streams=["help"])


def test_validation_alone_tells_of_bad_rows_too(write_jsonl, kit):
    rows = [{**GOOD, "prompt": f"p{index}"} for index in range(20)]
    path = write_jsonl([*rows, {**GOOD, "chosen_safe": "yes"}])

    def of(stage, on_bad_row):
        stream = Stream(LocalFiles(path), Columns(), 2, validation_fraction=0.4)
        return ready({"mine": stream}, stage, plain_tokenizer(kit), on_bad_row=on_bad_row)

    with pytest.raises(DataError, match=r"mine, validation: 1 of \d+: a safety flag must be"):
        of("validate", "fail")
    assert sum(of("validate", "drop").report["mine"]["validation"]["dropped"].values()) == 1
    with pytest.raises(DataError, match=r"1 row cannot be used:\n  mine, train: 1 of \d+: a"):
        of("fit", "fail")
    both = of("fit", "drop").report["mine"]
    assert [len(both[split]["dropped"]) for split in ("train", "validation")] == [1, 0]
    for summary in both.values():
        assert summary["rows"] + sum(summary["dropped"].values()) + sum(summary["left_out"].values()) == 21


def test_prompts_that_another_stream_trains_on_are_counted(write_jsonl, kit):
    rows = [{**GOOD, "prompt": f"p{index}"} for index in range(50)]
    source = LocalFiles(write_jsonl(rows))
    held, other = Stream(source, Columns(), 2, validation_fraction=0.3), Stream(source, Columns(), 2)
    data = ready({"safety": held, "other": other}, tokenizer=plain_tokenizer(kit))
    validation = data.report["safety"]["validation"]
    assert validation["prompts_also_trained_on"] == validation["rows"] > 0
    alone = ready({"safety": held}, tokenizer=plain_tokenizer(kit))
    assert alone.report["safety"]["validation"]["prompts_also_trained_on"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_rows_are_counted_where_they_are_read(tmp_path, kit, workers, monkeypatch):
    said = []
    monkeypatch.setattr(streaming, "rank_zero_info", said.append)
    rows = [{**GOOD, "prompt": f"p{index}", "chosen": "a" * 40 if index % 4 == 0 else "a"} for index in range(20)]
    rows[3] = rows[13] = {**GOOD, "chosen_safe": "yes"}
    rows[5] = {**GOOD, "prompt": "p5", "chosen": "one</s>a", "rejected": "one</s>b"}  # useless as tokens
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = HubDataset(str(tmp_path), splits={"train": "train"}, streaming=True)
    data = ready(
        {"mine": Stream(source, Columns(), 3, shuffle_buffer=6)},
        tokenizer=plain_tokenizer(kit),
        on_bad_row="drop",
        truncation=Truncation(40, 30),
        num_workers=workers,
    )
    assert data.report["mine"]["train"]["responses_cut"] == 0, "nothing has been given yet"
    batches = iter(data.train_dataloader())
    origins = [origin for _ in range(6) for origin in next(batches).origins]
    assert len(set(origins)) == 17
    del batches
    counts = data.report["mine"]["train"]
    assert (counts["streaming"], sum(counts["dropped"].values())) == (True, 3)
    assert {reason[:20]: count for reason, count in counts["dropped"].items()} == {
        "a safety flag must b": 2,
        "the chosen and the r": 1,
    }
    assert counts["responses_cut"] == sum(int(origin.rpartition(":")[2]) % 4 == 0 for origin in origins)
    assert len([line for line in said if "dropped so far: 1," in line]) == len(said) == 1


def test_text_that_the_tokenizer_does_not_know_stops_a_streaming_source(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({**GOOD, "chosen": "a b c"}) + "\n")
    source = HubDataset(str(tmp_path), splits={"train": "train"}, streaming=True)
    with pytest.raises(DataError, match=r"mine, train, its first rows: \d\d% of the tokens are <unk>"):
        ready({"mine": Stream(source, Columns(), 3)})


def test_a_streaming_stream_before_a_stored_one(tmp_path, kit, write_jsonl):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(
        "".join(json.dumps({**GOOD, "prompt": f"s{n}"}) + "\n" for n in range(9))
    )
    first = Stream(HubDataset(str(tmp_path / "hub"), splits={"train": "train"}, streaming=True), Columns(), 2)
    second = Stream(LocalFiles(write_jsonl([{**GOOD, "prompt": f"t{n}"} for n in range(4)])), Columns(), 1)
    data = ready({"first": first, "second": second}, tokenizer=plain_tokenizer(kit))
    batch = next(iter(data.train_dataloader()))
    assert [origin.startswith(str(tmp_path / "hub")) for origin in batch.origins] == [True, True, False]
    assert batch.pair_stream.tolist() == [0, 0, 1]


def test_a_turn_that_ends_in_no_stop_token_is_told(write_jsonl, kit):
    tokenizer = kit.byte_level()
    tokenizer.chat_template = kit.CHATML
    stream = {"mine": Stream(LocalFiles(write_jsonl([GOOD])), Columns(), 1)}
    with pytest.warns(UserWarning, match=r"ends turns with <\|im_end\|>.*stop_tokens: \['<\|im_end\|>'\]"):
        ready(stream, tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(stream, tokenizer=tokenizer, template=ChatTemplate(stop_tokens=["<|im_end|>"]))
