"""Text in a terminal: wrapped at its width, with everything in its place."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

_NO_TERMINAL = 120
_NARROWEST = 20


def console() -> Console:
    """Standard output; of a fixed width if it is no terminal and nobody says how wide it is."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else _NO_TERMINAL, highlight=False)


def print_wrapped(console: Console, text: str | Text, style: str = "", indent: int = 0) -> None:
    """Prints lines; what does not fit goes on below, further in where the line itself is.

    Args:
        console: Where to.
        text: One or more lines, each perhaps with spaces before it.
        style: Their style.
        indent: Spaces before each line.
    """
    given = Text(text, style) if isinstance(text, str) else text
    for line in given.split("\n", allow_blank=True):
        spaces = len(line.plain) - len(line.plain.lstrip(" "))
        hang = 2 if spaces else 0
        first, width = indent + spaces, max(_NARROWEST, console.width - indent - spaces - hang)
        for number, part in enumerate(line[spaces:].wrap(console, width) or [Text()]):
            part.rstrip()
            print_line(console, part, first + hang * (number > 0))


def print_line(console: Console, line: Text, indent: int = 0) -> None:
    """Prints a line as it is.

    Args:
        console: Where to.
        line: The line.
        indent: Spaces before it.
    """
    console.print(Text(" " * indent) + line, no_wrap=True, overflow="ignore", crop=False)
