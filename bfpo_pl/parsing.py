"""How the command line is read: LightningCLI with strict class swaps, telling errors, and run folders."""

from __future__ import annotations

import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse._typehints as typehints
import yaml
from jsonargparse import Namespace
from jsonargparse._util import import_object
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import ModelParallelStrategy

from bfpo_pl.callbacks.export import ExportHF
from bfpo_pl.callbacks.progress import progress_callback
from bfpo_pl.callbacks.record import RunRecord
from bfpo_pl.callbacks.throughput import Throughput
from bfpo_pl.component import Component, UserError
from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.sources import Source
from bfpo_pl.labeling import LabelingFunction
from bfpo_pl.losses import AuxiliaryLoss, PreferenceLoss
from bfpo_pl.models.log_probs import AttentionBackend
from bfpo_pl.models.reference import Reference
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import TrainablePart
from bfpo_pl.plugins import Plugin
from bfpo_pl.reductions import PairReduction
from bfpo_pl.runs import new_run_folder
from bfpo_pl.schedules import Schedule

COMPONENTS: dict[str, type] = {
    "model.labeling": LabelingFunction,
    "model.loss": PreferenceLoss,
    "model.auxiliary": AuxiliaryLoss,
    "model.pair_reduction": PairReduction,
    "model.policy": ModelSource,
    "model.trainable": TrainablePart,
    "model.reference": Reference,
    "model.references": Reference,
    "model.attention": AttentionBackend,
    "model.schedule": Schedule,
    "data.streams.*.source": Source,
    "data.streams.*.adapter": Adapter,
}
"""The keys of a config that name a class of ours, and what it must be a subclass of."""


def subclasses(base: type) -> list[type]:
    """The concrete classes derived from a base that are imported now, by name."""
    found: dict[str, type] = {}
    pending = [base]
    child: type
    while pending:
        for child in pending.pop().__subclasses__():
            pending.append(child)
            if not inspect.isabstract(child) and not child.__name__.startswith("_"):
                found[f"{child.__name__} {child.__module__}"] = child
    return [found[name] for name in sorted(found)]


