"""Every file under configs/ parses and instantiates; every experiment runs two steps."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
import yaml
from paper_rows import red_team_rows
from parsed import parsed

from bfpo_pl.cli import main
from bfpo_pl.microworld import safety_rows
from bfpo_pl.module import PreferenceModule
from bfpo_pl.sft import SFTModule

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL_MODEL = [f"--model.policy.{size}" for size in ("hidden_size=32", "layers=2", "heads=2", "intermediate_size=64")]


def files(folder):
    return sorted(path.relative_to(CONFIGS.parent).as_posix() for path in (CONFIGS / folder).glob("*.yaml"))


def experiment_overrides(path, small, small_safety):
    streams = yaml.safe_load(Path(path).read_text()).get("data", {}).get("streams")
    return small_safety if streams and "helpfulness" not in streams else small


def test_the_lists_are_not_empty():
    assert {Path(path).parent.name for path in map(str, CONFIGS.rglob("*.yaml"))} >= {
        "experiment", "strategy", "logger", "data", "model", "reference", "sweep",
    }  # fmt: skip


@pytest.mark.parametrize("path", files("experiment"))
def test_every_experiment_runs_two_steps(path, bfpo, small, small_safety):
    run = bfpo("fit", "-c", "configs/base.yaml", "-c", path, *experiment_overrides(path, small, small_safety))
    assert run.trainer.global_step == 2
    assert (run.run_folder / "export" / "model.safetensors").is_file()
    assert run.run_folder.parent.name == Path(path).stem


def assert_holds(got, wanted, key=""):
    """Every value of a config file is in the resolved config; a class may be given by its short name alone."""
    if isinstance(got, dict) and "class_path" in got:
        wanted = {"class_path": wanted} if isinstance(wanted, str) else wanted
        assert got["class_path"].rpartition(".")[2] == wanted["class_path"].rpartition(".")[2], key
        got, wanted = got.get("init_args", {}), wanted.get("init_args", {})
    if isinstance(wanted, list) and isinstance(got, list):
        assert len(got) == len(wanted), key
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_holds(one, other, f"{key}[{index}]")
    elif isinstance(wanted, dict) and isinstance(got, dict):
        for name, value in wanted.items():
            assert_holds(got[name], value, f"{key}.{name}")
    else:
        assert got == wanted, key


SFT_DATA = ["configs/data/sft_jsonl.yaml", "configs/data/paper_sft.yaml"]
OTHERS = [path for folder in ("model", "data", "reference", "logger", "strategy") for path in files(folder)]


@pytest.mark.parametrize("path", [path for path in OTHERS if path not in SFT_DATA])
def test_every_other_file_stacks_on_an_experiment(path, base, in_repository, tmp_path, monkeypatch):
    if path.endswith("fsdp1.yaml"):
        monkeypatch.setattr("bfpo_pl.parsing.check_devices", lambda *arguments: None)  # it asks for a GPU
    before = ["-c", "configs/model/lora.yaml"] if path.endswith("adapter_off.yaml") else []
    devices = f"--trainer.devices={2 if path.endswith('fsdp2_tp.yaml') else 1}"
    run = parsed(*base, *before, "-c", path, f"--runs={tmp_path}", "--trainer.accelerator=cpu", devices)
    wanted = yaml.safe_load(Path(path).read_text())
    wanted.get("trainer", {}).pop("devices", None)
    assert_holds(run.record, wanted)
    if "data" in wanted:
        assert list(run.datamodule.streams) == list(wanted["data"]["streams"])
        assert run.datamodule.driver in run.datamodule.streams


@pytest.mark.parametrize("path", SFT_DATA)
def test_an_sft_config_parses(path, in_repository, tmp_path):
    run = parsed("-c", "configs/sft.yaml", "-c", path, f"--runs={tmp_path}", model=SFTModule)
    wanted = yaml.safe_load(Path(path).read_text())
    assert_holds(run.record, wanted)
    assert list(run.datamodule.streams) == list(wanted["data"]["streams"])


# What the paper's official code takes: dataset, revision, splits, share of the training rows, adapter.
PKU = ("PKU-Alignment/PKU-SafeRLHF", "ff7ba91063016c78a225b0f74e1c0860bb18230f", "train", "test", 0.2)
RECIPE = {
    "paper_sft": {
        "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", "test_sft", 1.0, "Messages"),
        "saferlhf": (*PKU, "PKUSaferResponse"),
    },
    "paper_bfpo": {
        "safety": (*PKU, "PKUSafeRLHF"),
        "helpfulness": (
            "HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", "test_prefs", 1.0, "UltraFeedbackBinarized",
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPE)
def test_the_papers_configs_take_the_papers_rows_and_tokens(name, base, in_repository, tmp_path):
    sft = name == "paper_sft"
    start, model = (["-c", "configs/sft.yaml"], SFTModule) if sft else (base, PreferenceModule)
    data = parsed(*start, "-c", f"configs/data/{name}.yaml", f"--runs={tmp_path}", model=model).datamodule
    for stream, (path, revision, train, test, fraction, adapter) in RECIPE[name].items():
        given = data.streams[stream]
        assert given.source.path == path
        assert given.source.revision == (revision or given.source.revision)
        assert len(given.source.revision) == 40
        assert given.source.splits == {"train": train, "validation": test}
        assert (given.fraction, given.take, type(given.adapter).__name__) == (fraction, "first", adapter)
    assert repr(data.template).startswith("OfficialTemplate(chat_template=None, system='', kwargs={}")
    assert data.template.loss_on == ("all" if sft else "response")
    if sft:
        assert repr(data.packing) == "OfficialPacking(length=2048, seed=0)"
    else:
        assert repr(data.truncation) == "OfficialTruncation(max_length=1024, max_prompt_length=512)"
        assert (data.driver, data.streams["helpfulness"].assume_safe) == ("safety", True)


def red_team_file(path):
    """Rows of the microworld in the schema of the paper's red-team file."""
    rows = red_team_rows(safety_rows(200, seed=0, split="train", split_seed=0))
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("name", ["paper_sft", "paper_bfpo", "paper_redteam"])
def test_the_papers_configs_run_on_rows_of_the_same_schemas(name, bfpo, base, tmp_path):
    swapped = {
        "paper_sft": [
            *("--data.streams.ultrachat.source=MicroworldSFT", "--data.streams.saferlhf.source=MicroworldSafety"),
            "--data.packing.length=64",
        ],
        "paper_bfpo": [
            "--data.streams.safety.source=MicroworldSafety",
            "--data.streams.helpfulness.source=MicroworldHelpfulness",
        ],
        "paper_redteam": [f"--data.streams.redteam.source.path={red_team_file(tmp_path / 'rows.json')}"],
    }[name]
    # The microworld's own chat template knows no system message.
    own_template = ["--data.template.chat_template=null", "--data.template.system=null"]
    quick = [*own_template, "--trainer.max_steps=1", "--trainer.accelerator=cpu", *SMALL_MODEL]
    start = ["sft", "-c", "configs/sft.yaml"] if name == "paper_sft" else ["fit", *base]
    run = bfpo(*start, "-c", f"configs/data/{name}.yaml", *swapped, *quick)
    assert run.trainer.global_step == 1
    report = json.loads((run.run_folder / "data.json").read_text())
    if name == "paper_sft":
        assert all(report[stream]["train"]["blocks"] > 10 for stream in ("ultrachat", "saferlhf"))
        assert report["ultrachat"]["train"]["responses_cut"] == 0
    elif name == "paper_bfpo":
        assert report["safety"]["train"]["rows"] == 819  # int(0.2 · 4096)
        assert report["helpfulness"]["train"]["rows"] == 4096
    else:
        train, validation = (report["redteam"][split] for split in ("train", "validation"))
        assert train["rows"] + validation["rows"] == 200
        assert validation["rows"] > 0
        assert validation["prompts_also_trained_on"] == 0


