"""How the command line is read: LightningCLI with strict class swaps, telling errors, and run folders."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jsonargparse._typehints as typehints
import wandb
import yaml
from jsonargparse import Namespace
from jsonargparse._util import import_object
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from bfpo_pl.arguments import check_config_files, check_experiment, configs_first, help_asked
from bfpo_pl.callbacks.export import ExportHF
from bfpo_pl.callbacks.progress import progress_callback
from bfpo_pl.callbacks.record import RunRecord
from bfpo_pl.callbacks.stopping import OrderlyStop, end_children
from bfpo_pl.callbacks.throughput import Throughput
from bfpo_pl.callbacks.validation import MissedValidation
from bfpo_pl.checkpoints.file_io import AtomicCheckpointIO
from bfpo_pl.checkpoints.find import find_checkpoint
from bfpo_pl.checkpoints.keep import RunCheckpoints
from bfpo_pl.checkpoints.shards import plain_sharded_reads
from bfpo_pl.component import UserError
from bfpo_pl.devices import check_devices
from bfpo_pl.fit_loop import GoingOn, WholeSteps
from bfpo_pl.listing import COMPONENTS, component_key, describe, subclasses
from bfpo_pl.loggers import MetricsFile
from bfpo_pl.plugins import Plugin
from bfpo_pl.redaction import redacted, redacted_text, secrets_off_the_command_line
from bfpo_pl.resuming import AlreadyFinished, read_status, resumption
from bfpo_pl.runs import check_writable, hand_down, new_run_folder
from bfpo_pl.summary import print_validation
from bfpo_pl.training import ResponseModule
from bfpo_pl.wandb_views import wandb_loggers


def _discard_all_init_args(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Forgets every argument of the old class when a class is swapped, those of the same name among them.

    jsonargparse keeps those that the new class accepts (its issue #460): `--model.loss=Hinge` over a config with
    `Logistic(beta=0.3)` would silently train with beta 0.3.
    """
    known = prev_val and prev_val.get("class_path") and "init_args" in prev_val
    if known and import_object(value["class_path"]) is not import_object(prev_val["class_path"]):
        for key in list(prev_val["init_args"].keys()):
            prev_val["init_args"].pop(key, None)
    else:
        _discard_unknown_init_args(parser_or_action, prev_val, value)


if not hasattr(typehints, "discard_init_args_on_class_path_change"):  # pragma: no cover - a future jsonargparse
    raise ImportError("This jsonargparse merges swapped classes in a new way; install the version in constraints.txt.")
_discard_unknown_init_args = typehints.discard_init_args_on_class_path_change
typehints.discard_init_args_on_class_path_change = _discard_all_init_args


class Parser(LightningArgumentParser):
    """A parser whose errors say what is known and what to do, without the five hundred lines of usage."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        # `--trainer.max_step=3` would silently be max_steps.
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    typed: ClassVar[list[str]] = []
    """The command line as typed, to name the key of which a message gives the last part only."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"bfpo: error: {_readable(message)}\n")
        hint = _hint(message, self.typed)
        if hint:
            sys.stderr.write(f"{hint}\n")
        sys.exit(2)


def _readable(message: str) -> str:
    text = re.sub(r"\n\s*\n+", "\n", message.strip())
    return redacted_text(re.sub(r"(Subcommand|Parser) key", "key", text))


