"""Command lines of plain functions: their arguments are the options, their docstrings the help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from bfpo_pl.component import UserError


class FunctionParser(ArgumentParser):
    """A parser whose mistakes are raised, to be said like all others."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = "" if self.prog is None or " " not in self.prog else f"{self.prog}: "
        raise UserError(prog + re.sub(r"\n\s*\n+", "\n", message.strip()).removesuffix(".") + ".")


def call_with(name: str, function: Callable[..., Any], args: list[str]) -> Any:
    """Calls a function with arguments as typed; ``--help`` prints its docstring.

    Lists of strings are typed as words: ``--metrics a b``; a list without a default is what stands before the options.

    Args:
        name: The command as typed, such as ``bfpo export``.
        function: The function.
        args: Command line after it.

    Returns:
        What the function returns.

    Raises:
        UserError: An option is unknown, missing or of the wrong type.
    """
    parser = FunctionParser(prog=name, description=(inspect.getdoc(function) or "").partition("\n\nArgs:")[0])
    lists = _add_lists(parser, function)
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip={*lists})
    return function(**parser.parse_args(args).as_dict())


def _add_lists(parser: ArgumentParser, function: Callable[..., Any]) -> list[str]:
    """Adds a function's lists of strings as words, and returns their names."""
    hints, documented = get_type_hints(function), parse_docstring(inspect.getdoc(function) or "").params
    help_texts = {each.arg_name: each.description for each in documented}
    lists = [key for key in inspect.signature(function).parameters if hints[key] in (list[str], list[str] | None)]
    for key in lists:
        required = inspect.signature(function).parameters[key].default is inspect.Parameter.empty
        place = key if required else f"--{key}"
        parser.add_argument(place, nargs="+", type=str, help=help_texts.get(key), metavar=key.upper())
    return lists


def build(base: type, given: Any, key: str) -> Any:
    """A component from what a config says of it.

    Args:
        base: The class that it must be an instance of.
        given: ``class_path`` and ``init_args``, or a class's name.
        key: The config's key, for messages.

    Raises:
        UserError: There is no such class, or it takes other arguments.
    """
    parser = FunctionParser()
    parser.add_argument("--component", type=base)
    try:
        return parser.instantiate_classes(parser.parse_object({"component": given})).component
    except UserError as error:
        raise UserError(f"{key} of the run: {error}") from error
