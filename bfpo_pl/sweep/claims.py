"""Claims: files that say which process has taken a trial, and that it lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

from bfpo_pl.checkpoints.atomic import write_text
from bfpo_pl.component import UserError

STALE = 90.0
"""Seconds without a sign of life after which a trial is free again whose process cannot be looked for from here."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")


def write_claim(path: Path, *trial: int) -> None:
    """Says that this process has taken a trial.

    Args:
        path: The claim.
        *trial: The trial's process, once it runs: while that lives, the trial is not free, whatever became of this one.
    """
    processes = [os.getpid(), *trial]
    claim = {**_machine(), "processes": processes, "started": [_started(process) for process in processes]}
    write_text(path, json.dumps(claim) + "\n")


def read_record(path: Path, remedy: str) -> dict[str, Any] | None:
    """A file of JSON in a sweep's folder; None if it is not there.

    Args:
        path: The file.
        remedy: What to do if it is damaged.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). {remedy}") from error


def read_claim(path: Path) -> dict[str, Any] | None:
    """Who has taken a trial; None if nobody has.

    Raises:
        UserError: The file is damaged.
    """
    return read_record(path, "Delete it if no process runs the trial.")


def is_own(claim: dict[str, Any]) -> bool:
    """Whether a claim is this process's."""
    first = [claim["processes"][0], claim.get("started", [None])[0]]
    return _is_from_here(claim) and first == [os.getpid(), _started(os.getpid())]


def is_alive(path: Path, clock: Path) -> bool:
    """Whether a process that lives, other than this one, has taken a trial.

    Args:
        path: The claim.
        clock: A file beside it to read the file system's time from: machines' clocks differ.
    """
    claim = read_claim(path)
    if claim is None:
        return False
    if claim.get("boot") and _is_from_here(claim):
        lives = [_lives(*each) for each in zip(claim["processes"], claim["started"], strict=True)]
        if True in lives or None not in lives:
            return True in lives
    clock.touch()
    try:
        return clock.stat().st_mtime - path.stat().st_mtime < STALE
    except FileNotFoundError:
        return False  # it ended just now


def beat(path: Path) -> None:
    """Gives a sign of life, if the claim is still this process's."""
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        if is_own(json.load(file)):
            os.utime(file.fileno())  # not the path: a claim of another process may have taken its place


@cache
def _machine() -> dict[str, str | None]:
    """Where this process's number means something: a host since its start, and a container's processes in it."""
    host = socket.gethostname()
    try:
        return {"host": host, "boot": _BOOT.read_text().strip(), "namespace": os.readlink(_NAMESPACE)}
    except OSError:  # no Linux: processes are not looked for, and signs of life decide
        return {"host": host, "boot": None, "namespace": None}


def _is_from_here(claim: dict[str, Any]) -> bool:
    return all(claim.get(key) == value for key, value in _machine().items())


def _started(process: int) -> str | None:
    """When a process started, in ticks since the machine did: its number may be given anew. None if it has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] == "Z" else state[19]  # fields 3 and 22 of proc_pid_stat(5)


def _lives(process: int, started: str | None) -> bool | None:
    """Whether another process of this machine lives; None if the machine does not say."""
    if process == os.getpid():
        return False  # the number of this one, given anew; or a claim of its own that it left behind
    found = _started(process)
    if found is not None:
        return found == started
    try:
        os.kill(process, 0)
    except PermissionError:
        return None  # another user's, of which /proc shows nothing here
    except ProcessLookupError:
        pass
    return False
