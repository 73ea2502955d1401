"""The real command on data as it is: real files, streams that are read as training goes on, packing, token budgets."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RUN = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
SFT_SMALL = [*RUN, "--data.streams.sft.source.count=60", "--data.streams.sft.source.validation_count=8"]


@pytest.fixture
def byte_model(tmp_path):
    """A tiny model that knows any text, as a folder in Hub format; its generation config ends turns as ChatML does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", chat_template=CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return ["--model.policy=HFModel", f"--model.policy.path={tmp_path / 'model'}"]


@pytest.fixture
def real_data(request):
    folder = Path(os.environ.get("BFPO_SHARED", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "INDEX.md").is_file():
        pytest.skip(f"the real data files are not at {folder} (set BFPO_SHARED)")
    return folder


def metrics(run):
    with (run.run_folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def report(run):
    return json.loads((run.run_folder / "data.json").read_text())


def test_xstest_pairs_train_beside_a_helpfulness_stream(bfpo, base, byte_model, real_data, tmp_path):
    helpful = [{"prompt": f"Count to {n}", "chosen": "1 2 3 " * n, "rejected": "No."} for n in range(1, 9)]
    (tmp_path / "helpful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in helpful))
    run = bfpo(
        "fit",
        *base,
        *("-c", "configs/data/two_jsonl.yaml"),
        *byte_model,
        *RUN,
        "--trainer.val_check_interval=3",
        "--trainer.limit_val_batches=2",
        f"--data.streams.safety.source.path={real_data / 'xstest_dual_pairs' / 'pairs.jsonl'}",
        "--data.streams.safety.adapter.chosen_safe=is_chosen_safe",
        "--data.streams.safety.adapter.rejected_safe=is_rejected_safe",
        "--data.streams.safety.validation_fraction=0.1",
        "--data.streams.safety.batch_size=3",
        "--data.streams.helpfulness.batch_size=2",
        f"--data.streams.helpfulness.source.path={tmp_path / 'helpful.jsonl'}",
        "--data.validation_batch_size=2",
        "--data.truncation.max_length=300",
        "--data.truncation.max_prompt_length=100",
    )
    data = report(run)
    train, validation = data["safety"]["train"], data["safety"]["validation"]
    assert train["rows"] + validation["rows"] == 566
    assert 30 < validation["rows"] < 90
    assert validation["prompts_also_trained_on"] == 0
    both = {name: train["quadrants"][name] + validation["quadrants"][name] for name in train["quadrants"]}
    assert both == {"safe_safe": 313, "safe_unsafe": 0, "unsafe_safe": 253, "unsafe_unsafe": 0}
    assert train["responses_cut"] > 0
    last = [row for row in metrics(run) if row.get("train/all/all/loss")][-1]
    assert float(last["train/helpfulness/safe_safe/loss"]) > 0
    assert float(last["train/safety/all/loss"]) > 0
    assert [row for row in metrics(run) if row.get("val/safety/all/loss")]


def test_a_generation_configs_stop_token_ends_responses(bfpo, base, byte_model, tmp_path):
    rows = [{"prompt": "p", "chosen": "a" * n, "rejected": "b", "chosen_safe": 1, "rejected_safe": 0} for n in (1, 2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = bfpo(
        "fit", *base, "-c", "configs/data/jsonl.yaml", *byte_model, *RUN,
        f"--data.streams.safety.source.path={tmp_path / 'pairs.jsonl'}",
    )  # fmt: skip
    tokenizer = run.datamodule.tokenizer
    batch = next(iter(run.datamodule.train_dataloader()))
    for segment in batch.response_segment.tolist():
        start, length = batch.segment_start[segment], batch.segment_length[segment]
        text = tokenizer.decode(batch.tokens[start : start + length])
        assert text.strip("ab") == "<|im_end|>"


@pytest.fixture
def streaming(tmp_path):
    """Overrides that make the safety stream read a local dataset as training goes on."""
    rows = [
        {"prompt": f"open window {n}", "chosen": "yes", "rejected": "no", "chosen_safe": n % 2, "rejected_safe": 1}
        for n in range(10)
    ]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = {
        "source": {
            "class_path": "HubDataset",
            "init_args": {"path": str(folder), "splits": {"train": "train"}, "streaming": True},
        },
        "adapter": "Columns",
        "batch_size": 4,
        "shuffle_buffer": 4,
    }
    config = tmp_path / "streaming.yaml"
    config.write_text(json.dumps({"data": {"streams": {"safety": stream}}}))
    return ["-c", str(config)]


def test_a_streaming_driver_needs_no_length(bfpo, base, byte_model, streaming):
    run = bfpo("fit", *base, *streaming, *byte_model, "--trainer.max_steps=7", "--trainer.accelerator=cpu")
    assert run.trainer.global_step == 7
    assert run.datamodule.state_dict()["batches"] == 7
    assert report(run)["safety"]["train"]["streaming"] is True


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_worker_finds_is_told_as_any_other(
    bfpo, base, byte_model, streaming, tmp_path, capsys, workers
):
    file = tmp_path / "dataset" / "train.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows, json.dumps({**json.loads(rows[0]), "chosen_safe": 7})]))
    with pytest.raises(SystemExit) as caught:
        bfpo("fit", *base, *streaming, *byte_model, *RUN, f"--data.num_workers={workers}")
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "bfpo: error: Stream 'safety' has a row that cannot be used: " in said
    assert "DataLoader worker" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.streams.safety.fraction=0.5"], "need to see all rows"),
        (["--data.streams.safety.validation_fraction=0.5"], "need to see all rows"),
        (["--data.batching=LengthBuckets"], "LengthBuckets needs the length of every row beforehand"),
        (
            ["--trainer.max_steps=-1", "--trainer.max_epochs=1"],
            "set trainer.max_steps, since epochs have no known length: stream 'safety', the driver, reads its rows as",
        ),
        (["--trainer.limit_train_batches=0.5"], "set a whole number of batches"),
    ],
)
def test_what_a_streaming_source_cannot_do(bfpo, base, byte_model, streaming, override, message, capsys):
    with pytest.raises(SystemExit):
        bfpo("fit", *base, *streaming, *byte_model, "--trainer.accelerator=cpu", *override)
    assert message in " ".join(capsys.readouterr().err.split())


def test_batches_by_tokens(bfpo, base, small):
    run = bfpo("fit", *base, *small, "--data.batching=TokenBudget", "--data.batching.tokens=400")
    sizes = [len(batch.tokens) for batch in run.datamodule.train_dataloader()]
    quotas = [torch.bincount(batch.pair_stream).tolist() for batch in run.datamodule.train_dataloader()]
    assert max(sizes) <= 400
    assert len(set(sizes)) > 1
    assert all(safety == helpfulness for safety, helpfulness in quotas)
    assert "TokenBudget" in run.datamodule.state_dict()["geometry"]["batching"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--trainer.max_epochs=1",
            "set trainer.max_steps, since epochs have no known length: data.batching: TokenBudget",
        ),
        ("--trainer.limit_train_batches=0.5", "is not known (data.batching: TokenBudget puts as many rows"),
    ],
)
def test_epochs_of_token_budgets_have_no_known_length(bfpo, base, small, override, message, capsys):
    small = [*small, "--trainer.max_steps=-1"]
    with pytest.raises(SystemExit):
        bfpo("fit", *base, *small, "--data.batching=TokenBudget", "--data.batching.tokens=400", override)
    said = capsys.readouterr().err
    assert message in said
    assert "or max_epochs" not in said


def test_official_packing(bfpo):
    run = bfpo(
        "sft", "-c", "configs/sft.yaml", *SFT_SMALL, "--data.streams.sft.batch_size=2",
        "--data.packing=OfficialPacking",
        "--data.packing.length=64", "--data.template.loss_on=all",
    )  # fmt: skip
    counts = report(run)["sft"]["train"]
    assert counts["blocks"] == counts["tokens"] // 64
    assert counts["tokens_after_the_last_block"] == counts["tokens"] % 64
    batch = next(iter(run.datamodule.train_dataloader()))
    assert batch.segment_length.tolist() == [1, 63, 1, 63]
    whole = run.datamodule.readings["sft", "train"].rows
    assert len(whole) == 60


def test_documents_share_a_block_and_stay_apart(bfpo):
    run = bfpo(
        "sft", "-c", "configs/sft.yaml", *SFT_SMALL, "--data.streams.sft.batch_size=2",
        "--data.packing=DocumentPacking", "--data.packing.length=40",
    )  # fmt: skip
    data, counts = run.datamodule, report(run)["sft"]["train"]
    loader = data.train_dataloader()
    epoch = map(loader.batch_sampler.batch, range(len(loader)))
    batches = [loader.collate_fn(loader.dataset.__getitems__(keys)) for keys in epoch]
    assert run.trainer.num_training_batches == len(batches) == -(-counts["blocks"] // 2) < 30
    documents = {tree.origin: tree for tree in data.rows["sft", "train"].at(range(60))}
    assert sorted(origin for batch in batches for origin in batch.origins) == sorted(documents)
    assert all(len(batch.tokens) <= 80 for batch in batches)
    batch = batches[0]
    starts = batch.segment_start[batch.prompt_segment]
    assert torch.equal(batch.positions[starts], torch.zeros_like(starts)), "each document begins anew"
    assert [len(documents[origin].response_ids[0]) for origin in batch.origins] == batch.response_lengths.tolist()


def test_loss_on_all_tokens(bfpo):
    responses = bfpo("sft", "-c", "configs/sft.yaml", *SFT_SMALL)
    everything = bfpo("sft", "-c", "configs/sft.yaml", *SFT_SMALL, "--data.template.loss_on=all")
    ours, theirs = (next(iter(run.datamodule.train_dataloader())) for run in (responses, everything))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert theirs.response_tokens == len(theirs.tokens) - len(theirs.response_segment)
    assert ours.response_tokens < theirs.response_tokens


def test_contamination_and_duplicates_are_counted_in_the_record(bfpo, base, byte_model, tmp_path):
    row = {"prompt": "Open the window", "chosen": "yes", "rejected": "no", "chosen_safe": 1, "rejected_safe": 0}
    rows = [row, row, *({**row, "prompt": f"p{n}"} for n in range(6))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (tmp_path / "evaluation.jsonl").write_text('{"question": "p3"}\n')
    run = bfpo(
        "fit", *base, "-c", "configs/data/jsonl.yaml", *byte_model, *RUN,
        f"--data.streams.safety.source.path={tmp_path / 'pairs.jsonl'}", "--data.streams.safety.duplicates=drop",
        f"--data.contamination.path={tmp_path / 'evaluation.jsonl'}", "--data.contamination.field=question",
    )  # fmt: skip
    train = report(run)["safety"]["train"]
    assert (train["rows"], train["duplicates"]) == (6, 1)
    assert sorted(train["left_out"].values()) == [1, 1]
