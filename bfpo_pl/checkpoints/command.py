"""`bfpo checkpoints`: the checkpoints of a run, and what is wrong with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from bfpo_pl.checkpoints.atomic import follow
from bfpo_pl.checkpoints.check import checkpoint_step, problem
from bfpo_pl.checkpoints.find import checkpoints_folder, checkpoints_in, half_written
from bfpo_pl.checkpoints.index import Index
from bfpo_pl.checkpoints.keep import LAST
from bfpo_pl.checkpoints.manifest import DamageError, read_manifest
from bfpo_pl.checkpoints.shards import ForeignCodeError
from bfpo_pl.checkpoints.space import shown
from bfpo_pl.component import UserError

USAGE = """\
usage: bfpo checkpoints RUN [--verify]

The checkpoints of a run: step, size, whether one file or sharded, and whether it is complete or what is wrong with it.
  RUN        A run's folder, or its folder of checkpoints.
  --verify   Read all of each and compare it with its hashes; otherwise sizes are compared.

Exit code 1 if one is not complete."""


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"bfpo checkpoints: {message}.\n{USAGE}")


def run_checkpoints(args: list[str]) -> None:
    """Lists the checkpoints of a run.

    Args:
        args: Command line after ``bfpo checkpoints``.

    Raises:
        UserError: There is no such folder.
        SystemExit: With code 1, if a checkpoint is not complete.
    """
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(USAGE)
        return
    options = _Options(add_help=False, allow_abbrev=False)
    options.add_argument("run", type=Path)
    options.add_argument("--verify", action="store_true")
    chosen = options.parse_args(args)
    if not chosen.run.is_dir():
        raise UserError(f"There is no folder '{chosen.run}'.")
    table, complete = _table(chosen.run, chosen.verify)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table, highlight=False)
    if not complete:
        raise SystemExit(1)


def _table(run: Path, verify: bool) -> tuple[Table, bool]:
    """The table, and whether all checkpoints in it are complete."""
    folder = checkpoints_folder(run)
    last, index = follow(folder / LAST).name, Index.read(folder)
    best = next(iter(index.ranked()), None)
    table = Table(title=str(folder), title_justify="left", box=None, pad_edge=False)
    for name in (
        "checkpoint",
        "step",
        "size",
        "kind",
        index.monitor or "score",
        "",
        "verified" if verify else "complete",
    ):
        table.add_column(name, justify="right" if name in ("step", "size") else "left")
    all_complete = True
    for path in reversed(checkpoints_in(folder)):
        reason = _problem(path, verify)
        all_complete = all_complete and reason is None
        marks = [mark for mark, named in (("last", last), ("best", best)) if path.name == named]
        score, step = index.scores.get(path.name), checkpoint_step(path)
        table.add_row(
            path.name,
            "?" if step is None else str(step),
            shown(_size(path)),
            _kind(path),
            "" if score is None else f"{score:.6g}",
            ", ".join(marks),
            reason or "yes",
        )
    for part in half_written(folder):
        table.add_row(part.name, "", shown(_size(part)), "", "", "", "no: half-written; the next run here deletes it")
    return table, all_complete


def _problem(path: Path, verify: bool) -> str | None:
    try:
        reason = problem(path, verify)
    except ForeignCodeError as error:
        reason = f"reading it would run code: {error}"
    return None if reason is None else f"no: {reason}"


def _kind(path: Path) -> str:
    try:
        manifest = read_manifest(path)
    except DamageError:
        manifest = None
    kind = "sharded" if path.is_dir() else "file"
    if manifest is None:
        return f"{kind}, no manifest"
    return f"{kind}, {manifest.processes} processes" if path.is_dir() else kind


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
