"""The command line of `bfpo estimate`: its own options, and the configs and overrides that `fit` and `sft` take."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any, NoReturn

from jsonargparse import Namespace

from bfpo_pl.component import UserError
from bfpo_pl.estimation.batches import Lengths, not_at_hand, workload_of
from bfpo_pl.estimation.devices import TERA, device_kind, device_names
from bfpo_pl.estimation.duration import DEFAULT_UTILISATION
from bfpo_pl.estimation.estimate import Estimate, estimate
from bfpo_pl.estimation.plan import plan_of
from bfpo_pl.estimation.report import show
from bfpo_pl.inspection.command import DataCLI, quiet
from bfpo_pl.inspection.terminal import console
from bfpo_pl.models.attention import Padded
from bfpo_pl.module import PreferenceModule
from bfpo_pl.plugins import Plugin

USAGE = f"""\
usage: bfpo estimate --device KIND -c CONFIG [-c CONFIG ...] [overrides] [options]

Memory of each device and time of an epoch, from the configs and overrides of a `fit` or `sft`, before anything is
loaded or rented: of the model its config.json alone is read, and nothing goes to runs/.

  --device KIND         {", ".join(device_names())}. How many: trainer.devices and
                        trainer.num_nodes.
  --prompt_tokens N     All prompts have N tokens, and with
  --response_tokens N   all responses this many; both or neither. Default: the lengths of the data, if it is local and
                        small; else the most that data.truncation lets through.
  --utilisation X       Share of the device's rate of matrix products that is reached. Default: {DEFAULT_UTILISATION}.
  --rate TFLOPS         The device's rate, where it is not known or not the data sheet's.
  --levers              Lists what would lower the peak, even if the run fits.
  --json                Plain data instead of tables, in bytes, operations and seconds.

  bfpo estimate --device h100 -c configs/base.yaml -c configs/data/paper_bfpo.yaml \\
    -c configs/model/mistral_7b_selective.yaml -c configs/reference/shared_weights.yaml \\
    -c configs/strategy/fsdp2.yaml -c configs/experiment/paper/bfpo.yaml \\
    --model.policy.path=mistralai/Mistral-7B-v0.1
docs/estimate.md says how it is computed, and compares it with measurements."""


class _Options(argparse.ArgumentParser):
    """The options that are not part of the config."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"bfpo estimate: {message}.\n{USAGE}")


class EstimateCLI(DataCLI):
    """Reads configs and overrides as `fit` does; makes the module and the data, without a tokenizer."""

    def instantiate_classes(self) -> None:
        config = self.config["fit"]
        self.config_init = self._parser("fit").instantiate(Namespace(model=config.model, data=config.data))
        self.model, self.datamodule = self.config_init.model, self.config_init.data


def run_estimate(args: list[str], plugins: list[Plugin]) -> Estimate | None:
    """Estimates a run.

    Args:
        args: Command line after ``bfpo estimate``.
        plugins: The plugins that were imported.

    Returns:
        The estimate; None where only the usage was asked for.

    Raises:
        UserError: An option is wrong, or something of the config cannot be estimated.
    """
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(USAGE)
        return None
    options, rest = _options(args)
    kind = device_kind(options.device)
    if options.rate is not None:
        kind = replace(kind, half_rate=options.rate * TERA, full_rate=options.rate * TERA)
    with quiet():
        cli = EstimateCLI(rest, plugins)
        trainer = cli.config["fit"].trainer
        plan = plan_of(cli.model, trainer, kind)
        paired = isinstance(cli.model, PreferenceModule)
        padded = isinstance(plan.attention, Padded)
        lengths = _lengths(options)
        if lengths is None and not_at_hand(cli.datamodule) is None:
            cli.datamodule.tokenizer = cli.model.tokenizer
            cli.datamodule.stop_token_ids = cli.model.stop_token_ids
        work = workload_of(cli.datamodule, trainer, plan.devices, lengths, paired, padded)
        found = estimate(plan, work, options.utilisation, options.levers)
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, console())
    return found


def _options(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Options(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    parser.add_argument("--prompt_tokens", type=int)
    parser.add_argument("--response_tokens", type=int)
    parser.add_argument("--utilisation", type=float, default=DEFAULT_UTILISATION)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--levers", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(args)
    if options.device is None:
        parser.error(f"--device is missing: {', '.join(device_names())}")
    for name, above in (("prompt_tokens", 1), ("response_tokens", 1), ("rate", 0.0)):
        value: Any = getattr(options, name)
        if value is not None and (value < above or value == 0):
            parser.error(f"--{name} must be positive, not {value}")
    if not 0 < options.utilisation <= 1:
        parser.error(f"--utilisation must lie in (0, 1], not {options.utilisation}")
    if (options.prompt_tokens is None) != (options.response_tokens is None):
        parser.error("--prompt_tokens and --response_tokens go together")
    return options, rest


def _lengths(options: argparse.Namespace) -> Lengths | None:
    return None if options.prompt_tokens is None else Lengths(options.prompt_tokens, options.response_tokens)
