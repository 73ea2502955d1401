"""Plugins: labelings, losses, sources and the like from outside the package, imported before parsing.

Two ways: python files (or packages) in a folder, ``plugins/`` in the working directory or those that ``BFPO_PLUGINS``
names; and installed packages that declare an entry point in the group ``bfpo_pl.plugins``.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from bfpo_pl.component import UserError

ENTRY_POINT_GROUP = "bfpo_pl.plugins"
VARIABLE = "BFPO_PLUGINS"


class PluginError(UserError):
    """A plugin that could not be imported; the run stops rather than go on without it."""


@dataclass(frozen=True)
class Plugin:
    """A plugin that was imported.

    Args:
        name: Its module's name.
        origin: The file, or the package that declares it.
    """

    name: str
    origin: str


def load_plugins() -> list[Plugin]:
    """Imports every plugin, once, in the order of folders and names.

    Raises:
        PluginError: A plugin raised at import, or a named folder does not exist; the message names it.
    """
    return [*_load_folders(), *_load_entry_points()]


def _folders() -> list[Path]:
    named = os.environ.get(VARIABLE)
    if named is None:
        return [path for path in [Path.cwd() / "plugins"] if path.is_dir()]
    folders = [Path(part).expanduser().resolve() for part in named.split(os.pathsep) if part]
    for folder in folders:
        if not folder.is_dir():
            raise PluginError(f"{VARIABLE} names '{folder}', which is not a folder.")
    return folders


def _load_folders() -> list[Plugin]:
    loaded = []
    for folder in _folders():
        if str(folder.parent) not in sys.path:
            sys.path.insert(0, str(folder.parent))
        files = [path for path in folder.glob("*.py") if not path.name.startswith("_")]
        packages = [path for path in folder.iterdir() if (path / "__init__.py").is_file()]
        for path in sorted(files + packages):
            name = f"{folder.name}.{path.stem}"
            module = _import(name, str(path))
            found = Path(module.__file__ or "").resolve()
            expected = (path / "__init__.py" if path.is_dir() else path).resolve()
            if found != expected:
                raise PluginError(
                    f"The plugin {path} is hidden by another module of the name '{name}' ({found}); rename the folder."
                )
            loaded.append(Plugin(name, str(path)))
    return loaded


def _load_entry_points() -> list[Plugin]:
    loaded = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist else entry.value
        _import(entry.module, f"entry point '{entry.name}' of {package}")
        loaded.append(Plugin(entry.module, package))
    return loaded


def _import(name: str, origin: str):
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"The plugin '{name}' ({origin}) failed to import: {type(error).__name__}: {error}. Mend it, or move it "
            f"out of the plugin folder."
        ) from error