def sweep_command_lines(path):
    """What `wandb agent` would run, by W&B's own expansion of ``${args}``."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load(Path(path).read_text())
    names = list(sweep["parameters"])
    grids = [spec["values"] if "values" in spec else [spec["value"]] for spec in sweep["parameters"].values()]
    for values in itertools.product(*grids):
        arguments = dict(zip(names, ({"value": value} for value in values), strict=True))
        flags = create_sweep_command_args({"args": arguments})["args"]
        command = []
        for part in sweep["command"]:
            command += {"${env}": [], "${args}": flags}.get(part, [part])
        yield command


def test_the_labeling_sweep_runs_from_the_models_of_the_sft_sweep(tmp_path, small, in_repository):
    export = f"--export.folder={tmp_path}/sft/{{seed}}"
    tiny = ["--trainer.max_steps=2", "--data.streams.sft.source.count=64", "--model.policy.hidden_size=32"]
    first = next(sweep_command_lines("configs/sweep/sft.yaml"))
    main([*first[1:], *tiny, export, f"--runs={tmp_path}"])
    commands = list(sweep_command_lines("configs/sweep/labeling.yaml"))
    assert len({" ".join(command) for command in commands}) == 5 * 6
    assert all(command[:2] == ["bfpo", "fit"] for command in commands)
    overrides = [item for item in small if "model.policy" not in item]
    judge = ["--trainer.callbacks=bfpo_pl.callbacks.microworld.MicroworldTest", "--trainer.callbacks.max_prompts=8"]
    more = [*overrides, *judge, f"--model.policy.path={tmp_path}/sft/{{seed}}", f"--runs={tmp_path}"]
    for command in (commands[0], commands[2]):  # both of seed 0
        run = main([*command[1:], *more])
        [experiment] = [part.partition("=")[2] for part in command if part.startswith("--config=")]
        assert run.run_folder.parent.name == Path(experiment).stem
        assert run.model.policy.config.hidden_size == 32
        assert run.record["model"]["policy"]["init_args"]["path"] == f"{tmp_path}/sft/0"
        with (run.run_folder / "metrics.csv").open(newline="") as file:
            [judged] = [row for row in csv.DictReader(file) if row["test/microworld/greedy/both"]]
        assert judged["step"] == "2"
