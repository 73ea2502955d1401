"""What a sweep file says: the format of W&B sweeps, read strictly."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from bfpo_pl.component import UserError

METHODS = ("grid", "random", "bayes")
KEYS = (
    "program",
    "command",
    "method",
    "metric",
    "parameters",
    "name",
    "description",
    "project",
    "entity",
    "run_cap",
    "early_terminate",
)
"""What a sweep file may say at its top level; early_terminate is W&B's alone."""

PARAMETER_KEYS = ("value", "values", "distribution", "min", "max", "q", "parameters")
UNIFORM = ("uniform", "q_uniform", "int_uniform", "log_uniform", "log_uniform_values", "q_log_uniform_values")
DISTRIBUTIONS = ("constant", "categorical", *UNIFORM)
"""Distributions of W&B that run here."""


_TEXT_OF_A_NUMBER = re.compile(r"([+-]?\d+(?:\.\d*)?)(?:[eE]([+-]?\d+))?")


class _Strict(yaml.SafeLoader):
    """Refuses a mapping with a key twice, of which YAML's loader would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a mapping; what it takes over from another by ``<<`` may be there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Parameter:
    """One setting that a sweep varies, or keeps.

    Args:
        values: What it may be, where it is one of a list.
        distribution: Where it is drawn: one of `DISTRIBUTIONS`.
        low: Its smallest value, where it is a number of a range.
        high: Its largest one.
        step: Distance of the values, where they are rounded (W&B's ``q``).
    """

    values: tuple[Any, ...] = ()
    distribution: str = "categorical"
    low: float = 0.0
    high: float = 0.0
    step: float | None = None


@dataclass(frozen=True)
class SweepSpec:
    """A sweep file.

    Args:
        path: The file.
        method: ``grid``, ``random`` or ``bayes``.
        parameters: What varies, by dotted key.
        command: The command line, with W&B's macros such as ``${args}``.
        program: What ``${program}`` stands for.
        metric: What the trials are compared by: a key of metrics.csv. None if the file names none.
        maximize: Whether a larger metric is better.
        name: The sweep's name; the file's if it gives none.
        run_cap: Most trials, where they are drawn.
        project: The W&B project.
    """

    path: Path
    method: str
    parameters: dict[str, Parameter]
    command: tuple[str, ...]
    program: str
    metric: str | None
    maximize: bool
    name: str
    run_cap: int | None = None
    project: str | None = None
    text: str = field(default="", repr=False)

    @property
    def varied(self) -> list[str]:
        """The keys that can differ between trials."""
        return [key for key, parameter in self.parameters.items() if len(parameter.values) != 1]

    def identity(self) -> str:
        """A digest of what makes trials of two sweeps comparable: all but its values, ranges and metric."""
        said = [self.method, self.program, list(self.command), sorted(self.parameters)]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()

    def ranges(self) -> dict[str, Any]:
        """What each parameter is drawn from, as plain data; a grid draws nothing."""
        if self.method == "grid":
            return {}
        return json.loads(json.dumps({key: vars(parameter) for key, parameter in self.parameters.items()}))

    def files(self) -> dict[str, str]:
        """Digests of the files that the command and the parameters name, so that a change is seen."""
        named = [*self.command, *(value for parameter in self.parameters.values() for value in parameter.values)]
        paths = {str(value) for value in named if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json"))}
        return {
            path: hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
            for path in sorted(paths)
            if Path(path).is_file()
        }


def read_spec(path: str | Path) -> SweepSpec:
    """Reads a sweep file.

    Args:
        path: A W&B sweep YAML.

    Raises:
        UserError: It cannot be read, or says something that is unknown, missing or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        said = yaml.load(text, Loader=_Strict)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The sweep file {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"The sweep file {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(said, dict):
        raise UserError(f"The sweep file {path} must be a mapping with method and parameters.")
    _known(path, said, KEYS, "")
    if "early_terminate" in said:
        raise UserError(f"{path}: early_terminate is not done here; leave it out, or run the sweep by `wandb agent`.")
    method = said.get("method")
    if method not in METHODS:
        raise UserError(f"{path}: method must be one of {', '.join(METHODS)}, not {method!r}.")
    metric, maximize = _metric(path, said.get("metric"))
    if method == "bayes" and metric is None:
        raise UserError(f"{path}: method bayes needs metric.name and metric.goal.")
    parameters: dict[str, Parameter] = {}
    for key, parameter in _parameters(path, said.get("parameters"), "", "parameters"):
        if key in parameters:
            raise UserError(f"{path}: parameters.{key} is there twice: flat, and below another key.")
        parameters[key] = parameter
        if method == "grid" and parameter.distribution in UNIFORM:
            raise UserError(f"{path}: parameters.{key} is a range, of which no grid can be made; give it values.")
    run_cap = said.get("run_cap")
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        raise UserError(f"{path}: run_cap must be a whole number above 0, not {run_cap!r}.")
    program = str(said.get("program", "bfpo"))
    project = said.get("project")
    return SweepSpec(
        path, method, parameters, _command(path, said.get("command")), program, metric, maximize,
        str(said.get("name") or path.stem), run_cap, None if project is None else str(project), text,
    )  # fmt: skip


def grid(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """All combinations of a grid, the last parameter changing fastest."""
    for values in product(*(parameter.values for parameter in spec.parameters.values())):
        yield dict(zip(spec.parameters, values, strict=True))


def _known(path: Path, said: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in said:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise UserError(f"{path}: {where}{key} is unknown.{meant} Known: {', '.join(known)}.")


def _metric(path: Path, said: Any) -> tuple[str | None, bool]:
    if said is None:
        return None, True
    if not isinstance(said, dict) or "name" not in said:
        raise UserError(f"{path}: metric must have a name and a goal (minimize or maximize).")
    _known(path, said, ("name", "goal", "target"), "metric.")
    goal = said.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise UserError(f"{path}: metric.goal must be minimize or maximize, not {goal!r}.")
    return str(said["name"]), goal == "maximize"


def _command(path: Path, said: Any) -> tuple[str, ...]:
    if said is None:
        return ("${env}", "${interpreter}", "${program}", "${args}")  # W&B's own default
    if not isinstance(said, list) or not said:
        raise UserError(f"{path}: command must be a list of words.")
    return tuple(str(word) for word in said)


def _parameters(path: Path, given: Any, prefix: str, where: str) -> Iterator[tuple[str, Parameter]]:
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path}: {where} must map keys such as model.loss.tau to what they may be, not {given!r}.")
    for name, said in given.items():
        key = f"{prefix}{name}"
        if not isinstance(said, dict):
            raise UserError(f"{path}: parameters.{key} must say value, values or a distribution, not {said!r}.")
        _known(path, said, PARAMETER_KEYS, f"parameters.{key}.")
        if "parameters" in said:
            yield from _parameters(path, said["parameters"], f"{key}.", f"parameters.{key}.parameters")
        else:
            yield key, _parameter(path, key, said)


def _same(value: Any, other: Any) -> bool:
    """Whether two values are one; true is not 1 to a command line."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _plain(value: Any, where: str) -> None:
    """Refuses what no command line, and no record of a trial, can hold: YAML reads some texts as dates."""
    if isinstance(value, list):
        for each in value:
            _plain(each, where)
    elif isinstance(value, dict):
        for key, each in value.items():
            _plain(each, where)
            if not isinstance(key, str):
                raise UserError(f"{where} has the key {key!r}, which is no text; put it in quotes.")
    elif value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where} has {value}, which YAML reads as {type(value).__name__}; put it in quotes.")


def _parameter(path: Path, key: str, said: dict[str, Any]) -> Parameter:
    where = f"{path}: parameters.{key}"
    if "value" in said:
        _plain(said["value"], f"{where}.value")
        return Parameter((said["value"],))
    if "values" in said:
        values = said["values"]
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}.values must be a list with something in it; a grid over it is empty.")
        doubled = [value for index, value in enumerate(values) if any(_same(value, other) for other in values[:index])]
        if doubled:
            raise UserError(f"{where}.values has {doubled[0]!r} twice.")
        for value in values:
            _plain(value, f"{where}.values")
        return Parameter(tuple(values))
    return _range(where, said)


def _range(where: str, said: dict[str, Any]) -> Parameter:
    low, high, step = (_number(where, said, name) for name in ("min", "max", "q"))
    if low is None or high is None or not low < high:
        raise UserError(f"{where} needs value, values, or min and max with min below max; it has {said}.")
    whole = isinstance(low, int) and isinstance(high, int)
    distribution = said.get("distribution", "int_uniform" if whole else "uniform")
    if distribution not in UNIFORM:
        raise UserError(
            f"{where}.distribution {distribution!r} does not run here; known: {', '.join(DISTRIBUTIONS)}. "
            f"`wandb agent` knows more."
        )
    if distribution == "q_log_uniform_values":
        raise UserError(f"{where}: q_log_uniform_values does not run here; use log_uniform_values or values.")
    if distribution == "int_uniform" and not whole:
        raise UserError(f"{where}: int_uniform needs whole numbers, not min {low} and max {high}.")
    if distribution == "log_uniform":  # W&B gives the exponents of e
        distribution, low, high = "log_uniform_values", math.exp(low), math.exp(high)
    if "log" in distribution and low <= 0:
        raise UserError(f"{where}: min must be above 0 for {distribution}.")
    if distribution == "q_uniform":
        step = 1.0 if step is None else step  # W&B's default
        if not 0 < step <= high - low:
            raise UserError(f"{where}: q must be above 0 and at most max - min, not {step}.")
    elif step is not None:
        raise UserError(f"{where}: q is for q_uniform, not for {distribution}.")
    return Parameter((), distribution, low, high, step)


def _number(where: str, said: dict[str, Any], name: str) -> float | None:
    """A finite number, if there is one of that name."""
    value = said.get(name)
    if value is None:
        return None
    if isinstance(value, str) and (text := _TEXT_OF_A_NUMBER.fullmatch(value)):
        mantissa, exponent = text.groups()
        shown = mantissa
        if exponent:  # what YAML asks of one: a point and a sign
            shown = f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{int(exponent):+d}"
        raise UserError(f"{where}.{name}: YAML reads {value} as a text; write {shown}.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}.{name} must be a finite number, not {value!r}.")
    return value
