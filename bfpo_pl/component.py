"""What every configurable component shares: a readable repr and checked arguments."""

from __future__ import annotations

import math


class UserError(ValueError):
    """A mistake in what was asked for: the message says what and how to mend it, and no traceback is needed."""


class RunError(RuntimeError):
    """A run that must stop: the message says why, and no traceback is needed."""

    exit_code = 1
    """The command's exit code."""


class Component:
    """Base of labelings, losses and other parts named by ``class_path``; its repr shows the resolved arguments."""

    def __repr__(self) -> str:
        # What the class declares for all its instances (``requires``, say) is no argument.
        shown = {key: value for key, value in vars(self).items() if key[0] != "_" and not hasattr(type(self), key)}
        arguments = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        return f"{type(self).__name__}({arguments})"


def check_range(
    owner: object,
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Returns ``value`` as a float if it lies between ``low`` and ``high``, ends included unless said to be open.

    Raises:
        UserError: It does not; the message names the class, the argument, the value and the range.
    """
    number = float(value)
    above = low < number if low_open else low <= number
    below = number < high if high_open or math.isinf(high) else number <= high
    if not (above and below):
        opening = "(" if low_open else "["
        closing = ")" if high_open or math.isinf(high) else "]"
        raise UserError(f"{type(owner).__name__}: {name} must lie in {opening}{low:g}, {high:g}{closing}, not {value}.")
    return number


def causes_of(error: BaseException) -> list[BaseException]:
    """An error and those that led to it."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes
