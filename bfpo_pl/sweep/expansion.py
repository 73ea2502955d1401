"""The command line of a trial: W&B's macros, filled in as its agent does."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

from bfpo_pl.sweep.spec import SweepSpec

ENV = "/usr/bin/env"
"""What ``${env}`` stands for."""

_VARIABLE = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def expanded(spec: SweepSpec, parameters: dict[str, Any]) -> list[str]:
    """The words of a trial's command line.

    Args:
        spec: The sweep.
        parameters: The trial's values, by dotted key.
    """
    flags = {key: f"{key}={value}" for key, value in parameters.items()}
    macros = {
        "${env}": [ENV],
        "${interpreter}": ["python"],
        "${program}": [spec.program],
        "${args}": [f"--{flag}" for flag in flags.values()],
        "${args_no_hyphens}": list(flags.values()),
        "${args_no_equals}": [word for key, value in parameters.items() for word in (f"--{key}", str(value))],
        "${args_no_boolean_flags}": [
            f"--{key}" if value is True else f"--{flags[key]}"
            for key, value in parameters.items()
            if value is not False
        ],
        "${args_json}": [json.dumps(parameters)],
        "${args_append_hydra}": [f"+{flag}" for flag in flags.values()],
        "${args_override_hydra}": [f"++{flag}" for flag in flags.values()],
    }
    words: list[str] = []
    for word in spec.command:
        word = _VARIABLE.sub(lambda found: os.environ.get(found[1], found[1]), word)
        words += macros.get(word, [word])
    return words


def bfpo_arguments(words: list[str]) -> list[str] | None:
    """What follows ``bfpo`` in a command line; None if it runs another program."""
    rest = words[1:] if words and words[0] == ENV else list(words)
    while rest and re.fullmatch(r"[A-Za-z_]\w*=.*", rest[0]):
        return None  # a variable of env's: a process of its own sets it
    if rest[:1] in (["python"], ["python3"]):
        rest = rest[1:]
        if rest[:2] == ["-m", "bfpo_pl.cli"]:
            return rest[2:]
    return rest[1:] if rest[:1] == ["bfpo"] else None


def runnable(words: list[str]) -> list[str]:
    """The words with this interpreter in the place of ``python``."""
    rest = words[1:] if words and words[0] == ENV else list(words)
    if rest[:1] == ["python"]:
        rest = [sys.executable, *rest[1:]]
    return [*words[: len(words) - len(rest)], *rest]
