"""Progress of work on many rows: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_ROWS_WORTH_TELLING = 20_000
_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def telling(label: str, total: int | None, worth: int = _ROWS_WORTH_TELLING) -> Iterator[Callable[[int], None]]:
    """Tells on rank zero how far some work is, if its rows are many; gives a function that counts rows done.

    Args:
        label: What is done, for instance ``tokenising safety, train``.
        total: Rows to do; None if that is not known.
        worth: Of so few rows nothing is told.
    """
    few = total is not None and total <= worth
    if few or getattr(rank_zero_only, "rank", 0) != 0:
        yield lambda count: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(label, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


def _lines(label: str, total: int | None) -> Callable[[int], None]:
    """A function that counts rows done and prints a line every now and then."""
    done, told = 0, time.monotonic()
    of = "" if total is None else f" of {total:,}"

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if done != total and time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
            rank_zero_info(f"{label}: {done:,}{of} rows")
            told = time.monotonic()

    return advance
