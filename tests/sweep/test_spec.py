"""What sweep files may say, and the command lines that they make."""

from pathlib import Path

import pytest

from bfpo_pl.component import UserError
from bfpo_pl.sweep.expansion import bfpo_arguments, expanded
from bfpo_pl.sweep.spec import grid, read_spec

ROOT = Path(__file__).parents[2]

GRID = """
method: grid
metric: {name: val/all/all/loss, goal: minimize}
parameters:
  config: {values: [a.yaml, b.yaml]}
  model.loss: {parameters: {tau: {values: [0.1, 0.2, 0.3]}}}
  model.policy: {value: HFModel}
command: ["${env}", bfpo, fit, "${args}"]
"""


@pytest.fixture
def spec(tmp_path):
    def read(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return read_spec(path)

    return read


def test_a_grid_is_all_combinations(spec):
    read = spec(GRID)
    assert read.name == "sweep"
    assert read.varied == ["config", "model.loss.tau"]
    assert [(each["config"], each["model.loss.tau"]) for each in grid(read)] == [
        (config, tau) for config in ("a.yaml", "b.yaml") for tau in (0.1, 0.2, 0.3)
    ]
    assert {each["model.policy"] for each in grid(read)} == {"HFModel"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("method: grid", "method: gird"), "method must be one of grid, random, bayes, not 'gird'"),
        (("command:", "comand:"), r"comand is unknown\. Did you mean command\?"),
        (("{values: [a.yaml, b.yaml]}", "{values: []}"), r"parameters\.config\.values must be a list with something"),
        (("{values: [a.yaml, b.yaml]}", "{values: [a, a]}"), r"parameters\.config\.values has 'a' twice"),
        (("{values: [a.yaml, b.yaml]}", "{vales: [a]}"), r"\.config\.vales is unknown\. Did you mean values\?"),
        (("{values: [a.yaml, b.yaml]}", "{min: 1, max: 2}"), r"parameters\.config is a range, of which no grid"),
        (("{values: [a.yaml, b.yaml]}", "[a, b]"), r"parameters\.config must say value, values or a distribution"),
        (("{tau: {values: [0.1, 0.2, 0.3]}}", "{}"), r"parameters\.model\.loss\.parameters must map keys .* not \{\}"),
        (("{tau: {values: [0.1, 0.2, 0.3]}}", ""), r"parameters\.model\.loss\.parameters must map keys .* not None"),
        (
            ("{tau: {values: [0.1, 0.2, 0.3]}}", "[a]"),
            r"parameters\.model\.loss\.parameters must map .* not \['a'\]",
        ),
        (
            ("[a.yaml, b.yaml]", "[2020-01-01]"),
            r"config\.values has 2020-01-01, which YAML reads as date; put",
        ),
        (("[a.yaml, b.yaml]", "[[2020-01-01]]"), r"config\.values has 2020-01-01, which YAML reads as date"),
        (("[a.yaml, b.yaml]", "[{1: a}]"), r"config\.values has the key 1, which is no text; put it in quotes"),
        (("value: HFModel", "value: !!binary aGk="), r"policy\.value has b'hi', which YAML reads as bytes"),
        (("goal: minimize", "goal: smallest"), "metric.goal must be minimize or maximize, not 'smallest'"),
        (('command: ["${env}", bfpo, fit, "${args}"]', "command: bfpo fit"), "command must be a list of words"),
        (("method: grid", "method: grid\nearly_terminate: {type: hyperband}"), "early_terminate is not done here"),
        (("method: grid", "method: grid\nrun_cap: 0"), "run_cap must be a whole number above 0, not 0"),
        (("metric: {name: val/all/all/loss, goal: minimize}", "metric: loss"), "metric must have a name and a goal"),
    ],
)
def test_mistakes_name_the_file_and_the_key(spec, change, message):
    with pytest.raises(UserError, match=message) as caught:
        spec(GRID.replace(*change))
    assert "sweep.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{min: 1e-4, max: 1.0e-1}", r"parameters\.lr\.min: YAML reads 1e-4 as a text; write 1\.0e-4\."),
        ("{min: 1.5, max: 2.5e3}", r"parameters\.lr\.max: YAML reads 2\.5e3 as a text; write 2\.5e\+3\."),
        ("{min: 0.1, max: '3'}", r"parameters\.lr\.max: YAML reads 3 as a text; write 3\."),
        ("{min: a, max: 1}", r"parameters\.lr\.min must be a finite number, not 'a'"),
        ("{min: 1, max: .inf}", r"parameters\.lr\.max must be a finite number, not inf"),
        ("{min: false, max: 3}", r"parameters\.lr\.min must be a finite number, not False"),
        ("{min: 2, max: 1}", r"parameters\.lr needs value, values, or min and max with min below max"),
        ("{min: 1}", r"parameters\.lr needs value, values, or min and max"),
        ("{distribution: q_uniform, min: 0.0, max: 1.0, q: 0}", "q must be above 0 and at most max - min, not 0"),
        ("{distribution: q_uniform, min: 0.0, max: 0.5}", r"q must be above 0 and at most max - min, not 1\.0"),
        ("{min: 0.0, max: 1.0, q: 0.1}", "q is for q_uniform, not for uniform"),
        ("{distribution: int_uniform, min: 0.5, max: 3.5}", r"int_uniform needs whole numbers, not min 0\.5 and max 3"),
        ("{min: 1, max: 2, min: 0}", r"is not YAML: the key min is there twice .*line 2"),
        (
            "{value: 1}, a.b: {value: 1}, a: {parameters: {b: {value: 2}}}",
            r"parameters\.a\.b is there twice: flat, and",
        ),
    ],
)
def test_ranges_and_keys(spec, said, message):
    with pytest.raises(UserError, match=message) as caught:
        spec(f"method: random\nparameters: {{lr: {said}}}\n")
    assert "sweep.yaml" in str(caught.value)


