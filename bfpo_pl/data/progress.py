"""Progress of tokenising: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bfpo_pl.data.rows import Row

_CHUNK = 256
_ROWS_WORTH_TELLING = 20_000
_SECONDS_BETWEEN_LINES = 15.0


def in_chunks(rows: Sequence[Row], label: str) -> Generator[Sequence[Row], None, None]:
    """The rows in chunks, telling on rank zero how far they are if they are many.

    Args:
        rows: The rows.
        label: What they are.
    """
    chunks = (rows[first : first + _CHUNK] for first in range(0, len(rows), _CHUNK))
    if len(rows) <= _ROWS_WORTH_TELLING or getattr(rank_zero_only, "rank", 0) != 0:
        yield from chunks
        return
    console = Console(stderr=True)
    yield from (_with_bar if console.is_terminal else _with_lines)(chunks, len(rows), f"tokenising {label}", console)


def _with_bar(chunks: Iterator[Sequence[Row]], total: int, label: str, console: Console) -> Iterator[Sequence[Row]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        for chunk in chunks:
            yield chunk
            progress.advance(task, len(chunk))


def _with_lines(chunks: Iterator[Sequence[Row]], total: int, label: str, console: Console) -> Iterator[Sequence[Row]]:
    done, told = 0, time.monotonic()
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if done < total and time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
            rank_zero_info(f"{label}: {done:,} of {total:,} rows")
            told = time.monotonic()
