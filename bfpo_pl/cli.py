"""The `bfpo` command: one table of commands, each a plain function of its arguments."""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable

from bfpo_pl.component import causes_of
from bfpo_pl.failures import exit_code, explained
from bfpo_pl.plugins import Plugin, load_plugins
from bfpo_pl.redaction import redacted_text


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


def reference(args: list[str], plugins: list[Plugin]) -> object:
    """Computes the log-probs of a fit's reference models beforehand, once for all runs on these rows."""
    from bfpo_pl.data.datamodule import AlignmentData
    from bfpo_pl.reference_command import ReferenceCLI, ReferenceModule

    return ReferenceCLI(ReferenceModule, AlignmentData, ["fit", *args], plugins, "reference")


def data(args: list[str], plugins: list[Plugin]) -> object:
    """Inspects the data of a config, or shows a batch token by token: `bfpo data inspect`, `bfpo data show`."""
    from bfpo_pl.inspection.command import run_data

    return run_data(args, plugins)


def checkpoints(args: list[str], plugins: list[Plugin]) -> None:
    """Lists the checkpoints of a run, and says which are complete: `bfpo checkpoints RUN [--verify]`."""
    from bfpo_pl.checkpoints.command import run_checkpoints

    run_checkpoints(args)


def export(args: list[str], plugins: list[Plugin]) -> object:
    """Writes a checkpoint of a run as a Hugging Face folder, merged or as an adapter, with a model card."""
    from bfpo_pl.export.command import export_run
    from bfpo_pl.function_parser import call_with

    return call_with("bfpo export", export_run, args)


def generate(args: list[str], plugins: list[Plugin]) -> object:
    """Chats in the terminal with a run, an export or a model of the Hub; answers one prompt in a pipe."""
    from bfpo_pl.chat.command import chat
    from bfpo_pl.function_parser import call_with

    return call_with("bfpo generate", chat, args)


def compare(args: list[str], plugins: list[Plugin]) -> object:
    """Compares runs or the trials of a sweep: means over seeds, differences, the Pareto front, a report page."""
    from bfpo_pl.comparison.command import compare
    from bfpo_pl.function_parser import call_with

    return call_with("bfpo compare", compare, args)


def estimate(args: list[str], plugins: list[Plugin]) -> object:
    """Says what memory and time a config takes on devices of a named kind, before anything is loaded."""
    from bfpo_pl.estimation.command import run_estimate

    return run_estimate(args, plugins)


def sweep(args: list[str], plugins: list[Plugin]) -> object:
    """Runs the trials of W&B sweep files without a server; goes on with those that are left."""
    from bfpo_pl.function_parser import call_with
    from bfpo_pl.sweep.command import run_sweeps

    return call_with("bfpo sweep", run_sweeps, args)


def components(args: list[str], plugins: list[Plugin]) -> None:
    """Lists labelings, losses, references, sources and plugins; with a NAME, says what it means and takes."""
    import bfpo_pl.data.datamodule  # noqa: F401  # its imports define the components
    from bfpo_pl.listing import describe, print_components

    if not args:
        print_components(plugins)
    for name in args:
        print(describe(name))


def demo(args: list[str], plugins: list[Plugin]) -> None:
    """Shows the method on the microworld: fine-tunes, aligns, judges, and draws the result. Minutes, no download."""
    from bfpo_pl.demo import run_demo

    run_demo(args)


def _preference(command: str, args: list[str], plugins: list[Plugin]) -> object:
    from bfpo_pl.data.datamodule import AlignmentData
    from bfpo_pl.module import PreferenceModule
    from bfpo_pl.parsing import BFPOCLI

    return BFPOCLI(PreferenceModule, AlignmentData, [command, *args], plugins, command)


TRACEBACK_VARIABLE = "BFPO_TRACEBACK"
"""Environment variable: if set, mistakes end in a traceback instead of one message."""

COMMANDS: dict[str, Callable[[list[str], list[Plugin]], object]] = {
    "fit": fit,
    "validate": validate,
    "sft": sft,
    "reference": reference,
    "data": data,
    "checkpoints": checkpoints,
    "export": export,
    "generate": generate,
    "compare": compare,
    "estimate": estimate,
    "sweep": sweep,
    "components": components,
    "demo": demo,
}
"""Every command of `bfpo`, by name."""

WITHOUT_PLUGINS = ("compare",)
"""Commands that only read records: what plugins import takes longer than they do."""


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
        SystemExit: With code 2 after a user's mistake, 1 after a failure of the run, 128 + the signal's number after
            an orderly stop (143 for SIGTERM, 130 for Ctrl-C); said in one message on stderr. Silently with 141 where
            nobody reads stdout any more.
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
        result = COMMANDS[args[0]](args[1:], [] if args[0] in WITHOUT_PLUGINS else load_plugins())
        sys.stdout.flush()  # what reads it may be gone: better now than at exit
        return result
    except SystemExit as error:
        raise SystemExit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        sys.stderr.write("bfpo: interrupted before training began.\n")
        raise SystemExit(128 + signal.SIGINT) from error
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from error
        from bfpo_pl.guard import Stopped

        message, code = explained(error)
        if not message or TRACEBACK_VARIABLE in os.environ:
            raise
        stopped = any(isinstance(cause, Stopped) for cause in causes_of(error))
        kind = "" if stopped or code > 128 else "error: "  # one that was asked for is none
        sys.stderr.write(f"bfpo: {kind}{redacted_text(message)}\n")
        raise SystemExit(code) from error


def _reader_left() -> bool:
    """Whether the program that stdout is piped to has ended (`bfpo generate ... | head`)."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _quiet() -> None:
    """Silences what a user of `bfpo` cannot act upon, and shows warnings without the line of code that warns."""
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\n"
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse")
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    warnings.filterwarnings("ignore", ".*Previous log files in this directory will be deleted.*")
    warnings.filterwarnings("ignore", ".*Total length of `(list|DataLoader|CombinedLoader)` across ranks is zero.*")
    warnings.filterwarnings("ignore", ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*")
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")  # the first step is always logged
    said = re.compile("litlogger|^TPU available|^GPU available: False")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not said.search(str(record.msg)))
    logger.addFilter(_without_secrets)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted_text(record.getMessage()), None
    return True


def run() -> None:
    """Entry point of the console script."""
    main()


if __name__ == "__main__":
    run()