def _hint(message: str, typed: list[str]) -> str:
    """What to type instead, for the mistakes that one makes."""
    lines = []
    for key, base in COMPONENTS.items():
        last = key.rpartition(".")[2]
        if re.search(rf'key "([^"]*\.)?{last}["\.]', message):
            known = ", ".join(child.__name__ for child in subclasses(base))
            lines.append(f"Known for {key}: {known}. `bfpo components` describes them.")
    missing = re.findall(r"are required: (\w+)(?![\w.])", message)
    if missing and missing[0] in ("source", "adapter", "batch_size"):
        lines.append("A stream of data needs source, adapter and batch_size. Is data.streams.<stream> one that exists?")
        return "\n".join(lines)
    for key, base in COMPONENTS.items():
        for argument in missing:
            takers = [c.__name__ for c in subclasses(base) if argument in inspect.signature(c).parameters]
            if takers:
                lines.append(
                    f"--{key}.{argument} is an argument of {', '.join(takers)}. A class named anew takes over no "
                    f"argument of the one before it."
                )
    if refused := re.search(r"[Oo]ption '(\w+)' is not accepted", message):
        for option in (item.partition("=")[0] for item in typed):
            if option.endswith(f".{refused[1]}"):
                key = option.removeprefix("--").rpartition(".")[0].removesuffix(".init_args")
                lines.append(
                    f"The class at {key} has no argument '{refused[1]}': `bfpo fit --{key}.help=CLASS` lists them."
                )
                if key.endswith(".source"):
                    lines.append("For a file of your own add `-c configs/data/jsonl.yaml`.")
    if "model.optimizer" in message and "required" in message:
        lines.append(
            "configs/base.yaml names an optimizer and a schedule: `-c configs/base.yaml` first. Or on the command line "
            "`--model.optimizer=torch.optim.AdamW --model.optimizer.lr=5e-7`."
        )
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
        self.goes_on = False
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
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Go on with a run in its own folder, from its newest complete checkpoint: auto for the newest run of "
            "this experiment and config, or else a new one; or a run's folder.",
        )
        parser.add_argument(
            "--verify",
            action="store_true",
            help="Compare all of the checkpoint at --ckpt_path with its hashes before it loads; sizes always are.",
        )
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(ExportHF, "export")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_config_files(args)
        Parser.typed = list(args)
        asked = help_asked(args)
        if asked and asked[1] and (key := component_key(asked[0])):
            print(describe(asked[1], key))
            raise SystemExit(0)
        own = self._parser(args[0])
        own.prog = f"bfpo {self.command}"
        if self.command != args[0]:  # Lightning tells of its own commands alone
            own.description = inspect.cleandoc(self.model_class.__doc__ or "").split("\n\n")[0]
        words = [args[0], *configs_first(args[1:])]
        self.config = parser.parse_args(words)
        if SWEEP_ID in os.environ and self.config[args[0]].trainer.logger is None:  # the server waits for its metrics
            self.config = parser.parse_args([*words, "--trainer.logger=WandbLogger"])

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint gives weights and state, and never overrides the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_experiment(config.experiment)
        if config.get("weights_only") is False:
            raise UserError(
                "weights_only: false would let a checkpoint run code when it loads. bfpo's checkpoints hold plain data "
                "and do not need it: leave it out."
            )
        if config.resume and self.subcommand != "fit":
            raise UserError("--resume goes on with training; `bfpo validate` takes --ckpt_path.")
        if config.resume and config.get("ckpt_path"):
            raise UserError("Set --resume or --ckpt_path, not both: a run that goes on takes its own checkpoint.")
        config.ckpt_path = self._find_checkpoint(config)
        for part in (config.model.policy, config.model.get("reference"), config.export):
            _fill_in_seed(part, config.seed_everything)
        dumped = self._parser(self.subcommand).dump(config, skip_link_targets=False, skip_none=False, format="yaml")
        self.record = yaml.safe_load(dumped)
        self._choose_run_folder(config)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(self.run_folder / "checkpoints")
        for logger in _loggers(config.trainer):
            arguments = logger.get("init_args", Namespace())
            own = {"save_dir": str(self.run_folder), "name": self.run_folder.name, "id": self._wandb_id()}
            own["group"] = os.environ.get("WANDB_RUN_GROUP", config.experiment)
            own["project"] = os.environ.get("WANDB_PROJECT", "bfpo_pl")
            own["job_type"] = os.environ.get("WANDB_JOB_TYPE", self.command)
            for key, value in own.items():
                if key in arguments and arguments[key] in (None, "."):
                    arguments[key] = value

    def _choose_run_folder(self, config: Namespace) -> None:
        """A new folder for the run, or that of the run that goes on, with its checkpoint."""
        experiment = Path(config.runs) / config.experiment
        try:
            found = resumption(config.resume, experiment, self.command, redacted(self.record), config.verify)
        except AlreadyFinished as finished:
            rank_zero_info(str(finished))
            raise SystemExit(0) from None
        if found is None:
            self.run_folder = new_run_folder(config.runs, config.experiment)
            check_writable(Path(config.runs), f"--runs={config.runs}")
            return
        self.run_folder = hand_down(found.folder)
        check_writable(self.run_folder, f"--resume={config.resume}: {self.run_folder}")
        config.ckpt_path = None if found.checkpoint is None else str(found.checkpoint)
        self.goes_on = True

    def _wandb_id(self) -> str | None:
        return (read_status(self.run_folder) or {}).get("wandb_id")

    @staticmethod
    def _find_checkpoint(config: Namespace) -> str | None:
        asked = config.get("ckpt_path")
        own = config.checkpoint.dirpath
        # Process 0 decides: what it finds is what all of them load.
        verify = config.verify and rank_zero_only.rank == 0  # type: ignore[attr-defined]
        experiment = Path(config.runs) / config.experiment
        return find_checkpoint(None if asked is None else str(asked), experiment, own and Path(own), verify)

    def after_instantiate_classes(self) -> None:
        if isinstance(self.model, ResponseModule):
            self.model.source.check_training(self.model.trainable, str(self.trainer.precision))
        # Before any data is read; a module that is not ours may have no source.
        for part in (getattr(self.model, "source", None), *getattr(self.model, "references", {}).values()):
            if part is not None:
                part.check()
        for reference in getattr(self.model, "references", {}).values():
            reference.check_strategy(self.trainer.strategy)
        if self.subcommand == "validate" and not self.config[self.subcommand].get("ckpt_path"):
            rank_zero_info("No --ckpt_path: what is validated is the policy as its source gives it, before any fit.")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Lightning's default for an address is to run what is in it.
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def _run_subcommand(self, subcommand: str) -> None:
        failed = True
        try:
            with plain_sharded_reads(), redacted_wandb():
                super()._run_subcommand(subcommand)
            failed = False
        except BaseException:
            end_children(self.trainer)
            raise
        finally:
            # Else the next run of this process would go on in this one's W&B run.
            if any(wandb_loggers(self.trainer)):
                wandb.finish(exit_code=int(failed))

    def after_fit(self) -> None:
        self.run_record.finish(self.trainer)
        report = getattr(self.datamodule, "report", {}).values()
        rows = sum(splits.get("validation", {}).get("rows", 0) for splits in report)
        shown = any(name.startswith("val/") for name in self.trainer.callback_metrics)
        if rows and not shown and getattr(self.model, "validated_step", -1) < 0:  # nor before the run went on
            rank_zero_info(
                f"Validation never ran on its {rows} rows: this run ended before the first (trainer.val_check_interval "
                f"steps; where that is null, the end of an epoch). Set it lower, or run `bfpo validate -c "
                f"{self.run_folder}/config.yaml --ckpt_path CHECKPOINT`."
            )
        self._show_validation()

    def after_validate(self) -> None:
        self.run_record.finish(self.trainer)
        self._show_validation()

    def _show_validation(self) -> None:
        if self.trainer.is_global_zero:
            print_validation(self.trainer.callback_metrics)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        given = config.trainer
        check_devices(given.accelerator, given.devices, given.num_nodes, given.strategy)
        loggers: Any = config.trainer.logger
        loggers = loggers if isinstance(loggers, list) else [loggers]
        loggers = [logger for logger in loggers if isinstance(logger, Logger)]
        kwargs["logger"] = [MetricsFile(self.run_folder), *loggers]
        kwargs["default_root_dir"] = str(self.run_folder)
        notes: dict[str, Any] = {"plugins": [f"{plugin.name} ({plugin.origin})" for plugin in self.plugins]}
        if config.get("ckpt_path"):
            notes["parent_checkpoint"] = str(config.ckpt_path)
        configured = config.trainer.callbacks or []
        callbacks = list(configured) if isinstance(configured, list) else [configured]
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(progress_callback())
        self.run_record = RunRecord(self.run_folder, self.record, self.command, notes)
        kwargs["callbacks"] = [self.run_record, Throughput(), *callbacks]
        if self.subcommand == "fit":
            kwargs["callbacks"] += [MissedValidation(), OrderlyStop()]
        more = [config[key] for key in self._parser(self.subcommand).callback_keys]
        if config.trainer.enable_checkpointing is False:
            more = [callback for callback in more if not isinstance(callback, ModelCheckpoint)]
        kwargs["plugins"] = _with_checkpoint_io(config.trainer.plugins)
        trainer = self._instantiate_trainer({**config.trainer, **kwargs}, more)
        trainer.fit_loop = (GoingOn if self.goes_on else WholeSteps)(trainer.fit_loop)
        return trainer


