"""The real `bfpo data`: its numbers against ones computed here, its tokens against the decoded sequence."""

from __future__ import annotations

import json
import re

import matplotlib.image
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from bfpo_pl.data.encoding import RowEncoder
from bfpo_pl.data.microworld_sources import MicroworldSafety
from bfpo_pl.data.rows import Row
from bfpo_pl.data.schemas import PKUSafeRLHF
from bfpo_pl.data.templates import ChatTemplate, OfficialTemplate
from bfpo_pl.inspection.command import module_class
from bfpo_pl.inspection.histogram import line
from bfpo_pl.inspection.pieces import pieces
from bfpo_pl.inspection.show import Gap, abbreviated
from bfpo_pl.inspection.template_check import check_template
from bfpo_pl.microworld import build_tokenizer
from bfpo_pl.module import PreferenceModule
from bfpo_pl.sft import SFTModule

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JSONL = ["-c", "configs/base.yaml", "-c", "configs/data/jsonl.yaml"]
BFPO = ["-c", "configs/experiment/bfpo.yaml"]
LABELS = {(1, 1): "0.5", (1, 0): "1", (0, 0): "-0.5", (0, 1): "-1"}  # BFPO at b1 = 3, alpha = 1/2, by hand
NAMES = {1: "safe", 0: "unsafe"}