def test_yes_is_not_one(spec):
    read = spec("method: grid\nparameters: {a: {values: [1, true, 0]}}\n")
    assert [str(each["a"]) for each in grid(read)] == ["1", "True", "0"]


def test_what_a_mapping_takes_over_is_not_there_twice(spec):
    read = spec("method: grid\nparameters: {a: &a {values: [1, 2]}, b: {<<: *a, values: [3]}}\n")
    assert [parameter.values for parameter in read.parameters.values()] == [(1, 2), (3,)]


def test_an_empty_grid(spec):
    with pytest.raises(UserError, match="parameters must map keys"):
        spec("method: grid\nparameters: {}\n")


def test_bayes_needs_a_metric(spec):
    with pytest.raises(UserError, match="bayes needs metric"):
        spec("method: bayes\nparameters: {a: {min: 1, max: 2}}\n")


def test_a_missing_file_and_broken_yaml(spec, tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        read_spec(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is not YAML"):
        spec("method: [grid\n")


@pytest.mark.parametrize(
    "macro",
    [
        "args",
        "args_no_equals",
        "args_no_hyphens",
        "args_no_boolean_flags",
        "args_json",
        "args_append_hydra",
        "args_override_hydra",
    ],
)
def test_macros_expand_as_the_agent_of_wandb_expands_them(spec, macro):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    values = {"a.b": 0.1, "c": True, "d": False, "e": "x y", "f": None, "g": [1, 2], "h": 3, "i": 1e-05}
    read = spec(GRID.replace("${args}", f"${{{macro}}}"))
    theirs = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})[macro]
    assert expanded(read, values) == ["/usr/bin/env", "bfpo", "fit", *theirs]


def test_variables_of_the_environment(spec, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command

    monkeypatch.setenv("HERE", "there")
    words = ["go", "${envvar:HERE}/x-${envvar:NOT_SET}"]
    read = spec(GRID.replace('["${env}", bfpo, fit, "${args}"]', str(words)))
    assert expanded(read, {}) == create_sweep_command(list(words)) == ["go", "there/x-NOT_SET"]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["/usr/bin/env", "bfpo", "fit", "--a=1"], ["fit", "--a=1"]),
        (["bfpo", "sft"], ["sft"]),
        (["python", "-m", "bfpo_pl.cli", "fit"], ["fit"]),
        (["/usr/bin/env", "A=1", "bfpo", "fit"], None),
        (["python", "train.py"], None),
        (["./train.sh"], None),
    ],
)
def test_which_commands_are_ours(words, own):
    assert bfpo_arguments(words) == own


def parses(arguments, monkeypatch):
    """Whether the real command accepts a command line; instantiates nothing."""
    from bfpo_pl.cli import main
    from bfpo_pl.parsing import BFPOCLI

    seen = []

    def stop(self):
        seen.append(self.config[self.subcommand])
        raise SystemExit(99)

    monkeypatch.setattr(BFPOCLI, "before_instantiate_classes", stop)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 99, arguments
    return seen[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweep").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_lines_of_the_sweeps_that_come_with_the_package(path, in_repository, monkeypatch):
    read = read_spec(path)
    combinations = list(grid(read))
    ends = combinations[:1] + combinations[1:][-1:]
    for values in ends:
        config = parses(bfpo_arguments(expanded(read, values)), monkeypatch)
        if "seed_everything" in values:
            assert config.seed_everything == values["seed_everything"]
        for key, value in values.items():
            part = config
            for name in key.split("."):
                part = part.get(name, part.get("init_args", {}).get(name)) if hasattr(part, "get") else part
            if isinstance(value, int | float) and not isinstance(part, list):
                assert part == value, key
