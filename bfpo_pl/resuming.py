"""Going on with a run in its own folder: which run, from which checkpoint, and what became of it so far."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bfpo_pl.checkpoints.atomic import write_text
from bfpo_pl.checkpoints.find import newest_complete
from bfpo_pl.component import UserError
from bfpo_pl.runs import newest_first, recorded

STATUS = "status.json"
"""Name of the file in a run's folder that says what became of it."""

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"

HOW = ("ckpt_path", "resume", "runs", "verify", "trainer.max_time")
"""Settings that say how a run is started, not which run it is."""


@dataclass(frozen=True)
class Resumption:
    """A run to go on with.

    Args:
        folder: Its folder.
        checkpoint: Its newest complete checkpoint; None if it has none, so that it starts anew in its folder.
        step: The checkpoint's optimizer step, if that can be told.
    """

    folder: Path
    checkpoint: Path | None
    step: int | None


class AlreadyFinished(Exception):
    """The run that was to go on has finished; there is nothing to do."""


def resumption(
    asked: str | None, experiment: Path, command: str, config: dict[str, Any], verify: bool = False
) -> Resumption | None:
    """What ``--resume`` means.

    Args:
        asked: ``auto`` for the newest run of this command and config, if there is one; or a run's folder.
        experiment: The folder of the experiment's runs.
        command: The command, such as ``fit``.
        config: Its whole resolved config, without secrets.
        verify: Whether to compare the checkpoint's hashes, too.

    Returns:
        The run to go on with; None to start one.

    Raises:
        AlreadyFinished: That run has finished.
        UserError: There is no such run, or it is another config's; the message names what differs.
    """
    if asked is None:
        return None
    if asked == "auto":
        folder = next((each for each in newest_first(experiment) if _is_same(each, command, config)), None)
        if folder is None:
            rank_zero_info(f"--resume auto: {experiment} has no run of this config; a new one starts.")
            return None
    else:
        folder = Path(asked).absolute()
        _check_same(folder, command, config)
    if (read_status(folder) or {}).get("state") == FINISHED:
        raise AlreadyFinished(f"The run {folder} has finished. For another one leave out --resume.")
    found = newest_complete(folder, verify)
    for passed in found.passed_over:
        rank_zero_warn(f"Passed over: {passed}")
    where = f"from {found.path.name}" if found.path else "from the start, since it has no complete checkpoint"
    rank_zero_info(f"Going on with the run {folder} {where}.")
    return Resumption(folder, found.path, found.step)


def _is_same(folder: Path, command: str, config: dict[str, Any]) -> bool:
    found = recorded(folder)
    return found is not None and found[0] == command and not differences(found[1], config)


def _check_same(folder: Path, command: str, config: dict[str, Any]) -> None:
    found = recorded(folder) if folder.is_dir() else None
    if found is None:
        raise UserError(f"--resume: '{folder}' is not the folder of a run: it has no config.yaml that can be read.")
    if found[0] != command:
        raise UserError(f"--resume: the run {folder} is one of `bfpo {found[0]}`, not of `bfpo {command}`.")
    changed = differences(found[1], config)
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"--resume: the run {folder} has another config: {'; '.join(changed[:5])}{more}. To go on from its "
            f"checkpoint with new settings, in a new folder: --ckpt_path={folder}."
        )


def differences(recorded: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What a run's config says otherwise, as one text for each setting; how it is started does not count.

    Args:
        recorded: The run's.
        config: The other one.
    """
    first, second = (
        {key: value for key, value in _flat(each) if not any(f"{key}.".startswith(f"{how}.") for how in HOW)}
        for each in (recorded, config)
    )
    missing = "not set"
    return [
        f"{key} is {first.get(key, missing)} there and {second.get(key, missing)} here"
        for key in sorted(first.keys() | second.keys())
        if first.get(key, missing) != second.get(key, missing)
    ]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


# ---- status -----------------------------------------------------------------------------------------------------


def read_status(folder: Path) -> dict[str, Any] | None:
    """What became of a run; None if its folder does not say."""
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def write_status(folder: Path, state: str, **more: Any) -> None:
    """Says what became of a run, in one step, so that the file is whole at any time.

    Args:
        folder: The run's folder.
        state: ``running``, ``finished``, ``stopped`` (by a signal, or as its time was up) or ``failed``. A run that was
            killed stays ``running``.
        **more: Further plain data, which replaces what the file says of the same names.
    """
    own = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname()}
    status = {**(read_status(folder) or {}), **own, "process": os.getpid(), **more}
    write_text(folder / STATUS, json.dumps(status, indent=2) + "\n")