def _discard_all_init_args(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Forgets every argument of the old class when a class is swapped, those of the same name among them.

    jsonargparse keeps those that the new class accepts (its issue #460): `--model.loss=Hinge` over a config with
    `Logistic(beta=0.3)` would silently train with beta 0.3.
    """
    if prev_val and prev_val.get("class_path") and "init_args" in prev_val:
        new = import_object(value["class_path"])
        if issubclass(new, Component) and new is not import_object(prev_val["class_path"]):
            for key in list(prev_val["init_args"].keys()):
                prev_val["init_args"].pop(key, None)
            return
    _discard_unknown_init_args(parser_or_action, prev_val, value)


_discard_unknown_init_args = typehints.discard_init_args_on_class_path_change
if not hasattr(typehints, "discard_init_args_on_class_path_change"):  # pragma: no cover - a future jsonargparse
    raise ImportError("This jsonargparse merges swapped classes in a new way; install the version in constraints.txt.")
typehints.discard_init_args_on_class_path_change = _discard_all_init_args


class Parser(LightningArgumentParser):
    """A parser whose errors say what is known and what to do, without the five hundred lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"bfpo: error: {_readable(message)}\n")
        hint = _hint(message)
        if hint:
            sys.stderr.write(f"{hint}\n")
        sys.exit(2)


def _readable(message: str) -> str:
    text = re.sub(r"\n\s*\n+", "\n", message.strip())
    return re.sub(r"(Subcommand|Parser) key", "key", text)


def _hint(message: str) -> str:
    """What to type instead, for the mistakes that one makes."""
    lines = []
    for key, base in COMPONENTS.items():
        last = key.rpartition(".")[2]
        if re.search(rf'key "([^"]*\.)?{last}["\.]', message):
            known = ", ".join(child.__name__ for child in subclasses(base))
            lines.append(f"Known for {key}: {known}. `bfpo components` describes them.")
    for key, base in COMPONENTS.items():
        for argument in re.findall(r"(?:are required:|[Oo]ption) '?(\w+)'?(?![\w.])", message):
            takers = [c.__name__ for c in subclasses(base) if argument in inspect.signature(c).parameters]
            if takers and "required" in message:
                lines.append(
                    f"--{key}.{argument} is an argument of {', '.join(takers)}. A class named anew takes over no "
                    f"argument of the one before it."
                )
    if "is not accepted" in message:
        lines.append("`bfpo fit --model.loss.help=Squared`, for instance, lists the arguments of a component.")
    if "model.labeling" in message and "required" in message:
        lines.append(
            "An experiment names them both: add `-c configs/experiment/bfpo.yaml`, or on the command line "
            "`--model.labeling=BFPO --model.loss=Squared --model.loss.tau=0.01`."
        )
    return "\n".join(lines)


class BFPOCLI(LightningCLI):
    """`fit` and `validate` of one kind of module, each in a run folder of its own.

    Args:
        model_class: The module that is trained.
        datamodule_class: The data.
        args: Command line, beginning with the subcommand.
        plugins: The plugins that were imported, for the run's record.
        command: The name of the command as typed, for the run's record.
    """

    def __init__(
        self,
        model_class: type[LightningModule],
        datamodule_class: type[LightningDataModule],
        args: list[str],
        plugins: list[Plugin],
        command: str,
    ) -> None:
        self.plugins = plugins
        self.command = command
        self.record: dict[str, Any] = {}
        self.run_folder = Path()
        super().__init__(
            model_class,
            datamodule_class,
            save_config_callback=None,  # ours also serves W&B and runs without a logger
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
            parser_class=Parser,
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands of a Trainer that this one offers, and the arguments that it fills in itself."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--experiment", type=str, default="default", help="Name of the experiment: a folder of runs."
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 1})
        parser.add_lightning_class_args(ExportHF, "export")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        _check_config_files(args)
        asked = [arg for arg in args if re.match(r"--[\w.]+\.help\b", arg)]
        args = [args[0], asked[0]] if asked else args  # help on a component needs no other argument and takes none
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint gives weights and state, and never overrides the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        _check_checkpoint(config.get("ckpt_path"))
        dumped = self._parser(self.subcommand).dump(config, skip_link_targets=False, skip_none=False, format="yaml")
        self.record = yaml.safe_load(dumped)
        self.run_folder = new_run_folder(config.runs, config.experiment)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(self.run_folder / "checkpoints")
        for logger in _loggers(config.trainer):
            arguments = logger.get("init_args", Namespace())
            for key, value in (("save_dir", str(self.run_folder)), ("name", self.run_folder.name)):
                if key in arguments and arguments[key] in (None, "."):
                    arguments[key] = value

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        loggers: Any = config.trainer.logger
        loggers = loggers if isinstance(loggers, list) else [loggers]
        loggers = [logger for logger in loggers if isinstance(logger, Logger)]
        kwargs["logger"] = [CSVLogger(str(self.run_folder), name="", version=""), *loggers]
        kwargs["default_root_dir"] = str(self.run_folder)
        notes: dict[str, Any] = {"plugins": [f"{plugin.name} ({plugin.origin})" for plugin in self.plugins]}
        if config.get("ckpt_path"):
            notes["parent_checkpoint"] = str(config.ckpt_path)
        callbacks = list(config.trainer.callbacks or [])
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(progress_callback())
        record = RunRecord(self.run_folder, self.record, self.command, notes)
        kwargs["callbacks"] = [record, Throughput(), *callbacks]
        trainer = super().instantiate_trainer(**kwargs)
        _check_strategy_reads(config.get("ckpt_path"), trainer)
        return trainer


def _check_strategy_reads(checkpoint: Any, trainer: Trainer) -> None:
    if checkpoint and Path(checkpoint).is_dir() and not isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"The checkpoint {checkpoint} is a folder with a shard of each process. Only fsdp2 reads it, on any number "
            f"of processes: add `-c configs/strategy/fsdp2.yaml --trainer.devices=1`, or more devices."
        )


def _check_config_files(args: list[str]) -> None:
    """Names the file and the place of malformed YAML, which the parser's own message does not.

    Raises:
        UserError: A config file cannot be read as YAML.
    """
    values = [after for option, after in pairwise(args) if option in ("-c", "--config")]
    values += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    for path in (Path(value) for value in values):
        if not path.is_file():
            continue  # the parser says so itself, and a value may be YAML text
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"The config {path} is not valid YAML: {' '.join(str(error).split())}") from error


def _check_checkpoint(path: str | Path | None) -> None:
    """Fails before any weight loads if a checkpoint is not there.

    Raises:
        UserError: There is no such file or folder; the message lists those beside it.
    """
    if path is None or str(path) in ("last", "best", "hpc") or "://" in str(path) or Path(path).exists():
        return
    parent = Path(path).parent
    beside = sorted(item.name for item in parent.glob("*.ckpt")) if parent.is_dir() else []
    raise UserError(f"There is no checkpoint '{path}'. Checkpoints in {parent}: {', '.join(beside) or 'none'}.")


def _loggers(trainer: Namespace) -> list[Any]:
    loggers = trainer.get("logger")
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in loggers if isinstance(logger, Namespace | dict) and "class_path" in logger]
