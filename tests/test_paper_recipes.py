"""The paper's recipes: their settings, the networks of their true size, and runs on tiny models of the same classes."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import hub_folders as hub
import pytest
import torch
from paper_rows import pku_rows, red_team_rows, ultrachat_rows, ultrafeedback_rows
from parsed import parsed
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, get_cosine_schedule_with_warmup

from bfpo_pl import Annotations
from bfpo_pl.estimation.skeleton import on_meta
from bfpo_pl.module import PreferenceModule
from bfpo_pl.sft import SFTModule

PAPER_7B = ("model/mistral_7b_selective", "strategy/fsdp2")
SHARED_7B = ("model/mistral_7b_selective", "reference/shared_weights", "strategy/fsdp2")
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """A recipe as its header's command line has it.

    Args:
        files: Stacked config files.
        config: The network's config, of published or of other sizes.
        path: The model's name.
        special: Beginning and end of a sequence, and the tokenizer's chat template.
        devices: GPUs.
        rows: Of each stream in a micro-batch.
        accumulate: Micro-batches of an update.
        lr: The highest rate.
        trained: Parameters that train.
        total: All parameters.
    """

    files: tuple[str, ...]
    config: Callable[..., PreTrainedConfig]
    path: str
    special: tuple[str | None, str, str | None]
    devices: int
    rows: dict[str, int]
    accumulate: int
    lr: float
    trained: int
    total: int

    @property
    def stack(self) -> list[str]:
        return [part for file in self.files for part in ("-c", f"configs/{file}.yaml")]

    @property
    def module(self) -> type:
        return SFTModule if self.files[0] == "sft" else PreferenceModule


MISTRAL = (hub.mistral_7b, 32 * 4096 * 14336, 7_241_732_096)
PAIRS = {"safety": 2, "helpfulness": 2}
QWEN = ("base", "data/paper_bfpo", "model/qwen3_8b_selective")
CHATML = (None, "<|im_end|>", hub.QWEN3_TEMPLATE)
RECIPES = {
    "sft": Recipe(
        ("sft", "data/paper_sft", *PAPER_7B, "experiment/paper/sft"), MISTRAL[0], "mistralai/Mistral-7B-v0.1",
        ("<s>", "</s>", None), 4, {"ultrachat": 4, "saferlhf": 1}, 2, 5e-7, *MISTRAL[1:],
    ),
    "bfpo": Recipe(
        ("base", "data/paper_bfpo", *SHARED_7B, "experiment/paper/bfpo"), MISTRAL[0], "runs/models/paper_sft",
        ("<s>", "</s>", ZEPHYR), 4, PAIRS, 4, 5e-7, *MISTRAL[1:],
    ),
    "redteam": Recipe(
        ("base", "data/paper_redteam", *SHARED_7B, "experiment/paper/redteam"), MISTRAL[0],
        "HuggingFaceH4/zephyr-7b-beta", ("<s>", "</s>", ZEPHYR), 2, {"redteam": 2}, 4, 5e-7, *MISTRAL[1:],
    ),
    "qwen3_8b": Recipe(
        (*QWEN, "reference/precomputed", "experiment/paper/qwen3_8b"), hub.qwen3_8b, "Qwen/Qwen3-8B",
        CHATML, 1, PAIRS, 16, 5e-7, 36 * 4096 * 12288, 8_190_735_360,
    ),
    "qwen3_8b_lora": Recipe(  # rank 16: 16 · (in + out) of each of seven matrices
        (*QWEN, "model/lora", "experiment/paper/qwen3_8b"), hub.qwen3_8b, "Qwen/Qwen3-8B", CHATML, 1, PAIRS, 16, 1e-4,
        43_646_976, 8_190_735_360 + 43_646_976,
    ),
}  # fmt: skip
OFFICIAL = [name for name in RECIPES if not name.startswith("qwen3")]
PREFERENCE = [name for name in RECIPES if name != "sft"]


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """Parses a recipe's command line with no override, and instantiates its Trainer for CPUs."""
    runs = tmp_path_factory.mktemp("runs")

    done = {}

    def settle(name):
        if name not in done:
            recipe = RECIPES[name]
            done[name] = parsed(*recipe.stack, f"--runs={runs}", "--trainer.accelerator=cpu", model=recipe.module)
        return done[name]

    return settle


