"""`bfpo components`: what can be named in a config."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from bfpo_pl.parsing import COMPONENTS, subclasses
from bfpo_pl.plugins import Plugin


def print_components(plugins: list[Plugin]) -> None:
    """Prints a table of all components, by the key that takes them, and the plugins that were loaded."""
    # Not a terminal: wide, so that a description keeps its line.
    console = Console(width=None if Console().is_terminal else 200)
    for key, base in COMPONENTS.items():
        if key == "model.references":
            continue
        table = Table(
            title=f"{key} ({base.__name__})", title_justify="left", box=None, show_header=False, pad_edge=False
        )
        table.add_column(style="bold", no_wrap=True, min_width=24)
        table.add_column()
        for child in subclasses(base):
            package = child.__module__.split(".")[0]
            summary = (inspect.getdoc(child) or "").splitlines()[0] if child.__doc__ else ""
            table.add_row(child.__name__, summary + ("" if package == "bfpo_pl" else f" [{child.__module__}]"))
        console.print(table, highlight=False, markup=False)
        console.print()
    names = ", ".join(f"{plugin.name} ({plugin.origin})" for plugin in plugins)
    console.print(f"Plugins: {names or 'none'}", highlight=False, markup=False)
