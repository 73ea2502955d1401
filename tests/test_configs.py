"""Every file under configs/ parses and instantiates; every experiment runs two steps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from bfpo_pl.cli import main
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.module import PreferenceModule
from bfpo_pl.parsing import BFPOCLI
from bfpo_pl.plugins import load_plugins

CONFIGS = Path(__file__).parent.parent / "configs"


def files(folder):
    return sorted(path.relative_to(CONFIGS.parent).as_posix() for path in (CONFIGS / folder).glob("*.yaml"))


class ParsedOnly(BFPOCLI):
    """Instantiates everything, the Trainer among it; runs nothing and asks no Hub."""

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def parsed(*args: str, model=PreferenceModule) -> ParsedOnly:
    return ParsedOnly(model, AlignmentData, ["fit", *args], load_plugins(), "fit")


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


SFT_DATA = "configs/data/sft_jsonl.yaml"
OTHERS = [path for folder in ("model", "data", "reference", "logger", "strategy") for path in files(folder)]


@pytest.mark.parametrize("path", [path for path in OTHERS if path != SFT_DATA])
def test_every_other_file_stacks_on_an_experiment(path, base, in_repository, tmp_path):
    before = ["-c", "configs/model/lora.yaml"] if path.endswith("adapter_off.yaml") else []
    run = parsed(*base, *before, "-c", path, f"--runs={tmp_path}", "--trainer.accelerator=cpu", "--trainer.devices=1")
    wanted = yaml.safe_load(Path(path).read_text())
    got = run.record
    for section, key in itertools.chain.from_iterable(((s, k) for k in wanted[s]) for s in wanted):
        if isinstance(wanted[section][key], dict) and "class_path" in wanted[section][key]:
            short = wanted[section][key]["class_path"].rpartition(".")[2]
            assert got[section][key]["class_path"].rpartition(".")[2] == short
        elif not isinstance(wanted[section][key], (dict, list)) and key != "devices":
            assert got[section][key] == wanted[section][key]


def test_sft_config_parses(in_repository, tmp_path):
    from bfpo_pl.sft import SFTModule

    for data in ([], ["-c", SFT_DATA]):
        run = parsed("-c", "configs/sft.yaml", *data, f"--runs={tmp_path}", model=SFTModule)
        assert isinstance(run.model, SFTModule)
    assert type(run.datamodule.streams["sft"].source).__name__ == "JsonLines"


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


@pytest.fixture(scope="module")
def sft_export(tmp_path_factory):
    """A tiny SFT model, by the command that the sweep file's header names."""
    folder = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CONFIGS.parent)
        main(
            [
                *("sft", "-c", "configs/sft.yaml", "--trainer.max_steps=2", "--data.streams.sft.source.count=64"),
                *(f"--export.folder={folder / 'export'}", f"--runs={folder / 'runs'}", "--model.policy.hidden_size=32"),
            ]
        )
    return folder / "export"


@pytest.mark.parametrize("path", files("sweep"))
def test_a_sweep_expands_to_commands_that_run(path, sft_export, small, tmp_path, in_repository):
    commands = list(sweep_command_lines(path))
    assert len(commands) == 25
    assert len({" ".join(command) for command in commands}) == 25
    assert all(command[:2] == ["bfpo", "fit"] for command in commands)
    overrides = [item for item in small if "model.policy" not in item]
    quick = ["--trainer.callbacks.max_prompts=8", "--trainer.logger.offline=true", f"--runs={tmp_path}"]
    for command in (commands[0], commands[6]):
        arguments = [part.replace("runs/models/sft", str(sft_export)) for part in command[1:]]
        run = main([*arguments, *overrides, *quick])
        assert run.trainer.global_step == 2
        [seed] = [part.partition("=")[2] for part in command if part.startswith("--seed_everything=")]
        [experiment] = [part.partition("=")[2] for part in command if part.startswith("--config=")]
        assert run.config.fit.seed_everything == int(seed)
        assert run.run_folder.parent.name == Path(experiment).stem
        assert run.model.policy.config.hidden_size == 32