@pytest.mark.parametrize("name", RECIPES)
def test_settings(name, settled, in_repository):
    recipe, run = RECIPES[name], settled(name)
    trainer, record = run.trainer, run.record
    assert record["seed_everything"] == 42
    assert record["experiment"] == f"paper_{name.removesuffix('_lora')}"
    assert run.model.source.path == recipe.path
    assert (trainer.max_epochs, trainer.max_steps, trainer.precision) == (1, -1, "bf16-mixed")
    assert (trainer.num_devices, trainer.accumulate_grad_batches) == (recipe.devices, recipe.accumulate)
    assert trainer.gradient_clip_val == 1.0
    assert trainer.log_every_n_steps == (5 if name == "sft" else 10)
    assert record["checkpoint"]["every_n_train_steps"] == 100
    assert {stream: each.batch_size for stream, each in run.datamodule.streams.items()} == recipe.rows
    driven = recipe.rows[run.datamodule.driver] * recipe.devices * recipe.accumulate
    assert driven == (16 if name == "redteam" else 32)
    assert run.datamodule.validation_batch_size == 8
    every = trainer.val_check_interval
    assert every == (1.0 if name in ("sft", "redteam") else 100 * recipe.accumulate)
    assert run.model.source.disable_dropout
    if name in PREFERENCE:
        truncation = run.datamodule.truncation
        assert (truncation.max_length, truncation.max_prompt_length) == (1024, 512)
        assert run.model.logp_reduction == "sum"
    if name == "sft":
        assert record["export"]["folder"] == RECIPES["bfpo"].path


@pytest.mark.parametrize("name", RECIPES)
def test_optimizer_and_learning_rate(name, settled, in_repository):
    """The rate of each update, against transformers' cosine: one warm-up step apart."""
    run, peak = settled(name), RECIPES[name].lr
    optimizer = run.model.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (peak, (0.9, 0.999), 1e-8, 0.0)
    updates = math.ceil(math.ceil(30_000 / (2 * 4)) / 4)  # the paper's 30K pairs: 938 here, 937 there
    assert updates == 938
    rates = rates_of(optimizer, run.model.schedule.build(optimizer, updates), updates)
    assert rates[0] == pytest.approx(peak / 95)  # 94 updates of warm-up
    assert rates[46] == pytest.approx(peak * 47 / 95)
    assert rates[93] == pytest.approx(peak * 94 / 95)
    assert rates[94] == max(rates) == peak
    assert rates[516] == pytest.approx(peak / 2)  # 94 + 844 / 2
    assert rates[937] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 843 / 844)))
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=peak)
    official = rates_of(theirs, get_cosine_schedule_with_warmup(theirs, math.ceil(0.1 * 937), 937), 937)
    assert official[0] == 0.0
    assert max(abs(one - other) for one, other in zip(rates, official, strict=False)) < 1.1 * peak / 95


def rates_of(optimizer, scheduler, updates):
    rates = []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", PREFERENCE)
def test_labels_of_the_four_quadrants(name, settled, in_repository):
    run = settled(name)
    flags = Annotations.of_pairs(chosen_safe=[1, 1, 0, 0], rejected_safe=[1, 0, 0, 1])
    label = run.model.labeling(flags)
    assert label.target.tolist() == [0.5, 1.0, -0.5, -1.0]
    assert run.model.loss.tau == 0.01
    assert (label.target / run.model.loss.tau).tolist() == pytest.approx([50, 100, -50, -100])


@pytest.mark.parametrize("name", RECIPES)
def test_the_true_size_on_the_meta_device(name, settled, in_repository, tmp_path):
    recipe = RECIPES[name]
    source = copy.copy(settled(name).model.source)
    source.path = str(hub.write_config(tmp_path / "model", recipe.config()))
    model = on_meta(source, settled(name).model.trainable)
    assert all(parameter.is_meta for parameter in model.parameters())
    layers = AutoConfig.from_pretrained(source.path).num_hidden_layers
    trained = {key: parameter.numel() for key, parameter in model.named_parameters() if parameter.requires_grad}
    if name == "qwen3_8b_lora":
        assert all(".lora_A." in key or ".lora_B." in key for key in trained)
        assert len(trained) == layers * 7 * 2
    else:
        assert list(trained) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(layers)]
    assert sum(trained.values()) == recipe.trained
    assert sum(parameter.numel() for parameter in model.parameters()) == recipe.total