def byte_level(eos: str, merges: int = 40) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 3 + merges,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(["Open the window. How do I open the window?"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, chat_template=CHATML)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False)
    core.train_from_iterator(["Open the window. How do I open the window?"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Overrides that name a folder with a config and a ChatML tokenizer, and no weights, by end-of-sequence token."""
    overrides = {}
    for eos in ("<|im_end|>", "<|endoftext|>"):
        folder = tmp_path_factory.mktemp("model")
        byte_level(eos).save_pretrained(folder)
        LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
        overrides[eos] = ["--model.policy=HFModel", f"--model.policy.path={folder}"]
    return overrides


@pytest.fixture
def pairs(tmp_path):
    """Writes pairs to a file and gives the override that names it."""

    def write(rows, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return f"--data.streams.safety.source.path={path}"

    return write


def pair(number, chosen="Turn the handle.", rejected="Break it.", chosen_safe=1, rejected_safe=1, **more):
    flags = {"chosen_safe": chosen_safe, "rejected_safe": rejected_safe}
    return {"prompt": f"How do I open window {number}?", "chosen": chosen, "rejected": rejected, **flags, **more}


def said(text):
    """Output with every run of white space as one space, so that it does not matter where lines end."""
    return " ".join(text.split())


def shown_quantiles(text, title):
    """The numbers of the table of lengths below a title, by row."""
    block = text[text.index(f"\n{title} ─") :].split("─\n", 1)[1].split("\n─")[0]
    found = re.findall(r"^(prompt|chosen|rejected|response|whole row) +([\d, ]+?) +\|", block, re.MULTILINE)
    return {part: [int(value.replace(",", "")) for value in numbers.split()] for part, numbers in found[:4]}


def test_usage(bfpo, capsys):
    for args in ((), ("--help",), ("inspect", "--help")):
        assert bfpo("data", *args) is None
        text = capsys.readouterr().out
        assert "bfpo data inspect -c" in text
        assert "--full" in text
    bfpo("--help")
    assert re.search(r"^  data +Inspects", capsys.readouterr().out, re.MULTILINE)
    for args, message in (
        (("look",), "no command 'look'"),
        (("show", "--n=0", *JSONL), "--n must be at least 1"),
        (("show", "--n=x", *JSONL), "invalid int value"),
    ):
        with pytest.raises(SystemExit) as caught:
            bfpo("data", *args)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_the_module_is_what_configs_and_overrides_name(in_repository, tmp_path):
    assert module_class(["-c", "configs/base.yaml", "--model.policy=TinyModel"]) is SFTModule
    assert module_class(["-c", "configs/base.yaml", *BFPO]) is PreferenceModule
    assert module_class(["--config=configs/experiment/dpo.yaml"]) is PreferenceModule
    assert module_class(["--model.labeling=BFPO"]) is PreferenceModule
    assert module_class(["--model.loss.tau=1"]) is PreferenceModule
    (tmp_path / "reference.yaml").write_text("model: {reference: {class_path: FrozenCopy}}")
    assert module_class(["-c", str(tmp_path / "reference.yaml")]) is PreferenceModule


def test_inspect_counts_and_measures_the_microworld(bfpo, base, small, tmp_path, capsys):
    bfpo("data", "inspect", *base, *small, f"--runs={tmp_path / 'runs'}", "--out", str(tmp_path / "out"))
    text = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    source = MicroworldSafety(40, 12)
    for split, size in (("train", 40), ("validation", 12)):
        rows = [PKUSafeRLHF()(raw, origin) for origin, raw in source.rows(split)]
        # <bos>, the words, <sep>; and the words of a response with <eos>.
        prompt = np.array([len(row.prompt[0].content.split()) + 2 for row in rows])
        sides = {
            name: np.array([len(row.responses[row.pairs[0][side]].split()) + 1 for row in rows])
            for side, name in enumerate(("chosen", "rejected"))
        }
        lengths = {"prompt": prompt, **sides, "whole row": prompt + sides["chosen"] + sides["rejected"]}
        expected = {
            part: [int(f"{value:.0f}") for value in np.quantile(each, [0, 0.05, 0.5, 0.95, 0.99, 1])]
            for part, each in lengths.items()
        }
        assert shown_quantiles(text, f"safety, {split}") == expected
        assert f"rows {size} used of {size} in the source" in said(text)
        flags = [tuple(int(row.columns["safe"][index]) for index in row.pairs[0]) for row in rows]
        for quadrant in LABELS:
            count = flags.count(quadrant)
            assert f"{NAMES[quadrant[0]]}, {NAMES[quadrant[1]]}: {count} ({count / size:.1%})" in said(text)
        assert f"tokens {lengths['whole row'].sum():,}; 0 unknown to the tokenizer" in said(text)
    assert "an epoch has 10 batches on one process" in said(text)
    assert text.count("whole row: the prompt once, with all its responses.") == 3
    assert "BOS <bos> (id 1), once, at the start" in said(text)
    assert "response ends in <eos> (id 2): written by the template" in said(text)
    assert "`bfpo fit` would go on." in text
    image = matplotlib.image.imread(tmp_path / "out" / "lengths.png")
    assert image.shape[0] > 500
    assert image.shape[1] == 1200
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


BAD = [
    *(pair(number) for number in range(20)),
    pair(0),  # repeats the first
    pair(1, "Break it.", "Turn the handle.", 0, 1),  # the other order; and another flag for the same response
    *(pair(number, chosen_safe="yes") for number in range(30, 36)),
    pair(40, rejected="Turn the handle."),
    {"chosen": "?"},
]


@pytest.mark.parametrize("on_bad_row", ["fail", "drop"])
def test_inspect_goes_on_after_bad_rows(bfpo, model, pairs, capsys, monkeypatch, on_bad_row):
    monkeypatch.setenv("COLUMNS", "400")  # no line break within a path
    bfpo("data", "inspect", *JSONL, *BFPO, *model["<|im_end|>"], pairs(BAD), f"--data.on_bad_row={on_bad_row}")
    text = said(capsys.readouterr().out)
    assert "rows 22 used of 30 in the source" in text
    assert "dropped 6: a safety flag must be" in text
    assert "8 rows cannot be used: safety, train: 6 of 30: a safety flag must be" in text
    assert text.count("chosen_safe = 'yes'") == 5  # the first five examples
    assert "duplicates 1 rows repeat another one" in text
    assert "both orders 2 pairs come in both orders" in text
    assert re.search(r"contradictions 1 responses are flagged safe .* first at \S*pairs.jsonl:2 ", text)
    stops = "`bfpo fit` would stop: the rows above (data.on_bad_row: fail)"
    goes_on = "`bfpo fit` would go on, without the rows above (data.on_bad_row: drop)"
    assert (stops in text, goes_on in text) == ((True, False) if on_bad_row == "fail" else (False, True))


def test_inspect_says_so_where_no_row_can_be_used(bfpo, model, pairs, capsys):
    bfpo("data", "inspect", *JSONL, *BFPO, *model["<|im_end|>"], pairs(BAD[22:]))
    text = said(capsys.readouterr().out)
    assert "rows 0 used of 8 in the source" in text
    assert "6 of 8: a safety flag must be" in text
    assert "would stop: Stream 'safety' has no row to use in its train split" in text


def test_inspect_hold_out_cuts_and_shared_prompts(bfpo, model, pairs, capsys):
    rows = [pair(number, chosen="Turn the handle. " * 30) for number in range(50)]
    tight = ["--data.truncation.max_length=60", "--data.truncation.max_prompt_length=40"]
    held = "--data.streams.safety.validation_fraction=0.3"
    cli = bfpo("data", "inspect", *JSONL, *model["<|im_end|>"], pairs(rows), held, *tight)
    text = said(capsys.readouterr().out)
    size = len(cli.datamodule.readings["safety", "train"].kept)
    assert 0 < size < 50
    assert f"rows {size} used of 50 in the source left out {50 - size}: held out for validation" in text
    assert f"responses cut {size} of {2 * size} (50.00%)" in text
    assert "shared 0 of the prompts are training prompts too" in text
    assert "No labeling is configured" in text
    longest = "--data.streams.safety.source.validation_path=" + pairs(rows[:7], "held.jsonl").partition("=")[2]
    bfpo("data", "inspect", *JSONL, *model["<|im_end|>"], pairs(rows), longest)
    assert "shared 7 of the prompts are training prompts too" in said(capsys.readouterr().out)


def test_inspect_batches_of_tokens_and_packed_rows(bfpo, small, capsys):
    small = [item for item in small if "streams" not in item]
    args = ["-c", "configs/sft.yaml", *small, "--data.streams.sft.source.count=30"]
    cli = bfpo("data", "inspect", *args, "--data.batching=TokenBudget", "--data.batching.tokens=100")
    count = sum(1 for _ in cli.datamodule.train_dataloader())
    assert f"an epoch has {count} batches on one process, the first one" in said(capsys.readouterr().out)
    official = ["--data.packing=OfficialPacking", "--data.packing.length=50", "--data.template.loss_on=all"]
    bfpo("data", "inspect", *args, *official)
    text = said(capsys.readouterr().out)
    total = int(re.search(r"tokens (\d+); 0 unknown", text)[1])
    assert f"packed {total // 50} blocks; {total % 50} tokens after the last one are dropped" in text
    assert "`bfpo sft` would go on." in text
    assert "cuts documents" not in text
    bfpo(
        "data", "inspect", *args, *official, "--data.truncation.max_length=20", "--data.truncation.max_prompt_length=9"
    )
    assert "are dropped; data.truncation cuts documents beforehand" in said(capsys.readouterr().out)
    cli = bfpo("data", "inspect", *args, "--data.packing=DocumentPacking", "--data.packing.length=50")
    blocks = len(cli.datamodule.train_dataloader().dataset)
    assert f"packed {blocks} blocks" in said(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["fit"], ["sft"], ["data", "inspect"]])
def test_rows_with_several_responses_are_not_packed_the_official_way(bfpo, base, small, capsys, command):
    packing = ["--data.packing=OfficialPacking", "--data.template.loss_on=all"]
    if command == ["sft"]:
        base, small = (
            ["-c", "configs/sft.yaml"],
            [item for item in small if "safety" not in item and "help" not in item],
        )
        small += ["--data.streams.sft.source=MicroworldSafety", "--data.streams.sft.adapter=PKUSafeRLHF"]
    try:
        bfpo(*command, *base, *small, *packing)
    except SystemExit:
        assert command[0] != "data"
    output = capsys.readouterr()
    text = said(output.err + output.out)
    assert "data.packing: OfficialPacking joins rows with one response, and " in text
    assert "[train]:0. Leave out data.packing" in text
    with pytest.raises(SystemExit):
        bfpo(*command, *base, *small, packing[0])
    assert "Set data.template.loss_on: all" in capsys.readouterr().err


def test_inspect_a_source_that_streams(bfpo, model, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    rows = "".join(json.dumps(pair(number)) + "\n" for number in range(6))
    (tmp_path / "rows" / "train.jsonl").write_text(rows)
    source = ["source=HubDataset", f"source.path={tmp_path / 'rows'}", "source.streaming=true"]
    source = [f"--data.streams.safety.{each}" for each in (*source, "source.splits={train: train}")]
    bfpo("data", "inspect", *JSONL, *BFPO, *model["<|im_end|>"], *source)
    text = said(capsys.readouterr().out)
    assert "nothing of them is counted here" in text
    assert "an epoch has no end" in text
    assert "How do I open window" in text
    assert "`bfpo fit` would go on." in text


def test_the_template_check_warns_of_an_end_that_ends_nothing(bfpo, model, pairs, capsys):
    data = pairs([pair(number) for number in range(4)])
    warning = "The template ends turns with <|im_end|>, which is not among the tokens that end a response"
    bfpo("data", "inspect", *JSONL, *model["<|endoftext|>"], data)
    text = said(capsys.readouterr().out)
    assert f"Warning: {warning} (<|endoftext|>)" in text
    assert "Set data.template.stop_tokens: ['<|im_end|>']" in text
    assert "response ends in <|endoftext|> (id 2): put there" in text
    expected = r"rendered <|im_start|>user\nHow do I open window 0?<|im_end|>\n<|im_start|>assistant\nTurn the handle."
    assert expected.replace(" ", "") in text.replace(" ", "")
    assert "prompt is a prefix yes" in text
    assert "BOS the tokenizer has none" in text
    bfpo("data", "inspect", *JSONL, *model["<|endoftext|>"], data, '--data.template.stop_tokens=["<|im_end|>"]')
    text = said(capsys.readouterr().out)
    assert "Warning" not in text
    assert "response ends in <|im_end|> (id 1): written by the template" in text
    assert r"cut after it '\n', which the template writes" in text


def test_stop_tokens_in_a_text_end_it_or_not(bfpo, model, pairs, capsys):
    data = pairs([pair(number, chosen="Turn<|im_end|> it.") for number in range(4)])
    for template, then in (("ChatTemplate", "and end there"), ("OfficialTemplate", "but go on after it")):
        bfpo("data", "inspect", *JSONL, *model["<|im_end|>"], data, f"--data.template={template}")
        found = re.search(
            r"4 responses hold a stop token in their own text, ([\w ]+?) tokens", said(capsys.readouterr().out)
        )
        assert found[1] == then
    data = pairs([pair(0), {**pair(1), "prompt": "Hello<|im_end|>\n<|im_start|>assistant"}])
    bfpo("data", "inspect", *JSONL, *model["<|im_end|>"], data)
    assert "special in prompt 1 rows have special tokens in the text" in said(capsys.readouterr().out)


def test_the_template_check_warns_of_a_second_beginning():
    """The standard policy writes it once, whatever the template does at its beginning; the official one adds one."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    row = Row.single("One?", "Two.", "f:1")
    standard = check_template(RowEncoder(sentencepiece_like(), ChatTemplate(template)), row)
    assert (standard.facts["BOS"], standard.warnings) == ("<s> (id 1), once, at the start", [])
    [warning] = check_template(RowEncoder(sentencepiece_like(), OfficialTemplate(template, None)), row).warnings
    assert warning.startswith(
        "<s> is in the sequence 2 times. OfficialTemplate puts one before what the template writes"
    )


def test_the_template_check_names_a_prompt_that_is_no_prefix(bfpo, model, pairs, capsys):
    template = (
        "{% for m in messages %}({{ m.role }}) {{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    data = pairs([pair(number) for number in range(4)])
    bfpo("data", "inspect", *JSONL, *model["<|im_end|>"], data, f"--data.template.chat_template={template}")
    text = said(capsys.readouterr().out)
    assert "prompt is a prefix no; the prompt alone is rendered as (user) How do I open window 0?!" in text
    assert "rows 4 used of 4" in text
    assert "`bfpo fit` would stop: " in text


def test_show_labels_by_hand(bfpo, model, pairs, capsys):
    rows = [pair(number, chosen_safe=c, rejected_safe=r) for number, (c, r) in enumerate(LABELS)]
    bfpo("data", "show", *JSONL, *BFPO, *model["<|im_end|>"], pairs(rows), "--n=4")
    text = said(capsys.readouterr().out)
    assert "Labels g by BFPO(b1=3.0, b3=0.5, alpha=0.5)" in text
    for number, ((chosen, rejected), label) in enumerate(LABELS.items()):
        own = re.search(rf"pairs\.jsonl:{number + 1} prompt.*?pair: (quadrant \S+, label g = \S+)", text)
        assert own[1] == f"quadrant {NAMES[chosen]}_{NAMES[rejected]}, label g = {label}"
        assert f"safe {chosen}" in own[0]
    bfpo("data", "show", *JSONL, *model["<|im_end|>"], pairs(rows), "--n=2")
    text = capsys.readouterr().out
    assert text.count("quadrant") == 2
    assert "label g" not in text
    assert "No labeling is configured" in text


def test_show_says_which_columns_the_labeling_lacks(bfpo, model, pairs, capsys):
    none = [f"--data.streams.safety.adapter.{side}_safe=null" for side in ("chosen", "rejected")]
    args = [*JSONL, *BFPO, *model["<|im_end|>"], pairs([pair(0), pair(1)]), *none]
    missing = "needs chosen_safe and rejected_safe, which the stream 'safety' lacks (its columns: none)"
    bfpo("data", "show", *args)
    text = said(capsys.readouterr().out)
    assert f"No labels: BFPO(b1=3.0, b3=0.5, alpha=0.5) {missing}" in text
    assert "label g" not in text
    bfpo("data", "inspect", *args)
    assert f"would stop: BFPO(b1=3.0, b3=0.5, alpha=0.5) {missing}" in said(capsys.readouterr().out)


def test_shown_tokens_are_the_sequence(bfpo, model, pairs, capsys):
    """With --full, marks taken away, the text is the decoded sequence; without it the middle of a long text is not."""
    secret = "Grüße, 👍 " * 20 + "SECRET " + "你好 " * 20
    data = pairs([pair(0, chosen=secret)])
    cli = bfpo("data", "show", *JSONL, *model["<|im_end|>"], data, "--full")
    text = capsys.readouterr().out
    _, prompt, chosen, rejected = re.split(r"^  (?:prompt|chosen|rejected), .*\n", text, flags=re.MULTILINE)
    lines = [[line[4:] for line in part.splitlines() if line.startswith("    ")] for part in (prompt, chosen, rejected)]
    [tree] = cli.datamodule.train_dataloader().dataset.trees[0].at([0])
    tokenizer = AutoTokenizer.from_pretrained(cli.model.source.path)
    whole = [tokenizer.decode(ids.tolist()).replace("\n", "\\n") for ids in (tree.prompt_ids, *tree.response_ids)]
    assert "".join(lines[0]).replace("|", "") == whole[0].replace("|", "")  # it is both a mark and in the text
    for shown, expected in zip(lines[1:], whole[1:], strict=True):
        assert "".join(shown)[1:-1].replace("][", "") == expected
    assert f"chosen, {len(tree.response_ids[0])} tokens" in text
    bfpo("data", "show", *JSONL, *model["<|im_end|>"], data)
    text = capsys.readouterr().out
    assert "SECRET" not in "".join(re.findall(r"\[(.*?)\]", text))
    assert "more tokens …" in text
    assert "--full shows all" in text
    assert "[<|im_end|>]" in text


def test_show_supervised_rows(bfpo, small, capsys):
    small = [item for item in small if "streams" not in item]
    bfpo("data", "show", "-c", "configs/sft.yaml", *small, "--data.streams.sft.source.count=8", "--n=1")
    text = capsys.readouterr().out
    tokens = re.search(r"^  response, (\d+) tokens\n((?:    .*\n)+)", text, re.MULTILINE)
    assert tokens[2].count("[") == int(tokens[1])
    assert tokens[2].rstrip().endswith("[ <eos>]")
    assert "label" not in text


@pytest.mark.parametrize("template", ["ChatTemplate", "OfficialTemplate"])
@pytest.mark.parametrize("packing", ["", "DocumentPacking", "OfficialPacking"])
def test_show_tells_the_prompt_apart_where_all_tokens_carry_loss(bfpo, model, tmp_path, capsys, template, packing):
    rows = [pair(n, chosen=f"Turn handle {n}.") for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = {"class_path": "Columns", "init_args": {"chosen": "chosen", "rejected": None}}
    adapter["init_args"] |= {"chosen_safe": None, "rejected_safe": None}
    bfpo(
        "data", "show", "-c", "configs/sft.yaml", "-c", "configs/data/sft_jsonl.yaml", *model["<|im_end|>"],
        *([f"--data.packing={packing}", "--data.packing.length=60"] if packing else []),
        f"--data.streams.sft.source.path={tmp_path / 'rows.jsonl'}",
        f"--data.streams.sft.adapter={json.dumps(adapter)}",
        f"--data.template={template}", "--data.template.loss_on=all", "--n=9", "--full",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "first token: no| loss|   prompt: {carries}{ loss}   response: [carries][ loss]" in text
    parts = re.findall(r"^  (prompt|response), (\d+) tokens\n((?:    .*\n)+)", text, re.MULTILINE)
    texts = {"prompt": "", "response": ""}
    for kind, size, shown in parts:
        tokens = re.findall(r"\{(.*?)\}|\[(.*?)\]|(.+?)\|(?=[\[{])", "".join(line[4:] for line in shown.splitlines()))
        assert len(tokens) == int(size)
        texts[kind] += "".join("".join(each) for each in tokens)
    header = r"<|im_start|>assistant\n"
    assert (header in texts["prompt"], header in texts["response"]) == (
        (True, False) if template == "ChatTemplate" else (False, True)
    )
    assert "How do I open window" in texts["prompt"]
    assert "Turn handle" in texts["response"]
    assert "Turn" not in texts["prompt"]
    assert "open" not in texts["response"]
    if packing != "OfficialPacking":
        assert [kind for kind, _, _ in parts] == 4 * ["prompt", "response"]
        assert texts["prompt"].count("How do I open window") == texts["response"].count("Turn handle") == 4


def test_show_gives_prompt_loss_and_response_colours_of_their_own(bfpo, capsys, monkeypatch):
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    args = ["-c", "configs/sft.yaml", "--data.streams.sft.source.count=8", "--n=1"]
    backgrounds = {}
    for loss in ("response", "all"):
        bfpo("data", "show", *args, f"--data.template.loss_on={loss}")
        tree = capsys.readouterr().out.partition("MicroworldSFT")[2]
        found = re.split(r"^  (?:prompt|response), ", tree, flags=re.MULTILINE)[1:]
        backgrounds[loss] = [set(re.findall(r"48;2;(\d+;\d+;\d+)m", part)) for part in found]
    (prompt, response), (trained, trained_response) = backgrounds["response"], backgrounds["all"]
    assert response == trained_response
    assert len(prompt) == len(response) == 2, "neighbours are told apart"
    assert not prompt & response
    assert not trained & response
    assert len(trained - prompt) == 2, "all but the first"


@pytest.mark.parametrize("width", [80, 120])
def test_output_fits_the_terminal(bfpo, model, pairs, base, small, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    bfpo("data", "inspect", *base, *small)
    bfpo("data", "show", *base, *small)
    bfpo("data", "show", *JSONL, *BFPO, *model["<|im_end|>"], pairs([pair(0, chosen="Turn it. " * 99)]), "--full")
    widths = [len(line) for line in capsys.readouterr().out.splitlines()]
    assert max(widths) <= width
    assert sum(each > 0.8 * width for each in widths) > 10  # and makes use of it


@pytest.mark.parametrize("build", [build_tokenizer, lambda: byte_level("<|im_end|>"), sentencepiece_like])
def test_pieces_join_to_the_decoded_sequence(build):
    tokenizer = build()
    for text in ("open the window . sorry", "Grüße 👍👍🏽 naïve\n\n 你好  x", "", " a", "\ufffd", "�a �"):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids)
        assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_pieces_give_each_token_its_own_text():
    tokenizer = byte_level("<|im_end|>", merges=0)
    ids = tokenizer("aé<|im_end|>")["input_ids"]
    assert pieces(tokenizer, ids) == ["a", "", "é", "<|im_end|>"]


def test_abbreviated_keeps_both_ends_and_special_tokens_are_free():
    letters = [(letter, False) for letter in "x" * 60 + "y" * 10 + "z" * 20]
    assert abbreviated(letters) == [*letters[:60], Gap(10), *letters[70:]]
    assert abbreviated(letters[:60] + letters[70:]) == letters[:60] + letters[70:]
    marked = [("<s>", True), *letters, ("</s>", True)]
    assert abbreviated(marked) == [*marked[:61], Gap(10), *marked[71:]]


def test_a_histogram_in_a_line():
    assert line(np.array([1, 1, 2, 4]), 10) == "█▄ ▄"
    assert line(np.array([7, 7]), 10) == "█"
    assert line(np.arange(100), 10) == "█" * 10
    assert line(np.array([0] * 1000 + [9]), 10) == "█        ▁"  # one is not nothing
