"""`bfpo components`: what can be named in a config, and what each of them means and takes."""

from __future__ import annotations

import inspect
import re
import typing

from rich.console import Console
from rich.table import Table

import bfpo_pl.models.precomputed  # noqa: F401  # defines a reference
from bfpo_pl.component import UserError
from bfpo_pl.data.adapters import Adapter
from bfpo_pl.data.batching import Batching
from bfpo_pl.data.contamination import ContaminationGuard
from bfpo_pl.data.packing import Packing
from bfpo_pl.data.sources import Source
from bfpo_pl.data.templates import ChatTemplate
from bfpo_pl.data.truncation import Truncation
from bfpo_pl.labeling import LabelingFunction
from bfpo_pl.losses import AuxiliaryLoss, PreferenceLoss
from bfpo_pl.models.attention import AttentionBackend
from bfpo_pl.models.quantization import FourBit
from bfpo_pl.models.reference import Reference
from bfpo_pl.models.sources import ModelSource
from bfpo_pl.models.trainable import TrainablePart
from bfpo_pl.plugins import Plugin
from bfpo_pl.reductions import PairReduction
from bfpo_pl.schedules import Schedule

COMPONENTS: dict[str, type] = {
    "model.labeling": LabelingFunction,
    "model.loss": PreferenceLoss,
    "model.auxiliary": AuxiliaryLoss,
    "model.pair_reduction": PairReduction,
    "model.policy": ModelSource,
    "model.policy.quantization": FourBit,
    "model.trainable": TrainablePart,
    "model.reference": Reference,
    "model.attention": AttentionBackend,
    "model.schedule": Schedule,
    "data.streams.<stream>.source": Source,
    "data.streams.<stream>.adapter": Adapter,
    "data.template": ChatTemplate,
    "data.truncation": Truncation,
    "data.batching": Batching,
    "data.packing": Packing,
    "data.contamination": ContaminationGuard,
}
"""The keys of a config that name a class of ours, and what it must be, or be a subclass of."""


def component_key(typed: str) -> str | None:
    """The key of `COMPONENTS` that a key as typed stands for (a stream has any name), or None."""
    key = re.sub(r"^data\.streams\.[^.]+\.", "data.streams.<stream>.", typed)
    return key if key in COMPONENTS else None


def subclasses(base: type) -> list[type]:
    """The concrete classes, a base and those derived from it, that are imported now, by name."""
    found: dict[str, type] = {}
    pending = [base]
    while pending:
        child = pending.pop()
        pending += child.__subclasses__()
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            found[f"{child.__name__} {child.__module__}"] = child
    return [found[name] for name in sorted(found)]


def _console() -> Console:
    # Not a terminal: wide, so that a description keeps its line.
    return Console(width=None if Console().is_terminal else 200)


def print_components(plugins: list[Plugin]) -> None:
    """Prints a table of all components, by the key that takes them, and the plugins that were loaded."""
    console = _console()
    for key, base in COMPONENTS.items():
        title = f"{key} ({base.__name__})"
        table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
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
    console.print("`bfpo components NAME` says what one of them means and takes.", highlight=False, markup=False)


def describe(name: str, key: str | None = None) -> str:
    """What a component means and takes: where it goes, its docstring, its arguments with types and defaults.

    Args:
        name: Short name or full path of a class.
        key: The key of a config that it is meant for. Default: any.

    Raises:
        UserError: There is no such component; the message lists those that are known.
    """
    tables = {k: base for k, base in COMPONENTS.items() if key in (None, k)}
    known = {k: subclasses(base) for k, base in tables.items()}
    found = [
        (k, child)
        for k, children in known.items()
        for child in children
        if name in (child.__name__, f"{child.__module__}.{child.__name__}")
    ]
    if not found:
        names = ", ".join(child.__name__ for children in known.values() for child in children)
        raise UserError(f"There is no component '{name}'{f' for {key}' if key else ''}. Known: {names}.")
    return "\n\n".join(_described(*item) for item in found)


def _described(key: str, component: type) -> str:
    lines = [f"{component.__name__} ({component.__module__}), for {key}", "", inspect.getdoc(component) or "", ""]
    parameters = list(inspect.signature(component).parameters.values())
    if parameters:
        hints = typing.get_type_hints(component.__init__)  # type: ignore[misc]
        lines.append("On the command line:")
    for parameter in parameters:
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"default {parameter.default!r}"
        hint = inspect.formatannotation(hints.get(parameter.name, parameter.annotation)).replace("typing.", "")
        lines.append(f"  --{key}.{parameter.name}  ({hint}, {default})")
    return "\n".join(lines).rstrip()
