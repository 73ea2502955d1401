"""The `bfpo` command: one table of commands, each a plain function of its arguments."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from bfpo_pl.component import UserError
from bfpo_pl.plugins import Plugin, load_plugins


def fit(args: list[str], plugins: list[Plugin]) -> object:
    """Aligns a model: preference training with a labeling function and a loss."""
    return _preference("fit", args, plugins)


def validate(args: list[str], plugins: list[Plugin]) -> object:
    """Computes the validation metrics of a checkpoint, under its own or another labeling or loss."""
    return _preference("validate", args, plugins)


def sft(args: list[str], plugins: list[Plugin]) -> object:
    """Fine-tunes a model on responses: the stage before `fit`."""
    from bfpo_pl.data.datamodule import AlignmentData
    from bfpo_pl.parsing import BFPOCLI
    from bfpo_pl.sft import SFTModule

    return BFPOCLI(SFTModule, AlignmentData, ["fit", *args], plugins, "sft")


def components(args: list[str], plugins: list[Plugin]) -> None:
    """Lists labelings, losses, references, sources and other components, and the plugins, with one line each."""
    from bfpo_pl.listing import print_components

    print_components(plugins)


def demo(args: list[str], plugins: list[Plugin]) -> None:
    """Shows the method on the microworld: fine-tunes, aligns, judges, and draws the result. Minutes, no download."""
    from bfpo_pl.demo import run_demo

    run_demo(args)


def _preference(command: str, args: list[str], plugins: list[Plugin]) -> object:
    from bfpo_pl.data.datamodule import AlignmentData
    from bfpo_pl.module import PreferenceModule
    from bfpo_pl.parsing import BFPOCLI

    return BFPOCLI(PreferenceModule, AlignmentData, [command, *args], plugins, command)


COMMANDS: dict[str, Callable[[list[str], list[Plugin]], object]] = {
    "fit": fit,
    "validate": validate,
    "sft": sft,
    "components": components,
    "demo": demo,
}
"""Every command of `bfpo`, by name."""


def usage() -> str:
    """The text of `bfpo --help`."""
    lines = ["usage: bfpo COMMAND [arguments]", "", "commands:"]
    lines += [f"  {name:<12}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "Try `bfpo demo`, or: bfpo fit -c configs/base.yaml -c configs/experiment/bfpo.yaml",
        "Configs stack from left to right; an override such as --model.loss.tau=0.1 comes after them.",
        "`bfpo fit --help` lists every setting, `bfpo fit --model.labeling.help=BFPO` those of one component.",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> object:
    """Runs one command.

    Args:
        args: Command line without the program's name. Default: this process's.

    Returns:
        What the command returns; for `fit`, `validate` and `sft` the CLI object, with ``run_folder``, ``trainer``,
        ``model`` and ``datamodule``.

    Raises:
        SystemExit: With code 2 after a user's mistake, said in one message on stderr.
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return None
    if args[0] not in COMMANDS:
        sys.stderr.write(f"bfpo: error: there is no command '{args[0]}'.\n{usage()}\n")
        raise SystemExit(2)
    _quiet()
    try:
        return COMMANDS[args[0]](args[1:], load_plugins())
    except UserError as error:
        sys.stderr.write(f"bfpo: error: {error}\n")
        raise SystemExit(2) from error


def _quiet() -> None:
    """Silences what a user of `bfpo` cannot act upon."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def run() -> None:
    """Entry point of the console script."""
    main()


if __name__ == "__main__":
    run()
