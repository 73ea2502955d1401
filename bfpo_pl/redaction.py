"""Keeps secrets out of what a run writes down: by the names of settings, by the shapes of tokens, by known values."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REDACTED = "<redacted>"
_NAME = re.compile(r"((^|[_.\-])(token|api_?key|access_?key|secret(_?key)?|passwd)|password)$", re.IGNORECASE)
_VARIABLE = re.compile(r"_KEY$", re.IGNORECASE)
"""Names of environment variables that hold secrets besides; a setting of such a name may be a column's."""
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|hf_oauth_[A-Za-z0-9._\-]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_\-]{20,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_\-]{16,}"  # GitHub, GitLab
    r"|wandb_v1_[A-Za-z0-9_]{20,}|AKIA[0-9A-Z]{16})"  # W&B's newer keys, AWS
)
_URL = re.compile(r"(?P<name>\b[a-z][a-z0-9+.\-]*://)[^/\s'\"]+(?=@)", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<name>[?&][\w.\-]*(?:token|api_?key|access_?key|secret|password|signature|sig)=)[^&#\s'\"]+", re.IGNORECASE
)
_BEARER = re.compile(r"(?P<name>\bbearer\s+)[A-Za-z0-9._~+/=\-]{16,}", re.IGNORECASE)
_INLINE = re.compile(  # in JSON or YAML on the command line
    r"(?P<name>[\w.\-]*(?:token|api_?key|secret|password)[\"']?\s*:\s*)"
    r"(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'|[\"']?[^\"',}\n]+)",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Shorter values of secret environment variables are not looked for: they would hit words."""


def names_secret(name: str) -> bool:
    """Whether a setting, an option or an environment variable of this name holds a secret.

    Args:
        name: Its name, such as ``hub_token``, ``--trainer.logger.api_key`` or ``WANDB_API_KEY``.
    """
    return _NAME.search(name) is not None


def redacted_text(text: str) -> str:
    """A text without tokens, credentials in URLs, and values of environment variables that name a secret.

    Args:
        text: Any text.
    """
    for name, value in os.environ.items():
        if (names_secret(name) or _VARIABLE.search(name)) and len(value) >= _SHORTEST:
            text = text.replace(value, REDACTED)
    text = _TOKEN.sub(REDACTED, text)
    for pattern in (_URL, _QUERY, _BEARER):
        text = pattern.sub(rf"\g<name>{REDACTED}", text)
    return text


def redacted(config: Any) -> Any:
    """A copy of nested plain data in which secrets are replaced by ``<redacted>``, whatever the field.

    Args:
        config: Dictionaries, lists and plain values.
    """
    if isinstance(config, dict):
        return {
            redacted(key): REDACTED if value is not None and names_secret(str(key)) else redacted(value)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [redacted(item) for item in config]
    return redacted_text(config) if isinstance(config, str) else config


def redacted_arguments(arguments: list[str]) -> list[str]:
    """A command line's arguments, with the values of options that name a secret replaced, and secrets elsewhere.

    Args:
        arguments: The arguments.
    """
    shown, hide_next = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next:
            argument, hide_next = REDACTED, False
        elif name.startswith("--") and names_secret(name):
            argument, hide_next = f"{name}{equals}" + (REDACTED if equals else ""), not equals
        shown.append(redacted_text(_INLINE.sub(rf"\g<name>{REDACTED}", argument)))
    return shown


def redacted_command(arguments: list[str]) -> str:
    """A command line as one would type it, without secrets.

    Args:
        arguments: Its arguments, the program first.
    """
    return " ".join(
        argument if argument == REDACTED else shlex.quote(argument) for argument in redacted_arguments(arguments)
    )


@contextmanager
def secrets_off_the_command_line() -> Iterator[None]:
    """Shows a redacted command line to whoever reads ``sys.argv`` meanwhile; W&B writes it down as it is."""
    typed = sys.argv
    sys.argv = redacted_arguments(typed)
    try:
        yield
    finally:
        sys.argv = typed