def _fill_in_seed(part: Any, seed: Any) -> None:
    """Puts the run's seed in the place of ``{seed}`` in names and paths, so that each seed has a model of its own."""
    for key, value in vars(part).items() if isinstance(part, Namespace) else ():
        if isinstance(value, str):
            part[key] = value.replace("{seed}", str(seed))
        else:
            _fill_in_seed(value, seed)


def _with_checkpoint_io(configured: Any) -> list[Any]:
    """The Trainer's plugins and, where none of them writes checkpoints, ours."""
    plugins = list(configured) if isinstance(configured, list) else [configured] if configured is not None else []
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    return plugins


@contextmanager
def redacted_wandb() -> Iterator[None]:
    """Lets W&B, which writes down its own options and the command line of its process, see both without secrets."""
    start = wandb.init

    def init(**options: Any) -> Any:
        shown: dict[str, Any] = {k: redacted(v) if isinstance(v, str | list) else v for k, v in options.items()}
        with secrets_off_the_command_line():
            return start(**shown)

    wandb.init = init  # type: ignore[assignment]
    try:
        yield
    finally:
        wandb.init = start


SWEEP_ID = "WANDB_SWEEP_ID"
"""What `wandb agent` sets for the runs of a sweep."""


def _loggers(trainer: Namespace) -> list[Any]:
    loggers = trainer.get("logger")
    loggers = loggers if isinstance(loggers, list) else [loggers]
    return [logger for logger in loggers if isinstance(logger, Namespace | dict) and "class_path" in logger]
