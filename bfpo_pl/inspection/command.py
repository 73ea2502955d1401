"""The command line of `bfpo data`: its own options, and the configs and overrides that `fit` and `sft` take."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace

from bfpo_pl.arguments import config_values
from bfpo_pl.component import UserError
from bfpo_pl.data.datamodule import AlignmentData
from bfpo_pl.inspection.report import report
from bfpo_pl.inspection.show import show
from bfpo_pl.inspection.terminal import console
from bfpo_pl.module import PreferenceModule
from bfpo_pl.parsing import BFPOCLI
from bfpo_pl.plugins import Plugin
from bfpo_pl.sft import SFTModule

USAGE = """\
usage: bfpo data inspect -c CONFIG [-c CONFIG ...] [overrides] [--out DIR]
       bfpo data show    -c CONFIG [-c CONFIG ...] [overrides] [--n N] [--full]

inspect   What each stream and split comes to: rows used, dropped and left out, safety flags, lengths in tokens, cuts,
          duplicates, contradictions, prompts in both splits; and a check of the chat template. Rows that cannot be used
          are counted by reason and do not stop it.
  --out DIR   Also draws the lengths: DIR/lengths.png.

show      The first trees of a training batch, token by token, as the model sees them: what carries loss, the flags,
          and what the labeling asks for. Texts are abbreviated, for they may be offensive.
  --n N       Trees of each stream. Default: 3.
  --full      Whole texts.

Configs and overrides are those of `bfpo fit` and `bfpo sft`; no weights are loaded, and nothing goes to runs/:
  bfpo data inspect -c configs/base.yaml -c configs/experiment/bfpo.yaml
  bfpo data show -c configs/base.yaml -c configs/data/jsonl.yaml --data.streams.safety.source.path=pairs.jsonl
Only where an experiment names a labeling (or an override does) are there labels to show."""


class _Options(argparse.ArgumentParser):
    """The options that are not part of the config."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"bfpo data: {message}.\n{USAGE}")


def run_data(args: list[str], plugins: list[Plugin]) -> DataCLI | None:
    """Inspects or shows data.

    Args:
        args: Command line after ``bfpo data``.
        plugins: The plugins that were imported.

    Returns:
        The CLI object with ``model`` and ``datamodule``; None where only the usage was asked for.

    Raises:
        UserError: There is no such command or option, or the data cannot be looked at.
    """
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(USAGE)
        return None
    if args[0] not in ("inspect", "show"):
        raise UserError(f"bfpo data: there is no command '{args[0]}'.\n{USAGE}")
    options, rest = _options(args[0], args[1:])
    with quiet():
        cli = DataCLI(rest, plugins)
        labeling = getattr(cli.model, "labeling", None)
        if args[0] == "show":
            show(cli.datamodule, labeling, options.n, options.full, console())
        else:
            report(cli.datamodule, labeling, options.out, console())
    return cli


def _options(command: str, args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Options(add_help=False, allow_abbrev=False)
    if command == "inspect":
        parser.add_argument("--out", type=Path)
    else:
        parser.add_argument("--n", type=int, default=3)
        parser.add_argument("--full", action="store_true")
    options, rest = parser.parse_known_args(args)
    if command == "show" and options.n < 1:
        raise UserError(f"bfpo data show: --n must be at least 1, not {options.n}.")
    return options, rest


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back the lines that training prints of its data: the report says the same."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


class DataCLI(BFPOCLI):
    """Reads configs and overrides as `fit` does; makes the module and the data, and nothing else.

    Args:
        args: Command line without a subcommand.
        plugins: The plugins that were imported.
    """

    def __init__(self, args: list[str], plugins: list[Plugin]) -> None:
        super().__init__(module_class(args), AlignmentData, ["fit", *args], plugins, "data")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one whose arguments these are."""
        return {"fit": BFPOCLI.subcommands()["fit"]}

    def before_instantiate_classes(self) -> None:
        """Nothing: there is no run folder."""

    def instantiate_classes(self) -> None:
        config = self.config["fit"]
        wanted = Namespace(model=config.model, data=config.data)
        self.config_init = self._parser("fit").instantiate(wanted)
        self.model, self.datamodule = self.config_init.model, self.config_init.data
        self.datamodule.tokenizer = self.model.tokenizer
        self.datamodule.stop_token_ids = self.model.stop_token_ids

    def after_instantiate_classes(self) -> None:
        """Nothing: a tokenizer is enough, weights need not be there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: there is no trainer."""


def module_class(args: list[str]) -> type[PreferenceModule] | type[SFTModule]:
    """The module that a command line is for: preference training if it names what only that has, a labeling say.

    Args:
        args: Configs and overrides.
    """
    only = set(inspect.signature(PreferenceModule).parameters) - set(inspect.signature(SFTModule).parameters)
    named = {arg.removeprefix("--model.").split("=")[0].split(".")[0] for arg in args if arg.startswith("--model.")}
    for config in _configs(args):
        model = config.get("model") if isinstance(config, dict) else None
        named |= set(model) if isinstance(model, dict) else set()
    return PreferenceModule if named & only else SFTModule


def _configs(args: list[str]) -> Iterator[Any]:
    for value in config_values(args):
        try:
            yield yaml.safe_load(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value)
        except (yaml.YAMLError, UnicodeDecodeError):  # the parser says so, by name
            continue