def test_qwen3_8b_fits_one_gpu_of_80_gb(bfpo, capsys, tmp_path):
    folder = hub.write_config(tmp_path / "model", hub.qwen3_8b())
    bfpo("estimate", "--json", "--device=h100", *RECIPES["qwen3_8b"].stack, f"--model.policy.path={folder}")
    said = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part["bytes"] for part in said["parts"]}
    assert (said["devices"], said["fits"], said["peak"]) == (1, True, "forward")
    assert parts["weights of the policy"] == 4 * 8_190_735_360
    assert parts["gradients"] == 4 * RECIPES["qwen3_8b"].trained
    assert parts["optimizer state"] == pytest.approx(8 * RECIPES["qwen3_8b"].trained, rel=1e-3)
    assert parts["reference"] == 0
    assert said["total_bytes"] / 2**30 == pytest.approx(61.8, abs=0.2)  # docs/paper.md


# ---- two updates on tiny models of the same classes --------------------------------------------------------------


def local_data(name, folder):
    """Arguments that put small local files in the place of the recipe's data; nothing else of it changes."""
    pairs = 34 if name.startswith("qwen3") else 16  # two updates: 32 and 2 pairs; 8 and 8
    pku = hub.write_dataset(folder / "pku", {"train": pku_rows(5 * pairs), "test": pku_rows(9)})
    if name == "sft":
        chat = hub.write_dataset(folder / "chat", {"train_sft": ultrachat_rows(20), "test_sft": ultrachat_rows(3)})
        return [f"--data.streams.{s}.source.path={p}" for s, p in (("ultrachat", chat), ("saferlhf", pku))]
    if name == "redteam":
        (folder / "rows.json").write_text(json.dumps(red_team_rows(pku_rows(16))))
        return [f"--data.streams.redteam.source.path={folder / 'rows.json'}"]
    feedback = hub.write_dataset(
        folder / "uf", {"train_prefs": ultrafeedback_rows(pairs + 4), "test_prefs": ultrafeedback_rows(2)}
    )
    return [f"--data.streams.{s}.source.path={p}" for s, p in (("safety", pku), ("helpfulness", feedback))]


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    """Runs a recipe once: tiny weights, local data, one CPU process in float32; all else as its files say."""
    from bfpo_pl.cli import main

    done = {}

    def run_of(name):
        if name not in done:
            recipe, folder = RECIPES[name], tmp_path_factory.mktemp(name)
            tokenizer = hub.byte_tokenizer(*recipe.special)
            tokenizer.save_pretrained(folder / "tokenizer")
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = recipe.config(vocab_size=len(tokenizer), pad_token_id=None, **ids, **hub.TINY)
            start = hub.write_tiny(folder / "model", config)
            run = main(
                [
                    "sft" if name == "sft" else "fit", *recipe.stack, *local_data(name, folder),
                    f"--model.policy.path={start}", f"--model.policy.tokenizer={folder / 'tokenizer'}",
                    "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true",
                    "--trainer.log_every_n_steps=1",
                    f"--runs={folder / 'runs'}", f"--export.folder={folder / 'export'}",
                ]
            )  # fmt: skip
            done[name] = (run, start, folder / "export")
        return done[name]

    return run_of


def metrics_of(run):
    """Logged numbers by update."""
    found: dict[int, dict[str, float]] = {}
    with (run.run_folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            numbers = {key: float(value) for key, value in row.items() if value and key != "step"}
            found.setdefault(int(row["step"]), {}).update(numbers)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_two_updates_train_the_selected_weights_alone(name, tiny_runs, in_repository):
    run, start, export = tiny_runs(name)
    assert run.trainer.global_step == 2
    assert type(run.trainer.strategy).__name__ == ("FSDP2" if name in OFFICIAL else "SingleDeviceStrategy")
    before, after = load_file(start / "model.safetensors"), load_file(export / "model.safetensors")
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    if name == "qwen3_8b_lora":
        assert len(changed) == 2 * 7
        assert all(key.endswith("_proj.weight") for key in changed)
    else:
        assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)}
    rates = [metrics["train/lr"] for step, metrics in metrics_of(run).items() if step]
    assert rates == pytest.approx([RECIPES[name].lr / 2, RECIPES[name].lr])  # one update of warm-up
    if name in PREFERENCE:
        kind = {"qwen3_8b": "Precomputed", "qwen3_8b_lora": "AdapterOff"}.get(name, "SharedWeights")
        assert type(run.model.references["reference"]).__name__ == kind


