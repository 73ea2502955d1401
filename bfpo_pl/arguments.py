"""What happens to a command line before the parser reads it: order, and mistakes that the parser would not explain."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import yaml

from bfpo_pl.component import UserError

_HELP = re.compile(r"--(?P<key>[\w.]+)\.help(=(?P<name>[\w.]+))?$")


def configs_first(args: list[str]) -> list[str]:
    """Moves config files before all overrides, each in its own order: what is typed as an override always wins."""
    configs: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg in ("-c", "--config"):
            configs += [arg, *([value] if (value := next(rest, None)) is not None else [])]
        elif arg.startswith("--config="):
            configs.append(arg)
        else:
            others.append(arg)
    return configs + others


def config_values(args: list[str]) -> list[str]:
    """What a command line names as configs: files, or YAML text."""
    values = [after for option, after in pairwise(args) if option in ("-c", "--config")]
    return values + [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]


def check_config_files(args: list[str]) -> None:
    """Names the file and the place of malformed YAML, which the parser's own message does not.

    Raises:
        UserError: A config file cannot be read as YAML.
    """
    for path in map(Path, config_values(args)):
        if not path.is_file():
            continue  # the parser says so itself, and a value may be YAML text
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"The config {path} is not valid YAML: {' '.join(str(error).split())}") from error


def check_experiment(name: str) -> None:
    """Fails if an experiment's name would not be one folder of runs.

    Raises:
        UserError: It has separators or nothing but dots in it.
    """
    if not re.fullmatch(r"[\w\-+=,@ .]*[\w\-+=,@]", name) or name.startswith("."):
        raise UserError(f"experiment: '{name}' must be the name of one folder: letters, digits, '-', '_', '.'.")


def help_asked(args: list[str]) -> tuple[str, str | None] | None:
    """The key and the class name of the first ``--KEY.help[=NAME]``, if there is one."""
    for arg in args:
        if match := _HELP.match(arg):
            return match["key"], match["name"]
    return None