@pytest.mark.parametrize("name", PREFERENCE)
def test_losses_of_the_first_update(name, tiny_runs, in_repository):
    """Margins are 0, so that a pair's loss is (g / 0.01)²; a quadrant that the update lacks is not logged."""
    first = metrics_of(tiny_runs(name)[0])[1]
    stream = "redteam" if name == "redteam" else "safety"
    seen = {}
    for quadrant, target in {"safe_safe": 0.5, "safe_unsafe": 1, "unsafe_unsafe": -0.5, "unsafe_safe": -1}.items():
        if f"train/{stream}/{quadrant}/loss" in first:
            seen[quadrant] = target
            assert first[f"train/{stream}/{quadrant}/target"] == target
            assert first[f"train/{stream}/{quadrant}/loss"] == pytest.approx((100 * target) ** 2, rel=1e-3)
    assert len(seen) >= 3
    if name != "redteam":
        assert first["train/helpfulness/all/target"] == 0.5
        assert first["train/helpfulness/all/loss"] == pytest.approx(2500, rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_micro_batch_holds(name, tiny_runs, in_repository):
    run = tiny_runs(name)[0]
    data = run.datamodule
    loader = data.train_dataloader()
    batches = list(loader)
    quotas = RECIPES[name].rows
    for batch in batches[:-1]:
        streams = batch.response_stream.tolist() if name == "sft" else batch.pair_stream.tolist()
        assert {batch.streams[stream]: count for stream, count in Counter(streams).items()} == quotas
    assert len(batches) <= 2 * RECIPES[name].accumulate  # two updates
    report = json.loads((run.run_folder / "data.json").read_text())
    if name == "sft":
        assert {length for batch in batches for length in batch.response_lengths.tolist()} == {2047}  # all but a first
        assert report["saferlhf"]["train"]["rows"] == 16
    elif name == "redteam":
        counts = [report["redteam"][split]["rows"] for split in ("train", "validation")]
        assert sum(counts) == 16
        assert counts[1] > 0
    else:
        pairs = 34 if name.startswith("qwen3") else 16
        assert report["safety"]["train"]["rows"] == pairs  # the first fifth
        assert report["helpfulness"]["train"]["rows"] == pairs + 4


def official_ids(tokenizer, prompt, response):
    """By hand: an empty system turn, the header in the response, two ends; before any cut."""
    head = f"<|system|>\n</s>\n<|user|>\n{prompt}</s>\n"
    tail = f"<|assistant|>\n{response}</s>\n"
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [tokenizer.bos_token_id, *encode(head)], [*encode(tail), tokenizer.eos_token_id]


def test_tokens_and_cuts_of_the_official_code(tiny_runs, in_repository):
    run = tiny_runs("bfpo")[0]
    trees = run.datamodule.rows["safety", "train"]
    tokenizer = run.model.tokenizer
    rows = pku_rows(16)
    for row, tree in zip(rows, trees.at(range(16)), strict=True):
        better = row["better_response_id"]
        texts = [row[f"response_{side}"] for side in (better, 1 - better)]  # chosen, rejected
        prompt, _ = official_ids(tokenizer, row["prompt"], "")
        responses = [official_ids(tokenizer, row["prompt"], text)[1] for text in texts]
        if len(prompt) + max(map(len, responses)) > 1024:
            prompt = prompt[-512:]
        if len(prompt) + max(map(len, responses)) > 1024:
            responses = [ids[:512] for ids in responses]
        assert list(tree.prompt_ids) == prompt
        assert [list(ids) for ids in tree.response_ids] == responses
    lengths = [(len(tree.prompt_ids), max(map(len, tree.response_ids))) for tree in trees.at(range(3))]
    assert lengths[0] == (512, 512)
    assert lengths[1][0] < 512
    assert lengths[1][1] == 512
    assert lengths[2][0] == 512
    assert lengths[2][1] < 512


def test_qwen3_answers_without_thinking(tiny_runs, in_repository):
    run = tiny_runs("qwen3_8b")[0]
    [tree] = run.datamodule.rows["helpfulness", "train"].at([3])
    decode = run.model.tokenizer.decode
    assert decode(tree.prompt_ids) == (
        "<|im_start|>user\nTell me about 3.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert [decode(ids) for ids in tree.response_ids] == ["3 is even or odd.<|im_end|>", "3?<|im_end|>"]
